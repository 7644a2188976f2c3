"""Salient visual tokens: MDist with the tokens that the teacher's instruction looks at counting more, as in Align-TI."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cdistill.train.terms.base import Memory, Sizes
from cdistill.train.terms.multimodal import MultimodalDistillation

if TYPE_CHECKING:
    from torch import Tensor, nn

    from cdistill.models.load import Model
    from cdistill.train.step import Step
    from cdistill.vat import SliceRecorder
    from cdistill.vat.recorders import AnyRegions

MODULE = "salience_layers"


class SalientTokens(MultimodalDistillation):
    """Divergence at visual tokens, weighted by the teacher's attention from the instruction to them: after the
    instruction-aware vision alignment (IVA) of Chen et al., "Beyond Next-Token Alignment: Distilling Multimodal Large Language
    Models via Token Interactions" (Align-TI), arXiv:2602.09483.

    Implemented from its abstract and what reviews say of it; its training code is not public. Assumed, therefore: what is
    aligned are predictions; the weights are the mean over heads and over unlabelled text tokens after the first visual token,
    divided by their sum in each sample, equal where there is no such token; and the layer is the one in the middle of the
    teacher's intermediate layers, where the paper measures which layer heeds the instruction most. Its other part, the
    alignment of transition probabilities by sampling from the student, is not here.
    """

    name = "iva"
    title = "IVA"
    teacher = ("visual", "attention")
    attention = True
    losses = "iva_losses"

    def modules(self, student: Model, teacher: Model | None) -> dict[str, nn.Module]:
        """What reads both heads, and which layer of the teacher is looked at."""
        from cdistill.train.chosen_layers import ChosenLayers
        from cdistill.vat import attention_layers, layer_range

        assert teacher is not None
        span = layer_range(attention_layers(teacher), "intermediate", role="teacher")
        return super().modules(student, teacher) | {MODULE: ChosenLayers(teacher=span[len(span) // 2])}

    def regions(self, step: Step) -> AnyRegions:
        """Rows are the instruction, columns the visual tokens."""
        from cdistill.train.chosen_layers import instruction_to_vision

        return instruction_to_vision(step)

    def teacher_recorder(self, step: Step) -> SliceRecorder | None:
        """None where no text follows an image."""
        from cdistill.vat import SliceRecorder

        if not (step.regions.rows.shape[1] and step.regions.cols.shape[1]):
            return None
        layers: Any = step.modules[MODULE]
        return SliceRecorder([layers.teacher], step.regions, key_mask=step.key_mask)

    def forward(self, step: Step) -> Tensor:
        """Sum over samples, in nats."""
        import torch

        from cdistill.train.vocabulary import visual_divergence

        assert step.teacher is not None
        recorder: Any = step.teacher.attention
        cols, shares = step.regions.cols, step.visual_places.shares
        if recorder is None:
            return visual_divergence(step, self.losses, shares)
        weights = next(iter(recorder.slices.values())).sum(1)  # (N,V), 0 at padding
        total = weights.sum(1, keepdim=True)
        real = cols >= 0 if step.counted is None else (cols >= 0) & step.counted[:, None]
        found = (weights / total)[real]
        shares = torch.where(total.expand_as(weights)[real] > 0, found, shares)
        return visual_divergence(step, self.losses, shares)

    @classmethod
    def memory(cls, recipe: Any, student: Any, sizes: Sizes) -> Memory:
        """As MDist, and one slice of attention."""
        instruction = max(0, sizes.length - sizes.visual - sizes.answers)
        return super().memory(recipe, student, sizes) + Memory(kept=4 * sizes.batch * instruction * sizes.visual)
