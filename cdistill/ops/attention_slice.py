"""The visual attention slice A = P[rows, cols] of a causal (or full) softmax attention, without the T x T matrix."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from cdistill.ops._contract import SliceArguments, slice_arguments
from cdistill.ops._dispatch import Backend, backend


def _gather_lse(arguments: SliceArguments) -> Tensor:
    """Caller's lse (B,Hq,T) at the rows, (B,Hq,R); +inf where a row is padding or sees no key, so that P is 0 there."""
    lse, rows, key_mask = arguments.lse, arguments.rows, arguments.key_mask
    assert lse is not None
    index = rows.clamp(min=0).long()
    sees_key = rows >= 0
    if key_mask is not None:
        keys_seen = key_mask.cumsum(1) if arguments.causal else key_mask.sum(1, keepdim=True).expand_as(key_mask)
        sees_key = sees_key & (keys_seen.gather(1, index) > 0)
    picked = lse.gather(2, index[:, None].expand(-1, lse.shape[1], -1))
    return picked.masked_fill_(~sees_key[:, None], torch.inf)


def slice_with_lse(impl: Backend, arguments: SliceArguments) -> tuple[Tensor, Tensor]:
    """Slice (B,R,V) or (B,Hq,R,V) and the row LSE (B,Hq,R) its backward needs."""
    q, k, lse, rows, cols, key_mask, causal, scale, each = arguments
    batch, q_heads, _, _ = q.shape
    if 0 in (batch, rows.shape[1], cols.shape[1]):
        heads = (q_heads,) if each else ()
        empty = q.new_zeros((batch, *heads, rows.shape[1], cols.shape[1]), dtype=torch.float32)
        return empty, q.new_full((batch, q_heads, rows.shape[1]), torch.inf, dtype=torch.float32)
    row_lse = (
        impl.row_lse(q, k, rows, causal=causal, scale=scale, key_mask=key_mask)
        if lse is None
        else _gather_lse(arguments)
    )
    return (
        impl.slice_forward(q, k, row_lse, rows, cols, causal=causal, scale=scale, key_mask=key_mask, each=each),
        row_lse,
    )


def slice_gradients(
    impl: Backend, arguments: SliceArguments, row_lse: Tensor, grad: Tensor, needs_input_grad: tuple[bool, ...]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of q, k and lse for the gradient of the slice; None for those that are not needed.

    Without a caller's lse the softmax denominator belongs to the op, so its gradient reaches all visible keys here.
    """
    q, k, lse, rows, cols, key_mask, causal, scale, each = arguments
    needs_q, needs_k, needs_lse = needs_input_grad[:3]
    dq = torch.zeros(q.shape, dtype=torch.float32, device=q.device)
    dk = torch.zeros(k.shape, dtype=torch.float32, device=k.device)
    if grad.numel():
        dlse = impl.slice_backward(
            q, k, row_lse, rows, cols, grad, dq, dk, causal=causal, scale=scale, key_mask=key_mask, each=each
        )
    else:
        dlse = torch.zeros_like(row_lse)
    if lse is None and grad.numel():
        impl.row_lse_backward(q, k, row_lse, rows, dlse, dq, dk, causal=causal, scale=scale, key_mask=key_mask)
    dlse_all = None
    if needs_lse:
        assert lse is not None
        index = rows.clamp(min=0).long()[:, None].expand_as(dlse)
        dlse_all = torch.zeros(lse.shape, dtype=torch.float32, device=q.device).scatter_add_(2, index, dlse)
    return dq.to(q.dtype) if needs_q else None, dk.to(k.dtype) if needs_k else None, dlse_all


class _AttentionSlice(torch.autograd.Function):
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
        impl: Backend,
    ) -> Tensor:
        a, row_lse = slice_with_lse(impl, SliceArguments(q, k, lse, rows, cols, key_mask, causal, scale, each))
        ctx.save_for_backward(q, k, lse, rows, cols, key_mask, row_lse)
        ctx.options = (causal, scale, each)
        ctx.impl = impl
        return a

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, row_lse = ctx.saved_tensors
        arguments = SliceArguments(*tensors, *ctx.options)
        return (
            *slice_gradients(ctx.impl, arguments, row_lse, grad.contiguous(), ctx.needs_input_grad),
            *(None,) * 7,
        )


@torch._disable_dynamo  # it would unroll the loops of the torch backend and cannot see through the other two
def _apply(*inputs: Any) -> Tensor:
    return _AttentionSlice.apply(*inputs)


def attention_slice(
    q: Tensor,
    k: Tensor,
    rows: Tensor,
    cols: Tensor,
    *,
    lse: Tensor | None = None,
    causal: bool = True,
    scale: float | None = None,
    key_mask: Tensor | None = None,
    heads: str = "mean",
    impl: str | None = None,
) -> Tensor:
    """Attention probabilities of some query rows on some key columns, normalised over all keys (SPEC A^l, paper 3.2).

    Args:
        q: queries (B,Hq,T,D), fp16, bf16 or fp32, unit stride on D, D a multiple of 8 from 16 to 256.
        k: keys (B,Hkv,T,D) of the same dtype; Hkv divides Hq (grouped-query attention).
        rows: query positions (B,R), integer, distinct within a sample, -1 = padding.
        cols: key positions (B,V), likewise.
        lse: natural log of the softmax denominators (B,Hq,T) fp32, as flash attention returns them. Without it the op
            computes them for its rows. With it, gradients flow to q and k through the numerator and to lse.
        causal: key j is visible to row i only if j <= i.
        scale: factor of the scores, 1/sqrt(D) by default.
        key_mask: (B,T) bool, True = real key.
        heads: "mean" over the query heads, or "each".
        impl: "torch", "cpp", "triton", or None to choose by device.

    Returns:
        (B,R,V) fp32, or (B,Hq,R,V) for heads="each"; zero at padding and where causality or key_mask hides the key.
        Differentiable once in q, k and lse; the gradient of padding is exactly zero.

    Raises:
        ValueError: an argument has a wrong shape, dtype, device or value, or impl cannot run here. On CUDA the values
            of rows and cols are checked by a device-side assertion instead, because reading them would synchronise.
    """
    arguments = slice_arguments(q, k, rows, cols, lse=lse, causal=causal, scale=scale, key_mask=key_mask, heads=heads)
    return _apply(*arguments, backend(impl, q))
