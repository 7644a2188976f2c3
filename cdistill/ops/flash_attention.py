"""Flash attention that also returns its log-sum-exp, differentiable in both."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cdistill.errors import InputError
from cdistill.ops._contract import attention_problem, gradients_like, laid_out_like, require_attention_values
from cdistill.ops._engine import AttentionEngine, attention_backward, attention_forward
from cdistill.ops._engines import ENGINES
from cdistill.ops._engines import engine as named_engine
from cdistill.ops._operators import differentiable, operator
from cdistill.ops._pieces import backend_of, for_pieces
from cdistill.ops._problem import OF_WHOLE, WHOLE, AttentionProblem, Gradients, problem_of

_IMPLS = {"triton": "triton", "torch": "torch_flash"}


def _engine(problem: AttentionProblem, impl: str | None, engine: str | None) -> AttentionEngine:
    """The engine named, or behind ``impl``, or the first that can run here; raises ValueError saying why it cannot."""
    if engine is not None:
        return named_engine(engine, problem)
    names = [impl] if impl is not None else ["triton", "torch"] if problem.q.is_cuda else ["torch"]
    reasons = []
    for name in names:
        chosen = for_pieces(ENGINES[_IMPLS[name]], problem)
        reason = chosen.missing() or chosen.refusal(problem)
        if reason is None:
            return chosen
        reasons.append(f"impl={name!r} cannot run: {reason}")
    raise InputError("; ".join(reasons))


@operator("flash_attention", f"{WHOLE}, str? impl, str? engine", 3)
def _forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    problem, choice = problem_of(arguments, OF_WHOLE)
    out, lse, split = attention_forward(_engine(problem, *choice), problem)
    return laid_out_like(out, problem.q), lse, lse.new_empty(0) if split is None else split


@_forward.register_fake
def _(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    problem, choice = problem_of(arguments, OF_WHOLE)
    q = problem.q
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    return torch.empty_like(q), lse, lse.new_empty((2, *lse.shape) if _engine(problem, *choice).SPLITS_LSE else 0)


@operator(
    "flash_attention_backward",
    f"Tensor? dout, Tensor? dlse, {WHOLE}, str? impl, str? engine, Tensor out, Tensor natural, Tensor split",
    3,
)
def _backward(dout: Tensor | None, dlse: Tensor | None, *arguments: Any) -> Gradients:
    problem, (impl, engine, out, natural, split) = problem_of(arguments, OF_WHOLE)
    chosen = _engine(problem, impl, engine)
    problem = problem._replace(lse=split if chosen.SPLITS_LSE else natural)
    return gradients_like(problem, *attention_backward(chosen, problem, out, dout, dlse, backend_of(impl, problem)))


@_backward.register_fake
def _(dout: Tensor | None, dlse: Tensor | None, *arguments: Any) -> Gradients:
    q, k, v = map(torch.empty_like, problem_of(arguments, OF_WHOLE)[0].qkv)
    return q, k, v


differentiable("flash_attention", leaves=("q", "k", "v"), results=2, keeps=[0, 1, 2])


def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    scale: float | None = None,
    key_mask: Tensor | None = None,
    impl: str | None = None,
    engine: str | None = None,
    cu_seqlens: Tensor | Sequence[int] | None = None,
) -> tuple[Tensor, Tensor]:
    """softmax(scale * q k^T) v and the log-sum-exp of its rows, without the T x T matrix.

    Args:
        q: queries (B,Hq,T,D), fp16, bf16 or fp32, unit stride on D, D a multiple of 8 from 16 to 256.
        k, v: keys and values (B,Hkv,T,D) of the same dtype; Hkv divides Hq (grouped-query attention). Where q has fewer
            tokens they are the last ones, as in attention_slice; engines get queries of zero in the place of the others.
        causal: key j is visible to row i only if j <= i.
        scale: factor of the scores, 1/sqrt(D) by default.
        key_mask: (B,T) bool, True = real key; padding on either side is skipped block by block.
        impl: "triton" (own kernels), "torch" (torch's own flash attention; on CUDA fp16 and bf16 without key_mask), or
            None: "triton" on CUDA where it can run, else "torch".
        engine: in place of impl, any engine of `attention_with_alignment` by its name.
        cu_seqlens: documents packed into one row, as in attention_slice.

    Returns:
        out (B,Hq,T,D) in q's dtype, and lse (B,Hq,T) fp32, natural logarithm. A row that sees no key has out 0, lse -inf
        and no gradient. Differentiable once in q, k and v through both results; "triton" is deterministic.

    Raises:
        ValueError: an argument has a wrong shape, dtype, device or value, impl or engine cannot run here, or both are given.
    """
    problem = attention_problem(q, k, v, causal=causal, scale=scale, key_mask=key_mask, cu_seqlens=cu_seqlens)
    require_attention_values(problem)
    if impl is not None and impl not in _IMPLS:
        raise InputError(f"impl must be None, 'triton' or 'torch' (there is no C++ flash attention), got {impl!r}")
    if impl is not None and engine is not None:
        raise InputError(f"impl {impl!r} and engine {engine!r} name the same choice: leave one of them out")
    return torch.ops.cdistill.flash_attention(*problem[:OF_WHOLE], impl, engine)[:2]
