"""VAT: alignment of the student's visual attention with the teacher's (paper section 4.1)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from cdistill.errors import InputError
from cdistill.train.terms.base import Memory, Settings, Sizes, Term

if TYPE_CHECKING:
    from torch import Tensor, nn

    from cdistill.models.load import Model
    from cdistill.train.step import Step
    from cdistill.vat import VAT, Recorder, Regions, Resampling, StudentAlignment
    from cdistill.vat.recorders import AnyRegions


MODULE = "head_mixture"
SPANS = "pair_spans"  # of batches for different tokenizers (`cdistill.data.span_pairs`)


class Alignment(Term):
    """Distance between slices of attention, mean (``vat.layer_sum``: sum) over the matched layers.

    Where teacher and student encode samples differently, batches have what `cdistill.train.resampling` makes.
    """

    name = "vat"
    title = "VAT"
    heading = "VAT: attention"
    per = "sample"
    teacher = ("attention",)
    visual = True
    attention = True
    details: ClassVar[tuple[str, ...]] = ("vat_layers",)
    is_column = True
    compares_spans = True

    def __init__(self, vat: VAT, weight: float = 1.0) -> None:
        self.vat, self.weight = vat, weight

    @classmethod
    def configured(cls, settings: Settings) -> Alignment | None:
        """By ``vat``, None without it."""
        return None if settings.vat is None else cls(settings.vat, settings.vat_weight)

    def modules(self, student: Model, teacher: Model | None) -> dict[str, nn.Module]:
        """The weights of ``vat.head_matching`` mixture, if it is chosen."""
        return {MODULE: self.vat.mixture()} if self.vat.config.learns_mixture else {}

    def regions(self, step: Step) -> AnyRegions:
        """Rows and columns of a batch: no rows in samples that do not count, no columns where the teacher sees nothing."""
        inputs, ids = step.batch, step.visual_ids
        if step.is_packed:
            return self.vat.packed_regions(
                inputs["input_ids"], step.labels, inputs["position_ids"], visual_token_ids=ids
            )
        mask = inputs.get("attention_mask")
        regions = self.vat.regions(inputs["input_ids"], step.labels, mask, visual_token_ids=ids)
        if step.theirs is not None or "pair_teacher_rows" in inputs:
            regions = self._regions_apart(step, regions)
        if step.counted is None:
            return regions
        return regions._replace(rows=regions.rows.masked_fill(~step.counted[:, None], -1))

    def _regions_apart(self, step: Step, regions: Regions) -> Regions:
        """Of a batch that teacher and student read differently: rows text are given, and columns in pairs alone compared."""
        if self.vat.config.rows == "text" and SPANS not in step.batch:
            name = "pair_teacher_rows" if step.theirs is None else "pair_rows"
            regions = regions._replace(rows=self._given(step, name).int())
        resampling = self.resampling(step)
        if resampling is None:  # the teacher's side
            return regions
        wanted, found = tuple(regions.cols.shape), tuple(resampling.places.shape[:2])
        if found != wanted:
            raise InputError(f"pair_places must be of (samples, visual tokens) {wanted}, got {found}")
        return regions._replace(cols=regions.cols.masked_fill(~resampling.compared, -1))

    def resampling(self, step: Step) -> Resampling | None:
        """What makes slices of the student's visual tokens of the teacher's; None where both are the same."""
        if step.theirs is None or (SPANS in step.batch and self.vat.config.visual == "equal"):
            return None
        from cdistill.vat import Resampling

        return Resampling(self._given(step, "pair_places"), self._given(step, "pair_shares"))

    def _given(self, step: Step, name: str) -> Tensor:
        if name not in step.batch:
            raise InputError(
                f"{name} must be in the batch, as cdistill.train.resampling makes it: teacher and student see images through "
                "different visual tokens"
            )
        return step.batch[name]

    def teacher_recorder(self, step: Step) -> Recorder | None:
        """None where there is nothing to align."""
        view = step.teacher_view
        if not (view.regions.cols.shape[1] and view.regions.rows.shape[1]):
            return None
        return self.vat.teacher(view.regions, view.key_mask, shards=step.shards)

    def recorder(self, step: Step) -> StudentAlignment | None:
        """Compares with what the teacher gave, if it gave anything."""
        targets: Any = None if step.teacher is None else step.teacher.attention
        resampling, spans = self.resampling(step), None if self.vat.config.rows == "visual" else step.spans
        if targets is not None and spans is not None:
            return self.vat.student_of_spans(step.regions, targets, spans, step.key_mask, resampling)
        if targets is not None and resampling is not None and self.vat.config.rows == "text":
            _require_same_text(step)
        if (
            MODULE in step.modules
        ):  # without targets, too, and at this place: ZeRO-3 gathers weights in one order on all processes
            slices = None if targets is None else targets.slices
            if (
                slices is not None and resampling is not None
            ):  # before they are mixed: what is learned needs their gradient
                slices, resampling = {layer: resampling(x) for layer, x in slices.items()}, None
            step.shared[MODULE] = step.modules[MODULE](slices)
            targets = None if targets is None else step.shared[MODULE]
        if targets is None:
            return None
        return self.vat.student(step.regions, targets, step.key_mask, resampling, shards=step.shards)

    def forward(self, step: Step) -> Tensor:
        """Sum over samples; ``vat_layers`` (L,) are those of every matched student layer."""
        import torch

        if (
            step.recorder is None
        ):  # no sample has an image; ZeRO-3 wants equally many differentiable losses on all processes
            step.details["vat_layers"] = torch.zeros(len(self.vat.matches), device=step.labels.device)
            return sum(step.shared.get(MODULE, ()), step.zero())
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


def _require_same_text(step: Step) -> None:
    """Raise ValueError unless rows of student and teacher are the same tokens; on CUDA a device-side assertion."""
    from cdistill.vat.regions import require_on_device

    tokens = []
    for side in (step, step.teacher_view):
        rows = side.batch["pair_rows" if side is step else "pair_teacher_rows"]
        tokens.append(side.batch["input_ids"].gather(1, rows.clamp(min=0)).masked_fill(rows < 0, -1))
    message = "pair_rows and pair_teacher_rows must be of the same tokens, in every sample"
    if tokens[0].shape != tokens[1].shape:
        raise InputError(message)
    require_on_device((tokens[0] == tokens[1]).all(), message)
