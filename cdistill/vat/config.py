"""Visual attention alignment as one validated choice, and the recorders it makes for every batch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from cdistill.vat.distances import LayerDistances
from cdistill.vat.matching import MATCHINGS, NAMED_SPANS, Layers, Matching, layer_range, match_layers
from cdistill.vat.recorders import AnyRegions, StudentAlignment, TeacherTargets
from cdistill.vat.regions import ROWS, PackedRegions, Regions, Rows, packed_regions, token_regions

LOSSES = ("cosine", "mse", "kl")
REDUCTIONS = ("row", "matrix", "column")
HEADS = ("mean", "each")
ENGINES = ("sdpa", "auto", "triton", "torch_flash", "torch_cudnn", "flash_attn_2", "flash_attn_3", "flash_attn_4")


@dataclass(frozen=True)
class VATConfig:
    """Every choice of visual attention alignment (paper section 4.1 and the ablations of 5.3).

    - ``matching``: group, simple, adaptive; ``loss``: cosine, mse, kl; ``reduction``: row, matrix, column;
      ``rows``: answer, predicting, text, visual, all (`token_regions`); ``heads``: mean over heads, or each head by itself
      (equal head counts only);
    - ``layers``: span of both models' layers; ``student_layers`` and ``teacher_layers`` override it for one side
      (everything `layer_range` takes: a name, "first-last", a list of indices);
    - ``engine``: "sdpa", transformers' own attention beside the alignment; "auto" or an engine of
      `cdistill.ops.attention_with_alignment`, which makes both in one forward and one backward pass;
    - ``sink_filter``: with ``reduction="column"``, leave attention sinks out; ``layer_sum``: sum over layers, not mean.

    Raises ValueError naming the field and what it allows.
    """

    matching: Matching = "group"
    loss: str = "cosine"
    reduction: str = "row"
    layers: str = "intermediate"
    student_layers: str | Sequence[int] | None = None
    teacher_layers: str | Sequence[int] | None = None
    rows: Rows = "text"  # the paper speaks of answer tokens: benchmarks/results/demo_rows.json
    heads: str = "mean"
    engine: str = "sdpa"
    sink_filter: bool = False
    layer_sum: bool = False

    def __post_init__(self) -> None:
        choices = {
            "matching": MATCHINGS,
            "loss": LOSSES,
            "reduction": REDUCTIONS,
            "layers": NAMED_SPANS,
            "rows": ROWS,
            "heads": HEADS,
            "engine": ENGINES,
        }
        for field, allowed in choices.items():
            if getattr(self, field) not in allowed:
                raise ValueError(f"vat.{field} must be one of {', '.join(allowed)}, got {getattr(self, field)!r}")
        for field in ("sink_filter", "layer_sum"):
            if not isinstance(getattr(self, field), bool):
                raise ValueError(f"vat.{field} must be true or false, got {getattr(self, field)!r}")
        if self.sink_filter and self.reduction != "column":
            raise ValueError(f"vat.sink_filter needs vat.reduction column, got {self.reduction!r}")

    @classmethod
    def official(cls) -> "VATConfig":
        """The authors' published code (SPEC's ``official`` recipe), for the model depths it lists."""
        return cls(reduction="column", layers="official", rows="visual", sink_filter=True, layer_sum=True)


class VAT:
    """Visual attention alignment between a student and a teacher of given depths.

    ``student_num_layers`` and ``teacher_num_layers`` are numbers of layers or, for models with layers that have no softmax
    attention, what `attention_layers` gives for them. ``distances`` is the matrix adaptive matching needs: build it with
    `VAT.measure` first. ``impl`` as in `cdistill.ops`. Per batch::

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

    def teacher(self, regions: AnyRegions, key_mask: Tensor | None) -> TeacherTargets:
        """Recorder for the teacher's forward pass over one batch."""
        return TeacherTargets(self.matches, regions, key_mask=key_mask, heads=self.config.heads, impl=self._impl)

    def student(
        self, regions: AnyRegions, targets: TeacherTargets | Sequence[Tensor], key_mask: Tensor | None
    ) -> StudentAlignment:
        """Recorder for the student's forward pass over the same batch; ``targets`` is the teacher's, or what it gave."""
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
        )
