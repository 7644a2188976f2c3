"""Attention and the visual attention alignment of its probabilities, in one forward and one backward pass.

Forward: the engine's flash attention, then the slice at the rows and columns from its log-sum-exp. Backward: the slice's
gradient gives dlse; the engine's backward takes it along, which carries the gradient through the softmax denominator to
all keys for free; the rest is added to its dq and dk in place. Besides what attention needs there live the slice, its
gradient, and, with Triton, dq of the rows.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cdistill.ops._contract import (
    attention_problem,
    gradients_like,
    laid_out_like,
    require_attention_values,
    require_loss,
    require_target,
)
from cdistill.ops._engine import attention_backward, attention_forward
from cdistill.ops._engines import engine as named_engine
from cdistill.ops._operators import differentiable, operator
from cdistill.ops._pieces import backend_of
from cdistill.ops._pipeline import checked_regions, kept_shape, losses_backward, losses_forward
from cdistill.ops._problem import COMPARISON, PROBLEM, Comparison, Gradients, problem_of

_ARGUMENTS = f"{PROBLEM}, {COMPARISON}, str? impl, str? engine"


@operator("attention_with_alignment", _ARGUMENTS, 6)
def _forward(*arguments: Any) -> tuple[Tensor, ...]:
    problem, (*how, impl, engine) = problem_of(arguments)
    chosen, attention = backend_of(impl, problem), named_engine(engine, problem)
    regions = checked_regions(chosen, problem)
    out, lse, split = attention_forward(attention, problem)
    if chosen.SPLITS_LSE and split is not None:
        lse = split
    losses, kept, _ = losses_forward(chosen, problem._replace(lse=lse), Comparison(*regions, *how))
    return laid_out_like(out, problem.q), losses, lse, kept, *regions


@_forward.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    problem, (*how, impl, engine) = problem_of(arguments)
    chosen, q = backend_of(impl, problem), problem.q
    rows, cols = problem.positions
    regions = torch.empty_like(rows, dtype=torch.bool), torch.empty_like(cols, dtype=torch.bool)
    split = named_engine(engine, problem).SPLITS_LSE and chosen.SPLITS_LSE
    lse = q.new_empty((*(2,) * split, *q.shape[:3]), dtype=torch.float32)
    kept = lse.new_empty(kept_shape(chosen, problem, Comparison(*regions, *how)))
    return torch.empty_like(q), lse.new_empty(q.shape[0]), lse, kept, *regions


@operator(
    "attention_with_alignment_backward",
    f"Tensor? dout, Tensor? dloss, {_ARGUMENTS}, Tensor out, Tensor own_lse, Tensor kept, Tensor row_valid, Tensor col_valid",
    3,
)
def _backward(dout: Tensor | None, dloss: Tensor | None, *arguments: Any) -> Gradients:
    problem, (*how, impl, engine, out, lse, kept, row_valid, col_valid) = problem_of(arguments)
    chosen, attention = backend_of(impl, problem), named_engine(engine, problem)
    problem = problem._replace(lse=lse)
    if dloss is None or problem.empty:
        return gradients_like(problem, *attention_backward(attention, problem, out, dout, None, chosen))
    of_values: list[Tensor] = []

    def through_attention(dlse: Tensor) -> tuple[Tensor, Tensor]:
        dq, dk, dv = attention_backward(attention, problem, out, dout, dlse, chosen)
        of_values.append(dv)
        return dq, dk

    compared = Comparison(row_valid, col_valid, *how)
    dq, dk, _ = losses_backward(chosen, problem, compared, lse, kept, dloss, through_attention)
    return gradients_like(problem, dq, dk, *of_values)


@_backward.register_fake
def _(dout: Tensor | None, dloss: Tensor | None, *arguments: Any) -> Gradients:
    q, k, v = map(torch.empty_like, problem_of(arguments)[0].qkv)
    return q, k, v


differentiable("attention_with_alignment", leaves=("q", "k", "v"), results=2, keeps=[0, 2, 3, 4, 5])


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
    cu_seqlens: Tensor | Sequence[int] | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention output, and the distance of its probabilities at (rows, cols) from a target slice (VAT, paper 3.2).

    Same results as `flash_attention` and `attention_alignment` one after the other, in less time and memory.

    Args:
        q, k, v: (B,Hq,T,D), (B,Hkv,T,D), (B,Hkv,T,D), as in flash_attention.
        target, rows, cols, loss, reduction, sink_filter, heads: as in attention_alignment.
        causal, scale, key_mask, cu_seqlens: as in flash_attention.
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
    options: dict[str, Any] = {"causal": causal, "scale": scale, "key_mask": key_mask, "heads": heads}
    problem = attention_problem(q, k, v, (rows, cols), cu_seqlens=cu_seqlens, **options)
    require_attention_values(problem)
    require_loss(loss, reduction, sink_filter)
    require_target(target, problem)
    compared = (target.detach(), loss, reduction, sink_filter)
    out, losses, *_ = torch.ops.cdistill.attention_with_alignment(*problem, *compared, impl, engine)
    return out, losses
