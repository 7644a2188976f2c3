"""Self-attention relations of the last layer: tokens relate to each other as in the teacher, as in MiniLM."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cdistill.train.terms.base import Memory, Sizes, Term

if TYPE_CHECKING:
    from torch import Tensor, nn

    from cdistill.models.load import Model
    from cdistill.train.step import Step
    from cdistill.vat import StudentRelations, TeacherRelations
    from cdistill.vat.recorders import AnyRegions

MODULE = "relation_layers"


class SelfRelations(Term):
    """Query-query, key-key and value-value relations of the last attention layers, of all tokens: MiniLMv2 (Wang et al.,
    "MiniLMv2: Multi-Head Self-Attention Relation Distillation", arXiv:2012.15828).

    A mean over rows and heads for every sample, sum of the three (`cdistill.vat.StudentRelations`). The paper is about
    encoders; here a token is related to those before it, as its attention sees them, and to itself. Ours, too: both models'
    last layers (the paper takes a layer below the last of large teachers), and as many relation heads as the teacher has
    heads (of keys), or fewer where the student's width cannot be split so.
    """

    name = "relation"
    title = "relations"
    per = "sample"
    baseline = True
    teacher = ("relations",)
    attention = True

    def modules(self, student: Model, teacher: Model | None) -> dict[str, nn.Module]:
        """Which layers are compared."""
        from cdistill.train.chosen_layers import ChosenLayers
        from cdistill.vat import attention_layers

        assert teacher is not None
        return {MODULE: ChosenLayers(*(attention_layers(model)[-1] for model in (student, teacher)))}

    def regions(self, step: Step) -> AnyRegions:
        """All tokens of the samples that count."""
        from cdistill.train.chosen_layers import all_tokens

        return all_tokens(step)

    def teacher_recorder(self, step: Step) -> TeacherRelations:
        """Keeps the teacher's layer."""
        from cdistill.vat import TeacherRelations

        layers: Any = step.modules[MODULE]
        return TeacherRelations(layers.teacher, step.regions, key_mask=step.key_mask)

    def recorder(self, step: Step) -> StudentRelations:
        """Compares with it."""
        from cdistill.vat import StudentRelations

        assert step.teacher is not None
        layers: Any = step.modules[MODULE]
        theirs: Any = step.teacher.attention
        return StudentRelations(layers.student, step.regions, theirs, key_mask=step.key_mask)

    def forward(self, step: Step) -> Tensor:
        """Sum over samples, in nats."""
        return step.recorder.losses().sum()

    @classmethod
    def memory(cls, recipe: Any, student: Any, sizes: Sizes) -> Memory:
        """The teacher's queries, keys and values, counted as twice as wide as the student's, and copies of the student's."""
        config = student.config.get_text_config(decoder=True)
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        vectors = config.num_attention_heads + 2 * config.num_key_value_heads
        return Memory(kept=3 * 4 * sizes.batch * sizes.length * vectors * width)
