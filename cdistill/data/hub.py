"""Sets of Hugging Face ``datasets``: local files, folders of ``save_to_disk``, names on the hub; also as streams."""

from __future__ import annotations

import csv
import glob
import json
import os
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from cdistill.data.fields import is_blank
from cdistill.data.files import leaves_folder
from cdistill.data.images import Roots, find_image
from cdistill.data.records import (
    ANSWERS,
    CAPTIONS,
    IMAGES,
    KEYS,
    QUESTIONS,
    SYSTEMS,
    TURNS,
    measure,
    read_record,
)
from cdistill.data.samples import FIRST_RECORDS, ImageBytes, ImageFile, Sample, Sizes, Unread
from cdistill.errors import InputError

if TYPE_CHECKING:
    import datasets

HUB = "hf:"
_BUILDERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".arrow": "arrow", ".csv": "csv"}
_SLOTS = {
    "conversations": TURNS,
    "question": QUESTIONS,
    "answer": ANSWERS,
    "caption": CAPTIONS,
    "image": ("image",),
    "id": ("id",),
    "system": SYSTEMS,
}
_FORMS = (("conversations",), ("question", "answer"), ("caption",))


def load_hub(path: str, *, config: str | None = None, split: str = "train", streaming: bool = False) -> Any:
    """A ``datasets.Dataset``, or its ``IterableDataset`` for a stream.

    Args:
        path: ``hf:owner/name``, a folder of ``save_to_disk``, a folder of parquet files, or a file or glob of .json,
            .jsonl, .parquet, .arrow or .csv. Files are converted once into the cache of ``datasets``, unless streamed.

    Raises:
        ValueError: it is none of these, cannot be read, or has no such split.
        OSError: the hub cannot be reached.
    """
    with _one_line_errors(path):
        return _load(path, config, split, streaming)


@contextmanager
def _one_line_errors(path: str) -> Iterator[None]:
    """What ``datasets`` and Arrow say of a file that cannot be read, as a ValueError of one line."""
    import datasets

    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False  # else a server is told of every local file
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()  # in a log they are lines of their own
    try:
        yield
    except ConnectionError:
        raise
    except Exception as error:  # whatever comes of what a stranger's file says of itself
        cause = error.__cause__ if isinstance(error, datasets.exceptions.DatasetsError) and error.__cause__ else error
        plain = isinstance(cause, (ValueError, OSError, csv.Error, datasets.exceptions.DatasetsError))
        message = " ".join(f"{'' if plain else f'{type(cause).__name__}: '}{cause}".split())
        raise InputError(message if path in message else f"{path} cannot be read: {message}") from error


def _load(path: str, config: str | None, split: str, streaming: bool) -> Any:
    import datasets

    if path.startswith(HUB):
        return datasets.load_dataset(path.removeprefix(HUB), config, split=split, streaming=streaming)
    if "://" in path:
        raise InputError(f"sets are read from local files or from the hub ({HUB}owner/name), never from URLs: {path}")
    if config is not None:
        raise InputError(f"config is for names on the hub ({HUB}owner/name), got {config!r} for {path}")
    if is_saved(path):
        _refuse_files_elsewhere(path)
        data = datasets.load_from_disk(path)
        if isinstance(data, datasets.DatasetDict):
            if split not in data:
                raise InputError(f"{path} has no split {split!r}, it has {', '.join(data)}")
            data = data[split]
        return data.to_iterable_dataset() if streaming else data
    files = os.path.join(path, "**", "*.parquet") if os.path.isdir(path) else path
    builder = _BUILDERS.get(os.path.splitext(files)[1].lower())
    if builder is None:
        raise InputError(f"datasets are read from {', '.join(_BUILDERS)}, {HUB}owner/name or a folder, got {path}")
    options = _all_text(files) if builder == "csv" else {}
    try:
        return datasets.load_dataset(builder, **options, data_files={split: files}, split=split, streaming=streaming)
    except FileNotFoundError as error:
        raise InputError(f"no such files: {files}") from error


