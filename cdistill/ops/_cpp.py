"""The primitives of the ops in the C++ module cdistill._C, for CPU tensors.

Threads: as many as torch uses; the results do not depend on their number. The environment variable CDISTILL_CPU_ISA
(avx512_bf16, avx512, avx2 or portable) overrides the choice of instruction set; one the processor lacks raises ValueError.
"""

import torch
from torch import Tensor

import cdistill._C as _C
from cdistill.ops._contract import require_choice
from cdistill.ops._problem import AttentionProblem, Base, Comparison, Gradients, VocabularyOptions, VocabularyRows
from cdistill.ops._rows import at_rows, fold_dlse, lse_at_rows, regions, to_rows, unfold_dlse

__all__ = [
    "alignment_grad",
    "alignment_loss",
    "fold_dlse",
    "regions",
    "row_lse_backward",
    "slice_backward",
    "slice_backward_with_denominator",
    "slice_forward",
    "slice_forward_with_lse",
    "unfold_dlse",
    "vocabulary_losses",
]

SPLITS_LSE = False  # it divides by the sum of a row's probabilities instead
FUSES_DENOMINATOR = TAKES_FEWER_QUERIES = HAS_REVERSE_KL = True
FUSES_HEAD_COSINE = FUSES_ACCUMULATION = False

_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_DIVERGENCES = {"forward_kl": 0, "reverse_kl": 1, "jsd": 2}


def _by_address(problem: AttentionProblem, rows: Tensor, cols: Tensor | None) -> "_C.Problem":
    """A problem as the module takes it; ``cols`` only where there is a slice. rows and cols int32."""
    q, k, key_mask = problem.q, problem.k, problem.key_mask
    assert all(x.is_contiguous() for x in (rows, cols, key_mask) if x is not None)
    batch, q_heads, _, width = q.shape
    return _C.Problem(
        q=_of_first_key(q, problem.offset),
        q_strides=q.stride()[:3],
        k=k.data_ptr(),
        k_strides=k.stride()[:3],
        dtype=_DTYPES[q.dtype],
        batch=batch,
        heads=q_heads,
        kv_heads=k.shape[1],
        tokens=k.shape[2],
        dim=width,
        rows=rows.data_ptr(),
        n_rows=rows.shape[1],
        cols=0 if cols is None else cols.data_ptr(),
        n_cols=0 if cols is None else cols.shape[1],
        key_mask=0 if key_mask is None else key_mask.data_ptr(),
        causal=problem.causal,
        scale=problem.scale,
    )


def _of_first_key(q: Tensor, offset: int) -> int:
    """The address that a query at the first key would have; the module reads and writes at rows, none of which is before q."""
    return q.data_ptr() - offset * q.stride(2) * q.element_size()


def _results(problem: AttentionProblem, dq: Tensor, dk: Tensor) -> "list[_C.Result]":
    """Gradients (B,H,T,D) by address, to be added to."""
    assert dq.stride(3) == dk.stride(3) == 1
    return [
        _C.Result(address=_of_first_key(x, offset), dtype=_DTYPES[x.dtype], strides=x.stride()[:3])
        for x, offset in ((dq, problem.offset), (dk, 0))
    ]


