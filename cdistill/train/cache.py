"""What a teacher gives for every sample of a stage, kept on a disk, so that training needs no teacher in memory.

A stage's folder holds index.json, which says what the cache is made of and whether it is finished, safetensors shards in the
order of the samples, and one JSON file beside each shard with its size and CRC-32. Per labelled token: the largest
log-probabilities and their ids; per sample: the window means that VAT aligns the student with (paper section 4.1, equation 2).
Where ``teacher_memory.cache`` is a URL, another machine makes the shards and sends them (`cdistill.train.cache_server`).
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load, load_file
from torch import Tensor
from torch.utils.data import Dataset

from cdistill.data.templates import Template
from cdistill.errors import InputError
from cdistill.manifest import checksum
from cdistill.models.load import Model, resolve_folder
from cdistill.models.processor import FILES, IMAGE_PROCESSORS, has_image_processor
from cdistill.train.build import Models
from cdistill.train.cache_client import Served, is_served
from cdistill.train.cache_wire import INDEX, shard_name
from cdistill.train.recipes import StageConfig, recipe_to_dict
from cdistill.train.recipes.values import first_difference
from cdistill.train.resolve import Stage, precision_of
from cdistill.train.teacher_source import Cached
from cdistill.vat import VAT

SHARDS_IN_MEMORY = 2  # of one worker: samples are read in order


class StoredSignal(NamedTuple):
    """What a teacher gave for one sample."""

    values: Tensor  # (A, K) natural log-probabilities of its labelled tokens
    indices: Tensor  # (A, K) int32
    targets: Tensor  # (L, [Hq,] R, V), R or V 0 where there is nothing to align; (0,) without alignment
    tokens: int  # CRC-32 of its input_ids


class MissingShards(NamedTuple):
    """What is left to do of a stage's cache."""

    samples: int
    per_shard: int
    missing: list[int]  # shards

    def batches(self, shard: int, size: int) -> list[range]:
        """A shard's samples in batches."""
        stop = min((shard + 1) * self.per_shard, self.samples)
        return [range(i, min(i + size, stop)) for i in range(shard * self.per_shard, stop, size)]


def stage_cache(stage: Stage) -> Path:
    """Folder of a stage in the cache that its recipe names."""
    assert stage.recipe.teacher_memory.cache is not None
    return Path(stage.recipe.teacher_memory.cache) / stage.label


def open_cache(stage: Stage, models: Models, vat: VAT | None, *, patient: bool = True) -> StageCache:
    """What is kept of a stage in the folder that its recipe names, or is made for it by a server.

    A server is waited for ``max_stuck_seconds``, or only for a moment unless ``patient``. Raises ValueError as `StageCache`.
    """
    recipe, facts = stage.recipe, fingerprint(stage, models, vat)
    cache = recipe.teacher_memory.cache
    assert cache is not None
    if is_served(cache):
        return StageCache(FromServer(Served(cache, stage.label, recipe.max_stuck_seconds, patient=patient)), facts)
    return StageCache(Folder(stage_cache(stage)), facts)


