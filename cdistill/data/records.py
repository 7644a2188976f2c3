"""Records of LLaVA's schema, and of chat messages, as samples."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from cdistill.data.samples import BadSampleError, ImageBytes, ImageFile, Mark, Message, Sample, check_messages

IMAGE = "<image>"
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}

FindImage = Callable[[Any], ImageFile | ImageBytes]


def read_record(record: Any, find: FindImage, *, id: str, place: str, beside: list[Any] | None = None) -> Sample:
    """A record as a sample.

    Turns are LLaVA's (``{"from", "value"}`` in ``conversations``) or messages (``{"role", "content"}`` in ``messages``,
    content a string or a list of parts). ``<image>`` in a text becomes a mark, all other text stays as it is. An answer
    before the first question is dropped. Images are those that ``image`` or ``images`` names, one or a list, or those
    named in the parts.

    Args:
        record: an object of JSON.
        find: gives the image for the value that stands for it.
        id: the sample's id where the record has no ``id``.
        place: where the record stands.
        beside: what stands for the images where they are kept beside the record; names in it do not count then.

    Raises:
        BadSampleError: it is no such record.
    """
    if not isinstance(record, dict):
        raise BadSampleError("not a record", f"{place}: an object is expected, got {_kind(record)}")
    with at(place):
        messages, inside = _messages(_turns(record))
        named = [name for key in ("image", "images") for name in _listed(record.get(key))]
        if beside is None and named and inside:
            raise BadSampleError("image count", "images are named both beside the messages and in them")
        if beside is None:
            beside = named or inside
        check_messages(messages, len(beside))
        images = tuple(find(value) for value in beside)
    given = record.get("id")
    return Sample(id if given is None else str(given), messages, images, place)


@contextmanager
def at(place: str) -> Iterator[None]:
    """Every BadSampleError says where its sample stands."""
    try:
        yield
    except BadSampleError as error:
        raise BadSampleError(error.reason, error.detail, place) from error


def caption_messages(caption: str, images: int) -> tuple[Message, ...]:
    """A caption as the answer to images alone. Raises BadSampleError where there is no image, or no caption."""
    if not images:
        raise BadSampleError("image count", "a caption without an image")
    messages = (Message("user", (Mark.IMAGE,) * images), Message("assistant", split_text(caption)))
    check_messages(messages, images)
    return messages


def question_messages(question: str, answer: str, images: int) -> tuple[Message, ...]:
    """A question with its answer; where it marks no place for the images, they come first, each on its own line.

    Raises BadSampleError where marks and images do not match or the answer is empty.
    """
    asked = split_text(question)
    if Mark.IMAGE not in asked:
        asked = (Mark.IMAGE, "\n") * images + asked
    messages = (Message("user", asked), Message("assistant", split_text(answer)))
    check_messages(messages, images)
    return messages


def split_text(text: Any) -> tuple[str | Mark, ...]:
    """Text and the marks in it, in order. Raises BadSampleError for what is no text, or no valid UTF-8."""
    if not isinstance(text, str):
        raise BadSampleError("not a record", f"text is expected, got {_kind(text)}")
    if not text.isascii() and any("\ud800" <= c <= "\udfff" for c in text):
        raise BadSampleError("unreadable text", f"not valid UTF-8: {text[:60]!a}")
    parts: list[str | Mark] = []
    for i, piece in enumerate(text.split(IMAGE)):
        parts += ([Mark.IMAGE] if i else []) + ([piece] if piece else [])
    return tuple(parts)


def measure(record: Any) -> tuple[int, int]:
    """Characters of text and image marks in the messages of a record; anything for one that `read_record` refuses."""
    try:
        turns = record["conversations"]
        if _ROLES[turns[0]["from"]] == "user":
            text = "\n".join([turn["value"] for turn in turns])
            marks = text.count(IMAGE)
            return len(text) - len(turns) + 1 - len(IMAGE) * marks, marks
    except (LookupError, TypeError):
        pass
    try:
        messages, _ = _messages(_turns(record))
    except BadSampleError:
        return 0, 0
    texts = [part for message in messages for part in message.parts if isinstance(part, str)]
    return sum(map(len, texts)), sum(len(message.parts) for message in messages) - len(texts)


def _turns(record: Any) -> list[Any]:
    if isinstance(record, dict):
        for key in ("conversations", "messages"):
            if isinstance(turns := record.get(key), list):
                return turns
    raise BadSampleError("not a record", "it has no list of conversations or messages")


def _messages(turns: list[Any]) -> tuple[tuple[Message, ...], list[Any]]:
    """The messages that count, and the images that are named in them."""
    images: list[Any] = []
    messages = [_message(turn, images) for turn in turns]
    first = 1 if messages and messages[0].role == "system" else 0
    if len(messages) > first and messages[first].role == "assistant":
        del messages[first]
    return tuple(messages), images


def _message(turn: Any, images: list[Any]) -> Message:
    if not isinstance(turn, dict):
        raise BadSampleError("not a record", f"a turn is an object, got {_kind(turn)}")
    said_by = _first(turn, "from", "role")
    if not isinstance(said_by, str) or said_by not in _ROLES:
        raise BadSampleError("unknown role", f"roles are {', '.join(_ROLES)}, got {said_by!r}")
    text = _first(turn, "value", "content")
    if not isinstance(text, list):
        return Message(_ROLES[said_by], split_text(text))
    return Message(_ROLES[said_by], tuple(piece for part in text for piece in _part(part, images)))


def _part(part: Any, images: list[Any]) -> tuple[str | Mark, ...]:
    kind = part.get("type") if isinstance(part, dict) else _kind(part)
    if kind == "text":
        return split_text(part.get("text"))
    if kind != "image":
        raise BadSampleError("not a record", f"parts of a message are text or image, got {kind!r}")
    images += [part[key] for key in ("image", "path", "url") if part.get(key) is not None]
    return (Mark.IMAGE,)


def _first(turn: dict[str, Any], *keys: str) -> Any:
    """The value of the first key that has one: rows of a table have all keys of all forms."""
    return next((turn[key] for key in keys if turn.get(key) is not None), None)


def _listed(value: Any) -> list[Any]:
    return [] if value is None else value if isinstance(value, list) else [value]


def _kind(value: Any) -> str:
    return "null" if value is None else type(value).__name__
