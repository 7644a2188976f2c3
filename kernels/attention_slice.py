"""Softmax probabilities on chosen rows and columns; `slice_gradient` has their gradients.

With the log-sum-exp of a row known, P = exp(scale*q.k - lse) needs no other key, so the slice is one dot and one exp
per head; with a split one (`_primitives`) P = share * exp(scale*q.k) / 2^max. Nothing larger than a tile exists besides
inputs and results, every result has one owner, and sums run in a fixed order. Rows and columns are gathered vector by
vector, so a contiguous image and scattered positions cost the same.
"""

import torch
import triton
import triton.language as tl

from . import _launch
from ._launch import (
    BATCH_DEPENDENT,
    attention_arguments,
    lse_arguments,
)
from ._primitives import (
    exponentials,
    load_keys,
    load_lse,
    load_rows,
    sample_pointer,
    scores,
    visible,
)

# Window buffers one launch can add to: the bits of a signed 64-bit argument.
WINDOWS_PER_LAUNCH = 62


@triton.jit
def load_unmasked(
    p_x,  # (T, D) of one sample and head
    b_pos,  # (BP,)
    stride_t,  # in units of UNIT elements
    UNIT: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
):
    """As `load_vectors`, but -1 gives the first vector instead of zeros: masks take registers and instructions in loops."""
    o_d = tl.arange(0, BD)
    p_tile = p_x + (tl.maximum(b_pos, 0).to(tl.int64) * stride_t * UNIT)[:, None] + o_d[None, :]
    return tl.load(p_tile) if D == BD else tl.load(p_tile, mask=(o_d < D)[None, :], other=0.0)


