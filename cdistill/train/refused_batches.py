"""Batches of others' collators that models would read otherwise than they are meant, without a word."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from cdistill.data.conversations import TOKEN_TYPES
from cdistill.data.pairs import RELATION
from cdistill.train.teacher import TEXT_INPUTS
from cdistill.vat.regions import require_on_device

_NUMBERED = (
    "attention_mask must hold 0 and 1 alone: a model reads every other value as 1, numbers of packed samples and additive "
    "masks alike (packed samples need position_ids that start anew, and no attention_mask)"
)
_PACKED = (
    "position_ids start anew within a row that has an attention_mask, by which packed samples would see each other: leave "
    "attention_mask out of packed batches"
)
_UNSEEN = (
    "input_ids hold visual tokens, and the batch holds no images: they would be read as words; let the collator (or "
    "remove_unused_columns) keep pixel_values"
)


def refuse_misread(batch: Mapping[str, Any], own: Collection[str], visual_ids: Collection[int]) -> None:
    """Raise ValueError for a batch that a model reads otherwise than it is meant; on CUDA by device-side assertions.

    ``batch`` is what one model takes, but for keys that are ``own`` of terms or the teacher's source; ``visual_ids`` are the
    model's, none of one without images. A mask may hold 0 and 1 alone, positions of real tokens may not go back beside a mask,
    and visual tokens need images.
    """
    ids, mask, positions = (batch.get(name) for name in ("input_ids", "attention_mask", "position_ids"))
    if mask is not None and mask.ndim == 2:
        if mask.dtype != torch.bool:
            require_on_device(((mask == 0) | (mask == 1)).all(), _NUMBERED)
        if positions is not None:
            first = positions if positions.ndim == 2 else positions[0]  # of the text, or in time
            both = (mask[:, 1:] != 0) & (mask[:, :-1] != 0)
            require_on_device((~both | (first[:, 1:] >= first[:, :-1])).all(), _PACKED)
    others = batch.keys() - {*own, *TEXT_INPUTS, *TOKEN_TYPES}
    if ids is not None and visual_ids and not any(_may_hold_images(name, batch[name]) for name in others):
        for token in visual_ids:  # a tensor of them would be copied to the device, and waited for, at every step
            require_on_device((ids != token).all(), _UNSEEN)


def _may_hold_images(name: str, value: Any) -> bool:
    is_dense = isinstance(value, Tensor) and (value.is_floating_point() or value.ndim > 2)
    return is_dense and not name.startswith(RELATION)
