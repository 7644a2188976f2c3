"""The visual attention alignment loss (VAT): distance of a student's attention slice from a target slice."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from cdistill.choices import SHARES
from cdistill.ops._contract import SliceArguments, require_loss, require_target, slice_arguments
from cdistill.ops._dispatch import Backend, backend, save_for_backward, saved_for_backward, without_autocast
from cdistill.ops.attention_slice import (
    Base,
    Gradients,
    checked_regions,
    empty_own_lse,
    empty_slice_gradients,
    lse_and_base,
    no_lse,
    slice_backward,
    slice_forward,
    slice_gradients,
    with_lse,
)


class Alignment(NamedTuple):
    """What a slice is compared with, and how."""

    target: Tensor  # (B,R,V) or (B,Hq,R,V), any floating dtype
    row_valid: Tensor  # (B,R) bool
    col_valid: Tensor  # (B,V) bool
    loss: str
    reduction: str
    sink_filter: bool

    def kept_shape(self, impl: Backend, arguments: SliceArguments) -> tuple[int, ...]:
        """Shape of what the forward pass keeps for the backward: the slice, or four numbers for each of its rows."""
        return (4, *arguments.slice_shape[:-1]) if self._by_rows(impl, arguments) else arguments.slice_shape

    def forward(self, impl: Backend, arguments: SliceArguments) -> tuple[Tensor, Tensor, Tensor]:
        """Losses (B,), the mean over heads where there is a slice per head; what `backward` needs; own lse of the slice."""
        q, k, _, rows, cols, *_ = arguments
        batch = q.shape[0]
        if arguments.empty:
            kept = q.new_zeros(self.kept_shape(impl, arguments), dtype=torch.float32)
            return q.new_zeros(batch, dtype=torch.float32), kept, no_lse(q)
        if self._by_rows(impl, arguments):
            complete, own_lse = with_lse(impl, arguments)
            assert complete.lse is not None
            losses, kept = impl.head_cosine(q, k, complete.lse, rows, cols, self.target, **arguments.options)
            losses = torch.where(self.row_valid[:, None], losses, 0.0).sum((1, 2)) * self._row_weight(arguments)
            return losses, kept, own_lse
        a, own_lse = slice_forward(impl, arguments)
        losses = impl.alignment_loss(*self._slices(a), **self._options())
        return losses.view(batch, -1).mean(1), a, own_lse

    def backward(
        self,
        impl: Backend,
        arguments: SliceArguments,
        own_lse: Tensor,
        kept: Tensor,
        grad: Tensor,
        base: Base | None = None,
    ) -> Gradients:
        """Gradients of q, k and lse; ``base`` as in `slice_backward`."""
        q, k, _, rows, cols, *_ = arguments
        if self._by_rows(impl, arguments):
            grad = (grad * self._row_weight(arguments))[:, None, None] * self.row_valid[:, None]
            grad = grad.expand(-1, q.shape[1], -1)
            _, denominator = lse_and_base(impl, arguments, own_lse)
            options = arguments.options
            return impl.head_cosine_backward(q, k, kept, rows, cols, self.target, grad, base or denominator, **options)
        slices = q.shape[1] if arguments.each else 1
        grad = (grad / slices).repeat_interleave(slices)
        da = impl.alignment_grad(*self._slices(kept), grad, **self._options(), dtype=q.dtype)
        da = da.unflatten(0, kept.shape[:-2])
        bound = None
        if self.loss in SHARES and q.dtype == torch.float16:  # whose range a gradient as large as 1/a would use up
            bound = (q.shape[1] // slices) * (da * kept).abs().flatten(1).amax(1)
        return slice_backward(impl, arguments, own_lse, da, base, bound)

    def _by_rows(self, impl: Backend, arguments: SliceArguments) -> bool:
        """Whether the losses are those of the rows of every head, which ``impl`` computes without any slice."""
        return impl.FUSES_HEAD_COSINE and arguments.each and (self.loss, self.reduction) == ("cosine", "row")

    def _row_weight(self, arguments: SliceArguments) -> Tensor:
        """(B,) what each row of each head counts."""
        return (arguments.q.shape[1] * self.row_valid.sum(1).clamp(min=1)).float().reciprocal()

    def _slices(self, a: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Slices and targets with one per sample, or per sample and head, and what is valid: (N,R,V) twice, (N,R), (N,V)."""
        target = self.target.to(torch.float32).contiguous()
        row_valid, col_valid = self.row_valid, self.col_valid
        if a.dim() == 4:
            row_valid, col_valid = (x.repeat_interleave(a.shape[1], 0) for x in (row_valid, col_valid))
        return a.flatten(0, -3), target.flatten(0, -3), row_valid, col_valid

    def _options(self) -> dict[str, Any]:
        return {"loss": self.loss, "reduction": self.reduction, "sink_filter": self.sink_filter}


