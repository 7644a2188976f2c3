"""KL distances between the attention of student and teacher layers, for adaptive matching (paper appendix F), and of heads."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from cdistill.errors import InputError
from cdistill.ops._contract import LEAST_SHARE
from cdistill.vat.heads import assign_heads
from cdistill.vat.matching import LayerMatch
from cdistill.vat.recorders import AnyRegions, SliceRecorder
from cdistill.vat.resample import Resampling


class LayerDistances:
    """(n, m) matrix of KL(teacher || student) between layers, accumulated over a few batches.

    ``student_layers`` (n) and ``teacher_layers`` (m) are increasing 0-based indices. For every batch run both models
    with the recorders that `student` and `teacher` give, then `update`; `matrix` is what `match_layers` takes.
    """

    def __init__(self, student_layers: Sequence[int], teacher_layers: Sequence[int], *, impl: str | None = None):
        self.student_layers, self.teacher_layers = tuple(student_layers), tuple(teacher_layers)
        self._impl = impl
        self._sum = torch.zeros(len(self.student_layers), len(self.teacher_layers), dtype=torch.float64)
        self._rows = torch.zeros_like(self._sum)

    def student(self, regions: AnyRegions, key_mask: Tensor | None) -> SliceRecorder:
        """Recorder for the student's forward pass over one batch."""
        return SliceRecorder(self.student_layers, regions, key_mask=key_mask, impl=self._impl)

    def teacher(self, regions: AnyRegions, key_mask: Tensor | None) -> SliceRecorder:
        """Recorder for the teacher's forward pass over the same batch."""
        return SliceRecorder(self.teacher_layers, regions, key_mask=key_mask, impl=self._impl)

    def update(self, student: SliceRecorder, teacher: SliceRecorder, resampling: Resampling | None = None) -> None:
        """Add one batch, the teacher's slices resampled if need be. One device synchronisation, where sums come to the CPU."""
        theirs = [x if resampling is None else resampling(x) for x in _in_order(teacher.slices)]
        total, rows = torch.stack(_distance_sums(_in_order(student.slices), theirs)).cpu()
        self._sum += total
        self._rows += rows

    def matrix(self) -> Tensor:
        """Mean KL distance per row, (n, m) float64 on the CPU. Raises ValueError where no row has been seen."""
        return _mean(self._sum, self._rows)


def layer_distances(student_slices: Sequence[Tensor], teacher_slices: Sequence[Tensor]) -> Tensor:
    """KL(teacher || student) between every student and teacher layer's slices of one batch (paper appendix F).

    ``student_slices`` (n) and ``teacher_slices`` (m) hold tensors (B,R,V) as `SliceRecorder` records them. Rows are
    renormalised over the visual keys; a row that is all zero on either side (padding) does not count.

    Returns (n, m) float64, the mean over rows. Raises ValueError for an empty list, unequal shapes, or no valid row.
    """
    return _mean(*_distance_sums(student_slices, teacher_slices))


def _in_order(slices: Mapping[int, Tensor]) -> list[Tensor]:
    return [slices[layer] for layer in sorted(slices)]


def _mean(total: Tensor, rows: Tensor) -> Tensor:
    if not bool((rows > 0).all()):
        raise InputError("layer distances need at least one row that sees visual tokens, in every layer")
    return total / rows


