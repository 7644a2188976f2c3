"""Log-sum-exp of chosen rows over all keys, and its gradient: for slices whose attention gave no LSE.

A row costs one pass over its visible keys, whatever the number of rows; no result is larger than q and k.
"""

import torch
import triton
import triton.language as tl

from . import _launch
from ._launch import BATCH_DEPENDENT, attention_arguments, fp16_gain, lse_arguments, taken
from ._primitives import (
    HEADROOM,
    LOG2E,
    accumulate,
    block_head_sample,
    check,
    exponentials,
    head_pointer,
    load_finite,
    load_keys,
    load_lse,
    load_rows,
    load_vectors,
    runs,
    sample_pointer,
    scores,
    store_vectors,
    visible,
)


@triton.jit(do_not_specialize=BATCH_DEPENDENT)
def row_lse_kernel(
    p_q,  # (B, Hq, T, D)
    p_k,  # (B, Hkv, T, D)
    p_rows,  # (B, R)
    p_mask,  # (B, T) or None
    p_lse,  # (2, B, Hq, T)
    stride_qb,
    stride_qh,
    stride_qt,
    stride_kb,
    stride_kh,
    stride_kt,
    R,
    T,
    Hq,
    scale,  # > 0: the maximum of s*scale is then that of s
    GROUP: tl.constexpr,
    CAUSAL: tl.constexpr,
    UNIT: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """lse_i = log sum_j exp(scale*q_i.k_j) over all visible keys j, for BM rows of one sample and head, split.

    Online, in bits: with the running maximum m and l = sum_j 2^(s_j - m), a block of keys gives m' = max(m, max s),
    l' = l*2^(m - m') + sum 2^(s - m'); m and 1 / l are kept. A row that sees no key gets +inf and 0, one whose every
    score is -inf gets NaN for its probabilities, as in eager attention.
    """
    i_m, i_h, i_b = block_head_sample()
    b_row = load_rows(p_rows + i_b * R, i_m * BM + tl.arange(0, BM), R)
    b_q = load_vectors(head_pointer(p_q, i_b, i_h, stride_qb, stride_qh, UNIT), b_row, stride_qt, UNIT, D, BD)
    p_k = head_pointer(p_k, i_b, i_h, stride_kb, stride_kh, UNIT, GROUP)
    p_mask = sample_pointer(p_mask, i_b, T)
    b_last = tl.max(b_row, 0)
    n_keys = b_last + 1
    if not CAUSAL:
        n_keys = tl.where(b_last >= 0, T, 0)

    b_max = tl.full((BM,), float("-inf"), tl.float32)
    b_sum = tl.zeros((BM,), tl.float32)
    b_first = tl.zeros((BN,), tl.int32) + T
    for i_n in tl.range(0, n_keys, BN):
        b_col = load_keys(None, p_mask, i_n + tl.arange(0, BN), T)
        b_k = load_vectors(p_k, b_col, stride_kt, UNIT, D, BD)
        b_s = tl.where(visible(b_row[:, None], b_col[None, :], CAUSAL), scores(b_q, b_k), float("-inf"))
        b_new = tl.maximum(b_max, tl.max(b_s, 1) * (scale * LOG2E))
        b_safe = tl.where(b_new == float("-inf"), 0.0, b_new)
        b_sum = b_sum * tl.exp2(b_max - b_safe) + tl.sum(exponentials(b_s, scale, b_safe[:, None]), 1)
        b_max = b_new
        b_first = tl.minimum(b_first, tl.where(b_col >= 0, b_col, T))
    first = tl.min(b_first, 0)
    m_seen = b_row >= (first if CAUSAL else tl.where(first < T, 0, T))
    p_lse += (i_b * Hq + i_h) * T
    tl.store(p_lse + b_row, tl.where(m_seen, b_max, float("inf")), mask=b_row >= 0)
    p_lse += tl.num_programs(2).to(tl.int64) * Hq * T
    tl.store(p_lse + b_row, tl.where(m_seen, 1.0 / tl.where(m_seen, b_sum, 1.0), 0.0), mask=b_row >= 0)


@triton.jit(do_not_specialize=BATCH_DEPENDENT)
def row_lse_backward_dq_kernel(
    p_q,  # (B, Hq, T, D)
    p_k,  # (B, Hkv, T, D)
    p_lse,  # (B, Hq, T)
    p_share,  # (B, Hq, T) or None
    p_rows,  # (B, R)
    p_mask,  # (B, T) or None
    p_dlse,  # (B, Hq, T)
    p_dq,  # (B, Hq, T, D)
    p_again,  # (programs,) bytes
    stride_qb,
    stride_qh,
    stride_qt,
    stride_kb,
    stride_kh,
    stride_kt,
    stride_dqb,
    stride_dqh,
    stride_dqt,
    R,
    T,
    Hq,
    scale,
    ADD: tl.constexpr,
    GROUP: tl.constexpr,
    CAUSAL: tl.constexpr,
    UNIT: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    CAREFUL: tl.constexpr,
):
    """dq_i = scale * dlse_i * sum_j P_ij k_j over all visible keys j, for BM rows of one sample and head.

    dlse_i and the share leave the sum, so the loop is dq^T += k^T P^T with P^T = exp(scale*k.q^T) / 2^max. A block of rows
    whose dlse is zero reads no key.
    """
    if not runs(p_again, CAREFUL):
        return
    i_m, i_h, i_b = block_head_sample()
    b_row = load_rows(p_rows + i_b * R, i_m * BM + tl.arange(0, BM), R)
    o_head = (i_b * Hq + i_h) * T
    b_dlse = tl.load(p_dlse + o_head + b_row, mask=b_row >= 0, other=0.0)
    b_q = load_vectors(head_pointer(p_q, i_b, i_h, stride_qb, stride_qh, UNIT), b_row, stride_qt, UNIT, D, BD)
    b_lse, b_share = load_lse(p_lse, p_share, o_head, b_row)
    p_k = head_pointer(p_k, i_b, i_h, stride_kb, stride_kh, UNIT, GROUP)
    p_mask = sample_pointer(p_mask, i_b, T)
    b_last = tl.max(tl.where(b_dlse != 0.0, b_row, -1), 0)
    n_keys = b_last + 1
    if not CAUSAL:
        n_keys = tl.where(b_last >= 0, T, 0)

    b_dqT = tl.zeros((BD, BM), tl.float32)
    for i_n in tl.range(0, n_keys, BN):
        b_col = load_keys(None, p_mask, i_n + tl.arange(0, BN), T)
        b_k = load_vectors(p_k, b_col, stride_kt, UNIT, D, BD)
        b_pT = exponentials(scores(b_k, b_q), scale, b_lse[None, :])
        b_pT = tl.where(visible(b_row[None, :], b_col[:, None], CAUSAL), b_pT, 0.0)
        b_dqT = accumulate(load_finite(b_k, p_k, b_col, stride_kt, UNIT, D, BD, CAREFUL), b_pT * HEADROOM, b_dqT)
    b_dqT *= (b_dlse * b_share * (scale / HEADROOM))[None, :]
    b_row = tl.where(check(b_dqT, p_again, CAREFUL), -1, b_row)
    p_dq = head_pointer(p_dq, i_b, i_h, stride_dqb, stride_dqh, UNIT)
    store_vectors(p_dq, b_row, b_dqT, stride_dqt, ADD, UNIT, D, BD)


@triton.jit(do_not_specialize=BATCH_DEPENDENT)
def row_lse_backward_dk_kernel(
    p_q,  # (B, Hq, T, D)
    p_k,  # (B, Hkv, T, D)
    p_lse,  # (B, Hq, T)
    p_share,  # (B, Hq, T) or None
    p_rows,  # (B, R)
    p_mask,  # (B, T) or None
    p_dlse,  # (B, Hq, T)
    p_gain,  # (B,) or None
    p_dk,  # (B, Hkv, T, D)
    p_again,  # (programs,) bytes
    stride_qb,
    stride_qh,
    stride_qt,
    stride_kb,
    stride_kh,
    stride_kt,
    stride_dkb,
    stride_dkh,
    stride_dkt,
    R,
    T,
    Hq,
    scale,
    ADD: tl.constexpr,
    GROUP: tl.constexpr,
    CAUSAL: tl.constexpr,
    UNIT: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    CAREFUL: tl.constexpr,
):
    """dk_j = scale * sum_i dS_ij q_i with dS_ij = P_ij dlse_i, for the keys j of one block of one sample and kv head.

    The sum runs over all rows and, within a row block, over the query heads of the group: dk^T += q^T dS. With
    ADD, where most dlse are zero, a kv head without any other is skipped.
    """
    if not runs(p_again, CAREFUL):
        return
    i_n, i_kv, i_b = block_head_sample()
    p_mask = sample_pointer(p_mask, i_b, T)
    b_col = load_keys(None, p_mask, i_n * BN + tl.arange(0, BN), T)
    b_k = load_vectors(head_pointer(p_k, i_b, i_kv, stride_kb, stride_kh, UNIT), b_col, stride_kt, UNIT, D, BD)
    b_gain = 1.0
    if p_gain is not None:
        b_gain = tl.load(p_gain + i_b)

    n_steps = tl.cdiv(R, BM) * GROUP
    if ADD:
        b_any = tl.zeros((BM,), tl.float32)
        for i_step in tl.range(0, n_steps):
            b_row = load_rows(p_rows + i_b * R, (i_step // GROUP) * BM + tl.arange(0, BM), R)
            o_head = (i_b * Hq + i_kv * GROUP + i_step % GROUP) * T
            b_any += tl.abs(tl.load(p_dlse + o_head + b_row, mask=b_row >= 0, other=0.0))
        n_steps = tl.where(tl.sum(b_any, 0) > 0.0, n_steps, 0)

    b_dkT = tl.zeros((BD, BN), tl.float32)
    for i_step in tl.range(0, n_steps):
        i_h = i_kv * GROUP + i_step % GROUP
        o_head = (i_b * Hq + i_h) * T
        b_row = load_rows(p_rows + i_b * R, (i_step // GROUP) * BM + tl.arange(0, BM), R)
        b_lse, b_share = load_lse(p_lse, p_share, o_head, b_row)
        b_dlse = tl.load(p_dlse + o_head + b_row, mask=b_row >= 0, other=0.0) * (b_gain * b_share)
        p_head = head_pointer(p_q, i_b, i_h, stride_qb, stride_qh, UNIT)
        b_q = load_vectors(p_head, b_row, stride_qt, UNIT, D, BD)
        b_ds = exponentials(scores(b_q, b_k), scale, b_lse[:, None]) * b_dlse[:, None]
        b_ds = tl.where(visible(b_row[:, None], b_col[None, :], CAUSAL), b_ds, 0.0)
        b_dkT = accumulate(load_finite(b_q, p_head, b_row, stride_qt, UNIT, D, BD, CAREFUL), b_ds, b_dkT)
    b_dkT *= scale / b_gain
    b_col = tl.where(check(b_dkT, p_again, CAREFUL), -1, b_col)
    p_dk = head_pointer(p_dk, i_b, i_kv, stride_dkb, stride_dkh, UNIT)
    store_vectors(p_dk, b_col, b_dkT, stride_dkt, ADD, UNIT, D, BD)


def row_lse(problem):
    """Log-sum-exp over all visible keys, split (2,B,Hq,T) fp32: 0 outside the rows, +inf and 0 for a row that sees no key."""
    B, Hq, T, _ = problem.q.shape
    lse = torch.zeros(2, B, Hq, T, dtype=torch.float32, device=problem.q.device)
    if problem.rows.numel():
        common = attention_arguments("row_lse", problem)
        grid = (triton.cdiv(common["R"], common["BM"]), Hq, B)
        _launch.launch(row_lse_kernel, grid, p_lse=lse, **common)
    return lse


def row_lse_backward(problem, dlse, into=None):
    """Gradient of ``row_lse``, dq (B,Hq,T,D) and dk (B,Hkv,T,D) in fp32; ``into`` = (dq, dk) to add it to.

    The problem's lse is split (2,B,Hq,T) as `row_lse` makes it, or natural (B,Hq,T). dlse (B,Hq,T) is read at the rows only.
    fp32, because the slice's own gradient nearly cancels it.
    """
    q, k = problem.q, problem.k
    dq, dk = [torch.zeros_like(x, dtype=torch.float32) for x in (q, k)] if into is None else into
    if problem.rows.numel():
        B, Hq, T, _ = q.shape
        common = attention_arguments("row_lse_backward", problem, dq=dq, dk=dk)
        common.update(**lse_arguments(problem.lse), p_dlse=dlse, ADD=into is not None)
        grid = (triton.cdiv(common["R"], common["BM"]), Hq, B)
        _launch.launch_checked(row_lse_backward_dq_kernel, grid, **taken(row_lse_backward_dq_kernel, common))
        common["p_gain"] = fp16_gain(q, dlse.unsqueeze(-1))
        grid = (triton.cdiv(T, common["BN"]), k.shape[1], B)
        _launch.launch_checked(row_lse_backward_dk_kernel, grid, **taken(row_lse_backward_dk_kernel, common))
    return dq, dk
