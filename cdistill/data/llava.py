"""JSON lists and JSON Lines, whichever the file holds, read by offsets: LLaVA's sets, and any other layout of records."""

from __future__ import annotations

from array import array
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from cdistill.data.files import KnownFile
from cdistill.data.images import Roots, find_image
from cdistill.data.records import measure, read_record
from cdistill.data.samples import FIRST_RECORDS, BadSampleError, ImageBytes, ImageFile, Sample, Sizes, Unread
from cdistill.data.scan import parse, scan


class LlavaJson:
    """The records of a JSON list or of JSON Lines (LLaVA's ``{"id", "image", "conversations"}`` or others, see `read_record`).

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
        characters, counts, unread = array("i"), array("h"), Counter[str]()
        for offset, length, line, record in scan(path):
            offsets.append(offset)
            lengths.append(length)
            lines.append(line)
            measured = measure(record)
            characters.append(measured.characters)
            counts.append(min(measured.images, 32767))
            unread.update(measured.unread)
        self._offsets, self._lengths, self._lines = map(np.asarray, (offsets, lengths, lines))
        self._sizes = Sizes(np.asarray(characters), np.asarray(counts))
        self._unread = Unread(unread, len(offsets))

    def __len__(self) -> int:
        return len(self._offsets)

    def __getitem__(self, index: int) -> Sample:
        """Raises BadSampleError for a record that is none, IndexError beyond the last, ValueError if the file changed."""
        index = range(len(self))[index]
        record, place = self.record(index), self.place(index)

        def find(value: Any) -> ImageFile | ImageBytes:
            return find_image(self.images, value, allow_urls=self.allow_urls, place=place)

        return read_record(record, find, id=str(index), place=place)

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

    def unread(self, most: int | None = FIRST_RECORDS) -> Unread:
        """Of all records: they were looked through when the file was opened."""
        return self._unread

    def sizes(self) -> Sizes:
        return self._sizes
