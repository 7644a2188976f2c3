"""The one form that every data set takes: messages, and the images that stand in them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from cdistill.errors import InputError

IGNORE_INDEX = -100  # the label of a token that is not learned
IMAGE_TOKEN = "<image>"  # what stands for an image in a text
LONGEST_DETAIL = 500
FIRST_RECORDS = 1000  # looked at where a run begins, of sets that are not read before
MOST_KEYS = 12  # that a line names


class Mark(Enum):
    """A part of a message that is not text."""

    IMAGE = "image"  # the next of the sample's images stands here


@dataclass(frozen=True, slots=True)
class Message:
    """What one side says: text and marks, in order; ``role`` is system, user or assistant.

    An answer that is not ``learned`` is read and never a label.
    """

    role: str
    parts: tuple[str | Mark, ...]
    learned: bool = True


@dataclass(frozen=True, slots=True)
class ImageFile:
    """An image in a file that a reader has found to lie under its root."""

    path: Path


@dataclass(frozen=True, slots=True)
class ImageBytes:
    """An encoded image that was read with its sample; ``name`` tells people where from."""

    name: str
    data: bytes


@dataclass(frozen=True, slots=True)
class Sample:
    """A conversation of at least one answer, about any number of images.

    ``images`` are in the order of their marks. ``id`` is the data set's, ``place`` says where the record stands (file and
    line, shard and key), for messages to people.
    """

    id: str
    messages: tuple[Message, ...]
    images: tuple[ImageFile | ImageBytes, ...]
    place: str


def printable(text: str, most: int = LONGEST_DETAIL) -> str:
    """One line of at most so many characters, without what could command a terminal."""
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[: most + 1])
    return line if len(line) <= most else line[: most - 3] + "..."


class BadSampleError(InputError):
    """A sample that cannot be trained on.

    Args:
        reason: which kind of fault, a few words that are the same for all samples with it (they are counted by it).
        detail: the fault of this sample; what is not `printable` of it is cut or written out.
        place: where it stands, once that is known.
    """

    def __init__(self, reason: str, detail: str, place: str = "") -> None:
        detail = printable(detail)
        super().__init__(f"{place}: {reason}: {detail}" if place else f"{reason}: {detail}")
        self.reason, self.detail, self.place = reason, detail, place

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.reason, self.detail, self.place)


@contextmanager
def blamed_on_sample(reason: str) -> Iterator[None]:
    """What others' code (an image processor, a chat template, a tokenizer) raises at a sample, as a BadSampleError.

    They raise nearly anything at contents they were not written for, so it is the call that counts, not the type; no more
    than that call stands under it. What no content can cause goes through: a lack of memory, or of a module or a name.
    """
    try:
        yield
    except (BadSampleError, MemoryError, ImportError, NameError):
        raise
    except Exception as error:
        said = str(error).strip()
        text = said if said and isinstance(error, ValueError) else f"{type(error).__name__}: {said}"
        raise BadSampleError(reason, text) from error


@dataclass(frozen=True)
class Sizes:
    """What is known of all samples without reading any again: ``characters`` (N,) int32 of text, ``images`` (N,) int16."""

    characters: np.ndarray
    images: np.ndarray


@dataclass(frozen=True)
class Unread:
    """What records say that no sample is made of: by key, in how many of the ``records`` looked at it says something."""

    keys: Mapping[str, int]
    records: int

    def __str__(self) -> str:
        """Keys with their counts, the most frequent first; "" where there is none."""
        most = sorted(self.keys.items(), key=lambda item: (-item[1], item[0]))
        listed = [f"{printable(name, 60)} ({count:,})" for name, count in most[:MOST_KEYS]]
        rest = len(most) - len(listed)
        return ", ".join(listed) + (f" and {rest} more" if rest else "")


class Source(Protocol):
    """A set of samples with random access; copies of one in worker processes hold no parsed records."""

    name: str
    in_order: bool  # a stream: samples are read one after the other

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample:
        """The sample at a place. Raises BadSampleError for a record that is none."""

    def record(self, index: int) -> Any:
        """What the sample is made of, as it stands. Raises BadSampleError where it cannot be read."""

    def place(self, index: int) -> str:
        """The place of a sample, whether it is one or not."""

    def unread(self, most: int | None = FIRST_RECORDS) -> Unread:
        """What of the records is not read. Where that is not known already, it looks at ``most`` of them (None: all)."""

    def sizes(self) -> Sizes | None:
        """None where it is not known before samples are read (streams)."""


def check_messages(messages: Sequence[Message], images: int) -> None:
    """Raise BadSampleError unless messages alternate user and assistant, after an optional system message, end with an
    answer, hold no empty answer, and have as many image marks as there are images, in messages of the user."""
    turns = [m for m in messages if m.role != "system"]
    if not turns:
        raise BadSampleError("wrong order of turns", "there is no question with an answer")
    if any(m.role == "system" for m in messages[1:]):
        raise BadSampleError("wrong order of turns", "roles are " + ", ".join(m.role for m in messages))
    expected = [("user", "assistant")[i % 2] for i in range(len(turns))]
    if [m.role for m in turns] != expected or len(turns) % 2:
        raise BadSampleError("wrong order of turns", "roles are " + ", ".join(m.role for m in messages))
    for m in turns[1::2]:
        if not "".join(p for p in m.parts if isinstance(p, str)).strip():
            raise BadSampleError("empty answer", "an answer holds no text")
    if not any(m.learned for m in turns[1::2]):
        raise BadSampleError("nothing to learn", "every answer has weight 0")
    marks = {m.role: sum(isinstance(p, Mark) for p in m.parts) for m in messages}
    count = sum(isinstance(p, Mark) for m in messages for p in m.parts)
    if marks.get("assistant") or marks.get("system"):
        raise BadSampleError("image in an answer", "<image> stands outside the user's messages")
    if count != images:
        raise BadSampleError("image count", f"{count} <image> in the text, {images} images")
