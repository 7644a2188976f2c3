"""The column means of two slices, without attention sinks if asked, and the gradient through them."""

import torch
import triton
import triton.language as tl

from . import _launch
from ._slice_pairs import (
    block_of_rows,
    load_pair,
    padded,
    row_grid,
    slice_size,
    store_rows,
)

ROWS_PER_PROGRAM = 32


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
    i_n, o_r, m_row, p_a, p_t, p_col = block_of_rows(p_a, p_t, p_row, p_col, R, V, BR)
    n_samples = tl.num_programs(1)
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
    i_n, o_r, m_row, p_a, p_t, p_col = block_of_rows(p_a, p_t, p_row, p_col, R, V, BR)
    p_grad += (i_n * R + tl.program_id(0) * BR) * padded(V)
    for i_v in tl.range(0, V, BV):
        o_v = i_v + tl.arange(0, BV)
        b_a, b_t, m_pair = load_pair(p_a, p_t, p_col, m_row, o_v, V)
        m_pair = kept(b_a, b_t, m_pair, p_limit, i_n, tl.num_programs(1))
        b_du = tl.load(p_du + i_n * V + o_v, mask=o_v < V, other=0.0)
        store_rows(p_grad, tl.where(m_pair, b_du[None, :], 0.0), o_r, o_v, R, V)


def sink_limit(common: dict, entries: torch.Tensor) -> torch.Tensor:
    """(2,N) mean + unbiased standard deviation over the valid entries of a and of the target."""
    N, R, _ = common["p_a"].shape
    mean = slice_size(common, "sum") / entries.clamp(min=1)
    squares = torch.empty(2, N, R, dtype=torch.float32, device=common["device"])
    _launch.launch(squared_deviation_kernel, row_grid(common), p_mean=mean, p_sum=squares, **common)
    return mean + (squares.sum(-1) / (entries - 1).clamp(min=1)).sqrt()


def column_means(common: dict, n_rows, n_cols, sink_filter: bool):
    """(N,V) column means u of a and v of the target, the counts they were divided by, and the sink limit."""
    N, R, V = common["p_a"].shape
    limit = sink_limit(common, n_rows * n_cols) if sink_filter else None
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
