"""FlashAttention-2 whose log-sum-exp is an output with a gradient: a forward, and a backward that takes dout and dlse.

Every result has one owner and sums run in a fixed order, so two runs agree bit for bit. The backward is three kernels:
delta, then dk and dv by the owners of key blocks, then dq by the owners of query blocks. Besides the results only delta
and the split lse (`_primitives`) exist, three fp32 numbers per query and head.

P and dS are left operands straight from the dot that made them, as P in P V of every FlashAttention; neither is
transposed first, of which the ptxas that Triton bundles makes wrong code on Hopper. Hence S^T = K Q^T for dk and dv,
and S = Q K^T for the others. Only loaded tiles are transposed.

Only the blocks at the diagonal, at the last token and at the ends of a sample's real keys are tested for what is visible:
in all others every query sees every key. Blocks in which no query sees a key are not visited.
"""

import torch
import triton
import triton.language as tl

from . import _launch
from ._primitives import (
    HEADROOM,
    LN2,
    LOG2E,
    check,
    exponentials,
    finite,
    load_keys,
    load_lse,
    not_finite,
    runs,
    scores,
    visible,
)

__all__ = ["flash_backward", "flash_forward"]

# Elements from one token to the next at which offsets within a block of 128 tokens leave 32 bits.
FAR = 2**24


@triton.jit
def block_pointers(
    p_x,  # (T, D) of one sample and head
    i_t,  # the first position of the block
    stride_t,  # in units of UNIT elements
    UNIT: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
):
    o_t = tl.arange(0, BT)
    return p_x + tl.cast(i_t, tl.int64) * stride_t * UNIT + (o_t[:, None] * stride_t * UNIT + tl.arange(0, BD)[None, :])


@triton.jit
def load_block(
    p_x,  # (T, D) of one sample and head
    i_t,
    T,
    stride_t,
    UNIT: tl.constexpr,
    D: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
    AGAIN: tl.constexpr = False,
):
    """(BT, BD) vectors from position i_t on, zeros beyond T and D; AGAIN as for `load_rows`."""
    m_tile = (i_t + tl.arange(0, BT) < T)[:, None] & (tl.arange(0, BD) < D)[None, :]
    return tl.load(block_pointers(p_x, i_t, stride_t, UNIT, BT, BD), mask=m_tile, other=0.0, volatile=AGAIN)


@triton.jit
def again(b_x, p_x, i_t, T, stride_t, UNIT: tl.constexpr, D: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr):
    """A block for use in a loop, loaded before it: fp32 is read once more, as its dots keep operands in registers."""
    if p_x.dtype.element_ty == tl.float32:
        b_x = load_block(p_x, i_t, T, stride_t, UNIT, D, BT, BD, AGAIN=True)
    return b_x


@triton.jit
def store_block(p_x, i_t, b_x, m_t, stride_t, UNIT: tl.constexpr, D: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr):
    m_tile = m_t[:, None] & (tl.arange(0, BD) < D)[None, :]
    tl.store(block_pointers(p_x, i_t, stride_t, UNIT, BT, BD), b_x.to(p_x.dtype.element_ty), mask=m_tile)


