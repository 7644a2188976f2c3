"""The built-in task's questions, answers and captions in plain English, for models that were made for real text."""

from __future__ import annotations

import re

from cdistill.builtin.scenes import COLOURS, RELATIONS, SHAPES
from cdistill.errors import InputError

_COLOUR, _SHAPE = "|".join(COLOURS), "|".join(SHAPES)
_NAME = rf"(?:(?:{_COLOUR}) )?(?:{_SHAPE})"
_PLACED = re.compile(rf"r(\d) c(\d) ({_NAME})|({_NAME}) r(\d) c(\d)")
_QUESTIONS = (
    (re.compile(r"describe the scene"), "Describe the image."),
    (re.compile(rf"what colour is the ({_SHAPE}) \?"), r"What colour is the \1?"),
    (re.compile(rf"is there a ({_NAME}) \?"), r"Is there a \1?"),
    (re.compile(rf"how many ({_COLOUR}) \?"), r"How many shapes are \1?"),
    (re.compile(r"how many (cross) \?"), r"How many \1es are there?"),
    (re.compile(rf"how many ({_SHAPE}) \?"), r"How many \1s are there?"),
    (re.compile(rf"where is the ({_NAME}) \?"), r"Where is the \1?"),
    (re.compile(rf"is the ({_NAME}) left or right of the ({_NAME}) \?"), r"Is the \1 left or right of the \2?"),
    (re.compile(rf"is the ({_NAME}) above or below the ({_NAME}) \?"), r"Is the \1 above or below the \2?"),
)
_CHOICE = re.compile(r"which caption fits \? A (.*) B (.*)")
_RELATION = re.compile(rf" ({'|'.join(RELATIONS)})")
_PLACE = re.compile(r"r(\d) c(\d)")
CHOICE = "Which caption fits the image?\n(A) {}\n(B) {}"


def caption(text: str) -> str:
    """``red ring left of blue circle`` as ``a red ring left of a blue circle``."""
    return re.sub(_NAME, r"a \g<0>", text)


def question(text: str) -> str:
    """A question of `cdistill.builtin.questions`, or the wish for a caption. Raises ValueError for another text."""
    choice = _CHOICE.fullmatch(text)
    if choice is not None:
        return CHOICE.format(*map(caption, choice.groups()))
    for pattern, words in _QUESTIONS:
        if pattern.fullmatch(text):
            return pattern.sub(words, text)
    raise InputError(f"no question of the built-in task: {text!r:.60}")


def answer(text: str) -> str:
    """An answer to a question, or what `cdistill.builtin.scenes.caption` writes."""
    place = _PLACE.fullmatch(text)
    if place is not None:
        return "Row {}, column {}".format(*place.groups())
    if " " not in text:
        return text[0].upper() + text[1:]
    return " ".join(_sentence(part) for part in re.split(r" [.;] ", text))


def _sentence(text: str) -> str:
    placed = _PLACED.fullmatch(text)
    if placed is None:
        return "A" + _RELATION.sub(r" is \1", caption(text))[1:] + "."
    row, column, name, other, other_row, other_column = placed.groups()
    if name is not None:
        return f"Row {row}, column {column}: a {name}."
    return f"A {other} in row {other_row}, column {other_column}."
