"""RDist: visual tokens relate to each other as the teacher's do, a baseline that compares no attention."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cdistill.errors import InputError
from cdistill.train.terms.base import Memory, Sizes, Term
from cdistill.train.terms.multimodal import visual_states

if TYPE_CHECKING:
    from torch import Tensor

    from cdistill.models.load import Model
    from cdistill.train.step import Step


class RelationDistillation(Term):
    """1 - cosine of the two models' matrices of products of logits at visual tokens: RDist of Cai et al., "LLaVA-KD",
    arXiv:2410.16236.

    Of each sample the matrices L L^T (V, V) of its logits L, not centred and not normalised, are compared as vectors; samples
    without visual tokens count 0. Taken from what the paper says of "visual logits" and from a public reimplementation; the
    authors' training code is not published.
    """

    name = "rdist"
    title = "RDist"
    per = "sample"
    baseline = True
    teacher = ("visual",)

    def check(self, student: Model, teacher: Model | None) -> None:
        """Refuse heads that are more than a linear layer, and logits that are capped after it."""
        from cdistill.train.vocabulary import after_heads, require_plain_heads

        require_plain_heads(student, teacher)
        for side, after in zip(("student", "teacher"), after_heads(student, teacher), strict=True):
            if after.softcap is not None:
                raise InputError(
                    f"the {side} caps its logits ({after.softcap:g}), and rdist takes products of logits from the head's "
                    "weight: leave rdist out"
                )

    def forward(self, step: Step) -> Tensor:
        """Sum over samples, in fp32."""
        from cdistill.train.visual_relations import distance_of_relations

        return distance_of_relations(step)

    @classmethod
    def memory(cls, recipe: Any, student: Any, sizes: Sizes) -> Memory:
        """Three matrices of each sample, hidden states at visual tokens, and a copy of them."""
        return Memory(kept=3 * 4 * sizes.batch * sizes.visual**2 + 2 * visual_states(student, sizes))
