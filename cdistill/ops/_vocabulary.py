"""The chunks of logits behind ``linear_distillation``: products around a backend's row kernel, one chunk at a time.

A chunk's two buffers are the only memory that grows with rows times vocabulary. The row kernel turns the student's
buffer into the gradient of ``ce_weight * ce + kd_weight * kd`` in its logits, from which the gradients of hidden states
and head are two more products: 6 M V Hs + 2 M V Ht operations for M rows, nothing twice.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from cdistill.ops._contract import require_values
from cdistill.ops._dispatch import Backend
from cdistill.ops._problem import VocabularyOptions, VocabularyRows

CHUNK_BYTES = {"cpu": 64 * 2**20, "cuda": 512 * 2**20}  # of both buffers together
ROW_UNIT = 64  # elements by which the rows of a buffer are aligned, more than any vector a kernel reads
BLOCK = 1024  # vocabulary entries of a head that are converted at a time, where a product needs another dtype
# Bring gradients of logits into the range of fp16; those of reverse KL grow with the logarithm of p/q.
FP16_GAIN = {"forward_kl": 16384.0, "reverse_kl": 64.0, "jsd": 1024.0}
MOST_PROBABILITY = 1.01  # of a teacher's top-k together, rounded as they may be stored
SMALLEST_TAIL = 2.0**-24  # what 1 - sum(p) of fp32 probabilities can tell from 0


class Inputs(NamedTuple):
    """Validated tensors of `linear_distillation`."""

    student_hidden: Tensor  # (N,Hs)
    student_head: Tensor  # (Vs,Hs)
    student_bias: Tensor | None  # (Vs,)
    teacher_hidden: Tensor | None  # (N,Ht); None: top_values and top_indices
    teacher_head: Tensor | None  # (Vt,Ht)
    teacher_bias: Tensor | None  # (Vt,)
    top_values: Tensor | None  # (N,K)
    top_indices: Tensor | None  # (N,K) int64
    labels: Tensor  # (N,) int64


class Options(NamedTuple):
    """Validated options of `linear_distillation`."""

    divergence: str
    temperature: float
    beta: float
    ignore_index: int
    vocab_size: int
    chunk_size: int  # 0: by CHUNK_BYTES


class Wanted(NamedTuple):
    """Which gradients are made."""

    hidden: bool
    head: bool
    bias: bool


class Results(NamedTuple):
    """Sums of the losses and their gradients; what is not wanted is empty. All fp32 but `gradient_dtype`."""

    ce: Tensor  # ()
    kd: Tensor  # ()
    tokens: Tensor  # () int64
    hidden: Tensor  # (N,Hs)
    head: Tensor  # (Vs,Hs)
    bias: Tensor  # (Vs,)


def gradient_dtype(hidden: Tensor) -> torch.dtype:
    """In which the gradient of hidden states is kept until the backward pass: fp16 could not hold it unscaled."""
    return torch.bfloat16 if hidden.dtype == torch.bfloat16 else torch.float32


def empty_results(inputs: Inputs, wanted: Wanted) -> Results:
    """Tensors of the shapes and dtypes of the results."""
    hidden, head = inputs.student_hidden, inputs.student_head

    def empty(needed: bool, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return hidden.new_empty(shape if needed else 0, dtype=dtype)

    return Results(
        ce=empty(True),
        kd=empty(True),
        tokens=empty(True, dtype=torch.int64),
        hidden=empty(wanted.hidden, *hidden.shape, dtype=gradient_dtype(hidden)),
        head=empty(wanted.head, *head.shape),
        bias=empty(wanted.bias, head.shape[0]),
    )


def _buffer_dtype(student: Tensor, teacher: Tensor | None) -> torch.dtype:
    """Logits are kept in the dtype of the models, as these make them, or one that holds both models'.

    CPUs have no products of fp16 worth the name.
    """
    dtype = student.dtype if teacher is None else torch.promote_types(student.dtype, teacher.dtype)
    return torch.float32 if dtype == torch.float16 and not student.is_cuda else dtype


def _logits(hidden: Tensor, head: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """out (c,V) = hidden (c,H) @ head (V,H)^T + bias (V,)."""
    if out.dtype == hidden.dtype:
        if bias is None:
            torch.mm(hidden, head.mT, out=out)
        else:
            torch.addmm(bias.to(out.dtype), hidden, head.mT, out=out)
        return
    hidden = hidden.to(out.dtype)
    for start in range(0, len(head), BLOCK):
        block = slice(start, start + BLOCK)
        torch.mm(hidden, head[block].to(out.dtype).mT, out=out[:, block])
    if bias is not None:
        out += bias


def _hidden_gradient(dlogits: Tensor, head: Tensor) -> Tensor:
    """dlogits (c,V) @ head (V,H), accumulated in fp32."""
    if dlogits.dtype == head.dtype == torch.float32:
        return dlogits @ head
    if dlogits.dtype == head.dtype and dlogits.is_cuda:
        return torch.mm(dlogits, head, out_dtype=torch.float32)
    total = dlogits.new_zeros(len(dlogits), head.shape[1], dtype=torch.float32)
    for start in range(0, len(head), BLOCK):  # on CPUs sums over a vocabulary in bf16 are a hundred times as slow
        block = slice(start, start + BLOCK)
        total.addmm_(dlogits[:, block].float(), head[block].float())
    return total


def _add_head_gradient(total: Tensor, dlogits: Tensor, hidden: Tensor, factor: float) -> None:
    """total (V,H) fp32 += factor * dlogits (c,V)^T @ hidden (c,H)."""
    if dlogits.dtype == torch.float32:
        total.addmm_(dlogits.mT, hidden.float(), alpha=factor)
    elif dlogits.is_cuda:
        torch.addmm(total, dlogits.mT, hidden, out_dtype=torch.float32, alpha=factor, out=total)
    else:  # CPUs have no product of half-precision matrices with an fp32 result
        hidden = hidden.float()
        for start in range(0, len(total), BLOCK):
            block = slice(start, start + BLOCK)
            total[block].addmm_(dlogits[:, block].float().mT, hidden, alpha=factor)


def chunk_rows(rows: int, row_bytes: int, *, on_cuda: bool, head_gradient: int) -> int:
    """Rows per chunk: as many as the budget allows, in chunks of about the same size.

    ``row_bytes`` are those of a row of all buffers, ``head_gradient`` the elements of the head if it gets a gradient, else 0.
    """
    unit, budget = 1, CHUNK_BYTES["cpu"]
    if on_cuda:  # every chunk reads and writes the head's gradient whole, so there must be few
        unit, budget = 128, max(CHUNK_BYTES["cuda"], 4 * head_gradient)
    most = max(budget // row_bytes // unit, 1) * unit
    chunks = max(math.ceil(rows / most), 1)
    return max(math.ceil(rows / chunks / unit), 1) * unit


def _top_teacher(inputs: Inputs, rows: Tensor, vocab_size: int) -> tuple[Tensor, Tensor, Tensor] | None:
    """Log-probabilities (n,K) fp32 and indices (n,K) of the teacher's top-k, and log-probability (n,) of the others.

    Raises ValueError for values that are none, and for indices outside the vocabulary or twice in a row.
    """
    if inputs.top_values is None or inputs.top_indices is None:
        return None
    values, indices = inputs.top_values[rows].float(), inputs.top_indices[rows]
    ordered = indices.sort(dim=1).values
    require_values(
        ((ordered >= 0) & (ordered < vocab_size)).all() & (ordered[:, 1:] != ordered[:, :-1]).all(),
        f"teacher_topk indices must be distinct in a row and from 0 to vocab_size-1 = {vocab_size - 1}",
    )
    total = values.double().exp().sum(1)
    require_values(
        (total <= MOST_PROBABILITY).all(),
        "teacher_topk values must be log-probabilities: those of a row sum to more than 1, or one is NaN",
    )
    return values, indices, (1.0 - total).clamp(min=SMALLEST_TAIL).log().float()


def _chunks(inputs: Inputs, options: Options, rows: int, head_gradient: int) -> tuple[int, Tensor]:
    """Rows per chunk, and its buffer of logits: one, or two (n,V) with a teacher's."""
    V, dtype = options.vocab_size, _buffer_dtype(inputs.student_hidden, inputs.teacher_hidden)
    stride, buffers = math.ceil(V / ROW_UNIT) * ROW_UNIT, 1 if inputs.teacher_hidden is None else 2
    on_cuda, row_bytes = inputs.student_hidden.is_cuda, buffers * stride * dtype.itemsize
    chunk = options.chunk_size or chunk_rows(rows, row_bytes, on_cuda=on_cuda, head_gradient=head_gradient)
    return chunk, inputs.student_hidden.new_empty(buffers, min(chunk, rows), stride, dtype=dtype)[:, :, :V]


