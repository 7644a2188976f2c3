"""Alignment of rows that two tokenizers cut differently: the mean row of a span of the student against that of the teacher."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cdistill.choices import VATConfig
from cdistill.errors import InputError
from cdistill.ops import attention_slice, slice_alignment
from cdistill.vat.matching import LayerMatch
from cdistill.vat.recorders import StudentAlignment, TeacherLayers, TeacherTargets
from cdistill.vat.regions import Regions, require_on_device
from cdistill.vat.resample import Resampling


class SpanRows(NamedTuple):
    """How rows become spans: means of the rows of each, for both models, and which spans both have rows of.

    A span stands where the last of the student's rows of it does.
    """

    student: Tensor  # (B, S, R) fp32
    teacher: Tensor  # (B, S, R') fp32
    valid: Tensor  # (B, S) bool

    def places(self, rows: Tensor) -> Tensor:
        """(B, S) of the student's ``rows`` (B, R), -1 for spans that do not count."""
        last = torch.where(self.student > 0, rows[:, None], -1).amax(2) if rows.shape[1] else self.valid.long()
        return torch.where(self.valid, last, -1)


def span_rows(student: Tensor, teacher: Tensor) -> SpanRows:
    """Of the number of the span that each row belongs to, (B, R) and (B, R') int64, those of a sample distinct, below 1: none.

    A span that only one side has rows of does not count. One device synchronisation.
    """
    first = torch.stack([x.masked_fill(x < 1, torch.iinfo(x.dtype).max).amin(1) for x in (student, teacher)]).amin(0)
    counted = [torch.where(x < 1, 0, x - first[:, None] + 1) for x in (student, teacher)]
    most = int(torch.stack([x.amax() for x in counted]).max())
    numbers = torch.arange(1, most + 1, device=student.device)[None, :, None]
    inside = [(x[:, None] == numbers).float() for x in counted]
    sizes = [x.sum(2, keepdim=True) for x in inside]
    means = [x / n.clamp(min=1) for x, n in zip(inside, sizes, strict=True)]
    return SpanRows(means[0], means[1], ((sizes[0] > 0) & (sizes[1] > 0))[:, :, 0])


def numbers_of_rows(rows: Tensor, spans: Tensor, kind: str) -> Tensor:
    """(B, R) the number of the span that each row belongs to, 0 for none: rows ``predicting`` to that of the token behind.

    ``rows`` are (B, R) positions, -1 = padding, ``spans`` (B, T) the numbers of tokens.
    """
    at = rows.long() + (1 if kind == "predicting" else 0)
    found = spans.gather(1, at.clamp(0, spans.shape[1] - 1))
    return torch.where(rows >= 0, found, 0)


class SpanAlignment(StudentAlignment):
    """As `StudentAlignment`, of rows that are averaged within spans, the teacher's likewise: what is compared is (B, S, V).

    Args:
        matches, regions, key_mask: as for `StudentAlignment`, the student's.
        targets: the teacher's recorder after its pass.
        rows: of student and teacher.
        config: loss, reduction, heads and layer_sum; target must be stored and engine sdpa.
        resampling: makes slices of the student's visual tokens of the teacher's, where these are others.

    Raises:
        ValueError: packed samples, a recorder of layers, or visual tokens that are not as many as the teacher's.
    """

    def __init__(
        self,
        matches: Sequence[LayerMatch],
        regions: Regions,
        targets: TeacherTargets,
        rows: SpanRows,
        config: VATConfig,
        *,
        key_mask: Tensor | None,
        impl: str | None = None,
        resampling: Resampling | None = None,
    ):
        if not isinstance(regions, Regions) or isinstance(targets, TeacherLayers):
            raise InputError("models of different tokenizers are compared in padded batches, with vat.target stored")
        if resampling is None:
            _require_same_columns(targets.regions.cols, regions.cols)
        self._resampling = resampling
        self.layers = frozenset(match.student for match in matches)
        self.key_mask, self.sequence = None if key_mask is None else key_mask.bool(), None
        self._regions, self._rows, self._config, self._impl = regions, rows, config, impl
        self._averaged = {
            match.student: averaged(rows.teacher.to(target.device), target)
            for match, target in zip(matches, targets.targets, strict=True)
        }
        self._layer_sum = config.layer_sum
        self._needs_grad = torch.is_grad_enabled()
        self._losses = {}

    def record(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None, causal: bool
    ) -> Tensor | None:
        """Compute one student layer's alignment loss, (B,)."""
        self._require_gradient(layer)
        config, rows, cols = self._config, self._regions.rows, self._regions.cols
        seen: dict[str, Any] = {"causal": causal, "key_mask": self.key_mask, "impl": self._impl}
        how: dict[str, Any] = {"loss": config.loss, "reduction": config.reduction, "sink_filter": config.sink_filter}
        heads = "mean" if config.heads == "mean" else "each"
        slices = averaged(self._rows.student, attention_slice(q, k, rows, cols, scale=scale, heads=heads, **seen))
        losses = slice_alignment(
            slices, self._target(self._averaged[layer]), self._rows.places(rows), cols, **how, **seen
        )
        self._losses.setdefault(layer, losses)
        return None


def _require_same_columns(theirs: Tensor, ours: Tensor) -> None:
    message = "teacher and student must have equally many visual tokens in every sample"
    if theirs.shape != ours.shape:
        raise InputError(f"{message}; they have {tuple(theirs.shape)} and {tuple(ours.shape)}")
    require_on_device(((theirs >= 0) == (ours >= 0).to(theirs.device)).all(), message)


def averaged(means: Tensor, slices: Tensor) -> Tensor:
    """(B, S, V) or (B, H, S, V) mean rows of slices (B, R, V) or (B, H, R, V), in fp32 also under autocast."""
    with torch.autocast(slices.device.type, enabled=False):
        return (means if slices.ndim == 3 else means[:, None]) @ slices