def _all_text(files: str) -> dict[str, Any]:
    """Options to read CSV as it stands: "NA" and "007" are answers. Raises ValueError for files that pandas reads otherwise."""
    import datasets

    paths = sorted(glob.glob(files))
    if not paths:
        return {}
    headers = [_header(path) for path in paths]
    for path, names in zip(paths, headers, strict=True):
        if set(names) != set(headers[0]):
            raise InputError(f"{path} has columns {', '.join(names)}, {paths[0]} has {', '.join(headers[0])}")
    return {
        "features": datasets.Features(dict.fromkeys(headers[0], datasets.Value("string"))),
        "keep_default_na": False,
    }


def _header(path: str) -> list[str]:
    """The columns of a CSV file, of which pandas would rename one that is there twice, and take the first for row numbers where
    rows have a value more than the header."""
    import pandas

    with open(path, encoding="utf-8-sig", newline="") as file:
        names = next(filter(None, csv.reader(file)), [])
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise InputError(f"{path} has the column {twice[0]!r:.60} twice")
    rows = pandas.read_csv(path, nrows=1, dtype=str, keep_default_na=False)
    if len(rows) and not isinstance(rows.index, pandas.RangeIndex):
        more = rows.index.nlevels + len(rows.columns)
        raise InputError(f"{path}: its rows have {more} values, its header names {len(names)} columns")
    return names


def _refuse_files_elsewhere(path: str) -> None:
    """Raise ValueError where a folder of ``save_to_disk`` names splits or files that lie out of it."""
    for place, key in (("dataset_dict.json", "splits"), ("state.json", "_data_files"), ("*/state.json", "_data_files")):
        for found in glob.glob(os.path.join(glob.escape(path), place)):
            with open(found, encoding="utf-8") as file:
                names = [entry["filename"] if isinstance(entry, dict) else entry for entry in json.load(file)[key]]
            outside = [name for name in names if leaves_folder(name)]
            if outside:
                raise InputError(f"{found} names what lies out of its folder: {outside[0]!r:.80}")


def is_saved(path: str) -> bool:
    """Whether a folder was made by ``save_to_disk``."""
    return any(os.path.isfile(os.path.join(path, name)) for name in ("state.json", "dataset_dict.json"))


