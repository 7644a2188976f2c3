"""Grounding: attention of the words of the built-in task to what they speak of."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cdistill.train.terms.base import Memory, Sizes, Term

if TYPE_CHECKING:
    from torch import Tensor

    from cdistill.models.load import Model
    from cdistill.train.step import Step
    from cdistill.vat import StudentAlignment


class Grounding(Term):
    """Aligns the visual understanding layers with what the words speak of, as VAT does with a teacher.

    Batches have ``grounding`` (B, T, V) and ``places`` (B, V), see `cdistill.vat.grounded_regions`.
    """

    name = "ground"
    title = "grounding"
    per = "sample"
    inputs = ("grounding", "places")
    attention = True

    def recorder(self, step: Step) -> StudentAlignment:
        """Compares with the places."""
        from cdistill.vat import LayerMatch, StudentAlignment, grounded_regions

        matches = [LayerMatch(layer, (layer,)) for layer in _layers(step.student)]
        regions, target = grounded_regions(step.batch["grounding"], step.batch["places"])
        return StudentAlignment(matches, regions, [target] * len(matches), key_mask=None)

    def forward(self, step: Step) -> Tensor:
        """Sum over samples of the mean over layers."""
        import torch

        return torch.stack(list(step.recorder.losses().values())).mean(0).sum()

    @classmethod
    def memory(cls, recipe: Any, student: Any, sizes: Sizes) -> Memory:
        """Every token may be a row; the layers share one target."""
        return Memory(len(_layers(student)), sizes.length, targets=1)


def _layers(student: Model) -> tuple[int, ...]:
    from cdistill.vat import attention_layers, layer_range

    return layer_range(attention_layers(student), "intermediate")
