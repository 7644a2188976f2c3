"""The gradient of the log-sum-exp for attention kernels whose backward pass takes none.

A flash backward reads ``out`` for one thing only, delta_i = sum(dout_i * out_i). With out_i - dlse_i * dout_i / |dout_i|^2
in its place it forms delta_i - dlse_i, which is the gradient with dlse. Only the rows are touched, and put back later.
"""

import torch
import triton
import triton.language as tl

from . import _launch
from ._primitives import block_head_sample, head_pointer, load_rows, load_vectors, store_vectors

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
    stride_outb,
    stride_outh,
    stride_outt,
    stride_doutb,
    stride_douth,
    stride_doutt,
    R,
    T,
    Hq,
    UNIT: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    BM: tl.constexpr,
):
    """saved_i = out_i; out_i -= dlse_i * dout_i / |dout_i|^2, or rest_i = dlse_i where |dout_i| is too small for it."""
    i_m, i_h, i_b = block_head_sample()
    o_m = i_m * BM + tl.arange(0, BM)
    b_row = load_rows(p_rows + i_b * R, o_m, R)
    o_row = tl.where(b_row >= 0, o_m, -1)
    o_head = (i_b * Hq + i_h) * T
    p_out = head_pointer(p_out, i_b, i_h, stride_outb, stride_outh, UNIT)
    b_out = load_vectors(p_out, b_row, stride_outt, UNIT, D, BD).to(tl.float32)
    p_dout = head_pointer(p_dout, i_b, i_h, stride_doutb, stride_douth, UNIT)
    b_dout = load_vectors(p_dout, b_row, stride_doutt, UNIT, D, BD).to(tl.float32)
    b_dlse = tl.load(p_dlse + o_head + b_row, mask=b_row >= 0, other=0.0)
    b_squares = tl.sum(b_dout * b_dout, 1)
    m_folded = (tl.abs(b_dlse) <= tl.sqrt(b_squares) * MOST_FOLDED) & (b_squares > 1e-30)
    b_factor = tl.where(m_folded, b_dlse / tl.where(m_folded, b_squares, 1.0), 0.0)
    p_saved += (i_b * Hq + i_h) * R * D
    store_vectors(p_saved, o_row, tl.trans(b_out), D // UNIT, False, UNIT, D, BD)
    store_vectors(p_out, b_row, tl.trans(b_out - b_factor[:, None] * b_dout), stride_outt, False, UNIT, D, BD)
    tl.store(p_rest + o_head + b_row, tl.where(m_folded, 0.0, b_dlse), mask=b_row >= 0)


@triton.jit(do_not_specialize=_launch.BATCH_DEPENDENT)
def unfold_kernel(
    p_out,  # (B, Hq, T, D)
    p_saved,  # (B, Hq, R, D)
    p_rows,  # (B, R)
    stride_outb,
    stride_outh,
    stride_outt,
    R,
    Hq,
    UNIT: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    BM: tl.constexpr,
):
    """out_i = saved_i for BM rows i of one sample and head."""
    i_m, i_h, i_b = block_head_sample()
    o_m = i_m * BM + tl.arange(0, BM)
    b_row = load_rows(p_rows + i_b * R, o_m, R)
    p_saved += (i_b * Hq + i_h) * R * D
    b_saved = load_vectors(p_saved, tl.where(b_row >= 0, o_m, -1), D // UNIT, UNIT, D, BD).to(tl.float32)
    p_out = head_pointer(p_out, i_b, i_h, stride_outb, stride_outh, UNIT)
    store_vectors(p_out, b_row, tl.trans(b_saved), stride_outt, False, UNIT, D, BD)


def _launch_rows(kernel, rows: torch.Tensor, tensors: dict, **arguments) -> None:
    """Launch one program per block of rows, head and sample; ``tensors`` (B,Hq,T,D) come with their strides."""
    (B, Hq, T, _), R, tile = tensors["out"].shape, rows.shape[1], _launch.attention_tile("slice_rows", tensors["out"])
    arguments |= {"p_rows": rows, "R": R, "Hq": Hq, "BM": tile.BM, **_launch.tensor_arguments(**tensors)}
    arguments |= {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    if "T" in kernel.arg_names:
        arguments["T"] = T
    _launch.launch(kernel, (triton.cdiv(R, tile.BM), Hq, B), rows.device, **arguments)


def fold_dlse(out, dout, dlse, rows):
    """Change out (B,Hq,T,D) at the rows; returns what stood there (B,Hq,R,D), and the dlse (B,Hq,T) not folded."""
    saved = torch.empty(*out.shape[:2], rows.shape[1], out.shape[3], dtype=out.dtype, device=out.device)
    rest = torch.zeros_like(dlse)
    if saved.numel():
        _launch_rows(fold_kernel, rows, {"out": out, "dout": dout}, p_dlse=dlse, p_saved=saved, p_rest=rest)
    return saved, rest


def unfold_dlse(out, saved, rows):
    """Put back what `fold_dlse` found, bit for bit."""
    if saved.numel():
        _launch_rows(unfold_kernel, rows, {"out": out}, p_saved=saved)
