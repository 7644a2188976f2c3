"""The visual attention slice A = P[rows, cols] of a causal (or full) softmax attention, without the T x T matrix."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from cdistill.ops._contract import SliceArguments, laid_out_like, require_positions, require_sums, slice_arguments
from cdistill.ops._dispatch import Backend, backend, save_for_backward, saved_for_backward, without_autocast


def checked_regions(impl: Backend, arguments: SliceArguments) -> tuple[Tensor, Tensor]:
    """Rows (B,R) that see one of their columns and columns (B,V) that are not padding; raises for bad positions."""
    rows, cols, tokens = arguments.rows, arguments.cols, arguments.q.shape[2]
    row_valid, col_valid, allowed = impl.regions(rows, cols, arguments.key_mask, causal=arguments.causal, tokens=tokens)
    require_positions(allowed, rows, cols, tokens)
    return row_valid, col_valid


def with_lse(impl: Backend, arguments: SliceArguments) -> tuple[SliceArguments, Tensor]:
    """The arguments with an lse, and the one that was made for that: empty if one was given or none is needed."""
    own_lse = no_lse(arguments.q)
    if arguments.lse is None and not arguments.empty:
        own_lse = impl.row_lse(arguments.q, arguments.k, arguments.rows, **arguments.options)
        arguments = arguments._replace(lse=own_lse)
    return arguments, own_lse


def no_lse(q: Tensor) -> Tensor:
    """What stands for an lse where there is none: an empty tensor."""
    return q.new_empty(0, dtype=torch.float32)


def slice_forward(impl: Backend, arguments: SliceArguments) -> tuple[Tensor, Tensor]:
    """Slice (B,R,V) or (B,Hq,R,V), and the lse that was made for it: empty if one was given or none is needed."""
    q, k, _, rows, cols, *_ = arguments
    options = arguments.options | {"each": arguments.each}
    if arguments.empty:
        return q.new_zeros(arguments.slice_shape, dtype=torch.float32), no_lse(q)
    if arguments.lse is None and impl.FUSES_DENOMINATOR:
        return impl.slice_forward_with_lse(q, k, rows, cols, **options)
    arguments, own_lse = with_lse(impl, arguments)
    assert arguments.lse is not None
    return impl.slice_forward(q, k, arguments.lse, rows, cols, **options), own_lse


Base = Callable[[Tensor], tuple[Tensor, Tensor]]
Gradients = tuple[Tensor, Tensor, Tensor]


def lse_and_base(impl: Backend, arguments: SliceArguments, own_lse: Tensor) -> tuple[Tensor, Base | None]:
    """The lse, and what carries its gradient to q and k: None if it is the caller's, all visible keys if it is our own."""
    q, k, lse, rows, *_ = arguments
    if lse is not None:
        return lse, None
    return own_lse, lambda dlse: impl.row_lse_backward(q, k, own_lse, rows, dlse, **arguments.options)


def slice_backward(
    impl: Backend,
    arguments: SliceArguments,
    own_lse: Tensor,
    grad: Tensor,
    base: Base | None = None,
    bound: Tensor | None = None,
) -> Gradients:
    """Gradients of q, k and lse for that of the slice.

    ``base`` and ``bound`` are as in `Backend.slice_backward`; a ``base`` is of the caller's lse.
    """
    q, k, lse, rows, cols, *_ = arguments
    options = arguments.options | {"each": arguments.each}
    if lse is None and impl.FUSES_DENOMINATOR:
        return *impl.slice_backward_with_denominator(q, k, own_lse, rows, cols, grad, **options), no_lse(q)
    lse, denominator = lse_and_base(impl, arguments, own_lse)
    return impl.slice_backward(q, k, lse, rows, cols, grad, base or denominator, **options, bound=bound)


def slice_gradients(arguments: SliceArguments, differentiate: Callable[[], Gradients]) -> Gradients:
    """What ``differentiate`` gives as the gradients of q, k and lse (empty if none was given), in their dtypes and layouts."""
    q, k, lse, *_ = arguments
    if arguments.empty:
        return torch.zeros_like(q), torch.zeros_like(k), no_lse(q) if lse is None else torch.zeros_like(lse)
    dq, dk, dlse = differentiate()
    dq, dk = laid_out_like(dq.to(q.dtype), q), laid_out_like(dk.to(k.dtype), k)
    return dq, dk, no_lse(q) if lse is None else dlse


def empty_own_lse(impl: Backend, arguments: SliceArguments) -> Tensor:
    """A tensor of the shape and dtype of the second result of `slice_forward`."""
    if arguments.lse is not None or arguments.empty:
        return no_lse(arguments.q)
    return arguments.q.new_empty((*(2,) * impl.SPLITS_LSE, *arguments.q.shape[:3]), dtype=torch.float32)


