"""From a problem to its slice and losses, and back to gradients: what the ops that make slices have in common.

Where the caller gives no log-sum-exp the slice's own is made for it, and its gradient reaches q and k through all keys that a
row sees. A backend does that in one go (`Backend.FUSES_DENOMINATOR`) or in two.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from cdistill.choices import SHARES
from cdistill.ops._contract import laid_out_like, require_positions
from cdistill.ops._dispatch import Backend
from cdistill.ops._problem import AttentionProblem, Base, Comparison, Gradients


def checked_regions(impl: Backend, problem: AttentionProblem) -> tuple[Tensor, Tensor]:
    """Rows (B,R) that see one of their columns and columns (B,V) that are not padding; raises for bad positions."""
    row_valid, col_valid, allowed = impl.regions(problem)
    require_positions(allowed, problem)
    return row_valid, col_valid


def no_lse(q: Tensor) -> Tensor:
    """What stands for an lse where there is none: an empty tensor."""
    return q.new_empty(0, dtype=torch.float32)


def with_lse(impl: Backend, problem: AttentionProblem) -> tuple[AttentionProblem, Tensor]:
    """The problem with an lse, and the one that was made for that: empty if the caller gave one or none is needed."""
    if problem.lse is not None or problem.empty:
        return problem, no_lse(problem.q)
    own_lse = impl.row_lse(problem)
    return problem._replace(lse=own_lse), own_lse


def slice_forward(impl: Backend, problem: AttentionProblem) -> tuple[Tensor, Tensor]:
    """Slice (B,R,V) or (B,Hq,R,V), and the lse that was made for it: empty if one was given or none is needed."""
    if problem.empty:
        return problem.q.new_zeros(problem.slice_shape, dtype=torch.float32), no_lse(problem.q)
    if problem.lse is None and impl.FUSES_DENOMINATOR:
        return impl.slice_forward_with_lse(problem)
    problem, own_lse = with_lse(impl, problem)
    return impl.slice_forward(problem), own_lse


def _with_base(
    impl: Backend, problem: AttentionProblem, own_lse: Tensor, base: Base | None
) -> tuple[AttentionProblem, Base | None]:
    """The problem with its lse, and what carries the gradient of that to q and k.

    That is ``base`` if the caller has one, nothing for a caller's lse, and all visible keys for our own.
    """
    if problem.lse is not None:
        return problem, base
    problem = problem._replace(lse=own_lse)
    return problem, base or (lambda dlse: impl.row_lse_backward(problem, dlse))


def slice_backward(
    impl: Backend,
    problem: AttentionProblem,
    own_lse: Tensor,
    grad: Tensor,
    base: Base | None = None,
    bound: Tensor | None = None,
) -> Gradients:
    """Gradients of q, k and lse for that of the slice.

    ``base`` and ``bound`` are as in `Backend.slice_backward`; a ``base`` is of the caller's lse.
    """
    if problem.lse is None and impl.FUSES_DENOMINATOR:
        return *impl.slice_backward_with_denominator(problem._replace(lse=own_lse), grad), no_lse(problem.q)
    problem, base = _with_base(impl, problem, own_lse, base)
    return impl.slice_backward(problem, grad, base, bound)


def slice_gradients(problem: AttentionProblem, differentiate: Callable[[], Gradients]) -> Gradients:
    """What ``differentiate`` gives as the gradients of q, k and lse (empty if none was given), in their dtypes and layouts."""
    q, k, lse = problem.q, problem.k, problem.lse
    if problem.empty:
        return torch.zeros_like(q), torch.zeros_like(k), no_lse(q) if lse is None else torch.zeros_like(lse)
    dq, dk, dlse = differentiate()
    dq, dk = laid_out_like(dq.to(q.dtype), q), laid_out_like(dk.to(k.dtype), k)
    return dq, dk, no_lse(q) if lse is None else dlse


def empty_own_lse(impl: Backend, problem: AttentionProblem, compared: Comparison | None = None) -> Tensor:
    """A tensor of the shape and dtype of the lse that `slice_forward` makes, or `losses_forward`."""
    by_rows = compared is not None and _by_rows(impl, problem, compared)
    if problem.lse is not None or problem.empty or by_rows:
        return no_lse(problem.q)
    return problem.q.new_empty((*(2,) * impl.SPLITS_LSE, *problem.q.shape[:3]), dtype=torch.float32)


def empty_slice_gradients(problem: AttentionProblem) -> Gradients:
    """Tensors of the shapes and dtypes that `slice_gradients` returns."""
    q, lse = problem.q, problem.lse
    return torch.empty_like(q), torch.empty_like(problem.k), no_lse(q) if lse is None else torch.empty_like(lse)


def _by_rows(impl: Backend, problem: AttentionProblem, compared: Comparison) -> bool:
    """Whether the losses are those of the rows of every head, which ``impl`` computes without any slice."""
    return impl.FUSES_HEAD_COSINE and problem.each and (compared.loss, compared.reduction) == ("cosine", "row")


def _row_weight(problem: AttentionProblem, compared: Comparison) -> Tensor:
    """(B,) what each row of each head counts."""
    return (problem.q.shape[1] * compared.row_valid.sum(1).clamp(min=1)).float().reciprocal()


def one_by_one(a: Tensor, compared: Comparison) -> tuple[Tensor, Comparison]:
    """Slices (N,R,V) and what they are compared with, one per sample, or per sample and head."""
    target = compared.target.to(torch.float32).contiguous().flatten(0, -3)
    row_valid, col_valid = compared.row_valid, compared.col_valid
    if a.dim() == 4:
        row_valid, col_valid = (x.repeat_interleave(a.shape[1], 0) for x in (row_valid, col_valid))
    return a.flatten(0, -3), compared._replace(target=target, row_valid=row_valid, col_valid=col_valid)


def kept_shape(impl: Backend, problem: AttentionProblem, compared: Comparison) -> tuple[int, ...]:
    """Shape of what `losses_forward` keeps for the backward pass: the slice, or four numbers for each of its rows."""
    shape = problem.slice_shape
    return (4, *shape[:-1]) if _by_rows(impl, problem, compared) else shape


def losses_forward(impl: Backend, problem: AttentionProblem, compared: Comparison) -> tuple[Tensor, Tensor, Tensor]:
    """Losses (B,), the mean over heads where there is a slice per head; what `losses_backward` needs; own lse of the slice."""
    q, batch = problem.q, problem.q.shape[0]
    if problem.empty:
        kept = q.new_zeros(kept_shape(impl, problem, compared), dtype=torch.float32)
        return q.new_zeros(batch, dtype=torch.float32), kept, no_lse(q)
    if _by_rows(impl, problem, compared):
        losses, kept = impl.head_cosine(problem, compared.target)
        losses = torch.where(compared.row_valid[:, None], losses, 0.0).sum((1, 2)) * _row_weight(problem, compared)
        return losses, kept, no_lse(q)
    a, own_lse = slice_forward(impl, problem)
    return impl.alignment_loss(*one_by_one(a, compared)).view(batch, -1).mean(1), a, own_lse


def losses_backward(
    impl: Backend,
    problem: AttentionProblem,
    compared: Comparison,
    own_lse: Tensor,
    kept: Tensor,
    grad: Tensor,
    base: Base | None = None,
) -> Gradients:
    """Gradients of q, k and lse; ``base`` as in `slice_backward`."""
    heads, dtype = problem.q.shape[1], problem.q.dtype
    if _by_rows(impl, problem, compared):
        grad = (grad * _row_weight(problem, compared))[:, None, None] * compared.row_valid[:, None]
        return impl.head_cosine_backward(problem, kept, compared.target, grad.expand(-1, heads, -1), base)
    slices = heads if problem.each else 1
    grad = (grad / slices).repeat_interleave(slices)
    da = impl.alignment_grad(*one_by_one(kept, compared), grad, dtype).unflatten(0, kept.shape[:-2])
    bound = None
    if compared.loss in SHARES and dtype == torch.float16:  # whose range a gradient as large as 1/a would use up
        bound = (heads // slices) * (da * kept).abs().flatten(1).amax(1)
    return slice_backward(impl, problem, own_lse, da, base, bound)
