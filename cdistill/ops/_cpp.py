"""The primitives of the ops in the C++ module cdistill._C, for CPU tensors.

Threads: as many as torch uses; the results do not depend on their number. The environment variable CDISTILL_CPU_ISA
(avx512_bf16, avx512, avx2 or portable) overrides the choice of instruction set; one the processor lacks raises ValueError.
"""

from collections.abc import Callable

import torch
from torch import Tensor

import cdistill._C as _C
from cdistill.ops._contract import require_choice
from cdistill.ops._rows import at_rows, fold_dlse, lse_at_rows, regions, to_rows, unfold_dlse

__all__ = [
    "FUSES_DENOMINATOR",
    "FUSES_HEAD_COSINE",
    "SPLITS_LSE",
    "alignment_grad",
    "alignment_loss",
    "fold_dlse",
    "regions",
    "row_lse_backward",
    "slice_accumulate",
    "slice_backward",
    "slice_backward_with_denominator",
    "slice_forward",
    "slice_forward_with_lse",
    "unfold_dlse",
    "vocabulary_losses",
]

SPLITS_LSE = False  # it divides by the sum of a row's probabilities instead
FUSES_DENOMINATOR = True
FUSES_HEAD_COSINE = False

_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_DIVERGENCES = {"forward_kl": 0, "reverse_kl": 1, "jsd": 2}


def _problem(
    q: Tensor, k: Tensor, rows: Tensor, cols: Tensor | None, causal: bool, scale: float, key_mask: Tensor | None
) -> "_C.Problem":
    """The call's inputs by address; ``cols`` only where there is a slice. rows and cols int32."""
    assert all(x.is_contiguous() for x in (rows, cols, key_mask) if x is not None)
    batch, q_heads, tokens, width = q.shape
    return _C.Problem(
        q=q.data_ptr(),
        q_strides=q.stride()[:3],
        k=k.data_ptr(),
        k_strides=k.stride()[:3],
        dtype=_DTYPES[q.dtype],
        batch=batch,
        heads=q_heads,
        kv_heads=k.shape[1],
        tokens=tokens,
        dim=width,
        rows=rows.data_ptr(),
        n_rows=rows.shape[1],
        cols=0 if cols is None else cols.data_ptr(),
        n_cols=0 if cols is None else cols.shape[1],
        key_mask=0 if key_mask is None else key_mask.data_ptr(),
        causal=causal,
        scale=scale,
    )


def _results(*gradients: Tensor) -> "list[_C.Result]":
    """Gradients (B,H,T,D) by address, to be added to."""
    assert all(x.stride(3) == 1 for x in gradients)
    return [_C.Result(address=x.data_ptr(), dtype=_DTYPES[x.dtype], strides=x.stride()[:3]) for x in gradients]


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
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    rows: Tensor,
    dlse: Tensor,
    *,
    causal: bool,
    scale: float,
    key_mask: Tensor | None,
    into: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Gradient of the rows' log-sum-exp: dS_ij = P_ij * dlse_i over all visible keys j."""
    if into is not None and not dlse.any():  # all of it was folded
        return into
    rows = rows.int()
    lse = lse_at_rows(lse, rows, causal=causal, key_mask=key_mask)
    dlse = at_rows(dlse, rows)
    gradients = _zeros(q, k) if into is None else into
    problem = _problem(q, k, rows, None, causal, scale, key_mask)
    results = _results(*gradients)
    _C.row_lse_backward(problem, lse.data_ptr(), dlse.data_ptr(), *results, torch.get_num_threads())
    return gradients


def slice_forward(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    rows: Tensor,
    cols: Tensor,
    *,
    causal: bool,
    scale: float,
    key_mask: Tensor | None,
    each: bool,
) -> Tensor:
    """exp(scale * q.k - lse) at (rows, cols), zero where hidden: the head mean (B,R,V), or (B,Hq,R,V)."""
    rows, cols = rows.int(), cols.int()
    lse = lse_at_rows(lse, rows, causal=causal, key_mask=key_mask)
    a = _empty_slice(q, rows, cols, each)
    problem = _problem(q, k, rows, cols, causal, scale, key_mask)
    _C.slice_forward(problem, lse.data_ptr(), a.data_ptr(), each, torch.get_num_threads())
    return a


def _empty_slice(q: Tensor, rows: Tensor, cols: Tensor, each: bool) -> Tensor:
    heads = q.shape[1:2] if each else ()
    return torch.empty((q.shape[0], *heads, rows.shape[1], cols.shape[1]), dtype=torch.float32, device=q.device)


def slice_forward_with_lse(
    q: Tensor,
    k: Tensor,
    rows: Tensor,
    cols: Tensor,
    *,
    causal: bool,
    scale: float,
    key_mask: Tensor | None,
    each: bool,
) -> tuple[Tensor, Tensor]:
    """``slice_forward`` and the log-sum-exp (B,Hq,T) it needs, from one product of queries and keys.

    The log-sum-exp is written at the rows, +inf for a row without keys.
    """
    rows, cols = rows.int(), cols.int()
    a = _empty_slice(q, rows, cols, each)
    lse = torch.empty((*q.shape[:2], rows.shape[1]), dtype=torch.float32, device=q.device)
    problem = _problem(q, k, rows, cols, causal, scale, key_mask)
    _C.slice_forward_with_lse(problem, lse.data_ptr(), a.data_ptr(), each, torch.get_num_threads())
    return a, to_rows(lse, rows, q.shape[2])


