"""The visual attention alignment loss (VAT): distance of a student's attention slice from a target slice."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from cdistill.ops._contract import (
    LOSSES,
    REDUCTIONS,
    SliceArguments,
    require_bool,
    require_choice,
    require_device,
    require_shape,
    require_tensor,
    slice_arguments,
)
from cdistill.ops._dispatch import Backend, backend
from cdistill.ops.attention_slice import slice_gradients, slice_with_lse


class _LossOptions(NamedTuple):
    loss: str
    reduction: str
    sink_filter: bool


def _valid(arguments: SliceArguments) -> tuple[Tensor, Tensor]:
    """Rows (B,R) that see at least one of their columns, and columns (B,V) that are not padding."""
    _, _, _, rows, cols, key_mask, causal, _, _ = arguments
    col_valid = cols >= 0
    usable = col_valid if key_mask is None else col_valid & key_mask.gather(1, cols.clamp(min=0).long())
    if cols.shape[1] == 0:
        return torch.zeros_like(rows, dtype=torch.bool), col_valid
    nothing = torch.iinfo(cols.dtype).max
    first = torch.where(usable, cols, nothing).amin(1, keepdim=True)
    sees_column = first <= rows if causal else (first < nothing).expand_as(rows)
    return (rows >= 0) & sees_column, col_valid


def _per_head(tensor: Tensor, q_heads: int) -> Tensor:
    """Repeat (B,...) for every head: (B*Hq,...)."""
    return tensor.repeat_interleave(q_heads, 0)


class _AttentionAlignment(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        lse: Tensor | None,
        rows: Tensor,
        cols: Tensor,
        key_mask: Tensor | None,
        causal: bool,
        scale: float,
        each: bool,
        target: Tensor,
        options: _LossOptions,
        impl: Backend,
    ) -> Tensor:
        arguments = SliceArguments(q, k, lse, rows, cols, key_mask, causal, scale, each)
        a, row_lse = slice_with_lse(impl, arguments)
        ctx.save_for_backward(q, k, lse, rows, cols, key_mask, row_lse, a, target)
        ctx.options = (causal, scale, each)
        ctx.loss_options = options
        ctx.impl = impl
        if a.numel() == 0:
            return q.new_zeros(q.shape[0], dtype=torch.float32)
        losses = impl.alignment_loss(*_loss_inputs(arguments, a, target), **options._asdict())
        return losses.view(q.shape[0], -1).mean(1) if each else losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, row_lse, a, target = ctx.saved_tensors
        arguments = SliceArguments(*tensors, *ctx.options)
        if a.numel():
            if arguments.each:
                q_heads = arguments.q.shape[1]
                grad = _per_head(grad / q_heads, q_heads)
            inputs = _loss_inputs(arguments, a, target)
            da = ctx.impl.alignment_grad(*inputs, grad.contiguous(), **ctx.loss_options._asdict()).view_as(a)
        else:
            da = a
        return (*slice_gradients(ctx.impl, arguments, row_lse, da, ctx.needs_input_grad), *(None,) * 9)


def _loss_inputs(arguments: SliceArguments, a: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The first four arguments of a backend's alignment_loss and alignment_grad."""
    row_valid, col_valid = _valid(arguments)
    target = target.to(torch.float32).contiguous()
    if arguments.each:
        q_heads = arguments.q.shape[1]
        row_valid, col_valid = _per_head(row_valid, q_heads), _per_head(col_valid, q_heads)
    return a.flatten(0, -3), target.flatten(0, -3), row_valid, col_valid


@torch._disable_dynamo  # it would unroll the loops of the torch backend and cannot see through the other two
def _apply(*inputs: Any) -> Tensor:
    return _AttentionAlignment.apply(*inputs)


def attention_alignment(
    q: Tensor,
    k: Tensor,
    target: Tensor,
    rows: Tensor,
    cols: Tensor,
    *,
    loss: str = "cosine",
    reduction: str = "row",
    sink_filter: bool = False,
    lse: Tensor | None = None,
    causal: bool = True,
    scale: float | None = None,
    key_mask: Tensor | None = None,
    heads: str = "mean",
    impl: str | None = None,
) -> Tensor:
    """Distance of A = attention_slice(q, k, rows, cols) from a target slice, per sample (paper 3.2).

    Args:
        target: the teacher's slice (B,R,V), or (B,Hq,R,V) for heads="each", any floating dtype. It is a constant and
            gets no gradient. Its values at padding are ignored.
        loss: "cosine" (1 - cos), "mse", or "kl" (target against student, both renormalised to sum one).
        reduction: what is compared: "row" each row, then the mean over rows; "matrix" the whole slice; "column" the
            mean over rows.
        sink_filter: with reduction="column", leave entries above mean + one standard deviation out of the mean (the
            authors' code); the filter itself carries no gradient.
        q, k, rows, cols, lse, causal, scale, key_mask, heads, impl: as in attention_slice.

    Returns:
        (B,) fp32, one loss per sample. A row that sees none of its columns counts as padding; a sample without rows or
        columns has loss 0 and gradient 0; a zero vector has cosine 0 and gives no gradient. For heads="each", the mean
        of the heads' losses. Never holds more than O(B*R*V). Differentiable once in q, k and lse.

    Raises:
        ValueError: as attention_slice, or target, loss, reduction or sink_filter is not one of the above.
    """
    arguments = slice_arguments(q, k, rows, cols, lse=lse, causal=causal, scale=scale, key_mask=key_mask, heads=heads)
    require_choice("loss", loss, LOSSES)
    require_choice("reduction", reduction, REDUCTIONS)
    require_bool("sink_filter", sink_filter)
    if sink_filter and reduction != "column":
        raise ValueError(f"sink_filter needs reduction='column', got reduction={reduction!r}")
    require_tensor("target", target)
    shape = (rows.shape[1], cols.shape[1])
    if arguments.each:
        require_shape("target", target, (*q.shape[:2], *shape), "B, Hq, R, V")
    else:
        require_shape("target", target, (q.shape[0], *shape), "B, R, V")
    if not target.is_floating_point():
        raise ValueError(f"target must have a floating dtype, got {target.dtype}")
    require_device("target", target, q.device)
    options = _LossOptions(loss, reduction, sink_filter)
    return _apply(*arguments, target.detach(), options, backend(impl, q))
