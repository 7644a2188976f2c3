"""KD and VAT of several teachers: sums over teachers of their losses, each sample's by the weights of its kind."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from cdistill.errors import InputError
from cdistill.train.terms.alignment import Alignment
from cdistill.train.terms.base import Settings
from cdistill.train.terms.divergence import Divergence

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor, nn

    from cdistill.choices import KDConfig
    from cdistill.models.load import Model
    from cdistill.train.step import Step
    from cdistill.vat import VAT, Recorder, Regions, StudentAlignment


class WeightedDivergence(Divergence):
    """The divergence from several teachers; ``kd_teachers`` (teachers,) are their parts of the sum."""

    details = ("kd_teachers",)

    def __init__(self, kd: KDConfig, teachers: Sequence[str]) -> None:
        super().__init__(kd)
        self.teachers = tuple(teachers)

    @classmethod
    def configured(cls, settings: Settings) -> WeightedDivergence:
        """By ``kd`` and ``teachers``."""
        return cls(settings.kd, settings.teachers)

    def modules(self, student: Model, teacher: Model | None) -> dict[str, nn.Module]:
        """What reads the student's head and those of all teachers, without parameters of its own."""
        from cdistill.train.vocabulary import MODULE, WeightedLosses, after_head

        return {MODULE: WeightedLosses(self.kd, after_head(student))}

    def forward(self, step: Step) -> Tensor:
        """Sum over labels and teachers, in nats."""
        total = super().forward(step)
        step.details[self.of_teachers] = step.shared[self.of_teachers]
        return total


class WeightedAlignment(Alignment):
    """The alignment with several teachers; ``vat_teachers`` (teachers,) are their parts of the sum.

    Args:
        vats: of the student and each of the teachers, by one configuration: the same student layers, windows of their own.
        teachers: their names.
        weight: in the loss.

    Raises:
        ValueError: what goes with a single teacher alone.
    """

    details: ClassVar[tuple[str, ...]] = ("vat_layers", "vat_teachers")

    def __init__(self, vats: Sequence[VAT], teachers: Sequence[str], weight: float = 1.0) -> None:
        super().__init__(vats[0], weight)
        self.vats, self.teachers = tuple(vats), tuple(teachers)
        config = self.vat.config
        if config.learns_mixture or config.engine != "sdpa":
            raise InputError("several teachers need vat.engine sdpa, and no vat.head_matching mixture")

    @classmethod
    def configured(cls, settings: Settings) -> WeightedAlignment | None:
        """By ``vats`` and ``teachers``, None without the first."""
        return cls(settings.vats, settings.teachers, settings.vat_weight) if settings.vats else None

    def teacher_recorder(self, step: Step) -> Any:
        """A list of them, None where there is nothing to align."""
        if not (step.regions.cols.shape[1] and step.regions.rows.shape[1]):
            return None
        return [vat.teacher(self._of_teacher(step, i), step.key_mask) for i, vat in enumerate(self.vats)]

    def recorder(self, step: Step) -> Any:
        """Compares with what each teacher gave, if it gave anything."""
        parts: Any = () if step.teacher is None else step.teacher.parts
        found = {
            i: self.vats[i].student(self._of_teacher(step, i), part.attention, step.key_mask)
            for i, part in enumerate(parts)
            if part is not None and part.attention is not None
        }
        return _Together(found) if found else None

    def _of_teacher(self, step: Step, i: int) -> Regions:
        """Rows of the samples that learn of a teacher; the same object in one step."""
        key = f"{self.of_teachers}/{i}"
        if key not in step.shared:
            idle = step.teacher_weights[:, i] == 0
            step.shared[key] = step.regions._replace(rows=step.regions.rows.masked_fill(idle[:, None], -1))
        return step.shared[key]

    def forward(self, step: Step) -> Tensor:
        """Sum over samples and teachers; ``vat_layers`` (L,) are those of every matched student layer."""
        import torch

        matches, config = self.vat.matches, self.vat.config
        of_teachers = torch.zeros(len(self.vats), device=step.labels.device)
        step.details["vat_layers"] = torch.zeros(len(matches), device=step.labels.device)
        step.details[self.of_teachers] = of_teachers
        if step.recorder is None:
            return step.zero()
        per_layer: Any = 0.0
        for i, recorder in step.recorder.recorders.items():
            each = torch.stack(list(recorder.losses().values())) * step.teacher_weights[:, i]
            of_layers = each.sum(1)
            of_teachers[i] = of_layers.detach().sum() if config.layer_sum else of_layers.detach().mean()
            per_layer = of_layers + per_layer
        step.details["vat_layers"] = per_layer.detach()
        return per_layer.sum() if config.layer_sum else per_layer.mean()


class _Together:
    """The student's recorders for several teachers as one."""

    def __init__(self, recorders: dict[int, StudentAlignment]) -> None:
        self.recorders = recorders
        some: Recorder = next(iter(recorders.values()))
        self.layers, self.key_mask, self.sequence = some.layers, some.key_mask, None

    def record(self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None, causal: bool) -> None:
        """Let each of them see a layer."""
        for recorder in self.recorders.values():
            recorder.record(layer, q, k, v, scale=scale, causal=causal)
