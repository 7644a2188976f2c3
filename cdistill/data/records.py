"""Records of any usual layout as samples: which keys are read, and as what."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from cdistill.data.fields import Fields, is_blank
from cdistill.data.samples import (
    IMAGE_TOKEN,
    BadSampleError,
    ImageBytes,
    ImageFile,
    Mark,
    Message,
    Sample,
    check_messages,
)
from cdistill.data.scan import parse

TURNS = ("conversations", "messages", "conversation")
QUESTIONS = ("question", "query", "prompt", "instruction", "input")
ANSWERS = ("answer", "response", "output", "completion")
CAPTIONS = ("caption", "text")
SYSTEMS = ("system", "system_prompt")
OTHER_MEDIA = ("video", "videos", "audio", "audios")
KEYS = ("id", *TURNS, *QUESTIONS, *ANSWERS, *CAPTIONS, *SYSTEMS, "history", *OTHER_MEDIA)  # and those of images
IMAGES = re.compile(r"images?|image_?\d+")
NO_LAYOUT = "it has no list of conversations or messages, no question with an answer and no caption"

_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
_IMAGE_PARTS = ("image", "image_url")
_WEIGHTS = ("weight", "loss", "loss_scale", "train")
_LLAVA = {"id", "image", "conversations"}

FindImage = Callable[[Any], ImageFile | ImageBytes]


class Measured(NamedTuple):
    """What is known of a record without its images: characters of text, images, and the keys that are not read."""

    characters: int
    images: int
    unread: Sequence[str]


class _Said(NamedTuple):
    """What a record says: messages, the values that stand for their images, and the keys that are not read."""

    messages: tuple[Message, ...]
    images: list[Any]
    unread: list[str]


def read_record(record: Any, find: FindImage, *, id: str, place: str, beside: list[Any] | None = None) -> Sample:
    """A record as a sample.

    It holds turns (in ``conversations`` or ``messages``: ``{"from", "value"}`` or ``{"role", "content"}``, content a string
    or a list of parts); or a question and an answer under any of their usual names, with alpaca's ``input`` and a
    ``history`` of earlier pairs; or a prompt and a completion of messages (TRL's, only the completion is learned); or
    a caption. ``system`` may stand beside them. A turn of ``weight`` 0 (``loss``, ``train`` false) is not learned.

    ``<image>`` in a text becomes a mark, all other text stays as it is. An answer before the first question is dropped.
    Images are those of ``image``, ``images``, ``image_0``, ``image_1``, ..., or those in the parts. Where nothing marks their
    places they come first, each on its own line; but in ``conversations`` (LLaVA's) every image has a mark.

    Args:
        record: an object of JSON, or a row of a table.
        find: gives the image for the value that stands for it.
        id: the sample's id where the record has no ``id``.
        place: where the record stands.
        beside: what stands for the images where they are kept beside the record; names in it do not count then.

    Raises:
        BadSampleError: it is no such record, or about a video or a sound, which no sample holds.
    """
    if not isinstance(record, Mapping):
        raise BadSampleError("not a record", f"{place}: an object is expected, got {_kind(record)}")
    with naming_place(place):
        said = _read(record, beside)
        check_messages(said.messages, len(said.images))
        images = tuple(find(value) for value in said.images)
    given = record.get("id")
    return Sample(id if given is None else str(given), said.messages, images, place)


@contextmanager
def naming_place(place: str) -> Iterator[None]:
    """Every BadSampleError says where its sample stands."""
    try:
        yield
    except BadSampleError as error:
        raise BadSampleError(error.reason, error.detail, place) from error


def split_text(text: Any) -> tuple[str | Mark, ...]:
    """Text and the marks in it, in order. Raises BadSampleError for what is no text, or no valid UTF-8."""
    if not isinstance(text, str):
        raise BadSampleError("not a record", f"text is expected, got {_kind(text)}")
    if not text.isascii() and any("\ud800" <= c <= "\udfff" for c in text):
        raise BadSampleError("unreadable text", f"not valid UTF-8: {text[:60]!a}")
    parts: list[str | Mark] = []
    for i, piece in enumerate(text.split(IMAGE_TOKEN)):
        parts += ([Mark.IMAGE] if i else []) + ([piece] if piece else [])
    return tuple(parts)


def measure(record: Any, images: int | None = None) -> Measured:
    """What is known of a record before it is read; zeros for one that `read_record` refuses.

    Args:
        images: how many there are, where they are kept beside the record.
    """
    plain = _measure_plain(record) if images is None else None
    if plain is not None:
        return plain
    try:
        if not isinstance(record, Mapping):
            raise BadSampleError("not a record", "no object")
        said = _read(record, None if images is None else [None] * images)
    except BadSampleError:
        return Measured(0, 0, ())
    texts = [part for message in said.messages for part in message.parts if isinstance(part, str)]
    return Measured(sum(map(len, texts)), sum(len(m.parts) for m in said.messages) - len(texts), said.unread)


def _measure_plain(record: Any) -> Measured | None:
    """As `measure`, fast, for what nearly all records of LLaVA's sets are; None for any other."""
    try:
        turns = record["conversations"]
        if _ROLES[turns[0]["from"]] != "user" or any(len(turn) != 2 for turn in turns):
            return None
        text = "\n".join([turn["value"] for turn in turns])
        more = record.keys() - _LLAVA
        if more and (more.intersection(KEYS) or any(map(IMAGES.fullmatch, more))):
            return None
        marks = text.count(IMAGE_TOKEN)
        if not marks and not is_blank(record.get("image")):
            return None
        return Measured(
            len(text) - len(turns) + 1 - len(IMAGE_TOKEN) * marks,
            marks,
            [key for key in more if not is_blank(record[key])],
        )
    except (LookupError, TypeError, AttributeError):
        return None


def _read(record: Mapping[str, Any], beside: list[Any] | None) -> _Said:
    fields, unread = Fields(record), dict[str, None]()
    fields.take("id")
    for name in OTHER_MEDIA:
        if not is_blank(value := fields.take(name)):
            raise BadSampleError("video or audio", f"{name} {value!r}: only images and text are learned from")
    found = [name for name in record if IMAGES.fullmatch(name)]
    named = [value for name in sorted(found, key=_number) for value in _listed(fields.take(name))]
    inside: list[Any] = []
    is_caption, are_marked = False, False
    if fields.has(*TURNS):
        name = next((n for n in TURNS if not is_blank(record.get(n))), TURNS[0])
        messages = _messages(fields, fields.take(*TURNS), name, inside, unread)
        are_marked = name != "messages"
    elif fields.has(*QUESTIONS) and fields.has(*ANSWERS):
        messages = _asked(fields, inside, unread)
    elif fields.has(*CAPTIONS):
        is_caption = True
        messages = [Message("user", ()), Message("assistant", split_text(_text(fields.take(*CAPTIONS))))]
    else:
        raise BadSampleError("not a record", NO_LAYOUT)
    if beside is None and named and inside:
        raise BadSampleError("image count", "images are named both beside the messages and in them")
    images = beside if beside is not None else named or inside
    if is_caption and not images:
        raise BadSampleError("image count", "a caption without an image")
    if images and not are_marked and not any(part is Mark.IMAGE for message in messages for part in message.parts):
        messages = _images_first(messages, len(images), "" if is_caption else "\n")
    return _Said(tuple(messages), images, [*fields.left(), *unread])


def _images_first(messages: list[Message], images: int, after: str) -> list[Message]:
    marks: tuple[str | Mark, ...] = ((Mark.IMAGE, after) if after else (Mark.IMAGE,)) * images
    first = next((i for i, message in enumerate(messages) if message.role == "user"), None)
    if first is None:
        return messages
    asked = messages[first]
    return [*messages[:first], Message("user", (*marks, *asked.parts)), *messages[first + 1 :]]


def _messages(fields: Fields, turns: Any, name: str, inside: list[Any], unread: dict[str, None]) -> list[Message]:
    """The messages that count of turns; the images named in them are added to ``inside``."""
    messages = [_message(turn, name, inside, unread) for turn in _turns(turns)]
    system = _system(fields)
    if system and messages and messages[0].role == "system":
        if system[0].parts != messages[0].parts:
            raise BadSampleError("wrong order of turns", "there is a system message both beside the turns and in them")
        system = []
    messages = system + messages
    first = 1 if messages and messages[0].role == "system" else 0
    if len(messages) > first and messages[first].role == "assistant":
        del messages[first]
        unread[f"{name}: an answer before the first question"] = None
    return messages


def _asked(fields: Fields, inside: list[Any], unread: dict[str, None]) -> list[Message]:
    """The messages of a question and its answer, or of a prompt and its completion, either of which may be messages."""
    system, history = _system(fields), _history(fields.take("history"), inside, unread)
    is_alpaca = fields.has("instruction") and not fields.has(*QUESTIONS[:3])
    asked = fields.take(*QUESTIONS)
    more = fields.take("input") if is_alpaca else None
    answer = fields.take(*ANSWERS)
    if isinstance(asked, (list, tuple)) or isinstance(answer, (list, tuple)):
        before = _listed_turns(asked, "user")
        messages = [_message(turn, "prompt", inside, unread) for turn in before]
        messages = [m if m.role != "assistant" else Message(m.role, m.parts, learned=False) for m in messages]
        messages += [_message(turn, "completion", inside, unread) for turn in _listed_turns(answer, "assistant")]
        return system + history + messages
    asked = [_text(value) for value in (asked, more) if not is_blank(value)] or [""]
    question = asked[0] if len(asked) == 1 else "\n".join(map(str, asked))
    pair = Message("user", split_text(question)), Message("assistant", split_text(_text(answer)))
    return [*system, *history, *pair]


def _history(value: Any, inside: list[Any], unread: dict[str, None]) -> list[Message]:
    """Earlier pairs of question and answer, or turns."""
    value = _parsed(value)
    if is_blank(value):
        return []
    if not isinstance(value, (list, tuple)):
        raise BadSampleError("not a record", f"history is a list of pairs, got {_kind(value)}")
    messages = []
    for pair in value:
        if isinstance(pair, Mapping):
            messages.append(_message(pair, "history", inside, unread))
        elif isinstance(pair, (list, tuple)) and len(pair) == 2:
            messages += [
                Message(role, split_text(_text(said))) for role, said in zip(("user", "assistant"), pair, strict=True)
            ]
        else:
            raise BadSampleError("not a record", f"history is a list of pairs, got {_kind(pair)} in it")
    return messages


def _listed_turns(value: Any, role: str) -> Any:
    return value if isinstance(value, (list, tuple)) else [{"role": role, "content": value}]


def _system(fields: Fields) -> list[Message]:
    system = fields.take(*SYSTEMS)
    return [] if is_blank(system) else [Message("system", split_text(system))]


def _turns(value: Any) -> Sequence[Any]:
    """A list of turns, of which some sets keep the JSON, and an old form of ``datasets`` an object of lists."""
    value = _parsed(value)
    try:
        if isinstance(value, Mapping) and all(isinstance(column, list) for column in value.values()):
            return [dict(zip(value, turn, strict=True)) for turn in zip(*value.values(), strict=True)]
    except ValueError as error:
        raise BadSampleError("not a record", f"the turns cannot be read: {error}") from error
    if not isinstance(value, (list, tuple)):
        raise BadSampleError("not a record", f"turns are a list, got {_kind(value)}")
    return value


def _parsed(value: Any) -> Any:
    """What a column of JSON holds."""
    if not isinstance(value, str) or is_blank(value):
        return value
    try:
        return parse(value.encode("utf-8", "surrogatepass"))
    except ValueError as error:
        raise BadSampleError("not a record", f"the turns cannot be read: {error}") from error


def _message(turn: Any, name: str, images: list[Any], unread: dict[str, None]) -> Message:
    if not isinstance(turn, Mapping):
        raise BadSampleError("not a record", f"a turn is an object, got {_kind(turn)}")
    if len(turn) == 2 and isinstance(turn.get("value"), str) and _ROLES.get(str(turn.get("from"))):  # nearly all: fast
        return Message(_ROLES[str(turn["from"])], split_text(turn["value"]))
    fields = Fields(turn)
    said_by = fields.take("from", "role")
    if not isinstance(said_by, str) or said_by not in _ROLES:
        raise BadSampleError("unknown role", f"roles are {', '.join(_ROLES)}, got {said_by!r}")
    role, text = _ROLES[said_by], fields.take("value", "content")
    parts: list[str | Mark] = []
    for part in text if isinstance(text, (list, tuple)) else ():
        parts += _part(part, f"{name}[].content[]", images, unread)
    learned = role != "assistant" or _is_learned(fields)
    unread |= dict.fromkeys(f"{name}[].{key}" for key in fields.left())
    return Message(role, tuple(parts) if isinstance(text, (list, tuple)) else split_text(text), learned)


def _is_learned(fields: Fields) -> bool:
    weight = fields.take(*_WEIGHTS)
    if weight not in (None, 0, 1):  # False and True, too
        raise BadSampleError("weight of a turn", f"0 or 1 is expected, got {weight!r}")
    return weight is None or bool(weight)


def _part(part: Any, name: str, images: list[Any], unread: dict[str, None]) -> tuple[str | Mark, ...]:
    if not isinstance(part, Mapping):
        raise BadSampleError("not a record", f"parts of a message are text or image, got {_kind(part)!r}")
    fields = Fields(part)
    kind = fields.take("type")
    if kind is None:  # Qwen's: {"image": ...} or {"text": ...}
        kind = next((key for key in (*_IMAGE_PARTS, "text") if fields.has(key)), None)
    said: tuple[str | Mark, ...] = (Mark.IMAGE,)
    if kind == "text":
        said = split_text(fields.take("text"))
    elif kind in _IMAGE_PARTS:
        value = fields.take("image", "image_url", "path", "url")
        if isinstance(value, Mapping) and not is_blank(value.get("url")):
            inner = Fields(value)
            value = inner.take("url")
            unread |= dict.fromkeys(f"{name}.image_url.{key}" for key in inner.left())
        if is_blank(value) and not is_blank(data := fields.take("base64")):
            value = f"data:image/any;base64,{data}"
        images += [] if is_blank(value) else [value]
    else:
        raise BadSampleError("not a record", f"parts of a message are text or image, got {kind!r}")
    unread |= dict.fromkeys(f"{name}.{key}" for key in fields.left())
    return said


def _listed(value: Any) -> list[Any]:
    """The images of a key: none, one or several."""
    return [v for v in (value if isinstance(value, (list, tuple)) else [value]) if not is_blank(v)]


def _number(name: str) -> tuple[int, str]:
    digits = name.lstrip("images_")
    return (int(digits) if digits else -1, name)


def _text(value: Any) -> Any:
    """A number is an answer, too."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _kind(value: Any) -> str:
    return "null" if value is None else type(value).__name__