@torch.library.custom_op("cdistill::attention_alignment", mutates_args=())
@without_autocast
def _forward(
    q: Tensor,
    k: Tensor,
    lse: Tensor | None,
    rows: Tensor,
    cols: Tensor,
    key_mask: Tensor | None,
    causal: bool,
    scale: float,
    each: bool,
    target: Tensor,
    loss: str,
    reduction: str,
    sink_filter: bool,
    impl: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    arguments = SliceArguments(q, k, lse, rows, cols, key_mask, causal, scale, each)
    chosen = backend(impl, q)
    row_valid, col_valid = checked_regions(chosen, arguments)
    alignment = Alignment(target, row_valid, col_valid, loss, reduction, sink_filter)
    losses, kept, own_lse = alignment.forward(chosen, arguments)
    return losses, kept, row_valid, col_valid, own_lse


@_forward.register_fake
def _(q, k, lse, rows, cols, key_mask, causal, scale, each, target, loss, reduction, sink_filter, impl):
    arguments = SliceArguments(q, k, lse, rows, cols, key_mask, causal, scale, each)
    row_valid, col_valid = (x.new_empty(x.shape, dtype=torch.bool) for x in (rows, cols))
    alignment = Alignment(target, row_valid, col_valid, loss, reduction, sink_filter)
    kept = target.new_empty(alignment.kept_shape(backend(impl, q), arguments), dtype=torch.float32)
    return kept.new_empty(q.shape[0]), kept, row_valid, col_valid, empty_own_lse(backend(impl, q), arguments)


@torch.library.custom_op("cdistill::attention_alignment_backward", mutates_args=())
@without_autocast
def _backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    lse: Tensor | None,
    rows: Tensor,
    cols: Tensor,
    key_mask: Tensor | None,
    target: Tensor,
    kept: Tensor,
    row_valid: Tensor,
    col_valid: Tensor,
    own_lse: Tensor,
    causal: bool,
    scale: float,
    each: bool,
    loss: str,
    reduction: str,
    sink_filter: bool,
    impl: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    arguments = SliceArguments(q, k, lse, rows, cols, key_mask, causal, scale, each)
    chosen = backend(impl, q)
    alignment = Alignment(target, row_valid, col_valid, loss, reduction, sink_filter)
    return slice_gradients(arguments, lambda: alignment.backward(chosen, arguments, own_lse, kept, grad))


@_backward.register_fake
def _(grad, q, k, lse, *_):
    return empty_slice_gradients(q, k, lse)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, causal, scale, each, target, loss, reduction, sink_filter, impl = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    save_for_backward(ctx, *tensors, target, *output[1:])
    ctx.options = (causal, scale, each, loss, reduction, sink_filter, impl)


def _differentiate(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 14
    saved = saved_for_backward(ctx)
    dq, dk, dlse = torch.ops.cdistill.attention_alignment_backward(grad, *saved, *ctx.options)
    return dq, dk, None if saved[2] is None else dlse, *(None,) * 11


torch.library.register_autograd("cdistill::attention_alignment", _differentiate, setup_context=_save)


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
        q, k, rows, cols, lse, causal, scale, key_mask, heads, impl: as in attention_slice.

    Returns:
        (B,) fp32, one loss per sample. A row that sees none of its columns counts as padding; a sample without rows or
        columns has loss 0 and gradient 0; a zero vector has cosine 0 and gives no gradient. For heads="each", the mean
        of the heads' losses. Never holds more than O(B*R*V). Differentiable once in q, k and lse.

    Raises:
        ValueError: as attention_slice, or target, loss, reduction or sink_filter is not one of the above.
    """
    arguments = slice_arguments(q, k, rows, cols, lse=lse, causal=causal, scale=scale, key_mask=key_mask, heads=heads)
    require_loss(loss, reduction, sink_filter)
    require_target(target, q, rows, cols, heads)
    options = (target.detach(), loss, reduction, sink_filter, impl)
    return torch.ops.cdistill.attention_alignment(*arguments, *options)[0]
