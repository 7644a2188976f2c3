"""KL distances between the attention of student and teacher layers, for adaptive matching (paper appendix F)."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from cdistill.errors import InputError
from cdistill.ops._contract import LEAST_SHARE
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
