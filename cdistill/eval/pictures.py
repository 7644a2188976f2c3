"""The images that questions name: files below a root, or cells of parquet files."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

from PIL import Image

from cdistill.data.images import find_image, open_image, resolve_image
from cdistill.data.samples import BadSampleError, ImageFile
from cdistill.errors import InputError
from cdistill.eval.benchmarks.builtin import PREFIX as BUILTIN
from cdistill.eval.benchmarks.builtin import image as builtin_image

CELL = ".parquet#"  # FILE.parquet#ROW.COLUMN
OR = "|"  # the first of several names that is there


class Cell(NamedTuple):
    """An image in a parquet file."""

    path: Path
    row: int
    column: str


class Pictures:
    """Opens images by the names that questions give them.

    Args:
        roots: folders that paths start from; the first that has an image gives it.
    """

    def __init__(self, roots: Sequence[Path]) -> None:
        self.roots = tuple(roots)
        self._one_at_a_time = Lock()  # a parquet file is read by one thread

    def missing(self, name: str) -> str | None:
        """Why an image is not there, None if it is; whether it can be decoded is seen when it is opened.

        Raises:
            ValueError: the name leads out of its root.
        """
        if name.startswith(BUILTIN):
            return None
        try:
            found = self._find(name)
            if isinstance(found, Cell):
                _group_of(found)
        except BadSampleError as error:
            if error.reason == "missing image":
                return str(error)
            raise InputError(f"image {name!r}: {error}") from None
        return None

    def open(self, name: str) -> Image.Image:
        """The image, RGB of 8 bits; BadSampleError where it is missing or cannot be decoded."""
        if name.startswith(BUILTIN):
            return builtin_image(name)
        found = self._find(name)
        if isinstance(found, ImageFile):
            return open_image(found)
        with self._one_at_a_time:
            group, row = _group_of(found)
            value = _column(found.path, _changed(found.path), group, found.column)[row].as_py()
        return open_image(find_image(self.roots[0], value, allow_urls=False, place=name))

    def _find(self, name: str) -> ImageFile | Cell:
        for each in name.split(OR):
            file, _, place = each.rpartition("#") if CELL in each else (each, "", "")
            row, _, column = place.partition(".")
            if CELL in each and not (row.isdecimal() and column):
                raise BadSampleError("bad image path", f"a cell is FILE.parquet#ROW.COLUMN, got {each!r}")
            for root in self.roots:
                found = resolve_image(root, file)
                if found.path.is_file():
                    return Cell(found.path, int(row), column) if CELL in each else found
        raise BadSampleError("missing image", f"{self.roots[0] / name.split(OR)[0]} is missing")


def _changed(path: Path) -> int:
    return os.stat(path).st_mtime_ns


def _group_of(cell: Cell) -> tuple[int, int]:
    """Which group of rows a cell is in, and its row there."""
    file = _opened(cell.path, _changed(cell.path))
    if cell.column not in file.schema_arrow.names:
        raise BadSampleError("missing image", f"{cell.path} has no column {cell.column!r}")
    row = cell.row
    for group in range(file.num_row_groups):
        count = file.metadata.row_group(group).num_rows
        if row < count:
            return group, row
        row -= count
    raise BadSampleError("missing image", f"{cell.path} has no row {cell.row}")


@lru_cache(maxsize=16)
def _opened(path: Path, changed: int) -> Any:
    import pyarrow
    from pyarrow import parquet

    try:
        return parquet.ParquetFile(path)
    except (OSError, pyarrow.ArrowException) as error:
        raise BadSampleError("missing image", f"{path}: is not parquet ({str(error).splitlines()[0]})") from None


@lru_cache(maxsize=8)
def _column(path: Path, changed: int, group: int, column: str) -> Any:
    """A column of a group of rows, in memory: its neighbours are asked for next."""
    return _opened(path, changed).read_row_group(group, columns=[column]).column(column).combine_chunks()
