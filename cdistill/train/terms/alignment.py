"""VAT: alignment of the student's visual attention with the teacher's (paper section 4.1)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cdistill.train.terms.base import Memory, Settings, Sizes, Term

if TYPE_CHECKING:
    from torch import Tensor

    from cdistill.train.step import Step
    from cdistill.vat import VAT, StudentAlignment, TeacherLayers, TeacherTargets
    from cdistill.vat.recorders import AnyRegions


class Alignment(Term):
    """Distance between slices of attention, mean (``vat.layer_sum``: sum) over the matched layers."""

    name = "vat"
    title = "VAT"
    heading = "VAT: attention"
    per = "sample"
    teacher = ("attention",)
    visual = True
    attention = True
    details = ("vat_layers",)
    is_column = True
    compares_spans = True

    def __init__(self, vat: VAT, weight: float = 1.0) -> None:
        self.vat, self.weight = vat, weight

    @classmethod
    def configured(cls, settings: Settings) -> Alignment | None:
        """By ``vat``, None without it."""
        return None if settings.vat is None else cls(settings.vat, settings.vat_weight)

    def regions(self, step: Step) -> AnyRegions:
        """Rows and columns of a batch; none are rows in samples that do not count."""
        inputs, ids = step.batch, step.visual_ids
        if step.is_packed:
            return self.vat.packed_regions(
                inputs["input_ids"], step.labels, inputs["position_ids"], visual_token_ids=ids
            )
        mask = inputs.get("attention_mask")
        regions = self.vat.regions(inputs["input_ids"], step.labels, mask, visual_token_ids=ids)
        if step.counted is None:
            return regions
        return regions._replace(rows=regions.rows.masked_fill(~step.counted[:, None], -1))

    def teacher_recorder(self, step: Step) -> TeacherTargets | TeacherLayers | None:
        """None where there is nothing to align."""
        view = step.teacher_view
        if not (view.regions.cols.shape[1] and view.regions.rows.shape[1]):
            return None
        return self.vat.teacher(view.regions, view.key_mask)

    def recorder(self, step: Step) -> StudentAlignment | None:
        """Compares with what the teacher gave, if it gave anything."""
        targets: Any = None if step.teacher is None else step.teacher.attention
        if targets is None:
            return None
        if step.spans is None or self.vat.config.rows == "visual":
            return self.vat.student(step.regions, targets, step.key_mask)
        return self.vat.student_of_spans(step.regions, targets, step.spans, step.key_mask)

    def forward(self, step: Step) -> Tensor:
        """Sum over samples; ``vat_layers`` (L,) are those of every matched student layer."""
        import torch

        if (
            step.recorder is None
        ):  # no sample has an image; ZeRO-3 wants equally many differentiable losses on all processes
            step.details["vat_layers"] = torch.zeros(len(self.vat.matches), device=step.labels.device)
            return step.zero()
        per_layer = torch.stack(list(step.recorder.losses().values())).sum(1)
        step.details["vat_layers"] = per_layer.detach()
        return per_layer.sum() if self.vat.config.layer_sum else per_layer.mean()

    @classmethod
    def memory(cls, recipe: Any, student: Any, sizes: Sizes) -> Memory:
        """A slice for every aligned layer, or the teacher's queries and keys."""
        from cdistill.vat import VAT, attention_layers

        if not (recipe.vat.enabled and sizes.visual):
            return Memory()
        layers, _ = VAT.spans(recipe.vat, attention_layers(student), attention_layers(student))
        rows = {"text": sizes.length - sizes.visual, "visual": sizes.visual, "all": sizes.length}
        # each label has one row, its own or the one before
        of_rows, recomputes = rows.get(recipe.vat.rows, sizes.answers), recipe.vat.target == "recomputed"
        return Memory(len(layers), of_rows, targets=0 if recomputes else len(layers), recomputes=recomputes)
