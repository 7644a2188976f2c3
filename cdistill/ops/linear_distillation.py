"""Cross-entropy and distillation through the language-model heads, without the (N,V) logits of either model.

Rows whose label is ignored are dropped first. The others are processed in chunks; a chunk's logits live only while its
losses and its gradients are made, in the forward pass. ``ce`` and ``kd`` are two outputs with two upstream gradients,
so their gradients are kept apart: two fp32 (n,Hs) tensors for the hidden states (n valid rows) and, only if the head
is trained, two fp32 (V,Hs) tensors for it. The backward pass scales copies of them.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from cdistill.ops._contract import (
    DTYPES,
    require_choice,
    require_device,
    require_shape,
    require_tensor,
    require_values,
)

DIVERGENCES = ("forward_kl", "reverse_kl", "jsd")
CHUNK_BYTES = {"cpu": 32 * 2**20, "cuda": 256 * 2**20}


class LinearDistillation(NamedTuple):
    """Sums over valid tokens, and how many there are."""

    ce: Tensor  # () fp32, nats
    kd: Tensor  # () fp32, nats
    tokens: Tensor  # () int64


class _Options(NamedTuple):
    divergence: str
    temperature: float
    vocab_size: int
    chunk_size: int
    needs_hidden: bool
    needs_head: bool
    needs_bias: bool


class _Gradients:
    """fp32 gradients of one of the two losses in student_hidden, student_head and student_bias."""

    def __init__(self, hidden: Tensor, head: Tensor, options: _Options):
        def zeros(needed: bool, *shape: int) -> Tensor | None:
            return torch.zeros(shape, dtype=torch.float32, device=hidden.device) if needed else None

        self.hidden = zeros(options.needs_hidden, *hidden.shape)
        self.head = zeros(options.needs_head, *head.shape)
        self.bias = zeros(options.needs_bias, head.shape[0])

    def add(self, rows: slice, dlogits: Tensor, hidden: Tensor, head: Tensor) -> None:
        """Add a chunk: dlogits (c,vocab_size) fp32, hidden (c,Hs), head (vocab_size,Hs)."""
        vocab_size = dlogits.shape[1]
        if self.bias is not None:
            self.bias[:vocab_size] += dlogits.sum(0)
        dlogits = dlogits.to(head.dtype)
        if self.hidden is not None:
            self.hidden[rows] = _matmul(dlogits, head)
        if self.head is not None:
            self.head[:vocab_size] += _matmul(dlogits.mT, hidden)


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    """a @ b accumulated and returned in fp32; CPUs have no such product of half-precision matrices, so they upcast."""
    if a.dtype == torch.float32:
        return a @ b
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def _divergence(student: Tensor, teacher: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Sum of the rows' divergences (a scalar), and its gradient in the student logits; both logits (c,V) fp32."""
    log_p, log_q = student.log_softmax(1), teacher.log_softmax(1)
    p = log_p.exp()
    if name == "forward_kl":
        q = log_q.exp()
        return (q * (log_q - log_p)).sum(), p.sub_(q)
    if name == "reverse_kl":
        log_ratio = log_p - log_q
    else:
        log_m = torch.logaddexp(log_p, log_q).sub_(math.log(2.0))
        log_ratio = (log_p - log_m).mul_(0.5)
    per_row = (p * log_ratio).sum(1, keepdim=True)
    value = per_row.sum()
    if name == "jsd":
        value = value + 0.5 * (log_q.exp() * (log_q - log_m)).sum()
    return value, p.mul_(log_ratio.sub_(per_row))


