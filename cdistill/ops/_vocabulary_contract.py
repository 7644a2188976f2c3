"""What the ops over the vocabulary ask of their arguments."""

from numbers import Integral
from typing import Any, NamedTuple, TypedDict

import torch
from torch import Tensor

from cdistill.choices import DIVERGENCES, NOT_EXTREME, too_extreme
from cdistill.errors import InputError
from cdistill.ops._contract import (
    DTYPES,
    HUGE,
    TINY,
    is_number,
    require_bool,
    require_choice,
    require_device,
    require_shape,
    require_tensor,
)
from cdistill.ops._vocabulary import Inputs, Options


def _require_side(side: str, hidden: Any, head: Any, bias: Tensor | None, rows: int) -> None:
    """Check hidden states, head and bias of the student or the teacher."""
    for name, tensor in ((f"{side}_hidden", hidden), (f"{side}_head", head)):
        require_tensor(name, tensor)
        if tensor.dim() != 2:
            raise InputError(f"{name} must have 2 dimensions, got shape {tuple(tensor.shape)}")
        if tensor.dtype not in DTYPES:
            raise InputError(f"{name} must be float16, bfloat16 or float32, got {tensor.dtype}")
    require_shape(f"{side}_hidden", hidden, (rows, hidden.shape[1]), "N, H", " by labels")
    require_shape(f"{side}_head", head, (head.shape[0], hidden.shape[1]), "V, H")
    if hidden.shape[1] == 0:
        raise InputError(f"{side}_hidden must have at least one feature, got shape {tuple(hidden.shape)}")
    if head.dtype != hidden.dtype:
        raise InputError(f"{side}_head must have the dtype of {side}_hidden, {hidden.dtype}, got {head.dtype}")
    if bias is not None:
        require_shape(f"{side}_bias", bias, (head.shape[0],), "V")
        if not bias.is_floating_point():
            raise InputError(f"{side}_bias must have a floating dtype, got {bias.dtype}")


def _require_topk(topk: Any, rows: int) -> tuple[Tensor, Tensor]:
    """Check ``teacher_topk`` and return its values and its indices as int64."""
    if not isinstance(topk, tuple | list) or len(topk) != 2:
        raise InputError(f"teacher_topk must be a pair (values, indices), got {type(topk).__name__}")
    values, indices = topk
    for name, tensor in (("values", values), ("indices", indices)):
        require_tensor(f"teacher_topk {name}", tensor)
    if values.dim() != 2 or len(values) != rows or not values.shape[1]:
        raise InputError(f"teacher_topk values must have shape (N, K) with N = {rows}, got {tuple(values.shape)}")
    require_shape("teacher_topk indices", indices, tuple(values.shape), "N, K")
    if not values.is_floating_point():
        raise InputError(f"teacher_topk values must have a floating dtype, got {values.dtype}")
    if indices.is_floating_point() or indices.is_complex() or indices.dtype == torch.bool:
        raise InputError(f"teacher_topk indices must have an integer dtype, got {indices.dtype}")
    return values.detach(), indices.long()


def require_number(name: str, value: Any, low: float, high: float, text: str) -> float:
    """Raise ValueError unless low < value < high, which ``text`` says in words, without the size that fp32 can hold."""
    if not is_number(value) or not low < value < high:
        fits = low < 0 or not is_number(value) or value <= 0 or not too_extreme(value)
        raise InputError(f"{name} must be {text if fits else NOT_EXTREME}, got {value!r}")
    return float(value)


Side = tuple[Tensor | None, Tensor | None, Tensor | None]  # hidden states (N,H), head (V,H) and bias (V,)


