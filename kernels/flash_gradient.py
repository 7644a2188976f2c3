"""The gradient of flash attention for dout and dlse: delta, then dk and dv, then dq (see `flash_attention`)."""

import torch
import triton
import triton.language as tl

from . import _launch
from ._flash_blocks import (
    again,
    key_blocks,
    launch_blocks,
    like,
    load_block,
    parted,
    problem_arguments,
    store_block,
)
from ._primitives import (
    HEADROOM,
    block_head_sample,
    check,
    exponentials,
    finite,
    head_pointer,
    load_keys,
    load_lse,
    not_finite,
    runs,
    sample_pointer,
    scores,
    visible,
)


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
    i_m, i_h, i_b = block_head_sample(BM)
    o_m = i_m + tl.arange(0, BM)
    o_head = (i_b * Hq + i_h) * T
    p_rows += o_head * 3
    b_delta = tl.zeros((BM,), tl.float32)
    m_used = b_delta != 0.0
    if p_dout is not None:
        p_out = head_pointer(p_out, i_b, i_h, stride_outb, stride_outh, UNIT)
        p_dout = head_pointer(p_dout, i_b, i_h, stride_doutb, stride_douth, UNIT)
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
    PARTED: tl.constexpr,
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
    i_n, i_kv, i_b = block_head_sample(BN)
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
    p_k = head_pointer(p_k, i_b, i_kv, stride_kb, stride_kh, UNIT)
    p_v = head_pointer(p_v, i_b, i_kv, stride_vb, stride_vh, UNIT)
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
    # On Hopper the diagonal has a loop of its own, before the other: without the `if`, 64 queries a step fit the registers.
    TWO: tl.constexpr = PARTED and CAUSAL and not CAREFUL
    n_diagonal = 0
    if TWO:
        n_diagonal = tl.minimum(tl.cdiv(i_n + BN - 1, BM) - first, n_blocks) * GROUP
    for PLAIN in tl.static_range(1 + TWO):
        begin, end = 0, n_steps
        if PLAIN:
            begin = n_diagonal
        elif TWO:
            end = n_diagonal
        for i_step in tl.range(begin, end):
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
            if CAUSAL and not PLAIN and (TWO or i_m < i_n + BN - 1):
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
    p_dk = head_pointer(p_dk, i_b, i_kv, stride_dkb, stride_dkh, UNIT)
    store_block(p_dk, i_n, b_dk * (scale / (headroom * b_gain)), m_real, stride_dkt, UNIT, D, BN, BD)
    if p_dout is not None:
        p_dv = head_pointer(p_dv, i_b, i_kv, stride_dvb, stride_dvh, UNIT)
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
    i_m, i_h, i_b = block_head_sample()
    if CAUSAL:
        i_m = tl.num_programs(0) - 1 - i_m
    i_m *= BM
    o_m = i_m + tl.arange(0, BM)
    p_mask = sample_pointer(p_mask, i_b, T)
    p_bounds = sample_pointer(p_bounds, i_b, 3)
    first, plain, plain_stop, stop = key_blocks(p_bounds, i_m, T, CAUSAL, BM, BN)
    b_gain = 1.0
    if p_gain is not None:
        b_gain = tl.load(p_gain + i_b) * HEADROOM
    p_rows += (i_b * Hq + i_h) * 3 * T
    b_max = tl.load(p_rows + o_m, mask=o_m < T, other=float("inf"))
    b_share = tl.load(p_rows + T + o_m, mask=o_m < T, other=0.0)
    b_delta = tl.load(p_rows + 2 * T + o_m, mask=o_m < T, other=0.0)
    p_k = head_pointer(p_k, i_b, i_h, stride_kb, stride_kh, UNIT, GROUP)
    p_v = head_pointer(p_v, i_b, i_h, stride_vb, stride_vh, UNIT, GROUP)
    p_q = head_pointer(p_q, i_b, i_h, stride_qb, stride_qh, UNIT)
    b_q = load_block(p_q, i_m, T, stride_qt, UNIT, D, BM, BD)
    if p_dout is not None:
        p_dout = head_pointer(p_dout, i_b, i_h, stride_doutb, stride_douth, UNIT)
        b_dout = load_block(p_dout, i_m, T, stride_doutt, UNIT, D, BM, BD)

    b_dq = tl.zeros((BM, BD), tl.float32)
    # One loop with an `if`: a loop for the mask alone saves no access of shared memory here and takes registers.
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
    p_dq = head_pointer(p_dq, i_b, i_h, stride_dqb, stride_dqh, UNIT)
    store_block(p_dq, i_m, b_dq * (b_share * (scale / b_gain))[:, None], o_m < T, stride_dqt, UNIT, D, BM, BD)


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


def flash_backward(problem, out, dout, dlse):
    """Gradients dq, dk, dv of `flash_forward` in the dtypes and layouts of q, k, v, for dout (like out) and dlse.

    The problem's lse is natural (B,Hq,T), or split. dout (B,Hq,T,D) with unit stride on D and dlse (B,Hq,T) contiguous fp32;
    one may be None, its output then was not used. Gradients are exactly zero for hidden keys and for queries that see no key,
    whatever dlse is there. A query whose dout and dlse are zero adds nothing to other tokens even if it is not finite.
    """
    q, k, v, key_mask = problem.q, problem.k, problem.v, problem.key_mask
    dq, dk, dv = like(q), like(k), like(v)
    if not q.numel():
        return dq, dk.zero_(), dv.zero_()
    if key_mask is not None:
        dk.zero_()
    if key_mask is not None or dout is None:
        dv.zero_()
    B, Hq, T, _ = q.shape
    rows = torch.empty(B, Hq, 3, T, dtype=torch.float32, device=q.device)
    arguments = {**_launch.lse_arguments(problem.lse), "p_dlse": dlse, "p_rows": rows, "Hq": Hq}
    tensors = {"out": out, "dout": dout}
    launch_blocks(flash_rows_kernel, "flash_rows", "out", tensors, _launch.launch, **arguments)
    arguments = {"p_rows": rows, "p_gain": _gain(v, dout, rows[:, :, 2], key_mask), **problem_arguments(problem)}
    tensors = {"q": q, "k": k, "v": v, "dout": dout}
    loops = {"PARTED": parted("flash_dkdv", q)}
    launch_blocks(flash_dkdv_kernel, "flash_dkdv", "dk", {**tensors, "dk": dk, "dv": dv}, **arguments, **loops)
    launch_blocks(flash_dq_kernel, "flash_dq", "dq", {**tensors, "dq": dq}, **arguments)
    return dq, dk, dv
