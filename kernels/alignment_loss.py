"""Alignment losses between attention slices and their targets, and the gradients.

A program owns BR rows and loops over the columns at run time. `row` ends there. `matrix` needs the size of the whole
slice first: row sizes, then a fixed-order sum. `column` reduces both slices to the (V,) means of their columns and is
then `row` with one row per sample.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from cdistill.errors import InputError

from . import _launch
from ._slice_pairs import (
    block_of_rows,
    common_arguments,
    load_pair,
    nonzero,
    padded,
    row_grid,
    row_size,
    slice_size,
    store_rows,
)
from .alignment_columns import (
    column_gradient_kernel,
    column_means,
)

LEAST_SHARE = tl.constexpr(2.0**-126)  # a smaller share counts as this one, and nothing pulls it up
MOST_SLOPE = tl.constexpr(3.0e38)  # that bf16 and fp32 hold: the gradient of a faint share may exceed it


class Loss(NamedTuple):
    """What the kernels compute for an alignment loss."""

    size: str  # what vectors are divided by first (`row_size`): "norm", "sum" or "one"
    term: str  # summed over the entries (`row_sum`), the loss
    slope: str | None  # a term whose sum the gradient subtracts from each entry's, or None
    of_zero: float  # loss of a zero vector, which has no gradient


LOSSES = {
    "cosine": Loss("norm", "cosine", "cosine", 1.0),
    "mse": Loss("one", "mse", None, 0.0),
    "kl": Loss("sum", "kl", "kl slope", 0.0),
    "jsd": Loss("sum", "jsd", "jsd slope", 0.0),
}


REDUCTIONS = ("row", "matrix", "column")


def _loss(name: str, reduction: str) -> Loss:
    """The record of a loss; ValueError for a name, or that of a reduction, which is not known here."""
    if name not in LOSSES:
        raise InputError(f"loss must be one of {tuple(LOSSES)}, got {name!r}")
    if reduction not in REDUCTIONS:
        raise InputError(f"reduction must be one of {REDUCTIONS}, got {reduction!r}")
    return LOSSES[name]


@triton.jit
def at_least_share(x):
    return tl.where(x < LEAST_SHARE, LEAST_SHARE, x)  # NaN stays NaN


@triton.jit
def not_infinite(x):
    return tl.where(tl.abs(x) > MOST_SLOPE, tl.where(x > 0.0, MOST_SLOPE, -MOST_SLOPE), x)


@triton.jit
def log_of_mean(b_s, b_t):
    """log(s / m) with m = (s + t) / 2, where they are near by the series of z = (s - m) / (s + m) = (s - t) / (3 s + t)."""
    b_s, b_t = at_least_share(b_s), at_least_share(b_t)
    b_z = (b_s - b_t) / (3.0 * b_s + b_t)
    b_zz = b_z * b_z
    b_near = 2.0 * b_z * (1.0 + b_zz * (1.0 / 3 + b_zz * (0.2 + b_zz * (1.0 / 7 + b_zz * (1.0 / 9)))))
    b_far = tl.log(b_s) - tl.log(0.5 * (b_s + b_t))
    return tl.where(tl.abs(b_z) < 0.125, b_near, b_far)


@triton.jit
def row_sum(p_a, p_t, p_col, m_row, V, size_a, size_t, TERM: tl.constexpr, BR: tl.constexpr, BV: tl.constexpr):
    """(BR,) sums over the rows of a term of s = a / size_a and t = t / size_t.

    cosine: (s - t)^2 / 2, which is 1 - cos without its cancellation; mse: (s - t)^2; kl: t (log t - log s); kl slope: s - t,
    or s where that is too faint; jsd: (s log s/m + t log t/m) / 2 with m = (s + t) / 2, by a series where
    they are near; jsd slope: s/2 log s/m. The sums of slopes keep that of s at one.
    """
    o_v = tl.arange(0, BV)
    b_sum = tl.zeros((BR, BV), tl.float32)
    for i_v in tl.range(0, V, BV):
        b_a, b_t, _ = load_pair(p_a, p_t, p_col, m_row, i_v + o_v, V)
        b_s = b_a / nonzero(size_a)[:, None]
        b_t = b_t / nonzero(size_t)[:, None]
        b_d = b_s - b_t
        if TERM == "cosine":
            b_sum += 0.5 * b_d * b_d
        elif TERM == "mse":
            b_sum += b_d * b_d
        elif TERM == "kl":
            b_log = tl.log(at_least_share(b_t)) - tl.log(at_least_share(b_s))
            b_sum += tl.where(b_t != 0.0, b_t * b_log, 0.0)
        elif TERM == "kl slope":
            b_sum += tl.where(b_s < LEAST_SHARE, b_s, b_d)
        elif TERM == "jsd":
            b_r = b_d / at_least_share(b_s + b_t)
            b_rr = b_r * b_r
            b_series = b_rr * (1.0 + b_rr * (1.0 / 6 + b_rr * (1.0 / 15 + b_rr * (1.0 / 28 + b_rr * (1.0 / 45)))))
            b_both = b_s + b_t
            b_log = tl.log(at_least_share(0.5 * b_both))
            b_far = b_s * (tl.log(at_least_share(b_s)) - b_log) + b_t * (tl.log(at_least_share(b_t)) - b_log)
            b_sum += 0.5 * tl.where(tl.abs(b_r) < 0.25, 0.5 * b_both * b_series, b_far)
        else:
            tl.static_assert(TERM == "jsd slope")
            b_sum += 0.5 * b_s * log_of_mean(b_s, b_t)
    return tl.sum(b_sum, 1)


@triton.jit(do_not_specialize=["R", "V"])
def row_sum_kernel(
    p_a,  # (N, R, V)
    p_t,  # (N, R, V)
    p_row,  # (N, R) bytes
    p_col,  # (N, V) bytes
    p_size,  # (2, N) of the whole slice, or None: every row has its own
    p_sum,  # (N, R)
    R,
    V,
    SIZE: tl.constexpr,
    TERM: tl.constexpr,
    OF_ZERO: tl.constexpr,
    BR: tl.constexpr,
    BV: tl.constexpr,
):
    """Loss of each row (p_size None), or each row's part of the loss of the slice; zero for an invalid row.

    The loss of a row with a zero vector is OF_ZERO. For a slice the caller sees to that.
    """
    i_n, o_r, m_row, p_a, p_t, p_col = block_of_rows(p_a, p_t, p_row, p_col, R, V, BR)
    if p_size is None:
        size_a, size_t = row_size(p_a, p_t, p_col, m_row, V, SIZE, BR, BV)
    else:
        size_a = tl.load(p_size + i_n + tl.zeros((BR,), tl.int32))
        size_t = tl.load(p_size + tl.num_programs(1) + i_n + tl.zeros((BR,), tl.int32))
    b_sum = row_sum(p_a, p_t, p_col, m_row, V, size_a, size_t, TERM, BR, BV)
    if p_size is None:
        b_sum = tl.where((size_a != 0.0) & (size_t != 0.0), b_sum, OF_ZERO)
    tl.store(p_sum + i_n * R + o_r, tl.where(m_row, b_sum, 0.0), mask=o_r < R)


@triton.jit(do_not_specialize=["R", "V"])
def gradient_kernel(
    p_a,  # (N, R, V)
    p_t,  # (N, R, V)
    p_row,  # (N, R) bytes
    p_col,  # (N, V) bytes
    p_size,  # (2, N) of the whole slice, or None: every row has its own
    p_sum,  # (N,) of the whole slice: the sum of SLOPE; None with p_size
    p_weight,  # (N,) gradient of one vector's loss
    p_grad,  # (N, R, V), rows padded
    R,
    V,
    LOSS: tl.constexpr,
    SIZE: tl.constexpr,
    SLOPE: tl.constexpr,
    BR: tl.constexpr,
    BV: tl.constexpr,
):
    """d loss / d a, with s = a / size_a and t = t / size_t of the compared vectors:

    cosine: ((s - t) - (1 - cos) s) / size_a; mse: 2 (s - t); kl and jsd: (f - sum s f) / size_a with f = 1 - t / s, or 1 of a
    faint s, and f = log(s / m) / 2 with m = (s + t) / 2.
    The differences are formed first: near agreement the textbook forms lose all digits.
    """
    i_n, o_r, m_row, p_a, p_t, p_col = block_of_rows(p_a, p_t, p_row, p_col, R, V, BR)
    p_grad += (i_n * R + tl.program_id(0) * BR) * padded(V)
    b_sum = tl.zeros((BR,), tl.float32)
    if p_size is None:
        size_a, size_t = row_size(p_a, p_t, p_col, m_row, V, SIZE, BR, BV)
        if SLOPE is not None:
            b_sum = row_sum(p_a, p_t, p_col, m_row, V, size_a, size_t, SLOPE, BR, BV)
    else:
        size_a = tl.load(p_size + i_n + tl.zeros((BR,), tl.int32))
        size_t = tl.load(p_size + tl.num_programs(1) + i_n + tl.zeros((BR,), tl.int32))
        b_sum += tl.load(p_sum + i_n)
    b_weight = tl.load(p_weight + i_n) / nonzero(size_a)
    if SIZE == "sum":
        b_weight = not_infinite(b_weight)
    m_alive = (size_a != 0.0) & (size_t != 0.0)

    for i_v in tl.range(0, V, BV):
        o_v = i_v + tl.arange(0, BV)
        b_a, b_t, m_pair = load_pair(p_a, p_t, p_col, m_row, o_v, V)
        b_s = b_a / nonzero(size_a)[:, None]
        b_t = b_t / nonzero(size_t)[:, None]
        b_d = b_s - b_t
        if LOSS == "cosine":
            b_g = b_d - b_sum[:, None] * b_s
        elif LOSS == "kl":
            b_g = tl.where(b_s < LEAST_SHARE, 1.0, b_d / at_least_share(b_s)) - b_sum[:, None]
        elif LOSS == "jsd":
            b_g = 0.5 * log_of_mean(b_s, b_t) - b_sum[:, None]
        else:
            tl.static_assert(LOSS == "mse")
            b_g = 2.0 * b_d
        b_g = tl.where(m_pair & m_alive[:, None], b_g * b_weight[:, None], 0.0)
        if SIZE == "sum":
            b_g = not_infinite(b_g)
        store_rows(p_grad, b_g, o_r, o_v, R, V)


def _row_sums(common: dict, loss: Loss, term: str, size: torch.Tensor | None) -> torch.Tensor:
    """(N,) sums of a term."""
    N, R, _ = common["p_a"].shape
    sums = torch.empty(N, R, dtype=torch.float32, device=common["device"])
    options = {"SIZE": loss.size, "TERM": term, "OF_ZERO": loss.of_zero}
    _launch.launch(row_sum_kernel, row_grid(common), p_size=size, p_sum=sums, **options, **common)
    return sums.sum(-1)


def _of_columns(u, v, n_rows, compared):
    """Column means (N,V) as slices of one row, and what these are compared with."""
    one_row = (n_rows > 0).unsqueeze(1)
    rows = compared._replace(target=v.unsqueeze(1), row_valid=one_row, reduction="row", sink_filter=False)
    return u.unsqueeze(1), rows


def alignment_loss(a, compared):
    """Loss of every slice, (N,) fp32: a (N,R,V) fp32 with the target of a `Comparison` of the ops."""
    own, reduction = _loss(compared.loss, compared.reduction), compared.reduction
    if not a.numel():
        return torch.zeros(a.shape[0], dtype=torch.float32, device=a.device)
    n_rows, n_cols = compared.row_valid.sum(-1), compared.col_valid.sum(-1)
    common = common_arguments(a, compared)
    if reduction == "column":
        u, v, _, _ = column_means(common, n_rows, n_cols, compared.sink_filter)
        return alignment_loss(*_of_columns(u, v, n_rows, compared))
    size = slice_size(common, own.size) if reduction == "matrix" else None
    total = _row_sums(common, own, own.term, size)
    if compared.loss == "mse":
        total = total / (n_rows * n_cols).clamp(min=1)
    elif reduction == "row":
        total = total / n_rows.clamp(min=1)
    else:
        total = torch.where((size != 0).all(0), total, own.of_zero)
    return torch.where((n_rows > 0) & (n_cols > 0), total, 0.0)


def alignment_grad(a, compared, grad_out, dtype=torch.float32):
    """Gradient of ``alignment_loss`` in a, times grad_out (N,): (N,R,V), zero at invalid rows and columns.

    With ``dtype`` bf16 it is rounded to that, as it would be for the product with bf16 queries and keys anyway; fp16
    could not hold it, so anything else gives fp32.
    """
    own, reduction = _loss(compared.loss, compared.reduction), compared.reduction
    if not a.numel():
        return torch.zeros_like(a)
    n_rows, n_cols = compared.row_valid.sum(-1), compared.col_valid.sum(-1)
    common = common_arguments(a, compared)
    (N, R, V), row = a.shape, triton.cdiv(a.shape[2], 8) * 8
    dtype = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
    grad = torch.empty(N, R, row, dtype=dtype, device=a.device)[:, :, :V]
    if reduction == "column":
        u, v, count, limit = column_means(common, n_rows, n_cols, compared.sink_filter)
        du = alignment_grad(*_of_columns(u, v, n_rows, compared), grad_out).squeeze(1) / count
        _launch.launch(column_gradient_kernel, row_grid(common), p_limit=limit, p_du=du, p_grad=grad, **common)
        return grad
    size, slice_sum, weight = None, None, grad_out
    if reduction == "matrix":
        size = slice_size(common, own.size)
        slice_sum = torch.zeros_like(weight) if own.slope is None else _row_sums(common, own, own.slope, size)
    elif compared.loss != "mse":
        weight = weight / n_rows.clamp(min=1)
    if compared.loss == "mse":
        weight = weight / (n_rows * n_cols).clamp(min=1)
    common.update(LOSS=compared.loss, SIZE=own.size, SLOPE=own.slope, p_size=size, p_sum=slice_sum)
    _launch.launch(gradient_kernel, row_grid(common), p_weight=weight.contiguous(), p_grad=grad, **common)
    return grad
