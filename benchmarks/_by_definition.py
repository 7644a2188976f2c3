"""Attention and its alignment loss by their definitions, to compare ops and contenders with."""

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks._contenders import Problem, row_cosine
from benchmarks._exactness import Results


def attention_by_definition(q, k, v, causal, key_mask):
    """out and lse with gradients; a row that sees no key has out 0 and lse 0."""
    group, T = q.shape[1] // k.shape[1], q.shape[2]
    seen = torch.ones(q.shape[0], 1, T, T, dtype=torch.bool, device=q.device)
    seen = seen.tril() if causal else seen
    seen = seen if key_mask is None else seen & key_mask[:, None, None]
    some = seen.any(-1, keepdim=True)
    s = (q @ k.repeat_interleave(group, 1).mT * q.shape[3] ** -0.5).masked_fill(~seen & some, -torch.inf)
    out = s.softmax(-1) @ v.repeat_interleave(group, 1)
    return out.masked_fill(~some, 0.0), s.logsumexp(-1).masked_fill(~some[..., 0], 0.0)


def rows_alone(p: Problem, dtype: torch.dtype) -> tuple[Results, Results]:
    """out at the rows, and all gradients for a dout that is zero at all others, of plain attention and with the losses.

    Head by head by its definition in ``dtype``, summed in fp32 or wider, so that it can be had at any size.
    """
    (B, Hq, _, D), group = p.q.shape, p.q.shape[1] // p.k.shape[1]
    wide = torch.promote_types(dtype, torch.float32)

    def head(b: int, h: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        q, k, v = p.q[b, h, p.rows[b]], p.k[b, h // group], p.v[b, h // group]
        q, k, v = (x.detach().to(dtype).requires_grad_() for x in (q, k, v))
        hidden = torch.arange(k.shape[0], device=k.device) > p.rows[b][:, None]
        return q, k, v, (q @ k.T * D**-0.5).masked_fill(hidden, -torch.inf).softmax(-1)

    a = torch.zeros_like(p.target, dtype=wide)
    with torch.no_grad():
        for b in range(B):
            for h in range(Hq):
                a[b] += head(b, h)[3].index_select(1, p.cols[b]) / Hq
    a = a.to(dtype).to(wide).requires_grad_()
    losses = row_cosine(a, p.target.to(wide))
    (da,) = torch.autograd.grad(losses, a, p.dlosses.to(wide))

    out = torch.empty(B, Hq, p.rows.shape[1], D, dtype=wide, device=p.q.device)
    sums = [torch.zeros(x, dtype=wide, device=p.q.device) for x in (out.shape, p.k.shape, p.v.shape)]
    added = [torch.zeros_like(x) for x in sums[:2]]
    for b in range(B):
        for h in range(Hq):
            q, k, v, probabilities = head(b, h)
            attended, dout = probabilities @ v, p.dout[b, h, p.rows[b]].to(dtype)
            out[b, h] = attended.detach()
            grads = torch.autograd.grad(attended, (q, k, v), dout, retain_graph=True)
            for x, grad in zip(sums, grads, strict=True):
                x[b, h if x is sums[0] else h // group] += grad
            seen = probabilities.index_select(1, p.cols[b])
            for x, grad in zip(added, torch.autograd.grad(seen, (q, k), (da[b] / Hq).to(dtype)), strict=True):
                x[b, h if x is added[0] else h // group] += grad
    dq, dk, dv = sums
    plain = {"out": out, "dq": dq, "dk": dk, "dv": dv}
    aligned = plain | {"losses": losses.detach(), "dq": dq + added[0], "dk": dk + added[1]}
    return tuple({n: x if n == "losses" else x.to(dtype) for n, x in r.items()} for r in (plain, aligned))


def at_rows(x: Tensor, rows: Tensor) -> Tensor:
    """x (B,H,T,D) at the rows (B,R): (B,H,R,D)."""
    return x.gather(2, rows[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))


def dout_at_rows(p: Problem) -> Tensor:
    """dout, zero outside the rows."""
    inside = torch.zeros(p.q.shape[0], p.q.shape[2], dtype=torch.bool, device=p.q.device).scatter_(1, p.rows, True)
    return p.dout * inside[:, None, :, None]


def results_of(run: Callable, p: Problem) -> Results:
    """What `rows_alone` defines, as ``run`` of a contender computes it."""
    out, losses = run(*p.inputs)
    outputs, grads = [out], [dout_at_rows(p)]
    if losses is not None:
        outputs, grads = [out, losses], [*grads, p.dlosses]
    dq, dk, dv = torch.autograd.grad(outputs, p.leaves, grads)
    found = {"out": at_rows(out.detach(), p.rows), "dq": at_rows(dq, p.rows), "dk": dk, "dv": dv}
    return found if losses is None else found | {"losses": losses.detach()}
