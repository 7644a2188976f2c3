"""Spans: stretches of a text where the tokens of two tokenizers begin and end together (SPEC section 6).

Both models read the same words between the tokens of their own chat templates. The words are found in either text by their
characters, their tokens by the offsets of the tokenizer, and spans are the coarsest pieces that both tokenisations can be cut
into: at the characters where both have a border.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from cdistill.data.samples import BadSampleError, Message
from cdistill.data.templates import Rendered, Template

OUTSIDE = -1  # the part of tokens that a template has written
_PRIVATE_USE = range(0xF0000, 0xF0100)


class Said(NamedTuple):
    """A part of a message as a template has written it: its words, without white space around them, and where they begin."""

    words: str
    start: int  # character of the whole text; -1: they are not written
    answer: tuple[int, int] | None  # characters of the assistant's turn they stand in


class Places(NamedTuple):
    """Which part of which message each token says, and which characters of it: arrays (T,) int64.

    What closes an answer stands behind its last character, at ``len(words) + 1``.
    """

    parts: np.ndarray  # `OUTSIDE` for tokens of the template
    starts: np.ndarray
    stops: np.ndarray
    words: tuple[str, ...]  # of every part
    answers: tuple[bool, ...]  # whether the assistant says it

    def taken(self, origins: Sequence[int]) -> Places:
        """Of tokens that are copies of these: an image's are many of its one mark, what is cut off is none."""
        return self._replace(parts=self.parts[origins], starts=self.starts[origins], stops=self.stops[origins])


def said(template: Template, messages: Sequence[Message], plain: Rendered) -> list[Said]:
    """Where a template writes the words of messages: it writes them between marks, too, and the rest stays as it is.

    ``plain`` is what it makes of the messages.

    Raises:
        BadSampleError: an answer that the template changes or leaves out.
    """
    marks = [c for c in map(chr, _PRIVATE_USE) if c not in plain.text][:2]
    written = template([_marked(message, marks[message.role == "assistant"]) for message in messages]).text
    found: list[Said] = []
    between = _between(written, marks) if re.sub(f"[{''.join(marks)}]", "", written) == plain.text else {}
    for message in messages:
        answers, queue = message.role == "assistant", between.get(marks[message.role == "assistant"], [])
        for words in (part.strip() for part in message.parts if isinstance(part, str) and part.strip()):
            start = queue.pop(0)[0] if queue and queue[0][1] == words else -1
            stop = start + len(words)
            turn = next((r for r in plain.answers if answers and start >= 0 and r[0] <= start and stop <= r[1]), None)
            if answers and turn is None:
                raise BadSampleError(
                    "changed answer",
                    f"template {template.name} does not write the answer {words[:40]!r} as it stands: with different "
                    "tokenizers student and teacher must read the same words",
                )
            found.append(Said(words, start, turn))
    return found


def _marked(message: Message, mark: str) -> Message:
    def around(text: str) -> str:
        words = text.strip()
        return text.replace(words, f"{mark}{words}{mark}", 1) if words else text

    parts = tuple(around(part) if isinstance(part, str) else part for part in message.parts)
    return Message(message.role, parts, message.learned)


def _between(text: str, marks: Sequence[str]) -> dict[str, list[tuple[int, str]]]:
    """What stands between two of each mark, and where it begins once all marks are taken out."""
    found: dict[str, list[tuple[int, str]]] = {mark: [] for mark in marks}
    place, opened = 0, ""
    for piece in re.split(f"([{''.join(marks)}])", text):
        if piece in found:
            opened = "" if opened else piece
        else:
            if opened:
                found[opened].append((place, piece))
            place += len(piece)
    return found


def places(found: Sequence[Said], offsets: Sequence[tuple[int, int]], labels: np.ndarray) -> Places:
    """What the tokens of a text say: ``offsets`` are the characters of each, ``labels`` (T,) bool those of answers."""
    count = len(offsets)
    parts, starts, stops = np.full(count, OUTSIDE), np.zeros(count, np.int64), np.zeros(count, np.int64)
    token = 0
    for number, part in enumerate(found):
        if part.start < 0:
            continue
        first, last = part.start, part.start + len(part.words)
        begin, end = part.answer or (first, last)
        while token < count and (offsets[token][1] < begin or (offsets[token][1] == begin and not labels[token])):
            token += 1
        length = len(part.words)
        while token < count and offsets[token][0] < end:
            start, stop = (min(max(at - first, 0), length) for at in offsets[token])
            parts[token] = number
            starts[token], stops[token] = (length + 1,) * 2 if offsets[token][0] >= last else (start, stop)
            token += 1
    return Places(parts, starts, stops, tuple(s.words for s in found), tuple(s.answer is not None for s in found))


class _Border(NamedTuple):
    """Between two tokens: the characters it may be at, more than one where white space is part of neither."""

    least: int
    most: int
    token: int  # the first one behind it


def _borders(at: np.ndarray, of: Places, words: str) -> Iterator[_Border]:
    """Borders behind the tokens ``at`` of one part, in order, those inside of a character left out."""
    reached = 0
    for here, token in enumerate(at.tolist()):
        if of.starts[token] > reached:
            _require_read(words[reached : of.starts[token]], words)
        reached = max(reached, int(of.stops[token]))
        following = int(of.starts[at[here + 1]]) if here + 1 < len(at) else None
        if following is None:
            blank = len(words) - len(words[reached:].lstrip()) if reached < len(words) else len(words) + 1
            yield _Border(reached, max(reached, blank), here + 1)
        elif following >= reached and not int(of.starts[token]) > len(words):  # what closes an answer is one piece
            yield _Border(reached, following, here + 1)


def _require_read(left_out: str, words: str) -> None:
    """What a tokenizer reads nothing of must be white space, or a mark or control character that it drops."""
    lost = [c for c in left_out if not (c.isspace() or unicodedata.category(c) in ("Mn", "Mc", "Me", "Cc", "Cf"))]
    if lost:
        raise BadSampleError("alignment", f"a tokenizer makes no token of {''.join(lost)[:20]!r} in {words[:40]!r}")


def aligned(ours: Places, theirs: Places) -> tuple[np.ndarray, np.ndarray]:
    """The number of the span that each token of two tokenisations of one conversation belongs to, from 1 on; 0 for none.

    Tokens of a span are consecutive, on both sides, and every span has tokens on both. Of words that only one side has (they
    were cut off, or its template leaves them out) the tokens are 0. What closes an answer is a span of its own where both
    sides have it.

    Raises:
        BadSampleError: characters that one of the tokenizers makes no token of, other than white space and marks.
    """
    numbers = np.zeros(len(ours.parts), np.int64), np.zeros(len(theirs.parts), np.int64)
    count = 0
    for part in sorted({*ours.parts.tolist()} & {*theirs.parts.tolist()} - {OUTSIDE}):
        at = [np.flatnonzero(side.parts == part) for side in (ours, theirs)]
        sides = [list(_borders(a, side, ours.words[part])) for a, side in zip(at, (ours, theirs), strict=True)]
        done = [0, 0]
        here = [0, 0]
        while all(i < len(side) for i, side in zip(here, sides, strict=True)):
            one, other = (side[i] for i, side in zip(here, sides, strict=True))
            if one.most < other.least:
                here[0] += 1
            elif other.most < one.least:
                here[1] += 1
            else:
                count += 1
                for side, border in enumerate((one, other)):
                    numbers[side][at[side][done[side] : border.token]] = count
                    done[side], here[side] = border.token, here[side] + 1
    return numbers
