"""Sources opened by path, mixes of several with weights and caps, and the order in which a run sees their samples."""

from __future__ import annotations

import os
import reprlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from cdistill.data import strict_yaml
from cdistill.data.hub import HUB, HubDataset, is_saved, load_hub
from cdistill.data.images import Roots
from cdistill.data.llava import LlavaJson
from cdistill.data.registry import names_reader, open_registered
from cdistill.data.samples import FIRST_RECORDS, Sample, Sizes, Source, Unread
from cdistill.data.shards import TarShards
from cdistill.errors import InputError

_ROWS = (".parquet", ".arrow", ".csv")
_MIX = (".yaml", ".yml")
_BRIEF = reprlib.Repr()
_BRIEF.maxlevel = 2
_PICKLES = (".pkl", ".pickle", ".pyd", ".pth", ".pt")


def open_source(
    path: str,
    *,
    images: str | Mapping[str, str] | None = None,
    columns: Mapping[str, str] | None = None,
    config: str | None = None,
    split: str | None = None,
    streaming: bool = False,
    size: int | None = None,
    allow_urls: bool = False,
    name: str | None = None,
    seed: int = 0,
) -> Source:
    """The source at a path, by the reader that fits it.

    Args:
        path: a file of LLaVA's JSON or JSON Lines; a tar, a folder or pattern of tars (`TarShards`); a file, glob or
            folder of parquet, Arrow or CSV, a folder of ``save_to_disk``, ``hf:owner/name`` (`load_hub`); a mix (``.yaml``,
            see `open_mix`); or ``NAME:REST`` for a reader of others (`cdistill.data.register_reader`). JSON is read by
            ``datasets`` where columns are given or it is streamed.
        images: where names of images start from, or a folder for each first part of the names (`resolve_image`); by
            default the folder of the file.
        columns: see `HubDataset`.
        config, split: of a set of ``datasets``; "train" by default.
        streaming, size: read a set of ``datasets`` as a stream of so many rows; without the first, how many rows count.
        allow_urls: images may be named by URLs.
        name: what the source is called; by default its path tells.
        seed: of the subsets that a mix takes.

    Raises:
        ValueError: there is nothing at the path, nothing that can be read, or an option that its reader has not.
    """
    rows = {"columns": columns, "config": config, "split": split, "streaming": streaming or None, "size": size}
    registered = open_registered(path, images=images, allow_urls=allow_urls, **rows)
    if registered is not None:
        return registered
    suffix = os.path.splitext(path)[1].lower()
    if suffix in _PICKLES:
        raise InputError(f"pickles are never loaded: {path}; save the set as JSON, parquet or tar")
    is_tar = suffix in (".tar", ".tgz") or ".tar." in os.path.basename(path).lower()
    given = [option for option, value in rows.items() if value is not None]
    title = name or _title(path)
    if path.startswith(HUB) or is_saved(path) or suffix in _ROWS or _holds(path, "**/*.parquet") or given:
        if given and (is_tar or suffix in _MIX):
            raise InputError(f"{given[0]} is for sets of datasets, got it with {path}")
        data = load_hub(path, config=config, split=split or "train", streaming=streaming)
        default = Path(path).parent if os.path.isfile(path) else None
        roots = _roots(images) or default
        return HubDataset(data, columns=columns, images=roots, size=size, allow_urls=allow_urls, name=title)
    if suffix in _MIX:
        if images is not None or allow_urls:
            raise InputError(f"images and allow_urls stand in the mix itself, got them with {path}")
        return open_mix(path, seed=seed, name=name)
    if is_tar or _holds(path, "*.tar"):
        if images is not None or allow_urls:
            raise InputError(f"images of tars lie within them, got images or allow_urls with {path}")
        return TarShards(path, name=title)
    if os.path.isdir(path):
        raise InputError(f"{path} is a folder without tars, parquet files or a set of save_to_disk: name a file")
    return LlavaJson(path, _roots(images), allow_urls=allow_urls, name=title)


