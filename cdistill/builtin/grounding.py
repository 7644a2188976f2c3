"""What the tokens of a sample speak of, whatever tokenizer reads it: each has the row of the word that it lies in."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cdistill.builtin import render, scenes
from cdistill.data.conversations import Encoded
from cdistill.data.samples import BadSampleError
from cdistill.data.spans import OUTSIDE

BREAK = " ; "  # between the parts of a conversation: a word that speaks of nothing, so that no phrase goes on behind it


@dataclass(frozen=True)
class Grounded(Encoded):
    """An encoded sample with what only the built-in task has of it, ``grounding`` (T, V) fp32 and ``places`` (V,) int64."""

    given: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class GroundedCollator:
    """Adds ``grounding`` and ``places`` of `Grounded` samples to the batches that ``collate`` makes of them, as `padded`."""

    collate: Callable[[Sequence[Encoded]], dict[str, Tensor]]

    def __call__(self, samples: Sequence[Grounded]) -> dict[str, Tensor]:
        batch = self.collate(samples)
        return batch | padded([sample.given for sample in samples], batch["input_ids"].shape[1])


def padded(items: Sequence[Mapping[str, Tensor]], length: int) -> dict[str, Tensor]:
    """``grounding`` (B, length, V), padded with zeros, and ``places`` (B, V), padded with -1, of items that have both."""
    width = max(len(item["places"]) for item in items)
    grounding, positions = torch.zeros((len(items), length, width)), torch.full((len(items), width), -1)
    for i, item in enumerate(items):
        tokens, places = item["grounding"].shape
        grounding[i, :tokens, :places] = item["grounding"]
        positions[i, :places] = item["places"]
    return {"grounding": grounding, "places": positions}


def grounded(
    encoded: Encoded, scene: scenes.Scene, *, written: bool, visual_tokens: int
) -> tuple[np.ndarray, list[int]]:
    """Which cells every token of an encoded sample speaks of, and where the scene stands in it.

    A token has the row of `cdistill.builtin.render.grounding` of the word that it lies in, by its characters; one of several
    words that of the last which speaks of something. Tokens of the template, of an image, of a scene that is written out, and
    those between words speak of nothing.

    Args:
        encoded: by an encoder that finds ``places``.
        scene: of the sample.
        written: whether it is written out, in the first part of the conversation, or an image.
        visual_tokens: of an image.

    Returns:
        (T, GRID * GRID) float32, and positions of the image's tokens, or of the last token of each object as it is written.

    Raises:
        BadSampleError: a word that the template changes or the tokenizer reads nothing of, objects that one token ends, or
            an image of another number of tokens.
    """
    said: Any = encoded.places
    words = _Words(BREAK.join(said.words))
    begins = np.cumsum([0, *(len(part) + len(BREAK) for part in said.words)])[said.parts]  # of OUTSIDE: not looked at
    first, last = words.of(begins + said.starts, begins + said.stops)
    last = np.where(said.parts == OUTSIDE, first - 1, last)  # none
    rows = render.grounding(scene, words.said)
    speaks = np.any(rows, axis=1)
    if written:
        count = len(said.words[0].split())
        ends = [index for index in range(count) if index + 1 == count or words.said[index + 1] == BREAK.strip()]
        places = [_last_of(index, first, last) for index in ends]
        if -1 in places or len({*places}) < len(scene):
            raise BadSampleError("places", f"not every object of {said.words[0]!r} has a last token of its own")
        speaks[:count] = False
    else:
        places = [i for begin, stop in encoded.spans for i in range(begin, stop)]
        if len(places) != visual_tokens:
            raise BadSampleError(
                "places", f"an image has {len(places)} tokens, and places are known of {visual_tokens}"
            )
    inside = np.flatnonzero(last >= first)
    _require_read(words, speaks, first[inside], last[inside])
    speaking = np.maximum.accumulate(np.where(speaks, np.arange(len(speaks)), -1))[
        last
    ]  # at or before a token's last word
    meant = inside[speaking[inside] >= first[inside]]
    result = np.zeros((len(said.parts), rows.shape[1]), rows.dtype)
    result[meant] = rows[speaking[meant]]
    return result, places


def _require_read(words: _Words, speaks: np.ndarray, first: np.ndarray, last: np.ndarray) -> None:
    """Raise BadSampleError for a word that speaks of something and that no token lies in."""
    steps = np.zeros(len(speaks) + 1, int)
    np.add.at(steps, first, 1)
    np.add.at(steps, last + 1, -1)
    missing = np.flatnonzero(speaks & (steps.cumsum()[:-1] == 0))
    if len(missing):
        word = words.said[int(missing[0])]
        raise BadSampleError(
            "places",
            f"no token lies in the word {word!r}: the chat template changes it, or the tokenizer leaves it out",
        )


class _Words:
    """The words of a text, and which of them tokens lie in."""

    def __init__(self, text: str) -> None:
        found = list(re.finditer(r"\S+", text))
        self.said = [match[0] for match in found]
        self._starts, self._stops = np.array([match.span() for match in found]).T

    def of(self, starts: np.ndarray, stops: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The first and the last word that each token has characters of; of none the last is below the first."""
        return np.searchsorted(self._stops, starts, "right"), np.searchsorted(self._starts, stops, "left") - 1


def _last_of(word: int, first: np.ndarray, last: np.ndarray) -> int:
    """The last token that has characters of a word, -1 of none."""
    found = np.flatnonzero((first <= word) & (word <= last))
    return int(found[-1]) if len(found) else -1
