"""TRL's loss of two models' logits by its name, arguments and meanings, without the softmaxes that it keeps."""

from __future__ import annotations

import math
from numbers import Integral
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from cdistill.errors import InputError
from cdistill.nn.head import divisor
from cdistill.ops._contract import DTYPES, HUGE, TINY, is_number, require_bool
from cdistill.ops._dispatch import backend
from cdistill.ops._problem import VocabularyOptions, VocabularyRows
from cdistill.ops._vocabulary_contract import require_number

IGNORED = -100
ROW_UNIT = 64  # elements by which rows are aligned for kernels
_FULL = {0.0: "forward_kl", 1.0: "reverse_kl"}


def generalized_jsd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    beta: float = 0.5,
    temperature: float = 1.0,
    reduction: str = "batchmean",
    num_items_in_batch: Tensor | float | None = None,
    *,
    logits_are_probs: bool = False,
    top_k: int = 0,
) -> Tensor:
    """Divergence of the softmaxes of two models' logits, as TRL's GKDTrainer has it (Agarwal et al. 2024, equation 1).

    Args:
        student_logits, teacher_logits: (..., V) fp16, bf16 or fp32; the teacher gets no gradient. Where they exist
            already this is the loss to use; `DistillationHead` never makes them.
        labels: (...) with -100 where a token does not count; all count if None.
        beta: from 0, KL(teacher || student), to 1, KL(student || teacher); between them the generalised JSD.
        temperature: divides both.
        reduction: "batchmean" (over the labels that count, or over the first dimension without labels), "sum",
            "mean" (over the labels and the vocabulary) or "none": all terms (..., V), or (n,V) with labels, by plain torch.
        num_items_in_batch: what the sum is divided by in place of that: the labels of a global batch.
        logits_are_probs: whether both are probabilities; their logarithms are taken.
        top_k: where not 0, the teacher's largest logits are all tokens there are.

    Raises:
        ValueError: other shapes than these, or a reduction that is not named here.
    """
    _check(student_logits, teacher_logits, labels, beta, temperature, reduction)
    require_bool("logits_are_probs", logits_are_probs)
    if not is_number(top_k, Integral) or not 0 <= top_k <= student_logits.shape[-1]:
        raise InputError(f"top_k must be from 0 to the {student_logits.shape[-1]} tokens of the logits, got {top_k!r}")
    teacher_logits = teacher_logits.detach()
    if logits_are_probs:
        student_logits, teacher_logits = (x.float().clamp_min(1e-8).log() for x in (student_logits, teacher_logits))
    if top_k:
        chosen = teacher_logits.topk(top_k, -1).indices
        student_logits, teacher_logits = (x.gather(-1, chosen) for x in (student_logits, teacher_logits))
    first, student, teacher = len(student_logits), student_logits, teacher_logits
    if labels is not None:
        counted = labels != IGNORED
        student, teacher = student[counted], teacher[counted]
    if reduction == "none" and num_items_in_batch is None:
        return _terms(student / temperature, teacher / temperature, float(beta))
    student, teacher = student.flatten(0, -2), teacher.flatten(0, -2)
    total = _Divergence.apply(student, teacher, _FULL.get(beta, "jsd"), float(beta), float(temperature))
    if num_items_in_batch is not None:
        tokens = torch.tensor(len(student), device=student.device)
        return total / divisor("num_items_in_batch", num_items_in_batch, tokens)
    if reduction == "sum":
        return total
    if reduction == "mean":
        return total / max(student.numel(), 1)
    return total / (max(len(student), 1) if labels is not None else first)


def _check(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None,
    beta: float,
    temperature: float,
    reduction: str,
) -> None:
    if reduction not in ("batchmean", "sum", "mean", "none"):
        raise InputError(f"reduction must be batchmean, sum, mean or none, got {reduction!r}")
    if student_logits.shape != teacher_logits.shape:
        shapes = f"{tuple(student_logits.shape)} and {tuple(teacher_logits.shape)}"
        raise InputError(f"student_logits and teacher_logits must have the same shape, got {shapes}")
    if labels is not None and labels.shape != student_logits.shape[:-1]:
        raise InputError(f"labels must have shape {tuple(student_logits.shape[:-1])}, got {tuple(labels.shape)}")
    if labels is not None and (labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool):
        raise InputError(f"labels must have an integer dtype, got {labels.dtype}")
    if not is_number(beta) or not 0 <= beta <= 1:
        raise InputError(f"beta must be from 0 to 1, got {beta!r}")
    for name, x in (("student_logits", student_logits), ("teacher_logits", teacher_logits)):
        if x.dtype not in DTYPES:
            raise InputError(f"{name} must be float16, bfloat16 or float32, got {x.dtype}")
    require_number("temperature", temperature, TINY, HUGE, "a finite number above 0")


def _terms(student: Tensor, teacher: Tensor, beta: float) -> Tensor:
    """What each token of the vocabulary adds to the divergence of logits (..., V)."""
    p, q = student.log_softmax(-1), teacher.log_softmax(-1)
    if beta in _FULL:
        p, q = (p, q) if beta == 0 else (q, p)
        return q.exp() * (q - p)
    m = torch.stack([p + math.log1p(-beta), q + math.log(beta)]).logsumexp(0)
    return beta * q.exp() * (q - m) + (1 - beta) * p.exp() * (p - m)


class _Divergence(torch.autograd.Function):
    """Sum over rows (n,V); its gradient is made in the forward pass, in the dtype of the logits."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, divergence: str, beta: float, temperature: float) -> Tensor:
        chosen = backend(None, student, "student_logits")
        count, V = student.shape
        dtype = torch.promote_types(student.dtype, teacher.dtype)
        dtype = torch.float32 if dtype == torch.float16 and not student.is_cuda else dtype
        rows = student.new_empty(2, count, -(-V // ROW_UNIT) * ROW_UNIT, dtype=dtype)[:, :, :V]
        rows[0], rows[1] = student, teacher
        labels = torch.zeros(count, dtype=torch.int64, device=student.device)
        ce, kd = (torch.empty(count, dtype=torch.float32, device=student.device) for _ in range(2))
        inner = beta if divergence == "jsd" else 0.5
        options = VocabularyOptions(divergence, temperature, inner, 0.0, 1.0, gradient=ctx.needs_input_grad[0])
        if count:
            chosen.vocabulary_losses(VocabularyRows(rows[0], rows[1], None, labels, ce, kd), options)
        ctx.save_for_backward(rows[0])
        ctx.dtype = student.dtype
        return kd.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return (gradient * grads[0]).to(ctx.dtype), None, None, None, None
