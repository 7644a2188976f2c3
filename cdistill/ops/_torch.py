"""The primitives of the ops in eager torch: one head and one block of rows at a time, in place, on any device.

No (rows, T) block of scores exceeds BLOCK_BYTES, the (B,R,V) slice is the only buffer of its size in the slice
primitives, and there is none per head unless the result has one.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from cdistill.ops._problem import AttentionProblem, Base, Gradients
from cdistill.ops._rows import at_rows, fold_dlse, lse_at_rows, regions, to_rows, unfold_dlse
from cdistill.ops._torch_losses import alignment_grad, alignment_loss, vocabulary_losses

__all__ = [
    "alignment_grad",
    "alignment_loss",
    "fold_dlse",
    "regions",
    "row_lse",
    "row_lse_backward",
    "slice_backward",
    "slice_forward",
    "unfold_dlse",
    "vocabulary_losses",
]

SPLITS_LSE = FUSES_DENOMINATOR = FUSES_HEAD_COSINE = FUSES_ACCUMULATION = False
TAKES_FEWER_QUERIES = HAS_REVERSE_KL = True

BLOCK_BYTES = 16 * 2**20


def _row_blocks(batch: int, rows: int, keys: int) -> Iterator[slice]:
    """Slices of the R axis for which a (B, rows, keys) block of fp32 scores stays under BLOCK_BYTES."""
    step = max(1, BLOCK_BYTES // max(4 * batch * keys, 1))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def _gather(x: Tensor, positions: Tensor) -> Tensor:
    """Vectors of x (B,T,D) at positions (B,N) as fp32 (B,N,D); padding gives those of position 0."""
    index = positions.clamp(min=0).long()
    return x.gather(1, index[:, :, None].expand(-1, -1, x.shape[2])).float()


def _scatter_add(x: Tensor, positions: Tensor, values: Tensor) -> None:
    """Add values (B,N,D) to x (B,T,D) at distinct positions (B,N); the values of padding must be zero."""
    index = positions.clamp(min=0).long()
    x.scatter_add_(1, index[:, :, None].expand_as(values), values)


def _hidden(problem: AttentionProblem, rows: Tensor, keys: Tensor) -> Tensor:
    """Where a row (B,R) does not see a key position (B,N), by padding, causality or key mask: (B,R,N) bool."""
    seen = keys >= 0
    if problem.key_mask is not None:
        seen = seen & problem.key_mask.gather(1, keys.clamp(min=0).long())
    visible = (rows >= 0)[:, :, None] & seen[:, None]
    if problem.causal:
        visible &= keys[:, None] <= rows[:, :, None]
    return visible.logical_not_()


def _finite(x: Tensor) -> Tensor:
    """x with zero for inf and NaN, in products with dS: what a row does not see must not reach it as 0 * NaN.

    What it does see reaches it through dS.
    """
    return x.nan_to_num(0.0, 0.0, 0.0)


def _fp32_zeros(x: Tensor) -> Tensor:
    return torch.zeros(x.shape, dtype=torch.float32, device=x.device)


def _all_keys(k: Tensor) -> Tensor:
    return torch.arange(k.shape[2], dtype=torch.int32, device=k.device).expand(k.shape[0], -1)


def row_lse(problem: AttentionProblem) -> Tensor:
    """log sum exp(scale * q.k) over all visible keys, (B,Hq,T), written at the rows; +inf for a row without keys.

    NaN for a row with a score of +inf, or of nothing but -inf, as its softmax is.
    """
    q, k, (rows, _), queries = problem.q, problem.k, problem.positions, problem.query_rows
    batch, q_heads, tokens, _ = q.shape
    keys = _all_keys(k)
    lse = torch.empty((batch, q_heads, rows.shape[1]), dtype=torch.float32, device=q.device)
    for block in _row_blocks(batch, rows.shape[1], k.shape[2]):
        hidden = _hidden(problem, rows[:, block], keys)
        for h in range(q_heads):
            scores = _gather(q[:, h], queries[:, block]).mul_(problem.scale) @ k[:, h // problem.group].float().mT
            scores.masked_fill_(hidden, -torch.inf)
            top = scores.amax(2, keepdim=True)
            top.masked_fill_(hidden.all(2, keepdim=True), 0.0)
            lse[:, h, block] = scores.sub_(top).exp_().sum(2).log_().add_(top[:, :, 0])
    return to_rows(lse.masked_fill_(lse == -torch.inf, torch.inf), queries, tokens)


def row_lse_backward(
    problem: AttentionProblem, dlse: Tensor, into: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Gradient of ``row_lse``: dS_ij = P_ij * dlse_i over all visible keys j."""
    q, k, (rows, _), queries = problem.q, problem.k, problem.positions, problem.query_rows
    batch, q_heads = q.shape[:2]
    keys = _all_keys(k)
    lse, dlse = lse_at_rows(problem), at_rows(dlse, queries)
    dq, dk = _fp32_zeros(q), _fp32_zeros(k)
    for block in _row_blocks(batch, rows.shape[1], k.shape[2]):
        hidden = _hidden(problem, rows[:, block], keys)
        for h in range(q_heads):
            q_rows = _gather(q[:, h], queries[:, block]).mul_(problem.scale)
            k_all = k[:, h // problem.group].float()
            ds = (q_rows @ k_all.mT).sub_(lse[:, h, block, None]).exp_().mul_(dlse[:, h, block, None])
            ds.masked_fill_(hidden, 0.0)
            _scatter_add(dq[:, h], queries[:, block], (ds @ _finite(k_all)).mul_(problem.scale))
            dk[:, h // problem.group] += ds.mT @ _finite(q_rows)
    return (dq, dk) if into is None else (into[0].add_(dq), into[1].add_(dk))


def slice_forward(problem: AttentionProblem) -> Tensor:
    """exp(scale * q.k - lse) at (rows, cols), zero where hidden: the head mean (B,R,V), or (B,Hq,R,V)."""
    q, k, (rows, cols), queries = problem.q, problem.k, problem.positions, problem.query_rows
    batch, q_heads, _, _ = q.shape
    lse = lse_at_rows(problem)
    a = torch.zeros(problem.slice_shape, dtype=torch.float32, device=q.device)
    for block in _row_blocks(batch, rows.shape[1], cols.shape[1]):
        hidden = _hidden(problem, rows[:, block], cols)
        for h in range(q_heads):
            if h % problem.group == 0:
                k_cols = _gather(k[:, h // problem.group], cols)
            p = _gather(q[:, h], queries[:, block]).mul_(problem.scale) @ k_cols.mT
            p.sub_(lse[:, h, block, None]).exp_()
            # Filled, not multiplied: a hidden key may score far above the row's LSE, and exp overflows to inf.
            p.masked_fill_(hidden, 0.0)
            if problem.each:
                a[:, h, block] = p
            else:
                a[:, block] += p
    return a if problem.each else a.div_(q_heads)


def slice_backward(
    problem: AttentionProblem,
    grad: Tensor,
    base: Base | None,
    bound: Tensor | None = None,
    into: tuple[Tensor, Tensor] | None = None,
) -> Gradients:
    """Gradient of ``slice_forward``, dS = P * G, added to that of ``base(dlse)``; dlse_i = -sum_j dS_ij, (B,Hq,T)."""
    q, k, (rows, cols), queries = problem.q, problem.k, problem.positions, problem.query_rows
    batch, q_heads, tokens, _ = q.shape
    lse = lse_at_rows(problem)
    dq, dk = (_fp32_zeros(q), _fp32_zeros(k)) if into is None else into
    dlse = torch.empty((batch, q_heads, rows.shape[1]), dtype=torch.float32, device=q.device)
    for block in _row_blocks(batch, rows.shape[1], cols.shape[1]):
        hidden = _hidden(problem, rows[:, block], cols)
        mean_grad = None if problem.each else grad[:, block] / q_heads
        for h in range(q_heads):
            if h % problem.group == 0:
                k_cols = _gather(k[:, h // problem.group], cols)
                dk_cols = torch.zeros_like(k_cols)
            q_rows = _gather(q[:, h], queries[:, block]).mul_(problem.scale)
            ds = (q_rows @ k_cols.mT).sub_(lse[:, h, block, None]).exp_()
            ds.mul_(grad[:, h, block] if mean_grad is None else mean_grad).masked_fill_(hidden, 0.0)
            dlse[:, h, block] = ds.sum(2).neg_()
            _scatter_add(dq[:, h], queries[:, block], (ds @ _finite(k_cols)).mul_(problem.scale))
            dk_cols.baddbmm_(ds.mT, _finite(q_rows))
            if (h + 1) % problem.group == 0:
                _scatter_add(dk[:, h // problem.group], cols, dk_cols)
    dlse = to_rows(dlse, queries, tokens)
    if base is None:
        return dq, dk, dlse
    base_q, base_k = base(dlse)
    return base_q.add_(dq), base_k.add_(dk), dlse
