"""Row cosine of every head's slice with its own target, without the slice: its sums rescale online, as attention's do.

Between forward and backward only four numbers per head and row live. The gradient is `slice_backward` with these.

No factor changes a cosine, so no log-sum-exp is made for one: the gradient in it is zero, and nothing reaches keys outside the
slice. Their scores are looked at once, for what makes a softmax NaN.
"""

import torch
import triton
import triton.language as tl

from . import _launch
from ._launch import BATCH_DEPENDENT, attention_arguments, fp16_gain, lse_arguments
from ._primitives import (
    LOG2E,
    block_head_sample,
    exponentials,
    head_pointer,
    load_keys,
    load_lse,
    load_rows,
    load_vectors,
    sample_pointer,
    scores,
    visible,
)
from ._slice_pairs import nonzero
from .slice_gradient import head_gradients


@triton.jit
def flaws(
    b_q,  # (BM, BD)
    b_row,  # (BM,)
    b_peak,  # (BM,) the largest score of columns
    b_first,  # (BN,) the least of which are the first column, or T
    p_k,  # (T, D) of one sample and head
    p_others,  # (T,) of one sample
    n_others,
    stride_kt,
    T,
    CAUSAL: tl.constexpr,
    UNIT: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    BN: tl.constexpr,
):
    """(BM,) NaN where a row's softmax is, by keys outside the slice or for lack of a score above -inf; else 0."""
    b_top = tl.full((b_row.shape[0], BN), float("-inf"), tl.float32)
    for i_n in tl.range(0, n_others, BN):
        b_col = load_keys(p_others, None, i_n + tl.arange(0, BN), n_others)
        b_k = load_vectors(p_k, b_col, stride_kt, UNIT, D, BD)
        b_s = tl.where(visible(b_row[:, None], b_col[None, :], CAUSAL), scores(b_q, b_k), float("-inf"))
        b_top = tl.maximum(b_top, b_s, propagate_nan=tl.PropagateNan.ALL)
        b_first = tl.minimum(b_first, tl.where(b_col >= 0, b_col, T))
    first = tl.min(b_first, 0)
    m_seen = b_row >= (first if CAUSAL else tl.where(first < T, 0, T))
    b_flaw = tl.sum(tl.where(b_top == float("-inf"), 0.0, b_top) * 0.0, 1)
    return tl.where(m_seen & (tl.maximum(b_peak, tl.max(b_top, 1)) == float("-inf")), float("nan"), b_flaw)


