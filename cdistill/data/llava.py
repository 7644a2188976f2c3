"""LLaVA's sets: a JSON list or JSON Lines, whichever the file holds, read by offsets."""

from __future__ import annotations

from array import array
from pathlib import Path
from typing import Any

import numpy as np

from cdistill.data.files import KnownFile
from cdistill.data.images import Roots, find_image
from cdistill.data.records import measure, read_record
from cdistill.data.samples import BadSampleError, Sample, Sizes
from cdistill.data.scan import parse, scan


class LlavaJson:
    """The records of a JSON list or of JSON Lines (``{"id", "image", "conversations"}``, see `read_record`).

    The file is looked through once. What stays is 16 bytes of offsets and 6 of sizes for each record; a sample is
    read from the file when it is asked for.

    Args:
        path: the file.
        images: where the names of images start from, the file's folder by default; see `resolve_image`.
        allow_urls: images may be named by http and https URLs, and are then fetched with every access.
        name: what the source is called, the file's name without its suffix by default.

    Raises:
        ValueError: there is no such file, it is neither, or its list cannot be read to its end (with line and column).
            A line of JSON Lines that cannot be read is a bad sample.
    """

    in_order = False

    def __init__(
        self, path: str | Path, images: Roots | None = None, *, allow_urls: bool = False, name: str | None = None
    ) -> None:
        path = Path(path)
        self.name = name or path.stem
        self.images: Roots = path.parent if images is None else images
        self.allow_urls = allow_urls
        self._file = KnownFile.of(path)
        offsets, lengths, lines = array("Q"), array("I"), array("I")
        characters, counts = array("i"), array("h")
        for offset, length, line, record in scan(path):
            offsets.append(offset)
            lengths.append(length)
            lines.append(line)
            text, marks = measure(record)
            characters.append(text)
            counts.append(min(marks, 32767))
        self._offsets, self._lengths, self._lines = map(np.asarray, (offsets, lengths, lines))
        self._sizes = Sizes(np.asarray(characters), np.asarray(counts))

    def __len__(self) -> int:
        return len(self._offsets)

    def __getitem__(self, index: int) -> Sample:
        """Raises BadSampleError for a record that is none, IndexError beyond the last, ValueError if the file changed."""
        index = range(len(self))[index]
        record = self.record(index)
        return read_record(record, self._find, id=str(index), place=self.place(index))

    def record(self, index: int) -> Any:
        """The value of JSON as it stands. Raises BadSampleError for a line that cannot be read."""
        data = self.raw(index)
        try:
            return parse(data)
        except ValueError as error:
            raise BadSampleError("unreadable JSON", str(error), self.place(index)) from error

    def raw(self, index: int) -> bytes:
        """The bytes of a record."""
        return self._file.read(int(self._offsets[index]), int(self._lengths[index]))

    def place(self, index: int) -> str:
        """File, number from 0 on and line of a record."""
        return f"{self._file.path}[{index}] line {self._lines[index]}"

    def sizes(self) -> Sizes:
        return self._sizes

    def _find(self, name: Any) -> Any:
        return find_image(self.images, name, allow_urls=self.allow_urls)
