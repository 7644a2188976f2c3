"""Published annotation files as records that know the file and line they stand in."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cdistill.data.scan import unrepeated
from cdistill.errors import InputError

_DECODER = json.JSONDecoder(object_pairs_hook=unrepeated)


@dataclass(frozen=True)
class Record:
    """An entry of a file: its fields, where it stands (``FILE line N``), and its key where the file is one JSON object."""

    place: str
    fields: dict[str, Any]
    key: str = ""

    def get(self, *names: str) -> Any:
        """The value of the first of these fields that is there; ValueError names file, line and field if none is."""
        for name in names:
            if self.fields.get(name) is not None:
                return self.fields[name]
        raise InputError(f"{self.place}: the field {' or '.join(names)} is missing")

    def text(self, *names: str) -> str:
        """A text that is not empty."""
        value = self.get(*names)
        if not isinstance(value, str) or not value.strip():
            raise InputError(f"{self.place}: {names[0]} must be a text, got {value!r:.60}")
        return value

    def name(self, *names: str) -> str:
        """A text, or a whole number as a text: an id."""
        value = self.get(*names)
        if isinstance(value, bool) or not isinstance(value, (str, int)) or str(value).strip() == "":
            raise InputError(f"{self.place}: {names[0]} must be a text or a whole number, got {value!r:.60}")
        return str(value)

    def number(self, *names: str) -> float:
        """A finite number, which may be written as a text."""
        value = self.get(*names)
        try:
            result = float("nan") if isinstance(value, bool) else float(value)
        except (TypeError, ValueError):
            result = float("nan")
        if result - result != 0.0:
            raise InputError(f"{self.place}: {names[0]} must be a number, got {value!r:.60}")
        return result

    def flag(self, *names: str) -> bool:
        """True or false, as JSON, 1 or 0, or such a text."""
        value = self.get(*names)
        known = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
        if str(value).strip().lower() not in known:
            raise InputError(f"{self.place}: {names[0]} must be true or false, got {value!r:.60}")
        return known[str(value).strip().lower()]

    def choice(self, name: str, allowed: tuple[str, ...]) -> str:
        """One of the given texts."""
        value = str(self.get(name))
        if value not in allowed:
            raise InputError(f"{self.place}: {name} must be one of {', '.join(allowed)}, got {value!r:.60}")
        return value


def read_text(path: Path) -> str:
    """A file's text; ValueError in one line where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: is not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from None


def json_records(path: Path, *keys: str) -> Iterator[Record]:
    """Entries of the list or object in a JSON file, or of the one under ``keys``; members that are no objects are left out
    of an object (a file's own ``accuracy``) and refused in a list.

    Raises:
        ValueError: the file is not JSON, names a key twice, or has no such list.
    """
    text, start = read_text(path), 0
    for key in keys:
        found = next((at for name, at, _ in _members(text, start, path, until=key) if name == key), None)
        if found is None:
            raise InputError(f"{path}: there is no {key!r}")
        start = found
    seen, line, counted = set(), 1, 0
    for name, at, value in _members(text, start, path):
        line, counted = line + text.count("\n", counted, at), at
        place = f"{path} line {line}"
        if name is not None and name in seen:
            raise InputError(f"{place}: the id {name!r} is there twice")
        seen.add(name)
        if isinstance(value, dict):
            yield Record(place, value, name or "")
        elif name is None:
            raise InputError(f"{place}: is not a JSON object but {value!r:.60}")


def _members(text: str, start: int, path: Path, until: str | None = None) -> Iterator[tuple[str | None, int, Any]]:
    """Key (None in a list), place and value of each member of the list or object that begins at ``start``; that of the key
    ``until`` is the last, and is not decoded.
    """
    at = _skip(text, start)
    opening = text[at : at + 1]
    if opening not in ("[", "{") or not opening:
        raise InputError(f"{path}: is not a JSON list or object")
    closing = "]" if opening == "[" else "}"
    at = _skip(text, at + 1)
    while text[at : at + 1] != closing:
        key = None
        if opening == "{":
            key, at = _value(text, at, path)
            at = _after(text, _skip(text, at), ":", path)
        if until is not None and key == until:
            yield key, at, None
            return
        value, end = _value(text, at, path)
        yield key, at, value
        at = _skip(text, end)
        if text[at : at + 1] != closing:
            at = _after(text, at, ",", path)


def _skip(text: str, at: int) -> int:
    while text[at : at + 1] in (" ", "\t", "\r", "\n"):
        at += 1
    return at


def _after(text: str, at: int, mark: str, path: Path) -> int:
    if text[at : at + 1] != mark:
        raise InputError(f"{path} line {text.count(chr(10), 0, at) + 1}: is not JSON ({mark!r} is missing)")
    return _skip(text, at + 1)


def _value(text: str, at: int, path: Path) -> tuple[Any, int]:
    try:
        return _DECODER.raw_decode(text, at)
    except json.JSONDecodeError as error:
        raise InputError(f"{path} line {error.lineno}: is not JSON ({error.msg})") from None
    except InputError as error:
        raise InputError(f"{path} line {text.count(chr(10), 0, at) + 1}: {error}") from None


def line_records(path: Path) -> Iterator[Record]:
    """Objects of a file of JSON lines; blank lines are passed over."""
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip():
            place = f"{path} line {number}"
            try:
                value = _DECODER.decode(line)
            except json.JSONDecodeError as error:
                raise InputError(f"{place}: is not JSON ({error.msg})") from None
            except InputError as error:
                raise InputError(f"{place}: {error}") from None
            if not isinstance(value, dict):
                raise InputError(f"{place}: is not a JSON object but {value!r:.60}")
            yield Record(place, value)


def csv_records(path: Path) -> Iterator[Record]:
    """Rows of a csv file with a header."""
    rows = csv.reader(read_text(path).splitlines(keepends=True), strict=True)
    header: list[str] = []
    while True:
        try:
            row = next(rows, None)
        except csv.Error as error:
            raise InputError(f"{path} line {rows.line_num}: is not csv ({error})") from None
        if row is None:
            return
        if not header:
            header = row
            if twice := [name for i, name in enumerate(row) if name in row[:i]]:
                raise InputError(f"{path} line 1: the column {twice[0]!r:.60} stands twice in the header")
        elif row:
            if len(row) != len(header):
                raise InputError(f"{path} line {rows.line_num}: has {len(row)} fields, the header has {len(header)}")
            yield Record(f"{path} line {rows.line_num}", dict(zip(header, row, strict=True)))


def parquet_records(path: Path, *, without: tuple[str, ...] = ()) -> Iterator[Record]:
    """Rows of a parquet file; columns ``without`` (images) are not read. The row's number from 0 is the record's key."""
    import pyarrow
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(path)
        columns = [name for name in file.schema_arrow.names if name not in without]
        row = 0
        for batch in file.iter_batches(columns=columns):
            for fields in batch.to_pylist():
                yield Record(f"{path} row {row}", fields, str(row))
                row += 1
    except (OSError, pyarrow.ArrowException) as error:
        raise InputError(f"{path}: is not parquet ({str(error).splitlines()[0]})") from None
