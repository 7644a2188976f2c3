"""Cross-entropy and divergence of rows of logits, and their gradient in the student's logits in place of these.

One program owns a row. With p and q the student's and the teacher's softmax of logits / T, p1 the student's at T = 1:

  d = ce_weight (p1 - onehot) + kd_weight / T * { p - q                  forward KL
                                                { p (r - sum_j p_j r_j)  r = log p/q: reverse KL; (1-beta) log p/m: JSD

with m = beta q + (1-beta) p. The first pass keeps a running maximum and sum per lane for both models; the last one reads
the row again and overwrites the student's logits by d. Only reverse KL and JSD need a pass between them, for the mean of
r. Of a top-k teacher all other tokens are one more outcome: the student's top-k logits are set to -inf, so that the first
pass sums the others' probability alone and nothing cancels.
"""

import triton
import triton.language as tl

from cdistill.errors import InputError

from . import _launch
from ._primitives import LN2, LOG2E

# A bound of which the compiler knows that it is a multiple of 16 keeps accesses 16 bytes wide; rows are padded that far.
WIDE = tl.constexpr(16)

DIVERGENCES = ("forward_kl", "reverse_kl", "jsd")  # that `compare` knows

# Of stored tokens of a teacher, which one block holds; more would spill.
MOST_TOP = 1024


@triton.jit
def load_logits(p_x, i_v, V, other, KEEP: tl.constexpr, BV: tl.constexpr):
    """The next BV logits in fp32, ``other`` beyond the end; KEEP: they will be read again."""
    o_v = i_v + tl.arange(0, BV)
    policy: tl.constexpr = "evict_last" if KEEP else "evict_first"
    b_x = tl.load(p_x + o_v, mask=o_v < tl.cdiv(V, WIDE) * WIDE, other=0.0, eviction_policy=policy)
    return tl.where(o_v < V, b_x.to(tl.float32), other)


@triton.jit
def softmax_sums(p_x, V, factor, SCALED: tl.constexpr, BV: tl.constexpr):
    """Maximum of a row, sum_j 2^(factor (x_j - maximum)), and log2 sum_j e^(x_j - maximum)."""
    b_top = tl.full((BV,), -float("inf"), tl.float32)
    b_sum = tl.zeros((BV,), tl.float32)
    b_sum_1 = tl.zeros((BV,), tl.float32)
    for i_v in tl.range(0, V, BV):
        b_x = load_logits(p_x, i_v, V, -float("inf"), True, BV)
        b_new = tl.maximum(b_top, b_x)
        b_base = tl.where(b_new == -float("inf"), 0.0, b_new)
        b_sum = b_sum * tl.exp2((b_top - b_base) * factor) + tl.exp2((b_x - b_base) * factor)
        if SCALED:
            b_sum_1 = b_sum_1 * tl.exp2((b_top - b_base) * LOG2E) + tl.exp2((b_x - b_base) * LOG2E)
        b_top = b_new
    top = tl.max(b_top, 0)
    b_total = tl.sum(b_sum * tl.exp2((b_top - top) * factor), 0)
    log_sum_1 = tl.log2(b_total)
    if SCALED:
        log_sum_1 = tl.log2(tl.sum(b_sum_1 * tl.exp2((b_top - top) * LOG2E), 0))
    return top, b_total, log_sum_1


@triton.jit
def log2_add(a, b):
    top = tl.maximum(a, b)
    return top + tl.log2(tl.exp2(a - top) + tl.exp2(b - top))


@triton.jit
def compare(b_log_p, b_log_q, b_log_ratio, b_p, b_q, beta, DIVERGENCE: tl.constexpr):
    """What an outcome adds to the divergence, and r; both in bits. b_log_ratio is log2 q/p."""
    if DIVERGENCE == "forward_kl":
        b_r = tl.zeros_like(b_p)
        b_term = b_q * b_log_ratio
    elif DIVERGENCE == "reverse_kl":
        b_r = -b_log_ratio
        b_term = b_p * b_r
    else:
        b_m = beta * b_q + (1.0 - beta) * b_p
        b_log_m = tl.log2(tl.where(b_m < 1.1754944e-38, 1.1754944e-38, b_m))
        b_r = (1.0 - beta) * (b_log_p - b_log_m)
        b_term = b_p * b_r + beta * b_q * (b_log_q - b_log_m)
    return b_term, b_r


