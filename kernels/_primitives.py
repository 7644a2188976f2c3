"""Device functions shared by the attention kernels.

Conventions of all kernels: `p_` pointer, `b_` block value, `o_` offset, `m_` mask, `i_` program index; BM rows and BN
columns per tile, head dimension D padded to BD. A position of -1 is absent: loading it gives zeros, storing to it does
nothing, it is never visible. Logarithms are base 2 inside a kernel (`exp2` is one instruction), natural outside.

A log-sum-exp in fp32 is off by up to |lse| 2^-25, so that probabilities of large scores do not sum to one. The one that
these kernels make for themselves is split into two numbers per row instead: the maximum m of the scores in bits, and
the share 1 / sum_j 2^(s_j - m) of the likeliest key. Every kernel rounds s - m alike, by one fused multiply-add.

What is hidden is cut off after exp2, but a matrix product multiplies it by zero, and 0 * NaN is NaN. Hence programs with
a result that is not finite run once more (`_launch.launch_checked`). With CAREFUL they put zeros in the place of vectors
that are not finite: what a row does see reaches it through its scores.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)

# Probabilities and their gradients are brought to at most 2^14 before they become fp16 operands (at most 65504) and
# scaled back in fp32: probabilities of long rows and unscaled gradients lie below the smallest normal fp16 number.
HEADROOM = tl.constexpr(16384.0)


@triton.jit
def block_head_sample(STEP: tl.constexpr = 1):
    """A program's block, or with STEP that block's first position, its head and its sample; offsets to these need 64 bits."""
    return tl.program_id(0) * STEP, tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)


@triton.jit
def sample_pointer(
    p_x,  # (B, N), or None, which stays None
    i_b,
    N,
):
    """Where the values of one sample begin."""
    if p_x is not None:
        p_x += i_b * N
    return p_x


@triton.jit
def head_pointer(
    p_x,  # (B, heads, T, D)
    i_b,
    i_h,  # with GROUP a query head, whose group shares the head of p_x
    stride_b,  # in units of UNIT elements
    stride_h,
    UNIT: tl.constexpr,
    GROUP: tl.constexpr = 1,
):
    """Where the vectors (T, D) of one sample and head begin."""
    return p_x + (i_b * stride_b + (i_h // GROUP) * stride_h) * UNIT


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
    p_lse,  # (B, Hq, T), natural; with p_share the maxima in bits
    p_share,  # (B, Hq, T) or None
    o_head,  # where the rows of one sample and head begin
    b_row,  # (BM,)
):
    """(BM,) maxima in bits and shares of rows, the whole lse and 1 where it is not split; +inf for a row without keys."""
    b_lse = tl.load(p_lse + o_head + b_row, mask=b_row >= 0, other=float("inf"))
    if p_share is None:
        # A row without keys may come as -inf, which would turn exp(s - lse) into inf; +inf turns it into 0.
        b_lse = tl.where(b_lse == float("-inf"), float("inf"), b_lse) * LOG2E
        b_share = tl.full(b_row.shape, 1.0, tl.float32)
    else:
        b_share = tl.load(p_share + o_head + b_row, mask=b_row >= 0, other=0.0)
    return b_lse, b_share


@triton.jit
def exponentials(
    b_s,  # (BX, BY), products of queries and keys
    scale,  # > 0
    b_max,  # (BX, 1) or (1, BY), in bits
):
    """exp(scale * s) / 2^max; multiplied by the share these are probabilities."""
    return tl.exp2(tl.fma(b_s, scale * LOG2E, -b_max))


@triton.jit
def finite(b_x):
    """b_x with zero for inf and NaN."""
    return tl.where(tl.abs(b_x) < float("inf"), b_x, 0.0).to(b_x.dtype)


@triton.jit
def not_finite(b_x):
    """(BX,) whether there is an inf or a NaN in each vector of a tile."""
    return tl.sum(b_x.to(tl.float32) * 0.0, 1) != 0.0


@triton.jit
def runs(p_again, CAREFUL: tl.constexpr):
    """Whether this program has anything to do: with CAREFUL, if `check` noted it."""
    again = True
    if CAREFUL:
        again = tl.load(p_again + this_program()) != 0
    return again


@triton.jit
def check(b_x, p_again, CAREFUL: tl.constexpr):
    """Note whether a result must be made once more, which it is not twice."""
    again = tl.sum(b_x * 0.0) != 0.0  # over all at once: in two steps it does not compile for Blackwell
    if CAREFUL:
        again = False
    else:
        tl.store(p_again + this_program(), again.to(tl.uint8))
    return again


@triton.jit
def this_program():
    i_z = tl.program_id(2).to(tl.int64)
    return (i_z * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(0) + tl.program_id(0)


@triton.jit
def load_finite(
    b_x,  # (BP, BD)
    p_x,  # (T, D) of one sample and head
    b_pos,  # (BP,)
    stride_t,  # in units of UNIT elements
    UNIT: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    CAREFUL: tl.constexpr,
):
    """b_x, or with CAREFUL the same vectors read once more, and zeros for those that hold an inf or a NaN.

    Read, and not selected: as `accumulate` says, the operand must not come from registers.
    """
    if CAREFUL:
        b_x = load_vectors(p_x, tl.where(not_finite(b_x), -1, b_pos), stride_t, UNIT, D, BD)
    return b_x


@triton.jit
def scores(
    b_x,  # (BX, BD)
    b_y,  # (BY, BD)
):
    return tl.dot(b_x, tl.trans(b_y), input_precision="ieee")


if triton.knobs.runtime.interpret:
    # The matrix product of numpy gives an element other bits in another place of the tile, which that of a GPU does not.
    # Scores must be the same in every kernel: their last bit decides whether probabilities sum to one.

    @triton.jit
    def scores(b_x, b_y):
        return tl.sum(b_x.to(tl.float32)[:, None, :] * b_y.to(tl.float32)[None, :, :], 2)


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
