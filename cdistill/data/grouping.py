"""Orders of a data set in which the samples of a batch are alike: in length, or in length and modality."""

from collections.abc import Sequence

import numpy as np
import torch
from transformers.trainer_pt_utils import get_length_grouped_indices


def length_grouped(lengths: Sequence[int] | np.ndarray, batch_size: int, seed: int) -> list[int]:
    """An order of the samples in which those of a batch have similar lengths, and the batches come in a random order."""
    generator = torch.Generator().manual_seed(seed)
    return _shuffled(_length_batches(lengths, batch_size, generator), generator)


def modality_grouped(
    lengths: Sequence[int] | np.ndarray, images: Sequence[int] | np.ndarray, batch_size: int, seed: int
) -> list[int]:
    """`length_grouped` with batches all of whose samples have images, or none has (LLaVA's order).

    ``lengths`` and ``images`` (how many a sample has) are (N,). What is left of both modalities when their full batches are
    made comes last: at most one batch there holds both.
    """
    generator = torch.Generator().manual_seed(seed)
    with_images = np.asarray(images) > 0
    full: list[list[int]] = []
    rest: list[list[int]] = []
    for indices in (np.flatnonzero(with_images), np.flatnonzero(~with_images)):
        if len(indices):
            for batch in _length_batches(np.asarray(lengths)[indices], batch_size, generator):
                (full if len(batch) == batch_size else rest).append(indices[batch].tolist())
    return _shuffled(full, generator) + [index for batch in rest for index in batch]


def _length_batches(
    lengths: Sequence[int] | np.ndarray, batch_size: int, generator: torch.Generator
) -> list[list[int]]:
    lengths = lengths.tolist() if isinstance(lengths, np.ndarray) else lengths
    order = get_length_grouped_indices(lengths, batch_size, generator=generator)
    return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]


def _shuffled(batches: list[list[int]], generator: torch.Generator) -> list[int]:
    return [index for i in torch.randperm(len(batches), generator=generator).tolist() for index in batches[i]]
