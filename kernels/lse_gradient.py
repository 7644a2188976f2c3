"""The gradient of the log-sum-exp for attention kernels whose backward pass takes none.

A flash backward reads ``out`` for one thing only, delta_i = sum(dout_i * out_i). With out_i - dlse_i * dout_i / |dout_i|^2
in its place it forms delta_i - dlse_i, which is the gradient with dlse. Only the rows are touched, and put back later.
"""

import torch
import triton
import triton.language as tl

from . import _launch
from ._primitives import load_rows, load_vectors, store_vectors

# |dlse| / |dout| up to which dlse is folded into out: 2^14 leaves room in fp16, and nothing larger occurs in training.
MOST_FOLDED = tl.constexpr(16384.0)


@triton.jit(do_not_specialize=_launch.BATCH_DEPENDENT)
def fold_kernel(
    p_out,  # (B, Hq, T, D)
    p_dout,  # (B, Hq, T, D)
    p_dlse,  # (B, Hq, T)
    p_rows,  # (B, R)
    p_saved,  # (B, Hq, R, D)
    p_rest,  # (B, Hq, T)
    stride_qb,
    stride_qh,
    stride_qt,
    stride_kb,
    stride_kh,
    stride_kt,
    R,
    T,
    Hq,
    UNIT: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    BM: tl.constexpr,
):
    """saved_i = out_i; out_i -= dlse_i * dout_i / |dout_i|^2, or rest_i = dlse_i where |dout_i| is too small for it."""
    i_m, i_h, i_b = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    o_m = i_m * BM + tl.arange(0, BM)
    b_row = load_rows(p_rows + i_b * R, o_m, R)
    o_row = tl.where(b_row >= 0, o_m, -1)
    o_head = (i_b * Hq + i_h) * T
    p_out += (i_b * stride_qb + i_h * stride_qh) * UNIT
    b_out = load_vectors(p_out, b_row, stride_qt, UNIT, D, BD).to(tl.float32)
    p_dout += (i_b * stride_kb + i_h * stride_kh) * UNIT
    b_dout = load_vectors(p_dout, b_row, stride_kt, UNIT, D, BD).to(tl.float32)
    b_dlse = tl.load(p_dlse + o_head + b_row, mask=b_row >= 0, other=0.0)
    b_squares = tl.sum(b_dout * b_dout, 1)
    m_folded = (tl.abs(b_dlse) <= tl.sqrt(b_squares) * MOST_FOLDED) & (b_squares > 1e-30)
    b_factor = tl.where(m_folded, b_dlse / tl.where(m_folded, b_squares, 1.0), 0.0)
    p_saved += (i_b * Hq + i_h) * R * D
    store_vectors(p_saved, o_row, tl.trans(b_out), D // UNIT, False, UNIT, D, BD)
    store_vectors(p_out, b_row, tl.trans(b_out - b_factor[:, None] * b_dout), stride_qt, False, UNIT, D, BD)
    tl.store(p_rest + o_head + b_row, tl.where(m_folded, 0.0, b_dlse), mask=b_row >= 0)


@triton.jit(do_not_specialize=_launch.BATCH_DEPENDENT)
def unfold_kernel(
    p_out,  # (B, Hq, T, D)
    p_saved,  # (B, Hq, R, D)
    p_rows,  # (B, R)
    stride_qb,
    stride_qh,
    stride_qt,
    R,
    Hq,
    UNIT: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    BM: tl.constexpr,
):
    """out_i = saved_i for BM rows i of one sample and head."""
    i_m, i_h, i_b = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    o_m = i_m * BM + tl.arange(0, BM)
    b_row = load_rows(p_rows + i_b * R, o_m, R)
    p_saved += (i_b * Hq + i_h) * R * D
    b_saved = load_vectors(p_saved, tl.where(b_row >= 0, o_m, -1), D // UNIT, UNIT, D, BD).to(tl.float32)
    p_out += (i_b * stride_qb + i_h * stride_qh) * UNIT
    store_vectors(p_out, b_row, tl.trans(b_saved), stride_qt, False, UNIT, D, BD)


def fold_dlse(out, dout, dlse, rows):
    """Change out (B,Hq,T,D) at the rows; returns what stood there (B,Hq,R,D), and the dlse (B,Hq,T) not folded."""
    saved = torch.empty(*out.shape[:2], rows.shape[1], out.shape[3], dtype=out.dtype, device=out.device)
    rest = torch.zeros_like(dlse)
    if saved.numel():
        common = _launch.attention_arguments("slice_rows", out, dout, rows, False, 1.0, None)
        grid = (triton.cdiv(rows.shape[1], common["BM"]), out.shape[1], out.shape[0])
        arguments = {"p_out": out, "p_dout": dout, "p_dlse": dlse, "p_saved": saved, "p_rest": rest}
        _launch.launch(fold_kernel, grid, **arguments, **_launch.taken(fold_kernel, common))
    return saved, rest


def unfold_dlse(out, saved, rows):
    """Put back what `fold_dlse` found, bit for bit."""
    if saved.numel():
        common = _launch.attention_arguments("slice_rows", out, out, rows, False, 1.0, None)
        grid = (triton.cdiv(rows.shape[1], common["BM"]), out.shape[1], out.shape[0])
        _launch.launch(unfold_kernel, grid, p_out=out, p_saved=saved, **_launch.taken(unfold_kernel, common))
