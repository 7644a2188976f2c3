"""What the bytes of a stage depend on beside its models, and what its terms add to them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from cdistill.models.load import DTYPES
from cdistill.train.objectives import Objective
from cdistill.train.recipes import Recipe
from cdistill.train.terms import Memory, Sizes

Bytes = dict[str, int]


@dataclass(frozen=True)
class Setting:
    """What the bytes of a stage depend on beside its models.

    Attributes:
        precision: fp32, bf16 or fp16.
        zero: ZeRO stage, or ``off``: plain torch, with autocast for half precision.
        batch: samples of a micro-batch; ``length``, ``visual`` and ``answers`` tokens are of one sample.
        accumulates: gradients are added up over several micro-batches.
        sharers: processes that share a sequence.
        teacher_visual: visual tokens of a sample for a teacher that has an encoding of its own; None where one is for both.
    """

    precision: str
    zero: int | str
    gpus: int
    device: str
    batch: int
    accumulates: bool
    length: int
    visual: int
    answers: int
    sharers: int = 1
    teacher_visual: int | None = None

    @property
    def tokens(self) -> int:
        """Tokens of a sample that one process has."""
        return -(-self.length // self.sharers)

    @property
    def of_teacher(self) -> Setting:
        """The same samples as the teacher reads them."""
        if self.teacher_visual is None:
            return self
        length = self.length - self.visual + self.teacher_visual
        return replace(self, length=length, visual=self.teacher_visual, teacher_visual=None)

    @property
    def half(self) -> torch.dtype:
        """What matrix products are made in."""
        return DTYPES[self.precision]

    @property
    def student(self) -> torch.dtype:
        """What the student's weights are held in."""
        return torch.float32 if self.zero == "off" else self.half

    @property
    def autocast(self) -> torch.dtype | None:
        """What plain torch casts to."""
        return self.half if self.student != self.half else None

    @property
    def partitions(self) -> int:
        """Parts that optimizer states are cut into."""
        return self.gpus if self.zero in (1, 2, 3) else 1

    @property
    def labelled(self) -> int:
        """Labelled tokens of a micro-batch that one process has: all, where they are neighbours."""
        return self.batch * min(self.answers, self.tokens)


def memory_of_terms(recipe: Recipe, objective: Objective, student: Any, s: Setting) -> Memory:
    """What all terms of an objective add; those that do not tell count as nothing."""
    sizes = Sizes(s.batch, s.length, s.visual, s.answers)
    found = [term.memory(recipe, student, sizes) for term in objective.kinds]
    return sum((memory for memory in found if memory is not None), Memory())


def item_size(dtype: torch.dtype) -> int:
    """Bytes of an element."""
    return dtype.itemsize
