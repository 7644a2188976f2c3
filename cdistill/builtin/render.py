"""Scenes as arrays: pixels, the labels of every patch, and the cells that words speak of."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from PIL import Image

from cdistill.builtin.scenes import COLOURS, GRID, IMAGE_SIZE, PATCH, SHAPES, Scene
from cdistill.errors import InputError

PATCH_CLASSES = (1 + len(COLOURS) * len(SHAPES), GRID, GRID)

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


def to_image(pixels: np.ndarray) -> Image.Image:
    """Pixels (3, H, W) in [-1, 1] as an image of 8 bits a channel, rounded: what a processor takes."""
    return Image.fromarray(((pixels.transpose(1, 2, 0) + 1.0) * 127.5).round().clip(0, 255).astype(np.uint8))


def cells(visual_tokens: int) -> np.ndarray:
    """(visual_tokens,) which cell of the scene each patch of a square grid lies in: cells are patches, or 2 x 2 of them, ...

    Raises:
        ValueError: patches that are not whole parts of cells.
    """
    side = math.isqrt(visual_tokens)
    if side * side != visual_tokens or side % GRID or not side:
        sizes = ", ".join(str((GRID * n) ** 2) for n in (1, 2, 3))
        raise InputError(f"the built-in task has labels of patches for {sizes} ... visual tokens, got {visual_tokens}")
    places = np.arange(side) * GRID // side
    return (places[:, None] * GRID + places).ravel()


def patch_labels(scene: Scene) -> np.ndarray:
    """(GRID * GRID, 3) int64 labels of every cell, with `PATCH_CLASSES` classes: what it shows, its row, its column.

    What it shows is 0 for background, else 1 + colour * len(SHAPES) + shape.
    """
    rows, columns = np.mgrid[0:GRID, 0:GRID].reshape(2, -1)
    labels = np.stack([np.zeros_like(rows), rows, columns], axis=1)
    for thing in scene:
        kind = COLOURS.index(thing.colour) * len(SHAPES) + SHAPES.index(thing.shape)
        labels[thing.row * GRID + thing.column, 0] = 1 + kind
    return labels


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
