"""Alignment losses between attention slices and their targets, and the gradients.

A program owns BR rows and loops over the columns at run time. `row` ends there. `matrix` needs the size of the whole
slice first: row sizes, then a fixed-order sum. `column` reduces both slices to the (V,) means of their columns and is
then `row` with one row per sample.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from . import _launch

LEAST_SHARE = tl.constexpr(2.0**-126)  # a smaller share counts as this one, and nothing pulls it up
MOST_SLOPE = tl.constexpr(3.0e38)  # that bf16 and fp32 hold: the gradient of a faint share may exceed it
ROWS_PER_PROGRAM = 32


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


def _loss(name: str) -> Loss:
    if name not in LOSSES:
        raise ValueError(f"loss must be one of {tuple(LOSSES)}, got {name!r}")
    return LOSSES[name]


@triton.jit
def load_pair(
    p_a,  # (BR, V) rows of one sample
    p_t,  # (BR, V)
    p_col,  # (V,) bytes
    m_row,  # (BR,)
    o_v,  # (BV,)
    V,
):
    """(BR, BV) values of a and of the target, zero where the row or the column is invalid, and where both are valid."""
    m_pair = m_row[:, None] & (tl.load(p_col + o_v, mask=o_v < V, other=0) != 0)[None, :]
    o_pair = tl.arange(0, m_row.shape[0])[:, None] * V + o_v[None, :]
    return tl.load(p_a + o_pair, mask=m_pair, other=0.0), tl.load(p_t + o_pair, mask=m_pair, other=0.0), m_pair


@triton.jit
def padded(V):
    """Row stride of gradients: a multiple of 8, so that the kernels after this one can load 16 bytes at a time."""
    return (V + 7) // 8 * 8


@triton.jit
def store_rows(
    p_x,  # (BR, V) rows of one sample, a multiple of 8 apart
    b_x,  # (BR, BV)
    o_r,  # (BR,)
    o_v,  # (BV,)
    R,
    V,
):
    p_tile = p_x + tl.arange(0, o_r.shape[0])[:, None] * padded(V) + o_v[None, :]
    tl.store(p_tile, b_x.to(p_x.dtype.element_ty), mask=(o_r < R)[:, None] & (o_v < V)[None, :])


@triton.jit
def nonzero(x):
    return tl.where(x != 0.0, x, 1.0)


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
def row_size(p_a, p_t, p_col, m_row, V, SIZE: tl.constexpr, BR: tl.constexpr, BV: tl.constexpr):
    """(BR,) what each of the two vectors is divided by before they are compared: its L2 norm, its sum, or one.

    The norm is taken of x / max|x|, so that the squares of a faint row do not underflow.
    """
    o_v = tl.arange(0, BV)
    size_a = tl.full((BR,), 1.0, tl.float32)
    size_t = tl.full((BR,), 1.0, tl.float32)
    if SIZE == "norm":
        b_a = tl.zeros((BR, BV), tl.float32)
        b_t = tl.zeros((BR, BV), tl.float32)
        for i_v in tl.range(0, V, BV):
            b_xa, b_xt, _ = load_pair(p_a, p_t, p_col, m_row, i_v + o_v, V)
            b_a = tl.maximum(b_a, tl.abs(b_xa))
            b_t = tl.maximum(b_t, tl.abs(b_xt))
        peak_a = tl.max(b_a, 1)
        peak_t = tl.max(b_t, 1)
        b_a = tl.zeros((BR, BV), tl.float32)
        b_t = tl.zeros((BR, BV), tl.float32)
        for i_v in tl.range(0, V, BV):
            b_xa, b_xt, _ = load_pair(p_a, p_t, p_col, m_row, i_v + o_v, V)
            b_xa /= nonzero(peak_a)[:, None]
            b_xt /= nonzero(peak_t)[:, None]
            b_a += b_xa * b_xa
            b_t += b_xt * b_xt
        size_a = peak_a * tl.sqrt(tl.sum(b_a, 1))
        size_t = peak_t * tl.sqrt(tl.sum(b_t, 1))
    elif SIZE == "sum":
        b_a = tl.zeros((BR, BV), tl.float32)
        b_t = tl.zeros((BR, BV), tl.float32)
        for i_v in tl.range(0, V, BV):
            b_xa, b_xt, _ = load_pair(p_a, p_t, p_col, m_row, i_v + o_v, V)
            b_a += b_xa
            b_t += b_xt
        size_a = tl.sum(b_a, 1)
        size_t = tl.sum(b_t, 1)
    else:
        tl.static_assert(SIZE == "one")
    return size_a, size_t


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
def row_size_kernel(
    p_a,  # (N, R, V)
    p_t,  # (N, R, V)
    p_row,  # (N, R) bytes
    p_col,  # (N, V) bytes
    p_size,  # (2, N, R)
    R,
    V,
    SIZE: tl.constexpr,
    BR: tl.constexpr,
    BV: tl.constexpr,
):
    """size_r = |x_r| or sum_j x_rj over valid columns, for a and the target; zero for an invalid row."""
    i_r, i_n = tl.program_id(0), tl.program_id(1).to(tl.int64)
    o_r = i_r * BR + tl.arange(0, BR)
    m_row = tl.load(p_row + i_n * R + o_r, mask=o_r < R, other=0) != 0
    p_a += (i_n * R + i_r * BR) * V
    p_t += (i_n * R + i_r * BR) * V
    p_col += i_n * V
    size_a, size_t = row_size(p_a, p_t, p_col, m_row, V, SIZE, BR, BV)
    tl.store(p_size + i_n * R + o_r, size_a, mask=o_r < R)
    tl.store(p_size + (tl.num_programs(1) + i_n) * R + o_r, size_t, mask=o_r < R)


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
    i_r, i_n = tl.program_id(0), tl.program_id(1).to(tl.int64)
    o_r = i_r * BR + tl.arange(0, BR)
    m_row = tl.load(p_row + i_n * R + o_r, mask=o_r < R, other=0) != 0
    p_a += (i_n * R + i_r * BR) * V
    p_t += (i_n * R + i_r * BR) * V
    p_col += i_n * V
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
    i_r, i_n = tl.program_id(0), tl.program_id(1).to(tl.int64)
    o_r = i_r * BR + tl.arange(0, BR)
    m_row = tl.load(p_row + i_n * R + o_r, mask=o_r < R, other=0) != 0
    p_a += (i_n * R + i_r * BR) * V
    p_t += (i_n * R + i_r * BR) * V
    p_col += i_n * V
    p_grad += (i_n * R + i_r * BR) * padded(V)
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


@triton.jit(do_not_specialize=["R", "V"])
def squared_deviation_kernel(
    p_a,  # (N, R, V)
    p_t,  # (N, R, V)
    p_row,  # (N, R) bytes
    p_col,  # (N, V) bytes
    p_mean,  # (2, N)
    p_sum,  # (2, N, R)
    R,
    V,
    BR: tl.constexpr,
    BV: tl.constexpr,
):
    """sum_j (x_rj - mean)^2 over the valid columns of row r, for a and the target; zero for an invalid row."""
    i_r, i_n = tl.program_id(0), tl.program_id(1).to(tl.int64)
    n_samples = tl.num_programs(1)
    o_r = i_r * BR + tl.arange(0, BR)
    m_row = tl.load(p_row + i_n * R + o_r, mask=o_r < R, other=0) != 0
    p_a += (i_n * R + i_r * BR) * V
    p_t += (i_n * R + i_r * BR) * V
    p_col += i_n * V
    mean_a = tl.load(p_mean + i_n)
    mean_t = tl.load(p_mean + n_samples + i_n)
    b_a = tl.zeros((BR, BV), tl.float32)
    b_t = tl.zeros((BR, BV), tl.float32)
    for i_v in tl.range(0, V, BV):
        b_xa, b_xt, m_pair = load_pair(p_a, p_t, p_col, m_row, i_v + tl.arange(0, BV), V)
        b_xa = tl.where(m_pair, b_xa - mean_a, 0.0)
        b_xt = tl.where(m_pair, b_xt - mean_t, 0.0)
        b_a += b_xa * b_xa
        b_t += b_xt * b_xt
    tl.store(p_sum + i_n * R + o_r, tl.sum(b_a, 1), mask=o_r < R)
    tl.store(p_sum + (n_samples + i_n) * R + o_r, tl.sum(b_t, 1), mask=o_r < R)


@triton.jit
def kept(b_a, b_t, m_pair, p_limit, i_n, n_samples):
    """M = [F * t != 0], F = [a <= mu_a + sigma_a] and [t <= mu_t + sigma_t]; every valid entry without sink filter."""
    if p_limit is not None:
        m_pair &= (b_a <= tl.load(p_limit + i_n)) & (b_t <= tl.load(p_limit + n_samples + i_n)) & (b_t != 0.0)
    return m_pair


@triton.jit(do_not_specialize=["R", "V", "stride_s"])
def column_sum_kernel(
    p_a,  # (N, R, V)
    p_t,  # (N, R, V)
    p_row,  # (N, R) bytes
    p_col,  # (N, V) bytes
    p_limit,  # (2, N) mu + sigma of a and the target, or None
    p_sum,  # (3, N, C, V): sums of M a, M t and M over one of C chunks of rows
    R,
    V,
    stride_s,
    ROWS: tl.constexpr,
    BR: tl.constexpr,
    BV: tl.constexpr,
):
    """sum_r M_rj a_rj, sum_r M_rj t_rj and sum_r M_rj over ROWS rows, for one block of columns j."""
    i_v, i_c, i_n = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    o_v = i_v * BV + tl.arange(0, BV)
    p_col += i_n * V
    b_a = tl.zeros((BR, BV), tl.float32)
    b_t = tl.zeros((BR, BV), tl.float32)
    b_c = tl.zeros((BR, BV), tl.float32)
    for i_r in tl.range(i_c * ROWS, tl.minimum(i_c * ROWS + ROWS, R), BR):
        o_r = i_r + tl.arange(0, BR)
        m_row = tl.load(p_row + i_n * R + o_r, mask=o_r < R, other=0) != 0
        o_row = (i_n * R + i_r) * V
        b_xa, b_xt, m_pair = load_pair(p_a + o_row, p_t + o_row, p_col, m_row, o_v, V)
        m_pair = kept(b_xa, b_xt, m_pair, p_limit, i_n, tl.num_programs(2))
        b_a += tl.where(m_pair, b_xa, 0.0)
        b_t += tl.where(m_pair, b_xt, 0.0)
        b_c += m_pair.to(tl.float32)
    p_sum += (i_n * tl.num_programs(1) + i_c) * V
    stride_s = tl.cast(stride_s, tl.int64)
    tl.store(p_sum + o_v, tl.sum(b_a, 0), mask=o_v < V)
    tl.store(p_sum + stride_s + o_v, tl.sum(b_t, 0), mask=o_v < V)
    tl.store(p_sum + 2 * stride_s + o_v, tl.sum(b_c, 0), mask=o_v < V)


@triton.jit(do_not_specialize=["R", "V"])
def column_gradient_kernel(
    p_a,  # (N, R, V)
    p_t,  # (N, R, V)
    p_row,  # (N, R) bytes
    p_col,  # (N, V) bytes
    p_limit,  # (2, N) or None
    p_du,  # (N, V) gradient of the column sums
    p_grad,  # (N, R, V), rows padded
    R,
    V,
    BR: tl.constexpr,
    BV: tl.constexpr,
):
    """d loss / d a_rj = M_rj du_j; M, mu and sigma carry no gradient."""
    i_r, i_n = tl.program_id(0), tl.program_id(1).to(tl.int64)
    o_r = i_r * BR + tl.arange(0, BR)
    m_row = tl.load(p_row + i_n * R + o_r, mask=o_r < R, other=0) != 0
    p_a += (i_n * R + i_r * BR) * V
    p_t += (i_n * R + i_r * BR) * V
    p_col += i_n * V
    p_grad += (i_n * R + i_r * BR) * padded(V)
    for i_v in tl.range(0, V, BV):
        o_v = i_v + tl.arange(0, BV)
        b_a, b_t, m_pair = load_pair(p_a, p_t, p_col, m_row, o_v, V)
        m_pair = kept(b_a, b_t, m_pair, p_limit, i_n, tl.num_programs(1))
        b_du = tl.load(p_du + i_n * V + o_v, mask=o_v < V, other=0.0)
        store_rows(p_grad, tl.where(m_pair, b_du[None, :], 0.0), o_r, o_v, R, V)


def _common(a, target, row_valid, col_valid) -> dict:
    tile = _launch.row_tile(a.device)
    return {
        "device": a.device,
        "p_a": a,
        "p_t": target,
        "p_row": row_valid.view(torch.uint8),
        "p_col": col_valid.view(torch.uint8),
        "R": a.shape[1],
        "V": a.shape[2],
        "BR": tile.BM,
        "BV": tile.BN,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }


def _row_grid(common: dict) -> tuple[int, int]:
    return triton.cdiv(common["R"], common["BR"]), common["p_a"].shape[0]


def _slice_size(common: dict, kind: str) -> torch.Tensor:
    """(2,N) norms or sums of whole slices, or ones."""
    N, R, _ = common["p_a"].shape
    if kind == "one":
        return torch.ones(2, N, dtype=torch.float32, device=common["device"])
    size = torch.empty(2, N, R, dtype=torch.float32, device=common["device"])
    _launch.launch(row_size_kernel, _row_grid(common), p_size=size, SIZE=kind, **common)
    if kind == "sum":
        return size.sum(-1)
    peak = size.amax(-1)
    return peak * (size / peak.clamp(min=torch.finfo(peak.dtype).tiny).unsqueeze(-1)).square().sum(-1).sqrt()


def _row_sums(common: dict, loss: Loss, term: str, size: torch.Tensor | None) -> torch.Tensor:
    """(N,) sums of a term."""
    N, R, _ = common["p_a"].shape
    sums = torch.empty(N, R, dtype=torch.float32, device=common["device"])
    options = {"SIZE": loss.size, "TERM": term, "OF_ZERO": loss.of_zero}
    _launch.launch(row_sum_kernel, _row_grid(common), p_size=size, p_sum=sums, **options, **common)
    return sums.sum(-1)


def _sink_limit(common: dict, entries: torch.Tensor) -> torch.Tensor:
    """(2,N) mean + unbiased standard deviation over the valid entries of a and of the target."""
    N, R, _ = common["p_a"].shape
    mean = _slice_size(common, "sum") / entries.clamp(min=1)
    squares = torch.empty(2, N, R, dtype=torch.float32, device=common["device"])
    _launch.launch(squared_deviation_kernel, _row_grid(common), p_mean=mean, p_sum=squares, **common)
    return mean + (squares.sum(-1) / (entries - 1).clamp(min=1)).sqrt()


def _column_means(common: dict, n_rows, n_cols, sink_filter: bool):
    """(N,V) column means u of a and v of the target, the counts they were divided by, and the sink limit."""
    N, R, V = common["p_a"].shape
    limit = _sink_limit(common, n_rows * n_cols) if sink_filter else None
    chunks = triton.cdiv(R, ROWS_PER_PROGRAM)
    sums = torch.empty(3, N, chunks, V, dtype=torch.float32, device=common["device"])
    _launch.launch(
        column_sum_kernel,
        (triton.cdiv(V, common["BV"]), chunks, N),
        p_limit=limit,
        p_sum=sums,
        stride_s=sums.stride(0),
        ROWS=ROWS_PER_PROGRAM,
        **common,
    )
    total_a, total_t, count = sums.sum(2)
    count = count.clamp(min=1)
    return total_a / count, total_t / count, count, limit


def alignment_loss(a, target, row_valid, col_valid, *, loss, reduction, sink_filter):
    """Loss of every slice, (N,) fp32; a and target (N,R,V) fp32, row_valid (N,R) and col_valid (N,V) bool."""
    if not a.numel():
        return torch.zeros(a.shape[0], dtype=torch.float32, device=a.device)
    n_rows, n_cols = row_valid.sum(-1), col_valid.sum(-1)
    common = _common(a, target, row_valid, col_valid)
    if reduction == "column":
        u, v, _, _ = _column_means(common, n_rows, n_cols, sink_filter)
        one_row = (n_rows > 0).unsqueeze(1)
        return alignment_loss(
            u.unsqueeze(1), v.unsqueeze(1), one_row, col_valid, loss=loss, reduction="row", sink_filter=False
        )
    own = _loss(loss)
    size = _slice_size(common, own.size) if reduction == "matrix" else None
    total = _row_sums(common, own, own.term, size)
    if loss == "mse":
        total = total / (n_rows * n_cols).clamp(min=1)
    elif reduction == "row":
        total = total / n_rows.clamp(min=1)
    else:
        total = torch.where((size != 0).all(0), total, own.of_zero)
    return torch.where((n_rows > 0) & (n_cols > 0), total, 0.0)


def alignment_grad(a, target, row_valid, col_valid, grad_out, *, loss, reduction, sink_filter, dtype=torch.float32):
    """Gradient of ``alignment_loss`` in a, times grad_out (N,): (N,R,V), zero at invalid rows and columns.

    With ``dtype`` bf16 it is rounded to that, as it would be for the product with bf16 queries and keys anyway; fp16
    could not hold it, so anything else gives fp32.
    """
    if not a.numel():
        return torch.zeros_like(a)
    n_rows, n_cols = row_valid.sum(-1), col_valid.sum(-1)
    common = _common(a, target, row_valid, col_valid)
    (N, R, V), row = a.shape, triton.cdiv(a.shape[2], 8) * 8
    dtype = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
    grad = torch.empty(N, R, row, dtype=dtype, device=a.device)[:, :, :V]
    if reduction == "column":
        u, v, count, limit = _column_means(common, n_rows, n_cols, sink_filter)
        one_row = (n_rows > 0).unsqueeze(1)
        du = alignment_grad(
            u.unsqueeze(1), v.unsqueeze(1), one_row, col_valid, grad_out, loss=loss, reduction="row", sink_filter=False
        )
        _launch.launch(
            column_gradient_kernel, _row_grid(common), p_limit=limit, p_du=du.squeeze(1) / count, p_grad=grad, **common
        )
        return grad
    own, size, slice_sum = _loss(loss), None, None
    weight = grad_out
    if reduction == "matrix":
        size = _slice_size(common, own.size)
        slice_sum = torch.zeros_like(weight) if own.slope is None else _row_sums(common, own, own.slope, size)
    elif loss != "mse":
        weight = weight / n_rows.clamp(min=1)
    if loss == "mse":
        weight = weight / (n_rows * n_cols).clamp(min=1)
    _launch.launch(
        gradient_kernel,
        _row_grid(common),
        p_size=size,
        p_sum=slice_sum,
        p_weight=weight.contiguous(),
        p_grad=grad,
        LOSS=loss,
        SIZE=own.size,
        SLOPE=own.slope,
        **common,
    )
    return grad
