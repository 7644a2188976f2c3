"""What a teacher gives for every sample of a stage, kept on a disk, so that training needs no teacher in memory.

A stage's folder holds safetensors shards in the order of the samples, one JSON file beside each shard with its size and
CRC-32, and index.json, written last. Per labelled token: the largest log-probabilities and their ids; per sample: the window
means that VAT aligns the student with (paper section 4.1, equation 2).
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterator
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

from cdistill.data.builtin import IGNORE_INDEX
from cdistill.models.load import resolve_folder
from cdistill.train import checkpoints, launch
from cdistill.train.alignment import vat_of
from cdistill.train.build import Models, build_models, precision_of
from cdistill.train.config import Recipe, first_difference, recipe_to_dict
from cdistill.train.data import stage_dataset
from cdistill.train.model import DistillationModel
from cdistill.train.objectives import OBJECTIVES
from cdistill.train.teacher import DTYPES, hold_teacher
from cdistill.vat import VAT

INDEX = "index.json"
PER_SHARD = 256  # samples
SHARDS_IN_MEMORY = 2  # of one worker: samples are read in order
ROWS_OF_LOGITS = 256


class Kept(NamedTuple):
    """What a teacher gave for one sample."""

    values: Tensor  # (A, K) natural log-probabilities of its labelled tokens
    indices: Tensor  # (A, K) int32
    targets: Tensor  # (L, [Hq,] R, V), with no rows or columns where there is nothing to align
    tokens: int  # CRC-32 of its input_ids


def stage_cache(recipe: Recipe, index: int) -> Path:
    """Folder of the stage at a place in the recipe's list."""
    assert recipe.teacher_memory.cache is not None
    return Path(recipe.teacher_memory.cache) / f"{index + 1}-{recipe.stages[index]}"


def fingerprint(recipe: Recipe, index: int, vat: VAT | None) -> dict[str, Any]:
    """All that decides what the teacher gives for the samples of a stage: its own files, keys of the recipe, the windows."""
    assert recipe.teacher is not None
    name, whole = recipe.stages[index], recipe_to_dict(recipe)
    stage = whole["stage"][name]
    folder = resolve_folder(recipe.teacher, "teacher")
    files = sorted([*folder.glob("*.safetensors"), *folder.glob("*.json")])
    return {
        "teacher": {path.name: checkpoints.checksum(path) for path in files},
        "teacher_memory": {key: whole["teacher_memory"][key] for key in ("quantization", "top_k")},
        "seed": recipe.seed,
        "kd": {"temperature": recipe.kd.temperature},
        "vat": None if vat is None else {key: whole["vat"][key] for key in ("rows", "heads")},
        "windows": [] if vat is None else [[match.student, *match.teachers] for match in vat.matches],
        "group_by_length": recipe.group_by_length,
        "stage": {name: {key: stage[key] for key in ("objective", "samples", "global_batch_size", "data")}},
        "stages": index,
    }