def _zeros(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Zero gradients of q and k, in their dtype, and in their layout where that has unit stride on D."""

    def zeros(x: Tensor) -> Tensor:
        gradient = torch.empty_like(x)
        if gradient.stride(3) != 1:
            gradient = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        _C.fill_with_zeros(gradient.data_ptr(), gradient.nbytes, torch.get_num_threads())
        return gradient

    return zeros(q), zeros(k)


def row_lse_backward(
    problem: AttentionProblem, dlse: Tensor, into: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Gradient of the rows' log-sum-exp: dS_ij = P_ij * dlse_i over all visible keys j."""
    if into is not None and not dlse.any():  # all of it was folded
        return into
    rows = problem.positions[0].int()
    lse, dlse = lse_at_rows(problem), at_rows(dlse, problem.query_rows)
    gradients = _zeros(problem.q, problem.k) if into is None else into
    given, results = _by_address(problem, rows, None), _results(problem, *gradients)
    _C.row_lse_backward(given, lse.data_ptr(), dlse.data_ptr(), *results, torch.get_num_threads())
    return gradients


def _empty_slice(problem: AttentionProblem) -> Tensor:
    return torch.empty(problem.slice_shape, dtype=torch.float32, device=problem.q.device)


def slice_forward(problem: AttentionProblem) -> Tensor:
    """exp(scale * q.k - lse) at (rows, cols), zero where hidden: the head mean (B,R,V), or (B,Hq,R,V)."""
    rows, cols = (x.int() for x in problem.positions)
    lse, a = lse_at_rows(problem), _empty_slice(problem)
    given = _by_address(problem, rows, cols)
    _C.slice_forward(given, lse.data_ptr(), a.data_ptr(), problem.each, torch.get_num_threads())
    return a


def slice_forward_with_lse(problem: AttentionProblem) -> tuple[Tensor, Tensor]:
    """``slice_forward`` and the log-sum-exp (B,Hq,T) it needs, from one product of queries and keys.

    The log-sum-exp is written at the rows, +inf for a row without keys.
    """
    q, (rows, cols) = problem.q, (x.int() for x in problem.positions)
    a, lse = _empty_slice(problem), torch.empty((*q.shape[:2], rows.shape[1]), dtype=torch.float32, device=q.device)
    given = _by_address(problem, rows, cols)
    _C.slice_forward_with_lse(given, lse.data_ptr(), a.data_ptr(), problem.each, torch.get_num_threads())
    return a, to_rows(lse, problem.query_rows, q.shape[2])


def slice_backward(
    problem: AttentionProblem,
    grad: Tensor,
    base: Base | None,
    bound: Tensor | None = None,
    into: tuple[Tensor, Tensor] | None = None,
) -> Gradients:
    """Gradient of ``slice_forward``, dS = P * G, added to that of ``base(dlse)``; dlse_i = -sum_j dS_ij, (B,Hq,T)."""
    lse = lse_at_rows(problem)
    dlse = torch.zeros_like(lse)
    rows, tokens = problem.query_rows, problem.q.shape[2]
    if base is None:
        gradients = _zeros(problem.q, problem.k) if into is None else into
        _slice_backward(problem, lse, grad, _results(problem, *gradients), dlse)
        return *gradients, to_rows(dlse, rows, tokens)
    _slice_backward(problem, lse, grad, [_C.Result(), _C.Result()], dlse)
    dlse = to_rows(dlse, rows, tokens)
    gradients = base(dlse)
    _slice_backward(problem, lse, grad, _results(problem, *gradients), None)
    return *gradients, dlse


def slice_backward_with_denominator(
    problem: AttentionProblem, grad: Tensor, into: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Gradient of the slice of ``slice_forward_with_lse``: dS_ij = P_ij * (G_ij + dlse_i) over all visible keys j."""
    lse, gradients = lse_at_rows(problem), _zeros(problem.q, problem.k) if into is None else into
    _slice_backward(problem, lse, grad, _results(problem, *gradients), torch.zeros_like(lse), denominator=True)
    return gradients


def _slice_backward(
    problem: AttentionProblem,
    lse: Tensor,
    grad: Tensor,
    results: "list[_C.Result]",
    dlse: Tensor | None,
    denominator: bool = False,
) -> None:
    """Write dlse (B,Hq,R) unless it is None, and add to the results; lse (B,Hq,R)."""
    assert grad.dtype == torch.float32
    (rows, cols), grad = (x.int() for x in problem.positions), grad.contiguous()
    addresses = lse.data_ptr(), grad.data_ptr(), problem.each, *results, 0 if dlse is None else dlse.data_ptr()
    _C.slice_backward(_by_address(problem, rows, cols), *addresses, denominator, torch.get_num_threads())


def _compared_by_address(a: Tensor, compared: Comparison) -> "_C.Alignment":
    target, row_valid, col_valid = compared.target, compared.row_valid, compared.col_valid
    assert all(x.is_contiguous() for x in (a, target, row_valid, col_valid))
    samples, n_rows, n_cols = a.shape
    return _C.Alignment(
        a=a.data_ptr(),
        target=target.data_ptr(),
        row_valid=row_valid.data_ptr(),
        col_valid=col_valid.data_ptr(),
        samples=samples,
        n_rows=n_rows,
        n_cols=n_cols,
        loss=compared.loss,
        reduction=compared.reduction,
        sink_filter=compared.sink_filter,
    )


def alignment_loss(a: Tensor, compared: Comparison) -> Tensor:
    """Distance of a (N,R,V) from the target over valid rows and columns, (N,); 0 for a sample without either."""
    alignment = _compared_by_address(a, compared)
    losses = torch.empty(a.shape[0], dtype=torch.float32, device=a.device)
    _C.alignment_loss(alignment, losses.data_ptr(), torch.get_num_threads())
    return losses


def alignment_grad(a: Tensor, compared: Comparison, grad_out: Tensor, dtype: torch.dtype) -> Tensor:
    """Gradient of sum(grad_out * alignment_loss) in a, (N,R,V) fp32; zero outside the valid rows and columns."""
    assert grad_out.is_contiguous() and grad_out.dtype == torch.float32
    alignment = _compared_by_address(a, compared)
    grad = torch.empty_like(a)
    _C.alignment_grad(alignment, grad_out.data_ptr(), grad.data_ptr(), torch.get_num_threads())
    return grad


def _divergence(name: str) -> int:
    require_choice("divergence", name, tuple(_DIVERGENCES))
    return _DIVERGENCES[name]


def vocabulary_losses(rows: VocabularyRows, options: VocabularyOptions) -> None:
    """Cross-entropy and divergence of rows of logits, and their gradient in place of student's logits."""
    student, teacher, top, labels, ce, kd = rows
    values, indices, tail = (None, None, None) if top is None else top
    working = None if values is None else torch.empty_like(values)
    contiguous = (labels, ce, kd, values, indices, tail)
    assert all(x.is_contiguous() for x in contiguous if x is not None)

    def address(x: Tensor | None) -> int:
        return 0 if x is None else x.data_ptr()

    given = _C.VocabularyRows(
        student=student.data_ptr(),
        student_stride=student.stride(0),
        teacher=address(teacher),
        teacher_stride=0 if teacher is None else teacher.stride(0),
        dtype=_DTYPES[student.dtype],
        n_rows=student.shape[0],
        vocab=student.shape[1],
        labels=labels.data_ptr(),
        n_top=0 if values is None else values.shape[1],
        top_values=address(values),
        top_indices=address(indices),
        top_tail=address(tail),
        top_logits=address(working),
        **{**options._asdict(), "divergence": _divergence(options.divergence)},
        ce=ce.data_ptr(),
        kd=kd.data_ptr(),
    )
    _C.vocabulary_rows(given, torch.get_num_threads())
