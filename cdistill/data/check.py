"""Looks at every record and decodes every image of a data set before a run does, in as many processes as there are cores."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from cdistill.choices import MOST_PROCESSES, require_count
from cdistill.data.conversations import Encoder
from cdistill.data.dataset import encode
from cdistill.data.images import named_format, open_image, true_format
from cdistill.data.presets import TEXT_ONLY
from cdistill.data.samples import BadSampleError, ImageBytes, ImageFile, Mark, Sample, Source, Unread
from cdistill.data.scan import starts_list
from cdistill.errors import CdistillError
from cdistill.files import writing

CHUNK = 128  # records that a process takes at a time
DUPLICATE, MISNAMED, SAME_ID = "duplicate record", "misnamed image", "duplicate id"


class CheckError(CdistillError, RuntimeError):
    """The check itself could not be finished."""


@dataclass(frozen=True, slots=True)
class Bad:
    """A record that cannot be trained on: the id and place that people find it by, and why."""

    id: str
    place: str
    reason: str
    detail: str


@dataclass(frozen=True, slots=True)
class _Good:
    """What is kept of a record that can be trained on; ``content`` and ``name`` are hashes of 64 bits."""

    content: int
    name: int
    id: str
    place: str
    folder: str | None
    misnamed: str | None


@dataclass(frozen=True, slots=True)
class _Scanned:
    """What a process found in a chunk: images of the readable records, how many of these have none, and the records."""

    images: int
    text_only: int
    records: list[_Good | Bad]


@dataclass
class Totals:
    """What was found in a source.

    Attributes:
        samples: records looked at.
        images: images of the readable records.
        text_only: readable records without an image.
        faults: bad records by reason.
        warnings: records by what is odd about them but does not keep them from being trained on.
        examples: by reason, the first record with it and what is wrong there.
        folders: by folder asked for, good records whose first image lies there; those without an image are `TEXT_ONLY`.
        good: (N,) bool, which records can be trained on.
        unread: keys that no sample is made of.
    """

    samples: int = 0
    images: int = 0
    text_only: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    warnings: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)
    folders: Counter[str] = field(default_factory=Counter)
    good: np.ndarray = field(default_factory=lambda: np.empty(0, bool))
    unread: Unread = field(default_factory=lambda: Unread({}, 0))

    @property
    def bad(self) -> int:
        """Records that cannot be trained on."""
        return self.faults.total()


def check(
    sources: Sequence[Source],
    *,
    workers: int | None = None,
    folders: Sequence[str] = (),
    encoder: Encoder | None = None,
    on_bad: Callable[[Source, Bad], object] = lambda source, bad: None,
    progress: Callable[[int], object] = lambda records: None,
) -> list[Totals]:
    """What is found in each of several sources; it does not depend on the number of processes.

    A record that repeats the conversation and the images of an earlier good one of its source is bad, too.

    Args:
        sources: those of a mix, or one.
        workers: processes; None for one per core, 1 for none besides this one.
        folders: folders such as ``coco/train2017`` whose records are counted.
        encoder: also makes tokens and pixels of every record, as training does.
        on_bad: called with every bad record, in order.
        progress: called with the number of records just looked at.

    Raises:
        CheckError: a process died, as one without memory does.
        ValueError: ``workers`` is less than 1.
    """
    if workers is not None:
        require_count("workers", workers, MOST_PROCESSES)
    _look_at.cache_clear()
    tallies = [_Tally(source) for source in sources]
    tasks = [
        (k, start, min(start + CHUNK, len(source)))
        for k, source in enumerate(sources)
        for start in range(0, len(source), CHUNK)
    ]
    looked = _look_at_all(sources, tasks, workers or len(os.sched_getaffinity(0)), folders, encoder)
    for (k, start, stop), scanned in zip(tasks, looked, strict=True):
        for bad in tallies[k].add(start, scanned):
            on_bad(sources[k], bad)
        progress(stop - start)
    for tally in tallies:
        tally.totals.unread = tally.source.unread(None)
    return [tally.totals for tally in tallies]


class _Tally:
    """Adds up the chunks of a source in order, and finds what repeats."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.totals = Totals(good=np.zeros(len(source), bool))
        self._contents: dict[int, int] = {}
        self._names: set[int] = set()

    def add(self, start: int, scanned: _Scanned) -> Iterator[Bad]:
        """Count a chunk; gives its bad records."""
        totals = self.totals
        totals.samples += len(scanned.records)
        totals.images += scanned.images
        totals.text_only += scanned.text_only
        for index, record in enumerate(scanned.records, start):
            if isinstance(record, _Good):
                record = self._unless_repeated(index, record)
            if isinstance(record, Bad):
                self._count(totals.faults, record.reason, record.place, record.detail)
                yield record
            else:
                totals.good[index] = True
                self._warn(record)

    def _unless_repeated(self, index: int, record: _Good) -> _Good | Bad:
        first = self._contents.setdefault(record.content, index)
        if first == index:
            return record
        said = f"says the same of the same images as {self.source.place(first)}"
        return Bad(record.id, record.place, DUPLICATE, said)

    def _warn(self, record: _Good) -> None:
        if record.folder is not None:
            self.totals.folders[record.folder] += 1
        if record.misnamed is not None:
            self._count(self.totals.warnings, MISNAMED, record.place, record.misnamed)
        if record.name in self._names:
            self._count(
                self.totals.warnings, SAME_ID, record.place, f"{record.id!r} is the id of an earlier record, too"
            )
        self._names.add(record.name)

    def _count(self, counter: Counter[str], reason: str, place: str, detail: str) -> None:
        counter[reason] += 1
        self.totals.examples.setdefault(reason, f"{place}: {detail}")