@triton.jit
def key_blocks(
    p_bounds,  # (3,) of one sample, or None: every key is real
    i_m,  # the first query of the block
    T,
    CAUSAL: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """The keys [first, stop) that BM queries see, and those [plain, plain_stop) of which each query sees every one.

    All are multiples of BN, first <= stop. Plain is of no use between holes, so then it is empty.
    """
    first, stop, all_see, any_sees = 0, T, T, T
    if CAUSAL:
        all_see, any_sees = i_m + 1, i_m + BM
    plain = 0
    if p_bounds is not None:
        first, stop = tl.load(p_bounds), tl.load(p_bounds + 1)
        plain = tl.where(tl.load(p_bounds + 2) != 0, tl.cdiv(first, BN) * BN, T)
        first = first // BN * BN
    plain_stop = tl.minimum(all_see, stop) // BN * BN
    return first, plain, plain_stop, tl.minimum(any_sees, stop)


@triton.jit(do_not_specialize=_launch.BATCH_DEPENDENT)
def key_bounds_kernel(
    p_mask,  # (B, T)
    p_bounds,  # (B, 3)
    T,
    BN: tl.constexpr,
):
    """First real key of a sample, one past its last, and whether every key between them is real."""
    i_b = tl.program_id(0).to(tl.int64)
    b_first = tl.zeros((BN,), tl.int32) + T
    b_stop = tl.zeros((BN,), tl.int32)
    b_count = tl.zeros((BN,), tl.int32)
    for i_n in tl.range(0, T, BN):
        o_n = i_n + tl.arange(0, BN)
        m_real = tl.load(p_mask + i_b * T + o_n, mask=o_n < T, other=0) != 0
        b_first = tl.minimum(b_first, tl.where(m_real, o_n, T))
        b_stop = tl.maximum(b_stop, tl.where(m_real, o_n + 1, 0))
        b_count += m_real.to(tl.int32)
    first, stop = tl.min(b_first, 0), tl.max(b_stop, 0)
    tl.store(p_bounds + i_b * 3, first)
    tl.store(p_bounds + i_b * 3 + 1, stop)
    tl.store(p_bounds + i_b * 3 + 2, (stop - first == tl.sum(b_count, 0)).to(tl.int32))


@triton.jit(do_not_specialize=_launch.BATCH_DEPENDENT)
def flash_forward_kernel(
    p_q,  # (B, Hq, T, D)
    p_k,  # (B, Hkv, T, D)
    p_v,  # (B, Hkv, T, D)
    p_mask,  # (B, T) or None
    p_bounds,  # (B, 3) or None
    p_out,  # (B, Hq, T, D)
    p_lse,  # (B, Hq, T)
    p_split,  # (2, B, Hq, T)
    p_again,  # (programs,) bytes
    stride_qb,
    stride_qh,
    stride_qt,
    stride_kb,
    stride_kh,
    stride_kt,
    stride_vb,
    stride_vh,
    stride_vt,
    stride_outb,
    stride_outh,
    stride_outt,
    T,
    Hq,
    scale,  # > 0: the running maximum of s*scale is then that of s
    GROUP: tl.constexpr,
    CAUSAL: tl.constexpr,
    UNIT: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    CAREFUL: tl.constexpr,
):
    """out_i = sum_j P_ij v_j and lse_i = log sum_j exp(scale*q_i.k_j), for BM queries of one sample and head.

    Online, in base 2: with s = scale*log2(e)*q.k, the running maximum m, l = sum_j 2^(s_j - m) and acc = sum_j
    2^(s_j - m) v_j, a block of keys gives m' = max(m, max s), l' = l*2^(m - m') + sum 2^(s - m') and acc' likewise;
    finally out = acc / l and lse = ln 2 * (m + log2 l). A query that sees no key gets out 0 and lse -inf, one that sees a
    value which is not finite gets NaN. In causal mode the queries that see most keys start first, so that the short
    programs fill the end. Split are m and 1 / l.
    """
    if not runs(p_again, CAREFUL):
        return
    i_m, i_h, i_b = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    if CAUSAL:
        i_m = tl.num_programs(0) - 1 - i_m
    i_m *= BM
    o_m = i_m + tl.arange(0, BM)
    if p_mask is not None:
        p_mask += i_b * T
        p_bounds += i_b * 3
    first, plain, plain_stop, stop = key_blocks(p_bounds, i_m, T, CAUSAL, BM, BN)
    p_k += (i_b * stride_kb + (i_h // GROUP) * stride_kh) * UNIT
    p_v += (i_b * stride_vb + (i_h // GROUP) * stride_vh) * UNIT
    b_q = load_block(p_q + (i_b * stride_qb + i_h * stride_qh) * UNIT, i_m, T, stride_qt, UNIT, D, BM, BD)

    b_max = tl.full((BM,), float("-inf"), tl.float32)
    b_sum = tl.zeros((BM,), tl.float32)
    b_acc = tl.zeros((BM, BD), tl.float32)
    for i_n in tl.range(first, stop, BN):
        b_k = load_block(p_k, i_n, T, stride_kt, UNIT, D, BN, BD)
        b_s = scores(b_q, b_k)
        if CAREFUL or (i_n < plain) | (i_n >= plain_stop):
            b_col = load_keys(None, p_mask, i_n + tl.arange(0, BN), T)
            b_s = tl.where(visible(o_m[:, None], b_col[None, :], CAUSAL), b_s, float("-inf"))
        b_new = tl.maximum(b_max, tl.max(b_s, 1) * (scale * LOG2E))
        b_safe = tl.where(b_new == float("-inf"), 0.0, b_new)
        b_decay = tl.exp2(b_max - b_safe)
        b_p = exponentials(b_s, scale, b_safe[:, None])
        b_v = load_block(p_v, i_n, T, stride_vt, UNIT, D, BN, BD)
        b_sum = b_sum * b_decay + tl.sum(b_p, 1)
        if CAREFUL:
            m_bad = visible(o_m[:, None], b_col[None, :], CAUSAL) & not_finite(b_v)[None, :]
            b_sum += tl.where(tl.max(m_bad.to(tl.int32), 1) != 0, float("nan"), 0.0)
            b_v = finite(b_v)
        b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc * b_decay[:, None], input_precision="ieee")
        b_max = b_new
    check(b_acc, p_again, CAREFUL)
    m_seen = o_m < T
    if p_bounds is not None:
        m_seen &= o_m >= tl.load(p_bounds) if CAUSAL else tl.load(p_bounds) < T
    b_sum = tl.where(m_seen, b_sum, 1.0)
    o_row = (i_b * Hq + i_h) * T + o_m
    tl.store(p_lse + o_row, tl.where(m_seen, (b_max + tl.log2(b_sum)) * LN2, float("-inf")), mask=o_m < T)
    tl.store(p_split + o_row, tl.where(m_seen, b_max, float("inf")), mask=o_m < T)
    p_split += tl.num_programs(2).to(tl.int64) * Hq * T
    tl.store(p_split + o_row, tl.where(m_seen, 1.0 / b_sum, 0.0), mask=o_m < T)
    p_out += (i_b * stride_outb + i_h * stride_outh) * UNIT
    store_block(p_out, i_m, b_acc / b_sum[:, None], o_m < T, stride_outt, UNIT, D, BM, BD)


@triton.jit(do_not_specialize=_launch.BATCH_DEPENDENT)
def flash_rows_kernel(
    p_out,  # (B, Hq, T, D)
    p_dout,  # (B, Hq, T, D) or None
    p_lse,  # (B, Hq, T)
    p_share,  # (B, Hq, T) or None
    p_dlse,  # (B, Hq, T) or None
    p_rows,  # (B, Hq, 3, T)
    stride_outb,
    stride_outh,
    stride_outt,
    stride_doutb,
    stride_douth,
    stride_doutt,
    T,
    Hq,
    UNIT: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    BM: tl.constexpr,
):
    """What the backward needs of a query: maximum and share as of `load_lse`, and delta_i = dout_i.out_i - dlse_i.

    A query that sees no key, or that nothing was made of (dout_i and dlse_i are 0), gets +inf, so that P is 0, 0 and 0.
    """
    i_m, i_h, i_b = tl.program_id(0) * BM, tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    o_m = i_m + tl.arange(0, BM)
    o_head = (i_b * Hq + i_h) * T
    p_rows += o_head * 3
    b_delta = tl.zeros((BM,), tl.float32)
    m_used = b_delta != 0.0
    if p_dout is not None:
        p_out += (i_b * stride_outb + i_h * stride_outh) * UNIT
        p_dout += (i_b * stride_doutb + i_h * stride_douth) * UNIT
        b_out = load_block(p_out, i_m, T, stride_outt, UNIT, D, BM, BD).to(tl.float32)
        b_dout = load_block(p_dout, i_m, T, stride_doutt, UNIT, D, BM, BD).to(tl.float32)
        b_delta += tl.sum(b_out * b_dout, 1)
        m_used = tl.max((b_dout != 0.0).to(tl.int32), 1) != 0
    if p_dlse is not None:
        b_dlse = tl.load(p_dlse + o_head + o_m, mask=o_m < T, other=0.0)
        b_delta -= b_dlse
        m_used |= b_dlse != 0.0
    b_lse, b_share = load_lse(p_lse, p_share, o_head, tl.where(o_m < T, o_m, -1))
    m_used &= b_lse != float("inf")
    tl.store(p_rows + o_m, tl.where(m_used, b_lse, float("inf")), mask=o_m < T)
    tl.store(p_rows + T + o_m, tl.where(m_used, b_share, 0.0), mask=o_m < T)
    tl.store(p_rows + 2 * T + o_m, tl.where(m_used, b_delta, 0.0), mask=o_m < T)


@triton.jit(do_not_specialize=_launch.BATCH_DEPENDENT)
def flash_dkdv_kernel(
    p_q,  # (B, Hq, T, D)
    p_k,  # (B, Hkv, T, D)
    p_v,  # (B, Hkv, T, D)
    p_dout,  # (B, Hq, T, D) or None
    p_rows,  # (B, Hq, 3, T)
    p_mask,  # (B, T) or None
    p_bounds,  # (B, 3) or None
    p_gain,  # (B,) or None
    p_dk,  # (B, Hkv, T, D)
    p_dv,  # (B, Hkv, T, D), not written without dout
    p_again,  # (programs,) bytes
    stride_qb,
    stride_qh,
    stride_qt,
    stride_kb,
    stride_kh,
    stride_kt,
    stride_vb,
    stride_vh,
    stride_vt,
    stride_doutb,
    stride_douth,
    stride_doutt,
    stride_dkb,
    stride_dkh,
    stride_dkt,
    stride_dvb,
    stride_dvh,
    stride_dvt,
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
    CAREFUL: tl.constexpr,
):
    """dv_j = sum_i P_ij dout_i and dk_j = scale * sum_i dS_ij q_i, for BN keys of one sample and kv head.

    dS = P*(dP - delta) with P = exp(scale*q.k - lse) and dP = dout.v (0 without dout). Transposed: S^T = K Q^T and
    dP^T = V dout^T give P^T and dS^T, the left operands of dv += P^T dout and dk += dS^T q. The sums run over the query
    blocks that see the keys and, within one, over the query heads of the group. No key mixes with another, so the key
    mask is applied to the results alone. In fp16, P carries HEADROOM and dS also the gain of the sample. With CAREFUL a
    query of which nothing was made, or that does not see the key, adds nothing even if it is not finite.
    """
    if not runs(p_again, CAREFUL):
        return
    i_n, i_kv, i_b = tl.program_id(0) * BN, tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    o_n = i_n + tl.arange(0, BN)
    first, n_blocks = 0, tl.cdiv(T, BM)
    if CAUSAL:
        first = i_n // BM
        n_blocks -= first
    if p_mask is not None:
        m_visited = (i_n + BN > tl.load(p_bounds + i_b * 3)) & (i_n < tl.load(p_bounds + i_b * 3 + 1))
        n_blocks = tl.where(m_visited, n_blocks, 0)
    m_real = o_n < T
    if p_mask is not None:
        m_real = tl.load(p_mask + i_b * T + o_n, mask=m_real, other=0) != 0
    b_gain, headroom = 1.0, 1.0
    if p_gain is not None:
        b_gain, headroom = tl.load(p_gain + i_b), 1.0 * HEADROOM
    p_k += (i_b * stride_kb + i_kv * stride_kh) * UNIT
    p_v += (i_b * stride_vb + i_kv * stride_vh) * UNIT
    b_k = load_block(p_k, i_n, T, stride_kt, UNIT, D, BN, BD)
    if p_dout is not None:
        b_v = load_block(p_v, i_n, T, stride_vt, UNIT, D, BN, BD)

    p_q += (i_b * stride_qb + i_kv * GROUP * stride_qh) * UNIT
    p_rows += (i_b * Hq + i_kv * GROUP) * 3 * T
    if p_dout is not None:
        p_dout += (i_b * stride_doutb + i_kv * GROUP * stride_douth) * UNIT

    b_dk = tl.zeros((BN, BD), tl.float32)
    b_dv = tl.zeros((BN, BD), tl.float32)
    n_steps = n_blocks * GROUP
    for i_step in tl.range(0, n_steps):
        i_g = tl.cast(i_step % GROUP, tl.int64)
        i_m = (first + i_step // GROUP) * BM
        o_m = i_m + tl.arange(0, BM)
        b_q = load_block(p_q + i_g * stride_qh * UNIT, i_m, T, stride_qt, UNIT, D, BM, BD)
        b_sT = scores(again(b_k, p_k, i_n, T, stride_kt, UNIT, D, BN, BD), b_q)
        b_dpT = tl.zeros((BN, BM), tl.float32)
        if p_dout is not None:
            b_dout = load_block(p_dout + i_g * stride_douth * UNIT, i_m, T, stride_doutt, UNIT, D, BM, BD)
            b_dpT = scores(again(b_v, p_v, i_n, T, stride_vt, UNIT, D, BN, BD), b_dout)
        p_row = p_rows + i_g * 3 * T + o_m
        b_max = tl.load(p_row, mask=o_m < T, other=float("inf"))
        b_share = tl.load(p_row + T, mask=o_m < T, other=0.0) * headroom
        b_pT = exponentials(b_sT, scale, b_max[None, :]) * b_share[None, :]
        if CAUSAL and i_m < i_n + BN - 1:
            b_pT = tl.where(o_m[None, :] >= o_n[:, None], b_pT, 0.0)
        b_delta = tl.load(p_row + 2 * T, mask=o_m < T, other=0.0)
        b_dsT = b_pT * ((b_dpT - b_delta[None, :]) * b_gain)
        if CAREFUL:
            m_adds = (b_max != float("inf"))[None, :] & (o_n >= 0)[:, None]
            if CAUSAL:
                m_adds &= o_m[None, :] >= o_n[:, None]
            b_dsT = tl.where(m_adds, b_dsT, 0.0)
            b_q = finite(b_q)
            if p_dout is not None:
                b_pT += tl.where(not_finite(b_dout), float("nan"), 0.0)[None, :]
                b_dout = finite(b_dout)
            b_pT = tl.where(m_adds, b_pT, 0.0)
        if p_dout is not None:
            b_dv = tl.dot(b_pT.to(b_dout.dtype), b_dout, b_dv, input_precision="ieee")
        b_dk = tl.dot(b_dsT.to(b_q.dtype), b_q, b_dk, input_precision="ieee")
    check(tl.where(m_real[:, None], b_dk * 0.0 + b_dv * 0.0, 0.0), p_again, CAREFUL)
    p_dk += (i_b * stride_dkb + i_kv * stride_dkh) * UNIT
    store_block(p_dk, i_n, b_dk * (scale / (headroom * b_gain)), m_real, stride_dkt, UNIT, D, BN, BD)
    if p_dout is not None:
        p_dv += (i_b * stride_dvb + i_kv * stride_dvh) * UNIT
        store_block(p_dv, i_n, b_dv * (1.0 / headroom), m_real, stride_dvt, UNIT, D, BN, BD)


@triton.jit(do_not_specialize=_launch.BATCH_DEPENDENT)
def flash_dq_kernel(
    p_q,  # (B, Hq, T, D)
    p_k,  # (B, Hkv, T, D)
    p_v,  # (B, Hkv, T, D)
    p_dout,  # (B, Hq, T, D) or None
    p_rows,  # (B, Hq, 3, T)
    p_mask,  # (B, T) or None
    p_bounds,  # (B, 3) or None
    p_gain,  # (B,) or None
    p_dq,  # (B, Hq, T, D)
    p_again,  # (programs,) bytes
    stride_qb,
    stride_qh,
    stride_qt,
    stride_kb,
    stride_kh,
    stride_kt,
    stride_vb,
    stride_vh,
    stride_vt,
    stride_doutb,
    stride_douth,
    stride_doutt,
    stride_dqb,
    stride_dqh,
    stride_dqt,
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
    CAREFUL: tl.constexpr,
):
    """dq_i = scale * sum_j dS_ij k_j with dS as in `flash_dkdv_kernel`, for BM queries of one sample and head.

    The share leaves the sum.
    """
    if not runs(p_again, CAREFUL):
        return
    i_m, i_h, i_b = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    if CAUSAL:
        i_m = tl.num_programs(0) - 1 - i_m
    i_m *= BM
    o_m = i_m + tl.arange(0, BM)
    if p_mask is not None:
        p_mask += i_b * T
        p_bounds += i_b * 3
    first, plain, plain_stop, stop = key_blocks(p_bounds, i_m, T, CAUSAL, BM, BN)
    b_gain = 1.0
    if p_gain is not None:
        b_gain = tl.load(p_gain + i_b) * HEADROOM
    p_rows += (i_b * Hq + i_h) * 3 * T
    b_max = tl.load(p_rows + o_m, mask=o_m < T, other=float("inf"))
    b_share = tl.load(p_rows + T + o_m, mask=o_m < T, other=0.0)
    b_delta = tl.load(p_rows + 2 * T + o_m, mask=o_m < T, other=0.0)
    p_k += (i_b * stride_kb + (i_h // GROUP) * stride_kh) * UNIT
    p_v += (i_b * stride_vb + (i_h // GROUP) * stride_vh) * UNIT
    p_q += (i_b * stride_qb + i_h * stride_qh) * UNIT
    b_q = load_block(p_q, i_m, T, stride_qt, UNIT, D, BM, BD)
    if p_dout is not None:
        p_dout += (i_b * stride_doutb + i_h * stride_douth) * UNIT
        b_dout = load_block(p_dout, i_m, T, stride_doutt, UNIT, D, BM, BD)

    b_dq = tl.zeros((BM, BD), tl.float32)
    for i_n in tl.range(first, stop, BN):
        b_k = load_block(p_k, i_n, T, stride_kt, UNIT, D, BN, BD)
        b_s = scores(again(b_q, p_q, i_m, T, stride_qt, UNIT, D, BM, BD), b_k)
        b_dp = tl.zeros((BM, BN), tl.float32)
        if p_dout is not None:
            b_g = again(b_dout, p_dout, i_m, T, stride_doutt, UNIT, D, BM, BD)
            b_dp = scores(b_g, load_block(p_v, i_n, T, stride_vt, UNIT, D, BN, BD))
        b_ds = exponentials(b_s, scale, b_max[:, None]) * ((b_dp - b_delta[:, None]) * b_gain)
        if CAREFUL or (i_n < plain) | (i_n >= plain_stop):
            b_col = load_keys(None, p_mask, i_n + tl.arange(0, BN), T)
            b_ds = tl.where(visible(o_m[:, None], b_col[None, :], CAUSAL), b_ds, 0.0)
        if CAREFUL:
            b_ds = tl.where((b_max != float("inf"))[:, None], b_ds, 0.0)
            b_k = finite(b_k)
        b_dq = tl.dot(b_ds.to(b_k.dtype), b_k, b_dq, input_precision="ieee")
    check(b_dq, p_again, CAREFUL)
    p_dq += (i_b * stride_dqb + i_h * stride_dqh) * UNIT
    store_block(p_dq, i_m, b_dq * (b_share * (scale / b_gain))[:, None], o_m < T, stride_dqt, UNIT, D, BM, BD)


def _like(x: torch.Tensor) -> torch.Tensor:
    """An empty tensor laid out like ``x`` without its gaps, or contiguous where kernels could not take it."""
    like = torch.empty_like(x)
    if like.stride(3) == 1 and like.stride(2) < FAR:
        return like
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _near(x: torch.Tensor | None) -> torch.Tensor | None:
    """``x``, copied if its tokens lie so far apart that offsets within a block would need 64 bits."""
    return x if x is None or x.stride(2) < FAR else x.contiguous()


def _key_bounds(key_mask: torch.Tensor | None) -> dict:
    """The key mask as kernels take it, and where the real keys of each sample lie."""
    if key_mask is None:
        return {"p_mask": None, "p_bounds": None}
    (B, T), tile = key_mask.shape, _launch.row_tile(key_mask.device)
    arguments = {"p_mask": key_mask.view(torch.uint8), "p_bounds": key_mask.new_empty(B, 3, dtype=torch.int32)}
    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    _launch.launch(key_bounds_kernel, (B,), key_mask.device, **arguments, T=T, BN=tile.BN, **options)
    return arguments


def _gain(v, dout, delta, key_mask) -> torch.Tensor | None:
    """(B,) powers of two that bring |dP - delta| to at most 1; only fp16 operands need them.

    |dP - delta| <= D * max|dout| * max|v| + max|delta|, with the maxima of what is finite in a sample.
    """
    if v.dtype != torch.float16:
        return None
    peak, options = torch.linalg.vector_norm, {"ord": float("inf"), "dtype": torch.float32}
    bound = torch.where(delta.isfinite(), delta.abs(), 0.0).amax((1, 2))
    if dout is not None:
        peaks = {"v": peak(v, dim=(1, 3), **options), "dout": peak(dout, dim=(1, 3), **options)}
        if key_mask is not None:
            peaks["v"] = torch.where(key_mask, peaks["v"], 0.0)
        peak_v, peak_dout = (torch.where(x.isfinite(), x, 0.0).amax(1) for x in peaks.values())
        bound = bound + v.shape[3] * peak_dout * peak_v
    return torch.exp2(-torch.ceil(torch.log2(bound.clamp(min=1e-30))))


def _launch_blocks(kernel, name: str, owner: str, tensors: dict, launch=_launch.launch_checked, **arguments) -> None:
    """Launch one program per block of tokens, head and sample of the tensor ``owner``.

    Every tensor (B, heads, T, D) of ``tensors`` comes with its strides; None stays None.
    """
    B, heads, T, _ = tensors[owner].shape
    tensors = {name: _near(tensor) for name, tensor in tensors.items()}
    tile = _launch.attention_tile(name, tensors[owner])
    arguments.update(_launch.tensor_arguments(**tensors), T=T, BM=tile.BM)
    if "BN" in kernel.arg_names:  # flash_rows_kernel takes whole rows
        arguments["BN"] = tile.BN
    arguments.update(num_warps=tile.num_warps, num_stages=tile.num_stages)
    block = tile.BN if owner == "dk" else tile.BM
    launch(kernel, (triton.cdiv(T, block), heads, B), tensors[owner].device, **arguments)


def flash_forward(q, k, v, *, causal, scale, key_mask):
    """Attention and its log-sum-exp: out (B,Hq,T,D) in q's dtype and layout, lse (B,Hq,T) fp32, natural, and split (2,B,Hq,T).

    q (B,Hq,T,D), k and v (B,Hkv,T,D) with unit stride on D; scale > 0; key_mask (B,T) contiguous bool, True = real key,
    or None. A query that sees no key gets out 0 and lse -inf.
    """
    Hq = q.shape[1]
    out, lse = _like(q), torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    split = lse.new_empty((2, *lse.shape))
    if out.numel():
        arguments = {"p_lse": lse, "p_split": split, "Hq": Hq, "GROUP": Hq // k.shape[1], "CAUSAL": causal}
        arguments.update(_key_bounds(key_mask), scale=float(scale))
        tensors = {"q": q, "k": k, "v": v, "out": out}
        _launch_blocks(flash_forward_kernel, "flash_forward", "out", tensors, **arguments)
    return out, lse, split


def flash_backward(dout, dlse, q, k, v, out, lse, *, causal, scale, key_mask):
    """Gradients dq, dk, dv of `flash_forward` in the dtypes and layouts of q, k, v, for dout (like out) and dlse.

    lse is natural (B,Hq,T), or split. dout (B,Hq,T,D) with unit stride on D and dlse (B,Hq,T) contiguous fp32; either may
    be None, its output then was not used. They are exactly zero for hidden keys and for queries that see no key, whatever
    dlse is there. A query whose dout and dlse are zero adds nothing to other tokens even if it is not finite.
    """
    dq, dk, dv = _like(q), _like(k), _like(v)
    unused = (dout is None and dlse is None) or not q.numel()
    if unused:
        dq.zero_()
    if unused or key_mask is not None:
        dk.zero_()
    if unused or key_mask is not None or dout is None:
        dv.zero_()
    if unused:
        return dq, dk, dv
    B, Hq, T, _ = q.shape
    rows = torch.empty(B, Hq, 3, T, dtype=torch.float32, device=q.device)
    arguments = {**_launch.lse_arguments(lse), "p_dlse": dlse, "p_rows": rows, "Hq": Hq}
    tensors = {"out": out, "dout": dout}
    _launch_blocks(flash_rows_kernel, "flash_rows", "out", tensors, _launch.launch, **arguments)
    arguments = {"p_rows": rows, "p_gain": _gain(v, dout, rows[:, :, 2], key_mask), **_key_bounds(key_mask)}
    arguments.update(Hq=Hq, GROUP=Hq // k.shape[1], scale=float(scale), CAUSAL=causal)
    tensors = {"q": q, "k": k, "v": v, "dout": dout}
    _launch_blocks(flash_dkdv_kernel, "flash_dkdv", "dk", {**tensors, "dk": dk, "dv": dv}, **arguments)
    _launch_blocks(flash_dq_kernel, "flash_dq", "dq", {**tensors, "dq": dq}, **arguments)
    return dq, dk, dv