@triton.jit(do_not_specialize=[*BATCH_DEPENDENT, "windows"])
def slice_forward_kernel(
    p_q,  # (B, Hq, T, D)
    p_k,  # (B, Hkv, T, D)
    p_lse,  # (B, Hq, T)
    p_share,  # (B, Hq, T) or None
    p_rows,  # (B, R)
    p_cols,  # (B, V)
    p_mask,  # (B, T) or None
    p_out,  # (SPLIT, B, R, V), with EACH (B, Hq, R, V), with windows (windows, B[, Hq], R, V)
    stride_qb,
    stride_qh,
    stride_qt,
    stride_kb,
    stride_kh,
    stride_kt,
    R,
    V,
    T,
    Hq,
    scale,
    windows,  # bits: the buffers of p_out that get the tile added; None: p_out is written
    stride_w,  # from one buffer to the next
    SPLIT: tl.constexpr,
    EACH: tl.constexpr,
    NEST: tl.constexpr,
    GROUP: tl.constexpr,
    CAUSAL: tl.constexpr,
    UNIT: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """A_ij = 1/Hq * sum_h exp(scale*q_hi.k_hj - lse_hi) on one (BM, BN) tile, zero where row i does not see key j.

    Heads are innermost, so the tile is written once and no head's probabilities leave the program. With NEST a kv head's
    keys are loaded once for its group of query heads. With EACH a program has one query head and no mean is taken. SPLIT > 1
    programs share the heads of a tile where tiles alone would not fill the GPU: p_out then holds their partial sums.
    A tile without a visible entry skips the heads. Hidden entries, which may be anything, are cut off at the end.
    """
    i_n, i_m, i_z = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    if EACH:
        i_b = i_z // Hq
        i_first = (i_z % Hq).to(tl.int32)
        n_loop = 1
        i_out = i_z
        weight = 1.0
    else:
        i_b = i_z // SPLIT
        n_loop = Hq // GROUP // SPLIT
        i_first = (i_z % SPLIT).to(tl.int32) * n_loop * GROUP
        if not NEST:
            n_loop *= GROUP
        i_out = (i_z % SPLIT) * (tl.num_programs(2) // SPLIT) + i_b
        weight = 1.0 / Hq
    o_m = i_m * BM + tl.arange(0, BM)
    o_n = i_n * BN + tl.arange(0, BN)
    p_mask = sample_pointer(p_mask, i_b, T)
    b_row = load_rows(p_rows + i_b * R, o_m, R)
    b_col = load_keys(p_cols + i_b * V, p_mask, o_n, V)
    last = tl.max(b_row, 0)
    if not CAUSAL:
        last = tl.where(last >= 0, T, -1)
    n_loop = tl.where(tl.min(tl.where(b_col >= 0, b_col, T), 0) <= tl.minimum(last, T - 1), n_loop, 0)
    p_q += i_b * stride_qb * UNIT
    p_k += i_b * stride_kb * UNIT

    b_acc = tl.zeros((BM, BN), tl.float32)
    if not NEST:
        for i_h in tl.range(i_first, i_first + n_loop):
            b_q = load_unmasked(p_q + tl.cast(i_h, tl.int64) * stride_qh * UNIT, b_row, stride_qt, UNIT, D, BD)
            b_k = load_unmasked(p_k + tl.cast(i_h // GROUP, tl.int64) * stride_kh * UNIT, b_col, stride_kt, UNIT, D, BD)
            b_lse, b_share = load_lse(p_lse, p_share, (i_b * Hq + i_h) * T, b_row)
            b_acc += exponentials(scores(b_q, b_k), scale, b_lse[:, None]) * b_share[:, None]
    else:
        for i_kv in tl.range(i_first // GROUP, i_first // GROUP + n_loop):
            b_k = load_unmasked(p_k + tl.cast(i_kv, tl.int64) * stride_kh * UNIT, b_col, stride_kt, UNIT, D, BD)
            for i_h in tl.range(i_kv * GROUP, i_kv * GROUP + GROUP):
                b_q = load_unmasked(p_q + tl.cast(i_h, tl.int64) * stride_qh * UNIT, b_row, stride_qt, UNIT, D, BD)
                b_lse, b_share = load_lse(p_lse, p_share, (i_b * Hq + i_h) * T, b_row)
                b_acc += exponentials(scores(b_q, b_k), scale, b_lse[:, None]) * b_share[:, None]
    b_row = load_rows(p_rows + i_b * R, o_m, R, AGAIN=True)
    b_col = load_keys(p_cols + i_b * V, p_mask, o_n, V, AGAIN=True)
    b_a = tl.where(visible(b_row[:, None], b_col[None, :], CAUSAL), b_acc * weight, 0.0)

    p_out += (i_out * R + i_m * BM) * V
    o_tile = tl.arange(0, BM)[:, None] * V + o_n[None, :]
    m_tile = (o_m < R)[:, None] & (o_n < V)[None, :]
    if windows is None:
        tl.store(p_out + o_tile, b_a, mask=m_tile)
    elif n_loop > 0:
        while windows != 0:
            if (windows & 1) != 0:
                b_sum = tl.load(p_out + o_tile, mask=m_tile, other=0.0).to(tl.float32) + b_a
                tl.store(p_out + o_tile, b_sum.to(p_out.dtype.element_ty), mask=m_tile)
            windows >>= 1
            p_out += tl.cast(stride_w, tl.int64)


def _head_splits(q: torch.Tensor, kv_heads: int, programs: int) -> int:
    """Programs that share the heads of a tile: two where the tiles alone leave half of the GPU idle."""
    return 2 if kv_heads % 2 == 0 and 2 * programs <= _launch.multiprocessors(q.device) else 1


def heads(problem) -> dict:
    """How a program goes through the heads: nested where keys stay in shared memory, not in registers, between dots."""
    q, k, each = problem.q, problem.k, problem.each
    grouped = not each and q.shape[1] > k.shape[1]
    return {"EACH": each, "NEST": grouped and _launch.architecture(q.device) in _launch.SHARED_MEMORY_DOTS}


def suffix(lse: torch.Tensor | None) -> str:
    return "" if lse is None or lse.dim() == 3 else "_split"


def slice_forward(problem):
    """Attention probabilities on (rows, cols), fp32: their head mean (B,R,V), or every head's (B,Hq,R,V).

    Here and below the problem's lse is natural (B,Hq,T), or split (2,B,Hq,T) as `row_lse` makes it.
    """
    common, grid = _slice_arguments("slice_forward" + suffix(problem.lse), problem)
    each, (B, Hq), (R, V) = problem.each, problem.q.shape[:2], (common["R"], common["V"])
    splits = 1 if each else _head_splits(problem.q, problem.k.shape[1], grid[0] * grid[1] * B)
    out = torch.empty((B, Hq, R, V) if each else (splits, B, R, V), dtype=torch.float32, device=problem.q.device)
    if out.numel():
        programs = (*grid[:2], grid[2] * splits)
        _launch.launch(slice_forward_kernel, programs, p_out=out, windows=None, stride_w=None, SPLIT=splits, **common)
    return out if each else out[0] if splits == 1 else out.sum(0)


def slice_accumulate(problem, sums, windows):
    """Add the slice to sums[w], (B,R,V) or (B,Hq,R,V) of any floating dtype, for every w in ``windows``."""
    common, grid = _slice_arguments("slice_accumulate", problem)
    common.update(stride_w=sums.stride(0), SPLIT=1)
    for first in range(0, sums.shape[0] if sums.numel() else 0, WINDOWS_PER_LAUNCH):
        bits = sum(1 << w - first for w in windows if first <= w < first + WINDOWS_PER_LAUNCH)
        if bits:
            _launch.launch(slice_forward_kernel, grid, p_out=sums[first:], windows=bits, **common)


def _slice_arguments(tiles: str, problem) -> tuple[dict, tuple[int, int, int]]:
    """What the two ways to launch `slice_forward_kernel` share, and one program per tile and sample, or sample and head."""
    B, Hq, R, V = *problem.q.shape[:2], problem.rows.shape[1], problem.cols.shape[1]
    common = attention_arguments(tiles, problem)
    common.update(**lse_arguments(problem.lse), p_cols=problem.cols, V=V, **heads(problem))
    return common, (triton.cdiv(V, common["BN"]), triton.cdiv(R, common["BM"]), B * (Hq if problem.each else 1))
