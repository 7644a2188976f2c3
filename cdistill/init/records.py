"""A look at the first records of a data set: its form, whether images are where it says, and how long its samples become."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cdistill.data.check import Bad
from cdistill.data.check import look as look_at
from cdistill.data.conversations import Encoder
from cdistill.data.dataset import encode
from cdistill.data.images import resolve_image
from cdistill.data.mix import open_source
from cdistill.data.samples import BadSampleError, ImageFile, Source
from cdistill.errors import InputError

FIRST = 64  # records looked at
ENCODED = 16  # of them that become tokens
_FORMS = {
    "LlavaJson": "JSON records",
    "TarShards": "tar shards",
    "HubDataset": "rows of Hugging Face datasets",
    "Mix": "a mix of several sets",
}
_MISSING = "missing image"


@dataclass(frozen=True)
class Records:
    """What was found.

    Attributes:
        path: of the set; ``images`` is the folder that names of images start from, if it is not the file's.
        columns: which column of a Hugging Face set holds what, where the user has said it.
        guessed: whether that folder was found here, not named.
        form: in words.
        count: records of the set.
        looked: records looked at, ``seen`` of them with an image, ``bad`` by reason, ``example`` for the first bad one.
        longest: tokens of the longest sample that was encoded, ``visual`` the most visual tokens of one, both at least.
    """

    path: str
    images: str | None
    columns: dict[str, str] | None
    guessed: bool
    form: str
    count: int
    looked: int
    seen: int
    bad: dict[str, int]
    example: str
    longest: int
    visual: int


def look(
    path: str, images: str | None = None, columns: dict[str, str] | None = None, encoder: Encoder | None = None
) -> Records:
    """What a recipe must know of a data set, by its first records.

    A folder that holds one file of JSON stands for it. Where no image is where its path says, folders beside the file are
    tried.

    Raises ValueError, which begins with ``data``, if it cannot be opened, holds no images, or none that can be read.
    """
    path = _file_of(path)
    source = _open(path, images, columns)
    guess = None
    if images is None and _all_missing(source):
        guess = next(_roots(path, source), None)
        source = source if guess is None else _open(path, guess, columns)
    count = len(source)
    looked = min(FIRST, count)
    scanned = look_at(source, 0, looked)
    bad = [record for record in scanned.records if isinstance(record, Bad)]
    reasons = Counter(record.reason for record in bad)
    example = f"{bad[0].place}: {bad[0].detail}" if bad else ""
    _require_images(path, looked, scanned.text_only, reasons, example)
    longest, visual = _lengths(source, looked, encoder)
    return Records(
        path=path,
        images=images or guess,
        columns=columns,
        guessed=guess is not None,
        form=_FORMS.get(type(source).__name__, type(source).__name__),
        count=count,
        looked=looked,
        seen=looked - scanned.text_only - len(bad),
        bad=dict(reasons),
        example=example,
        longest=longest,
        visual=visual,
    )


def _file_of(path: str) -> str:
    folder = Path(path)
    if not folder.is_dir():
        return path
    files = sorted(file for suffix in ("json", "jsonl") for file in folder.glob(f"*.{suffix}"))
    whole = any(next(folder.glob(pattern), None) for pattern in ("*.tar", "**/*.parquet", "*.arrow", "dataset_*.json"))
    return str(files[0]) if len(files) == 1 and not whole else path


def _open(path: str, images: str | None, columns: dict[str, str] | None) -> Source:
    try:
        return open_source(path, images=images, columns=columns)
    except ValueError as error:
        raise InputError(f"data: {error}") from None
    except OSError as error:
        raise InputError(f"data: {path}: {error.strerror or error}") from None


def _named_images(source: Source) -> Iterator[Path]:
    """Files of images of the first records."""
    for index in range(min(FIRST, len(source))):
        try:
            sample = source[index]
        except BadSampleError:
            continue
        yield from (image.path for image in sample.images if isinstance(image, ImageFile))


def _all_missing(source: Source) -> bool:
    paths = list(_named_images(source))
    return bool(paths) and not any(path.is_file() for path in paths)


def _roots(path: str, source: Source) -> Iterator[str]:
    """Folders beside a file of records in which their first images lie."""
    beside = Path(path).parent
    names = [
        name.relative_to(beside.resolve()) for name in _named_images(source) if name.is_relative_to(beside.resolve())
    ]
    folders = [
        beside.parent,
        *(folder for around in (beside, beside.parent) for folder in sorted(around.glob("*/"))[:100]),
    ]
    for folder in folders if names else ():
        if any(_is_there(folder, name.as_posix()) for name in names):
            yield str(folder)


def _is_there(folder: Path, name: str) -> bool:
    with suppress(BadSampleError):
        return resolve_image(folder, name).path.is_file()
    return False


def _require_images(path: str, looked: int, text_only: int, bad: Counter[str], example: str) -> None:
    first = f"the first {looked} records of {path}" if looked > 1 else f"the only record of {path}"
    if not looked:
        raise InputError(f"data: {path} holds no records")
    if text_only == looked:
        raise InputError(f"data: {first} have no image: alignment compares what two models look at in images")
    if text_only + bad.total() < looked:
        return
    if bad[_MISSING] == bad.total():
        raise InputError(
            f"data: {first} name no image that is there ({example}): name the folder that their paths start from by --images"
        )
    raise InputError(f"data: none of {first} can be used, for {', '.join(bad)} ({example})")


def _lengths(source: Source, looked: int, encoder: Encoder | None) -> tuple[int, int]:
    """Tokens of the longest of some samples, and the most visual ones."""
    longest = visual = encoded = 0
    mark = encoder.template.image_token if encoder is not None else None
    image = encoder.tokenizer.convert_tokens_to_ids(mark) if encoder is not None and mark is not None else None
    for index in range(looked if encoder is not None else 0):
        try:
            ids: Any = encode(source[index], encoder).input_ids  # type: ignore[arg-type]
        except BadSampleError as error:
            refused = error
            continue
        encoded += 1
        longest, visual = max(longest, len(ids)), max(visual, int((ids == image).sum()))
        if encoded == ENCODED:
            break
    if encoder is not None and not encoded:
        raise InputError(f"data: none of the first {looked} records can be encoded: {refused}")
    return longest, visual
