"""The samples of a training stage, read from files: each is a function of its number, whoever asks for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

from cdistill.data.conversations import Encoded, Encoder
from cdistill.data.images import open_image
from cdistill.data.mix import Order
from cdistill.data.samples import BadSampleError, Source

BAD = "bad_samples"  # key of a batch
ATTEMPTS = 100


class BadSample(NamedTuple):
    """A sample that was left out."""

    place: str
    id: str
    reason: str
    detail: str


class SampleDataset(Dataset):
    """Encoded samples of a source in an order; one that cannot be used gives way to another, drawn at random by its number.

    Items are samples with what was left out for them.

    Args:
        source: where samples come from.
        order: which of them each number is.
        encoder: makes tokens and pixels of them.
        seed: of the draw of substitutes, which have an image if what they stand in for has one.
        about: the side in pixels that images are resized to, if it is the same for all (`open_image`).

    Raises:
        ValueError: from `__getitem__`, if `ATTEMPTS` samples in a row cannot be used.
    """

    def __init__(self, source: Source, order: Order, encoder: Encoder, *, seed: int, about: int | None = None) -> None:
        self.source, self.order, self.encoder, self.seed, self.about = source, order, encoder, seed, about
        sizes = source.sizes()
        self._has_image = None if sizes is None else sizes.images > 0

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, number: int) -> tuple[Encoded, tuple[BadSample, ...]]:
        index, left_out = self.order[number], []
        generator = np.random.default_rng((self.seed, number))
        for _ in range(ATTEMPTS):
            try:
                return self._encode(index), tuple(left_out)
            except BadSampleError as error:
                left_out.append(BadSample(self.source.place(index), "", error.reason, error.detail))
            index = self._substitute(index, number, generator)
        last = left_out[-1]
        raise ValueError(f"{self.source.name}: {ATTEMPTS} samples in a row cannot be used, the last for {last.reason} ({last.detail})")

    def _encode(self, index: int) -> Encoded:
        sample = self.source[index]
        return self.encoder(sample.messages, [open_image(image, about=self.about) for image in sample.images])

    def _substitute(self, index: int, generator: np.random.Generator) -> int:
        if self._has_image is None:  # a stream is not gone back in
            return (index + 1) % len(self.source)
        drawn = [self.order[int(n)] for n in generator.integers(len(self.order), size=ATTEMPTS)]
        return next((i for i in drawn if self._has_image[i] == self._has_image[index]), drawn[0])


class TellingCollator:
    """Puts what was left out for the samples of a batch into it, under `BAD`, if anything was.

    Args:
        collate: makes a batch of `Encoded` samples.
    """

    def __init__(self, collate: Callable[[Sequence[Encoded]], dict[str, Tensor]]) -> None:
        self.collate = collate

    def __call__(self, items: Sequence[tuple[Encoded, tuple[BadSample, ...]]]) -> dict[str, Any]:
        batch: dict[str, Any] = self.collate([encoded for encoded, _ in items])
        left_out = [bad for _, bads in items for bad in bads]
        return batch | {BAD: left_out} if left_out else batch
