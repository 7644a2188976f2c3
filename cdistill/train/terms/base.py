"""What a term of the loss is: the class that every term extends, and the values it is given.

Importing this imports no torch: recipes are checked against the terms of their objectives before anything heavy is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from cdistill.choices import KDConfig

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from cdistill.data.tokens import Vocabularies
    from cdistill.train.step import Step
    from cdistill.vat import VAT, Recorder
    from cdistill.vat.recorders import AnyRegions

PER = ("label", "sample")
LABELS = ("tokens", "patches")
# What a term may need of the teacher: its distribution over the vocabulary, its last hidden states at labelled or at visual
# tokens, its attention to the visual tokens, the queries, keys and values of a layer.
SIGNALS = ("predictions", "hidden", "visual", "attention", "relations")


@dataclass(frozen=True)
class Settings:
    """What a run configures of its terms, whoever asks: a recipe, `cdistill.distill` or a trainer.

    Attributes:
        kd: the divergence over the vocabulary.
        vat: the alignment of this student and this teacher, None to leave it out.
        vat_weight: its weight in the loss.
        vocabularies: which tokens of both models say the same, where their tokenizers differ (``kd.alignment``).
        vats: in the place of ``vat``, the alignments of this student and each of several teachers.
        teachers: names of several teachers; none of one.
    """

    kd: KDConfig = field(default_factory=KDConfig)
    vat: VAT | None = None
    vat_weight: float = 1.0
    vocabularies: Vocabularies | None = None
    vats: tuple[VAT, ...] = ()
    teachers: tuple[str, ...] = ()


@dataclass(frozen=True)
class Sizes:
    """A micro-batch as `cdistill plan` counts it: samples, and the tokens of one (all, visual, labelled)."""

    batch: int
    length: int
    visual: int
    answers: int


@dataclass(frozen=True)
class Memory:
    """What a term adds to the memory of a step, as `cdistill plan` counts it.

    Attributes:
        layers: student layers whose attention is compared, in ``rows`` rows of each sample.
        targets: slices of attention that it is compared with.
        recomputes: whether it keeps queries and keys of the teacher's aligned layers in place of slices.
        logits: which it makes: none, whole ones, or chunks (for all terms over the vocabulary together).
        visual_logits: whether it makes chunks of them at visual tokens, too, apart from those at labelled ones.
        classes: outputs of the head on the vision encoder that is trained in place of the language model.
        kept: bytes that stay from the forward to the backward pass.
    """

    layers: int = 0
    rows: int = 0
    targets: int = 0
    logits: Literal["none", "whole", "chunks"] = "none"
    visual_logits: bool = False
    classes: int = 0
    kept: int = 0
    recomputes: bool = False

    def __add__(self, other: Memory) -> Memory:
        """Of two terms of a loss."""
        logits = max(self.logits, other.logits, key=("none", "whole", "chunks").index)
        names = ("layers", "rows", "targets", "classes", "kept")
        either = {name: getattr(self, name) or getattr(other, name) for name in ("visual_logits", "recomputes")}
        return Memory(logits=logits, **either, **{name: getattr(self, name) + getattr(other, name) for name in names})


class Term:
    """One term of the loss: a subclass says what it is in class attributes and computes its sum in `forward`.

    An instance holds configuration alone and may serve several models; what is trained or depends on a model comes from
    `modules`.

    Attributes:
        name: key of its value in results, logs and checkpoints.
        title: what a stage's first line calls it.
        heading: title of its chart in the report; a term without one has no chart.
        per: whether its mean is over the ``label``s or the ``sample``s of a global batch.
        labels: what the labels of a batch are: of ``tokens`` or of image ``patches``, without a language model.
        inputs: keys of a batch that are its own, and no input of the models.
        teacher: what it needs of the teacher: ``predictions``, ``hidden``, ``visual``, ``attention``, ``relations``; with
            ``visual`` the student's last hidden states at visual tokens are there, too.
        visual: whether it must know which tokens are visual, beside what ``teacher`` says.
        attention: whether it sees the student's attention, by `recorder`; one term of a loss may.
        baseline: whether it stands in the place of the alignment and its weight is a recipe's ``baseline_weight``.
        details: keys of further results (vectors, detached), which ``log_layers`` logs.
        weight: its factor in the loss; an instance may have its own.
        teachers: of several, their names: results are logged by these, one by one.
        is_column: every line of metrics.jsonl has its key, null in stages without it.
        is_logged: its mean is logged beside the loss.
        compares_spans: it can compare models of different tokenizers, by the spans of their words.
    """

    name: ClassVar[str] = ""
    title: ClassVar[str] = ""
    heading: ClassVar[str] = ""
    per: ClassVar[Literal["label", "sample"]] = "label"
    labels: ClassVar[Literal["tokens", "patches"]] = "tokens"
    inputs: ClassVar[tuple[str, ...]] = ()
    teacher: ClassVar[tuple[str, ...]] = ()
    visual: ClassVar[bool] = False
    attention: ClassVar[bool] = False
    baseline: ClassVar[bool] = False
    details: ClassVar[tuple[str, ...]] = ()
    is_column: ClassVar[bool] = False
    is_logged: ClassVar[bool] = True
    compares_spans: ClassVar[bool] = False
    teachers: tuple[str, ...] = ()
    weight: float = 1.0

    @classmethod
    def configured(cls, settings: Settings) -> Term | None:
        """The term as a run configures it, None where the run leaves it out."""
        return cls()

    @property
    def of_teachers(self) -> str:
        """Key of what each of several teachers adds to it: a vector, detached."""
        return f"{self.name}_teachers"

    def check(self, student: PreTrainedModel, teacher: PreTrainedModel | None) -> None:
        """Raise ValueError for models that the term is wrong for; called at first and before every batch."""

    def modules(self, student: PreTrainedModel, teacher: PreTrainedModel | None) -> Mapping[str, nn.Module]:
        """Modules of its own by name, made once: trained with the student in a stage, and thrown away after it."""
        return {}

    def regions(self, step: Step) -> AnyRegions | None:
        """Rows and columns of the attention that it compares, if it does (``attention``)."""
        return None

    def teacher_recorder(self, step: Step) -> Recorder | None:
        """What sees the teacher's attention in its pass over the batch."""
        return None

    def recorder(self, step: Step) -> Recorder | None:
        """What sees the student's attention in its pass over the batch."""
        return None

    def forward(self, step: Step) -> Tensor:
        """The term's sum over the labels or samples of a batch: a scalar, differentiable."""
        raise NotImplementedError

    @classmethod
    def memory(cls, recipe: Any, student: Any, sizes: Sizes) -> Memory | None:
        """What it costs, None if that is not known: `cdistill plan` then says so."""
        return None
