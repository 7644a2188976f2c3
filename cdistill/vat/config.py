"""Visual attention alignment of two models as `VATConfig` says, and the recorders it makes for every batch."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from cdistill.choices import VATConfig
from cdistill.errors import InputError
from cdistill.vat.distances import HeadDistances, LayerDistances
from cdistill.vat.heads import HeadCounts, HeadMixture, with_groups
from cdistill.vat.matching import LayerMatch, Layers, layer_range, match_layers
from cdistill.vat.recorders import AnyRegions, SliceRecorder, StudentAlignment, TeacherLayers, TeacherTargets
from cdistill.vat.regions import PackedRegions, Regions, packed_regions, token_regions
from cdistill.vat.resample import Resampling
from cdistill.vat.spans import SpanAlignment, numbers_of_rows, span_rows


class VAT:
    """Visual attention alignment between a student and a teacher of given depths.

    ``student_num_layers`` and ``teacher_num_layers`` are numbers of layers or, for models with layers that have no softmax
    attention, what `attention_layers` gives for them. ``distances`` is the matrix adaptive matching needs: build it with
    `VAT.measure` first. ``heads`` are the numbers of both models' query heads, which heads match needs
    (`cdistill.vat.head_counts`). ``matches`` are those of an earlier call, or of `VAT.measure_heads`: nothing is matched
    anew. ``impl`` as in `cdistill.ops`. Per batch:

        teacher = vat.teacher(teacher_regions, teacher_key_mask)
        with torch.no_grad():
            teacher_model(**teacher_batch, cdistill_vat=teacher)
        student = vat.student(student_regions, teacher, student_key_mask)
        student_model(**student_batch, cdistill_vat=student)
        student.loss().backward()

    Raises ValueError where the spans cannot be matched, as when the teacher is shallower than the student, and for heads that
    cannot, or that have not been measured.
    """

    def __init__(
        self,
        config: VATConfig,
        student_num_layers: Layers,
        teacher_num_layers: Layers,
        *,
        distances: Any = None,
        heads: HeadCounts | None = None,
        matches: Sequence[LayerMatch] | None = None,
        impl: str | None = None,
    ):
        self.config, self.heads, self._impl = config, heads, impl
        if matches is None:
            spans = self.spans(config, student_num_layers, teacher_num_layers)
            found = match_layers(*spans, matching=config.matching, distances=distances)
            self.matches = _with_heads(config, found, heads)
        else:
            self.matches = tuple(matches)
        _require_heads(config, self.matches, heads)

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

    @classmethod
    def measure_heads(
        cls,
        config: VATConfig,
        student_num_layers: Layers,
        teacher_num_layers: Layers,
        *,
        distances: Any = None,
        impl: str | None = None,
    ) -> HeadDistances:
        """An empty accumulator of the distances between heads of matched layers, for heads match by assignment."""
        spans = cls.spans(config, student_num_layers, teacher_num_layers)
        return HeadDistances(match_layers(*spans, matching=config.matching, distances=distances), impl=impl)

    def mixture(self) -> HeadMixture:
        """New weights for heads match by a mixture, to be trained with the student."""
        assert self.heads is not None
        return HeadMixture(self.matches, self.heads)

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

    def teacher(self, regions: AnyRegions, key_mask: Tensor | None) -> TeacherTargets | TeacherLayers | SliceRecorder:
        """Recorder for the teacher's forward pass over one batch, by ``config.target``.

        For a mixture it holds the slices of all heads of the windows' layers, of which `HeadMixture` makes the targets.
        """
        how: dict[str, Any] = {"heads": "mean" if self.config.heads == "mean" else "each", "impl": self._impl}
        if self.config.target == "recomputed":
            return TeacherLayers(self.matches, regions, key_mask=key_mask)
        if self.config.learns_mixture:
            layers = {layer for match in self.matches for layer in match.teachers}
            return SliceRecorder(layers, regions, key_mask=key_mask, **how)
        return TeacherTargets(self.matches, regions, key_mask=key_mask, **how)

    def student(
        self,
        regions: AnyRegions,
        targets: TeacherTargets | TeacherLayers | Sequence[Tensor],
        key_mask: Tensor | None,
        resampling: Resampling | None = None,
    ) -> StudentAlignment:
        """Recorder for the student's forward pass over the same batch; ``targets`` is the teacher's, or what it gave.

        For a mixture what `HeadMixture` has made of that. ``resampling`` makes slices of the student's visual tokens of the
        teacher's, where these are others; it needs ``visual`` resample (ValueError).
        """
        if resampling is not None and self.config.visual != "resample":
            raise InputError(f"vat.visual must be resample for other visual tokens, got {self.config.visual!r}")
        config = self.config
        return StudentAlignment(
            self.matches,
            regions,
            targets,
            key_mask=key_mask,
            loss=config.loss,
            reduction=config.reduction,
            sink_filter=config.sink_filter,
            heads="mean" if config.heads == "mean" else "each",
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


def _with_heads(config: VATConfig, matches: tuple[LayerMatch, ...], heads: HeadCounts | None) -> tuple[LayerMatch, ...]:
    """The matches with the heads that nothing need be measured for. Raises ValueError without numbers of heads."""
    if config.heads != "match":
        return matches
    if config.assigns_heads:
        raise InputError(
            "vat.head_matching assignment needs measured heads: give matches, from VAT.measure_heads (docs/how-to/alignment.md)"
        )
    if heads is None:
        raise InputError("heads must be given for vat.heads match: cdistill.vat.head_counts(student, teacher)")
    return with_groups(matches, heads) if config.head_matching == "group" else matches


def _require_heads(config: VATConfig, matches: Sequence[LayerMatch], heads: HeadCounts | None) -> None:
    """Raise ValueError unless the matches have heads where the configuration asks for them, and groups that can be averaged."""
    grouped = config.heads == "match" and not config.learns_mixture
    for match in matches:
        if (match.heads is not None) != grouped or (
            match.heads is not None and len(match.heads) != len(match.teachers)
        ):
            raise InputError(
                f"matches must {'have heads for every layer of a window' if grouped else 'have no heads'} with vat.heads "
                f"{config.heads}, got {match}"
            )
        for groups in match.heads or ():
            numbers = {head for group in groups for head in group}
            if heads is not None and (len(groups), *numbers - {*range(heads.teacher)}) != (heads.student,):
                raise InputError(
                    f"matches must name heads of 0 to {heads.teacher - 1} for each of the student's {heads.student} heads, got "
                    f"{groups} for layer {match.student}"
                )
        sizes = {len(group) for groups in match.heads or () for group in groups}
        if config.target == "recomputed" and len(sizes) > 1:
            raise InputError(
                "vat.target recomputed needs groups of equally many heads with vat.heads match, got "
                f"{heads.teacher if heads else 'other'} heads of the teacher for {heads.student if heads else 'those'} of the "
                "student; use vat.target stored, or vat.head_matching assignment"
            )