def _title(path: str) -> str:
    base = os.path.basename(path.rstrip("/"))
    known = (*_ROWS, *_MIX, ".json", ".jsonl", ".tar")
    return next((base[: -len(suffix)] for suffix in known if base.lower().endswith(suffix)), base) or path


def _holds(path: str, pattern: str) -> bool:
    return os.path.isdir(path) and next(Path(path).glob(pattern), None) is not None


def _roots(images: str | Mapping[str, str] | None) -> Roots | None:
    if images is None or isinstance(images, str):
        return None if images is None else Path(images)
    return {first: Path(root) for first, root in images.items()}


@dataclass(frozen=True)
class Part:
    """A source of a mix: the samples of it that count, ``kept`` (N,) int64, and how often they come in one epoch."""

    source: Source
    kept: np.ndarray
    weight: float = 1.0


class Mix:
    """Several sources as one: the samples that each may give, one source after the other."""

    in_order = False

    def __init__(self, parts: Sequence[Part], *, name: str) -> None:
        self.name, self.parts = name, tuple(parts)
        self._starts = np.cumsum([0, *(len(part.kept) for part in self.parts)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> Sample:
        part, inside = self.locate(index)
        return self.parts[part].source[inside]

    def record(self, index: int) -> Any:
        part, inside = self.locate(index)
        return self.parts[part].source.record(inside)

    def place(self, index: int) -> str:
        part, inside = self.locate(index)
        return self.parts[part].source.place(inside)

    def unread(self, most: int | None = FIRST_RECORDS) -> Unread:
        """Of all its sources together; ``most`` counts for each."""
        found = [part.source.unread(most) for part in self.parts]
        return Unread(sum((Counter(of.keys) for of in found), Counter()), sum(of.records for of in found))

    def locate(self, index: int) -> tuple[int, int]:
        """The number of the part that a sample belongs to, and its index in that part's source."""
        index = range(len(self))[index]
        part = int(np.searchsorted(self._starts, index, side="right")) - 1
        return part, int(self.parts[part].kept[index - self._starts[part]])

    def sizes(self) -> Sizes | None:
        """None if one of the sources does not know its own."""
        found = [part.source.sizes() for part in self.parts]
        known = [(sizes, part.kept) for sizes, part in zip(found, self.parts, strict=True) if sizes is not None]
        if len(known) < len(found):
            return None
        characters = np.concatenate([sizes.characters[kept] for sizes, kept in known])
        return Sizes(characters, np.concatenate([sizes.images[kept] for sizes, kept in known]))


def kinds_of(source: Source) -> tuple[str, ...]:
    """Kinds of a source's samples: names of the sources of a mix, each as often as it is there, or its own name."""
    return tuple(part.source.name for part in source.parts) if isinstance(source, Mix) else (source.name,)


def kind_of(source: Source, index: int) -> str:
    """The kind of a sample, one of `kinds_of`."""
    return source.parts[source.locate(index)[0]].source.name if isinstance(source, Mix) else source.name


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def _are_names(value: Any) -> bool:
    return isinstance(value, Mapping) and all(isinstance(k, str) and _is_name(v) for k, v in value.items())


def _is_count(value: Any) -> bool:
    return type(value) is int and value > 0


_KINDS: Mapping[str, tuple[str, Callable[[Any], bool]]] = {
    **dict.fromkeys(("path", "config", "split", "name"), ("a string", _is_name)),
    **dict.fromkeys(("cap", "size"), ("a whole number above 0", _is_count)),
    **dict.fromkeys(("streaming", "allow_urls"), ("true or false", lambda value: isinstance(value, bool))),
    "images": ("a folder or a mapping to folders", lambda value: _is_name(value) or _are_names(value)),
    "columns": ("a mapping to names of columns", _are_names),
    "weight": ("above 0 and at most 1000", lambda value: type(value) in (int, float) and 0 < value <= 1000),
}


@dataclass(frozen=True)
class Entry:
    """One source of a mix file: options as of `open_source`; at most ``cap`` samples, ``weight`` times an epoch."""

    path: str
    images: str | Mapping[str, str] | None = None
    weight: float = 1.0
    cap: int | None = None
    columns: Mapping[str, str] | None = None
    config: str | None = None
    split: str | None = None
    streaming: bool = False
    size: int | None = None
    allow_urls: bool = False
    name: str | None = None

    def __post_init__(self) -> None:
        for key in fields(self):
            kind, fits = _KINDS[key.name]
            value = getattr(self, key.name)
            if not fits(value) and (value is not None or key.default is not None):
                raise InputError(f"{key.name} must be {kind}, got {_BRIEF.repr(value)}")


def open_mix(path: str, *, seed: int = 0, name: str | None = None) -> Mix:
    """The mix of a YAML file: a list of sources, or a mapping that holds it as ``sources``; see `Entry` for their keys.

    Paths are relative to the file. A source with ``cap`` gives a random subset that depends on the seed alone.

    Raises:
        ValueError: the file is no such mix, or a source cannot be opened; the message says which.
    """
    if not os.path.isfile(path):
        raise InputError(f"no such file: {path}")
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is no YAML: {error}") from error
    content = strict_yaml.load(text, path, invalid="is no YAML")
    if isinstance(content, Mapping):
        if unknown := [str(key) for key in content if key != "sources"]:
            raise InputError(f"{path}: unknown key {unknown[0]!r}, a mix has sources")
        content = content.get("sources")
    if not isinstance(content, list) or not content:
        raise InputError(f"{path} is no mix: a list of sources is expected, each with a path")
    parts = []
    for number, entry in enumerate(content):
        try:
            parts.append(_part(entry, Path(path).parent, seed, number))
        except ValueError as error:
            raise InputError(f"{path}, source {number + 1}: {error}") from error
    return Mix(parts, name=name or _title(path))


def _part(entry: Any, folder: Path, seed: int, number: int) -> Part:
    known = [field.name for field in fields(Entry)]
    if not isinstance(entry, Mapping) or "path" not in entry:
        raise InputError(f"a source is a mapping with a path, got {_BRIEF.repr(entry)}")
    if unknown := [str(key) for key in entry if key not in known]:
        raise InputError(
            f"unknown key {unknown[0]!r}, there are {', '.join(known)}{strict_yaml.nearest(unknown[0], known)}"
        )
    switches = {key: strict_yaml.switch(entry[key]) for key in ("streaming", "allow_urls") if key in entry}
    entry = Entry(**{**entry, **switches})
    if os.path.splitext(entry.path)[1].lower() in _MIX:
        raise InputError(f"a mix holds no mixes, got {entry.path}")
    options = {name: getattr(entry, name) for name in known if name not in ("path", "weight", "cap", "images")}
    elsewhere = entry.path.startswith(HUB) or names_reader(entry.path)
    path = entry.path if elsewhere else str(folder / entry.path)
    images: Any = entry.images
    if isinstance(images, str):
        images = str(folder / images)
    elif images is not None:
        images = {first: str(folder / root) for first, root in images.items()}
    source = open_source(path, images=images, **options)
    kept = np.arange(len(source))
    if entry.cap is not None and entry.cap < len(source):
        kept = np.sort(shuffled(len(source), seed, number)[: entry.cap])
    return Part(source, kept, float(entry.weight))


def shuffled(count: int, *seed: int) -> np.ndarray:
    """A permutation (count,) int64 that depends on the seed alone: on raw bits of PCG64, which numpy never changes."""
    return np.argsort(np.random.PCG64(np.random.SeedSequence(seed)).random_raw(count), kind="stable")


class Order:
    """Which sample of a source comes when: number 0, 1, 2, ... of a run -> index, a function of the seed and the number.

    Every epoch is another permutation. In each, a sample of a mix comes as often as its part's weight says: 2 is twice, of
    0.5 another half comes in every epoch, so that two have them all. Samples of a stream come in its own order.

    Args:
        source: a `Mix`, or any other source, each sample of which comes once.
        seed: of all permutations.
        held_out: how many samples come in no epoch: the last ones of the first. The others keep their order.

    Raises:
        ValueError: an epoch would hold no sample, or samples of a stream are to be held out.
    """

    def __init__(self, source: Source, seed: int, *, held_out: int = 0) -> None:
        self.seed = seed
        parts = source.parts if isinstance(source, Mix) else (Part(source, np.arange(len(source))),)
        self._counts = [len(part.kept) for part in parts]
        self._weights = [part.weight for part in parts]
        self._in_order = [part.source.in_order for part in parts]
        self.epoch_size = sum(round(weight * count) for weight, count in zip(self._weights, self._counts, strict=True))
        if not self.epoch_size:
            raise InputError(f"{source.name} has no samples")
        self._epoch: tuple[int, np.ndarray] | None = None
        self._starts = [0]  # of the epochs without what is held out, which may differ in size
        self._held_out = np.empty(0, dtype=np.int64)
        if held_out:
            if any(self._in_order):
                raise InputError(f"{source.name} is a stream, of which no samples can be held out")
            self._held_out = _last_distinct(self.epoch(0), held_out, source.name)
            self.epoch_size = len(self.epoch(0))

    @property
    def held_out(self) -> HeldOut:
        """The samples that come in no epoch, as an order of their own."""
        return HeldOut(self._held_out)

    def __getitem__(self, number: int) -> int:
        """The index of the sample that is the ``number``-th of a run, from 0 on; numbers have no end."""
        if number < 0:
            raise IndexError(f"numbers start at 0, got {number}")
        epoch, inside = divmod(number, self.epoch_size)
        if len(self._held_out):
            while self._starts[-1] <= number:
                self._starts.append(self._starts[-1] + len(self.epoch(len(self._starts) - 1)))
            epoch = int(np.searchsorted(self._starts, number, side="right")) - 1
            inside = number - self._starts[epoch]
        if self._epoch is None or self._epoch[0] != epoch:
            self._epoch = epoch, self.epoch(epoch)
        return int(self._epoch[1][inside])

    def epoch(self, number: int) -> np.ndarray:
        """The indices of an epoch, (N,) int64, in order; ``epoch_size`` of the first."""
        drawn, start = [], 0
        for part, count in enumerate(self._counts):
            drawn.append(start + self._drawn(part, number))
            start += count
        joined = np.concatenate(drawn)
        mixed = shuffled(len(joined), self.seed, 0, number)
        start = 0
        for part, those in enumerate(drawn):
            if self._in_order[part]:
                places = (mixed >= start) & (mixed < start + len(those))
                mixed[places] = np.arange(start, start + len(those))
            start += len(those)
        indices = joined[mixed]
        return indices[~np.isin(indices, self._held_out)] if len(self._held_out) else indices

    def _drawn(self, part: int, epoch: int) -> np.ndarray:
        """The samples of a part that come in an epoch, those of a weight above 1 several times, whole rounds first."""
        count = self._counts[part]
        total = round(self._weights[part] * count)
        rounds, rest = divmod(total, max(count, 1))
        window = (epoch * rest + np.arange(rest)) % max(count, 1)
        some = shuffled(count, self.seed, 1, part)[window] if rest else window
        return np.concatenate([np.tile(np.arange(count), rounds), np.sort(some)])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_epoch": None}


class HeldOut:
    """Samples that an `Order` leaves out, again and again in the same order."""

    def __init__(self, indices: np.ndarray) -> None:
        self._indices, self.epoch_size = indices, len(indices)

    def __getitem__(self, number: int) -> int:
        return int(self._indices[number % self.epoch_size])


def _last_distinct(epoch: np.ndarray, count: int, name: str) -> np.ndarray:
    """The last ``count`` samples of an epoch, each once. Raises ValueError if no other is left."""
    backwards = epoch[::-1]
    found, places = np.unique(backwards, return_index=True)
    if len(found) <= count:
        raise InputError(
            f"{name} has {len(found):,} samples, of which {count:,} cannot be held out: none would be left"
        )
    return backwards[np.sort(places)[:count]][::-1]
