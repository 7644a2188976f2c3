"""One pass over a file of JSON records: where each stands, and what it says, one at a time.

A chunk of the file is in memory at once, whatever the file's size, unless a record is longer.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from cdistill.errors import InputError

CHUNK = 1 << 22
LONGEST_RECORD = 1 << 26
LOOKAHEAD = 16  # more characters than there are in any token but strings and numbers
_BOM = b"\xef\xbb\xbf"
_SPACE = " \t\r\n"
_SKIP = re.compile(f"[{_SPACE}]*")
_DECODER = json.JSONDecoder()


class Found(NamedTuple):
    """A record: its first byte, its length in bytes, its line from 1 on, and the value; None for a line that is no JSON."""

    offset: int
    length: int
    line: int
    value: Any


def scan(path: Path) -> Iterator[Found]:
    """The elements of a JSON list or the lines of JSON Lines; which it is, its first character tells.

    Raises:
        ValueError: a list that cannot be read (with line and column); lines none of which is an object; an empty file.
    """
    with open(path, "rb") as file:
        start, first = _first_byte(file)
        if not first:
            raise InputError(f"{path} is empty")
        file.seek(start)
        yield from _Window(path, file, start).elements() if first == b"[" else _lines(path, file, start)


def starts_list(path: Path) -> bool:
    """Whether a file holds a JSON list, as `scan` takes it."""
    with open(path, "rb") as file:
        return _first_byte(file)[1] == b"["


def unrepeated(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON (``object_pairs_hook``). Raises ValueError for a key that stands in it twice."""
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        raise InputError(f"the key {next(n for n in names if names.count(n) > 1)!r:.60} stands twice in an object")
    return value


_EXACT = json.JSONDecoder(object_pairs_hook=unrepeated)


def parse(data: bytes, *, fast: bool = False) -> Any:
    """The value of one record. Bytes that are no UTF-8 become lone surrogates.

    Raises ValueError with column, and for a key that stands twice in an object, unless it must be ``fast``.
    """
    text = data.decode("utf-8", "surrogateescape")
    try:
        return (_DECODER if fast else _EXACT).decode(text)
    except json.JSONDecodeError as error:
        raise InputError(f"column {error.pos - text.rfind(chr(10), 0, error.pos)}: {error.msg}") from error
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, thousands of brackets
        raise InputError(f"column 1: {str(error).split(';')[0]}") from error


def _first_byte(file: BinaryIO) -> tuple[int, bytes]:
    """Where the text starts, and its first byte that is no white space."""
    start = len(_BOM) if file.read(len(_BOM)) == _BOM else 0
    file.seek(start)
    while chunk := file.read(CHUNK):
        if rest := chunk.lstrip(_SPACE.encode()):
            return start, rest[:1]
    return start, b""


def _lines(path: Path, file: BinaryIO, offset: int) -> Iterator[Found]:
    any_object, first_fault, line = False, "", 0
    while data := file.readline(LONGEST_RECORD + 1):
        line += 1
        if len(data) > LONGEST_RECORD:
            raise InputError(f"{path} line {line} is longer than {LONGEST_RECORD} bytes: neither a list nor JSON Lines")
        if record := data.rstrip(_SPACE.encode()):
            try:
                value = parse(record, fast=True)
            except ValueError as error:
                value, first_fault = None, first_fault or f"line {line} {error}"
            any_object |= isinstance(value, dict)
            yield Found(offset, len(record), line, value)
        offset += len(data)
    if not any_object:
        raise InputError(f"{path} is neither a JSON list nor JSON Lines: {first_fault or 'no line holds an object'}")


class _Window:
    """The part of a file that is being read, as text; ``offset``, ``line`` and ``column`` are those of position ``at``."""

    def __init__(self, path: Path, file: BinaryIO, offset: int) -> None:
        self.path, self.file, self.offset = path, file, offset
        self.text, self.at, self.line, self.column = "", 0, 1, 1
        self.decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")

    def elements(self) -> Iterator[Found]:
        """Those of the list that starts here."""
        self._skip_space()
        self._advance(self.at + 1)
        if self._skip_space() != "]":
            while True:
                line, offset = self.line, self.offset
                value = self._value()
                yield Found(offset, self.offset - offset, line, value)
                if self._skip_space() != ",":
                    break
                self._advance(self.at + 1)
                self._skip_space()
        if self._skip_space() != "]":
            raise self._error(self.at, "expecting ',' or ']'" if self.at < len(self.text) else "the list has no end")
        self._advance(self.at + 1)
        if self._skip_space():
            raise self._error(self.at, "text after the end of the list")

    def _value(self) -> Any:
        while True:
            try:
                value, end = _DECODER.raw_decode(self.text, self.at)
                length = end - self.at
                if end > len(self.text) - LOOKAHEAD and self._more():  # a number may go on: 15, 15.5, 15e+5
                    continue
                self._advance(self.at + length)
                return value
            except json.JSONDecodeError as error:
                inside = error.pos - self.at
                cut = error.pos > len(self.text) - LOOKAHEAD or error.msg.startswith("Unterminated string")
                if not (cut and len(self.text) - self.at < LONGEST_RECORD and self._more()):
                    raise self._error(self.at + inside, error.msg) from error
            except (ValueError, RecursionError) as error:
                raise self._error(self.at, str(error).split(";")[0]) from error

    def _more(self) -> bool:
        chunk = self.file.read(CHUNK)
        self.text = self.text[self.at :] + self.decoder.decode(chunk, final=not chunk)
        self.at = 0
        return bool(chunk)

    def _skip_space(self) -> str:
        """The next character that is no white space; "" at the end of the file."""
        more = True
        while more:
            match = _SKIP.match(self.text, self.at)
            assert match is not None
            self._advance(match.end())
            if self.at < len(self.text):
                break
            more = self._more()
        return self.text[self.at : self.at + 1]

    def _advance(self, to: int) -> None:
        passed = self.text[self.at : to]
        self.offset += len(passed) if passed.isascii() else len(passed.encode("utf-8", "surrogateescape"))
        self.at = to
        newline = passed.rfind("\n")
        self.line += passed.count("\n")
        self.column = len(passed) - newline if newline >= 0 else self.column + len(passed)

    def _error(self, position: int, message: str) -> ValueError:
        self._advance(position)
        where = f"{self.path} line {self.line} column {self.column}"
        return InputError(f"{where}: {message[:1].lower()}{message[1:]}; the list cannot be read from there on")