def slice_accumulate(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    rows: Tensor,
    cols: Tensor,
    sums: Tensor,
    windows: list[int],
    *,
    causal: bool,
    scale: float,
    key_mask: Tensor | None,
    each: bool,
) -> None:
    """Add ``slice_forward`` to sums[w] for every w in ``windows``."""
    a = slice_forward(q, k, lse, rows, cols, causal=causal, scale=scale, key_mask=key_mask, each=each)
    for w in windows:
        sums[w] += a


def slice_backward(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    rows: Tensor,
    cols: Tensor,
    grad: Tensor,
    base: Callable[[Tensor], tuple[Tensor, Tensor]] | None,
    *,
    causal: bool,
    scale: float,
    key_mask: Tensor | None,
    each: bool,
    bound: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient of ``slice_forward``, dS = P * G, added to that of ``base(dlse)``; dlse_i = -sum_j dS_ij, (B,Hq,T)."""
    assert grad.dtype == torch.float32
    rows, cols, grad = rows.int(), cols.int(), grad.contiguous()
    lse = lse_at_rows(lse, rows, causal=causal, key_mask=key_mask)
    problem = _problem(q, k, rows, cols, causal, scale, key_mask)
    dlse = torch.zeros_like(lse)

    def run(results: "list[_C.Result]", dlse_address: int) -> None:
        arguments = (problem, lse.data_ptr(), grad.data_ptr(), each, *results, dlse_address, False)
        _C.slice_backward(*arguments, torch.get_num_threads())

    if base is None:
        gradients = _zeros(q, k)
        run(_results(*gradients), dlse.data_ptr())
        return *gradients, to_rows(dlse, rows, q.shape[2])
    run([_C.Result(), _C.Result()], dlse.data_ptr())
    dlse = to_rows(dlse, rows, q.shape[2])
    gradients = base(dlse)
    run(_results(*gradients), 0)
    return *gradients, dlse


def slice_backward_with_denominator(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    rows: Tensor,
    cols: Tensor,
    grad: Tensor,
    *,
    causal: bool,
    scale: float,
    key_mask: Tensor | None,
    each: bool,
) -> tuple[Tensor, Tensor]:
    """Gradient of the slice of ``slice_forward_with_lse``: dS_ij = P_ij * (G_ij + dlse_i) over all visible keys j."""
    assert grad.dtype == torch.float32
    rows, cols, grad = rows.int(), cols.int(), grad.contiguous()
    lse = lse_at_rows(lse, rows, causal=causal, key_mask=key_mask)
    dlse, gradients = torch.zeros_like(lse), _zeros(q, k)
    problem = _problem(q, k, rows, cols, causal, scale, key_mask)
    arguments = (problem, lse.data_ptr(), grad.data_ptr(), each, *_results(*gradients), dlse.data_ptr(), True)
    _C.slice_backward(*arguments, torch.get_num_threads())
    return gradients


def _alignment(
    a: Tensor, target: Tensor, row_valid: Tensor, col_valid: Tensor, loss: str, reduction: str, sink_filter: bool
) -> "_C.Alignment":
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
        loss=loss,
        reduction=reduction,
        sink_filter=sink_filter,
    )


def alignment_loss(
    a: Tensor,
    target: Tensor,
    row_valid: Tensor,
    col_valid: Tensor,
    *,
    loss: str,
    reduction: str,
    sink_filter: bool,
) -> Tensor:
    """Distance of a from target (N,R,V) over valid rows and columns, (N,); 0 for a sample without either."""
    alignment = _alignment(a, target, row_valid, col_valid, loss, reduction, sink_filter)
    losses = torch.empty(a.shape[0], dtype=torch.float32, device=a.device)
    _C.alignment_loss(alignment, losses.data_ptr(), torch.get_num_threads())
    return losses


def alignment_grad(
    a: Tensor,
    target: Tensor,
    row_valid: Tensor,
    col_valid: Tensor,
    grad_out: Tensor,
    *,
    loss: str,
    reduction: str,
    sink_filter: bool,
    dtype: torch.dtype,
) -> Tensor:
    """Gradient of sum(grad_out * alignment_loss) in a, (N,R,V) fp32; zero outside the valid rows and columns."""
    assert grad_out.is_contiguous() and grad_out.dtype == torch.float32
    alignment = _alignment(a, target, row_valid, col_valid, loss, reduction, sink_filter)
    grad = torch.empty_like(a)
    _C.alignment_grad(alignment, grad_out.data_ptr(), grad.data_ptr(), torch.get_num_threads())
    return grad


def _divergence(name: str) -> int:
    require_choice("divergence", name, tuple(_DIVERGENCES))
    return _DIVERGENCES[name]


def vocabulary_losses(
    student: Tensor,
    teacher: Tensor | None,
    top: tuple[Tensor, Tensor, Tensor] | None,
    labels: Tensor,
    ce: Tensor,
    kd: Tensor,
    *,
    divergence: str,
    temperature: float,
    beta: float,
    ce_weight: float,
    kd_weight: float,
    gradient: bool,
) -> None:
    """Cross-entropy and divergence of rows of logits, and their gradient in place of student's logits."""
    values, indices, tail = (None, None, None) if top is None else top
    working = None if values is None else torch.empty_like(values)
    contiguous = (labels, ce, kd, values, indices, tail)
    assert all(x.is_contiguous() for x in contiguous if x is not None)

    def address(x: Tensor | None) -> int:
        return 0 if x is None else x.data_ptr()

    rows = _C.VocabularyRows(
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
        divergence=_divergence(divergence),
        temperature=temperature,
        beta=beta,
        ce_weight=ce_weight,
        kd_weight=kd_weight,
        gradient=gradient,
        ce=ce.data_ptr(),
        kd=kd.data_ptr(),
    )
    _C.vocabulary_rows(rows, torch.get_num_threads())