class CacheWriter:
    """Writes what a teacher gives for the samples of one stage.

    Args:
        folder: of the stage; shards that are already there and whole are kept.
        facts: `fingerprint` of the stage.
        top_k, temperature: of the log-probabilities.
        dtype: of what is stored; fp16 for log-probabilities and bf16 for targets, whose small numbers fp16 would lose, unless
            it is fp32.
    """

    def __init__(
        self, folder: Path, facts: dict[str, Any], *, top_k: int, temperature: float, dtype: torch.dtype
    ) -> None:
        self.folder, self.facts, self.top_k, self.temperature = folder, facts, top_k, temperature
        exact = dtype == torch.float32
        self.dtypes = (torch.float32, torch.float32) if exact else (torch.float16, torch.bfloat16)

    def write(
        self,
        model: DistillationModel,
        dataset: Dataset,
        collate: Callable[[list[Any]], dict[str, Tensor]],
        *,
        batch_size: int,
        rank: int,
        world: int,
        progress: Callable[[int], None],
    ) -> None:
        """Run the teacher over this process's share of the shards; all processes run it equally often (ZeRO-3).

        Raises RunError if the disk is full.
        """
        size: int = len(dataset)  # type: ignore[arg-type]
        shards = -(-size // PER_SHARD)
        missing = [shard for shard in range(shards) if not self._is_whole(shard)]
        for start in range(0, len(missing), world):
            mine = missing[min(start + rank, len(missing) - 1)]
            samples = range(mine * PER_SHARD, min((mine + 1) * PER_SHARD, size))
            kept: list[Kept] = []
            for first in range(samples.start, samples.stop, batch_size):
                items = [dataset[i] for i in range(first, min(first + batch_size, samples.stop))]
                kept += self._ask(model, collate(items))
                progress(len(items))
            if start + rank < len(missing):
                self._save(mine, kept)

    def finish(self, samples: int) -> None:
        """Write the index; one process calls it when all have written their shares."""
        index = {
            "samples": samples,
            "per_shard": PER_SHARD,
            "made_of": self.facts,
        }
        checkpoints.write_atomically(self.folder / INDEX, json.dumps(index, indent=1) + "\n")

    def _is_whole(self, shard: int) -> bool:
        path = _shard(self.folder, shard)
        try:
            size, crc = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return False
        return path.is_file() and path.stat().st_size == size and checkpoints.checksum(path) == crc

    @torch.no_grad()
    def _ask(self, model: DistillationModel, batch: dict[str, Tensor]) -> Iterator[Kept]:
        ids, labels, real = batch["input_ids"], batch["labels"], batch["attention_mask"].bool()
        device = next(model.student.parameters()).device
        hidden, targets, regions = model.ask_teacher(**{name: value.to(device) for name, value in batch.items()})
        values, indices = self._largest(model, hidden)
        counts = (labels[:, 1:] != IGNORE_INDEX).sum(1).tolist()
        parts = zip(values.split(counts), indices.split(counts), strict=True)
        for b, (largest, which) in enumerate(parts):
            target = torch.zeros(0)
            if targets and regions is not None:
                rows, cols = (int((x[b] >= 0).sum()) for x in (regions.rows, regions.cols))
                if rows and cols:
                    target = torch.stack([t[b, ..., :rows, :cols] for t in targets]).to(self.dtypes[1]).cpu()
            yield Kept(largest, which, target, tokens_of(ids[b][real[b]]))

    def _largest(self, model: DistillationModel, hidden: Tensor) -> tuple[Tensor, Tensor]:
        assert model.teacher is not None
        columns = model.vocabulary
        if self.top_k >= columns:
            raise ValueError(f"teacher_memory.top_k must be below the vocabulary's {columns} tokens, got {self.top_k}")
        values, indices = [], []
        with model.teacher.head() as head:
            for rows in hidden.split(ROWS_OF_LOGITS):
                logits = head(rows)[:, :columns].float() / self.temperature
                largest = logits.log_softmax(-1).topk(self.top_k)
                values.append(largest.values.to(self.dtypes[0]).cpu())
                indices.append(largest.indices.to(torch.int32).cpu())
        none = torch.zeros(0, self.top_k)
        return torch.cat([none.to(self.dtypes[0]), *values]), torch.cat([none.to(torch.int32), *indices])

    def _save(self, shard: int, kept: list[Kept]) -> None:
        tensors = {
            "values": torch.cat([k.values for k in kept]),
            "indices": torch.cat([k.indices for k in kept]),
            "targets": torch.cat([k.targets.flatten().to(self.dtypes[1]) for k in kept]),
            "answers": torch.tensor([len(k.values) for k in kept]),
            "shapes": torch.tensor([[*k.targets.shape, *(0 for _ in range(4 - k.targets.dim()))] for k in kept]),
            "tokens": torch.tensor([k.tokens for k in kept]),
        }
        path = _shard(self.folder, shard)
        part = path.with_suffix(".part")
        with checkpoints.saving(self.folder, sum(t.nbytes for t in tensors.values())):
            path.with_suffix(".json").unlink(missing_ok=True)
            save_file(tensors, part)
            stored = checkpoints.stored(part)
            checkpoints.publish(part, path)
            checkpoints.write_atomically(path.with_suffix(".json"), json.dumps(stored))


class StageCache:
    """Reads what `CacheWriter` has kept for one stage.

    Raises:
        ValueError: the cache is missing, unfinished or of another run (naming the key that differs), or a shard is damaged.
    """

    def __init__(self, folder: Path, facts: dict[str, Any]) -> None:
        path = folder / INDEX
        if not path.is_file():
            state = "is not finished" if folder.is_dir() and any(folder.iterdir()) else "does not exist"
            raise ValueError(f"teacher_memory.cache: {folder} {state}; run `cdistill cache` with this recipe")
        try:
            index = json.loads(path.read_text(encoding="utf-8"))
            theirs, self.samples, self.per_shard = index["made_of"], index["samples"], index["per_shard"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"teacher_memory.cache: {path} is corrupt ({error!r})") from None
        key = first_difference(json.loads(json.dumps(facts)), theirs)
        if key is not None:
            raise ValueError(f"teacher_memory.cache: {folder} was made with another {key}; choose another folder")
        self.folder = folder
        self._read = lru_cache(SHARDS_IN_MEMORY)(self._load)

    def __getitem__(self, sample: int) -> Kept:
        shard, place = divmod(sample, self.per_shard)
        return self._read(shard)[place]

    def _load(self, shard: int) -> list[Kept]:
        path = _shard(self.folder, shard)
        try:
            size, crc = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
            whole = path.stat().st_size == size and checkpoints.checksum(path) == crc
            tensors = load_file(path) if whole else {}
        except (OSError, ValueError, SafetensorError) as error:
            raise ValueError(f"teacher_memory.cache: {path} cannot be read ({error})") from None
        if not whole:
            raise ValueError(f"teacher_memory.cache: {path} is damaged; run `cdistill cache` with this recipe again")
        counts, shapes = tensors["answers"].tolist(), tensors["shapes"].tolist()
        shapes = [[n for n in shape if n] for shape in shapes]
        sizes = [torch.Size(shape).numel() if shape else 0 for shape in shapes]
        return [
            Kept(values, indices, target.view(shape) if shape else target, tokens)
            for values, indices, target, shape, tokens in zip(
                tensors["values"].split(counts),
                tensors["indices"].split(counts),
                tensors["targets"].split(sizes),
                shapes,
                tensors["tokens"].tolist(),
                strict=True,
            )
        ]


class CachedDataset(Dataset):
    """Samples, each with what the teacher gave for it."""

    def __init__(self, data: Dataset, cache: StageCache) -> None:
        self.data, self.cache = data, cache

    def __len__(self) -> int:
        return self.cache.samples

    def __getitem__(self, index: int) -> tuple[Any, Kept]:
        return self.data[index], self.cache[index]


class CachedCollator:
    """Adds ``teacher_values`` and ``teacher_indices`` (A, K) and ``teacher_targets`` (L, B, [Hq,] R, V), padded with zeros.

    Raises ValueError for a sample whose tokens are not those the teacher saw.
    """

    def __init__(self, collate: Callable[[list[Any]], dict[str, Tensor]]) -> None:
        self.collate = collate

    def __call__(self, items: list[tuple[Any, Kept]]) -> dict[str, Tensor]:
        batch = self.collate([item for item, _ in items])
        kept = [k for _, k in items]
        for ids, real, k in zip(batch["input_ids"], batch["attention_mask"].bool(), kept, strict=True):
            if tokens_of(ids[real]) != k.tokens:
                raise ValueError("teacher_memory.cache: a sample has other tokens than when the teacher saw it")
        batch["teacher_values"] = torch.cat([k.values for k in kept])
        batch["teacher_indices"] = torch.cat([k.indices for k in kept])
        targets = [k.targets.movedim(0, -1) for k in kept if k.targets.numel()]
        if targets:
            like = targets[0]
            shape = [max(t.shape[d] for t in targets) for d in range(like.dim())]
            whole = like.new_zeros((len(kept), *shape), dtype=torch.float32)
            filled = iter(targets)
            for place, k in zip(whole, kept, strict=True):
                if k.targets.numel():
                    target = next(filled)
                    place[tuple(slice(n) for n in target.shape)] = target
            batch["teacher_targets"] = whole.movedim(-1, 0).contiguous()
        return batch


def tokens_of(ids: Tensor) -> int:
    """CRC-32 of a sample's tokens, by which it is known again."""
    return zlib.crc32(ids.to(torch.int64).cpu().numpy().tobytes())


def _shard(folder: Path, shard: int) -> Path:
    return folder / f"shard-{shard:05d}.safetensors"


def write_cache(recipe: Recipe) -> Path:
    """Run the teacher over the samples of every stage that distils and keep what it gives in ``teacher_memory.cache``.

    Shards that an earlier call has finished are kept. Under a launcher the processes share the work; all must see the folder.

    Raises:
        ValueError: the recipe names no cache or has no stage that distils, or cannot be run (as `cdistill.train.run`).
        RunError: the disk is full.
    """
    if recipe.teacher_memory.cache is None:
        raise ValueError("teacher_memory.cache must name the folder to write")
    wanted = [i for i, name in enumerate(recipe.stages) if OBJECTIVES[recipe.stage[name].objective].distils]
    if not wanted:
        raise ValueError(f"stages {', '.join(recipe.stages)} need no teacher: there is nothing to cache")
    whole = replace(recipe, teacher_memory=replace(recipe.teacher_memory, cache=None))
    engine = recipe.teacher_memory.zero == 3
    with launch.naming_lost_peers(), launch.environment(distributed=engine), launch.quiet():
        if engine:
            launch.keep_deepspeed_from_compiling()
        if engine or launch.launched():
            launch.init_process_group()
        models = build_models(whole)
        for index in wanted:
            _write_stage(recipe, index, models)
    return Path(recipe.teacher_memory.cache)


def _write_stage(recipe: Recipe, index: int, models: Models) -> None:
    name = recipe.stages[index]
    stage, folder = recipe.stage[name], stage_cache(recipe, index)
    several = dist.is_initialized() and dist.get_world_size() > 1
    rank, world = (dist.get_rank(), dist.get_world_size()) if several else (0, 1)
    vat, precision = vat_of(recipe, stage.objective, models), precision_of(recipe)
    facts = fingerprint(recipe, index, vat)
    if (folder / INDEX).is_file():
        StageCache(folder, facts)
        print(f"{folder}: finished already", flush=True)
        return
    dataset, collate = stage_dataset(recipe, index, models)
    size: int = len(dataset)  # type: ignore[arg-type]
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    models.student.to(device)
    if models.held is None:
        models.held = hold_teacher(recipe.teacher_memory, models.teacher, models.student, precision, device)
    model = DistillationModel(models.student, OBJECTIVES[stage.objective], teacher=models.held, kd=recipe.kd, vat=vat)
    folder.mkdir(parents=True, exist_ok=True)
    writer = CacheWriter(
        folder, facts, top_k=recipe.teacher_memory.top_k, temperature=recipe.kd.temperature, dtype=DTYPES[precision]
    )
    batch = min(stage.micro_batch_size or stage.global_batch_size, PER_SHARD)
    with tqdm(total=size, desc=folder.name, unit="sample", disable=rank > 0, mininterval=1.0) as bar:
        writer.write(
            model, dataset, collate, batch_size=batch, rank=rank, world=world, progress=lambda n: bar.update(n * world)
        )
    if several:
        dist.barrier()
    if rank == 0:
        writer.finish(size)
        stored = sum(path.stat().st_size for path in folder.iterdir())
        print(f"{folder}: {size:,} samples, {stored / 2**20:,.1f} MiB", flush=True)
