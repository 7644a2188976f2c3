"""Attention and the visual attention alignment of its probabilities, in one forward and one backward pass.

Forward: the engine's flash attention, then the slice at the rows and columns from its log-sum-exp. Backward: the slice's
gradient gives dlse; the engine's backward takes it along, which carries the gradient through the softmax denominator to
all keys for free; the rest is added to its dq and dk in place. Besides what attention needs there live the slice, its
gradient, and, with Triton, dq of the rows.
"""

from typing import Any

import torch
from torch import Tensor

from cdistill.ops._contract import (
    SliceArguments,
    laid_out_like,
    require_attention_values,
    require_loss,
    require_target,
    slice_arguments,
)
from cdistill.ops._dispatch import backend, save_for_backward, saved_for_backward, without_autocast
from cdistill.ops._engines import Attention, engine
from cdistill.ops.attention_alignment import Alignment
from cdistill.ops.attention_slice import checked_regions


@torch.library.custom_op("cdistill::attention_with_alignment", mutates_args=())
@without_autocast
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rows: Tensor,
    cols: Tensor,
    key_mask: Tensor | None,
    target: Tensor,
    causal: bool,
    scale: float,
    each: bool,
    loss: str,
    reduction: str,
    sink_filter: bool,
    impl: str | None,
    engine_name: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    x = Attention(q, k, v, key_mask, causal, scale)
    chosen = backend(impl, q)
    attention = engine(engine_name, x)
    arguments = SliceArguments(q, k, None, rows, cols, key_mask, causal, scale, each)
    row_valid, col_valid = checked_regions(chosen, arguments)
    out, lse, split = attention.forward_split(x)
    if chosen.SPLITS_LSE and split is not None:
        lse = split
    alignment = Alignment(target, row_valid, col_valid, loss, reduction, sink_filter)
    losses, kept, _ = alignment.forward(chosen, arguments._replace(lse=lse))
    return laid_out_like(out, q), losses, lse, kept, row_valid, col_valid


@_forward.register_fake
def _(q, k, v, rows, cols, key_mask, target, causal, scale, each, loss, reduction, sink_filter, impl, engine_name):
    row_valid, col_valid = (x.new_empty(x.shape, dtype=torch.bool) for x in (rows, cols))
    alignment = Alignment(target, row_valid, col_valid, loss, reduction, sink_filter)
    arguments = SliceArguments(q, k, None, rows, cols, key_mask, causal, scale, each)
    split = engine(engine_name, Attention(q, k, v, key_mask, causal, scale)).SPLITS_LSE and backend(impl, q).SPLITS_LSE
    lse = q.new_empty((*(2,) * split, *q.shape[:3]), dtype=torch.float32)
    kept = lse.new_empty(alignment.kept_shape(backend(impl, q), arguments))
    return torch.empty_like(q), lse.new_empty(q.shape[0]), lse, kept, row_valid, col_valid


@torch.library.custom_op("cdistill::attention_with_alignment_backward", mutates_args=())
@without_autocast
def _backward(
    dout: Tensor | None,
    dloss: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rows: Tensor,
    cols: Tensor,
    key_mask: Tensor | None,
    target: Tensor,
    out: Tensor,
    lse: Tensor,
    kept: Tensor,
    row_valid: Tensor,
    col_valid: Tensor,
    causal: bool,
    scale: float,
    each: bool,
    loss: str,
    reduction: str,
    sink_filter: bool,
    impl: str | None,
    engine_name: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    x = Attention(q, k, v, key_mask, causal, scale)
    attention = engine(engine_name, x)
    arguments = SliceArguments(q, k, lse, rows, cols, key_mask, causal, scale, each)
    chosen = backend(impl, q)
    dv: Tensor | None = None
    if dloss is None or arguments.empty:
        dq, dk, dv = attention.backward(x, out, lse, dout, None, None, chosen)
        return laid_out_like(dq, q), laid_out_like(dk, k), laid_out_like(dv, v)
    alignment = Alignment(target, row_valid, col_valid, loss, reduction, sink_filter)

    def through_attention(dlse: Tensor) -> tuple[Tensor, Tensor]:
        nonlocal dv
        dq, dk, dv = attention.backward(x, out, lse, dout, dlse, rows, chosen)
        return dq, dk

    dq, dk, _ = alignment.backward(chosen, arguments, lse, kept, dloss, through_attention)
    assert dv is not None
    return laid_out_like(dq, q), laid_out_like(dk, k), laid_out_like(dv, v)


@_backward.register_fake
def _(dout, dloss, q, k, v, *_):
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    out, _, *intermediate = output
    ctx.mark_non_differentiable(*intermediate)
    ctx.set_materialize_grads(False)
    save_for_backward(ctx, *inputs[:7], out, *intermediate)
    ctx.options = inputs[7:]


def _differentiate(ctx: Any, dout: Tensor | None, dloss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if dout is None and dloss is None:
        return (None,) * 15
    grads = torch.ops.cdistill.attention_with_alignment_backward(dout, dloss, *saved_for_backward(ctx), *ctx.options)
    return *grads, *(None,) * 12


torch.library.register_autograd("cdistill::attention_with_alignment", _differentiate, setup_context=_save)


def attention_with_alignment(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    target: Tensor,
    rows: Tensor,
    cols: Tensor,
    *,
    loss: str = "cosine",
    reduction: str = "row",
    sink_filter: bool = False,
    causal: bool = True,
    scale: float | None = None,
    key_mask: Tensor | None = None,
    heads: str = "mean",
    impl: str | None = None,
    engine: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention output, and the distance of its probabilities at (rows, cols) from a target slice (VAT, paper 3.2).

    Same results as `flash_attention` and `attention_alignment` one after the other, in less time and memory.

    Args:
        q, k, v: (B,Hq,T,D), (B,Hkv,T,D), (B,Hkv,T,D), as in flash_attention.
        target, rows, cols, loss, reduction, sink_filter, heads: as in attention_alignment.
        causal, scale, key_mask: as in flash_attention.
        impl: who computes the slice: "torch", "cpp", "triton", or None to choose by device.
        engine: who computes attention: "triton" (own kernels), "torch_flash", "torch_cudnn", "flash_attn_2",
            "flash_attn_3", "flash_attn_4", or None for the fastest one that is there (a deterministic one only if
            torch.use_deterministic_algorithms is on). Only "triton", and "torch_flash" on
            the CPU, take a key_mask.

    Returns:
        out (B,Hq,T,D) in q's dtype, and the losses (B,) fp32. Differentiable once in q, k and v through both.

    Raises:
        ValueError: an argument has a wrong shape, dtype, device or value, or impl or engine cannot run here. On CUDA the
            values of rows and cols are checked by a device-side assertion instead, because reading them would synchronise.
    """
    arguments = slice_arguments(q, k, rows, cols, lse=None, causal=causal, scale=scale, key_mask=key_mask, heads=heads)
    require_attention_values(v, k)
    require_loss(loss, reduction, sink_filter)
    require_target(target, q, rows, cols, heads)
    q, k, _, rows, cols, key_mask, causal, scale, each = arguments
    out, losses, *_ = torch.ops.cdistill.attention_with_alignment(
        *(q, k, v, rows, cols, key_mask, target.detach()),
        *(causal, scale, each, loss, reduction, sink_filter, impl, engine),
    )
    return out, losses