def _distance_sums(student_slices: Sequence[Tensor], teacher_slices: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Sum over rows of the KL distance and number of valid rows, (n, m) float64 each."""
    if not student_slices or not teacher_slices:
        raise InputError("layer distances need at least one student and one teacher slice")
    shapes = {tuple(a.shape) for a in (*student_slices, *teacher_slices)}
    if len(shapes) > 1:
        raise InputError(f"student and teacher slices must have one shape, got {sorted(shapes)}")
    shape = (len(student_slices), len(teacher_slices))
    total = torch.zeros(shape, dtype=torch.float64, device=student_slices[0].device)
    rows = torch.zeros_like(total)
    for j, teacher in enumerate(teacher_slices):
        t, t_valid = _distribution(teacher)
        log_t = t.clamp(min=LEAST_SHARE).log()
        for i, student in enumerate(student_slices):
            s, s_valid = _distribution(student)
            valid = t_valid & s_valid
            kl = (t * (log_t - s.clamp(min=LEAST_SHARE).log())).sum(-1)
            total[i, j] = torch.where(valid, kl, 0).sum(dtype=torch.float64)
            rows[i, j] = valid.sum()
    return total, rows


def _distribution(a: Tensor) -> tuple[Tensor, Tensor]:
    mass = a.sum(-1, keepdim=True)
    return a / torch.where(mass > 0, mass, 1), mass.squeeze(-1) > 0


class HeadDistances:
    """KL(teacher || student) between the heads of matched layers, accumulated over a few batches, as `LayerDistances`.

    ``matches`` are those of layers. For every batch run both models with the recorders that `student` and `teacher` give,
    which hold the slices of all heads of these layers, then `update`; `assigned` are the matches with their heads.
    """

    def __init__(self, matches: Sequence[LayerMatch], *, impl: str | None = None):
        self.matches, self._impl = tuple(matches), impl
        self._sums: dict[tuple[int, int], Tensor] = {}  # (2, student's heads, teacher's heads): distances, rows

    def student(self, regions: AnyRegions, key_mask: Tensor | None) -> SliceRecorder:
        """Recorder for the student's forward pass over one batch."""
        return self._recorder({match.student for match in self.matches}, regions, key_mask)

    def teacher(self, regions: AnyRegions, key_mask: Tensor | None) -> SliceRecorder:
        """Recorder for the teacher's forward pass over the same batch."""
        return self._recorder({layer for match in self.matches for layer in match.teachers}, regions, key_mask)

    def _recorder(self, layers: set[int], regions: AnyRegions, key_mask: Tensor | None) -> SliceRecorder:
        return SliceRecorder(layers, regions, key_mask=key_mask, heads="each", impl=self._impl)

    def update(self, student: SliceRecorder, teacher: SliceRecorder, resampling: Resampling | None = None) -> None:
        """Add one batch, the teacher's slices resampled if need be."""
        for match in self.matches:
            for layer in match.teachers:
                theirs = teacher.slices[layer]
                theirs = theirs if resampling is None else resampling(theirs)
                found = _head_sums(student.slices[match.student], theirs).cpu()
                pair = match.student, layer
                self._sums[pair] = found + self._sums.get(pair, 0.0)

    def matrix(self, student: int, teacher: int) -> Tensor:
        """Mean KL distance per row of a pair of layers, (student's heads, teacher's heads) float64 on the CPU.

        Raises ValueError where no row has been seen.
        """
        total, rows = self._sums.get((student, teacher), torch.zeros(2, 1, 1, dtype=torch.float64))
        if not bool((rows > 0).all()):
            raise InputError("distances between heads need at least one row that sees visual tokens, in every layer")
        return total / rows

    def assigned(self) -> tuple[LayerMatch, ...]:
        """The matches with the best assignment of heads for every pair of layers."""
        return tuple(
            match._replace(heads=tuple(assign_heads(self.matrix(match.student, layer)) for layer in match.teachers))
            for match in self.matches
        )


def _head_sums(student: Tensor, teacher: Tensor) -> Tensor:
    """(2,Hs,Ht) float64: sums over rows of KL(teacher || student) of slices (B,H,R,V), and rows that both heads have."""
    total: Any = 0.0
    for ours, theirs in zip(student.double(), teacher.double(), strict=True):
        (s, s_valid), (t, t_valid) = (
            (x / x.sum(-1, keepdim=True).clamp(min=LEAST_SHARE), x.any(-1)) for x in (ours, theirs)
        )
        own = torch.xlogy(t, t).sum(-1)  # (Ht,R)
        log_s = s.clamp(min=LEAST_SHARE).log().masked_fill(~s_valid[..., None], 0.0)
        cross = torch.einsum("srv,trv->st", log_s, t)
        both, rows = (torch.einsum("sr,tr->st", s_valid.double(), x) for x in (own, t_valid.double()))
        total = total + torch.stack([both - cross, rows])
    return total  # type: ignore[no-any-return]
