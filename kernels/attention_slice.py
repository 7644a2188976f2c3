"""Triton backend of the attention ops: softmax probabilities on chosen rows and columns, and their gradients.

With the log-sum-exp of a row known, P = exp(scale*q.k - lse) needs no other key, so the slice is one dot and one exp
per head. Nothing larger than a tile exists besides inputs and results, every result has one owner, and sums run in a
fixed order.
"""

import torch
import triton
import triton.language as tl

from . import _launch
from ._primitives import (
    LN2,
    LOG2E,
    accumulate,
    add_vectors,
    load_keys,
    load_lse,
    load_rows,
    load_vectors,
    scores,
    visible,
)
from .alignment_loss import alignment_grad, alignment_loss

__all__ = ["alignment_grad", "alignment_loss", "row_lse", "row_lse_backward", "slice_backward", "slice_forward"]

# Probabilities and their gradients are brought to at most 2^14 before they become fp16 operands (at most 65504) and
# scaled back in fp32: probabilities of long rows and unscaled gradients lie below the smallest normal fp16 number.
HEADROOM = tl.constexpr(16384.0)

# Head dimensions are multiples of 8 and strides usually too: passed in units of 8, they let every load be 16 bytes wide.
ALIGNMENT = 8

# Values that change from batch to batch, by which Triton must not specialise; alignment is stated by UNIT instead.
BATCH_DEPENDENT = ["R", "T", "stride_qb", "stride_qh", "stride_qt", "stride_kb", "stride_kh", "stride_kt"]


