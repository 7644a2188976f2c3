"""Questions about a scene: recognition, direct relations and SugarCrepe's seven kinds of caption choice.

Every compositional question offers two captions of equal length and form, so that nothing but the scene tells them apart.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass

from cdistill.builtin.scenes import COLOURS, GRID, OPPOSITE, RELATIONS, SHAPES, UNSEEN, Scene, Thing
from cdistill.errors import InputError

NUMBERS = ("zero", "one", "two", "three", "four", "five")
TRIES = 200  # for a question about the pairs that are asked for
YES_NO, CAPTIONS = ("yes", "no"), ("A", "B")


@dataclass(frozen=True)
class Question:
    """A question with its one right answer; ``choices`` are the answers a scorer compares."""

    family: str
    subtype: str
    text: str
    answer: str
    choices: tuple[str, ...]


def _absent(scene: Scene, rng: random.Random, *, colour: str | None = None, shape: str | None = None) -> str:
    """Name of a colour-shape pair that the scene does not contain, with the given part fixed."""
    present = {t.name for t in scene}
    pairs = [f"{c} {s}" for c in COLOURS for s in SHAPES if colour in (None, c) and shape in (None, s)]
    return rng.choice([p for p in pairs if p not in present])


def _related(scene: Scene, rng: random.Random) -> tuple[Thing, str, Thing]:
    """Two objects and a relation that holds between them."""
    a, b = rng.sample(scene, 2)
    return a, rng.choice([r for r in RELATIONS if a.relates(r, b)]), b


def _colour(scene: Scene, rng: random.Random) -> Question | None:
    shapes = [t.shape for t in scene]
    unique = [t for t in scene if shapes.count(t.shape) == 1]
    if not unique:
        return None
    thing = rng.choice(unique)
    return Question("recognition", "colour", f"what colour is the {thing.shape} ?", thing.colour, COLOURS)


def _existence(scene: Scene, rng: random.Random) -> Question:
    present = rng.random() < 0.5
    thing = rng.choice(scene)
    if present:
        name = thing.name
    else:
        name = (
            _absent(scene, rng, colour=thing.colour) if rng.random() < 0.5 else _absent(scene, rng, shape=thing.shape)
        )
    return Question("recognition", "existence", f"is there a {name} ?", "yes" if present else "no", YES_NO)


def _count(scene: Scene, rng: random.Random) -> Question:
    kind = rng.choice(COLOURS + SHAPES)
    number = sum(kind in (t.colour, t.shape) for t in scene)
    return Question("recognition", "count", f"how many {kind} ?", NUMBERS[number], NUMBERS)


def _location(scene: Scene, rng: random.Random) -> Question:
    thing = rng.choice(scene)
    places = tuple(f"r{r + 1} c{c + 1}" for r in range(GRID) for c in range(GRID))
    return Question("direct", "location", f"where is the {thing.name} ?", thing.place, places)


def _relation(scene: Scene, rng: random.Random) -> Question:
    a, relation, b = _related(scene, rng)
    choices = ("left", "right") if relation.endswith("of") else ("above", "below")
    of = " of" if relation.endswith("of") else ""
    text = f"is the {a.name} {choices[0]} or {choices[1]}{of} the {b.name} ?"
    return Question("direct", "relation", text, relation.split()[0], choices)


def _replace_obj(scene: Scene, rng: random.Random) -> tuple[str, str]:
    a, relation, b = _related(scene, rng)
    wrong = _absent(scene, rng, colour=a.colour)
    return f"{a.name} {relation} {b.name}", f"{wrong} {relation} {b.name}"


def _replace_att(scene: Scene, rng: random.Random) -> tuple[str, str]:
    a, relation, b = _related(scene, rng)
    wrong = _absent(scene, rng, shape=a.shape)
    return f"{a.name} {relation} {b.name}", f"{wrong} {relation} {b.name}"


def _replace_rel(scene: Scene, rng: random.Random) -> tuple[str, str]:
    a, relation, b = _related(scene, rng)
    return f"{a.name} {relation} {b.name}", f"{a.name} {OPPOSITE[relation]} {b.name}"


def _swap_obj(scene: Scene, rng: random.Random) -> tuple[str, str]:
    a, relation, b = _related(scene, rng)
    return f"{a.name} {relation} {b.name}", f"{b.name} {relation} {a.name}"


def _swap_att(scene: Scene, rng: random.Random) -> tuple[str, str] | None:
    present = {t.name for t in scene}
    pairs = [
        (a, b)
        for a in scene
        for b in scene
        if a.colour != b.colour
        and a.shape != b.shape
        and not {f"{b.colour} {a.shape}", f"{a.colour} {b.shape}"} <= present
    ]
    if not pairs:
        return None
    a, b = rng.choice(pairs)
    return f"{a.name} and {b.name}", f"{b.colour} {a.shape} and {a.colour} {b.shape}"


def _add_obj(scene: Scene, rng: random.Random) -> tuple[str, str]:
    a, b = rng.sample(scene, 2)
    return f"{a.name} and {b.name}", f"{a.name} and {_absent(scene, rng)}"


def _add_att(scene: Scene, rng: random.Random) -> tuple[str, str]:
    a, b = rng.sample(scene, 2)
    right, wrong = [a.name, b.shape], [a.shape, _absent(scene, rng, shape=b.shape)]
    if rng.random() < 0.5:  # else the place of the adjective would give the answer away
        right.reverse()
        wrong.reverse()
    return " and ".join(right), " and ".join(wrong)


_DIRECT: dict[str, Callable[[Scene, random.Random], Question | None]] = {
    "colour": _colour,
    "existence": _existence,
    "count": _count,
    "location": _location,
    "relation": _relation,
}
_CAPTION_PAIRS: dict[str, Callable[[Scene, random.Random], tuple[str, str] | None]] = {
    "replace_obj": _replace_obj,
    "replace_att": _replace_att,
    "replace_rel": _replace_rel,
    "swap_obj": _swap_obj,
    "swap_att": _swap_att,
    "add_obj": _add_obj,
    "add_att": _add_att,
}
RECOGNITION = ("colour", "existence", "count")
DIRECT = tuple(_DIRECT)
COMPOSITIONAL = tuple(_CAPTION_PAIRS)
_SAME_NAMES = ("replace_rel", "swap_obj")  # both captions name the same objects
CHOICES = {"colour": COLOURS, "existence": YES_NO, "count": NUMBERS, **dict.fromkeys(COMPOSITIONAL, CAPTIONS)}
WORDS = (
    *NUMBERS,
    *("what", "colour", "is", "the", "?", "there", "a", "how", "many", "where", "or", "and", "yes", "no"),
    *("which", "caption", "fits", "A", "B", "describe", "scene", "complete"),
)


def caption_pair(scene: Scene, subtype: str, rng: random.Random) -> tuple[str, str] | None:
    """A caption that is true of the scene and one that is not, of a sub-type of `COMPOSITIONAL`; None as in `ask`."""
    return _CAPTION_PAIRS[subtype](scene, rng)


def ask(scene: Scene, subtype: str, rng: random.Random) -> Question | None:
    """A question of the given sub-type about the scene, or None where the scene does not allow one.

    Raises:
        ValueError: ``subtype`` is not one of `DIRECT` or `COMPOSITIONAL`.
    """
    if subtype in _DIRECT:
        return _DIRECT[subtype](scene, rng)
    if subtype not in _CAPTION_PAIRS:
        raise InputError(f"subtype must be one of {', '.join(DIRECT + COMPOSITIONAL)}, got {subtype!r}")
    pair = caption_pair(scene, subtype, rng)
    if pair is None:
        return None
    right, wrong = pair
    first, second, answer = (right, wrong, "A") if rng.random() < 0.5 else (wrong, right, "B")
    return Question("compositional", subtype, f"which caption fits ? A {first} B {second}", answer, CAPTIONS)


def ask_any(scene: Scene, subtypes: tuple[str, ...], rng: random.Random, pairs: str = "all") -> Question | None:
    """A question of a sub-type drawn uniformly from those that the scene allows, or None where it allows none of them.

    ``pairs`` as in `BuiltinTask`: a question that does not fit is drawn anew. Of the pairs that are left out, names are in the
    right answer as often as in a wrong one, so that they give nothing away.
    """
    for subtype in rng.sample(subtypes, len(subtypes)):
        right = pairs != "all" and rng.random() < 0.5  # no number is drawn for samples that never had one
        for _ in range(1 if pairs == "all" else TRIES):
            question = ask(scene, subtype, rng)
            if question is not None and _fits(question, scene, pairs, right):
                return question
    return None


def _fits(question: Question, scene: Scene, pairs: str, right: bool) -> bool:
    """Whether a question is about the pairs that are asked for; ``right``: what is true of these, where there is a choice."""
    if pairs == "all":
        return True
    if question.subtype == "existence" and (question.answer == "yes") != right:
        return False  # or yes, of which fewer are left out, would be right more often
    if pairs == "seen":
        return not _names_unseen(question.text)
    if question.subtype in COMPOSITIONAL:
        captions = dict(zip(CAPTIONS, re.split(" [AB] ", question.text)[1:], strict=True))
        true = _names_unseen(captions.pop(question.answer))
        (wrong,) = captions.values()
        false = _names_unseen(wrong)
        return true and false if question.subtype in _SAME_NAMES else (true, false) == (right, not right)
    if question.subtype == "colour":
        return any(t.name in UNSEEN and f" {t.shape} " in question.text for t in scene)
    return question.subtype == "count" or _names_unseen(question.text)


def _names_unseen(text: str) -> bool:
    return any(name in text for name in UNSEEN)
