"""The visual attention slice A = P[rows, cols] of a causal (or full) softmax attention, without the T x T matrix."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cdistill.ops._contract import attention_problem, require_sums
from cdistill.ops._operators import differentiable, operator
from cdistill.ops._pieces import backend_of
from cdistill.ops._pipeline import (
    checked_regions,
    empty_own_lse,
    empty_slice_gradients,
    slice_backward,
    slice_forward,
    slice_gradients,
    with_lse,
)
from cdistill.ops._problem import PROBLEM, Gradients, problem_of


@operator("attention_slice", f"{PROBLEM}, str? impl", 2)
def _forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    problem, (impl,) = problem_of(arguments)
    chosen = backend_of(impl, problem)
    checked_regions(chosen, problem)
    return slice_forward(chosen, problem)


@_forward.register_fake
def _(*arguments: Any) -> tuple[Tensor, Tensor]:
    problem, (impl,) = problem_of(arguments)
    a = problem.q.new_empty(problem.slice_shape, dtype=torch.float32)
    return a, empty_own_lse(backend_of(impl, problem), problem)


@operator("attention_slice_backward", f"Tensor grad, {PROBLEM}, str? impl, Tensor own_lse", 3)
def _backward(grad: Tensor, *arguments: Any) -> Gradients:
    problem, (impl, own_lse) = problem_of(arguments)
    chosen = backend_of(impl, problem)
    return slice_gradients(problem, lambda: slice_backward(chosen, problem, own_lse, grad))


@_backward.register_fake
def _(grad: Tensor, *arguments: Any) -> Gradients:
    return empty_slice_gradients(problem_of(arguments)[0])


differentiable("attention_slice", leaves=("q", "k", "lse"), results=1, keeps=[1])


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
    cu_seqlens: Tensor | Sequence[int] | None = None,
) -> Tensor:
    """Attention probabilities of some query rows on some key columns, normalised over all keys (SPEC A^l, paper 3.2).

    Args:
        q: queries (B,Hq,T,D), fp16, bf16 or fp32, unit stride on D, D a multiple of 8 from 16 to 256.
        k: keys (B,Hkv,T,D) of the same dtype; Hkv divides Hq (grouped-query attention). Where q has fewer tokens, as with a
            cache or a prompt in chunks, they are the last ones: the last query is at the last key.
        rows: query positions (B,R) among the keys, integer, distinct within a sample, -1 = padding.
        cols: key positions (B,V), likewise.
        lse: natural log of every query's softmax denominator (B,Hq,T) fp32, as flash attention returns them. Without it
            the op computes them for its rows. With it, gradients flow to q and k through the numerator and to lse.
        causal: key j is visible to row i only if j <= i.
        scale: factor of the scores, 1/sqrt(D) by default.
        key_mask: (B,T) bool, True = real key.
        heads: "mean" over the query heads, or "each".
        impl: "torch", "cpp", "triton", or None to choose by device.
        cu_seqlens: documents packed into one row (B = 1) see themselves alone: the (S+1,) positions where they begin, and T,
            int32 as flash attention takes them, or a list of ints. On CUDA reading a tensor synchronises; one on the CPU, or
            a list, does not. Each document is a call of its own, on views.

    Returns:
        (B,R,V) fp32, or (B,Hq,R,V) for heads="each"; zero at padding and where causality, key_mask or documents hide the
        key.
        Differentiable once in q, k and lse; the gradient of padding is exactly zero.

    Raises:
        ValueError: an argument has a wrong shape, dtype, device or value, or impl cannot run here. On CUDA the values
            of rows and cols are checked by a device-side assertion instead, because reading them would synchronise.
    """
    options: dict[str, Any] = {"causal": causal, "scale": scale, "key_mask": key_mask, "heads": heads}
    problem = attention_problem(q, k, None, (rows, cols), lse=lse, cu_seqlens=cu_seqlens, **options)
    return torch.ops.cdistill.attention_slice(*problem, impl)[0]


@operator("attention_slice_accumulate", f"{PROBLEM}, Tensor(a!) sums, int[] windows, str? impl", 0)
def _accumulate(*arguments: Any) -> None:
    problem, (sums, windows, impl) = problem_of(arguments)
    chosen = backend_of(impl, problem)
    checked_regions(chosen, problem)
    if not sums.numel() or not windows:
        return
    torch.autograd.graph.increment_version(sums)
    if chosen.FUSES_ACCUMULATION:
        chosen.slice_accumulate(with_lse(chosen, problem)[0], sums, list(windows))
        return
    a, _ = slice_forward(chosen, problem)
    for w in windows:
        sums[w] += a


@_accumulate.register_fake
def _(*arguments: Any) -> None:
    return None


@torch.no_grad()
def attention_slice_accumulate(
    q: Tensor,
    k: Tensor,
    rows: Tensor,
    cols: Tensor,
    sums: Tensor,
    windows: Sequence[int],
    *,
    lse: Tensor | None = None,
    causal: bool = True,
    scale: float | None = None,
    key_mask: Tensor | None = None,
    heads: str = "mean",
    impl: str | None = None,
    cu_seqlens: Tensor | Sequence[int] | None = None,
) -> None:
    """Add a layer's slice to the sums of the windows it belongs to (teacher side of VAT, paper section 4.1, equation 2).

    The slice itself is never stored by ``impl="triton"``: one launch adds it to all its windows.

    Args:
        sums: (W,B,R,V), or (W,B,Hq,R,V) for heads="each", fp16, bf16 or fp32, contiguous; changed in place.
        windows: indices into ``sums``, each at most once.
        q, k, rows, cols, lse, causal, scale, key_mask, heads, impl, cu_seqlens: as in attention_slice. No gradient is kept.

    Raises:
        ValueError: as attention_slice, or sums or windows do not fit.
    """
    options: dict[str, Any] = {"causal": causal, "scale": scale, "key_mask": key_mask, "heads": heads}
    problem = attention_problem(q, k, None, (rows, cols), lse=lse, cu_seqlens=cu_seqlens, **options)
    require_sums(sums, windows, problem)
    torch.ops.cdistill.attention_slice_accumulate(*problem, sums, list(windows), impl)
