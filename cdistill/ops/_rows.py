"""Rows and columns in plain torch, for the backends that work on the rows alone."""

import torch
from torch import Tensor

from cdistill.ops._contract import has_repeats
from cdistill.ops._problem import AttentionProblem

# |dlse| / |dout| up to which dlse is folded into out: 2^14 leaves room in fp16, and nothing larger occurs in training.
MOST_FOLDED = 16384.0


def regions(problem: AttentionProblem) -> tuple[Tensor, Tensor, Tensor]:
    """Rows (B,R) that see one of their columns, columns (B,V) that are not padding, and () bool: all allowed.

    Allowed: every position is -1, or that of a token and distinct within its sample and its kind.
    """
    (rows, cols), tokens, key_mask = problem.positions, problem.k.shape[2], problem.key_mask
    allowed = torch.ones((), dtype=torch.bool, device=rows.device)
    for positions, lowest in ((rows, problem.offset), (cols, 0)):
        in_range = (positions == -1) | ((positions >= lowest) & (positions < tokens))
        allowed = allowed & in_range.all() & ~has_repeats(positions)
    return *seen(rows, cols, causal=problem.causal, key_mask=key_mask), allowed


def seen(rows: Tensor, cols: Tensor, *, causal: bool, key_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Rows (B,R) that see one of their columns, and columns (B,V) that are not padding."""
    col_valid = cols >= 0
    if cols.shape[1] == 0:
        return torch.zeros_like(rows, dtype=torch.bool), col_valid
    usable = col_valid
    if key_mask is not None:
        usable = col_valid & key_mask.gather(1, cols.clamp(min=0, max=key_mask.shape[1] - 1).long())
    nothing = torch.iinfo(cols.dtype).max
    first = torch.where(usable, cols, nothing).amin(1, keepdim=True)
    sees_column = first <= rows if causal else (first < nothing).expand_as(rows)
    return (rows >= 0) & sees_column, col_valid


def at_rows(x: Tensor, rows: Tensor) -> Tensor:
    """x (B,Hq,T) at the rows: (B,Hq,R); padding gives what stands at token 0."""
    return x.gather(2, rows.clamp(min=0).long()[:, None].expand(-1, x.shape[1], -1))


def to_rows(x: Tensor, rows: Tensor, tokens: int) -> Tensor:
    """Values (B,Hq,R) at the positions of the rows, zero elsewhere: (B,Hq,T)."""
    x = x.masked_fill((rows < 0)[:, None], 0.0)
    index = rows.clamp(min=0).long()[:, None].expand_as(x)
    return x.new_zeros((*x.shape[:2], tokens)).scatter_add_(2, index, x)


def lse_at_rows(problem: AttentionProblem) -> Tensor:
    """The problem's lse at its rows, (B,Hq,R); +inf where a row is padding or sees no key, so that P is 0 there."""
    (rows, _), lse, key_mask = problem.positions, problem.lse, problem.key_mask  # of a problem without documents
    assert lse is not None
    sees_key = rows >= 0
    if key_mask is not None:
        keys_seen = key_mask.cumsum(1) if problem.causal else key_mask.sum(1, keepdim=True).expand_as(key_mask)
        sees_key = sees_key & (keys_seen.gather(1, rows.clamp(min=0).long()) > 0)
    return at_rows(lse, problem.query_rows).masked_fill_(~sees_key[:, None], torch.inf)


def _real(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Samples and positions of the rows that are not padding, (n,) each."""
    sample, row = (rows >= 0).nonzero(as_tuple=True)
    return sample, rows[sample, row].long()


def fold_dlse(out: Tensor, dout: Tensor, dlse: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """out_i -= dlse_i * dout_i / |dout_i|^2 at the rows, so that a flash backward without dlse forms delta_i - dlse_i.

    Returns the former rows (n,Hq,D), and dlse (B,Hq,T) of the rows where |dout_i| is too small for that. Written through
    ``data``: `unfold_dlse` restores every bit, so autograd's version of the saved ``out`` need not change.
    """
    sample, row = _real(rows)
    saved, g, w = out[sample, :, row], dout[sample, :, row].float(), dlse[sample, :, row]
    squares = g.square().sum(-1)
    folded = (w.abs() <= MOST_FOLDED * squares.sqrt()) & (squares > 1e-30)
    out.data[sample, :, row] = (saved.float() - torch.where(folded, w / squares, 0.0)[..., None] * g).to(out.dtype)
    rest = torch.zeros_like(dlse)
    rest[sample, :, row] = w.masked_fill(folded, 0.0)
    return saved, rest


def unfold_dlse(out: Tensor, saved: Tensor, rows: Tensor) -> None:
    """Put back what `fold_dlse` found."""
    sample, row = _real(rows)
    out.data[sample, :, row] = saved
