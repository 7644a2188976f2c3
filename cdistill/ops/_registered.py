"""Attention engines of other packages: their results are checked, and each proves itself before the first one is used."""

import torch
from torch import Tensor

from cdistill.errors import InputError
from cdistill.ops._engine import AttentionEngine
from cdistill.ops._problem import AttentionProblem, Gradients

TOKENS = 128  # of the problem that an engine is tried on
MOST_ERROR = 0.05  # relative to the largest value: far from what rounding does, and from what a wrong formula gives


class Registered(AttentionEngine):
    """An engine by the name it was registered with.

    On each device, and for each dtype, head dim and kind of problem it first computes a small one, which is compared with
    float64: an lse of base 2, or without the scale, would give wrong losses and no error.
    """

    def __init__(self, name: str, engine: AttentionEngine):
        self._name, self._engine = name, engine
        self.takes_dlse, self.deterministic = engine.takes_dlse, engine.deterministic
        self._proved: set[tuple] = set()

    def missing(self) -> str | None:
        return self._engine.missing()

    def refusal(self, problem: AttentionProblem) -> str | None:
        return self._engine.refusal(problem)

    def forward(self, problem: AttentionProblem) -> tuple[Tensor, Tensor]:
        q = problem.q
        kind = (q.device, q.dtype, q.shape[3], problem.group, problem.causal, problem.key_mask is None)
        if kind not in self._proved:
            self._prove(problem)
            self._proved.add(kind)
        out, lse = self._engine.forward(problem)
        self._require("out", out, q.shape, q)
        self._require("lse", lse, q.shape[:3], q, torch.float32)
        return out, lse

    def backward(self, problem: AttentionProblem, out: Tensor, dout: Tensor | None, dlse: Tensor | None) -> Gradients:
        dq, dk, dv = self._engine.backward(problem, out, dout, dlse)
        for name, x, like in zip(("dq", "dk", "dv"), (dq, dk, dv), problem.qkv, strict=True):
            self._require(name, x, like.shape, like)
        return dq, dk, dv

    def _require(self, name: str, x: Tensor, shape: torch.Size, like: Tensor, dtype: torch.dtype | None = None) -> None:
        """Raise ValueError unless a result has this shape, this dtype or that of ``like``, and its device."""
        dtype = dtype or like.dtype
        if not isinstance(x, Tensor) or x.shape != shape or x.dtype != dtype or x.device != like.device:
            got = f"{x.dtype} {tuple(x.shape)} on {x.device}" if isinstance(x, Tensor) else type(x).__name__
            wanted = f"{dtype} {tuple(shape)} on {like.device}"
            raise InputError(f"attention engine {self._name!r} must return {name} as {wanted}, got {got}")

    def _prove(self, like: AttentionProblem) -> None:
        """Raise ValueError unless a small problem like this one is computed right; nothing if the engine refuses it."""
        generator = torch.Generator().manual_seed(0)

        def normal(heads: int, *width: int) -> Tensor:
            return torch.randn(1, heads, TOKENS, *width, generator=generator).to(like.q.device)

        group, width = like.group, like.q.shape[3]
        q, k, v, dout = (normal(heads, width).to(like.q.dtype) for heads in (2 * group, 2, 2, 2 * group))
        mask = None if like.key_mask is None else torch.arange(TOKENS, device=q.device)[None] >= 3
        small = AttentionProblem(q, k, v, key_mask=mask, causal=like.causal, scale=1.5 * width**-0.5)
        if self._engine.refusal(small) is not None:
            return
        out, lse = self._engine.forward(small)
        self._require("out", out, q.shape, q)
        self._require("lse", lse, q.shape[:3], q, torch.float32)
        dlse = normal(2 * group) if self.takes_dlse else None
        gradients = self.backward(small._replace(lse=lse.contiguous()), out, dout, dlse)
        for name, x, exact in zip(
            ("out", "lse", "dq", "dk", "dv"), (out, lse, *gradients), _definition(small, dout, dlse), strict=True
        ):
            error = torch.where(x == exact, 0.0, (x - exact).abs()).max() / exact[exact.isfinite()].abs().max()
            if not error <= MOST_ERROR:
                raise InputError(
                    f"attention engine {self._name!r} computes a wrong {name}: {float(error):.2g} of the largest value off "
                    f"on {TOKENS} tokens; cdistill.ops.AttentionEngine says what it must be"
                )


def _definition(problem: AttentionProblem, dout: Tensor, dlse: Tensor | None) -> tuple[Tensor, ...]:
    """out, lse, dq, dk and dv in float64."""
    q, k, v = (x.double() for x in problem.qkv)
    k, v, dout = k.repeat_interleave(problem.group, 1), v.repeat_interleave(problem.group, 1), dout.double()
    seen = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device)
    seen = (seen.tril() if problem.causal else seen)[None, None]
    if problem.key_mask is not None:
        seen = seen & problem.key_mask[:, None, None]
    scores = (problem.scale * q @ k.mT).masked_fill(~seen, -torch.inf)
    lse = scores.logsumexp(-1)
    p = (scores - lse.masked_fill(lse == -torch.inf, torch.inf)[..., None]).exp()
    out = p @ v
    slope = dout @ v.mT - (dout * out).sum(-1, keepdim=True)
    ds = problem.scale * p * (slope if dlse is None else slope + dlse[..., None])
    dk, dv = (x.unflatten(1, (-1, problem.group)).sum(2) for x in (ds.mT @ q, p.mT @ dout))
    return out, lse, ds @ k, dk, dv
