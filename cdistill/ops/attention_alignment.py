"""The visual attention alignment loss (VAT): distance of a student's attention slice from a target slice."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cdistill.ops._contract import attention_problem, require_loss, require_target
from cdistill.ops._operators import differentiable, operator
from cdistill.ops._pieces import backend_of
from cdistill.ops._pipeline import (
    checked_regions,
    empty_own_lse,
    empty_slice_gradients,
    kept_shape,
    losses_backward,
    losses_forward,
    slice_gradients,
)
from cdistill.ops._problem import COMPARISON, PROBLEM, Comparison, Gradients, problem_of

_ARGUMENTS = f"{PROBLEM}, {COMPARISON}, str? impl"


@operator("attention_alignment", _ARGUMENTS, 5)
def _forward(*arguments: Any) -> tuple[Tensor, ...]:
    problem, (*how, impl) = problem_of(arguments)
    chosen = backend_of(impl, problem)
    regions = checked_regions(chosen, problem)
    losses, kept, own_lse = losses_forward(chosen, problem, Comparison(*regions, *how))
    return losses, kept, *regions, own_lse


@_forward.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    problem, (*how, impl) = problem_of(arguments)
    chosen, q = backend_of(impl, problem), problem.q
    rows, cols = problem.positions
    regions = torch.empty_like(rows, dtype=torch.bool), torch.empty_like(cols, dtype=torch.bool)
    compared = Comparison(*regions, *how)
    kept = q.new_empty(kept_shape(chosen, problem, compared), dtype=torch.float32)
    return kept.new_empty(q.shape[0]), kept, *regions, empty_own_lse(chosen, problem, compared)


@operator(
    "attention_alignment_backward",
    f"Tensor grad, {_ARGUMENTS}, Tensor kept, Tensor row_valid, Tensor col_valid, Tensor own_lse",
    3,
)
def _backward(grad: Tensor, *arguments: Any) -> Gradients:
    problem, (*how, impl, kept, row_valid, col_valid, own_lse) = problem_of(arguments)
    chosen, compared = backend_of(impl, problem), Comparison(row_valid, col_valid, *how)
    return slice_gradients(problem, lambda: losses_backward(chosen, problem, compared, own_lse, kept, grad))


@_backward.register_fake
def _(grad: Tensor, *arguments: Any) -> Gradients:
    return empty_slice_gradients(problem_of(arguments)[0])


differentiable("attention_alignment", leaves=("q", "k", "lse"), results=1, keeps=[1, 2, 3, 4])


def attention_alignment(
    q: Tensor,
    k: Tensor,
    target: Tensor,
    rows: Tensor,
    cols: Tensor,
    *,
    loss: str = "cosine",
    reduction: str = "row",
    sink_filter: bool = False,
    lse: Tensor | None = None,
    causal: bool = True,
    scale: float | None = None,
    key_mask: Tensor | None = None,
    heads: str = "mean",
    impl: str | None = None,
    cu_seqlens: Tensor | Sequence[int] | None = None,
) -> Tensor:
    """Distance of A = attention_slice(q, k, rows, cols) from a target slice, per sample (paper 3.2).

    Args:
        target: the teacher's slice (B,R,V), or (B,Hq,R,V) for heads="each", any floating dtype. It is a constant and
            gets no gradient. Its values at padding are ignored.
        loss: "cosine" (1 - cos), "mse", "kl" (target against student, both renormalised to sum one; no epsilon, but a
            student's share below 2^-126, the smallest normal fp32 number, counts as that, and nothing pulls it up: a
            target that has mass on a column which the row does not see costs 87.3 times that mass), or "jsd" (half the
            sum of KL of target and of student against their mean, renormalised likewise; at most log 2).
        reduction: what is compared: "row" each row, then the mean over rows; "matrix" the whole slice; "column" the
            mean over rows.
        sink_filter: with reduction="column", leave entries above mean + one standard deviation out of the mean (the
            authors' code); the filter itself carries no gradient.
        q, k, rows, cols, lse, causal, scale, key_mask, heads, impl, cu_seqlens: as in attention_slice.

    Returns:
        (B,) fp32, one loss per sample. A row that sees none of its columns counts as padding; a sample without rows or
        columns has loss 0 and gradient 0; a zero vector has cosine 0 and gives no gradient. For heads="each", the mean
        of the heads' losses. Never holds more than O(B*R*V). Differentiable once in q, k and lse.

    Raises:
        ValueError: as attention_slice, or target, loss, reduction or sink_filter is not one of the above.
    """
    options: dict[str, Any] = {"causal": causal, "scale": scale, "key_mask": key_mask, "heads": heads}
    problem = attention_problem(q, k, None, (rows, cols), lse=lse, cu_seqlens=cu_seqlens, **options)
    require_loss(loss, reduction, sink_filter)
    require_target(target, problem)
    compared = (target.detach(), loss, reduction, sink_filter)
    return torch.ops.cdistill.attention_alignment(*problem, *compared, impl)[0]
