"""Batches of encoded samples: padded to one length, or packed into rows that hold several."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cdistill.data.conversations import Encoded
from cdistill.data.samples import IGNORE_INDEX
from cdistill.errors import InputError


@dataclass(frozen=True)
class PaddingCollator:
    """Pads samples on the right to the longest: what a model's forward takes.

    Gives ``input_ids``, ``labels``, ``attention_mask`` and the types of tokens, (B, T) int64, and the tensors of all images
    one after the other, padded with zeros to a common shape where they differ in tiles or in size. Samples without images
    add nothing to these; where no sample has any, they are left out.
    """

    pad_token_id: int

    def __call__(self, samples: Sequence[Encoded]) -> dict[str, Tensor]:
        length = max(len(sample.input_ids) for sample in samples)
        batch = _rows([[sample] for sample in samples], length, self.pad_token_id)
        sizes = torch.tensor([[len(sample.input_ids)] for sample in samples])
        return (
            batch
            | {"attention_mask": (torch.arange(length) < sizes).long()}
            | joined_images([sample.images for sample in samples])
        )


@dataclass(frozen=True)
class PackingCollator:
    """Puts samples one after the other into rows of at most ``max_length`` tokens, a new row where the next does not fit.

    Gives what `PaddingCollator` gives with ``position_ids`` (B, T) instead of ``attention_mask``: they start anew with every
    sample, and with what fills up a row. By them transformers keeps samples apart; models with multimodal rotary embeddings
    need those of `cdistill.vat.families.packed_position_ids`.

    Raises:
        ValueError: a sample that is longer than a row.
    """

    pad_token_id: int
    max_length: int

    def __call__(self, samples: Sequence[Encoded]) -> dict[str, Tensor]:
        rows = [
            [samples[i] for i in row]
            for row in next_fit([len(sample.input_ids) for sample in samples], self.max_length)
        ]
        lengths = [sum(len(sample.input_ids) for sample in row) for row in rows]
        batch = _rows(rows, max(lengths), self.pad_token_id)
        positions = []
        for row, length in zip(rows, lengths, strict=True):
            parts = [*(len(sample.input_ids) for sample in row), max(lengths) - length]
            positions.append(torch.cat([torch.arange(part) for part in parts]))
        batch["position_ids"] = torch.stack(positions)
        return batch | joined_images([sample.images for sample in samples])


def next_fit(lengths: Sequence[int], max_length: int) -> list[list[int]]:
    """Indices of the samples of each row, in order.

    Raises:
        ValueError: a length above ``max_length``.
    """
    rows: list[list[int]] = []
    room = 0
    for index, length in enumerate(lengths):
        if length > max_length:
            raise InputError(
                f"max_length of packed rows is {max_length}, a sample has {length} tokens; encode with that max_length"
            )
        if length > room:
            rows.append([])
            room = max_length
        rows[-1].append(index)
        room -= length
    return rows


def _rows(rows: Sequence[Sequence[Encoded]], length: int, pad_token_id: int) -> dict[str, Tensor]:
    """Tokens, labels and types of rows that hold some samples each, (B, T)."""
    names = list(rows[0][0].types)
    return {
        "input_ids": _padded(([sample.input_ids for sample in row] for row in rows), length, pad_token_id),
        "labels": _padded(([sample.labels for sample in row] for row in rows), length, IGNORE_INDEX),
        **{name: _padded(([sample.types[name] for sample in row] for row in rows), length, 0) for name in names},
    }


def _padded(rows: Iterable[Sequence[Tensor]], length: int, fill: int) -> Tensor:
    joined = [torch.cat(list(row)) for row in rows]
    result = torch.full((len(joined), length), fill)
    for target, values in zip(result, joined, strict=True):
        target[: len(values)] = values
    return result


def joined_images(samples: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """What processors made of the images of all samples, in order."""
    names = {name: None for images in samples for name in images}
    return {name: _joined([images[name] for images in samples if name in images]) for name in names}


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """Tensors one after the other, each padded with zeros behind to the largest size of every other dimension."""
    shape = torch.tensor([part.shape[1:] for part in parts]).amax(0).tolist() if parts[0].ndim > 1 else []
    if all(list(part.shape[1:]) == shape for part in parts):
        return torch.cat(list(parts))
    result = parts[0].new_zeros(sum(len(part) for part in parts), *shape)
    start = 0
    for part in parts:
        result[(slice(start, start + len(part)), *(slice(size) for size in part.shape[1:]))] = part
        start += len(part)
    return result
