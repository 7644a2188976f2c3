"""The chunks of logits behind ``linear_distillation``: products around a backend's row kernel, one chunk at a time.

A chunk's two buffers are the only memory that grows with rows times vocabulary. The row kernel turns the student's
buffer into the gradient of ``ce_weight * ce + kd_weight * kd`` in its logits, from which the gradients of hidden states
and head are two more products: 6 M V Hs + 2 M V Ht operations for M rows, nothing twice.
"""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from cdistill.ops._contract import require_values
from cdistill.ops._dispatch import Backend, multiplies, multiplies_tiles
from cdistill.ops._problem import VocabularyOptions, VocabularyRows

CHUNK_BYTES = {"cpu": 64 * 2**20, "cuda": 512 * 2**20}  # of both buffers together
ROW_UNIT = 64  # elements by which the rows of a buffer are aligned, more than any vector a kernel reads
BLOCK = 1024  # vocabulary entries of a head that are converted at a time, where a product needs another dtype
TILED = 1 << 21  # numbers of a head that are multiplied at a time, where tiles of bf16 are
ADDED = 1 << 16  # numbers in bf16 that are added to fp32 at a time
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
    weights: Tensor | None  # (N,) of each row's losses


class Options(NamedTuple):
    """Validated options of `linear_distillation`."""

    divergence: str
    temperature: float
    beta: float
    ignore_index: int
    vocab_size: int
    chunk_size: int  # 0: by CHUNK_BYTES
    tail: bool  # whether all tokens beside a teacher's top-k are one more outcome; else there are no others
    student_scale: float  # of logits, before softcap tanh(logits / softcap); a softcap of 0 is none
    student_softcap: float
    teacher_scale: float
    teacher_softcap: float


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