class _LinearDistillation(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student_hidden: Tensor,
        student_head: Tensor,
        student_bias: Tensor | None,
        teacher_hidden: Tensor,
        teacher_head: Tensor,
        teacher_bias: Tensor | None,
        labels: Tensor,
        options: _Options,
    ) -> tuple[Tensor, Tensor]:
        of_ce = _Gradients(student_hidden, student_head, options)
        of_kd = _Gradients(student_hidden, student_head, options)
        ce = student_hidden.new_zeros((), dtype=torch.float32)
        kd = student_hidden.new_zeros((), dtype=torch.float32)
        vocab_size, temperature = options.vocab_size, options.temperature
        s_head, t_head = student_head[:vocab_size], teacher_head[:vocab_size]

        for start in range(0, len(labels), options.chunk_size):
            rows = slice(start, min(start + options.chunk_size, len(labels)))
            student = _matmul(student_hidden[rows], s_head.mT)
            teacher = _matmul(teacher_hidden[rows], t_head.mT)
            if student_bias is not None:
                student += student_bias[:vocab_size]
            if teacher_bias is not None:
                teacher += teacher_bias[:vocab_size]

            value, dlogits = _divergence(student / temperature, teacher.div_(temperature), options.divergence)
            kd += value
            of_kd.add(rows, dlogits.div_(temperature), student_hidden[rows], s_head)

            label = labels[rows, None]
            log_p = student.log_softmax(1)
            ce -= log_p.gather(1, label).sum()
            dlogits = log_p.exp_()
            dlogits.scatter_add_(1, label, dlogits.new_full((), -1.0).expand(label.shape))
            of_ce.add(rows, dlogits, student_hidden[rows], s_head)

        ctx.save_for_backward(of_ce.hidden, of_ce.head, of_ce.bias, of_kd.hidden, of_kd.head, of_kd.bias)
        ctx.dtypes = (student_hidden.dtype, student_head.dtype, None if student_bias is None else student_bias.dtype)
        ctx.set_materialize_grads(False)
        return ce, kd

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_ce: Tensor | None, grad_kd: Tensor | None) -> tuple[Tensor | None, ...]:
        def scaled(of_ce: Tensor | None, of_kd: Tensor | None, dtype: torch.dtype) -> Tensor | None:
            if of_ce is None or of_kd is None:
                return None
            if grad_ce is None:
                return None if grad_kd is None else (of_kd * grad_kd).to(dtype)
            total = of_ce * grad_ce
            return (total if grad_kd is None else total.addcmul_(of_kd, grad_kd)).to(dtype)

        saved = ctx.saved_tensors
        return (*map(scaled, saved[:3], saved[3:], ctx.dtypes), *(None,) * 5)


def _require_side(side: str, hidden: Tensor, head: Tensor, bias: Tensor | None, rows: int) -> None:
    """Check hidden states, head and bias of the student or the teacher."""
    for name, tensor in ((f"{side}_hidden", hidden), (f"{side}_head", head)):
        require_tensor(name, tensor)
        if tensor.dim() != 2:
            raise ValueError(f"{name} must have 2 dimensions, got shape {tuple(tensor.shape)}")
        if tensor.dtype not in DTYPES:
            raise ValueError(f"{name} must be float16, bfloat16 or float32, got {tensor.dtype}")
    require_shape(f"{side}_hidden", hidden, (rows, hidden.shape[1]), "N, H")
    require_shape(f"{side}_head", head, (head.shape[0], hidden.shape[1]), "V, H")
    if head.dtype != hidden.dtype:
        raise ValueError(f"{side}_head must have the dtype of {side}_hidden, {hidden.dtype}, got {head.dtype}")
    if bias is not None:
        require_shape(f"{side}_bias", bias, (head.shape[0],), "V")
        if not bias.is_floating_point():
            raise ValueError(f"{side}_bias must have a floating dtype, got {bias.dtype}")