def empty_slice_gradients(q: Tensor, k: Tensor, lse: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Tensors of the shapes and dtypes that `slice_gradients` returns."""
    return torch.empty_like(q), torch.empty_like(k), no_lse(q) if lse is None else torch.empty_like(lse)


@torch.library.custom_op("cdistill::attention_slice", mutates_args=())
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
    impl: str | None,
) -> tuple[Tensor, Tensor]:
    arguments = SliceArguments(q, k, lse, rows, cols, key_mask, causal, scale, each)
    chosen = backend(impl, q)
    checked_regions(chosen, arguments)
    return slice_forward(chosen, arguments)


@_forward.register_fake
def _(q, k, lse, rows, cols, key_mask, causal, scale, each, impl):
    arguments = SliceArguments(q, k, lse, rows, cols, key_mask, causal, scale, each)
    return q.new_empty(arguments.slice_shape, dtype=torch.float32), empty_own_lse(backend(impl, q), arguments)


@torch.library.custom_op("cdistill::attention_slice_backward", mutates_args=())
@without_autocast
def _backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    lse: Tensor | None,
    own_lse: Tensor,
    rows: Tensor,
    cols: Tensor,
    key_mask: Tensor | None,
    causal: bool,
    scale: float,
    each: bool,
    impl: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    arguments = SliceArguments(q, k, lse, rows, cols, key_mask, causal, scale, each)
    chosen = backend(impl, q)
    return slice_gradients(arguments, lambda: slice_backward(chosen, arguments, own_lse, grad))


@_backward.register_fake
def _(grad, q, k, lse, own_lse, rows, cols, key_mask, causal, scale, each, impl):
    return empty_slice_gradients(q, k, lse)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, causal, scale, each, impl = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    save_for_backward(ctx, *tensors, output[1])
    ctx.options = (causal, scale, each, impl)


def _differentiate(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 10
    q, k, lse, rows, cols, key_mask, own_lse = saved_for_backward(ctx)
    dq, dk, dlse = torch.ops.cdistill.attention_slice_backward(
        grad, q, k, lse, own_lse, rows, cols, key_mask, *ctx.options
    )
    return dq, dk, None if lse is None else dlse, *(None,) * 7


torch.library.register_autograd("cdistill::attention_slice", _differentiate, setup_context=_save)


def attention_slice(
    q: Tensor,
    k: Tensor,
    rows: Tensor,
    cols: Tensor,
    *,
    lse: Tensor | None = None,
    causal: bool = True,
    scale: float | None = None,
    key_mask: Tensor | None = None,
    heads: str = "mean",
    impl: str | None = None,
) -> Tensor:
    """Attention probabilities of some query rows on some key columns, normalised over all keys (SPEC A^l, paper 3.2).

    Args:
        q: queries (B,Hq,T,D), fp16, bf16 or fp32, unit stride on D, D a multiple of 8 from 16 to 256.
        k: keys (B,Hkv,T,D) of the same dtype; Hkv divides Hq (grouped-query attention).
        rows: query positions (B,R), integer, distinct within a sample, -1 = padding.
        cols: key positions (B,V), likewise.
        lse: natural log of the softmax denominators (B,Hq,T) fp32, as flash attention returns them. Without it the op
            computes them for its rows. With it, gradients flow to q and k through the numerator and to lse.
        causal: key j is visible to row i only if j <= i.
        scale: factor of the scores, 1/sqrt(D) by default.
        key_mask: (B,T) bool, True = real key.
        heads: "mean" over the query heads, or "each".
        impl: "torch", "cpp", "triton", or None to choose by device.

    Returns:
        (B,R,V) fp32, or (B,Hq,R,V) for heads="each"; zero at padding and where causality or key_mask hides the key.
        Differentiable once in q, k and lse; the gradient of padding is exactly zero.

    Raises:
        ValueError: an argument has a wrong shape, dtype, device or value, or impl cannot run here. On CUDA the values
            of rows and cols are checked by a device-side assertion instead, because reading them would synchronise.
    """
    arguments = slice_arguments(q, k, rows, cols, lse=lse, causal=causal, scale=scale, key_mask=key_mask, heads=heads)
    return torch.ops.cdistill.attention_slice(*arguments, impl)[0]


@torch.library.custom_op("cdistill::attention_slice_accumulate", mutates_args=("sums",))
@without_autocast
def _accumulate(
    q: Tensor,
    k: Tensor,
    lse: Tensor | None,
    rows: Tensor,
    cols: Tensor,
    key_mask: Tensor | None,
    causal: bool,
    scale: float,
    each: bool,
    sums: Tensor,
    windows: Sequence[int],
    impl: str | None,
) -> None:
    arguments = SliceArguments(q, k, lse, rows, cols, key_mask, causal, scale, each)
    chosen = backend(impl, q)
    checked_regions(chosen, arguments)
    if not sums.numel() or not windows:
        return
    if lse is None and chosen.FUSES_DENOMINATOR:
        a, _ = slice_forward(chosen, arguments)
        for w in windows:
            sums[w] += a
        return
    lse = with_lse(chosen, arguments)[0].lse
    assert lse is not None
    chosen.slice_accumulate(q, k, lse, rows, cols, sums, list(windows), **arguments.options, each=each)


@_accumulate.register_fake
def _(q, k, lse, rows, cols, key_mask, causal, scale, each, sums, windows, impl):
    return None


@torch.no_grad()
def attention_slice_accumulate(
    q: Tensor,
    k: Tensor,
    rows: Tensor,
    cols: Tensor,
    sums: Tensor,
    windows: Sequence[int],
    *,
    lse: Tensor | None = None,
    causal: bool = True,
    scale: float | None = None,
    key_mask: Tensor | None = None,
    heads: str = "mean",
    impl: str | None = None,
) -> None:
    """Add a layer's slice to the sums of the windows it belongs to (teacher side of VAT, paper section 4.1, equation 2).

    The slice itself is never stored by ``impl="triton"``: one launch adds it to all its windows.

    Args:
        sums: (W,B,R,V), or (W,B,Hq,R,V) for heads="each", fp16, bf16 or fp32, contiguous; changed in place.
        windows: indices into ``sums``, each at most once.
        q, k, rows, cols, lse, causal, scale, key_mask, heads, impl: as in attention_slice. No gradient is kept.

    Raises:
        ValueError: as attention_slice, or sums or windows do not fit.
    """
    arguments = slice_arguments(q, k, rows, cols, lse=lse, causal=causal, scale=scale, key_mask=key_mask, heads=heads)
    require_sums(sums, windows, arguments)
    torch.ops.cdistill.attention_slice_accumulate(*arguments, sums, list(windows), impl)
