"""FlashAttention-2 whose log-sum-exp is an output with a gradient: here the forward, in `flash_gradient` a backward for dout
and dlse.

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
from ._flash_blocks import (
    apart,
    key_blocks,
    launch_blocks,
    like,
    load_block,
    load_key_block,
    parted,
    problem_arguments,
    store_block,
)
from ._primitives import (
    LN2,
    LOG2E,
    block_head_sample,
    check,
    exponentials,
    finite,
    head_pointer,
    load_keys,
    not_finite,
    runs,
    sample_pointer,
    scores,
    visible,
)


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
    PARTED: tl.constexpr,
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
    i_m, i_h, i_b = block_head_sample()
    if CAUSAL:
        i_m = tl.num_programs(0) - 1 - i_m
    i_m *= BM
    o_m = i_m + tl.arange(0, BM)
    p_mask = sample_pointer(p_mask, i_b, T)
    p_bounds = sample_pointer(p_bounds, i_b, 3)
    first, plain, plain_stop, stop = key_blocks(p_bounds, i_m, T, CAUSAL, BM, BN)
    p_k = head_pointer(p_k, i_b, i_h, stride_kb, stride_kh, UNIT, GROUP)
    p_v = head_pointer(p_v, i_b, i_h, stride_vb, stride_vh, UNIT, GROUP)
    b_q = load_block(head_pointer(p_q, i_b, i_h, stride_qb, stride_qh, UNIT), i_m, T, stride_qt, UNIT, D, BM, BD)

    b_max = tl.full((BM,), float("-inf"), tl.float32)
    b_sum = tl.zeros((BM,), tl.float32)
    b_acc = tl.zeros((BM, BD), tl.float32)
    # Where scores go from one product to the next in registers (mma.sync), an `if` in the loop parts the two, and they take the
    # way through shared memory: there what needs the mask has a loop of its own. Hopper's products do not mind the `if`; two
    # loops take registers there, and with the plain one first ptxas serialises the products.
    TWO: tl.constexpr = PARTED and not CAREFUL
    if TWO:
        plain, plain_stop = apart(first, plain, plain_stop)
    for PLAIN in tl.static_range(TWO, -1, -1):
        begin, end = first, stop
        if PLAIN:
            begin, end = plain, plain_stop
        elif TWO:
            end -= plain_stop - plain
        for i_step in tl.range(begin, end, BN):
            i_n = i_step
            if TWO and not PLAIN:
                i_n = tl.where(i_step < plain, i_step, i_step + (plain_stop - plain))
            b_k = load_key_block(p_k, i_n, T, stride_kt, UNIT, D, BN, BD, PLAIN)
            b_s = scores(b_q, b_k)
            if not PLAIN and (TWO or CAREFUL or (i_n < plain) | (i_n >= plain_stop)):
                b_col = load_keys(None, p_mask, i_n + tl.arange(0, BN), T)
                b_s = tl.where(visible(o_m[:, None], b_col[None, :], CAUSAL), b_s, float("-inf"))
            b_new = tl.maximum(b_max, tl.max(b_s, 1) * (scale * LOG2E))
            b_safe = tl.where(b_new == float("-inf"), 0.0, b_new)
            b_decay = tl.exp2(b_max - b_safe)
            b_p = exponentials(b_s, scale, b_safe[:, None])
            b_v = load_key_block(p_v, i_n, T, stride_vt, UNIT, D, BN, BD, PLAIN)
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
    p_out = head_pointer(p_out, i_b, i_h, stride_outb, stride_outh, UNIT)
    store_block(p_out, i_m, b_acc / b_sum[:, None], o_m < T, stride_outt, UNIT, D, BM, BD)


def flash_forward(problem):
    """Attention and its log-sum-exp: out (B,Hq,T,D) in q's dtype and layout, lse (B,Hq,T) fp32, natural, and split (2,B,Hq,T).

    A query that sees no key gets out 0 and lse -inf.
    """
    q = problem.q
    out, lse = like(q), torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    split = lse.new_empty((2, *lse.shape))
    if out.numel():
        arguments = {"p_lse": lse, "p_split": split, "PARTED": parted("flash_forward", q), **problem_arguments(problem)}
        tensors = {"q": q, "k": problem.k, "v": problem.v, "out": out}
        launch_blocks(flash_forward_kernel, "flash_forward", "out", tensors, **arguments)
    return out, lse, split
