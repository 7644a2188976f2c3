"""Writing a cache (`cdistill.train.cache`): the teacher runs over the samples of every stage that distils, and what it gives
stays on a disk."""

from __future__ import annotations

import json
import secrets
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from cdistill.data import strict_yaml
from cdistill.data.dataset import BAD
from cdistill.data.samples import IGNORE_INDEX
from cdistill.errors import InputError
from cdistill.files import entries, owned, remove_unfinished, scratch, write_text
from cdistill.manifest import stored
from cdistill.models.load import DTYPES, Model
from cdistill.models.logits import after_head
from cdistill.models.taf import TAFAdapter
from cdistill.runtime import checkpoints, launch
from cdistill.runtime.collectives import naming_lost_peers, on_first_process
from cdistill.runtime.errors import Stopped
from cdistill.runtime.machines import require_common_folder
from cdistill.runtime.signals import stop_on_signals
from cdistill.train import cache_server
from cdistill.train.alignment import vat_of
from cdistill.train.build import Models, build_models
from cdistill.train.cache import (
    MissingShards,
    StoredSignal,
    common_vocabulary,
    fingerprint,
    index_crc,
    read_index,
    shard_fault,
    shard_path,
    stage_cache,
    tokens_of,
)
from cdistill.train.cache_client import is_served
from cdistill.train.cache_wire import INDEX, KEY, key_of_environment
from cdistill.train.data import open_stage
from cdistill.train.model import DistillationModel
from cdistill.train.objectives import require_known_everywhere
from cdistill.train.recipes import Recipe, recipe_to_dict
from cdistill.train.resolve import Stage, precision_of, resolve
from cdistill.train.step import Step
from cdistill.train.teacher import Teacher
from cdistill.train.teacher_source import place_teacher
from cdistill.vat import VAT

PER_SHARD = 256  # samples
ROWS_OF_LOGITS = 256
ADVICE = "run `cdistill cache` again when there is room: it goes on"


