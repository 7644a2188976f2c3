"""One batch on its way through student and teacher: what the terms of the loss are given of it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cdistill.data.pairs import RELATION
from cdistill.data.samples import IGNORE_INDEX
from cdistill.data.span_pairs import numbers_of
from cdistill.errors import InputError
from cdistill.models.load import Model
from cdistill.models.logits import AfterHead
from cdistill.train.kinds import WEIGHTS
from cdistill.vat import (
    PackedRegions,
    PackedSample,
    SequenceShards,
    SliceRecorder,
    TeacherLayers,
    TeacherRelations,
    TeacherTargets,
    packed_regions,
    token_regions,
)
from cdistill.vat.regions import require_on_device

ALL_ROWS: Any = {"rows": "all", "visual_token_ids": -1}  # where only the boundaries of samples matter


class VisualPlaces(NamedTuple):
    """Where the visual tokens of a batch are."""

    places: Tensor  # (M,) int64 places in the batch's B * T tokens, sample by sample
    counts: tuple[int, ...]  # how many each sample has, 0 for one that does not count

    @property
    def shares(self) -> Tensor:
        """(M,) fp32: one over the number of its sample's visual tokens, so that a sum is one of means over samples."""
        counts = torch.tensor(self.counts, dtype=torch.int64, device=self.places.device)
        return (1.0 / counts).repeat_interleave(counts, output_size=len(self.places))


@dataclass(frozen=True)
class Signal:
    """What a teacher gives for a batch.

    Attributes:
        hidden: (N, d_T) last hidden states at the places whose next token is labelled.
        visual: (M, d_T) those at visual tokens, None where no term needs them.
        head: opens the layer that makes logits of them.
        topk: in place of both, its largest log-probabilities (N, K) and their ids.
        vocabulary: tokens that ``topk`` is made of, beyond which the student's head is padding.
        attention: its recorder after its pass, or targets (L, B, [Hq,] R, V); None where there is nothing to align.
        parts: in place of all, those of several teachers in order, None for one that no sample of the batch learns of.
        after_head: of one of several, what it does to its logits.
    """

    hidden: Tensor | None = None
    visual: Tensor | None = None
    head: Callable[[], AbstractContextManager[nn.Linear]] | None = None
    topk: tuple[Tensor, Tensor] | None = None
    vocabulary: int | None = None
    attention: TeacherTargets | TeacherLayers | TeacherRelations | SliceRecorder | Tensor | None = None
    parts: tuple[Signal | None, ...] = ()
    after_head: AfterHead | None = None


