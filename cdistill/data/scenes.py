"""Scenes of coloured shapes on a grid: the seeded world behind the built-in task, as objects, as pixels and as text."""

from __future__ import annotations

import random
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

COLOURS = ("red", "green", "blue", "yellow", "purple", "white")
SHAPES = ("circle", "square", "triangle", "cross", "diamond", "ring")
RELATIONS = ("left of", "right of", "above", "below")
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
GRID = 6
PATCH = 8
IMAGE_SIZE = GRID * PATCH
MIN_OBJECTS, MAX_OBJECTS = 3, 5
HELD_OUT_SHARE = 16  # one scene in so many belongs to the held-out split

_RGB = {
    "red": (220, 40, 40),
    "green": (40, 180, 60),
    "blue": (50, 80, 230),
    "yellow": (230, 210, 50),
    "purple": (160, 60, 200),
    "white": (235, 235, 235),
}
_KINDS_OF_WORDS = {
    **dict.fromkeys(COLOURS, "colour"),
    **dict.fromkeys(SHAPES, "shape"),
    **{f"r{i + 1}": "row" for i in range(GRID)},
    **{f"c{i + 1}": "column" for i in range(GRID)},
}


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


def sample_scene(rng: random.Random, *, held_out: bool = False) -> Scene:
    """3 to 5 objects in distinct cells, no two of the same colour and shape, in raster order, from the asked split."""
    while True:
        count = rng.randint(MIN_OBJECTS, MAX_OBJECTS)
        cells = rng.sample(range(GRID * GRID), count)
        kinds = rng.sample(range(len(COLOURS) * len(SHAPES)), count)
        scene = tuple(
            sorted(
                Thing(cell // GRID, cell % GRID, COLOURS[kind // len(SHAPES)], SHAPES[kind % len(SHAPES)])
                for cell, kind in zip(cells, kinds, strict=True)
            )
        )
        if is_held_out(scene) == held_out:
            return scene


@lru_cache
def _mask(shape: str) -> np.ndarray:
    """(PATCH, PATCH) bool silhouette of a shape, drawn inside a one-pixel margin."""
    y, x = np.mgrid[0:PATCH, 0:PATCH] - (PATCH - 1) / 2
    return {
        "circle": x**2 + y**2 <= 10.0,
        "square": np.maximum(abs(x), abs(y)) <= 2.6,
        "triangle": (y <= 2.6) & (abs(x) <= (y + 3.5) / 2 + 0.3),
        "cross": (np.minimum(abs(x), abs(y)) <= 0.6) & (np.maximum(abs(x), abs(y)) <= 3.0),
        "diamond": abs(x) + abs(y) <= 3.1,
        "ring": (x**2 + y**2 >= 4.0) & (x**2 + y**2 <= 13.0),
    }[shape]


def render(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """The scene as pixels: (3, IMAGE_SIZE, IMAGE_SIZE) float32 in [-1, 1], with brightness jitter and sensor noise."""
    image = np.full((IMAGE_SIZE, IMAGE_SIZE, 3), 24.0, dtype=np.float32)
    for thing in scene:
        top, left = thing.row * PATCH, thing.column * PATCH
        patch = image[top : top + PATCH, left : left + PATCH]
        patch[_mask(thing.shape)] = np.asarray(_RGB[thing.colour], dtype=np.float32) * rng.uniform(0.8, 1.0)
    image += 10.0 * rng.standard_normal(image.shape, dtype=np.float32)
    return np.ascontiguousarray((image / 127.5 - 1.0).clip(-1.0, 1.0).transpose(2, 0, 1))


PATCH_CLASSES = (1 + len(COLOURS) * len(SHAPES), GRID, GRID)


def patch_labels(scene: Scene) -> np.ndarray:
    """(GRID * GRID, 3) int64 labels of every patch, with `PATCH_CLASSES` classes: what it shows, its row, its column.

    What it shows is 0 for background, else 1 + colour * len(SHAPES) + shape.
    """
    rows, columns = np.mgrid[0:GRID, 0:GRID].reshape(2, -1)
    labels = np.stack([np.zeros_like(rows), rows, columns], axis=1)
    for thing in scene:
        kind = COLOURS.index(thing.colour) * len(SHAPES) + SHAPES.index(thing.shape)
        labels[thing.row * GRID + thing.column, 0] = 1 + kind
    return labels


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


def grounding(scene: Scene, words: Sequence[str]) -> np.ndarray:
    """Which cells every word speaks of, (len(words), GRID * GRID) float32: equal shares of its row, or all zero.

    A word for a colour, shape, row or column speaks of the objects that fit the phrase it ends, as in ``red``, ``red ring``,
    ``red ring r1 c6``; any other word ends the phrase and speaks of nothing.
    """
    target = np.zeros((len(words), GRID * GRID), dtype=np.float32)
    meant, said = list(scene), set[str]()
    for i, word in enumerate(words):
        kind = _KINDS_OF_WORDS.get(word)
        if kind is None or kind in said:
            meant, said = list(scene), set()
        if kind is not None:
            meant = [t for t in meant if word in (t.colour, t.shape, *t.place.split())]
            said.add(kind)
            for thing in meant:
                target[i, thing.row * GRID + thing.column] = 1.0 / len(meant)
    return target


def words() -> tuple[str, ...]:
    """Every word that `describe` and `caption` can produce."""
    places = tuple(f"r{i + 1}" for i in range(GRID)) + tuple(f"c{i + 1}" for i in range(GRID))
    return COLOURS + SHAPES + ("left", "right", "of", "above", "below", ";", ".") + places