def _look_at_all(
    sources: Sequence[Source],
    tasks: list[tuple[int, int, int]],
    workers: int,
    folders: Sequence[str],
    encoder: Encoder | None,
) -> Iterator[_Scanned]:
    """What is scanned in every chunk, in order."""
    if workers == 1 or len(tasks) < 2:
        for k, start, stop in tasks:
            yield look(sources[k], start, stop, folders, encoder)
        return
    with ProcessPoolExecutor(
        min(workers, len(tasks)), initializer=_start, initargs=(sources, folders, encoder)
    ) as pool:
        try:
            yield from pool.map(_work, tasks)
        except (BrokenProcessPool, MemoryError):
            raise CheckError(
                "a process that looked at records died, perhaps without memory: try fewer --workers"
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)


_given: tuple[Sequence[Source], Sequence[str], Encoder | None] = ((), (), None)


def _start(sources: Sequence[Source], folders: Sequence[str], encoder: Encoder | None) -> None:
    """Make a process ready; Ctrl-C is left to the one that started it, without which this one ends, too."""
    global _given
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with, args=(multiprocessing.parent_process(),), daemon=True).start()
    _given = (sources, folders, encoder)


def _end_with(process: Any) -> None:
    process.join()
    os._exit(1)


def _work(task: tuple[int, int, int]) -> _Scanned:
    k, start, stop = task
    sources, folders, encoder = _given
    return look(sources[k], start, stop, folders, encoder)


def look(
    source: Source, start: int, stop: int, folders: Sequence[str] = (), encoder: Encoder | None = None
) -> _Scanned:
    """What is scanned in some records of a source without regard to the others."""
    images = text_only = 0
    records: list[_Good | Bad] = []
    for index in range(start, stop):
        try:
            sample = source[index]
        except BadSampleError as error:
            records.append(_bad(source, index, error))
            continue
        images += len(sample.images)
        text_only += not sample.images
        record = _look_at_images(sample, folders)
        if encoder is not None and isinstance(record, _Good):
            try:
                encode(sample, encoder)
            except BadSampleError as error:
                record = Bad(sample.id, sample.place, error.reason, error.detail)
        records.append(record)
    return _Scanned(images, text_only, records)


def _bad(source: Source, index: int, error: BadSampleError) -> Bad:
    """With the place, and the id where there is one."""
    name = None
    try:
        record = source.record(index)
        name = record.get("id") if isinstance(record, dict) else None
    except BadSampleError:
        pass  # it cannot be read at all
    return Bad("" if name is None else str(name), source.place(index), error.reason, error.detail)


def _look_at_images(sample: Sample, folders: Sequence[str]) -> _Good | Bad:
    oddities = []
    for image in sample.images:
        fault, odd = _look_at(image) if isinstance(image, ImageFile) else _decode(image)
        if fault is not None:
            return Bad(sample.id, sample.place, *fault)
        oddities += [odd] if odd is not None else []
    odd = oddities[0] if oddities else None
    return _Good(
        _hash_content(sample),
        _hash(sample.id.encode("utf-8", "surrogatepass")),
        sample.id,
        sample.place,
        _folder(sample, folders),
        odd,
    )


def _folder(sample: Sample, folders: Sequence[str]) -> str | None:
    if not sample.images:
        return TEXT_ONLY
    first = sample.images[0]
    path = "/" + (first.path.as_posix() if isinstance(first, ImageFile) else first.name)
    ends = {path.rfind(f"/{folder}/"): folder for folder in folders}  # a root may be called as one of them
    return ends[max(ends)] if max(ends, default=-1) >= 0 else None


def _hash_content(sample: Sample) -> int:
    """Of who says what about which images; an image file is its path."""
    pieces = []
    for message in sample.messages:
        parts = ("" if isinstance(part, Mark) else f"text {part}" for part in message.parts)
        pieces += [f"role {message.role}", *parts]
    images = (os.fsencode(i.path) if isinstance(i, ImageFile) else i.data for i in sample.images)
    return _hash(*(piece.encode("utf-8", "surrogatepass") for piece in pieces), *images)


def _hash(*pieces: bytes) -> int:
    """64 bits of several pieces, whose bounds count."""
    digest = blake2b(digest_size=8)
    for piece in pieces:
        digest.update(len(piece).to_bytes(8, "little") + piece)
    return int.from_bytes(digest.digest(), "little")


def _decode(image: ImageFile | ImageBytes) -> tuple[tuple[str, str] | None, str | None]:
    """The fault (reason and detail) that keeps an image from being decoded whole, or else how its name misleads."""
    try:
        open_image(image).close()
    except BadSampleError as error:
        return (error.reason, error.detail), None
    name = str(image.path) if isinstance(image, ImageFile) else image.name
    named, found = named_format(name), true_format(image)
    return None, None if named in (None, found) else f"{name} is a {found}"


_look_at = lru_cache(maxsize=2**16)(_decode)  # several records have the same image


def write_good(source: Any, good: np.ndarray, like: Path, output: Path) -> None:
    """Write the good records of a file of annotations to a new one, byte for byte, as a list if the old one is a list.

    Args:
        source: with ``raw(index)``, the bytes of a record.
        good: (N,) bool.
        like: the old file.
        output: there is nothing or all of it.
    """
    is_list = starts_list(like)
    opening, between, closing = (b"[\n", b",\n", b"\n]\n") if is_list else (b"", b"\n", b"\n")
    with writing(output) as file:
        file.write(opening)
        for i, index in enumerate(np.flatnonzero(good).tolist()):
            file.write(between * (i > 0) + source.raw(index))
        file.write(closing)