@dataclass
class Step:
    """What a term is given: the batch, both models' results, and the terms before it.

    Attributes:
        student: the model that is trained.
        labels: (B, T), not shifted, -100 outside the answers; or (I, V, 3), of patches.
        batch: everything else of the batch that there is: ``input_ids`` (B, T), ``attention_mask``, pixels, and
            keys of the terms' own.
        modules: those of the terms, by name.
        visual_ids: ids of visual tokens, empty where no term must know them.
        needs_visual: whether a term compares hidden states at visual tokens.
        attention_term: the term that compares attention, if one does.
        key_mask: (B, T) the padding mask that the models are given, None where they need none.
        counted: (B,) bool, the samples that count; None: all.
        sampled: (B, T) bool, the tokens that the student has generated; None: none.
        shards: the processes that have a part of every sequence; what follows is then of this one's tokens.
        own: keys of the batch that are of terms or the source, and no input of a model.
        theirs: the same samples as the teacher reads them, where it has an encoding of its own; see `teacher_view`.
        teacher: what the teacher gives, None without one.
        recorder: what has seen the student's attention, made by the same term.
        hidden: (N, d_S) the student's last hidden states at `places`, with gradient.
        visual: (M, d_S) those at `visual_places`, None where no term needs them.
        losses: sums of the terms so far.
        details: their further results.
    """

    student: Model
    labels: Tensor
    batch: Mapping[str, Tensor]
    modules: Mapping[str, nn.Module]
    visual_ids: tuple[int, ...] = ()
    needs_visual: bool = False
    attention_term: Any = None
    key_mask: Tensor | None = None
    counted: Tensor | None = None
    sampled: Tensor | None = None
    shards: SequenceShards | None = None
    own: Collection[str] = ()
    theirs: Step | None = None
    teacher: Signal | None = None
    recorder: Any = None
    hidden: Any = None
    visual: Any = None
    losses: dict[str, Tensor] = field(default_factory=dict)
    details: dict[str, Tensor] = field(default_factory=dict)
    shared: dict[str, Any] = field(default_factory=dict)  # what terms make together

    @property
    def teacher_view(self) -> Step:
        """The batch as the teacher reads it: its ``labels``, ``batch``, `places`, `visual_places`, `regions` and ``key_mask``.

        This step itself, unless teacher and student encode samples differently (`cdistill.data.pairs`).
        """
        return self if self.theirs is None else self.theirs

    @property
    def inputs(self) -> dict[str, Any]:
        """What a model takes of the batch: all but `own` and what relates two encodings, and a padding mask if it needs one."""
        own = {*self.own, "attention_mask"}
        inputs: dict[str, Any] = {
            name: value for name, value in self.batch.items() if name not in own and not name.startswith(RELATION)
        }
        return inputs if self.key_mask is None else inputs | {"attention_mask": self.key_mask}

    @cached_property
    def spans(self) -> tuple[Tensor, Tensor] | None:
        """(B, T) and (B, T') the span that each token of student and teacher belongs to, from 1 on, 0 for none; None where both
        have one tokenizer."""
        return numbers_of(self.batch)

    def require_same_labels(self) -> None:
        """Raise ValueError unless the teacher's labels are the student's, one by one; on CUDA a device-side assertion."""
        theirs, message = self.teacher_view, "teacher_labels must be the same tokens as labels, in every sample"
        if len(theirs.places) != len(self.places) or len(theirs.labels) != len(self.labels):
            raise InputError(f"{message}: there are {len(theirs.places)} of them, and {len(self.places)} labels")
        counts = [(step.labels[:, 1:] != IGNORE_INDEX).sum(1) for step in (self, theirs)]
        require_on_device((counts[0] == counts[1]).all() & (self.targets == theirs.targets).all(), message)

    @cached_property
    def _labelled(self) -> tuple[Tensor, Tensor]:
        """Places whose next token is labelled, in the batch and among the tokens that are here."""
        places = F.pad(self.labels[:, 1:] != IGNORE_INDEX, (0, 1)).flatten().nonzero().squeeze(1)
        return (places, places) if self.shards is None else self.shards.places(places, self.labels.shape[1])

    @property
    def places(self) -> Tensor:
        """(N,) int64 places, in the batch's B * T tokens, or those that are here, of those whose next token is labelled."""
        return self._labelled[1]

    @property
    def targets(self) -> Tensor:
        """(N,) the labels that these places predict."""
        return self.labels.flatten()[self._labelled[0] + 1]

    @cached_property
    def reference(self) -> Tensor | None:
        """(N,) bool: which labels are of given answers, and not of the student's own replies; None: all."""
        if self.sampled is None:
            return None
        if self.sampled.shape != self.labels.shape:
            given, wanted = tuple(self.sampled.shape), tuple(self.labels.shape)
            raise InputError(f"sampled must say of each token, {wanted}, whether it is of a reply, got {given}")
        return ~self.sampled.flatten()[self._labelled[0] + 1]

    @cached_property
    def visual_places(self) -> VisualPlaces:
        """Those of the samples that count; two device synchronisations, or three if packed."""
        ids, rows = self.batch["input_ids"], {"rows": "visual", "visual_token_ids": self.visual_ids}
        if self.is_packed:
            packed: Any = packed_regions(ids, self.labels, self.batch["position_ids"], **rows)  # type: ignore[arg-type]
            cols, starts = packed.cols, [sample.row * ids.shape[1] + sample.start for sample in packed.samples]
            first = torch.tensor(starts, device=ids.device)
        else:
            cols = token_regions(ids, None, self.batch.get("attention_mask"), **rows).cols  # type: ignore[arg-type]
            first = torch.arange(len(ids), device=ids.device) * ids.shape[1]
        real = cols >= 0 if self.counted is None else (cols >= 0) & self.counted[:, None]
        return VisualPlaces((cols + first[:, None])[real], tuple(real.sum(1).tolist()))

    @property
    def is_packed(self) -> bool:
        """Whether position ids alone separate the samples of a row."""
        return "attention_mask" not in self.batch and "position_ids" in self.batch

    @cached_property
    def regions(self) -> Any:
        """Rows and columns of the attention that is compared, if any is."""
        return None if self.attention_term is None else self.attention_term.regions(self)

    @cached_property
    def teacher_weights(self) -> Tensor:
        """(B, teachers) fp32: how much each sample learns of each of several. Raises ValueError for a batch without."""
        weights = self.batch.get(WEIGHTS)
        if weights is None or weights.ndim != 2 or len(weights) != len(self.labels) or self.is_packed:
            raise InputError(
                f"{WEIGHTS} (samples, teachers) must be in a padded batch, as cdistill.train.kinds makes it"
            )
        require_on_device((weights.isfinite() & (weights >= 0)).all(), f"{WEIGHTS} must be at least 0 and finite")
        return weights.float()

    @property
    def label_weights(self) -> Tensor:
        """(N, teachers) `teacher_weights` of the samples that labels are of."""
        return self.teacher_weights[self._labelled[0] // self.labels.shape[1]]

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
        return self.have_labels(regions.samples).sum()

    def have_labels(self, samples: Sequence[PackedSample]) -> Tensor:
        """(N,) bool: which of the packed samples have a label."""
        before = F.pad((self.labels != IGNORE_INDEX).cumsum(1), (1, 0))
        row, start, stop = torch.tensor(samples, device=self.labels.device).unbind(1)
        return before[row, stop] > before[row, start]