def fingerprint(stage: Stage, models: Models, vat: VAT | None) -> dict[str, Any]:
    """All that decides what the teacher gives for the samples of a stage: its own files, the samples, the windows.

    Raises ValueError for a term that needs what a cache does not hold.
    """
    recipe, config = stage.recipe, stage.config
    assert recipe.teacher is not None
    Cached.check(stage.objective.kinds)
    whole = recipe_to_dict(recipe)
    folder = resolve_folder(recipe.teacher, "teacher")
    reader: list[Path] = []
    if models.reader is not None and not has_image_processor(folder):
        assert recipe.student.base is not None
        base = resolve_folder(recipe.student.base, "student.base")
        reader = [base / name for name in IMAGE_PROCESSORS if (base / name).is_file()]
    data = whole["stage"][stage.name]["data"]
    return {
        "teacher": teacher_files(recipe.teacher),
        "student.base": {path.name: _checksum(path) for path in reader},
        "teacher_memory": {key: whole["teacher_memory"][key] for key in ("quantization", "top_k")},
        "precision": precision_of(recipe),
        "vocabulary": common_vocabulary(models.student, models.teacher),
        "kd": {"temperature": recipe.kd.temperature},
        "vat": None if vat is None else {key: whole["vat"][key] for key in ("rows", "heads")} | _matched_heads(vat),
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


def common_vocabulary(student: Model, teacher: Model) -> int:
    """Tokens that both models know: the smaller of the two heads."""
    return min(model.config.get_text_config(decoder=True).vocab_size for model in (student, teacher))


def teacher_files(reference: str, key: str = "teacher") -> dict[str, int]:
    """CRC-32 of each file of a teacher that decides what it gives, by its name; ``key`` is where a recipe names it."""
    folder = resolve_folder(reference, key)
    patterns = ("*.safetensors", "config.json", *FILES)
    files = sorted({path for pattern in patterns for path in folder.glob(pattern)})
    return {str(path.relative_to(folder)): _checksum(path) for path in files}


def _matched_heads(vat: VAT) -> dict[str, Any]:
    """What decides the heads of targets, if anything does."""
    return {"head_counts": list(vat.heads or ())} if vat.config.heads == "match" else {}


def _checksum(path: Path) -> int:
    status = path.stat()
    return _checksum_of(path, status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=1024)
def _checksum_of(path: Path, changed: int, size: int) -> int:
    """A teacher's files are read once in a run, not for each of its stages."""
    return checksum(path)


class Place(Protocol):
    """Where a stage's index and shards come from."""

    def index(self, facts: dict[str, Any]) -> dict[str, Any]:
        """The index. Raises ValueError if there is none, or for one of a cache that is made of other things."""

    def check(self, shards: int) -> None:
        """Raise ValueError for shards that are known to be missing or cut."""

    def tensors(self, shard: int) -> tuple[str, dict[str, Tensor]]:
        """The name of a shard and what it holds. Raises ValueError or RunError if it cannot be had as it was made."""


class Folder:
    """A stage's folder on this machine."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def index(self, facts: dict[str, Any]) -> dict[str, Any]:
        """Of a finished cache."""
        index = read_index(self.path, facts) if (self.path / INDEX).is_file() else None
        if index is None or not index["finished"]:
            state = "is not finished" if self.path.is_dir() and any(self.path.iterdir()) else "does not exist"
            raise InputError(f"teacher_memory.cache: {self.path} {state}; run `cdistill cache` with this recipe")
        return index

    def check(self, shards: int) -> None:
        """By their sizes."""
        for shard in range(shards):
            self._require_whole(shard, contents=False)

    def _require_whole(self, shard: int, *, contents: bool) -> None:
        fault = shard_fault(shard_path(self.path, shard), contents=contents)
        if fault is not None:
            raise InputError(f"teacher_memory.cache: {fault}; run `cdistill cache` with this recipe again")

    def tensors(self, shard: int) -> tuple[str, dict[str, Tensor]]:
        """After its checksum."""
        path = shard_path(self.path, shard)
        self._require_whole(shard, contents=True)
        try:
            return str(path), load_file(path)
        except (OSError, SafetensorError) as error:
            raise InputError(f"teacher_memory.cache: {path} cannot be read ({error})") from None


class FromServer:
    """What a server sends of a stage."""

    def __init__(self, served: Served) -> None:
        self.served = served

    def index(self, facts: dict[str, Any]) -> dict[str, Any]:
        """Finished or not: what is missing will be made."""
        text, url = self.served.index().decode("utf-8", "replace"), self.served.url
        return parse_index(text, facts, url, "start the server again", "serve this recipe")

    def check(self, shards: int) -> None:
        """Nothing: they are made as they are asked for."""
        self.served.shards = shards

    def tensors(self, shard: int) -> tuple[str, dict[str, Tensor]]:
        """As it was signed."""
        name = f"{self.served.url}/{shard_name(shard)}"
        try:
            return name, load(self.served.shard(shard))
        except SafetensorError as error:
            raise InputError(f"teacher_memory.cache: {name} cannot be read ({error})") from None


class StageCache:
    """Reads what `CacheWriter` has kept for one stage; ``vocabulary`` is how many tokens both models know.

    Raises:
        ValueError: the cache is missing, unfinished or of another run (naming the key that differs), or a shard is missing,
            cut or, when it is first read, changed, or holds what no teacher gives.
    """

    def __init__(self, place: Place, facts: dict[str, Any]) -> None:
        index = place.index(facts)
        self.place, self.samples, self.per_shard = place, facts["samples"], index["per_shard"]
        self.vocabulary: int = facts["vocabulary"]
        place.check(-(-self.samples // self.per_shard))
        self._read = lru_cache(SHARDS_IN_MEMORY)(self._load)

    def __getitem__(self, sample: int) -> StoredSignal:
        shard, place = divmod(sample, self.per_shard)
        return self._read(shard)[place]

    def _load(self, shard: int) -> list[StoredSignal]:
        name, tensors = self.place.tensors(shard)
        samples = min(self.per_shard, self.samples - shard * self.per_shard)
        fault = fault_of(tensors, samples, self.vocabulary)
        if fault is not None:
            raise InputError(f"teacher_memory.cache: {name} holds what no teacher gives ({fault}); have it made again")
        counts = tensors["answers"].tolist()
        shapes = [torch.Size(n for n in shape if n >= 0) for shape in tensors["shapes"].tolist()]
        return [
            StoredSignal(values, indices, target.view(shape), tokens)
            for values, indices, target, shape, tokens in zip(
                tensors["values"].split(counts),
                tensors["indices"].split(counts),
                tensors["targets"].split([shape.numel() for shape in shapes]),
                shapes,
                tensors["tokens"].tolist(),
                strict=True,
            )
        ]


def fault_of(tensors: dict[str, Tensor], samples: int, vocabulary: int) -> str | None:
    """What is wrong with the tensors of a shard of so many samples, or None: their shapes, and numbers that cannot be
    log-probabilities, tokens or shares of attention."""
    try:
        values, indices, targets = (tensors[name] for name in ("values", "indices", "targets"))
        answers, shapes, tokens = (tensors[name] for name in ("answers", "shapes", "tokens"))
    except KeyError as error:
        return f"no {error.args[0]}"
    integral = (indices, answers, shapes, tokens)
    if any(x.is_floating_point() or x.is_complex() for x in integral) or not targets.is_floating_point():
        return "a dtype"
    if values.dim() != 2 or values.shape != indices.shape or not values.is_floating_point():
        return "shapes of values and indices"
    if shapes.dim() != 2 or any(x.shape[:1] != (samples,) for x in (answers, shapes, tokens)):
        return f"other than {samples} samples"
    if (answers < 0).any() or int(answers.sum()) != len(values):
        return "numbers of labelled tokens"
    if int(shapes.clamp(min=1).masked_fill(shapes == 0, 0).prod(1).sum()) != targets.numel():
        return "shapes of slices"
    if not (values <= 1e-3).all() or (values.diff(dim=1) > 0).any():  # NaN is not below; fp16 rounds
        return "log-probabilities"
    if not ((indices >= 0) & (indices < vocabulary)).all() or (indices.sort(1).values.diff(dim=1) == 0).any():
        return "ids of tokens"
    return None if ((targets >= 0) & (targets <= 1.01)).all() else "shares of attention"


def read_index(folder: Path, facts: dict[str, Any]) -> dict[str, Any]:
    """The index of a cache. Raises ValueError if it is corrupt or of a cache that is made of other things."""
    path = folder / INDEX
    try:
        text = path.read_text(encoding="utf-8")
    except ValueError as error:
        raise InputError(f"teacher_memory.cache: {path} is corrupt ({error}); delete {folder}") from None
    return parse_index(text, facts, str(folder), f"delete {folder}", "choose another folder")


def parse_index(text: str, facts: dict[str, Any], place: str, if_corrupt: str, if_other: str) -> dict[str, Any]:
    """The index in a text from a folder or a URL, and what to do about one that is wrong. Raises ValueError as `read_index`."""
    try:
        index = json.loads(text)
        theirs, per_shard, finished = (index[key] for key in ("made_of", "per_shard", "finished"))
        if not isinstance(per_shard, int) or isinstance(per_shard, bool) or per_shard < 1:
            raise InputError(f"per_shard is {per_shard!r:.40}")
        if index.get("crc", index_crc(theirs, per_shard, finished)) != index_crc(theirs, per_shard, finished):
            raise InputError("it has changed")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"teacher_memory.cache: {place}/{INDEX} is corrupt ({error}); {if_corrupt}") from None
    key = first_difference(json.loads(json.dumps(facts)), theirs)
    if key is not None:
        raise InputError(f"teacher_memory.cache: {place} was made with another {key}; {if_other}")
    return index


def index_crc(made_of: Any, per_shard: int, finished: bool) -> int:
    """What tells that an index is the one that was written."""
    return zlib.crc32(json.dumps([made_of, per_shard, finished], sort_keys=True).encode())


def shard_fault(path: Path, *, contents: bool) -> str | None:
    """What is wrong with a shard, or None; with ``contents`` all of it is read, else only its size is looked at."""
    try:
        size, crc = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        if path.stat().st_size != size:
            return f"{path} is damaged (it has {path.stat().st_size:,} of {size:,} bytes)"
        if contents and checksum(path) != crc:
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

    def __getitem__(self, index: int) -> tuple[int, Any, StoredSignal]:
        return index, self.data[index], self.cache[index]


class CachedCollator:
    """Adds ``teacher_values`` and ``teacher_indices`` (A, K) and ``teacher_targets`` (L, B, [Hq,] R, V), padded with zeros.

    Raises ValueError for a sample whose tokens are not those the teacher saw.
    """

    def __init__(self, collate: Callable[[list[Any]], dict[str, Tensor]]) -> None:
        self.collate = collate

    def __call__(self, items: list[tuple[int, Any, StoredSignal]]) -> dict[str, Tensor]:
        batch = self.collate([item for _, item, _ in items])
        kept = [k for _, _, k in items]
        rows = zip(batch["input_ids"], batch["attention_mask"].bool(), items, strict=True)
        for ids, real, (index, _, k) in rows:
            if tokens_of(ids[real]) != k.tokens:
                raise InputError(
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


def shard_path(folder: Path, shard: int) -> Path:
    return folder / shard_name(shard)
