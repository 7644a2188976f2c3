"""Flash attention that also returns its log-sum-exp, differentiable in both."""

from typing import Any

import torch
from torch import Tensor

from cdistill.ops._contract import attention_options, laid_out_like, positive_scale, require_attention_values
from cdistill.ops._dispatch import backend, save_for_backward, saved_for_backward, without_autocast
from cdistill.ops._engines import ENGINES, Attention, Engine
from cdistill.ops._engines import engine as named_engine

_IMPLS = {"triton": "triton", "torch": "torch_flash"}


def _engine(impl: str | None, engine: str | None, x: Attention) -> Engine:
    """The engine named, or behind ``impl``, or the first that can run here; raises ValueError saying why it cannot."""
    if engine is not None:
        return named_engine(engine, x)
    names = [impl] if impl is not None else ["triton", "torch"] if x.q.is_cuda else ["torch"]
    reasons = []
    for name in names:
        chosen = ENGINES[_IMPLS[name]]
        reason = chosen.missing() or chosen.refusal(x)
        if reason is None:
            return chosen
        reasons.append(f"impl={name!r} cannot run: {reason}")
    raise ValueError("; ".join(reasons))


@torch.library.custom_op("cdistill::flash_attention", mutates_args=())
@without_autocast
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    causal: bool,
    scale: float,
    impl: str | None,
    engine: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    x = Attention(q, k, v, key_mask, causal, scale)
    out, lse, split = _engine(impl, engine, x).forward_split(x)
    return laid_out_like(out, q), lse, q.new_empty(0, dtype=torch.float32) if split is None else split


@_forward.register_fake
def _(q, k, v, key_mask, causal, scale, impl, engine):
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    splits = _engine(impl, engine, Attention(q, k, v, key_mask, causal, scale)).SPLITS_LSE
    return torch.empty_like(q), lse, lse.new_empty((2, *lse.shape) if splits else 0)


@torch.library.custom_op("cdistill::flash_attention_backward", mutates_args=())
@without_autocast
def _backward(
    dout: Tensor | None,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
    split: Tensor,
    causal: bool,
    scale: float,
    impl: str | None,
    engine: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    x = Attention(q, k, v, key_mask, causal, scale)
    dlse = None if dlse is None else dlse.contiguous()
    chosen = _engine(impl, engine, x)
    dq, dk, dv = chosen.backward(x, out, split if chosen.SPLITS_LSE else lse, dout, dlse, None, backend(impl, q))
    return laid_out_like(dq, q), laid_out_like(dk, k), laid_out_like(dv, v)


@_backward.register_fake
def _(dout, dlse, q, k, v, *_):
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, causal, scale, impl, engine = inputs
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)
    save_for_backward(ctx, *tensors, *output)
    ctx.options = (causal, scale, impl, engine)


def _differentiate(ctx: Any, dout: Tensor | None, dlse: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if dout is None and dlse is None:
        return (None,) * 8
    grads = torch.ops.cdistill.flash_attention_backward(dout, dlse, *saved_for_backward(ctx), *ctx.options)
    return *grads, *(None,) * 5


torch.library.register_autograd("cdistill::flash_attention", _differentiate, setup_context=_save)


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
) -> tuple[Tensor, Tensor]:
    """softmax(scale * q k^T) v and the log-sum-exp of its rows, without the T x T matrix.

    Args:
        q: queries (B,Hq,T,D), fp16, bf16 or fp32, unit stride on D, D a multiple of 8 from 16 to 256.
        k, v: keys and values (B,Hkv,T,D) of the same dtype; Hkv divides Hq (grouped-query attention).
        causal: key j is visible to row i only if j <= i.
        scale: factor of the scores, 1/sqrt(D) by default.
        key_mask: (B,T) bool, True = real key; padding on either side is skipped block by block.
        impl: "triton" (own kernels), "torch" (torch's own flash attention; on CUDA fp16 and bf16 without key_mask), or
            None: "triton" on CUDA where it can run, else "torch".
        engine: in place of impl, any engine of `attention_with_alignment` by its name.

    Returns:
        out (B,Hq,T,D) in q's dtype, and lse (B,Hq,T) fp32, natural logarithm. A row that sees no key has out 0, lse -inf
        and no gradient. Differentiable once in q, k and v through both results; "triton" is deterministic.

    Raises:
        ValueError: an argument has a wrong shape, dtype, device or value, impl or engine cannot run here, or both are given.
    """
    key_mask, scale = attention_options(q, k, causal=causal, scale=scale, key_mask=key_mask)
    require_attention_values(v, k)
    if impl is not None and impl not in _IMPLS:
        raise ValueError(f"impl must be None, 'triton' or 'torch' (there is no C++ flash attention), got {impl!r}")
    if impl is not None and engine is not None:
        raise ValueError(f"impl {impl!r} and engine {engine!r} name the same choice: leave one of them out")
    q, scale = positive_scale(q, scale)
    return torch.ops.cdistill.flash_attention(q, k, v, key_mask, causal, scale, impl, engine)[:2]
