"""Visual attention alignment of two models as `VATConfig` says, and the recorders it makes for every batch."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from cdistill.choices import VATConfig
from cdistill.errors import InputError
from cdistill.vat.distances import LayerDistances
from cdistill.vat.matching import Layers, layer_range, match_layers
from cdistill.vat.recorders import AnyRegions, StudentAlignment, TeacherLayers, TeacherTargets
from cdistill.vat.regions import PackedRegions, Regions, packed_regions, token_regions
from cdistill.vat.resample import Resampling
from cdistill.vat.spans import SpanAlignment, numbers_of_rows, span_rows


class VAT:
    """Visual attention alignment between a student and a teacher of given depths.

    ``student_num_layers`` and ``teacher_num_layers`` are numbers of layers or, for models with layers that have no softmax
    attention, what `attention_layers` gives for them. ``distances`` is the matrix adaptive matching needs: build it with
    `VAT.measure` first. ``impl`` as in `cdistill.ops`. Per batch:

        teacher = vat.teacher(teacher_regions, teacher_key_mask)
        with torch.no_grad():
            teacher_model(**teacher_batch, cdistill_vat=teacher)
        student = vat.student(student_regions, teacher, student_key_mask)
        student_model(**student_batch, cdistill_vat=student)
        student.loss().backward()

    Raises ValueError where the spans cannot be matched, as when the teacher is shallower than the student.
    """

    def __init__(
        self,
        config: VATConfig,
        student_num_layers: Layers,
        teacher_num_layers: Layers,
        *,
        distances: Any = None,
        impl: str | None = None,
    ):
        self.config, self._impl = config, impl
        student_layers, teacher_layers = self.spans(config, student_num_layers, teacher_num_layers)
        self.matches = match_layers(student_layers, teacher_layers, matching=config.matching, distances=distances)

    @staticmethod
    def spans(
        config: VATConfig, student_num_layers: Layers, teacher_num_layers: Layers
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Indices of the aligned layers of student and teacher."""
        student = config.layers if config.student_layers is None else config.student_layers
        teacher = config.layers if config.teacher_layers is None else config.teacher_layers
        return (
            layer_range(student_num_layers, student, role="student"),
            layer_range(teacher_num_layers, teacher, role="teacher"),
        )

    @classmethod
    def measure(
        cls, config: VATConfig, student_num_layers: Layers, teacher_num_layers: Layers, *, impl: str | None = None
    ) -> LayerDistances:
        """An empty accumulator of the distances between the layers in question, for adaptive matching."""
        return LayerDistances(*cls.spans(config, student_num_layers, teacher_num_layers), impl=impl)

    def regions(
        self,
        input_ids: Tensor | None,
        labels: Tensor | None,
        attention_mask: Tensor | None,
        *,
        visual_token_ids: int | Sequence[int] | None = None,
        mm_token_type_ids: Tensor | None = None,
    ) -> Regions:
        """`token_regions` with the configured rows."""
        return token_regions(
            input_ids,
            labels,
            attention_mask,
            visual_token_ids=visual_token_ids,
            rows=self.config.rows,
            mm_token_type_ids=mm_token_type_ids,
        )

    def packed_regions(
        self,
        input_ids: Tensor | None,
        labels: Tensor | None,
        position_ids: Tensor,
        *,
        attention_mask: Tensor | None = None,
        visual_token_ids: int | Sequence[int] | None = None,
        mm_token_type_ids: Tensor | None = None,
    ) -> PackedRegions:
        """`cdistill.vat.packed_regions` with the configured rows."""
        return packed_regions(
            input_ids,
            labels,
            position_ids,
            attention_mask=attention_mask,
            visual_token_ids=visual_token_ids,
            rows=self.config.rows,
            mm_token_type_ids=mm_token_type_ids,
        )

    def teacher(self, regions: AnyRegions, key_mask: Tensor | None) -> TeacherTargets | TeacherLayers:
        """Recorder for the teacher's forward pass over one batch, by ``config.target``."""
        if self.config.target == "recomputed":
            return TeacherLayers(self.matches, regions, key_mask=key_mask)
        return TeacherTargets(self.matches, regions, key_mask=key_mask, heads=self.config.heads, impl=self._impl)

    def student(
        self,
        regions: AnyRegions,
        targets: TeacherTargets | TeacherLayers | Sequence[Tensor],
        key_mask: Tensor | None,
        resampling: Resampling | None = None,
    ) -> StudentAlignment:
        """Recorder for the student's forward pass over the same batch; ``targets`` is the teacher's, or what it gave.

        With ``visual`` resample, ``resampling`` makes slices of the student's visual tokens of it. Raises ValueError without.
        """
        if (resampling is not None) != (self.config.visual == "resample"):
            raise InputError(
                f"vat.visual {self.config.visual} {'needs a' if resampling is None else 'takes no'} resampling"
            )
        config = self.config
        return StudentAlignment(
            self.matches,
            regions,
            targets,
            key_mask=key_mask,
            loss=config.loss,
            reduction=config.reduction,
            sink_filter=config.sink_filter,
            heads=config.heads,
            layer_sum=config.layer_sum,
            impl=self._impl,
            engine=config.engine,
            resampling=resampling,
        )

    def student_of_spans(
        self,
        regions: Regions,
        targets: TeacherTargets,
        spans: tuple[Tensor, Tensor],
        key_mask: Tensor | None,
        resampling: Resampling | None = None,
    ) -> SpanAlignment:
        """As `student`, for different tokenizers: ``spans`` (B, T) and (B, T') are the spans that the tokens of student and
        teacher belong to, 0 for none, within which rows are averaged."""
        numbers = [
            numbers_of_rows(side.rows, of.to(side.rows.device), self.config.rows)
            for side, of in zip((regions, targets.regions), spans, strict=True)
        ]
        rows = span_rows(numbers[0], numbers[1].to(numbers[0].device))
        options: dict[str, Any] = {"key_mask": key_mask, "impl": self._impl, "resampling": resampling}
        return SpanAlignment(self.matches, regions, targets, rows, self.config, **options)