def checked_inputs(student: Side, teacher: Side, topk: Any, labels: Tensor, weights: Any) -> Inputs:
    """Check all tensors, and detach those that get no gradient."""
    require_tensor("labels", labels)
    if labels.dim() != 1 or labels.dtype != torch.int64:
        raise InputError(f"labels must be int64 of shape (N,), got {labels.dtype} of shape {tuple(labels.shape)}")
    _require_side("student", *student, len(labels))
    top: tuple[Tensor | None, Tensor | None] = (None, None)
    if topk is not None:
        if any(x is not None for x in teacher):
            raise InputError("teacher_hidden, teacher_head and teacher_bias must be None with teacher_topk")
        top = _require_topk(topk, len(labels))
    elif any(x is not None for x in teacher):
        _require_side("teacher", *teacher, len(labels))
    if weights is not None:
        require_tensor("weights", weights)
        require_shape("weights", weights, (len(labels),), "N", " by labels")
        if not weights.is_floating_point():
            raise InputError(f"weights must have a floating dtype, got {weights.dtype}")
        weights = weights.detach().float()
    hidden, head, bias = student
    assert hidden is not None and head is not None
    teacher_hidden, teacher_head, teacher_bias = (x if x is None else x.detach() for x in teacher)
    inputs = Inputs(hidden, head, bias, teacher_hidden, teacher_head, teacher_bias, *top, labels, weights)
    for name, tensor in zip(Inputs._fields, inputs, strict=True):
        if tensor is not None:
            require_device(name.replace("top_", "teacher_topk "), tensor, hidden.device, "student_hidden")
    return inputs


class LogitOptions(TypedDict, total=False):
    """What further keywords of the ops over the vocabulary say of logits.

    Attributes:
        topk_tail: False leaves all tokens beside the teacher's top-k out: there are no others, for both models (TRL's top_k),
            and their values may also be logits / temperature. The cross-entropy stays over the whole vocabulary.
        student_logit_scale, teacher_logit_scale: factor of the logits (Cohere's logit_scale; Granite's logits_scaling is a
            divisor), 1 by default.
        student_logit_softcap, teacher_logit_softcap: c of c tanh(logits / c) after that (Gemma's final_logit_softcapping), or
            None.
    """

    topk_tail: bool
    student_logit_scale: float
    student_logit_softcap: float | None
    teacher_logit_scale: float
    teacher_logit_softcap: float | None


class Given(NamedTuple):
    """Options as a caller gives them."""

    divergence: str
    temperature: float
    beta: float
    ignore_index: int
    vocab_size: int | None
    chunk_size: int | None
    topk_tail: bool = True
    student_logit_scale: float = 1.0
    student_logit_softcap: float | None = None
    teacher_logit_scale: float = 1.0
    teacher_logit_softcap: float | None = None


def checked_options(inputs: Inputs, given: Given) -> Options:
    """Check all options; sizes become those of the inputs where the caller leaves them open."""
    require_choice("divergence", given.divergence, DIVERGENCES)
    temperature = require_number("temperature", given.temperature, TINY, HUGE, "a finite number above 0")
    beta = require_number("beta", given.beta, 0, 1, "a number between 0 and 1")
    ignore_index, vocab_size, chunk_size = given.ignore_index, given.vocab_size, given.chunk_size
    if not is_number(ignore_index, Integral) or abs(ignore_index) >= 2**63:
        raise InputError(f"ignore_index must be a whole number, got {ignore_index!r}")
    heads = inputs.student_head, inputs.teacher_head
    shared = min(head.shape[0] for head in heads if head is not None)
    if vocab_size is None:
        vocab_size = shared
    if not is_number(vocab_size, Integral) or not 1 <= vocab_size <= shared:
        raise InputError(f"vocab_size must be from 1 to {shared}, the smaller of the two heads, got {vocab_size!r}")
    if inputs.top_values is not None and inputs.top_values.shape[1] >= vocab_size + (not given.topk_tail):
        most, got = "fewer than" if given.topk_tail else "at most", inputs.top_values.shape[1]
        raise InputError(f"teacher_topk must hold {most} vocab_size = {vocab_size} tokens a row, got {got}")
    if chunk_size is not None and (not is_number(chunk_size, Integral) or chunk_size < 1):
        raise InputError(f"chunk_size must be None or a whole number above 0, got {chunk_size!r}")
    chunk_size = min(chunk_size or 0, max(len(inputs.labels), 1))
    require_bool("topk_tail", given.topk_tail)
    after, positive = [], "None or a finite number above 0"
    for name in Given._fields[-4:]:
        value, text = getattr(given, name), positive if name.endswith("cap") else positive.removeprefix("None or ")
        after += [0.0 if value is None and text == positive else require_number(name, value, TINY, HUGE, text)]
    divergence = given.divergence
    if inputs.teacher_hidden is None and inputs.top_values is None:
        divergence = "forward_kl"  # of the student and itself, which is 0
    return Options(
        divergence,
        temperature,
        beta,
        int(ignore_index),
        int(vocab_size),
        int(chunk_size),
        given.topk_tail,
        *after,
    )
