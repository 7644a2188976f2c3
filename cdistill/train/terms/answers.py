"""AR: cross-entropy of the right answers (paper section 3.1)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cdistill.train.terms.base import Memory, Sizes, Term

if TYPE_CHECKING:
    from torch import Tensor

    from cdistill.models.load import Model
    from cdistill.train.step import Step


class Answers(Term):
    """Cross-entropy of labelled tokens: from whole logits, or made together with the divergence where there is one."""

    name = "ar"
    title = "AR"
    heading = "AR: cross-entropy on answers"
    is_column = True

    def check(self, student: Model, teacher: Model | None) -> None:
        """Refuse logits that are more than the head gives."""
        from cdistill.train.vocabulary import require_plain_head

        require_plain_head(student, "student", linear=False)

    def forward(self, step: Step) -> Tensor:
        """Sum over labels, in nats."""
        from cdistill.train.vocabulary import cross_entropy

        return cross_entropy(step)

    @classmethod
    def memory(cls, recipe: Any, student: Any, sizes: Sizes) -> Memory:
        """Whole logits, wherever no term makes chunks of them."""
        return Memory(logits="whole")