@triton.jit(do_not_specialize=BATCH_DEPENDENT)
def row_lse_kernel(
    p_q,  # (B, Hq, T, D)
    p_k,  # (B, Hkv, T, D)
    p_rows,  # (B, R)
    p_mask,  # (B, T) or None
    p_lse,  # (B, Hq, R)
    stride_qb,
    stride_qh,
    stride_qt,
    stride_kb,
    stride_kh,
    stride_kt,
    R,
    T,
    Hq,
    group,
    scale,
    CAUSAL: tl.constexpr,
    UNIT: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """lse_i = log sum_j exp(scale*q_i.k_j) over all visible keys j, for BM rows of one sample and head.

    Online: with the running maximum m and l = sum_j 2^(s_j - m), a block of keys gives m' = max(m, max s),
    l' = l*2^(m - m') + sum 2^(s - m'); finally lse = ln 2 * (m + log2 l). A row that saw no key gets +inf.
    """
    i_m, i_h, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    o_m = i_m * BM + tl.arange(0, BM)
    b_row = load_rows(p_rows + i_b * R, o_m, R)
    b_q = load_vectors(p_q + (i_b * stride_qb + i_h * stride_qh) * UNIT, b_row, stride_qt, UNIT, D, BD)
    p_k += (i_b * stride_kb + (i_h // group) * stride_kh) * UNIT
    if p_mask is not None:
        p_mask += i_b * T
    b_last = tl.max(b_row, 0)
    n_keys = b_last + 1
    if not CAUSAL:
        n_keys = tl.where(b_last >= 0, T, 0)

    b_max = tl.full((BM,), float("-inf"), tl.float32)
    b_sum = tl.zeros((BM,), tl.float32)
    for i_n in tl.range(0, n_keys, BN):
        b_col = load_keys(None, p_mask, i_n + tl.arange(0, BN), T)
        b_k = load_vectors(p_k, b_col, stride_kt, UNIT, D, BD)
        b_s = scores(b_q, b_k) * (scale * LOG2E)
        b_s = tl.where(visible(b_row[:, None], b_col[None, :], CAUSAL), b_s, float("-inf"))
        b_new = tl.maximum(b_max, tl.max(b_s, 1))
        b_safe = tl.where(b_new == float("-inf"), 0.0, b_new)
        b_sum = b_sum * tl.exp2(b_max - b_safe) + tl.sum(tl.exp2(b_s - b_safe[:, None]), 1)
        b_max = b_new
    m_seen = b_max > float("-inf")
    b_lse = tl.where(m_seen, (b_max + tl.log2(tl.where(m_seen, b_sum, 1.0))) * LN2, float("inf"))
    tl.store(p_lse + (i_b * Hq + i_h) * R + o_m, b_lse, mask=o_m < R)


@triton.jit(do_not_specialize=BATCH_DEPENDENT)
def row_lse_backward_dq_kernel(
    p_q,  # (B, Hq, T, D)
    p_k,  # (B, Hkv, T, D)
    p_lse,  # (B, Hq, R)
    p_rows,  # (B, R)
    p_mask,  # (B, T) or None
    p_dlse,  # (B, Hq, R)
    p_dq,  # (B, Hq, T, D)
    stride_qb,
    stride_qh,
    stride_qt,
    stride_kb,
    stride_kh,
    stride_kt,
    R,
    T,
    Hq,
    group,
    scale,
    CAUSAL: tl.constexpr,
    UNIT: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """dq_i += scale * dlse_i * sum_j P_ij k_j over all visible keys j, for BM rows of one sample and head.

    dlse_i leaves the sum, so the loop is dq^T += k^T P^T with P^T = exp(scale*k.q^T - lse).
    """
    i_m, i_h, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    o_m = i_m * BM + tl.arange(0, BM)
    b_row = load_rows(p_rows + i_b * R, o_m, R)
    b_q = load_vectors(p_q + (i_b * stride_qb + i_h * stride_qh) * UNIT, b_row, stride_qt, UNIT, D, BD)
    b_lse = load_lse(p_lse + (i_b * Hq + i_h) * R, o_m, R)
    p_k += (i_b * stride_kb + (i_h // group) * stride_kh) * UNIT
    if p_mask is not None:
        p_mask += i_b * T
    b_last = tl.max(b_row, 0)
    n_keys = b_last + 1
    if not CAUSAL:
        n_keys = tl.where(b_last >= 0, T, 0)

    b_dqT = tl.zeros((BD, BM), tl.float32)
    for i_n in tl.range(0, n_keys, BN):
        b_col = load_keys(None, p_mask, i_n + tl.arange(0, BN), T)
        b_k = load_vectors(p_k, b_col, stride_kt, UNIT, D, BD)
        b_pT = tl.exp2(scores(b_k, b_q) * (scale * LOG2E) - b_lse[None, :])
        b_pT = tl.where(visible(b_row[None, :], b_col[:, None], CAUSAL), b_pT, 0.0)
        b_dqT = accumulate(b_k, b_pT * HEADROOM, b_dqT)
    b_dlse = tl.load(p_dlse + (i_b * Hq + i_h) * R + o_m, mask=b_row >= 0, other=0.0)
    add_vectors(p_dq + (i_b * Hq + i_h) * T * D, b_row, b_dqT * (b_dlse * (scale / HEADROOM))[None, :], D, BD)


@triton.jit(do_not_specialize=BATCH_DEPENDENT)
def row_lse_backward_dk_kernel(
    p_q,  # (B, Hq, T, D)
    p_k,  # (B, Hkv, T, D)
    p_lse,  # (B, Hq, R)
    p_rows,  # (B, R)
    p_mask,  # (B, T) or None
    p_dlse,  # (B, Hq, R)
    p_gain,  # (B,) or None
    p_dk,  # (B, Hkv, T, D)
    stride_qb,
    stride_qh,
    stride_qt,
    stride_kb,
    stride_kh,
    stride_kt,
    R,
    T,
    Hq,
    group,
    scale,
    CAUSAL: tl.constexpr,
    UNIT: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """dk_j += scale * sum_i dS_ij q_i with dS_ij = P_ij dlse_i, for the keys j of one block of one sample and kv head.

    The sum runs over all rows and, within a row block, over the query heads of the group: dk^T += q^T dS.
    """
    i_n, i_kv, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    if p_mask is not None:
        p_mask += i_b * T
    b_col = load_keys(None, p_mask, i_n * BN + tl.arange(0, BN), T)
    b_k = load_vectors(p_k + (i_b * stride_kb + i_kv * stride_kh) * UNIT, b_col, stride_kt, UNIT, D, BD)
    b_gain = 1.0
    if p_gain is not None:
        b_gain = tl.load(p_gain + i_b)

    b_dkT = tl.zeros((BD, BN), tl.float32)
    for i_step in tl.range(0, tl.cdiv(R, BM) * group):
        i_h = i_kv * group + i_step % group
        o_m = (i_step // group) * BM + tl.arange(0, BM)
        b_row = load_rows(p_rows + i_b * R, o_m, R)
        b_q = load_vectors(p_q + (i_b * stride_qb + i_h * stride_qh) * UNIT, b_row, stride_qt, UNIT, D, BD)
        b_lse = load_lse(p_lse + (i_b * Hq + i_h) * R, o_m, R)
        b_dlse = tl.load(p_dlse + (i_b * Hq + i_h) * R + o_m, mask=b_row >= 0, other=0.0) * b_gain
        b_p = tl.exp2(scores(b_q, b_k) * (scale * LOG2E) - b_lse[:, None])
        b_ds = tl.where(visible(b_row[:, None], b_col[None, :], CAUSAL), b_p * b_dlse[:, None], 0.0)
        b_dkT = accumulate(b_q, b_ds, b_dkT)
    add_vectors(p_dk + (i_b * (Hq // group) + i_kv) * T * D, b_col, b_dkT * (scale / b_gain), D, BD)


@triton.jit(do_not_specialize=[*BATCH_DEPENDENT, "V"])
def slice_forward_kernel(
    p_q,  # (B, Hq, T, D)
    p_k,  # (B, Hkv, T, D)
    p_lse,  # (B, Hq, R)
    p_rows,  # (B, R)
    p_cols,  # (B, V)
    p_mask,  # (B, T) or None
    p_out,  # (B, Hq // heads, R, V)
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
    heads,
    group,
    scale,
    CAUSAL: tl.constexpr,
    UNIT: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """A_ij = 1/heads * sum_h exp(scale*q_hi.k_hj - lse_hi) on one (BM, BN) tile, zero where row i does not see key j.

    heads = Hq gives the mean over all heads, heads = 1 each head by itself. Heads are innermost, so the tile is stored
    once and no head's probabilities leave the program. A tile without a visible entry skips the heads.
    """
    i_n, i_m, i_out = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    i_first = i_out * heads
    i_b = i_first // Hq
    i_first = i_first % Hq
    o_m = i_m * BM + tl.arange(0, BM)
    o_n = i_n * BN + tl.arange(0, BN)
    if p_mask is not None:
        p_mask += i_b * T
    b_row = load_rows(p_rows + i_b * R, o_m, R)
    b_col = load_keys(p_cols + i_b * V, p_mask, o_n, V)
    last = tl.max(b_row, 0)
    if not CAUSAL:
        last = tl.where(last >= 0, T, -1)
    n_heads = tl.where(tl.min(tl.where(b_col >= 0, b_col, T), 0) <= tl.minimum(last, T - 1), heads, 0)

    b_acc = tl.zeros((BM, BN), tl.float32)
    for i_h in tl.range(i_first, i_first + n_heads):
        b_q = load_vectors(p_q + (i_b * stride_qb + i_h * stride_qh) * UNIT, b_row, stride_qt, UNIT, D, BD)
        b_k = load_vectors(p_k + (i_b * stride_kb + (i_h // group) * stride_kh) * UNIT, b_col, stride_kt, UNIT, D, BD)
        b_lse = load_lse(p_lse + (i_b * Hq + i_h) * R, o_m, R)
        b_acc += tl.exp2(scores(b_q, b_k) * (scale * LOG2E) - b_lse[:, None])
    p_tile = p_out + (i_out * R + i_m * BM) * V + tl.arange(0, BM)[:, None] * V + o_n[None, :]
    m_seen = visible(b_row[:, None], b_col[None, :], CAUSAL)
    tl.store(p_tile, tl.where(m_seen, b_acc / heads, 0.0), mask=(o_m < R)[:, None] & (o_n < V)[None, :])


@triton.jit(do_not_specialize=[*BATCH_DEPENDENT, "V", "stride_gb", "stride_gh", "stride_gr"])
def slice_backward_dq_kernel(
    p_q,  # (B, Hq, T, D)
    p_k,  # (B, Hkv, T, D)
    p_lse,  # (B, Hq, R)
    p_rows,  # (B, R)
    p_cols,  # (B, V)
    p_mask,  # (B, T) or None
    p_grad,  # (B, Hq, R, V), or (B, R, V) with stride_gh = 0
    p_gain,  # (B,) or None
    p_dq,  # (B, Hq, T, D)
    p_dlse,  # (B, Hq, R)
    stride_qb,
    stride_qh,
    stride_qt,
    stride_kb,
    stride_kh,
    stride_kt,
    stride_gb,
    stride_gh,
    stride_gr,
    stride_gv,
    R,
    V,
    T,
    Hq,
    heads,
    group,
    scale,
    CAUSAL: tl.constexpr,
    UNIT: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """dq_i += scale * sum_j dS_ij k_j, dlse_i = -sum_j dS_ij with dS = P*G/heads, for BM rows of one sample and head.

    P is recomputed: storing it per head is slower and bigger. Transposed throughout, dq^T += k^T dS^T with
    P^T = exp(scale*k.q^T - lse), so that no dot result is a left operand.
    """
    i_m, i_h, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    o_m = i_m * BM + tl.arange(0, BM)
    if p_mask is not None:
        p_mask += i_b * T
    b_row = load_rows(p_rows + i_b * R, o_m, R)
    b_q = load_vectors(p_q + (i_b * stride_qb + i_h * stride_qh) * UNIT, b_row, stride_qt, UNIT, D, BD)
    b_lse = load_lse(p_lse + (i_b * Hq + i_h) * R, o_m, R)
    p_k += (i_b * stride_kb + (i_h // group) * stride_kh) * UNIT
    p_grad += i_b * stride_gb + i_h * stride_gh + tl.cast(i_m * BM, tl.int64) * stride_gr
    b_gain = 1.0
    if p_gain is not None:
        b_gain = tl.load(p_gain + i_b)

    b_dqT = tl.zeros((BD, BM), tl.float32)
    b_dlse = tl.zeros((BM,), tl.float32)
    for i_n in tl.range(0, V, BN):
        o_n = i_n + tl.arange(0, BN)
        b_col = load_keys(p_cols + i_b * V, p_mask, o_n, V)
        b_k = load_vectors(p_k, b_col, stride_kt, UNIT, D, BD)
        p_tile = p_grad + tl.cast(i_n, tl.int64) * stride_gv
        p_tile = p_tile + tl.arange(0, BM)[None, :] * stride_gr + tl.arange(0, BN)[:, None] * stride_gv
        m_seen = visible(b_row[None, :], b_col[:, None], CAUSAL)
        b_gT = tl.load(p_tile, mask=m_seen, other=0.0) * b_gain
        b_pT = tl.exp2(scores(b_k, b_q) * (scale * LOG2E) - b_lse[None, :])
        b_dsT = tl.where(m_seen, b_pT * b_gT, 0.0)
        b_dlse -= tl.sum(b_dsT, 0)
        b_dqT = accumulate(b_k, b_dsT, b_dqT)
    b_unit = 1.0 / (b_gain * heads)
    tl.store(p_dlse + (i_b * Hq + i_h) * R + o_m, b_dlse * b_unit, mask=o_m < R)
    add_vectors(p_dq + (i_b * Hq + i_h) * T * D, b_row, b_dqT * (scale * b_unit), D, BD)


@triton.jit(do_not_specialize=[*BATCH_DEPENDENT, "V", "stride_gb", "stride_gh", "stride_gr"])
def slice_backward_dk_kernel(
    p_q,  # (B, Hq, T, D)
    p_k,  # (B, Hkv, T, D)
    p_lse,  # (B, Hq, R)
    p_rows,  # (B, R)
    p_cols,  # (B, V)
    p_mask,  # (B, T) or None
    p_grad,  # (B, Hq, R, V), or (B, R, V) with stride_gh = 0
    p_gain,  # (B,) or None
    p_dk,  # (B, Hkv, T, D)
    stride_qb,
    stride_qh,
    stride_qt,
    stride_kb,
    stride_kh,
    stride_kt,
    stride_gb,
    stride_gh,
    stride_gr,
    stride_gv,
    R,
    V,
    T,
    Hq,
    heads,
    group,
    scale,
    CAUSAL: tl.constexpr,
    UNIT: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """dk_j += scale * sum_i dS_ij q_i with dS = P*G/heads, for one block of columns j of one sample and kv head.

    The sum runs over all rows and, within a row block, over the query heads of the group: dk^T += q^T dS.
    """
    i_n, i_kv, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    o_n = i_n * BN + tl.arange(0, BN)
    if p_mask is not None:
        p_mask += i_b * T
    b_col = load_keys(p_cols + i_b * V, p_mask, o_n, V)
    b_k = load_vectors(p_k + (i_b * stride_kb + i_kv * stride_kh) * UNIT, b_col, stride_kt, UNIT, D, BD)
    p_grad += i_b * stride_gb + tl.cast(i_n * BN, tl.int64) * stride_gv
    b_gain = 1.0
    if p_gain is not None:
        b_gain = tl.load(p_gain + i_b)

    b_dkT = tl.zeros((BD, BN), tl.float32)
    for i_step in tl.range(0, tl.cdiv(R, BM) * group):
        i_h = i_kv * group + i_step % group
        i_m = (i_step // group) * BM
        o_m = i_m + tl.arange(0, BM)
        b_row = load_rows(p_rows + i_b * R, o_m, R)
        b_q = load_vectors(p_q + (i_b * stride_qb + i_h * stride_qh) * UNIT, b_row, stride_qt, UNIT, D, BD)
        b_lse = load_lse(p_lse + (i_b * Hq + i_h) * R, o_m, R)
        p_tile = p_grad + i_h * stride_gh + tl.cast(i_m, tl.int64) * stride_gr
        p_tile = p_tile + tl.arange(0, BM)[:, None] * stride_gr + tl.arange(0, BN)[None, :] * stride_gv
        m_seen = visible(b_row[:, None], b_col[None, :], CAUSAL)
        b_g = tl.load(p_tile, mask=m_seen, other=0.0) * b_gain
        b_p = tl.exp2(scores(b_q, b_k) * (scale * LOG2E) - b_lse[:, None])
        b_ds = tl.where(m_seen, b_p * b_g, 0.0)
        b_dkT = accumulate(b_q, b_ds, b_dkT)
    add_vectors(p_dk + (i_b * (Hq // group) + i_kv) * T * D, b_col, b_dkT * (scale / (b_gain * heads)), D, BD)


def _common(kernel: str, q, k, rows, causal, scale, key_mask) -> dict:
    """The arguments every attention kernel takes."""
    tile = _launch.attention_tile(kernel, q)
    head_dim = q.shape[3]
    strides = (*q.stride()[:3], *k.stride()[:3])
    unit = 1 if any(stride % ALIGNMENT for stride in strides) else ALIGNMENT
    return {
        "device": q.device,
        "p_q": q,
        "p_k": k,
        "p_rows": rows,
        "p_mask": None if key_mask is None else key_mask.view(torch.uint8),
        "stride_qb": strides[0] // unit,
        "stride_qh": strides[1] // unit,
        "stride_qt": strides[2] // unit,
        "stride_kb": strides[3] // unit,
        "stride_kh": strides[4] // unit,
        "stride_kt": strides[5] // unit,
        "R": rows.shape[1],
        "T": q.shape[2],
        "Hq": q.shape[1],
        "group": q.shape[1] // k.shape[1],
        "scale": scale,
        "CAUSAL": causal,
        "UNIT": unit,
        "D": head_dim,
        "BD": _launch.padded_head_dim(head_dim),
        "BM": tile.BM,
        "BN": tile.BN,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }


def _gain(q: torch.Tensor, grad: torch.Tensor) -> torch.Tensor | None:
    """(B,) factors that bring the largest gradient of a sample to HEADROOM; only fp16 operands need them."""
    if q.dtype != torch.float16:
        return None
    peak = torch.linalg.vector_norm(grad, ord=float("inf"), dim=tuple(range(1, grad.ndim)))
    return HEADROOM.value / peak.clamp(min=1e-30)


def row_lse(q, k, rows, *, causal, scale, key_mask):
    """Log-sum-exp over all visible keys of the rows, (B,Hq,R) fp32; +inf for padding and for rows that see no key."""
    B, Hq, R = q.shape[0], q.shape[1], rows.shape[1]
    lse = torch.empty(B, Hq, R, dtype=torch.float32, device=q.device)
    if lse.numel():
        common = _common("row_lse", q, k, rows, causal, scale, key_mask)
        _launch.launch(row_lse_kernel, (triton.cdiv(R, common["BM"]), Hq, B), p_lse=lse, **common)
    return lse


def row_lse_backward(q, k, lse, rows, dlse, dq, dk, *, causal, scale, key_mask):
    """Add the gradient of ``row_lse`` into dq (B,Hq,T,D) and dk (B,Hkv,T,D)."""
    if not dlse.numel():
        return
    B, Hq, T, _ = q.shape
    common = _common("backward", q, k, rows, causal, scale, key_mask)
    common.update(p_lse=lse, p_dlse=dlse.contiguous())
    grid = (triton.cdiv(rows.shape[1], common["BM"]), Hq, B)
    _launch.launch(row_lse_backward_dq_kernel, grid, p_dq=dq, **common)
    grid = (triton.cdiv(T, common["BN"]), k.shape[1], B)
    _launch.launch(row_lse_backward_dk_kernel, grid, p_gain=_gain(q, dlse), p_dk=dk, **common)


def slice_forward(q, k, lse, rows, cols, *, causal, scale, key_mask, each):
    """Attention probabilities on (rows, cols), fp32: their head mean (B,R,V), or every head's (B,Hq,R,V)."""
    B, Hq, R, V = q.shape[0], q.shape[1], rows.shape[1], cols.shape[1]
    out = torch.empty((B, Hq, R, V) if each else (B, R, V), dtype=torch.float32, device=q.device)
    if out.numel():
        common = _common("slice_forward", q, k, rows, causal, scale, key_mask)
        common.update(p_lse=lse, p_cols=cols, V=V, heads=1 if each else Hq)
        grid = (triton.cdiv(V, common["BN"]), triton.cdiv(R, common["BM"]), B * Hq if each else B)
        _launch.launch(slice_forward_kernel, grid, p_out=out, **common)
    return out


def slice_backward(q, k, lse, rows, cols, grad, dq, dk, *, causal, scale, key_mask, each):
    """Add the gradient of ``slice_forward`` at fixed lse into dq and dk; returns the gradient of lse, (B,Hq,R) fp32."""
    B, Hq, R, V = q.shape[0], q.shape[1], rows.shape[1], cols.shape[1]
    if not (B * R * V):
        return torch.zeros(B, Hq, R, dtype=torch.float32, device=q.device)
    dlse = torch.empty(B, Hq, R, dtype=torch.float32, device=q.device)
    common = _common("backward", q, k, rows, causal, scale, key_mask)
    common.update(p_lse=lse, p_cols=cols, V=V, heads=1 if each else Hq, p_grad=grad, p_gain=_gain(q, grad))
    strides = grad.stride() if each else (grad.stride(0), 0, *grad.stride()[1:])
    common.update(zip(("stride_gb", "stride_gh", "stride_gr", "stride_gv"), strides, strict=True))
    grid = (triton.cdiv(R, common["BM"]), Hq, B)
    _launch.launch(slice_backward_dq_kernel, grid, p_dq=dq, p_dlse=dlse, **common)
    grid = (triton.cdiv(V, common["BN"]), k.shape[1], B)
    _launch.launch(slice_backward_dk_kernel, grid, p_dk=dk, **common)
    return dlse