class HubDataset:
    """The rows of a data set as samples.

    Args:
        data: a ``datasets.Dataset`` or ``IterableDataset``, as `load_hub` gives.
        columns: which column holds ``conversations`` (turns as in `read_record`, or these in JSON), or ``question`` and
            ``answer``, or ``caption``; and ``system``, ``image`` and ``id``. Columns of the names that `read_record` knows
            are found without it, and read as it says.
        images: where paths in the image column start from (see `resolve_image`); encoded images need none.
        size: how many rows count: must be given for a stream, whose length nobody knows.
        allow_urls: images may be named by http and https URLs, and are then fetched with every access.
        name: what the source is called.

    A stream is read in order: each access moves on from the last one, and going back starts it anew. One that is shorter than
    ``size`` begins again at its end.

    Raises:
        ValueError: ``columns`` names something else or a column that is not there, no column holds text, or a stream has
            no size.
    """

    def __init__(
        self,
        data: datasets.Dataset | datasets.IterableDataset,
        *,
        columns: Mapping[str, str] | None = None,
        images: Roots | None = None,
        size: int | None = None,
        allow_urls: bool = False,
        name: str,
    ) -> None:
        self.name, self.images, self.allow_urls = name, images, allow_urls
        self.in_order = not hasattr(data, "__len__")
        if self.in_order and size is None:
            raise InputError(f"size must be given for {name}: a stream does not tell how many samples it has")
        if size is not None and size < 1:
            raise InputError(f"size must be at least 1 for {name}, got {size}")
        there = list(data.column_names or next(iter(data), {}))
        self.columns = find_columns(there, columns or {}, name)
        self._image_columns = [column for column, key in self.columns.items() if IMAGES.fullmatch(key)]
        self._others = [column for column in there if column not in self.columns]
        self._all = data
        data = data.select_columns(sorted(self.columns))
        self._features = _without_decoding(data.features)
        self._data = data.with_format("arrow") if not self.in_order else data.decode(False) if data.features else data
        self._size = size or 0 if self.in_order else min(len(data), size or len(data))
        self._known: tuple[Sizes, Unread] | None = None
        self._stream: Iterator[dict[str, Any]] | None = None
        self._row: dict[str, Any] = {}
        self._index = -1  # of the row
        self._length: int | None = None  # of the stream, once its end has been seen

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> Sample:
        """Raises BadSampleError for a row that is no sample, IndexError beyond the last."""
        index = range(len(self))[index]
        place = self.place(index)

        def find(value: Any) -> ImageFile | ImageBytes:
            return find_image(self.images, value, allow_urls=self.allow_urls, place=place)

        return read_record(self.record(index), find, id=str(index), place=place)

    def record(self, index: int) -> dict[str, Any]:
        """A row: what stands in the columns that are read, by their keys as in `read_record`."""
        index = range(len(self))[index]
        row = self._from_stream(index) if self.in_order else self._decoded(self._data[index])[0]
        return self._renamed(row)

    def place(self, index: int) -> str:
        """Name of the source and number of a row."""
        return f"{self.name}[{index}]"

    def sizes(self) -> Sizes | None:
        """None for a stream. The first call reads all text, and no image."""
        return None if self.in_order else self._look_through()[0]

    def unread(self, most: int | None = FIRST_RECORDS) -> Unread:
        """Of all rows, with columns that are not read at all; of a stream its first row."""
        if not self.in_order:
            return self._look_through()[1]
        row: dict[str, Any] = next(iter(self._all.decode(False) if self._all.features else self._all), {})
        keys = [column for column in self._others if not is_blank(row.get(column))]
        return Unread(Counter([*keys, *measure(self._renamed(row)).unread]), 1)

    def _look_through(self) -> tuple[Sizes, Unread]:
        """What is known of all rows without an image."""
        if self._known is None:
            data, keys = self._all.select(range(len(self))).with_format("arrow"), Counter[str]()
            images = np.zeros(len(self), np.int64)
            for column in (*self._image_columns, *self._others):
                counts = [_counts(rows.column(0)) for rows in data.select_columns([column]).iter(1000)]
                count = np.concatenate(counts) if counts else images
                if column in self._others:
                    keys[column] = int((count > 0).sum())
                else:
                    images += count
            texts = [column for column in self.columns if column not in self._image_columns]
            parts = (rows for part in data.select_columns(texts).iter(1000) for rows in self._decoded(part))
            # Where there are image columns, a row without an image there may name some in its messages.
            found = [measure(self._renamed(row), int(n) or None) for row, n in zip(parts, images, strict=True)]
            keys.update(key for of in found for key in of.unread)
            characters, marks = np.asarray([of[:2] for of in found], np.int64).reshape(-1, 2).T
            marks = np.maximum(marks, images).clip(0, 32767)
            self._known = Sizes(characters.astype(np.int32), marks.astype(np.int16)), Unread(+keys, len(self))
        return self._known

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_stream": None, "_row": {}, "_index": -1}

    def _from_stream(self, index: int) -> dict[str, Any]:
        if self._length is not None:
            index %= self._length
        if self._stream is None or index < self._index:
            # Not iter(): in a worker process it would give a share of the rows, or none.
            self._stream, self._index = (_row(rows) for rows in self._data.iter(1)), -1
        while self._index < index:
            with _one_line_errors(self.name):
                row = next(self._stream, None)
            if row is None:
                self._length = self._index + 1
                if not self._length:
                    raise InputError(f"{self.name}: the stream has no samples")
                return self._from_stream(index % self._length)
            self._row, self._index = row, self._index + 1
        return self._row

    def _decoded(self, rows: Any) -> list[dict[str, Any]]:
        """Rows of an Arrow table in Python's types; encoded images stay as they are."""
        features = self._features if len(self._features) == rows.num_columns else None
        features = features or type(self._features)({name: self._features[name] for name in rows.column_names})
        return [features.decode_example(row) for row in rows.to_pylist()]

    def _renamed(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """A row as a record of the keys that `read_record` knows, names of classes in the place of their numbers."""
        features = self._all.features or {}
        return {
            key: _with_names(row[column], features.get(column)) for column, key in self.columns.items() if column in row
        }


def _row(rows: Mapping[str, list[Any]]) -> dict[str, Any]:
    return {name: values[0] for name, values in rows.items()}


def find_columns(there: list[str], given: Mapping[str, str], name: str) -> dict[str, str]:
    """The columns to read, each with the key that `read_record` takes it for. Raises ValueError where that is not clear.

    A column that is given for a key hides those of the key's usual names, and those of other forms.
    """
    for key, column in given.items():
        if key not in _SLOTS:
            raise InputError(f"columns of {name}: {key!r} is none of {', '.join(_SLOTS)}")
        if column not in there:
            raise InputError(f"columns of {name}: {key} is {column!r}, there are {', '.join(there)}")
    forms = [form for form in _FORMS if given.keys() & set(form)] or list(_FORMS)
    filled = {key for key, names in _SLOTS.items() if key in given or not set(names).isdisjoint(there)}
    if len({key for form in _FORMS for key in form} & given.keys() - set(forms[0])) or not any(
        filled >= set(form) for form in forms
    ):
        wanted = " or ".join(" and ".join(form) for form in _FORMS)
        raise InputError(f"columns of {name}: say which hold {wanted}; there are {', '.join(there)}")
    hidden = {n for key in given for n in (_SLOTS[key] if key != "image" else filter(IMAGES.fullmatch, there))}
    if given.keys() & {key for form in _FORMS for key in form}:
        hidden |= {n for form in _FORMS if form not in forms for key in form for n in _SLOTS[key]}
    known = {column: column for column in there if column in KEYS or IMAGES.fullmatch(column)}
    usual = {column: key for column, key in known.items() if column not in hidden}
    return {**usual, **{column: key for key, column in given.items()}}


def _without_decoding(feature: Any) -> Any:
    """Features whose images, sounds and videos stay encoded, however deep they lie."""
    if isinstance(feature, dict):
        return type(feature)({name: _without_decoding(inner) for name, inner in feature.items()})
    changes: dict[str, Any] = {"decode": False} if hasattr(feature, "decode") else {}  # a file may say 1 or "yes"
    if hasattr(feature, "feature"):
        changes["feature"] = _without_decoding(feature.feature)
    return replace(feature, **changes) if changes else feature


def _with_names(value: Any, feature: Any) -> Any:
    """A value with the names of classes in the place of their numbers."""
    if hasattr(feature, "int2str"):
        return feature.int2str(value) if isinstance(value, int) and value >= 0 else None
    if isinstance(value, list) and hasattr(feature, "feature"):
        return [_with_names(inner, feature.feature) for inner in value]
    if isinstance(value, dict) and isinstance(feature, dict):
        return {name: _with_names(inner, feature.get(name)) for name, inner in value.items()}
    return value


def _counts(column: Any) -> np.ndarray:
    """How many values that are not blank stand in each row of an Arrow column: of a list its elements, else 0 or 1."""
    return np.concatenate([np.zeros(0, np.int64), *(_counts_of(chunk) for chunk in column.chunks)])


def _counts_of(array: Any) -> np.ndarray:
    import pyarrow as arrow
    from pyarrow import compute

    if isinstance(array.type, arrow.BaseExtensionType):
        array = array.storage
    kinds = arrow.types
    if kinds.is_list(array.type) or kinds.is_large_list(array.type) or kinds.is_fixed_size_list(array.type):
        inside = _counts_of(compute.list_flatten(array)) > 0
        return np.bincount(np.asarray(compute.list_parent_indices(array))[inside], minlength=len(array))
    there = np.asarray(compute.is_valid(array))
    if kinds.is_struct(array.type):
        fields = [_counts_of(compute.struct_field(array, i)) > 0 for i in range(array.type.num_fields)]
        there = there & np.any([np.zeros(len(array), bool), *fields], axis=0)
    elif kinds.is_string(array.type) or kinds.is_large_string(array.type):
        words = compute.not_equal(compute.utf8_trim_whitespace(array), "")
        there = np.asarray(compute.fill_null(words, False))
    elif kinds.is_floating(array.type):
        there = np.asarray(compute.fill_null(compute.invert(compute.is_nan(array)), False))
    return there.astype(np.int64)
