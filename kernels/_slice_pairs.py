"""What the kernels of the alignment losses share: pairs of slices, and the sizes that they are divided by."""

import torch
import triton
import triton.language as tl

from . import _launch


@triton.jit
def block_of_rows(
    p_a,  # (N, R, V)
    p_t,  # (N, R, V)
    p_row,  # (N, R) bytes
    p_col,  # (N, V) bytes
    R,
    V,
    BR: tl.constexpr,
):
    """A program's sample, its rows (BR,) and whether they are valid, where these begin in a and t, and the sample in p_col."""
    i_r, i_n = tl.program_id(0), tl.program_id(1).to(tl.int64)
    o_r = i_r * BR + tl.arange(0, BR)
    m_row = tl.load(p_row + i_n * R + o_r, mask=o_r < R, other=0) != 0
    o_block = (i_n * R + i_r * BR) * V
    return i_n, o_r, m_row, p_a + o_block, p_t + o_block, p_col + i_n * V


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
    i_n, o_r, m_row, p_a, p_t, p_col = block_of_rows(p_a, p_t, p_row, p_col, R, V, BR)
    size_a, size_t = row_size(p_a, p_t, p_col, m_row, V, SIZE, BR, BV)
    tl.store(p_size + i_n * R + o_r, size_a, mask=o_r < R)
    tl.store(p_size + (tl.num_programs(1) + i_n) * R + o_r, size_t, mask=o_r < R)


def common_arguments(a, compared) -> dict:
    tile = _launch.row_tile(a.device)
    return {
        "device": a.device,
        "p_a": a,
        "p_t": compared.target,
        "p_row": compared.row_valid.view(torch.uint8),
        "p_col": compared.col_valid.view(torch.uint8),
        "R": a.shape[1],
        "V": a.shape[2],
        "BR": tile.BM,
        "BV": tile.BN,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }


def row_grid(common: dict) -> tuple[int, int]:
    return triton.cdiv(common["R"], common["BR"]), common["p_a"].shape[0]


def slice_size(common: dict, kind: str) -> torch.Tensor:
    """(2,N) norms or sums of whole slices, or ones."""
    N, R, _ = common["p_a"].shape
    if kind == "one":
        return torch.ones(2, N, dtype=torch.float32, device=common["device"])
    size = torch.empty(2, N, R, dtype=torch.float32, device=common["device"])
    _launch.launch(row_size_kernel, row_grid(common), p_size=size, SIZE=kind, **common)
    if kind == "sum":
        return size.sum(-1)
    peak = size.amax(-1)
    return peak * (size / peak.clamp(min=torch.finfo(peak.dtype).tiny).unsqueeze(-1)).square().sum(-1).sqrt()
