"""Sets of Hugging Face ``datasets``: local files, folders of ``save_to_disk``, names on the hub; also as streams."""

from __future__ import annotations

import csv
import glob
import io
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from cdistill.data.images import Roots, find_image
from cdistill.data.records import at, caption_messages, measure, question_messages, read_record, split_text
from cdistill.data.samples import BadSampleError, ImageBytes, ImageFile, Message, Sample, Sizes
from cdistill.data.scan import parse

if TYPE_CHECKING:
    import datasets

HUB = "hf:"
_BUILDERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".arrow": "arrow", ".csv": "csv"}
_USUAL = {
    "conversations": ("conversations", "messages", "conversation"),
    "question": ("question", "query", "prompt", "instruction"),
    "answer": ("answer", "response", "output"),
    "caption": ("caption", "text"),
    "image": ("image", "images"),
    "id": ("id",),
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
    with _told(path):
        return _load(path, config, split, streaming)


@contextmanager
def _told(path: str) -> Iterator[None]:
    """What ``datasets`` and Arrow say of a file that cannot be read, as a ValueError of one line."""
    import datasets

    try:
        yield
    except ConnectionError:
        raise
    except (ValueError, OSError, datasets.exceptions.DatasetsError) as error:
        cause = error.__cause__ if isinstance(error, datasets.exceptions.DatasetsError) else None
        told = " ".join(str(cause or error).split())
        raise ValueError(told if path in told else f"{path} cannot be read: {told}") from error


def _load(path: str, config: str | None, split: str, streaming: bool) -> Any:
    import datasets

    if path.startswith(HUB):
        return datasets.load_dataset(path.removeprefix(HUB), config, split=split, streaming=streaming)
    if "://" in path:
        raise ValueError(f"sets are read from local files or from the hub ({HUB}owner/name), never from URLs: {path}")
    if config is not None:
        raise ValueError(f"config is for names on the hub ({HUB}owner/name), got {config!r} for {path}")
    if is_saved(path):
        data = datasets.load_from_disk(path)
        if isinstance(data, datasets.DatasetDict):
            if split not in data:
                raise ValueError(f"{path} has no split {split!r}, it has {', '.join(data)}")
            data = data[split]
        return data.to_iterable_dataset() if streaming else data
    files = os.path.join(path, "**", "*.parquet") if os.path.isdir(path) else path
    builder = _BUILDERS.get(os.path.splitext(files)[1].lower())
    if builder is None:
        raise ValueError(f"datasets are read from {', '.join(_BUILDERS)}, {HUB}owner/name or a folder, got {path}")
    options = _all_text(files) if builder == "csv" else {}
    try:
        return datasets.load_dataset(builder, **options, data_files={split: files}, split=split, streaming=streaming)
    except FileNotFoundError as error:
        raise ValueError(f"no such files: {files}") from error


def _all_text(files: str) -> dict[str, Any]:
    """Options to read CSV as it stands: "NA" and "007" are answers."""
    import datasets

    for path in sorted(glob.glob(files))[:1]:
        with open(path, encoding="utf-8-sig", newline="") as file:
            names = next(csv.reader(file), [])
        return {"features": datasets.Features(dict.fromkeys(names, datasets.Value("string"))), "keep_default_na": False}
    return {}


def is_saved(path: str) -> bool:
    """Whether a folder was made by ``save_to_disk``."""
    return any(os.path.isfile(os.path.join(path, name)) for name in ("state.json", "dataset_dict.json"))


class HubDataset:
    """The rows of a data set as samples.

    Args:
        data: a ``datasets.Dataset`` or ``IterableDataset``, as `load_hub` gives.
        columns: which column holds ``conversations`` (turns as in `read_record`, or these in JSON), or ``question`` and
            ``answer``, or ``caption``; and ``image`` and ``id``. Columns of usual names are found without it.
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
            raise ValueError(f"size must be given for {name}: a stream does not tell how many samples it has")
        if size is not None and size < 1:
            raise ValueError(f"size must be at least 1 for {name}, got {size}")
        there = list(data.column_names or next(iter(data), {}))
        self.columns = find_columns(there, columns or {}, name)
        data = data.select_columns(sorted(set(self.columns.values())))
        self._features = data.features
        self._data = data.with_format("arrow") if not self.in_order else data.decode(False) if data.features else data
        self._size = size or 0 if self.in_order else min(len(data), size or len(data))
        self._sizes: Sizes | None = None
        self._stream: Iterator[dict[str, Any]] | None = None
        self._row: dict[str, Any] = {}
        self._index = -1  # of the row
        self._length: int | None = None  # of the stream, once its end has been seen

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> Sample:
        """Raises BadSampleError for a row that is no sample, IndexError beyond the last."""
        index = range(len(self))[index]
        place, row = self.place(index), self.record(index)
        values = _present(row.get("image"))
        with at(place):
            if "conversations" not in row:
                id = str(index) if row.get("id") is None else str(row["id"])
                messages = self._messages(row, len(values))
                return Sample(id, messages, tuple(self._image(value, place) for value in values), place)
            record = {"conversations": _turns(row["conversations"]), "id": row.get("id")}
        beside = values if "image" in self.columns else None
        return read_record(record, lambda value: self._image(value, place), id=str(index), place=place, beside=beside)

    def record(self, index: int) -> dict[str, Any]:
        """A row: what stands in its columns, by what they hold."""
        index = range(len(self))[index]
        row = self._from_stream(index) if self.in_order else self._decoded(self._data[index])[0]
        return {key: row.get(column) for key, column in self.columns.items()}

    def place(self, index: int) -> str:
        """Name of the source and number of a row."""
        return f"{self.name}[{index}]"

    def sizes(self) -> Sizes | None:
        """None for a stream. The first call reads all text, and no image."""
        if self._sizes is None and not self.in_order:
            texts = [column for key, column in self.columns.items() if key not in ("image", "id")]
            found = [self._measure(row) for rows in self._parts(texts) for row in self._decoded(rows)]
            characters, marks = np.asarray(found, np.int64).reshape(-1, 2).T
            if "image" in self.columns:
                marks = np.concatenate([_counts(rows.column(0)) for rows in self._parts([self.columns["image"]])])
            self._sizes = Sizes(characters.astype(np.int32), marks.astype(np.int16))
        return self._sizes

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_stream": None, "_row": {}, "_index": -1}

    def _from_stream(self, index: int) -> dict[str, Any]:
        if self._length is not None:
            index %= self._length
        if self._stream is None or index < self._index:
            # Not iter(): in a worker process it would give a share of the rows, or none.
            self._stream, self._index = (_row(rows) for rows in self._data.iter(1)), -1
        while self._index < index:
            with _told(self.name):
                row = next(self._stream, None)
            if row is None:
                self._length = self._index + 1
                if not self._length:
                    raise ValueError(f"{self.name}: the stream has no samples")
                return self._from_stream(index % self._length)
            self._row, self._index = row, self._index + 1
        return self._row

    def _decoded(self, rows: Any) -> list[dict[str, Any]]:
        """Rows of an Arrow table in Python's types; encoded images stay as they are."""
        import datasets

        plain = {name: self._features[name] for name in rows.column_names if name != self.columns.get("image")}
        features = datasets.Features(plain)
        return [row | features.decode_example({name: row[name] for name in plain}) for row in rows.to_pylist()]

    def _parts(self, columns: list[str]) -> Iterator[Any]:
        return self._data.select(range(len(self))).select_columns(columns).iter(1000)

    def _messages(self, row: Mapping[str, Any], images: int) -> tuple[Message, ...]:
        if "caption" in row:
            return caption_messages(_text(row["caption"]), images)
        return question_messages(_text(row["question"]), _text(row["answer"]), images)

    def _measure(self, row: Mapping[str, Any]) -> tuple[int, int]:
        try:
            if "conversations" in self.columns:
                return measure({"conversations": _turns(row[self.columns["conversations"]])})
            parts = [part for text in row.values() for part in split_text(_text(text))]
        except BadSampleError:
            return 0, 0
        texts = [part for part in parts if isinstance(part, str)]
        return sum(map(len, texts)), len(parts) - len(texts)

    def _image(self, value: Any, place: str) -> ImageFile | ImageBytes:
        """The image that a value of the column stands for: its bytes, a path, ``{"bytes", "path"}`` or one of PIL."""
        name = value.get("path") if isinstance(value, Mapping) else value
        data = value.get("bytes") if isinstance(value, Mapping) else value
        if isinstance(data, bytes):
            return ImageBytes(place, data)
        if isinstance(data, Image.Image):
            buffer = io.BytesIO()
            data.save(buffer, "PNG")
            return ImageBytes(place, buffer.getvalue())
        if self.images is None and isinstance(name, str):
            raise BadSampleError("bad image path", f"images must say where paths start from, got the path {name!r}")
        return find_image(self.images or Path(), name, allow_urls=self.allow_urls)


def _row(rows: Mapping[str, list[Any]]) -> dict[str, Any]:
    return {name: values[0] for name, values in rows.items()}


def find_columns(there: list[str], given: Mapping[str, str], name: str) -> dict[str, str]:
    """The columns to read, by what they hold; see `HubDataset`. Raises ValueError where that cannot be decided."""
    for key, column in given.items():
        if key not in _USUAL:
            raise ValueError(f"columns of {name}: {key!r} is none of {', '.join(_USUAL)}")
        if column not in there:
            raise ValueError(f"columns of {name}: {key} is {column!r}, there are {', '.join(there)}")
    found = {key: column for key, names in _USUAL.items() for column in reversed(names) if column in there}
    found |= given
    forms = sorted(_FORMS, key=lambda form: not given.keys() & set(form))  # what is given comes first
    form = next((form for form in forms if found.keys() >= set(form)), None)
    if form is None or (given.keys() & {key for form in _FORMS for key in form}) - set(form):
        wanted = " or ".join(" and ".join(form) for form in _FORMS)
        raise ValueError(f"columns of {name}: say which hold {wanted}; there are {', '.join(there)}")
    return {key: found[key] for key in (*form, "image", "id") if key in found}


def _present(value: Any) -> list[Any]:
    """The images of a row: none, one or several."""
    values = value if isinstance(value, list) else [value]
    return [v for v in values if v not in (None, "", {"bytes": None, "path": None})]


def _text(value: Any) -> Any:
    """A number is an answer, too."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _turns(value: Any) -> Any:
    """A list of turns, of which some sets keep the JSON, and an old form of ``datasets`` an object of lists."""
    try:
        if isinstance(value, str):
            return parse(value.encode("utf-8", "surrogatepass"))
        if isinstance(value, Mapping) and all(isinstance(column, list) for column in value.values()):
            return [dict(zip(value, turn, strict=True)) for turn in zip(*value.values(), strict=True)]
    except ValueError as error:
        raise BadSampleError("not a record", f"the turns cannot be read: {error}") from error
    return value


def _counts(column: Any) -> np.ndarray:
    """How many images stand in each row of an Arrow column."""
    import pyarrow as arrow
    from pyarrow import compute

    one = not (arrow.types.is_list(column.type) or arrow.types.is_large_list(column.type))
    counts = compute.is_valid(column) if one else compute.fill_null(compute.list_value_length(column), 0)
    return np.asarray(counts.to_pylist(), dtype=np.int64)