@triton.jit
def compare_logits(p_student, p_teacher, i_v, V, top_p, sum_p, top_q, sum_q, factor, beta,
                   KEEP: tl.constexpr, DIVERGENCE: tl.constexpr, BV: tl.constexpr):  # fmt: skip
    """The next BV of s - max s, p, q, terms of the divergence and r."""
    b_s = load_logits(p_student, i_v, V, top_p, KEEP, BV) - top_p
    b_t = load_logits(p_teacher, i_v, V, top_q, KEEP, BV) - top_q
    b_log_p = b_s * factor - tl.log2(sum_p)
    b_log_q = b_t * factor - tl.log2(sum_q)
    b_log_ratio = (b_t - b_s) * factor - tl.log2(sum_q / sum_p)  # large parts of both cancel before they are rounded
    b_p, b_q = tl.exp2(b_log_p), tl.exp2(b_log_q)
    b_term, b_r = compare(b_log_p, b_log_q, b_log_ratio, b_p, b_q, beta, DIVERGENCE)
    m_v = i_v + tl.arange(0, BV) < V
    return b_s, b_p, b_q, tl.where(m_v, b_term, 0.0), tl.where(m_v, b_r, 0.0)


@triton.jit
def store_gradient(p_student, b_s, b_p, b_slope, i_v, label, log_sum_1, ce_weight, kd_weight, V,
                   SCALED: tl.constexpr, BV: tl.constexpr):  # fmt: skip
    o_v = i_v + tl.arange(0, BV)
    b_p1 = b_p
    if SCALED:
        b_p1 = tl.exp2(b_s * LOG2E - log_sum_1)
    b_d = ce_weight * b_p1 - tl.where(o_v == label, ce_weight, 0.0)
    b_d += tl.where(kd_weight == 0.0, 0.0, kd_weight * b_slope)
    tl.store(p_student + o_v, b_d.to(p_student.dtype.element_ty), mask=o_v < tl.cdiv(V, WIDE) * WIDE)


@triton.jit(do_not_specialize=["V"])
def vocabulary_kernel(
    p_student,  # (N, V) logits, then their gradient
    p_teacher,  # (N, V)
    p_label,  # (N,)
    p_ce,  # (N,)
    p_kd,  # (N,)
    V,
    stride_s,
    stride_t,
    temperature,
    beta,
    ce_weight,
    kd_weight,
    DIVERGENCE: tl.constexpr,
    SCALED: tl.constexpr,
    GRADIENT: tl.constexpr,
    BV: tl.constexpr,
):
    """A row s of the student's logits and t of the teacher's, with p = softmax(s/T), q = softmax(t/T), m = beta q + (1-beta) p:

        ce = log sum_j e^{s_j} - s_label
        kd = sum_j q_j log q_j/p_j,  sum_j p_j log p_j/q_j,  or  sum_j beta q_j log q_j/m_j + (1-beta) p_j log p_j/m_j

    and, with GRADIENT, d (above) in the place of s. softmax_sums reads both rows once; forward KL needs one more pass, whose
    slope p - q is known as it goes; the others two, because theirs is p (r - sum_j p_j r_j).
    """
    i_n = tl.program_id(0).to(tl.int64)
    p_student += i_n * stride_s
    p_teacher += i_n * stride_t
    label = tl.load(p_label + i_n).to(tl.int32)
    label_logit = tl.load(p_student + label).to(tl.float32)
    factor = 1.0 / temperature * LOG2E

    top_p, sum_p, log_sum_1 = softmax_sums(p_student, V, factor, SCALED, BV)
    top_q, sum_q, _ = softmax_sums(p_teacher, V, factor, False, BV)
    tl.store(p_ce + i_n, top_p - label_logit + log_sum_1 * LN2)

    kd_weight = kd_weight / temperature
    b_kd = tl.zeros((BV,), tl.float32)
    b_mean = tl.zeros((BV,), tl.float32)
    if DIVERGENCE != "forward_kl":
        for i_v in tl.range(0, V, BV):
            b_s, b_p, b_q, b_term, b_r = compare_logits(
                p_student, p_teacher, i_v, V, top_p, sum_p, top_q, sum_q, factor, beta, True, DIVERGENCE, BV
            )
            b_kd += b_term
            b_mean += b_p * b_r
        mean = tl.sum(b_mean, 0)
    if GRADIENT or DIVERGENCE == "forward_kl":
        for i_v in tl.range(0, V, BV):
            b_s, b_p, b_q, b_term, b_r = compare_logits(
                p_student, p_teacher, i_v, V, top_p, sum_p, top_q, sum_q, factor, beta, False, DIVERGENCE, BV
            )
            if DIVERGENCE == "forward_kl":
                b_kd += b_term
                b_slope = b_p - b_q
            else:
                b_slope = b_p * (b_r - mean) * LN2
            if GRADIENT:
                store_gradient(p_student, b_s, b_p, b_slope, i_v, label, log_sum_1, ce_weight, kd_weight, V, SCALED, BV)
    tl.store(p_kd + i_n, tl.sum(b_kd, 0) * LN2)


