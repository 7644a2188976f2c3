"""WebDataset-style tar shards: samples are members of the same key, read by offsets; nothing is ever unpacked."""

from __future__ import annotations

import glob
import itertools
import math
import os
import re
import tarfile
from array import array
from codecs import BOM_UTF8
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from cdistill.data.files import KnownFile, is_odd, leaves_folder
from cdistill.data.images import MAX_BYTES, named_format
from cdistill.data.records import ANSWERS, CAPTIONS, TURNS, measure, naming_place, read_record
from cdistill.data.samples import FIRST_RECORDS, BadSampleError, ImageBytes, Sample, Sizes, Unread
from cdistill.data.scan import LONGEST_RECORD, parse
from cdistill.errors import InputError

MOST_SHARDS = 100_000
_PICKLES = {"pyd", "pkl", "pickle", "pth", "pt"}
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")

LONGEST_HEADER = 1 << 16  # bytes of a tar's extended header


class TarShards:
    """The samples of one or several tars. Members ``key.json`` (see `read_record`) or ``key.txt`` (a caption) make one with
    the images ``key.jpg`` (.jpeg, .png, .webp, .gif, .bmp, .tiff), ``key.0.jpg``, ``key.1.jpg`` and so on, in this order.

    The key ends at the first dot of the file's name. What a record's ``image`` says is not looked at. Opening reads the
    headers only and keeps about 20 bytes and the name of each member.

    Args:
        path: a tar, a folder of tars, ``name-{000..009}.tar`` or a glob.
        name: what the source is called.

    Raises:
        ValueError: there is no tar, one is compressed or cut, or has a member that is refused: an absolute name, ``..``,
            control characters, a link, a device, the same name twice, a pickle.
    """

    in_order = False

    def __init__(self, path: str | Path, *, name: str | None = None) -> None:
        self.name = name or os.path.basename(str(path).rstrip("/")).removesuffix(".tar")
        self._files = [KnownFile.of(shard) for shard in find_shards(str(path))]
        samples, firsts = array("I"), array("Q")
        offsets, lengths, names = array("Q"), array("Q"), _Names()
        for number, file in enumerate(self._files):
            for members in _samples(file):
                samples.append(number)
                firsts.append(len(offsets))
                for member in members:
                    offsets.append(member.offset_data)
                    lengths.append(member.size)
                    names.append(member.name)
        firsts.append(len(offsets))
        self._shards, self._firsts, self._offsets, self._lengths = map(np.asarray, (samples, firsts, offsets, lengths))
        self._names = names

    def __len__(self) -> int:
        return len(self._shards)

    def __getitem__(self, index: int) -> Sample:
        """Raises BadSampleError for a sample without text or with a bad record, IndexError beyond the last."""
        record, place, file = self.record(index), self.place(index), self._files[self._shards[index]]
        images = [member for member in self._members(index) if named_format(self._names[member])]
        key = self._key(index)
        if isinstance(record.get("caption"), str):
            record["caption"] = record["caption"].strip()
        return read_record(record, lambda member: self._image(file, member), id=key, place=place, beside=images)

    def record(self, index: int) -> dict[str, Any]:
        """What a sample's .json holds, with the text of its .txt as ``caption``; ``id`` is the key where it says no other.

        Raises BadSampleError where there is no text.
        """
        file, key = self._files[self._shards[index]], self._key(index)
        texts = {split_name(self._names[member])[1]: member for member in self._members(index)}
        with naming_place(self.place(index)):
            found = self._text(file, texts["json"]) if "json" in texts else None
            record: dict[str, Any] = {"id": key} | (found if isinstance(found, dict) else {})
            if "txt" in texts:
                record["caption"] = self._text(file, texts["txt"])
            if record.keys().isdisjoint((*TURNS, *ANSWERS, *CAPTIONS)):
                raise BadSampleError("not a record", "it has neither a .json of messages nor a caption")
            return record

    def place(self, index: int) -> str:
        """Shard and key of a sample."""
        return f"{self._files[self._shards[index]].path}:{self._key(index)}"

    def unread(self, most: int | None = FIRST_RECORDS) -> Unread:
        """Of the first records, whose text is read for it."""
        count = len(self) if most is None else min(len(self), most)
        keys = Counter[str]()
        for index in range(count):
            images = sum(named_format(self._names[member]) is not None for member in self._members(index))
            names = (self._names[m] for m in self._members(index) if not named_format(self._names[m]))
            keys.update(f"*.{rest}" for _, rest in map(split_name, names) if rest not in ("json", "txt"))
            with suppress(BadSampleError):
                keys.update(measure(self.record(index), images).unread)
        return Unread(keys, count)

    def sizes(self) -> Sizes:
        """Images are exact; characters are the bytes of the sample's text members, more than what will be read."""
        kinds = [named_format(name) is not None for name in self._names]
        is_text = [split_name(name)[1] in ("json", "txt") for name in self._names]
        starts = self._firsts[:-1].astype(np.int64)
        characters = np.add.reduceat(np.where(is_text, self._lengths, 0), starts) if len(self) else np.zeros(0)
        images = np.add.reduceat(np.asarray(kinds, np.int64), starts) if len(self) else np.zeros(0)
        most = np.iinfo(np.int32).max
        return Sizes(characters.clip(0, most).astype(np.int32), images.clip(0, 32767).astype(np.int16))

    def _members(self, index: int) -> range:
        index = range(len(self))[index]
        return range(int(self._firsts[index]), int(self._firsts[index + 1]))

    def _key(self, index: int) -> str:
        return split_name(self._names[self._members(index)[0]])[0]

    def _text(self, file: KnownFile, member: int) -> Any:
        """The value of a .json, the text of a .txt."""
        name, length = self._names[member], int(self._lengths[member])
        if length > LONGEST_RECORD:
            raise BadSampleError("not a record", f"{name}: {length} bytes, at most {LONGEST_RECORD}")
        data = file.read(int(self._offsets[member]), length).removeprefix(BOM_UTF8)
        if name.lower().endswith(".txt"):
            return data.decode("utf-8", "surrogateescape")
        try:
            return parse(data)
        except ValueError as error:
            raise BadSampleError("unreadable JSON", f"{name} {error}") from error

    def _image(self, file: KnownFile, member: int) -> ImageBytes:
        name, length = self._names[member], int(self._lengths[member])
        if length > MAX_BYTES:
            raise BadSampleError("image too large", f"{name}: {length} bytes, at most {MAX_BYTES}")
        return ImageBytes(f"{file.path}:{name}", file.read(int(self._offsets[member]), length))


