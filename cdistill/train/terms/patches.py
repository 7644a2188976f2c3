"""Patches: what the vision encoder of a student learns before it has a language model, in the built-in task."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cdistill.train.terms.base import Memory, Sizes, Term

if TYPE_CHECKING:
    from torch import Tensor, nn

    from cdistill.models.load import Model
    from cdistill.train.step import Step

HEAD = "patch_head"


class Patches(Term):
    """Cross-entropy of what is in each patch, predicted by a throw-away head on the vision encoder.

    Batches are ``pixel_values`` and ``labels`` (I, V, 3).
    """

    name = "patch"
    title = "patch cross-entropy"
    labels = "patches"
    is_logged = False  # it is the whole loss of its stage

    def modules(self, student: Model, teacher: Model | None) -> dict[str, nn.Module]:
        """The head."""
        from torch import nn

        from cdistill.builtin.render import PATCH_CLASSES
        from cdistill.models.taf import feature_width

        return {HEAD: nn.Linear(feature_width(student.config), sum(PATCH_CLASSES))}

    def forward(self, step: Step) -> Tensor:
        """Sum over labels, in nats."""
        import torch
        import torch.nn.functional as F

        from cdistill.builtin.render import PATCH_CLASSES
        from cdistill.models.llava import vision_features

        logits = step.modules[HEAD](vision_features(step.student, step.batch["pixel_values"]))
        parts = logits.flatten(0, 1).float().split(PATCH_CLASSES, 1)
        targets = step.labels.flatten(0, 1).T
        losses = [F.cross_entropy(p, y, reduction="sum") for p, y in zip(parts, targets, strict=True)]
        return torch.stack(losses).sum()

    @classmethod
    def memory(cls, recipe: Any, student: Any, sizes: Sizes) -> Memory:
        """The vision encoder alone is trained."""
        from cdistill.builtin.render import PATCH_CLASSES

        return Memory(classes=sum(PATCH_CLASSES))