@triton.jit(do_not_specialize=["V", "K"])
def top_vocabulary_kernel(
    p_student,  # (N, V) logits, then their gradient
    p_value,  # (N, K) log-probabilities of the teacher's top tokens
    p_index,  # (N, K)
    p_tail,  # (N,) log-probability of all others
    p_label,  # (N,)
    p_ce,  # (N,)
    p_kd,  # (N,)
    V,
    K,
    stride_s,
    temperature,
    beta,
    ce_weight,
    kd_weight,
    DIVERGENCE: tl.constexpr,
    SCALED: tl.constexpr,
    GRADIENT: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
):
    """As vocabulary_kernel with q known for the K tokens of a set S, and as one outcome for all others:

        kd = sum_{j in S} D(p_j, q_j) + D(p_rest, q_rest),  p_rest = sum_{j not in S} p_j

    The gradient of a token outside S is that of p_rest times p_j / p_rest. Logits of S are kept in b_logit and set to -inf in
    memory, so that softmax_sums sums p_rest alone; 1 - sum_S p_j would cancel.
    """
    i_n = tl.program_id(0).to(tl.int64)
    p_student += i_n * stride_s
    o_k = tl.arange(0, BK)
    m_k = o_k < K
    b_index = tl.load(p_index + i_n * K + o_k, mask=m_k, other=0).to(tl.int32)
    b_logit = tl.load(p_student + b_index, mask=m_k, other=-float("inf")).to(tl.float32)
    b_log_q = tl.load(p_value + i_n * K + o_k, mask=m_k, other=-float("inf")) * LOG2E
    tail_log_q = tl.load(p_tail + i_n) * LOG2E
    label = tl.load(p_label + i_n).to(tl.int32)
    label_logit = tl.load(p_student + label).to(tl.float32)
    factor = 1.0 / temperature * LOG2E

    tl.debug_barrier()
    b_hidden = tl.full((BK,), -float("inf"), tl.float32)
    tl.store(p_student + b_index, b_hidden.to(p_student.dtype.element_ty), mask=m_k)
    tl.debug_barrier()
    tail_top, tail_total, tail_sum_1 = softmax_sums(p_student, V, factor, SCALED, BV)
    top_top = tl.max(b_logit, 0)
    top = tl.maximum(tail_top, top_top)
    b_shift = b_logit - top_top
    tail_sum = tl.log2(tail_total) + (tail_top - top) * factor
    log_sum = log2_add(tail_sum, (top_top - top) * factor + tl.log2(tl.sum(tl.exp2(b_shift * factor), 0)))
    log_sum_1 = log_sum
    if SCALED:
        top_sum_1 = (top_top - top) * LOG2E + tl.log2(tl.sum(tl.exp2(b_shift * LOG2E), 0))
        log_sum_1 = log2_add(tail_sum_1 + (tail_top - top) * LOG2E, top_sum_1)
    tl.store(p_ce + i_n, top - label_logit + log_sum_1 * LN2)

    b_s = tl.where(m_k, b_logit - top, 0.0)
    b_log_p = tl.where(m_k, b_s * factor - log_sum, 0.0)
    b_log_q = tl.where(m_k, b_log_q, 0.0)
    b_p, b_q = tl.exp2(b_log_p), tl.exp2(b_log_q)
    b_term, b_r = compare(b_log_p, b_log_q, b_log_q - b_log_p, b_p, b_q, beta, DIVERGENCE)
    tail_log_p = tail_sum - log_sum
    tail_p, tail_q = tl.exp2(tail_log_p), tl.exp2(tail_log_q)
    tail_term, tail_r = compare(tail_log_p, tail_log_q, tail_log_q - tail_log_p, tail_p, tail_q, beta, DIVERGENCE)
    mean = tl.sum(tl.where(m_k, b_p * b_r, 0.0), 0) + tail_p * tail_r
    tl.store(p_kd + i_n, (tl.sum(tl.where(m_k, b_term, 0.0), 0) + tail_term) * LN2)

    if GRADIENT:
        kd_weight = kd_weight / temperature
        for i_v in tl.range(0, V, BV):
            b_x = load_logits(p_student, i_v, V, top, False, BV) - top
            b_px = tl.exp2(b_x * factor - log_sum)
            if DIVERGENCE == "forward_kl":
                b_slope = b_px - tl.exp2(b_x * factor - (tail_sum - tail_log_q))
            else:
                b_slope = b_px * (tail_r - mean) * LN2
            store_gradient(p_student, b_x, b_px, b_slope, i_v, label, log_sum_1, ce_weight, kd_weight, V, SCALED, BV)
        b_slope = b_p - b_q if DIVERGENCE == "forward_kl" else b_p * (b_r - mean) * LN2
        b_p1 = tl.exp2(b_s * LOG2E - log_sum_1)
        b_d = ce_weight * b_p1 - tl.where(b_index == label, ce_weight, 0.0)
        b_d += tl.where(kd_weight == 0.0, 0.0, kd_weight * b_slope)
        tl.debug_barrier()
        tl.store(p_student + b_index, b_d.to(p_student.dtype.element_ty), mask=m_k)


