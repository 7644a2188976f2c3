"""What a teacher gives for every sample of a stage, kept on a disk, so that training needs no teacher in memory.

A stage's folder holds index.json, which says what the cache is made of and whether it is finished, safetensors shards in the
order of the samples, and one JSON file beside each shard with its size and CRC-32. Per labelled token: the largest
log-probabilities and their ids; per sample: the window means that VAT aligns the student with (paper section 4.1, equation 2).
"""

from __future__ import annotations

import json
import tempfile
import zlib
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from cdistill.data import strict_yaml
from cdistill.data.dataset import BAD
from cdistill.data.samples import IGNORE_INDEX
from cdistill.data.templates import Template
from cdistill.models.load import DTYPES, Model, resolve_folder
from cdistill.models.processor import FILES, IMAGE_PROCESSORS, has_image_processor
from cdistill.models.taf import TAFAdapter
from cdistill.runtime import checkpoints, launch
from cdistill.runtime.collectives import naming_lost_peers, on_first_process
from cdistill.runtime.errors import Stopped
from cdistill.runtime.zero import is_partitioned
from cdistill.train.alignment import vat_of
from cdistill.train.build import Models, build_models
from cdistill.train.config import Recipe, StageConfig
from cdistill.train.data import open_stage
from cdistill.train.model import DistillationModel
from cdistill.train.recipes import recipe_to_dict
from cdistill.train.resolve import Stage, precision_of, resolve
from cdistill.train.teacher import hold_teacher
from cdistill.train.values import first_difference
from cdistill.vat import VAT

INDEX = "index.json"
PER_SHARD = 256  # samples
SHARDS_IN_MEMORY = 2  # of one worker: samples are read in order
ROWS_OF_LOGITS = 256
ADVICE = "run `cdistill cache` again when there is room: it goes on"


class Kept(NamedTuple):
    """What a teacher gave for one sample."""

    values: Tensor  # (A, K) natural log-probabilities of its labelled tokens
    indices: Tensor  # (A, K) int32
    targets: Tensor  # (L, [Hq,] R, V), R or V 0 where there is nothing to align; (0,) without alignment
    tokens: int  # CRC-32 of its input_ids


def stage_cache(stage: Stage) -> Path:
    """Folder of a stage in the cache that its recipe names."""
    assert stage.recipe.teacher_memory.cache is not None
    return Path(stage.recipe.teacher_memory.cache) / stage.label


def fingerprint(stage: Stage, models: Models, vat: VAT | None) -> dict[str, Any]:
    """All that decides what the teacher gives for the samples of a stage: its own files, the samples, the windows."""
    recipe, config = stage.recipe, stage.config
    assert recipe.teacher is not None
    whole = recipe_to_dict(recipe)
    folder = resolve_folder(recipe.teacher, "teacher")
    patterns = ("*.safetensors", "config.json", *FILES)
    files = sorted({path for pattern in patterns for path in folder.glob(pattern)})
    reader: list[Path] = []
    if models.reader is not None and not has_image_processor(folder):
        assert recipe.student.base is not None
        base = resolve_folder(recipe.student.base, "student.base")
        reader = [base / name for name in IMAGE_PROCESSORS if (base / name).is_file()]
    data = whole["stage"][stage.name]["data"]
    return {
        "teacher": {str(path.relative_to(folder)): _checksum(path) for path in files},
        "student.base": {path.name: _checksum(path) for path in reader},
        "teacher_memory": {key: whole["teacher_memory"][key] for key in ("quantization", "top_k")},
        "precision": precision_of(recipe),
        "vocabulary": min(_vocabulary(model) for model in (models.student, models.teacher)),
        "kd": {"temperature": recipe.kd.temperature},
        "vat": None if vat is None else {key: whole["vat"][key] for key in ("rows", "heads")},
        "windows": [] if vat is None else [[match.student, *match.teachers] for match in vat.matches],
        "samples": stage.samples,
        "seed": stage.data_seed,
        "data": {key: value for key, value in data.items() if key != "seed"},
        "template": _template(models, config),
        "group_by": recipe.group_by,
        "global_batch_size": config.global_batch_size if recipe.group_by else None,  # it orders the samples
    }


def _template(models: Models, stage: StageConfig) -> int | None:
    """Checksum of the template, which decides what is an answer's: a file may change under its name."""
    if stage.data.path is None:
        return None
    return zlib.crc32(Template(models.reader or models.processor, stage.data.template).source.encode())


def _vocabulary(model: Model) -> int:
    return model.config.get_text_config(decoder=True).vocab_size


