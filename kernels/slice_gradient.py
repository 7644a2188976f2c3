"""The gradient of the softmax probabilities that `attention_slice` makes, in queries, keys and the log-sum-exp."""

import torch
import triton
import triton.language as tl

from . import _launch
from ._launch import (
    BATCH_DEPENDENT,
    attention_arguments,
    fp16_gain,
    lse_arguments,
    taken,
)
from ._primitives import (
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
from .attention_slice import suffix

# Positions looked at in one step: few steps, because each waits for memory.
SCAN = tl.constexpr(1024)


@triton.jit
def wholly_visible(
    b_row,  # (BM,)
    b_col,  # (BN,)
    CAUSAL: tl.constexpr,
):
    """Whether every row of the tile sees every column: then no entry needs a mask."""
    seen = (tl.min(b_row, 0) >= 0) & (tl.min(b_col, 0) >= 0)
    if CAUSAL:
        seen &= tl.min(b_row, 0) >= tl.max(b_col, 0)
    return seen


@triton.jit
def columns_seen_by_all(
    b_row,  # (BM,)
    p_cols,  # (V,) of one sample
    p_mask,  # (T,) of one sample, or None: every key is real
    V,
    CAUSAL: tl.constexpr,
    BN: tl.constexpr,
):
    """How many of the columns, from the first one on, all rows see: none of their tiles needs a mask."""
    last = tl.min(b_row, 0)
    if not CAUSAL:
        last = tl.where(last >= 0, 2147483647, -1)
    b_first = tl.zeros((BN,), tl.int32) + V
    for i_n in tl.range(0, V, BN):
        o_n = i_n + tl.arange(0, BN)
        b_col = load_keys(p_cols, p_mask, o_n, V)
        b_first = tl.minimum(b_first, tl.where((b_col >= 0) & (b_col <= last), V, o_n))
    return tl.min(b_first, 0)


@triton.jit
def row_factors(
    p_lse,  # (B, Hq, T)
    p_share,  # (B, Hq, T) or None
    p_cosine,  # (4, B, Hq, R) or None
    i_b,
    i_h,
    b_row,  # (BM,)
    o_m,  # (BM,)
    R,
    T,
    Hq,
):
    """What the gradient needs of BM rows: maximum and share as of `load_lse`, and two more numbers for row cosine.

    That keeps four numbers of a row from the forward pass: a/|a| takes the place of P, and G is cos * a/|a| - t/|t|, times
    the gradient of the loss.
    """
    if p_cosine is None:
        b_lse, b_share = load_lse(p_lse, p_share, (i_b * Hq + i_h) * T, b_row)
        b_cos = b_lse
        b_inverse = b_lse
    else:
        p_cosine += (i_b * Hq + i_h) * R + o_m
        count = tl.num_programs(2).to(tl.int64) * Hq * R
        b_lse = tl.load(p_cosine, mask=b_row >= 0, other=float("inf"))
        b_share = tl.load(p_cosine + count, mask=b_row >= 0, other=0.0)
        b_cos = tl.load(p_cosine + 2 * count, mask=b_row >= 0, other=0.0)
        b_inverse = tl.load(p_cosine + 3 * count, mask=b_row >= 0, other=0.0)
    return b_lse, b_share, b_cos, b_inverse


@triton.jit(do_not_specialize=BATCH_DEPENDENT)
def slice_backward_rows_kernel(
    p_q,  # (B, Hq, T, D)
    p_k,  # (B, Hkv, T, D)
    p_lse,  # (B, Hq, T)
    p_share,  # (B, Hq, T) or None
    p_rows,  # (B, R)
    p_cols,  # (B, V)
    p_mask,  # (B, T) or None
    p_grad,  # (B, Hq, R, V)
    p_cosine,  # (4, B, Hq, R) or None
    p_gain,  # (B,) or None
    p_dq,  # (B, Hq, R, D) fp32, with ADD (B, Hq, T, D); or None
    p_dlse,  # (B, Hq, T) or None
    p_again,  # (programs,) bytes; None with p_dq
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
    stride_dqb,
    stride_dqh,
    stride_dqt,
    R,
    V,
    T,
    Hq,
    scale,
    weight,
    ADD: tl.constexpr,
    G_UNIT: tl.constexpr,
    GROUP: tl.constexpr,
    CAUSAL: tl.constexpr,
    UNIT: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    CAREFUL: tl.constexpr,
):
    """dq_i = scale * sum_j dS_ij k_j, dlse_i = -sum_j dS_ij with dS = weight*P*G, for BM rows of one sample and head.

    Either may be left out; with ADD dq is added to what is there. P is recomputed: storing it per head is slower and
    bigger. Transposed throughout, dq^T += k^T dS^T with P^T = exp(scale*k.q^T - lse), so that no dot result is a left
    operand. G is read in vectors of G_UNIT columns; what these find behind the last column is hidden.
    """
    if not runs(p_again, CAREFUL):
        return
    i_m, i_h, i_b = block_head_sample()
    o_m = i_m * BM + tl.arange(0, BM)
    p_mask = sample_pointer(p_mask, i_b, T)
    b_row = load_rows(p_rows + i_b * R, o_m, R)
    b_q = load_vectors(head_pointer(p_q, i_b, i_h, stride_qb, stride_qh, UNIT), b_row, stride_qt, UNIT, D, BD)
    b_lse, b_share, b_cos, b_inverse = row_factors(p_lse, p_share, p_cosine, i_b, i_h, b_row, o_m, R, T, Hq)
    p_k = head_pointer(p_k, i_b, i_h, stride_kb, stride_kh, UNIT, GROUP)
    p_grad += (i_b * stride_gb + i_h * stride_gh + tl.cast(i_m * BM, tl.int64) * stride_gr) * G_UNIT
    b_gain = 1.0
    if p_gain is not None:
        b_gain = tl.load(p_gain + i_b)

    n_read = tl.cdiv(V, G_UNIT) * G_UNIT
    n_whole = columns_seen_by_all(b_row, p_cols + i_b * V, p_mask, V, CAUSAL, SCAN)
    b_dqT = tl.zeros((BD, BM), tl.float32)
    b_sumT = tl.zeros((BN, BM), tl.float32)
    for i_n in tl.range(0, V, BN):
        o_n = i_n + tl.arange(0, BN)
        b_col = load_keys(p_cols + i_b * V, p_mask, o_n, V)
        b_k = load_vectors(p_k, b_col, stride_kt, UNIT, D, BD)
        p_tile = p_grad + tl.cast(i_n, tl.int64) * stride_gv
        p_tile = p_tile + tl.arange(0, BM)[None, :] * stride_gr * G_UNIT + tl.arange(0, BN)[:, None] * stride_gv
        b_gT = tl.load(p_tile, mask=(o_m < R)[None, :] & (o_n < n_read)[:, None], other=0.0).to(tl.float32)
        b_pT = exponentials(scores(b_k, b_q), scale, b_lse[None, :]) * b_share[None, :]
        if p_cosine is not None:
            b_gT = b_pT * b_cos[None, :] - b_gT * b_inverse[None, :]
        b_dsT = b_pT * (b_gT * b_gain)
        # An `if`, because without one Triton takes the second product for chained to the first and repeats it (sm_90).
        if i_n + BN > n_whole:
            b_dsT = tl.where(visible(b_row[None, :], b_col[:, None], CAUSAL), b_dsT, 0.0)
        if p_dlse is not None:
            b_sumT += b_dsT
        if p_dq is not None:
            b_dqT = accumulate(load_finite(b_k, p_k, b_col, stride_kt, UNIT, D, BD, CAREFUL), b_dsT, b_dqT)
    weight /= b_gain
    if p_dlse is not None:
        tl.store(p_dlse + (i_b * Hq + i_h) * T + b_row, -tl.sum(b_sumT, 0) * weight, mask=b_row >= 0)
    if p_dq is not None:
        o_row = b_row if ADD else tl.where(b_row >= 0, o_m, -1)
        o_row = tl.where(check(b_dqT, p_again, CAREFUL), -1, o_row)
        p_dq = head_pointer(p_dq, i_b, i_h, stride_dqb, stride_dqh, UNIT)
        store_vectors(p_dq, o_row, b_dqT * (scale * weight), stride_dqt, ADD, UNIT, D, BD)


@triton.jit(do_not_specialize=BATCH_DEPENDENT)
def slice_backward_cols_kernel(
    p_q,  # (B, Hq, T, D)
    p_k,  # (B, Hkv, T, D)
    p_lse,  # (B, Hq, T)
    p_share,  # (B, Hq, T) or None
    p_rows,  # (B, R)
    p_cols,  # (B, V)
    p_mask,  # (B, T) or None
    p_grad,  # (B, Hq, R, V)
    p_cosine,  # (4, B, Hq, R) or None
    p_gain,  # (B,) or None
    p_dk,  # (B, Hkv, T, D)
    p_again,  # (programs,) bytes
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
    stride_dkb,
    stride_dkh,
    stride_dkt,
    R,
    V,
    T,
    Hq,
    scale,
    weight,
    G_UNIT: tl.constexpr,
    GROUP: tl.constexpr,
    CAUSAL: tl.constexpr,
    UNIT: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    CAREFUL: tl.constexpr,
):
    """dk_j += scale * sum_i dS_ij q_i with dS = weight*P*G, for one block of columns j of one sample and kv head.

    The sum runs over all rows and, within a row block, over the query heads of the group: dk^T += q^T dS.
    """
    if not runs(p_again, CAREFUL):
        return
    i_n, i_kv, i_b = block_head_sample()
    o_n = i_n * BN + tl.arange(0, BN)
    p_mask = sample_pointer(p_mask, i_b, T)
    b_col = load_keys(p_cols + i_b * V, p_mask, o_n, V)
    b_k = load_vectors(head_pointer(p_k, i_b, i_kv, stride_kb, stride_kh, UNIT), b_col, stride_kt, UNIT, D, BD)
    p_grad += i_b * stride_gb * G_UNIT + tl.cast(i_n * BN, tl.int64) * stride_gv
    b_gain = 1.0
    if p_gain is not None:
        b_gain = tl.load(p_gain + i_b)

    n_read = tl.cdiv(V, G_UNIT) * G_UNIT
    b_dkT = tl.zeros((BD, BN), tl.float32)
    n_steps = tl.cdiv(R, BM) * GROUP
    for i_step in tl.range(0, n_steps):
        i_h = i_kv * GROUP + i_step % GROUP
        i_m = (i_step // GROUP) * BM
        o_m = i_m + tl.arange(0, BM)
        b_row = load_rows(p_rows + i_b * R, o_m, R)
        p_head = head_pointer(p_q, i_b, i_h, stride_qb, stride_qh, UNIT)
        b_q = load_vectors(p_head, b_row, stride_qt, UNIT, D, BD)
        b_lse, b_share, b_cos, b_inverse = row_factors(p_lse, p_share, p_cosine, i_b, i_h, b_row, o_m, R, T, Hq)
        p_tile = p_grad + (i_h * stride_gh + tl.cast(i_m, tl.int64) * stride_gr) * G_UNIT
        p_tile = p_tile + tl.arange(0, BM)[:, None] * stride_gr * G_UNIT + tl.arange(0, BN)[None, :] * stride_gv
        b_g = tl.load(p_tile, mask=(o_m < R)[:, None] & (o_n < n_read)[None, :], other=0.0).to(tl.float32)
        b_p = exponentials(scores(b_q, b_k), scale, b_lse[:, None]) * b_share[:, None]
        if p_cosine is not None:
            b_g = b_p * b_cos[:, None] - b_g * b_inverse[:, None]
        b_ds = b_p * (b_g * b_gain)
        if not wholly_visible(b_row, b_col, CAUSAL):
            b_ds = tl.where(visible(b_row[:, None], b_col[None, :], CAUSAL), b_ds, 0.0)
        b_dkT = accumulate(load_finite(b_q, p_head, b_row, stride_qt, UNIT, D, BD, CAREFUL), b_ds, b_dkT)
    b_dkT *= scale * weight / b_gain
    b_col = tl.where(check(b_dkT, p_again, CAREFUL), -1, b_col)
    p_dk = head_pointer(p_dk, i_b, i_kv, stride_dkb, stride_dkh, UNIT)
    store_vectors(p_dk, b_col, b_dkT, stride_dkt, True, UNIT, D, BD)


@triton.jit(do_not_specialize=BATCH_DEPENDENT)
def add_rows_kernel(
    p_drows,  # (B, Hq, R, D)
    p_rows,  # (B, R)
    p_dq,  # (B, Hq, T, D)
    stride_dqb,
    stride_dqh,
    stride_dqt,
    R,
    Hq,
    UNIT: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    BM: tl.constexpr,
):
    """dq_i += drows_i for BM rows i of one sample and head."""
    i_m, i_h, i_b = block_head_sample()
    o_m = i_m * BM + tl.arange(0, BM)
    b_row = load_rows(p_rows + i_b * R, o_m, R)
    o_row = tl.where(b_row >= 0, o_m, -1)
    b_d = load_vectors(p_drows + (i_b * Hq + i_h) * R * D, o_row, D // UNIT, UNIT, D, BD).to(tl.float32)
    p_dq = head_pointer(p_dq, i_b, i_h, stride_dqb, stride_dqh, UNIT)
    store_vectors(p_dq, b_row, tl.trans(b_d), stride_dqt, True, UNIT, D, BD)


def gradient_unit(grad):
    """In how many columns at a time grad (B,Hq,R,V) may be read: 8, if rows begin at multiples of it and have room behind V."""
    *strides, stride_v = grad.stride()
    columns = triton.cdiv(grad.shape[3], _launch.ALIGNMENT) * _launch.ALIGNMENT
    end = (
        grad.storage_offset() + sum((n - 1) * stride for n, stride in zip(grad.shape, strides, strict=False)) + columns
    )
    room = end * grad.element_size() <= grad.untyped_storage().nbytes()
    return _launch.common_unit(strides) if stride_v == 1 and room else 1


def slice_backward(problem, grad, base, bound=None, into=None):
    """Gradient of ``slice_forward`` at fixed lse, added to dq and dk of ``base(dlse)``; returns dq, dk and dlse.

    grad (B,R,V) or (B,Hq,R,V), any strides. dlse (B,Hq,T) fp32 is zero outside the rows. ``base`` None: dq (B,Hq,T,D)
    and dk (B,Hkv,T,D) are ``into``, or in q's dtype, new and otherwise zero. bound (B,): what |P*grad| does not exceed,
    or None. While it runs there live dlse and at most dq of the rows.
    """
    gain = fp16_gain(problem.q, grad, bound) if grad.numel() else None
    base = base if into is None else lambda dlse: into
    if problem.each:
        return head_gradients(problem, grad, base, gain, weight=1.0)
    heads = problem.q.shape[1]
    return head_gradients(problem, grad.unsqueeze(1).expand(-1, heads, -1, -1), base, gain, weight=1.0 / heads)


def head_gradients(problem, grad, base, gain, *, weight=1.0, cosine=None):
    """What `slice_backward` says, for grad (B,Hq,R,V) times ``weight``; ``cosine`` as in `row_factors` instead of the lse.

    dlse must be known before ``base`` runs, and dq exists only after it: where dq of the rows is no larger than a slice it
    is kept meanwhile, else the rows are gone through twice. A problem without an lse has no dlse, which is None, and no base.
    gain (B,) are factors for fp16 operands, or None.
    """
    q, k, (B, Hq, R, V) = problem.q, problem.k, grad.shape
    tiles, lse = ("slice", problem.lse) if cosine is None else ("cosine", None)
    dlse = None
    if problem.lse is not None:
        dlse = torch.zeros(B, Hq, q.shape[2], dtype=torch.float32, device=q.device)
    *strides, stride_gv = grad.stride()
    unit = gradient_unit(grad)
    options = {f"stride_g{axis}": stride // unit for axis, stride in zip("bhr", strides, strict=True)}
    options.update(stride_gv=stride_gv, G_UNIT=unit, p_grad=grad, p_gain=gain, weight=weight)
    options.update(**lse_arguments(lse), p_cosine=cosine, p_cols=problem.cols, V=V)

    def launch_rows(dq, dlse, add):
        common = attention_arguments(f"{tiles}_rows{suffix(lse)}", problem, dq=dq)
        grid = (triton.cdiv(R, common["BM"]), Hq, B)
        common.update(options, p_dlse=dlse, ADD=add)
        if dq is None:
            _launch.launch(slice_backward_rows_kernel, grid, p_again=None, CAREFUL=False, **common)
        else:
            _launch.launch_checked(slice_backward_rows_kernel, grid, **common)

    # fp32, because the gradient through lse nearly cancels it
    keep = dlse is not None and Hq * q.shape[3] <= V
    drows = torch.empty(B, Hq, R, q.shape[3], dtype=torch.float32, device=q.device) if keep else None
    if grad.numel() and dlse is not None:
        launch_rows(drows, dlse, False)
    dq, dk = (torch.zeros_like(q), torch.zeros_like(k)) if base is None else base(dlse)
    if grad.numel():
        if keep:
            common = attention_arguments(f"{tiles}_rows", problem, dq=dq)
            grid = (triton.cdiv(R, common["BM"]), Hq, B)
            _launch.launch(add_rows_kernel, grid, p_drows=drows, **taken(add_rows_kernel, common))
        else:
            launch_rows(dq, None, True)
        drows = None
        common = attention_arguments(f"{tiles}_cols", problem, dk=dk)
        grid = (triton.cdiv(V, common["BN"]), k.shape[1], B)
        _launch.launch_checked(slice_backward_cols_kernel, grid, **common, **options)
    return dq, dk, dlse