class _Names:
    """Strings end to end in one buffer: as cheap for a worker process as an array."""

    def __init__(self) -> None:
        self._text, self._ends = bytearray(), array("Q", [0])

    def append(self, name: str) -> None:
        self._text += name.encode()
        self._ends.append(len(self._text))

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> str:
        return self._text[self._ends[index] : self._ends[range(len(self))[index] + 1]].decode()

    def __iter__(self) -> Iterator[str]:
        return (self[i] for i in range(len(self)))


def find_shards(path: str) -> list[Path]:
    """The tars that a path, a folder, a pattern with ``{000..009}`` or a glob names, in order; ValueError if there is none."""
    if os.path.isdir(path):
        path = os.path.join(glob.escape(path), "*.tar")
    if os.path.isfile(path):
        return [Path(path)]
    if not _RANGE.search(path):
        found = sorted(glob.glob(path))
    else:
        pieces = _RANGE.split(path)  # text, first, last, text, first, last, ..., text
        bounds = list(zip(pieces[1::3], pieces[2::3], strict=True))
        if math.prod(max(0, int(last) - int(first) + 1) for first, last in bounds) > MOST_SHARDS:
            raise InputError(f"{path} names more than {MOST_SHARDS} tars")
        ranges = [_numbers(first, last) for first, last in bounds]
        alternatives = [[text] for text in pieces[::3]]
        for i, numbers in enumerate(ranges):
            alternatives.insert(2 * i + 1, numbers)
        found = ["".join(parts) for parts in itertools.product(*alternatives)]
    if not found:
        raise InputError(f"no tar at {path}")
    return [Path(shard) for shard in found]


