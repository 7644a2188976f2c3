"""MDist: the student predicts at visual tokens what the teacher predicts there, a baseline that compares no attention."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from cdistill.choices import KDConfig
from cdistill.train.terms.base import Memory, Settings, Sizes, Term

if TYPE_CHECKING:
    from torch import Tensor, nn

    from cdistill.models.load import Model
    from cdistill.train.step import Step


class MultimodalDistillation(Term):
    """Divergence over the vocabulary at visual tokens; with ``kd`` it is MDist of Cai et al., "LLaVA-KD", arXiv:2410.16236.

    Of each sample the mean over its visual tokens, at their own positions; samples without any count 0, as for VAT. The
    divergence is that of ``kd`` (the paper's by default). The paper's formula does not say whether it sums or
    averages over tokens: the mean is ours.
    """

    name = "mdist"
    title = "MDist"
    per = "sample"
    baseline = True
    teacher: ClassVar[tuple[str, ...]] = ("visual",)
    losses: ClassVar[str] = "mdist_losses"  # its module that reads both heads

    def __init__(self, kd: KDConfig | None = None) -> None:
        self.kd = kd or KDConfig()

    @classmethod
    def configured(cls, settings: Settings) -> MultimodalDistillation:
        """By ``kd``, without its weight."""
        return cls(settings.kd)

    def check(self, student: Model, teacher: Model | None) -> None:
        """Refuse heads that are more than a linear layer."""
        from cdistill.train.vocabulary import require_plain_heads

        require_plain_heads(student, teacher)

    def modules(self, student: Model, teacher: Model | None) -> dict[str, nn.Module]:
        """What reads both heads, without parameters of its own."""
        from cdistill.train.vocabulary import visual_losses

        return {self.losses: visual_losses(self.kd, student, teacher)}

    def forward(self, step: Step) -> Tensor:
        """Sum over samples, in nats."""
        from cdistill.train.vocabulary import visual_divergence

        return visual_divergence(step, self.losses, step.visual_places.shares)

    @classmethod
    def memory(cls, recipe: Any, student: Any, sizes: Sizes) -> Memory:
        """Chunks of logits, and both models' hidden states at visual tokens."""
        return Memory(logits="chunks", visual_logits=True, kept=visual_states(student, sizes))


def visual_states(student: Any, sizes: Sizes) -> int:
    """Bytes of hidden states at visual tokens: the student's, their gradient and the teacher's, counted as wide, in fp32."""
    return 3 * 4 * sizes.batch * sizes.visual * student.config.get_text_config(decoder=True).hidden_size
