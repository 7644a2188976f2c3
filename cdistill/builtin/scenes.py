"""Scenes of coloured shapes on a grid: the seeded world behind the built-in task, as objects and as text."""

from __future__ import annotations

import random
import zlib
from dataclasses import dataclass
from functools import cache

COLOURS = ("red", "green", "blue", "yellow", "purple", "white")
SHAPES = ("circle", "square", "triangle", "cross", "diamond", "ring")
RELATIONS = ("left of", "right of", "above", "below")
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
GRID = 6
PATCH = 8
IMAGE_SIZE = GRID * PATCH
MIN_OBJECTS, MAX_OBJECTS = 3, 5
HELD_OUT_SHARE = 16  # one scene in so many belongs to the held-out split
# Pairs of colour and shape that samples may leave out: every colour and every shape is in one of them, and in five others.
UNSEEN = tuple(f"{colour} {shape}" for colour, shape in zip(COLOURS, SHAPES, strict=True))
_KINDS = range(len(COLOURS) * len(SHAPES))
_SEEN_KINDS = [kind for kind in _KINDS if kind // len(SHAPES) != kind % len(SHAPES)]


@dataclass(frozen=True, order=True)
class Thing:
    """One object of a scene; ordering is raster order, because row and column come first."""

    row: int
    column: int
    colour: str
    shape: str

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"

    @property
    def place(self) -> str:
        return f"r{self.row + 1} c{self.column + 1}"

    def relates(self, relation: str, other: Thing) -> bool:
        """Whether ``self RELATION other`` is true; a shared row or column makes neither direction true."""
        return {
            "left of": self.column < other.column,
            "right of": self.column > other.column,
            "above": self.row < other.row,
            "below": self.row > other.row,
        }[relation]


Scene = tuple[Thing, ...]


def is_held_out(scene: Scene) -> bool:
    """The split a scene belongs to, decided by a stable hash of its content: train and held-out can never share a scene."""
    return zlib.crc32(repr(scene).encode()) % HELD_OUT_SHARE == 0


@cache
def _thing(cell: int, kind: int) -> tuple[Thing, str]:
    """The object of a kind in a cell, both by number, and how it is written in what `is_held_out` hashes."""
    thing = Thing(cell // GRID, cell % GRID, COLOURS[kind // len(SHAPES)], SHAPES[kind % len(SHAPES)])
    return thing, repr(thing)


def sample_scene(rng: random.Random, *, held_out: bool = False, seen: bool = False) -> Scene:
    """3 to 5 objects in distinct cells, no two of the same colour and shape, in raster order, from the asked split.

    With ``seen`` none of the pairs in `UNSEEN` is among them.
    """
    while True:
        count = rng.randint(MIN_OBJECTS, MAX_OBJECTS)
        cells = rng.sample(range(GRID * GRID), count)
        kinds = rng.sample(_SEEN_KINDS if seen else _KINDS, count)
        things = [_thing(*pair) for pair in sorted(zip(cells, kinds, strict=True))]
        # `is_held_out` of most scenes says no: their objects are written once for all scenes
        written = f"({', '.join([text for _, text in things])})"
        if (zlib.crc32(written.encode()) % HELD_OUT_SHARE == 0) == held_out:
            return tuple(thing for thing, _ in things)


def describe(scene: Scene) -> str:
    """The objects written out in raster order with their places: the scene as text, and the body of every caption.

    The place comes first, so that the last word of an object has all of it behind it, as a visual token has.
    """
    return " ; ".join(f"{t.place} {t.name}" for t in scene)


def statement(scene: Scene, rng: random.Random) -> str:
    """A true sentence about how two random objects lie to each other."""
    a, b = rng.sample(scene, 2)
    return f"{a.name} {rng.choice([r for r in RELATIONS if a.relates(r, b)])} {b.name}"


def caption(scene: Scene, rng: random.Random, *, sentences: int) -> str:
    """`describe`, then sentences that come back to its objects: what is where, where is what, how two lie to each other."""
    parts = [describe(scene)]
    for _ in range(sentences):
        kind, thing = rng.randrange(3), rng.choice(scene)
        parts.append((f"{thing.place} {thing.name}", f"{thing.name} {thing.place}", statement(scene, rng))[kind])
    return " . ".join(parts)


def words() -> tuple[str, ...]:
    """Every word that `describe` and `caption` can produce."""
    places = tuple(f"r{i + 1}" for i in range(GRID)) + tuple(f"c{i + 1}" for i in range(GRID))
    return COLOURS + SHAPES + ("left", "right", "of", "above", "below", ";", ".") + places