@triton.jit(do_not_specialize=BATCH_DEPENDENT)
def head_cosine_kernel(
    p_q,  # (B, Hq, T, D)
    p_k,  # (B, Hkv, T, D)
    p_lse,  # (B, Hq, T) or None
    p_share,  # (B, Hq, T) or None
    p_rows,  # (B, R)
    p_cols,  # (B, V)
    p_mask,  # (B, T) or None
    p_others,  # (B, T + 1): the keys outside the slice; None with p_lse
    p_count,  # (B,) of these; None with p_lse
    p_target,  # (B, Hq, R, V)
    p_loss,  # (B, Hq, R)
    p_kept,  # (4, B, Hq, R): the maximum of the scores in bits, 1/|a| with a in units of 2^maximum, cos, 1/|t|
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
    GROUP: tl.constexpr,
    CAUSAL: tl.constexpr,
    UNIT: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """1 - cos(a_i, t_i) with a_ij = exp(scale*q_i.k_j) over all columns j, for BM rows of one sample and head.

    No factor changes a cosine, so lse_i decides no more than whether the row is zero, or not a number. Where it is not given,
    the scores of the other keys say that (`flaws`).

    Online: a and t are divided by their running maxima, so that the squares of a faint row do not underflow, and the sums
    a.a, a.t, t.t, u.t, u.u of u = a - t are rescaled when a maximum grows. Where a and t are nearly parallel, u is small,
    and 1 - cos = (1 - cos^2) / (1 + cos) with 1 - cos^2 = (u.u t.t - (u.t)^2) / (a.a t.t) keeps its digits.
    A zero vector has cosine 0, and so has a row that sees no column.
    """
    i_m, i_h, i_b = block_head_sample()
    o_m = i_m * BM + tl.arange(0, BM)
    p_mask = sample_pointer(p_mask, i_b, T)
    b_row = load_rows(p_rows + i_b * R, o_m, R)
    b_q = load_vectors(head_pointer(p_q, i_b, i_h, stride_qb, stride_qh, UNIT), b_row, stride_qt, UNIT, D, BD)
    if p_lse is not None:
        b_lse, b_share = load_lse(p_lse, p_share, (i_b * Hq + i_h) * T, b_row)
        m_zero = b_lse == float("inf")
        b_nothing = tl.where(m_zero, 0.0, b_lse) * 0.0 + b_share * 0.0  # or NaN
    p_k = head_pointer(p_k, i_b, i_h, stride_kb, stride_kh, UNIT, GROUP)
    p_target += ((i_b * Hq + i_h) * R + i_m * BM) * V

    b_peak_a = tl.full((BM,), float("-inf"), tl.float32)  # in bits
    b_peak_t = tl.zeros((BM,), tl.float32)
    b_aa = tl.zeros((BM,), tl.float32)
    b_at = tl.zeros((BM,), tl.float32)
    b_tt = tl.zeros((BM,), tl.float32)
    b_ut = tl.zeros((BM,), tl.float32)
    b_uu = tl.zeros((BM,), tl.float32)
    b_first = tl.zeros((BN,), tl.int32) + T
    for i_n in tl.range(0, V, BN):
        o_n = i_n + tl.arange(0, BN)
        b_col = load_keys(p_cols + i_b * V, None, o_n, V)
        m_pair = (b_row >= 0)[:, None] & (b_col >= 0)[None, :]
        o_tile = tl.arange(0, BM)[:, None] * V + o_n[None, :]
        b_t = tl.load(p_target + o_tile, mask=m_pair, other=0.0).to(tl.float32)
        if p_mask is not None:
            b_col = load_keys(p_cols + i_b * V, p_mask, o_n, V)
        b_k = load_vectors(p_k, b_col, stride_kt, UNIT, D, BD)
        b_a = tl.where(visible(b_row[:, None], b_col[None, :], CAUSAL), scores(b_q, b_k), float("-inf"))

        b_new_a = tl.maximum(b_peak_a, tl.max(b_a, 1) * (scale * LOG2E))
        b_safe = tl.where(b_new_a == float("-inf"), 0.0, b_new_a)
        b_fa = tl.exp2(b_peak_a - b_safe)
        b_new_t = tl.maximum(b_peak_t, tl.max(tl.abs(b_t), 1))
        b_ft = b_peak_t / nonzero(b_new_t)
        b_gap = b_fa - b_ft
        b_uu = b_fa * b_fa * b_uu + 2.0 * b_fa * b_gap * b_ut + b_gap * b_gap * b_tt
        b_ut = b_ft * (b_fa * b_ut + b_gap * b_tt)
        b_a = exponentials(b_a, scale, b_safe[:, None])
        b_t /= nonzero(b_new_t)[:, None]
        b_u = b_a - b_t
        b_aa = b_fa * b_fa * b_aa + tl.sum(b_a * b_a, 1)
        b_at = b_fa * b_ft * b_at + tl.sum(b_a * b_t, 1)
        b_tt = b_ft * b_ft * b_tt + tl.sum(b_t * b_t, 1)
        b_ut += tl.sum(b_u * b_t, 1)
        b_uu += tl.sum(b_u * b_u, 1)
        b_peak_a = b_new_a
        b_peak_t = b_new_t
        if p_lse is None:
            b_first = tl.minimum(b_first, tl.where(b_col >= 0, b_col, T))

    if p_lse is None:
        m_zero = b_row < 0
        p_others += i_b * (T + 1)
        n_others = tl.load(p_count + i_b)
        b_nothing = b_aa * 0.0
        b_nothing += flaws(
            b_q, b_row, b_peak_a, b_first, p_k, p_others, n_others, stride_kt, T, CAUSAL, UNIT, D, BD, BN
        )
    m_both = (b_aa != 0.0) & (b_tt != 0.0) & ~m_zero
    b_cos = tl.where(m_both, b_at / tl.sqrt(nonzero(b_aa)) / tl.sqrt(nonzero(b_tt)), 0.0)
    b_near = (b_uu / nonzero(b_aa) - b_ut / nonzero(b_aa) * (b_ut / nonzero(b_tt))) / (1.0 + tl.maximum(b_cos, 0.0))
    b_loss = tl.where(b_cos > 0.5, tl.maximum(b_near, 0.0), 1.0 - b_cos)
    o_out = (i_b * Hq + i_h) * R + o_m
    m_out = (b_row >= 0) & (o_m < R)
    tl.store(p_loss + o_out, b_loss + b_nothing, mask=m_out)
    count = tl.num_programs(2).to(tl.int64) * Hq * R
    tl.store(p_kept + o_out, tl.where(m_both, b_peak_a, float("inf")), mask=m_out)
    b_share = tl.where(m_both, 1.0 / tl.sqrt(nonzero(b_aa)), 0.0) + b_nothing
    tl.store(p_kept + count + o_out, b_share, mask=m_out)
    tl.store(p_kept + 2 * count + o_out, b_cos, mask=m_out)
    b_inverse = tl.where(m_both, 1.0 / (nonzero(b_peak_t) * tl.sqrt(nonzero(b_tt))), 0.0)
    tl.store(p_kept + 3 * count + o_out, b_inverse, mask=m_out)


def other_keys(problem):
    """Real keys outside the slice up to the last row, in order (B,T+1) int32 with anything behind them; how many (B,)."""
    rows, cols, T = problem.rows, problem.cols, problem.q.shape[2]
    keys = torch.arange(T, dtype=torch.int32, device=rows.device)
    others = torch.ones(rows.shape[0], T + 1, dtype=torch.bool, device=rows.device)
    others = others.scatter_(1, torch.where(cols < 0, T, cols).long(), False)[:, :T]
    if problem.key_mask is not None:
        others = others & problem.key_mask
    if problem.causal:
        others = others & (keys <= rows.amax(1, keepdim=True))
    count = others.cumsum(1, dtype=torch.int32)
    places = torch.where(others, count - 1, T).long()
    listed = torch.empty(rows.shape[0], T + 1, dtype=torch.int32, device=rows.device)
    return listed.scatter_(1, places, keys.expand_as(places)), count[:, -1].contiguous()


def head_cosine(problem, target):
    """1 - cos of every head's slice with target (B,Hq,R,V), any floating dtype, row by row: (B,Hq,R) fp32.

    The problem's lse may be None. Also (4,B,Hq,R) for `head_cosine_backward`. Both hold anything where rows are -1.
    """
    (B, Hq, R, V), q = target.shape, problem.q
    loss = torch.ones(B, Hq, R, dtype=torch.float32, device=q.device)
    kept = torch.empty(4, B, Hq, R, dtype=torch.float32, device=q.device)
    common = attention_arguments("head_cosine", problem)
    common.update(**lse_arguments(problem.lse), p_cols=problem.cols, V=V, p_target=target.contiguous())
    common["p_others"], common["p_count"] = other_keys(problem) if problem.lse is None else (None, None)
    _launch.launch(head_cosine_kernel, (triton.cdiv(R, common["BM"]), Hq, B), p_loss=loss, p_kept=kept, **common)
    return loss, kept


def head_cosine_backward(problem, kept, target, grad, base):
    """Gradient of ``head_cosine`` for grad (B,Hq,R), which is zero where rows are -1; otherwise as `slice_backward`.

    Without an lse ``base`` and dlse are None.
    """
    peak, share, *factors = kept
    cosine = torch.stack([peak, share, *(x * grad for x in factors)])
    gain = fp16_gain(problem.q, 2.0 * grad.unsqueeze(-1))  # |cos * a/|a| - t/|t|| is at most 2
    return head_gradients(problem, target, base, gain, cosine=cosine)