def _numbers(first: str, last: str) -> list[str]:
    return [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]


def split_name(name: str) -> tuple[str, str]:
    """The key of a member and the rest of its name in lower case, without the dot between them."""
    folder, base = os.path.split(name)
    stem, _, rest = base.partition(".")
    return os.path.join(folder, stem), rest.lower()


def _samples(file: KnownFile) -> Iterator[list[tarfile.TarInfo]]:
    """The members of every sample of a shard, in order, images in theirs."""
    groups: dict[str, list[tarfile.TarInfo]] = {}
    for member in _members(file):
        groups.setdefault(split_name(member.name)[0], []).append(member)
    for group in groups.values():
        yield sorted(group, key=lambda member: _image_order(split_name(member.name)[1]))


def _image_order(rest: str) -> tuple[bool, int, str]:
    first, dot, _ = rest.partition(".")
    return bool(dot), int(first) if first.isdecimal() and dot else 0, rest


def _members(file: KnownFile) -> Iterator[tarfile.TarInfo]:
    """The files of a tar, names without a leading ``./``. Raises ValueError for a tar that is refused."""
    with open(file.path, "rb") as opened:
        first = opened.read(6)
    for magic, kind in _COMPRESSED.items():
        if first.startswith(magic):
            raise InputError(f"{file.path} is compressed ({kind}), which allows no random access: unpack it to a tar")
    seen = set()
    for member in _headers(file):
        member.name = member.name.removeprefix("./")
        if fault := _fault(member, file.size):
            raise InputError(f"{file.path}: member {member.name[:200]!r} {fault}; make the shard anew without it")
        if member.isdir():
            continue
        if member.name in seen:
            raise InputError(f"{file.path}: member {member.name[:200]!r} is there twice; make the shard anew")
        seen.add(member.name)
        yield member


class _Member(tarfile.TarInfo):
    """A header whose extensions are no longer than names and numbers are: reading longer ones takes time without end."""

    def _proc_member(self, tar: Any) -> Any:
        extends = self.type in (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
        if extends and self.size > LONGEST_HEADER:
            raise tarfile.ReadError(
                f"the header at byte {self.offset} has {self.size:,} bytes, at most {LONGEST_HEADER:,}"
            )
        return super()._proc_member(tar)  # type: ignore[misc]


def _headers(file: KnownFile) -> Iterator[tarfile.TarInfo]:
    try:
        with tarfile.open(file.path, "r:", tarinfo=_Member) as tar:
            yield from tar
            end = tar.offset
    # tarfile lets through what int() says of odd numbers, and calls itself for every header of a header
    except (tarfile.TarError, EOFError, OverflowError, ValueError, RecursionError) as error:
        raise InputError(f"{file.path} is no whole tar: {error}") from error
    if end < file.size and any(file.read(end, min(512, file.size - end))):
        raise InputError(f"{file.path} is no whole tar: what stands at byte {end} is no header")


def _fault(member: tarfile.TarInfo, size: int) -> str | None:
    """Why a member is refused."""
    name = member.name
    if not name or is_odd(name):
        return "has no name, or a backslash or control characters in it"
    if leaves_folder(name):
        return "leaves its folder by its name"
    if member.issym() or member.islnk():
        return "is a link"
    if member.issparse() or not (member.isreg() or member.isdir()):
        return "is no plain file"
    if name.lower().rpartition(".")[2] in _PICKLES:
        return "is a pickle, which is never loaded"
    if member.size < 0 or member.offset_data + member.size > size:
        return "goes on beyond the end of the file"
    return None
