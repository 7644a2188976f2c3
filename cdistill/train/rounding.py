"""Quantisation-aware finishing: a stage computes with its language model's weights rounded to what 8 or 4 bits can hold.

The grids are those of GGUF's Q8_0 and Q4_0: 32 weights of a row share a scale in fp16. A forward pass computes with the rounded
weights, the gradient passes to the weights themselves as if they were not (straight through: Bengio et al., 2013,
arXiv:1308.3432), and a stage's result holds rounded weights: written as Q8_0 or Q4_0, they are the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cdistill.errors import InputError
from cdistill.models.load import Model
from cdistill.models.parts import language_model

GROUP = 32  # weights of a row that share a scale


def _q8_0(groups: Tensor) -> tuple[Tensor, Tensor]:
    """Whole numbers -127 to 127 and scales of groups, (..., 32) fp32 -> (..., 32), (..., 1)."""
    scale = groups.abs().amax(-1, keepdim=True) / 127
    ratio = groups * torch.where(scale == 0, 0, 1 / scale)
    return torch.sign(ratio) * torch.floor(ratio.abs() + 0.5), scale


def _q4_0(groups: Tensor) -> tuple[Tensor, Tensor]:
    """Whole numbers -8 to 7 and scales of groups; -8 is what is farthest from zero, so that a scale may be negative."""
    farthest = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
    scale = farthest / -8
    ratio = groups * torch.where(scale == 0, 0, 1 / scale)
    return torch.floor(ratio + 8.5).clamp(0, 15) - 8, scale


GRIDS: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {"q8_0": _q8_0, "q4_0": _q4_0}


def on_grid(weight: Tensor, grid: str) -> Tensor:
    """The nearest weights that a format holds.

    Args:
        weight: (out, in) with ``in`` a multiple of 32, of any floating dtype.
        grid: ``q8_0`` or ``q4_0``.

    Returns:
        The same shape and dtype; rounded again in fp32 they stay as they are.
    """
    numbers, scale = GRIDS[grid](weight.float().unflatten(-1, (-1, GROUP)))
    return (numbers * scale.half().float()).flatten(-2).to(weight.dtype)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, grid: str) -> Tensor:
        return on_grid(weight, grid)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return gradient, None


class RoundedLinear(nn.Linear):
    """A linear layer that computes with weights on a grid; its own weights, names included, stay as they are."""

    grid: str

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, _StraightThrough.apply(self.weight, self.grid), self.bias)  # type: ignore[no-untyped-call]


def layers_to_round(student: Model, key: str) -> list[nn.Linear]:
    """The linear layers of a student's decoder: embeddings and head stay as they are, because losses over the vocabulary take
    the head's weight as it is.

    Raises:
        ValueError: weights of a layer have rows that are no multiple of 32, or lie in none of its linear layers.
    """
    layers = language_model(student).layers
    linear = {name: module for name, module in layers.named_modules() if type(module) is nn.Linear}
    for name, parameter in layers.named_parameters():
        owner = name.rpartition(".")[0]
        if owner in linear and parameter.ndim == 2 and parameter.shape[1] % GROUP:
            raise InputError(
                f"{key} must be null: layers.{name} has rows of {parameter.shape[1]}, no multiple of {GROUP}"
            )
        if owner not in linear and parameter.ndim > 1:
            raise InputError(f"{key} must be null: layers.{name} is the weight of no linear layer")
    return list(linear.values())


def round_weights(student: Model, grid: str, key: str) -> None:
    """Let the linear layers of a student's decoder compute with rounded weights, in place. Raises as `layers_to_round`."""
    for module in layers_to_round(student, key):
        module.__class__ = RoundedLinear
        module.grid = grid  # type: ignore[assignment]


def rounded_state(student: Model, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A student's state dict with the weights of its `RoundedLinear` layers rounded."""
    grids = {f"{name}.weight": x.grid for name, x in student.named_modules() if isinstance(x, RoundedLinear)}
    return {name: on_grid(value, grids[name]) if name in grids else value for name, value in state.items()}