class RowLosses(NamedTuple):
    """Losses of the n rows that are not ignored."""

    rows: Tensor  # (n,) int64: which they are
    ce: Tensor  # (n,) fp32
    kd: Tensor  # (n,) fp32
    teacher_ce: Tensor  # (n,) fp32, only if asked for


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

    On a CPU that is fp32 for fp16, and for bf16 where the CPU has no products in it.
    """
    dtype = student.dtype if teacher is None else torch.promote_types(student.dtype, teacher.dtype)
    if not student.is_cuda and (dtype == torch.float16 or not multiplies(dtype)):
        return torch.float32
    return dtype


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


def _finish(logits: Tensor, scale: float, softcap: float, slope: Tensor | None = None) -> None:
    """What a model does to its logits after the head, in place: softcap * tanh(scale * logits / softcap).

    ``slope`` gets the derivative of tanh, 1 - tanh^2. Both are computed in fp32, a few rows at a time, and rounded once: near 1
    little would be left of the derivative otherwise.
    """
    if not softcap:
        if scale != 1.0:
            logits.mul_(scale)
        return
    step = _rows_at_a_time(logits)
    for start in range(0, len(logits), step):
        rows = slice(start, start + step)
        part = logits[rows].float().mul_(scale / softcap).tanh_()  # the logits themselves where they are fp32
        if slope is not None:
            torch.addcmul(part.new_ones(()), part, part, value=-1.0, out=slope[rows])
        part.mul_(softcap)
        if part.dtype != logits.dtype:
            logits[rows] = part


def _rows_at_a_time(logits: Tensor) -> int:
    """So that a copy of them in fp32 is small: a million numbers, 16 where a kernel's start would take longer."""
    return max(1, (BLOCK * BLOCK << (4 if logits.is_cuda else 0)) // logits.shape[1])


def _hidden_gradient(dlogits: Tensor, head: Tensor) -> Tensor:
    """dlogits (c,V) @ head (V,H), accumulated in fp32."""
    if dlogits.dtype == head.dtype == torch.float32:
        return dlogits @ head
    if dlogits.dtype == head.dtype and dlogits.is_cuda:
        return torch.mm(dlogits, head, out_dtype=torch.float32)
    total = dlogits.new_zeros(len(dlogits), head.shape[1], dtype=torch.float32)
    for block in _blocks(dlogits, head):  # on CPUs sums over a vocabulary in bf16 are a hundred times as slow
        _add_product(total, dlogits[:, block], head[block], 1.0)
    return total


def _add_head_gradient(total: Tensor, dlogits: Tensor, hidden: Tensor, factor: float) -> None:
    """total (V,H) fp32 += factor * dlogits (c,V)^T @ hidden (c,H)."""
    if dlogits.dtype == torch.float32:
        total.addmm_(dlogits.mT, hidden.float(), alpha=factor)
    elif dlogits.is_cuda:
        torch.addmm(total, dlogits.mT, hidden, out_dtype=torch.float32, alpha=factor, out=total)
    else:
        for block in _blocks(dlogits, hidden):
            _add_product(total[block], dlogits[:, block].mT, hidden, factor)


def _in_tiles(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype == torch.bfloat16 and multiplies_tiles()


def _blocks(dlogits: Tensor, other: Tensor) -> Iterator[slice]:
    """Parts of the vocabulary that are multiplied at a time on a CPU."""
    step = max(BLOCK, TILED // other.shape[1]) if _in_tiles(dlogits, other) else BLOCK
    return (slice(start, start + step) for start in range(0, dlogits.shape[1], step))


def _add_product(total: Tensor, a: Tensor, b: Tensor, factor: float) -> None:
    """total (m,n) fp32 += factor * a (m,k) @ b (k,n) on a CPU, which has no product of bf16 matrices with an fp32 result.

    Where it multiplies tiles of bf16, a product that is rounded to bf16 and what the rounding took away, a product as well,
    make 16 bits of the result, and several times as fast as a product in fp32.
    """
    if _in_tiles(a, b):
        rounded = torch.mm(a, b)
        _add(total, rounded, factor)
        _add(total, rounded.addmm_(a, b, beta=-1), factor)
    else:
        total.addmm_(a.float(), b.float(), alpha=factor)


def _add(total: Tensor, half: Tensor, factor: float) -> None:
    """total += factor * half in bf16, a few rows at a time: torch copies what it adds in another dtype."""
    step = max(1, ADDED // half.shape[1])
    for x, y in zip(total.split(step), half.split(step), strict=True):
        x.add_(y, alpha=factor)


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


def _top_teacher(inputs: Inputs, rows: Tensor, options: Options) -> tuple[Tensor, Tensor, Tensor] | None:
    """Log-probabilities (n,K) fp32 and indices (n,K) of the teacher's top-k, and log-probability (n,) of the others.

    Raises ValueError for values that are none, and for indices outside the vocabulary or twice in a row.
    """
    if inputs.top_values is None or inputs.top_indices is None:
        return None
    values, indices = inputs.top_values[rows].float(), inputs.top_indices[rows]
    ordered, V = indices.sort(dim=1).values, options.vocab_size
    require_values(
        ((ordered >= 0) & (ordered < V)).all() & (ordered[:, 1:] != ordered[:, :-1]).all(),
        f"teacher_topk indices must be distinct in a row and from 0 to vocab_size-1 = {V - 1}",
    )
    if not options.tail:
        require_values(~values.isnan().any(), "teacher_topk values must be log-probabilities or logits, one is NaN")
        return values, indices, values[:, 0]
    total = values.double().exp().sum(1)
    require_values(
        (total <= MOST_PROBABILITY).all(),
        "teacher_topk values must be log-probabilities: those of a row sum to more than 1, or one is NaN",
    )
    return values, indices, (1.0 - total).clamp(min=SMALLEST_TAIL).log().float()


def _chunks(inputs: Inputs, options: Options, rows: int, wanted: Wanted) -> tuple[int, Tensor, Tensor]:
    """Rows per chunk, and its buffers of logits (2,n,V): the student's and the teacher's, or a single one for both.

    Also that (n,V) of the slope of the student's softcap, empty where there is none.
    """
    V, dtype = options.vocab_size, _buffer_dtype(inputs.student_hidden, inputs.teacher_hidden)
    stride, models = math.ceil(V / ROW_UNIT) * ROW_UNIT, 1 if inputs.teacher_hidden is None else 2
    slopes = int(any(wanted) and options.student_softcap != 0)
    on_cuda, row_bytes = inputs.student_hidden.is_cuda, (models + slopes) * stride * dtype.itemsize
    head_gradient = inputs.student_head.numel() if wanted.head else 0
    chunk = options.chunk_size or chunk_rows(rows, row_bytes, on_cuda=on_cuda, head_gradient=head_gradient)
    whole = inputs.student_hidden.new_empty(models + slopes, min(chunk, rows), stride, dtype=dtype)
    whole[
        :, :, V:
    ].zero_()  # oneDNN's products in tiles read on behind rows, and multiply that by 0: NaN where it is none
    buffers = whole[:, :, :V]
    return (
        chunk,
        buffers[:models].expand(2, -1, -1) if models == 1 else buffers[:models],
        buffers[models:].flatten(0, 1),
    )


def _log_probability(logits: Tensor, labels: Tensor) -> Tensor:
    """(c,) of the labels, a few rows at a time: a sum in another dtype copies what it sums."""
    of_labels = logits.gather(1, labels[:, None])[:, 0].float()
    step = _rows_at_a_time(logits)
    return of_labels - torch.cat([part.float().logsumexp(1) for part in logits.split(step)])


class _TopOnly:
    """Divergence of a teacher and a student to whom the teacher's top-k are all tokens there are.

    Made before the student's logits become a gradient, to which ``add_gradient`` then adds its own.
    """

    def __init__(
        self,
        backend: Backend,
        student: Tensor,
        stored: tuple[Tensor, Tensor, Tensor],
        kd: Tensor,
        settings: VocabularyOptions,
    ):
        values, self.indices, _ = stored
        count, K = values.shape
        width = math.ceil(K / ROW_UNIT) * ROW_UNIT
        both = values.new_zeros(2, count, width)[:, :, :K]
        both[0], both[1] = student.gather(1, self.indices), values * settings.temperature
        labels, unused = self.indices.new_zeros(count), torch.empty_like(kd)
        backend.vocabulary_losses(
            VocabularyRows(both[0], both[1], None, labels, unused, kd), settings._replace(ce_weight=0.0)
        )
        self.gradient = both[0]

    def add_gradient(self, dlogits: Tensor) -> None:
        dlogits.scatter_add_(1, self.indices, self.gradient.to(dlogits.dtype))


def _row_losses(
    backend: Backend,
    inputs: Inputs,
    options: Options,
    settings: VocabularyOptions,
    wanted: Wanted,
    add_gradients: Callable[[Tensor, Tensor, Tensor], None],
    teacher_ce: bool = False,
) -> RowLosses:
    """Losses of the rows that are not ignored.

    ``add_gradients`` is called with the index of a chunk's rows, their hidden states and the gradients of their logits.
    """
    valid, V = inputs.labels != options.ignore_index, options.vocab_size
    # How many rows are left decides the sizes of the products: the one place here that waits for a CUDA device.
    rows = valid.nonzero()[:, 0]
    require_values(
        (~valid | ((inputs.labels >= 0) & (inputs.labels < V))).all(),
        f"labels must be from 0 to vocab_size-1 = {V - 1}, or ignore_index = {options.ignore_index}",
    )
    top = _top_teacher(inputs, rows, options)
    chunk, buffers, slopes = _chunks(inputs, options, len(rows), wanted)
    hidden, student_head = inputs.student_hidden, inputs.student_head[:V]
    student_bias, teacher_bias = (x if x is None else x[:V] for x in (inputs.student_bias, inputs.teacher_bias))
    found = RowLosses(rows, *(hidden.new_zeros(len(rows), dtype=torch.float32) for _ in range(3)))
    for start in range(0, len(rows), chunk):
        part = slice(start, start + chunk)
        index = rows[part]
        chosen, labels = hidden[index], inputs.labels[index]
        student, teacher = buffers[0, : len(index)], buffers[1, : len(index)]
        slope = slopes[: len(index)] if len(slopes) else None
        _logits(chosen, student_head, student_bias, student)
        _finish(student, options.student_scale, options.student_softcap, slope)
        if inputs.teacher_hidden is not None and inputs.teacher_head is not None:
            _logits(inputs.teacher_hidden[index], inputs.teacher_head[:V], teacher_bias, teacher)
            _finish(teacher, options.teacher_scale, options.teacher_softcap)
            if teacher_ce:
                found.teacher_ce[part] = -_log_probability(teacher, labels)
        stored = None if top is None else (top[0][part], top[1][part], top[2][part])
        ce, kd, of_all, apart = found.ce[part], found.kd[part], settings, None
        if stored is not None and not options.tail:
            apart = _TopOnly(backend, student, stored, kd, settings)
            stored, kd, of_all = None, torch.empty_like(kd), settings._replace(kd_weight=0.0)
        # A student without a teacher is its own: the divergence is 0.
        seen = None if stored is not None else teacher
        backend.vocabulary_losses(VocabularyRows(student, seen, stored, labels, ce, kd), of_all)
        if settings.gradient:
            if apart is not None:
                apart.add_gradient(student)
            if slope is not None:
                student.mul_(slope)
            add_gradients(index, chosen, student)
    return found


def token_losses(backend: Backend, inputs: Inputs, options: Options) -> RowLosses:
    """Losses of every row (N,), 0 for those that are ignored."""
    settings = VocabularyOptions(options.divergence, options.temperature, options.beta, 0.0, 0.0, gradient=False)
    found = _row_losses(backend, inputs, options, settings, Wanted(False, False, False), lambda *_: None, True)
    whole = [x.new_zeros(len(inputs.labels)).index_copy_(0, found.rows, x) for x in found[1:]]
    return RowLosses(found.rows, *whole)


def losses_and_gradients(
    backend: Backend,
    inputs: Inputs,
    options: Options,
    wanted: Wanted,
    ce_weight: float,
    kd_weight: float,
) -> Results:
    """Sums of both losses over the valid rows, and the gradients of ce_weight * ce + kd_weight * kd."""
    results = empty_results(inputs, wanted)
    for gradient in results[3:]:
        gradient.zero_()
    hidden, student_head, weights = inputs.student_hidden, inputs.student_head[: options.vocab_size], inputs.weights
    counted = inputs.labels != options.ignore_index
    if weights is not None:
        weights = torch.where(counted, weights, 0.0)
        most = weights.abs().max().clamp(min=torch.finfo(torch.float32).tiny) if len(weights) else weights.new_ones(())
        weights = weights / most  # those of the largest rows are 1, so that gradients fit the dtype of logits

    # Weights reach the kernel scaled by a power of 2, so that gradients of logits fit their dtype.
    scale = 2.0 ** math.frexp(max(abs(ce_weight), abs(kd_weight) / options.temperature))[1]
    scale /= FP16_GAIN[options.divergence] if _buffer_dtype(hidden, inputs.teacher_hidden) == torch.float16 else 1.0
    settings = VocabularyOptions(
        options.divergence,
        options.temperature,
        options.beta,
        ce_weight / scale,
        kd_weight / scale,
        gradient=any(wanted),
    )
    scale *= options.student_scale

    def add_gradients(index: Tensor, chosen: Tensor, dlogits: Tensor) -> None:
        V = dlogits.shape[1]
        of_rows = None if weights is None else weights[index, None]
        if wanted.hidden:
            of_hidden = _hidden_gradient(dlogits, student_head) * scale
            of_hidden = of_hidden if of_rows is None else of_hidden * of_rows
            results.hidden[index] = of_hidden.to(results.hidden.dtype)
        if of_rows is not None and (wanted.head or wanted.bias):
            dlogits.mul_(of_rows.to(dlogits.dtype))
        if wanted.head:
            _add_head_gradient(results.head[:V], dlogits, chosen, scale)
        if wanted.bias:
            for first in range(0, V, BLOCK):  # a sum in another dtype copies what it sums on CPUs
                block = slice(first, min(first + BLOCK, V))
                results.bias[block].add_(dlogits[:, block].sum(0, dtype=torch.float32), alpha=scale)

    rows = _row_losses(backend, inputs, options, settings, wanted, add_gradients)
    ce, kd = rows.ce, rows.kd
    if inputs.weights is not None and weights is not None:
        ce, kd = (x * inputs.weights[rows.rows] for x in (ce, kd))
        for gradient in results[3:]:
            gradient.mul_(most)
    return results._replace(ce=ce.sum(), kd=kd.sum(), tokens=counted.sum())