def losses_and_gradients(
    backend: Backend,
    inputs: Inputs,
    options: Options,
    wanted: Wanted,
    ce_weight: float,
    kd_weight: float,
) -> Results:
    """Sums of both losses over the valid rows, and the gradients of ce_weight * ce + kd_weight * kd."""
    valid = inputs.labels != options.ignore_index
    # How many rows are left decides the sizes of the products: the one place here that waits for a CUDA device.
    rows = valid.nonzero()[:, 0]
    V = options.vocab_size
    require_values(
        (~valid | ((inputs.labels >= 0) & (inputs.labels < V))).all(),
        f"labels must be from 0 to vocab_size-1 = {V - 1}, or ignore_index = {options.ignore_index}",
    )
    top = _top_teacher(inputs, rows, V)

    results = empty_results(inputs, wanted)._replace(tokens=valid.sum())
    for gradient in results[3:]:
        gradient.zero_()
    hidden, student_head = inputs.student_hidden, inputs.student_head[:V]
    student_bias, teacher_bias = (x if x is None else x[:V] for x in (inputs.student_bias, inputs.teacher_bias))
    chunk, buffer = _chunks(inputs, options, len(rows), inputs.student_head.numel() if wanted.head else 0)
    ce, kd = (hidden.new_empty(len(rows), dtype=torch.float32) for _ in range(2))

    # Weights reach the kernel scaled by a power of 2, so that gradients of logits fit their dtype.
    scale = 2.0 ** math.frexp(max(abs(ce_weight), abs(kd_weight) / options.temperature))[1]
    scale /= FP16_GAIN[options.divergence] if buffer.dtype == torch.float16 else 1.0
    settings = VocabularyOptions(
        options.divergence,
        options.temperature,
        options.beta,
        ce_weight / scale,
        kd_weight / scale,
        gradient=any(wanted),
    )
    for start in range(0, len(rows), chunk):
        part = slice(start, start + chunk)
        index = rows[part]
        student_hidden, student = hidden[index], buffer[0, : len(index)]
        _logits(student_hidden, student_head, student_bias, student)
        teacher = None
        if inputs.teacher_hidden is not None and inputs.teacher_head is not None:
            teacher = buffer[1, : len(index)]
            _logits(inputs.teacher_hidden[index], inputs.teacher_head[:V], teacher_bias, teacher)
        stored = None if top is None else (top[0][part], top[1][part], top[2][part])
        part_rows = VocabularyRows(student, teacher, stored, inputs.labels[index], ce[part], kd[part])
        backend.vocabulary_losses(part_rows, settings)
        if wanted.hidden:
            results.hidden[index] = (_hidden_gradient(student, student_head) * scale).to(results.hidden.dtype)
        if wanted.head:
            _add_head_gradient(results.head[:V], student, student_hidden, scale)
        if wanted.bias:
            for first in range(0, V, BLOCK):  # a sum in another dtype copies what it sums on CPUs
                block = slice(first, min(first + BLOCK, V))
                results.bias[block].add_(student[:, block].sum(0, dtype=torch.float32), alpha=scale)
    return results._replace(ce=ce.sum(), kd=kd.sum())
