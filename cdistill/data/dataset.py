"""The samples of a training stage, read from files: each is a function of its number, whoever asks for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

from cdistill.data.conversations import Encoded, Encoder
from cdistill.data.images import open_image
from cdistill.data.mix import HeldOut, Order, kind_of
from cdistill.data.samples import BadSampleError, Sample, Source
from cdistill.errors import InputError

BAD = "bad_samples"  # key of a batch
ATTEMPTS = 100


class BadSample(NamedTuple):
    """A sample that was left out."""

    place: str
    reason: str
    detail: str


def encode(sample: Sample, encoder: Encoder, *, about: int | None = None, exif: bool = True) -> Encoded:
    """What training reads of a sample. Raises BadSampleError for whatever keeps it from being read."""
    images = [open_image(image, about=about, exif=exif) for image in sample.images]
    return encoder(sample.messages, images)


class SampleDataset(Dataset):
    """Encoded samples of a source in an order; one that cannot be used gives way to another, drawn at random by its number.

    Items are samples with what was left out for them.

    Args:
        source: where samples come from.
        order: which of them each number is.
        size: how many numbers there are.
        encoder: makes tokens and pixels of them.
        seed: of the draw of substitutes, which have an image if what they stand in for has one.
        about: the side in pixels that images are resized to, if it is the same for all (`open_image`).
        exif: whether images are turned as their EXIF orientation says.
        kinds: whether items say of which kind they are, by the source of a mix that a sample, or its substitute, is of.

    Raises:
        ValueError: from `__getitem__`, if `ATTEMPTS` samples in a row cannot be used.
    """

    def __init__(
        self,
        source: Source,
        order: Order | HeldOut,
        encoder: Encoder,
        *,
        size: int,
        seed: int,
        about: int | None = None,
        exif: bool = True,
        kinds: bool = False,
    ) -> None:
        self.kinds = kinds
        self.source, self.order, self.encoder, self.size = source, order, encoder, size
        self.seed, self.about, self.exif = seed, about, exif
        sizes = source.sizes()
        self._has_image = None if sizes is None else sizes.images > 0

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, number: int) -> tuple[Encoded, tuple[BadSample, ...]]:
        if not 0 <= number < self.size:
            raise IndexError(number)
        index = self.order[number]
        left_out: list[BadSample] = []
        tried: set[int] = set()
        for attempt in range(ATTEMPTS):
            place = f"{self.source.name}[{index}]"
            try:
                sample = self.source[index]
                place = sample.place
                encoded = encode(sample, self.encoder, about=self.about, exif=self.exif)
                return replace(encoded, kind=kind_of(self.source, index)) if self.kinds else encoded, tuple(left_out)
            except BadSampleError as error:
                left_out.append(BadSample(error.place or place, error.reason, error.detail))
            tried.add(index)
            index = self._substitute(number, index, attempt, tried)
        last = left_out[-1]
        raise InputError(
            f"{self.source.name}: {ATTEMPTS} samples in a row cannot be used, the last is {last.place} ({last.reason}: "
            f"{last.detail}); `cdistill data check` tells what is wrong"
        )

    def _substitute(self, number: int, index: int, attempt: int, tried: set[int]) -> int:
        if self._has_image is None:  # a stream is not gone back in
            return (index + 1) % len(self.source)
        epoch = self.order.epoch_size
        drawn = np.random.default_rng((self.seed, number, attempt)).integers(epoch, size=ATTEMPTS)
        candidates = [self.order[number // epoch * epoch + int(n)] for n in drawn]
        alike = [i for i in candidates if self._has_image[i] == self._has_image[index]]
        fresh = [i for i in candidates if i not in tried]
        small = isinstance(self.order, HeldOut)  # there may be no other of the kind
        return ([i for i in alike if i in fresh] or (fresh if small else alike) or candidates)[0]


class BadSampleCollator:
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