def _checksum(path: Path) -> int:
    status = path.stat()
    return _checksum_of(path, status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=1024)
def _checksum_of(path: Path, changed: int, size: int) -> int:
    """A teacher's files are read once in a run, not for each of its stages."""
    return checkpoints.checksum(path)


class Work(NamedTuple):
    """What is left to do of a stage's cache."""

    samples: int
    per_shard: int
    missing: list[int]  # shards

    def batches(self, shard: int, size: int) -> list[range]:
        """A shard's samples in batches."""
        stop = min((shard + 1) * self.per_shard, self.samples)
        return [range(i, min(i + size, stop)) for i in range(shard * self.per_shard, stop, size)]


class CacheWriter:
    """Writes what a teacher gives for the samples of one stage: `begin`, `write` on every process, `finish`.

    Args:
        folder: of the stage; shards that are already there and whole are kept.
        top_k, temperature: of the log-probabilities.
        dtype: of what is stored; fp16 for log-probabilities and bf16 for targets, whose small numbers fp16 would lose, unless
            it is fp32.
    """

    def __init__(self, folder: Path, *, top_k: int, temperature: float, dtype: torch.dtype) -> None:
        self.folder, self.top_k, self.temperature = folder, top_k, temperature
        exact = dtype == torch.float32
        self.dtypes = (torch.float32, torch.float32) if exact else (torch.float16, torch.bfloat16)

    def begin(self, facts: dict[str, Any]) -> Work:
        """Say in the folder what the cache is made of, the `fingerprint`, before its first shard; one process calls it.

        Raises ValueError if the folder holds another cache, whole or not, naming the key that differs.
        """
        samples, per_shard = facts["samples"], PER_SHARD
        path = self.folder / INDEX
        if path.is_file():
            per_shard = _read_index(self.folder, facts)["per_shard"]
        else:
            self.folder.mkdir(parents=True, exist_ok=True)
            for shard in self.folder.glob("shard-*.json"):  # nobody knows what these are made of
                shard.unlink()
            self._write_index(facts, per_shard, finished=False)
        shards = range(-(-samples // per_shard))
        return Work(samples, per_shard, [i for i in shards if _fault(_shard(self.folder, i), contents=True)])

    def write(
        self,
        model: DistillationModel,
        dataset: Dataset,
        collate: Callable[[list[Any]], dict[str, Tensor]],
        work: Work,
        *,
        batch_size: int,
        device: torch.device,
        rank: int,
        world: int,
        progress: Callable[[int], Any],
    ) -> None:
        """Run the teacher over this process's share of the shards.

        Over a partitioned teacher all processes run equally often: one whose shard has fewer batches than another's, or that
        has none left, runs its last batch again. Raises RunError if the disk is full.
        """
        assert model.teacher is not None
        together = is_partitioned(model.teacher)
        for start in range(0, len(work.missing), world):
            turn = work.missing[start : start + world]
            shares = [work.batches(shard, batch_size) for shard in turn]
            own = shares[rank] if rank < len(turn) else []
            kept: list[Kept] = []
            for call in range(max(map(len, shares))):
                if call < len(own) or together:
                    batch = own[call] if call < len(own) else (own or shares[-1])[-1]
                    given = self._ask(model, collate([dataset[i] for i in batch]), device)
                    kept += given if call < len(own) else []
                progress(sum(len(share[call]) for share in shares if call < len(share)))
            if own:
                self._save(turn[rank], kept)

    def finish(self, facts: dict[str, Any], work: Work) -> None:
        """Say that the cache is finished; one process calls it when all have written their shares."""
        for shard in range(-(-work.samples // work.per_shard)):
            fault = _fault(_shard(self.folder, shard), contents=False)
            if fault is not None:
                raise ValueError(f"teacher_memory.cache must be a folder that all processes share: {fault}")
        self._write_index(facts, work.per_shard, finished=True)

    def _write_index(self, facts: dict[str, Any], per_shard: int, *, finished: bool) -> None:
        text = json.dumps({"finished": finished, "per_shard": per_shard, "made_of": facts}, indent=1) + "\n"
        with checkpoints.saving(self.folder / INDEX, len(text), advice=ADVICE):
            checkpoints.write_atomically(self.folder / INDEX, text)

    @torch.no_grad()
    def _ask(self, model: DistillationModel, batch: dict[str, Tensor], device: torch.device) -> list[Kept]:
        batch.pop(BAD, None)  # they are told when the cache is trained from
        ids, labels, real = batch["input_ids"], batch["labels"], batch["attention_mask"].bool()
        hidden, targets, regions = model.ask_teacher(**{name: value.to(device) for name, value in batch.items()})
        values, indices = self._largest(model, hidden)
        counts = (labels[:, 1:] != IGNORE_INDEX).sum(1).tolist()
        parts = zip(values.split(counts), indices.split(counts), strict=True)
        aligned = self._targets(model, targets, regions, len(counts))
        return [
            Kept(largest, which, aligned[b], tokens_of(ids[b][real[b]])) for b, (largest, which) in enumerate(parts)
        ]

    def _targets(self, model: DistillationModel, targets: list[Tensor], regions: Any, samples: int) -> list[Tensor]:
        """Every sample's targets (L, [Hq,] R, V), where R or V may be 0; (0,) without alignment."""
        if model.vat is None or model.teacher is None:
            return [torch.zeros(0, dtype=self.dtypes[1])] * samples
        heads = []
        if model.vat.config.heads == "each":
            heads = [model.teacher.model.config.get_text_config().num_attention_heads]
        rows, cols = ((x >= 0).sum(1).tolist() for x in (regions.rows, regions.cols))
        whole = torch.stack(targets).to(self.dtypes[1]).cpu() if targets else None
        found = []
        for b, (height, width) in enumerate(zip(rows, cols, strict=True)):
            target = torch.zeros(len(model.vat.matches), *heads, height, width, dtype=self.dtypes[1])
            if target.numel():
                assert whole is not None
                target = whole[:, b, ..., :height, :width].clone()
            found.append(target)
        return found

    def _largest(self, model: DistillationModel, hidden: Tensor) -> tuple[Tensor, Tensor]:
        assert model.teacher is not None
        values, indices = [], []
        with model.teacher.head() as head:
            for rows in hidden.split(ROWS_OF_LOGITS):
                logits = head(rows)[:, : model.vocabulary].float() / self.temperature
                largest = logits.log_softmax(-1).topk(self.top_k)
                values.append(largest.values.to(self.dtypes[0]).cpu())
                indices.append(largest.indices.to(torch.int32).cpu())
        none = torch.zeros(0, self.top_k)
        return torch.cat([none.to(self.dtypes[0]), *values]), torch.cat([none.to(torch.int32), *indices])

    def _save(self, shard: int, kept: list[Kept]) -> None:
        tensors = {
            "values": torch.cat([k.values for k in kept]),
            "indices": torch.cat([k.indices for k in kept]),
            "targets": torch.cat([k.targets.flatten() for k in kept]),
            "answers": torch.tensor([len(k.values) for k in kept]),
            "shapes": torch.tensor([[*k.targets.shape, *(-1 for _ in range(4 - k.targets.dim()))] for k in kept]),
            "tokens": torch.tensor([k.tokens for k in kept]),
        }
        path = _shard(self.folder, shard)
        part = path.with_suffix(".part")
        with checkpoints.saving(path, sum(t.nbytes for t in tensors.values()), advice=ADVICE):
            try:
                path.with_suffix(".json").unlink(missing_ok=True)
                save_file(tensors, part)
                stored = checkpoints.stored(part)
                checkpoints.publish(part, path)
                checkpoints.write_atomically(path.with_suffix(".json"), json.dumps(stored))
            except (OSError, SafetensorError):
                part.unlink(missing_ok=True)
                raise


class StageCache:
    """Reads what `CacheWriter` has kept for one stage; ``vocabulary`` is how many tokens both models know.

    Raises:
        ValueError: the cache is missing, unfinished or of another run (naming the key that differs), or a shard is missing,
            cut or, when it is first read, changed.
    """

    def __init__(self, folder: Path, facts: dict[str, Any]) -> None:
        index = _read_index(folder, facts) if (folder / INDEX).is_file() else None
        if index is None or not index["finished"]:
            state = "is not finished" if folder.is_dir() and any(folder.iterdir()) else "does not exist"
            raise ValueError(f"teacher_memory.cache: {folder} {state}; run `cdistill cache` with this recipe")
        self.folder, self.samples, self.per_shard = folder, facts["samples"], index["per_shard"]
        self.vocabulary: int = facts["vocabulary"]
        for shard in range(-(-self.samples // self.per_shard)):
            self._require_whole(shard, contents=False)
        self._read = lru_cache(SHARDS_IN_MEMORY)(self._load)

    def __getitem__(self, sample: int) -> Kept:
        shard, place = divmod(sample, self.per_shard)
        return self._read(shard)[place]

    def _require_whole(self, shard: int, *, contents: bool) -> None:
        fault = _fault(_shard(self.folder, shard), contents=contents)
        if fault is not None:
            raise ValueError(f"teacher_memory.cache: {fault}; run `cdistill cache` with this recipe again")

    def _load(self, shard: int) -> list[Kept]:
        path = _shard(self.folder, shard)
        self._require_whole(shard, contents=True)
        try:
            tensors = load_file(path)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"teacher_memory.cache: {path} cannot be read ({error})") from None
        counts = tensors["answers"].tolist()
        shapes = [torch.Size(n for n in shape if n >= 0) for shape in tensors["shapes"].tolist()]
        return [
            Kept(values, indices, target.view(shape), tokens)
            for values, indices, target, shape, tokens in zip(
                tensors["values"].split(counts),
                tensors["indices"].split(counts),
                tensors["targets"].split([shape.numel() for shape in shapes]),
                shapes,
                tensors["tokens"].tolist(),
                strict=True,
            )
        ]


def _read_index(folder: Path, facts: dict[str, Any]) -> dict[str, Any]:
    """The index of a cache. Raises ValueError if it is corrupt or of a cache that is made of other things."""
    path = folder / INDEX
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        theirs, _, _ = (index[key] for key in ("made_of", "per_shard", "finished"))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"teacher_memory.cache: {path} is corrupt ({error!r}); delete {folder}") from None
    key = first_difference(json.loads(json.dumps(facts)), theirs)
    if key is not None:
        raise ValueError(f"teacher_memory.cache: {folder} was made with another {key}; choose another folder")
    return index


def _fault(path: Path, *, contents: bool) -> str | None:
    """What is wrong with a shard, or None; with ``contents`` all of it is read, else only its size is looked at."""
    try:
        size, crc = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        if path.stat().st_size != size:
            return f"{path} is damaged (it has {path.stat().st_size:,} of {size:,} bytes)"
        if contents and checkpoints.checksum(path) != crc:
            return f"{path} is damaged (it has changed)"
    except OSError as error:
        return f"{error.filename or path} cannot be read ({error.strerror})"
    except (ValueError, TypeError):
        return f"{path.with_suffix('.json')} is damaged"
    return None


class CachedDataset(Dataset):
    """Samples, each with what the teacher gave for it."""

    def __init__(self, data: Dataset, cache: StageCache) -> None:
        self.data, self.cache = data, cache

    def __len__(self) -> int:
        return self.cache.samples

    def __getitem__(self, index: int) -> tuple[int, Any, Kept]:
        return index, self.data[index], self.cache[index]


class CachedCollator:
    """Adds ``teacher_values`` and ``teacher_indices`` (A, K) and ``teacher_targets`` (L, B, [Hq,] R, V), padded with zeros.

    Raises ValueError for a sample whose tokens are not those the teacher saw.
    """

    def __init__(self, collate: Callable[[list[Any]], dict[str, Tensor]]) -> None:
        self.collate = collate

    def __call__(self, items: list[tuple[int, Any, Kept]]) -> dict[str, Tensor]:
        batch = self.collate([item for _, item, _ in items])
        kept = [k for _, _, k in items]
        rows = zip(batch["input_ids"], batch["attention_mask"].bool(), items, strict=True)
        for ids, real, (index, _, k) in rows:
            if tokens_of(ids[real]) != k.tokens:
                raise ValueError(
                    f"teacher_memory.cache: sample {index} has other tokens than when the teacher saw it; choose another folder"
                )
        batch["teacher_values"] = torch.cat([k.values for k in kept])
        batch["teacher_indices"] = torch.cat([k.indices for k in kept])
        # As wide as the regions: samples without rows have columns, and the other way round.
        layers, *shape = (max(sizes) for sizes in zip(*(k.targets.shape for k in kept), strict=True))
        if shape and all(shape):
            targets = torch.zeros(layers, len(kept), *shape)
            for place, k in enumerate(kept):
                targets[:, place][tuple(slice(n) for n in k.targets.shape)] = k.targets
            batch["teacher_targets"] = targets
        return batch


def tokens_of(ids: Tensor) -> int:
    """CRC-32 of a sample's tokens, by which it is known again."""
    return zlib.crc32(ids.to(torch.int64).cpu().numpy().tobytes())


def _shard(folder: Path, shard: int) -> Path:
    return folder / f"shard-{shard:05d}.safetensors"


def write_cache(recipe: Recipe) -> Path:
    """Run the teacher over the samples of every stage that distils and keep what it gives in ``teacher_memory.cache``.

    Shards that an earlier call has finished are kept, damaged ones made again. ``recipe.processes``, or those of a launcher,
    share the work; all must see the folder.

    Raises:
        ValueError: the recipe names no cache or has no stage that distils, or cannot be run (as `cdistill.train.run`); or the
            folder holds another cache.
        RunError: the disk is full, a process failed or a signal stopped it.
    """
    if recipe.teacher_memory.cache is None:
        raise ValueError("teacher_memory.cache must name the folder to write")
    wanted = [stage for stage in resolve(recipe, world=1).stages if stage.objective.distils]
    if not wanted:
        raise ValueError(f"stages {', '.join(recipe.stages)} need no teacher: there is nothing to cache")
    whole = replace(recipe, teacher_memory=replace(recipe.teacher_memory, cache=None))
    if recipe.processes > 1 and not launch.launched():
        with launch.quiet():
            models = build_models(whole)
            for stage in wanted:
                _begin(stage, models)
        del models  # the processes load their own
        _start_processes(recipe)
        return Path(recipe.teacher_memory.cache)
    engine = recipe.teacher_memory.zero == 3
    with naming_lost_peers(), launch.environment(distributed=engine), launch.quiet():
        if engine:
            launch.keep_deepspeed_from_compiling()
        if engine or launch.launched():
            launch.init_process_group()
        models = build_models(whole)
        for stage in wanted:
            _write_stage(stage, models)
    return Path(recipe.teacher_memory.cache)


def _start_processes(recipe: Recipe) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recipe.yaml"
        path.write_text(strict_yaml.dump(recipe_to_dict(recipe)), encoding="utf-8")
        try:
            launch.start_processes(recipe.processes, "cache", path)
        except Stopped as stopped:
            print("cache: stopped; run `cdistill cache` again: it goes on", flush=True)
            raise stopped from None


def _begin(stage: Stage, models: Models) -> tuple[CacheWriter, dict[str, Any], Work]:
    """The writer of a stage, what its cache is made of, and what is left to do."""
    recipe, folder = stage.recipe, stage_cache(stage)
    columns, top_k = min(_vocabulary(model) for model in (models.student, models.teacher)), recipe.teacher_memory.top_k
    if top_k >= columns:
        raise ValueError(f"teacher_memory.top_k must be below the vocabulary's {columns} tokens, got {top_k}")
    dtype = DTYPES[precision_of(recipe)]
    writer = CacheWriter(folder, top_k=top_k, temperature=recipe.kd.temperature, dtype=dtype)

    def begin() -> tuple[dict[str, Any], Work]:
        facts = fingerprint(stage, models, vat_of(stage, models))
        return facts, writer.begin(facts)

    # All must go by one list: a process that looks later finds what the others have written meanwhile.
    return writer, *on_first_process(begin)


def _write_stage(stage: Stage, models: Models) -> None:
    recipe, folder = stage.recipe, stage_cache(stage)
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    vat, precision = vat_of(stage, models), precision_of(recipe)
    dataset, collate = open_stage(stage, models)
    writer, facts, work = _begin(stage, models)
    if work.missing:
        device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
        if models.held is None:
            models.held = hold_teacher(
                recipe.teacher_memory,
                models.teacher,
                models.student,
                precision,
                device,
                shares_vision=models.shares_vision,
            )
        if getattr(models.held, "module", models.held).shares_vision:
            _send_shared_vision(models.student, device)
        model = DistillationModel(models.student, stage.objective, teacher=models.held, kd=recipe.kd, vat=vat)
        batch = stage.config.micro_batch_size or stage.config.global_batch_size
        left = sum(len(samples) for shard in work.missing for samples in work.batches(shard, batch))
        with tqdm(total=left, desc=folder.name, unit="sample", disable=rank > 0, mininterval=1.0) as bar:
            writer.write(
                model,
                dataset,
                collate,
                work,
                batch_size=batch,
                device=device,
                rank=rank,
                world=world,
                progress=bar.update,
            )
    if world > 1:
        dist.barrier()
    on_first_process(lambda: writer.finish(facts, work))
    if rank == 0:
        stored = sum(path.stat().st_size for path in folder.iterdir())
        state = "" if work.missing else ", finished already"
        print(f"{folder}: {work.samples:,} samples, {stored / 2**20:,.1f} MiB{state}", flush=True)


def _send_shared_vision(student: Model, device: torch.device) -> None:
    """Move what `share_vision` uses of a student; the rest of it has nothing to do here."""
    student.model.vision_tower.to(device)
    if isinstance(student.model.multi_modal_projector, TAFAdapter):
        student.model.multi_modal_projector.teacher.to(device)