def linear_distillation(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_hidden: Tensor,
    teacher_head: Tensor,
    labels: Tensor,
    *,
    divergence: str = "forward_kl",
    temperature: float = 1.0,
    ignore_index: int = -100,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    vocab_size: int | None = None,
    chunk_size: int | None = None,
    impl: str | None = None,
) -> LinearDistillation:
    """Cross-entropy and teacher-student divergence over the vocabulary, from hidden states (paper 3.1, L_ar and L_kd).

    Args:
        student_hidden: (N,Hs) fp16, bf16 or fp32, already shifted against labels.
        student_head: (Vs,Hs), the weight of the student's output layer, same dtype.
        teacher_hidden, teacher_head: (N,Ht) and (Vt,Ht); the teacher gets no gradient.
        labels: (N,) int64 token ids below vocab_size, or ignore_index.
        divergence: "forward_kl" (teacher || student), "reverse_kl", or "jsd" (beta 0.5), of the softmax of
            logits / temperature, not multiplied by temperature squared.
        student_bias, teacher_bias: (Vs,) and (Vt,).
        vocab_size: columns of both heads that are real tokens, min(Vs,Vt) by default; the others are masked with -inf
            in both losses.
        chunk_size: rows per chunk; by default as many as keep one (rows, vocab_size) fp32 buffer at 32 MB on CPU and
            256 MB elsewhere, a handful of which exist at a time.
        impl: None or "torch".

    Returns:
        LinearDistillation(ce, kd, tokens): sums over the rows that are not ignored, fp32, in nats, and their number,
        int64. Both sums are differentiable once in student_hidden, student_head and student_bias; without any valid
        row they are 0 with gradient 0.

    Raises:
        ValueError: an argument has a wrong shape, dtype, device or value. On CUDA labels outside the vocabulary trip a
            device-side assertion instead, because reading them would synchronise.
    """
    if impl not in (None, "torch"):
        raise ValueError(f"impl must be None or 'torch' for linear_distillation, got {impl!r}")
    require_choice("divergence", divergence, DIVERGENCES)
    if isinstance(temperature, bool) or not isinstance(temperature, int | float) or not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be a finite number above 0, got {temperature!r}")
    require_tensor("labels", labels)
    if labels.dim() != 1 or labels.dtype != torch.int64:
        raise ValueError(f"labels must be int64 of shape (N,), got {labels.dtype} of shape {tuple(labels.shape)}")
    _require_side("student", student_hidden, student_head, student_bias, len(labels))
    _require_side("teacher", teacher_hidden, teacher_head, teacher_bias, len(labels))
    for name, tensor in (
        ("student_head", student_head),
        ("student_bias", student_bias),
        ("teacher_hidden", teacher_hidden),
        ("teacher_head", teacher_head),
        ("teacher_bias", teacher_bias),
        ("labels", labels),
    ):
        if tensor is not None:
            require_device(name, tensor, student_hidden.device)
    shared_vocab = min(student_head.shape[0], teacher_head.shape[0])
    if vocab_size is None:
        vocab_size = shared_vocab
    if isinstance(vocab_size, bool) or not isinstance(vocab_size, int) or not 1 <= vocab_size <= shared_vocab:
        raise ValueError(
            f"vocab_size must be from 1 to {shared_vocab}, the smaller of the two heads, got {vocab_size!r}"
        )
    if chunk_size is None:
        budget = CHUNK_BYTES.get(student_hidden.device.type, CHUNK_BYTES["cuda"])
        chunk_size = max(1, budget // (4 * vocab_size))
    if isinstance(chunk_size, bool) or not isinstance(chunk_size, int) or chunk_size < 1:
        raise ValueError(f"chunk_size must be None or a whole number above 0, got {chunk_size!r}")
    valid = labels != ignore_index
    require_values(
        (~valid | ((labels >= 0) & (labels < vocab_size))).all(),
        f"labels must be from 0 to vocab_size-1 = {vocab_size - 1}, or ignore_index = {ignore_index}",
    )

    # How many rows are left decides the sizes of the GEMMs, so this is the one place that waits for a CUDA device.
    index = valid.nonzero()[:, 0]
    grad = torch.is_grad_enabled()
    options = _Options(
        divergence=divergence,
        temperature=float(temperature),
        vocab_size=vocab_size,
        chunk_size=chunk_size,
        needs_hidden=grad and student_hidden.requires_grad,
        needs_head=grad and student_head.requires_grad,
        needs_bias=grad and student_bias is not None and student_bias.requires_grad,
    )
    ce, kd = _LinearDistillation.apply(
        student_hidden[index],
        student_head,
        student_bias,
        teacher_hidden.detach()[index],
        teacher_head.detach(),
        None if teacher_bias is None else teacher_bias.detach(),
        labels[index],
        options,
    )
    return LinearDistillation(ce, kd, valid.sum())
