"""Device functions shared by the attention kernels.

Conventions of all kernels: `p_` pointer, `b_` block value, `o_` offset, `m_` mask, `i_` program index; BM rows and BN
columns per tile, head dimension D padded to BD. A position of -1 is absent: loading it gives zeros, storing to it does
nothing, it is never visible. Logarithms are base 2 inside a kernel (`exp2` is one instruction), natural outside.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)

# Probabilities and their gradients are brought to at most 2^14 before they become fp16 operands (at most 65504) and
# scaled back in fp32: probabilities of long rows and unscaled gradients lie below the smallest normal fp16 number.
HEADROOM = tl.constexpr(16384.0)


@triton.jit
def load_rows(
    p_rows,  # (R,) of one sample
    o_m,  # (BM,)
    R,
    AGAIN: tl.constexpr = False,
):
    """With AGAIN they are truly read a second time, instead of being kept in registers through a loop."""
    return tl.load(p_rows + o_m, mask=o_m < R, other=-1, volatile=AGAIN).to(tl.int32)


@triton.jit
def load_keys(
    p_cols,  # (V,) of one sample, or None: the keys are 0..V-1
    p_mask,  # (T,) of one sample, or None: every key is real
    o_n,  # (BN,)
    V,
    AGAIN: tl.constexpr = False,
):
    b_col = tl.where(o_n < V, o_n, -1)
    if p_cols is not None:
        b_col = tl.load(p_cols + o_n, mask=o_n < V, other=-1, volatile=AGAIN).to(tl.int32)
    if p_mask is not None:
        b_col = tl.where(tl.load(p_mask + b_col, mask=b_col >= 0, other=0) != 0, b_col, -1)
    return b_col


@triton.jit
def visible(
    b_row,  # (BM, 1) or (1, BM)
    b_col,  # (1, BN) or (BN, 1)
    CAUSAL: tl.constexpr,
):
    m_seen = (b_col >= 0) & (b_row >= 0)
    if CAUSAL:
        m_seen &= b_row >= b_col
    return m_seen


@triton.jit
def load_vectors(
    p_x,  # (T, D) of one sample and head
    b_pos,  # (BP,)
    stride_t,  # in units of UNIT elements
    UNIT: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
):
    o_d = tl.arange(0, BD)
    p_tile = p_x + (b_pos.to(tl.int64) * stride_t * UNIT)[:, None] + o_d[None, :]
    m_tile = (b_pos >= 0)[:, None]
    if D != BD:
        m_tile &= (o_d < D)[None, :]
    return tl.load(p_tile, mask=m_tile, other=0.0)


@triton.jit
def store_vectors(
    p_x,  # (T, D) of one sample and head; the caller owns the vectors at b_pos
    b_pos,  # (BP,)
    b_xT,  # (BD, BP)
    stride_t,  # in units of UNIT elements
    ADD: tl.constexpr,
    UNIT: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
):
    """Write the vectors, or with ADD add them to what is there."""
    o_d = tl.arange(0, BD)
    p_tile = p_x + b_pos[:, None].to(tl.int64) * stride_t * UNIT + o_d[None, :]
    m_tile = (b_pos >= 0)[:, None] & (o_d < D)[None, :]
    b_x = tl.trans(b_xT)
    if ADD:
        b_x += tl.load(p_tile, mask=m_tile, other=0.0).to(tl.float32)
    tl.store(p_tile, b_x.to(p_x.dtype.element_ty), mask=m_tile)


@triton.jit
def load_lse(
    p_lse,  # (T,) of one sample and head, natural
    b_row,  # (BM,)
):
    b_lse = tl.load(p_lse + b_row, mask=b_row >= 0, other=float("inf"))
    # A row without keys may come as -inf, which would turn exp(s - lse) into inf; +inf turns it into 0.
    return tl.where(b_lse == float("-inf"), float("inf"), b_lse) * LOG2E


@triton.jit
def scores(
    b_x,  # (BX, BD)
    b_y,  # (BY, BD)
):
    return tl.dot(b_x, tl.trans(b_y), input_precision="ieee")


@triton.jit
def accumulate(
    b_x,  # (BX, BD)
    b_weight,  # (BX, BY) fp32
    b_accT,  # (BD, BY)
):
    """acc^T += x^T weight.

    Both operands lie in shared memory: a transposed dot result as the left operand would be fed from registers on
    Hopper, where the ptxas that Triton bundles makes wrong code of it.
    """
    return tl.dot(tl.trans(b_x), b_weight.to(b_x.dtype), b_accT, input_precision="ieee")
