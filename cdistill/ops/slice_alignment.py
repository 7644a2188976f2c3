"""The alignment loss of slices that are there already, as where rows of them have been averaged."""

from typing import Any

import torch
from torch import Tensor

from cdistill.errors import InputError
from cdistill.ops import _torch_losses
from cdistill.ops._contract import require_loss
from cdistill.ops._problem import Comparison


class _SliceAlignment(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, compared: Comparison) -> Tensor:
        ctx.save_for_backward(a)
        ctx.compared = compared
        return _torch_losses.alignment_loss(a, compared)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (a,) = ctx.saved_tensors
        return _torch_losses.alignment_grad(a, ctx.compared, grad, a.dtype), None


def slice_alignment(
    a: Tensor,
    target: Tensor,
    row_valid: Tensor,
    col_valid: Tensor,
    *,
    loss: str = "cosine",
    reduction: str = "row",
    sink_filter: bool = False,
) -> Tensor:
    """Distance of slices from their targets, per sample: what `attention_alignment` makes of the slice it computes.

    Args:
        a: (B,R,V) fp32, differentiable once.
        target: (B,R,V) fp32, without gradient.
        row_valid, col_valid: (B,R) and (B,V) bool, what is compared; the rest may hold any numbers.
        loss, reduction, sink_filter: as in `attention_alignment`.

    Returns:
        (B,) fp32; 0 with gradient 0 for a sample without valid rows or columns.

    Raises:
        ValueError: shapes that differ, or an unknown loss or reduction.
    """
    require_loss(loss, reduction, sink_filter)
    for name, value, wanted in (
        ("target", target, a.shape),
        ("row_valid", row_valid, a.shape[:2]),
        ("col_valid", col_valid, (a.shape[0], a.shape[2])),
    ):
        if value.shape != wanted:
            raise InputError(f"{name} must be {tuple(wanted)} like the slices, got {tuple(value.shape)}")
    compared = Comparison(row_valid, col_valid, target.detach(), loss, reduction, sink_filter)
    return _SliceAlignment.apply(a, compared)
