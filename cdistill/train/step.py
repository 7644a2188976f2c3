"""One batch on its way through student and teacher: what the terms of the loss are given of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cdistill.data.samples import IGNORE_INDEX
from cdistill.models.load import Model
from cdistill.vat import PackedRegions, TeacherLayers, TeacherTargets, packed_regions

ALL_ROWS: Any = {"rows": "all", "visual_token_ids": -1}  # where only the boundaries of samples matter


@dataclass(frozen=True)
class Signal:
    """What a teacher gives for a batch.

    Attributes:
        hidden: (N, d_T) last hidden states at the places whose next token is labelled.
        head: opens the layer that makes logits of them.
        topk: in place of both, its largest log-probabilities (N, K) and their ids.
        vocabulary: tokens that ``topk`` is made of, beyond which the student's head is padding.
        attention: its recorder after its pass, or targets (L, B, [Hq,] R, V); None where there is nothing to align.
    """

    hidden: Tensor | None = None
    head: Callable[[], AbstractContextManager[nn.Linear]] | None = None
    topk: tuple[Tensor, Tensor] | None = None
    vocabulary: int | None = None
    attention: TeacherTargets | TeacherLayers | Tensor | None = None


@dataclass
class Step:
    """What a term is given: the batch, both models' results, and the terms before it.

    Attributes:
        student: the model that is trained.
        labels: (B, T), not shifted, -100 outside the answers; or (I, V, 3), of patches.
        batch: everything else of the batch that there is: ``input_ids`` (B, T), ``attention_mask``, pixels, and
            keys of the terms' own.
        modules: those of the terms, by name.
        attention_term: the term that compares attention, if one does.
        key_mask: (B, T) the padding mask that the models are given, None where they need none.
        counted: (B,) bool, the samples that count; None: all.
        teacher: what the teacher gives, None without one.
        recorder: what has seen the student's attention, made by the same term.
        hidden: (N, d_S) the student's last hidden states at `places`, with gradient.
        losses: sums of the terms so far.
        details: their further results.
    """

    student: Model
    labels: Tensor
    batch: Mapping[str, Tensor]
    modules: Mapping[str, nn.Module]
    attention_term: Any = None
    key_mask: Tensor | None = None
    counted: Tensor | None = None
    teacher: Signal | None = None
    recorder: Any = None
    hidden: Any = None
    losses: dict[str, Tensor] = field(default_factory=dict)
    details: dict[str, Tensor] = field(default_factory=dict)
    shared: dict[str, Any] = field(default_factory=dict)  # what terms make together

    @cached_property
    def places(self) -> Tensor:
        """(N,) int64 places, in the batch's B * T tokens, of those whose next token is labelled."""
        return F.pad(self.labels[:, 1:] != IGNORE_INDEX, (0, 1)).flatten().nonzero().squeeze(1)

    @property
    def targets(self) -> Tensor:
        """(N,) the labels that these places predict."""
        return self.labels.flatten()[self.places + 1]

    @property
    def is_packed(self) -> bool:
        """Whether position ids alone separate the samples of a row."""
        return "attention_mask" not in self.batch and "position_ids" in self.batch

    @cached_property
    def regions(self) -> Any:
        """Rows and columns of the attention that is compared, if any is."""
        return None if self.attention_term is None else self.attention_term.regions(self)

    def zero(self) -> Tensor:
        """A zero in the graph of the first term, for one that has nothing to compare."""
        first = next(iter(self.losses.values()), None)
        return 0.0 * (self.hidden.float().sum() if first is None else first)

    @property
    def samples(self) -> Tensor:
        """How many samples count; of what is packed, those with a label: what fills up a row has none."""
        if self.counted is not None:
            return self.counted.sum()
        if not self.is_packed:
            return torch.full((), len(self.labels), device=self.labels.device)
        regions = self.regions
        if not isinstance(regions, PackedRegions):
            regions = packed_regions(self.batch["input_ids"], self.labels, self.batch["position_ids"], **ALL_ROWS)
        before = F.pad((self.labels != IGNORE_INDEX).cumsum(1), (1, 0))
        row, start, stop = torch.tensor(regions.samples, device=self.labels.device).unbind(1)
        return (before[row, stop] > before[row, start]).sum()
