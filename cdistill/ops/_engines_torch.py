"""Attention engines that torch ships."""

from collections.abc import Iterator

import torch
from torch import Tensor

from cdistill.ops._dispatch import multiplies
from cdistill.ops._engine import AttentionEngine, refusal_on_cuda
from cdistill.ops._problem import AttentionProblem, Gradients


class TorchFlash(AttentionEngine):
    """torch's own flash attention: FlashAttention-2 on CUDA, and on the CPU one that takes key masks."""

    takes_dlse = False

    def refusal(self, problem: AttentionProblem) -> str | None:
        return None if problem.q.device.type == "cpu" else refusal_on_cuda(problem, width=256, capability=(8, 0))

    def forward(self, problem: AttentionProblem) -> tuple[Tensor, Tensor]:
        if problem.q.device.type == "cpu":
            return _cpu_forward(problem) if multiplies(problem.q.dtype) else _widened_forward(problem)
        out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(
            *problem.qkv, 0.0, problem.causal, False, scale=problem.scale
        )
        return out, lse

    def backward(
        self, problem: AttentionProblem, out: Tensor, dout: Tensor | None, dlse: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        if problem.q.device.type == "cpu":
            assert dout is not None
            backward = _cpu_backward if multiplies(problem.q.dtype) else _widened_backward
            return backward(problem, out, dout)
        q, k, v = problem.qkv
        T = q.shape[2]
        seed = q.new_empty(2, dtype=torch.uint64)  # of the dropout there is not
        return torch.ops.aten._scaled_dot_product_flash_attention_backward(
            *(dout, q, k, v, out, problem.lse, None, None, T, T, 0.0, problem.causal, seed, seed[:0]),
            scale=problem.scale,
        )


class TorchCudnn(AttentionEngine):
    """cuDNN's attention as torch ships it."""

    takes_dlse = False
    deterministic = False

    def refusal(self, problem: AttentionProblem) -> str | None:
        if problem.q.device.type == "cuda" and not torch.backends.cudnn.is_available():
            return "needs cuDNN, which this torch was built without"
        if problem.q.shape[2] == 1:
            return "needs more than one token"
        return refusal_on_cuda(problem, width=128, capability=(8, 0))

    def forward(self, problem: AttentionProblem) -> tuple[Tensor, Tensor]:
        out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
            *problem.qkv, None, True, 0.0, problem.causal, False, scale=problem.scale
        )
        return out, lse.view(problem.q.shape[:3])

    def backward(
        self, problem: AttentionProblem, out: Tensor, dout: Tensor | None, dlse: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = problem.qkv
        assert problem.lse is not None
        T = q.shape[2]
        seed = q.new_empty((), dtype=torch.int64)  # of the dropout there is not
        return torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
            *(dout, q, k, v, out, problem.lse[..., None], seed, seed, None, None, None, T, T, 0.0, problem.causal),
            scale=problem.scale,
        )


def _cpu_forward(problem: AttentionProblem) -> tuple[Tensor, Tensor]:
    q = problem.q
    if not q.numel():
        return torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)
    problem, affected = _finite(problem)
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        *_ungrouped(problem), 0.0, problem.causal, attn_mask=_mask(problem), scale=problem.scale
    )
    lse = lse.masked_fill(~_sees_key(problem), -torch.inf)
    if affected is not None:
        affected = affected & _sees_key(problem)
        out, lse = out.masked_fill(affected[..., None], torch.nan), lse.masked_fill(affected, torch.nan)
    return out, lse


def _cpu_backward(problem: AttentionProblem, out: Tensor, dout: Tensor) -> Gradients:
    q, k, v = problem.qkv
    if not q.numel():
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    problem, affected = _finite(problem)
    assert problem.lse is not None
    lse = problem.lse.masked_fill(problem.lse == -torch.inf, 0.0)
    if affected is not None:  # these rows give nothing to other tokens, unless their dout is not finite either
        lse = lse.masked_fill(affected, torch.inf)
        out = out.masked_fill(affected[..., None], 0.0)
    dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        *(dout, *_ungrouped(problem), out, lse, 0.0, problem.causal), attn_mask=_mask(problem), scale=problem.scale
    )
    if problem.group > 1:
        dk, dv = (g.float().unflatten(1, (k.shape[1], -1)).sum(2).to(g.dtype) for g in (dk, dv))
    return dq, dk, dv


def _widened(problem: AttentionProblem) -> Iterator[tuple[slice, slice, AttentionProblem]]:
    """For each key head: its query heads, itself, and their part of the problem in fp32."""
    q, k, v = problem.qkv
    for head in range(k.shape[1]):
        own, queries = slice(head, head + 1), slice(head * problem.group, (head + 1) * problem.group)
        lse = None if problem.lse is None else problem.lse[:, queries]
        part = problem._replace(q=q[:, queries].float(), k=k[:, own].float(), v=v[:, own].float(), lse=lse)
        yield queries, own, part


def _widened_forward(problem: AttentionProblem) -> tuple[Tensor, Tensor]:
    out = torch.empty_like(problem.q)
    lse = out.new_empty(out.shape[:3], dtype=torch.float32)
    for queries, _, part in _widened(problem):
        out[:, queries], lse[:, queries] = _cpu_forward(part)
    return out, lse


def _widened_backward(problem: AttentionProblem, out: Tensor, dout: Tensor) -> Gradients:
    dq, dk, dv = map(torch.empty_like, problem.qkv)
    for queries, own, part in _widened(problem):
        gradients = _cpu_backward(part, out[:, queries].float(), dout[:, queries].float())
        dq[:, queries], dk[:, own], dv[:, own] = gradients
    return dq, dk, dv


def _finite(problem: AttentionProblem) -> tuple[AttentionProblem, Tensor | None]:
    """The problem with zeros for inf and NaN, and which rows of out (B,Hq,T) would have had them; None if it has none.

    A block of torch's CPU kernel multiplies keys and values of the future by zero, and 0 * NaN would reach earlier rows.
    """
    if all(x.sum().isfinite() or x.isfinite().all() for x in problem.qkv):  # a sum takes a fortieth of the time
        return problem, None
    bad_q, bad_k, bad_v = (~x.isfinite().all(3) for x in problem.qkv)
    bad = bad_k | bad_v
    if problem.key_mask is not None:
        bad = bad & problem.key_mask[:, None]
    bad = (bad.cumsum(2) if problem.causal else bad.sum(2, keepdim=True).expand_as(bad)) > 0
    q, k, v = (x.nan_to_num(0.0, 0.0, 0.0) for x in problem.qkv)
    return problem._replace(q=q, k=k, v=v), bad_q | bad.repeat_interleave(problem.group, 1)


def _ungrouped(problem: AttentionProblem) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = problem.qkv
    if problem.group == 1:
        return q, k, v
    return q, k.repeat_interleave(problem.group, 1), v.repeat_interleave(problem.group, 1)


def _mask(problem: AttentionProblem) -> Tensor | None:
    if problem.key_mask is None:
        return None
    hidden = ~problem.key_mask[:, None, None]
    return torch.zeros_like(hidden, dtype=problem.q.dtype).masked_fill_(hidden, -torch.inf)


def _sees_key(problem: AttentionProblem) -> Tensor:
    key_mask = problem.key_mask
    if key_mask is None:
        return torch.ones(1, 1, 1, dtype=torch.bool, device=problem.q.device)
    keys_seen = key_mask.cumsum(1) if problem.causal else key_mask.sum(1, keepdim=True)
    return (keys_seen > 0)[:, None]