class CacheWriter:
    """Writes what a teacher gives for the samples of one stage: `begin`, `write` on every process, `finish`.

    Args:
        folder: of the stage; shards that are already there and whole are kept.
        top_k, temperature: of the log-probabilities.
        vat: the alignment whose targets are stored, if there is one.
        dtype: of what is stored; fp16 for log-probabilities and bf16 for targets, whose small numbers fp16 would lose, unless
            it is fp32.
    """

    def __init__(self, folder: Path, *, top_k: int, temperature: float, vat: VAT | None, dtype: torch.dtype) -> None:
        self.folder, self.top_k, self.temperature, self.vat = folder, top_k, temperature, vat
        exact = dtype == torch.float32
        self.dtypes = (torch.float32, torch.float32) if exact else (torch.float16, torch.bfloat16)

    def begin(self, facts: dict[str, Any]) -> MissingShards:
        """Say in the folder what the cache is made of, the `fingerprint`, before its first shard; one process calls it.

        Raises ValueError if the folder holds another cache, whole or not, naming the key that differs.
        """
        samples, per_shard = facts["samples"], PER_SHARD
        path = self.folder / INDEX
        if path.is_file():
            per_shard = read_index(self.folder, facts)["per_shard"]
        else:
            self.folder.mkdir(parents=True, exist_ok=True)
            for shard in self.folder.glob("shard-*.json"):  # nobody knows what these are made of
                shard.unlink()
            self._write_index(facts, per_shard, finished=False)
        shards = range(-(-samples // per_shard))
        return MissingShards(
            samples, per_shard, [i for i in shards if shard_fault(shard_path(self.folder, i), contents=True)]
        )

    def write(
        self,
        model: DistillationModel,
        dataset: Dataset,
        collate: Callable[[list[Any]], dict[str, Tensor]],
        work: MissingShards,
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
        assert model.source is not None
        together = model.source.is_partitioned
        for start in range(0, len(work.missing), world):
            turn = work.missing[start : start + world]
            shares = [work.batches(shard, batch_size) for shard in turn]
            own = shares[rank] if rank < len(turn) else []
            kept: list[StoredSignal] = []
            for call in range(max(map(len, shares))):
                if call < len(own) or together:
                    batch = own[call] if call < len(own) else (own or shares[-1])[-1]
                    given = self._ask(model, collate([dataset[i] for i in batch]), device)
                    kept += given if call < len(own) else []
                progress(sum(len(share[call]) for share in shares if call < len(share)))
            if own:
                self._save(turn[rank], kept)

    def finish(self, facts: dict[str, Any], work: MissingShards) -> None:
        """Say that the cache is finished; one process calls it when all have written their shares."""
        for shard in range(-(-work.samples // work.per_shard)):
            fault = shard_fault(shard_path(self.folder, shard), contents=False)
            if fault is not None:
                raise InputError(f"teacher_memory.cache must be a folder that all processes share: {fault}")
        self._write_index(facts, work.per_shard, finished=True)

    def _write_index(self, facts: dict[str, Any], per_shard: int, *, finished: bool) -> None:
        crc = index_crc(json.loads(json.dumps(facts)), per_shard, finished)
        index = {"finished": finished, "per_shard": per_shard, "made_of": facts, "crc": crc}
        text = json.dumps(index, indent=1) + "\n"
        with checkpoints.saving(self.folder / INDEX, len(text), advice=ADVICE):
            write_text(self.folder / INDEX, text)

    @torch.no_grad()
    def _ask(self, model: DistillationModel, batch: dict[str, Tensor], device: torch.device) -> list[StoredSignal]:
        batch.pop(BAD, None)  # they are reported when a stage trains from the cache
        ids, labels, real = batch["input_ids"], batch["labels"], batch["attention_mask"].bool()
        step = model.step(labels.to(device), {k: v.to(device) for k, v in batch.items() if k != "labels"})
        model.ask(step, *model.inputs(step))
        assert model.teacher is not None and step.teacher is not None and step.teacher.hidden is not None
        columns = common_vocabulary(model.student, model.teacher.model)
        values, indices = self._largest(model.teacher, step.teacher.hidden, columns)
        counts = (labels[:, 1:] != IGNORE_INDEX).sum(1).tolist()
        parts = zip(values.split(counts), indices.split(counts), strict=True)
        aligned = self._targets(step, model.teacher.model, len(counts))
        return [
            StoredSignal(largest, which, aligned[b], tokens_of(ids[b][real[b]]))
            for b, (largest, which) in enumerate(parts)
        ]

    def _targets(self, step: Step, teacher: Model, samples: int) -> list[Tensor]:
        """Every sample's targets (L, [Hq,] R, V), where R or V may be 0; (0,) without alignment."""
        if self.vat is None:
            return [torch.zeros(0, dtype=self.dtypes[1])] * samples
        heads = []
        if self.vat.config.heads == "each":
            heads = [teacher.config.get_text_config().num_attention_heads]
        elif self.vat.heads is not None and self.vat.config.heads == "match":
            heads = [self.vat.heads.student]
        rows, cols = ((x >= 0).sum(1).tolist() for x in (step.regions.rows, step.regions.cols))
        recorder: Any = None if step.teacher is None else step.teacher.attention
        targets = [] if recorder is None else recorder.targets
        whole = torch.stack(targets).to(self.dtypes[1]).cpu() if targets else None
        found = []
        for b, (height, width) in enumerate(zip(rows, cols, strict=True)):
            target = torch.zeros(len(self.vat.matches), *heads, height, width, dtype=self.dtypes[1])
            if target.numel():
                assert whole is not None
                target = whole[:, b, ..., :height, :width].clone()
            found.append(target)
        return found

    def _largest(self, teacher: Teacher, hidden: Tensor, columns: int) -> tuple[Tensor, Tensor]:
        values, indices, finished = [], [], after_head(teacher.model)
        with teacher.head() as head:
            for rows in hidden.split(ROWS_OF_LOGITS):
                logits = finished(head(rows)[:, :columns]).float() / self.temperature
                largest = logits.log_softmax(-1).topk(self.top_k)
                values.append(largest.values.to(self.dtypes[0]).cpu())
                indices.append(largest.indices.to(torch.int32).cpu())
        none = torch.zeros(0, self.top_k)
        return torch.cat([none.to(self.dtypes[0]), *values]), torch.cat([none.to(torch.int32), *indices])

    def _save(self, shard: int, kept: list[StoredSignal]) -> None:
        tensors = {
            "values": torch.cat([k.values for k in kept]),
            "indices": torch.cat([k.indices for k in kept]),
            "targets": torch.cat([k.targets.flatten() for k in kept]),
            "answers": torch.tensor([len(k.values) for k in kept]),
            "shapes": torch.tensor([[*k.targets.shape, *(-1 for _ in range(4 - k.targets.dim()))] for k in kept]),
            "tokens": torch.tensor([k.tokens for k in kept]),
        }
        path = shard_path(self.folder, shard)
        size = sum(t.nbytes for t in tensors.values())
        with checkpoints.saving(path, size, advice=ADVICE), scratch(path) as place:
            path.with_suffix(".json").unlink(missing_ok=True)
            part = place / path.name
            save_file(tensors, part)
            facts = stored(part)
            checkpoints.publish(part, path)
            write_text(path.with_suffix(".json"), json.dumps(facts))


def write_cache(recipe: Recipe) -> Path:
    """Run the teacher over the samples of every stage that distils and keep what it gives in ``teacher_memory.cache``.

    Shards that an earlier call has finished are kept, damaged ones made again. ``recipe.processes``, or those of a launcher,
    share the work; all must see the folder.

    Raises:
        ValueError: the recipe names no cache or has no stage that distils, or cannot be run (as `cdistill.train.run`); or the
            folder holds another cache.
        RunError: the disk is full, a process failed or a signal stopped it.
    """
    cache, wanted = _wanted(recipe)
    whole = replace(recipe, teacher_memory=replace(recipe.teacher_memory, cache=None))
    if recipe.processes > 1 and not launch.launched():
        require_known_everywhere((recipe.stage[name].objective for name in recipe.stages), recipe.processes)
        with launch.quiet():
            models = build_models(whole)
            _check_top_k(recipe.teacher_memory.top_k, models)
            for stage in wanted:
                with _owned(stage):
                    _begin(stage, models)
        del models  # the processes load their own
        _start_processes(recipe)
        return cache
    engine = recipe.teacher_memory.zero == 3
    with naming_lost_peers(), launch.environment(distributed=engine), launch.quiet():
        if engine:
            launch.keep_deepspeed_from_compiling()
        if engine or launch.launched():
            launch.init_process_group()
        models = build_models(whole)
        _check_top_k(recipe.teacher_memory.top_k, models)
        for stage in wanted:
            with ExitStack() as at_end:
                on_first_process(partial(at_end.enter_context, _owned(stage)))
                require_common_folder(stage_cache(stage), "teacher_memory.cache")
                _write_stage(stage, models)
    return cache


def serve_cache(recipe: Recipe, where: str, window: int | None = None) -> None:
    """Make shards of ``teacher_memory.cache`` as runs on other machines ask for them, until a signal ends it.

    ``where`` is HOST:PORT. With ``window`` the folder holds no more than so many shards of a stage before and behind the one
    that was asked for last. Raises ValueError as `write_cache`, and for what `cdistill.train.cache_server` cannot serve.
    """
    _, wanted = _wanted(recipe)
    host, port = cache_server.address(where)
    cache_server.check_served(recipe.processes, recipe.teacher_memory.zero, window)
    key = key_of_environment()
    if key is None:
        key = secrets.token_hex(16).encode()
        print(f"{KEY}={key.decode()}  (for the machines that train, and for this one when it serves again)", flush=True)
    with stop_on_signals() as request, launch.environment(distributed=False), launch.quiet(), ExitStack() as at_end:
        models = build_models(replace(recipe, teacher_memory=replace(recipe.teacher_memory, cache=None)))
        _check_top_k(recipe.teacher_memory.top_k, models)
        for stage in wanted:
            at_end.enter_context(_owned(stage))
        server = cache_server.CacheServer([], key, window)
        server.stages |= {stage.label: _served(stage, models, server.count) for stage in wanted}
        port = cache_server.listen(server, (host, port), at_end)
        print(f"cache: serves {', '.join(server.stages)} at http://{host}:{port}; Ctrl-C ends it", flush=True)
        server.work(request)


def _served(stage: Stage, models: Models, progress: Callable[[int], Any]) -> cache_server.ServedStage:
    dataset, collate = open_stage(stage, models)
    writer, facts, work = _begin(stage, models)
    model, device = _ready(stage, models, writer.vat)
    batch = stage.config.micro_batch_size or stage.config.global_batch_size
    how: dict[str, Any] = {"batch_size": batch, "device": device, "rank": 0, "world": 1, "progress": progress}
    make = partial(writer.write, model, dataset, collate, **how)
    return cache_server.ServedStage(stage.label, writer.folder, work, make, lambda: writer.finish(facts, work))


def _wanted(recipe: Recipe) -> tuple[Path, list[Stage]]:
    """The folder to write, and the stages that distil."""
    if recipe.teacher_memory.cache is None:
        raise InputError("teacher_memory.cache must name the folder to write")
    if is_served(recipe.teacher_memory.cache):
        raise InputError(f"teacher_memory.cache must name a folder to write, got {recipe.teacher_memory.cache}")
    wanted = [stage for stage in resolve(recipe, world=1).stages if stage.objective.distils]
    if not wanted:
        raise InputError(f"stages {', '.join(recipe.stages)} need no teacher: there is nothing to cache")
    return Path(recipe.teacher_memory.cache), wanted


def _check_top_k(top_k: int, models: Models) -> None:
    columns = common_vocabulary(models.student, models.teacher)
    if top_k >= columns:
        raise InputError(f"teacher_memory.top_k must be below the vocabulary's {columns} tokens, got {top_k}")


@contextmanager
def _owned(stage: Stage) -> Iterator[None]:
    """Keep others out of a stage's folder, and remove what killed ones have left there; nothing stays of what is refused."""
    folder = stage_cache(stage)
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with owned(folder, "teacher_memory.cache"):
            remove_unfinished(folder)
            yield
    except ValueError:
        for path in made:
            with suppress(OSError):  # something is in it
                path.rmdir()
        raise


def _start_processes(recipe: Recipe) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recipe.yaml"
        path.write_text(strict_yaml.dump(recipe_to_dict(recipe)), encoding="utf-8")
        try:
            launch.start_processes(recipe.processes, "cache", path)
        except Stopped as stopped:
            print("cache: stopped; run `cdistill cache` again: it goes on", flush=True)
            raise stopped from None


def _begin(stage: Stage, models: Models) -> tuple[CacheWriter, dict[str, Any], MissingShards]:
    """The writer of a stage, what its cache is made of, and what is left to do."""
    recipe, folder, top_k = stage.recipe, stage_cache(stage), stage.recipe.teacher_memory.top_k
    dtype = DTYPES[precision_of(recipe)]
    vat = vat_of(stage, models.student, models.teacher) if stage.aligns else None
    writer = CacheWriter(folder, top_k=top_k, temperature=recipe.kd.temperature, vat=vat, dtype=dtype)

    def begin() -> tuple[dict[str, Any], MissingShards]:
        facts = fingerprint(stage, models, vat)
        return facts, writer.begin(facts)

    # All must go by one list: a process that looks later finds what the others have written meanwhile.
    return writer, *on_first_process(begin)


def _write_stage(stage: Stage, models: Models) -> None:
    folder = stage_cache(stage)
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    dataset, collate = open_stage(stage, models)
    writer, facts, work = _begin(stage, models)
    if work.missing:
        model, device = _ready(stage, models, writer.vat)
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
        stored = sum(path.stat().st_size for path in entries(folder))
        state = "" if work.missing else ", finished already"
        print(f"{folder}: {work.samples:,} samples, {stored / 2**20:,.1f} MiB{state}", flush=True)


def _ready(stage: Stage, models: Models, vat: VAT | None) -> tuple[DistillationModel, torch.device]:
    """What runs the teacher for a stage, and where; the teacher is placed once for all stages."""
    recipe = stage.recipe
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    if models.teacher_source is None:
        models.teacher_source = place_teacher(
            recipe.teacher_memory,
            models.teacher,
            models.student,
            precision_of(recipe),
            device,
            shares_vision=models.shares_vision,
        )
    if models.teacher_source.shares_vision:
        _send_shared_vision(models.student, device)
    terms = stage.objective.terms(kd=recipe.kd, vat=vat)
    return DistillationModel(models.student, terms, teacher=models.teacher_source), device


def _send_shared_vision(student: Model, device: torch.device) -> None:
    """Move what `share_vision` uses of a student; the rest of it has nothing to do here."""
    student.model.vision_tower.to(device)
    if isinstance(student.model.multi_modal_projector, TAFAdapter):
        student.model.multi_modal_projector.teacher.to(device)
