"""Which rows and columns of a slice count, and whether all positions are allowed: two launches, no sync."""

import torch
import triton
import triton.language as tl

from . import _launch


@triton.jit
def load_positions(p_rows, p_cols, R, V, BN: tl.constexpr):
    """One block of positions of one sample: columns where the second grid axis is 0, rows where it is 1."""
    i_b = tl.program_id(2).to(tl.int64)
    o_n = tl.program_id(0) * BN + tl.arange(0, BN)
    b_pos = tl.load(p_cols + i_b * V + o_n, mask=(o_n < V) & (tl.program_id(1) == 0), other=-1)
    b_row = tl.load(p_rows + i_b * R + o_n, mask=(o_n < R) & (tl.program_id(1) == 1), other=-1)
    return o_n, tl.where(tl.program_id(1) == 0, b_pos, b_row)


@triton.jit(do_not_specialize=["R", "V", "T"])
def claim_kernel(
    p_rows,  # (B, R)
    p_cols,  # (B, V)
    p_mask,  # (B, T) or None
    p_owner,  # (B, 2, T)
    p_first,  # (B, blocks)
    R,
    V,
    T,
    BN: tl.constexpr,
):
    """owner[j] = index of position j: of equal positions one is left. first = the block's first column that is a real key."""
    i_n, i_axis, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    o_n, b_pos = load_positions(p_rows, p_cols, R, V, BN)
    m_real = (b_pos >= 0) & (b_pos < T)
    tl.store(p_owner + (i_b * 2 + i_axis) * T + b_pos, o_n, mask=m_real)
    if i_axis == 0:
        if p_mask is not None:
            m_real &= tl.load(p_mask + i_b * T + b_pos, mask=m_real, other=0) != 0
        first = tl.min(tl.where(m_real, b_pos.to(tl.int32), T), 0)
        tl.store(p_first + i_b * tl.num_programs(0) + i_n, first)


@triton.jit(do_not_specialize=["R", "V", "T"])
def check_kernel(
    p_rows,  # (B, R)
    p_cols,  # (B, V)
    p_owner,  # (B, 2, T)
    p_first,  # (B, blocks)
    p_row_valid,  # (B, R) bytes
    p_col_valid,  # (B, V) bytes
    p_allowed,  # (B, 2, blocks) bytes
    R,
    V,
    T,
    CAUSAL: tl.constexpr,
    BN: tl.constexpr,
):
    """A row is valid if it is real and sees a real key of the columns; allowed: the block is in range and distinct."""
    i_n, i_axis, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    n_blocks = tl.num_programs(0)
    o_n, b_pos = load_positions(p_rows, p_cols, R, V, BN)
    m_real = (b_pos >= 0) & (b_pos < T)
    b_owner = tl.load(p_owner + (i_b * 2 + i_axis) * T + b_pos, mask=m_real, other=-1)
    m_allowed = (b_pos == -1) | (m_real & (b_owner == o_n))
    tl.store(p_allowed + (i_b * 2 + i_axis) * n_blocks + i_n, tl.min(m_allowed.to(tl.int32), 0).to(tl.uint8))
    if i_axis == 0:
        tl.store(p_col_valid + i_b * V + o_n, (b_pos >= 0).to(tl.uint8), mask=o_n < V)
    else:
        b_first = tl.zeros((BN,), tl.int32) + T
        for i_block in tl.range(0, n_blocks, BN):
            o_block = i_block + tl.arange(0, BN)
            b_block = tl.load(p_first + i_b * n_blocks + o_block, mask=o_block < n_blocks, other=T)
            b_first = tl.minimum(b_first, b_block)
        first = tl.min(b_first, 0)
        m_valid = (b_pos >= 0) & (first < T)
        if CAUSAL:
            m_valid &= first <= b_pos
        tl.store(p_row_valid + i_b * R + o_n, m_valid.to(tl.uint8), mask=o_n < R)


def regions(problem):
    """Rows (B,R) that see one of their columns, columns (B,V) that are not padding, and whether the positions are allowed.

    rows and cols int32 or int64, contiguous. Allowed, () bool: every position is -1, or that of a token and distinct.
    """
    rows, cols, key_mask, tokens = problem.rows, problem.cols, problem.key_mask, problem.q.shape[2]
    (B, R), V, device = rows.shape, cols.shape[1], rows.device
    tile = _launch.row_tile(device)
    blocks = triton.cdiv(max(R, V), tile.BN)
    row_valid, col_valid = (torch.empty(B, n, dtype=torch.bool, device=device) for n in (R, V))
    allowed = torch.empty(B, 2, blocks, dtype=torch.bool, device=device)
    if allowed.numel():
        arguments = {
            "device": device,
            "p_rows": rows,
            "p_cols": cols,
            "p_mask": None if key_mask is None else key_mask.view(torch.uint8),
            "p_owner": torch.empty(B, 2, tokens, dtype=torch.int32, device=device),
            "p_first": torch.empty(B, blocks, dtype=torch.int32, device=device),
            "p_row_valid": row_valid.view(torch.uint8),
            "p_col_valid": col_valid.view(torch.uint8),
            "p_allowed": allowed.view(torch.uint8),
            "R": R,
            "V": V,
            "T": tokens,
            "CAUSAL": problem.causal,
            "BN": tile.BN,
            "num_warps": tile.num_warps,
            "num_stages": 1,
        }
        for kernel in (claim_kernel, check_kernel):
            _launch.launch(kernel, (blocks, 2, B), **_launch.taken(kernel, arguments))
    return row_valid, col_valid, allowed.all()
