"""KD: divergence between the predictions of student and teacher (paper section 3.1)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cdistill.errors import InputError
from cdistill.train.terms.base import Memory, Settings, Sizes, Term

if TYPE_CHECKING:
    from torch import Tensor, nn

    from cdistill.choices import KDConfig
    from cdistill.data.tokens import Vocabularies
    from cdistill.models.load import Model
    from cdistill.train.step import Step


class Divergence(Term):
    """Divergence over the vocabulary at labelled tokens; the cross-entropy of the answers is made with it."""

    name = "kd"
    title = "KD"
    heading = "KD: KL to the teacher's answers"
    teacher = ("predictions",)
    is_column = True
    compares_spans = True

    def __init__(self, kd: KDConfig, vocabularies: Vocabularies | None = None) -> None:
        self.kd, self.weight, self.vocabularies = kd, kd.weight, vocabularies
        if kd.alignment == "token" and vocabularies is not None:
            raise InputError("kd.alignment must be merged or uld for models of different tokenizers, got 'token'")
        if kd.alignment != "token" and vocabularies is None:
            raise InputError(
                f"kd.alignment must be token here, got {kd.alignment!r}: different tokenizers are distilled by a recipe "
                "(cdistill.train), which has both tokenizers"
            )

    @classmethod
    def configured(cls, settings: Settings) -> Divergence:
        """By ``kd``."""
        return cls(settings.kd, settings.vocabularies)

    def check(self, student: Model, teacher: Model | None) -> None:
        """Refuse heads that are more than a linear layer."""
        from cdistill.train.vocabulary import require_plain_heads

        require_plain_heads(student, teacher)

    def modules(self, student: Model, teacher: Model | None) -> dict[str, nn.Module]:
        """What reads both heads, without parameters of its own."""
        from cdistill.models.parts import head_of
        from cdistill.train.vocabulary import MODULE, SpanLosses, VocabularyLosses, after_heads

        if self.vocabularies is not None:
            assert teacher is not None
            known = self.vocabularies.within(head_of(student).out_features, head_of(teacher).out_features)
            return {MODULE: SpanLosses(self.kd, known, *after_heads(student, teacher))}
        return {MODULE: VocabularyLosses(self.kd, *after_heads(student, teacher))}

    def forward(self, step: Step) -> Tensor:
        """Sum over labels, in nats."""
        from cdistill.train.vocabulary import divergence

        return divergence(step)

    @classmethod
    def memory(cls, recipe: Any, student: Any, sizes: Sizes) -> Memory:
        """Chunks of both models' logits."""
        return Memory(logits="chunks")
