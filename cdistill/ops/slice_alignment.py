"""The alignment loss of slices of attention that are there already, with gradients for both sides.

`attention_alignment` makes the student's slice itself and takes the target for a constant. Here the slice may be one that
several processes have made together, and the target may depend on something that is trained.
"""

from typing import Any

import torch
from torch import Tensor

from cdistill.errors import InputError
from cdistill.ops._contract import (
    require_bool,
    require_device,
    require_loss,
    require_mask_of,
    require_shape,
    require_tensor,
    whole_positions,
)
from cdistill.ops._dispatch import backend
from cdistill.ops._operators import differentiable, operator
from cdistill.ops._pipeline import one_by_one
from cdistill.ops._problem import Comparison
from cdistill.ops._rows import seen

# The loss whose gradient in its first argument is that of another in its second: all but KL are symmetric.
_MIRRORED = {"kl": "reverse_kl"}


_ARGUMENTS = (
    "Tensor a, Tensor target, Tensor row_valid, Tensor col_valid, str loss, str reduction, bool sink_filter, "
    "bool target_moves, str? impl"
)


@operator("slice_alignment", _ARGUMENTS, 2)
def _forward(a: Tensor, target: Tensor, row_valid: Tensor, col_valid: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    *how, _, impl = rest
    compared = Comparison(row_valid, col_valid, target, *how)
    of_slices = backend(impl, a, "a").alignment_loss(*one_by_one(a, compared))
    return of_slices.view(len(a), -1).mean(1), of_slices


@_forward.register_fake
def _(a: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return a.new_empty(len(a)), a.new_empty(a.shape[:-2].numel())


@operator("slice_alignment_backward", f"Tensor grad, {_ARGUMENTS}", 2)
def _backward(grad: Tensor, a: Tensor, target: Tensor, row_valid: Tensor, col_valid: Tensor, *rest: Any) -> Any:
    loss, reduction, sink_filter, target_moves, impl = rest
    heads = a.shape[1] if a.dim() == 4 else 1
    weight = (grad / heads).repeat_interleave(heads)

    def gradient(of: Tensor, against: Tensor, loss: str, impl: str | None) -> Tensor:
        compared = Comparison(row_valid, col_valid, against, loss, reduction, sink_filter)
        return backend(impl, of).alignment_grad(*one_by_one(of, compared), weight, of.dtype).view_as(of)

    of_target = gradient(target, a, _MIRRORED.get(loss, loss), "torch") if target_moves else torch.zeros_like(target)
    return gradient(a, target, loss, impl), of_target


@_backward.register_fake
def _(grad: Tensor, a: Tensor, target: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(a), torch.empty_like(target)


differentiable("slice_alignment", leaves=("a", "target"), results=1, keeps=[])


def slice_alignment(
    a: Tensor,
    target: Tensor,
    rows: Tensor,
    cols: Tensor,
    *,
    loss: str = "cosine",
    reduction: str = "row",
    sink_filter: bool = False,
    causal: bool = True,
    key_mask: Tensor | None = None,
    impl: str | None = None,
) -> Tensor:
    """Distance of a slice of attention from a target, per sample (paper 3.2), differentiable once in both.

    Args:
        a: the student's slice as `attention_slice` gives it, (B,R,V) or (B,H,R,V), fp32.
        target: the teacher's, of the same shape and dtype. With sink_filter it must not require a gradient: the filter asks
            of the target alone whether it is zero.
        loss, reduction, sink_filter, rows, cols, causal, key_mask, impl: as in `attention_alignment`; positions are not
            checked again.

    Returns:
        (B,) fp32, what `attention_alignment` gives for the queries and keys of the slice, up to rounding; for (B,H,R,V) the
        mean over heads.

    Raises:
        ValueError: naming the argument that is not one of the above.
    """
    require_loss(loss, reduction, sink_filter)
    require_tensor("a", a)
    if a.dim() not in (3, 4) or a.dtype != torch.float32:
        raise InputError(f"a must be (B, R, V) or (B, H, R, V) in float32, got {tuple(a.shape)} in {a.dtype}")
    require_shape("target", target, tuple(a.shape), "B, R, V" if a.dim() == 3 else "B, H, R, V", " like a")
    require_device("target", target, a.device, "a")
    if target.dtype != a.dtype:
        raise InputError(f"target must be float32 like a, got {target.dtype}")
    if sink_filter and target.requires_grad:
        raise InputError("target must not require a gradient with sink_filter: give target.detach()")
    for name, x, axes, count in (("rows", rows, "B, R", a.shape[-2]), ("cols", cols, "B, V", a.shape[-1])):
        require_shape(name, x, (a.shape[0], count), axes, " like a")
        whole_positions(name, x, a)
    require_bool("causal", causal)
    if key_mask is not None:
        require_mask_of(key_mask, cols, a)
    row_valid, col_valid = seen(rows, cols, causal=causal, key_mask=key_mask)
    if not a.numel():
        return a.new_zeros(len(a)) + 0.0 * (a.sum() + target.sum())
    how = loss, reduction, sink_filter, target.requires_grad, impl
    return torch.ops.cdistill.slice_alignment(a, target, row_valid, col_valid, *how)[0]