def vocabulary_losses(rows, options) -> None:
    """Write ce and kd (N,) of logits (N,V), and their gradient in place of student's.

    ``rows`` are `VocabularyRows` and ``options`` `VocabularyOptions` of the ops. Rows must be padded to multiples of 16
    elements; what lies there is overwritten, too.
    """
    student, teacher, top, labels, ce, kd = rows
    if options.divergence not in DIVERGENCES:
        raise InputError(f"divergence must be one of {DIVERGENCES}, got {options.divergence!r}")
    scaled = options.temperature != 1.0
    tile = _launch.vocabulary_tile(student.device, scaled)
    common = {
        "device": student.device,
        "p_student": student,
        "p_label": labels,
        "p_ce": ce,
        "p_kd": kd,
        "V": student.shape[1],
        "stride_s": student.stride(0),
        "temperature": options.temperature,
        "beta": options.beta,
        "ce_weight": options.ce_weight,
        "kd_weight": options.kd_weight,
        "DIVERGENCE": options.divergence,
        "SCALED": scaled,
        "GRADIENT": options.gradient,
        "BV": tile.BN,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }
    grid = (student.shape[0],)
    if top is None:
        _launch.launch(vocabulary_kernel, grid, p_teacher=teacher, stride_t=teacher.stride(0), **common)
        return
    values, indices, tail = top
    K = values.shape[1]
    if K > MOST_TOP:
        raise InputError(f"teacher_topk must hold at most {MOST_TOP} tokens a row for impl='triton', got {K}")
    width = triton.next_power_of_2(K)
    _launch.launch(top_vocabulary_kernel, grid, p_value=values, p_index=indices, p_tail=tail, K=K, BK=width, **common)
