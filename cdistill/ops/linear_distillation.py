"""Cross-entropy and distillation through the language-model heads, without the (N,V) logits of either model.

``ce`` and ``kd`` are two outputs with two upstream gradients, but their gradients in hidden states and head are made
together, in the forward pass, for the ratio of ``loss_weights``: one fp32 (V,Hs) tensor, not two. The backward pass
scales it. If it finds another ratio there it makes the gradients anew.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from cdistill.choices import DIVERGENCES
from cdistill.ops._contract import (
    DTYPES,
    laid_out_like,
    require_choice,
    require_device,
    require_shape,
    require_tensor,
)
from cdistill.ops._dispatch import backend, warn_once
from cdistill.ops._operators import operator, register_gradient, save_for_backward, saved_for_backward, without_autocast
from cdistill.ops._vocabulary import BLOCK, Inputs, Options, Wanted, empty_results, losses_and_gradients

SAME_RATIO = 1e-5  # relative: upstream gradients are rounded
TINY, HUGE = 2.0**-100, 2.0**100  # of numbers that kernels take and divide by in fp32

_INPUTS = (
    "Tensor student_hidden, Tensor student_head, Tensor? student_bias, Tensor? teacher_hidden, Tensor? teacher_head, "
    "Tensor? teacher_bias, Tensor? top_values, Tensor? top_indices, Tensor labels"
)
_OPTIONS = "str divergence, float temperature, float beta, int ignore_index, SymInt vocab_size, SymInt chunk_size"
_SETTINGS = f"{_INPUTS}, {_OPTIONS}, float ce_weight, float kd_weight, str? impl"
_INPUT_COUNT = len(Inputs._fields)
_WAITS = (torch.Tag.cudagraph_unsafe,)  # for a CUDA device


class LinearDistillation(NamedTuple):
    """Sums over valid tokens, and how many there are."""

    ce: Tensor  # () fp32, nats
    kd: Tensor  # () fp32, nats
    tokens: Tensor  # () int64


def _split(settings: tuple[Any, ...]) -> tuple[Inputs, Options, tuple[float, float], str | None]:
    """The arguments that ``_SETTINGS`` names."""
    *options, ce_weight, kd_weight, impl = settings[_INPUT_COUNT:]
    return Inputs(*settings[:_INPUT_COUNT]), Options(*options), (ce_weight, kd_weight), impl


def _is_made(gradient: Tensor) -> bool:
    """Whether this is a gradient ((N,Hs), (Vs,Hs) or (Vs,)) and not the empty vector in place of an unwanted one."""
    return gradient.dim() == 2 or gradient.numel() > 0


def _made_anew(inputs: Inputs, options: Options, wanted: Wanted, impl: str | None, dce: float, dkd: float):
    """The gradients of dce * ce + dkd * kd."""
    for name in ("student_head", "teacher_head"):
        head = getattr(inputs, name)
        if head is not None and not head.numel():
            raise RuntimeError(
                f"{name} is empty in the backward pass (ZeRO-3 has partitioned it), and ce and kd were differentiated "
                "in another ratio than loss_weights says: pass the weights with which the two losses are added"
            )
    warn_once(
        "cdistill: ce and kd of linear_distillation were differentiated in another ratio than that of loss_weights, so that "
        "everything is computed a second time in the backward pass"
    )
    chosen = backend(impl, inputs.student_hidden, "student_hidden")
    return losses_and_gradients(chosen, inputs, options, wanted, dce, dkd)[3:]


def _gradients(
    dce: Tensor | None, dkd: Tensor | None, made: tuple[Tensor, ...], settings: tuple[Any, ...], overwrite: bool
) -> list[Tensor]:
    """Gradients of the student's tensors from those ``made`` for the loss weights; empty where none was made.

    With ``overwrite`` they may be the tensors of ``made``.
    """
    inputs, options, weights, impl = _split(settings)
    zero = inputs.student_hidden.new_zeros((), dtype=torch.float32)
    # The host decides what to do, so this waits for a CUDA device, at the very start of the backward pass.
    upstream = torch.stack([zero if x is None else x for x in (dce, dkd)]).tolist()
    leading = 0 if abs(weights[0]) >= abs(weights[1]) else 1
    factor = upstream[leading] / weights[leading]
    other = factor * weights[1 - leading]
    if abs(upstream[1 - leading] - other) > SAME_RATIO * max(abs(other), abs(upstream[leading])):
        wanted = Wanted(*map(_is_made, made))
        made, factor, overwrite = _made_anew(inputs, options, wanted, impl, *upstream), 1.0, True

    def finished(gradient: Tensor, like: Tensor | None) -> Tensor:
        if like is None or not _is_made(gradient):
            return gradient.new_empty(0)
        if overwrite:
            return gradient.mul_(factor).to(like.dtype)
        result = torch.empty_like(gradient, dtype=like.dtype)
        for start in range(0, len(gradient), BLOCK):  # CPUs would hold another fp32 tensor of the whole meanwhile
            part = slice(start, start + BLOCK)
            result[part] = gradient[part] * factor
        return result

    return [finished(x, like) for x, like in zip(made, inputs[:3], strict=True)]


@operator("linear_distillation", f"{_SETTINGS}, bool hidden, bool head, bool bias", 6, tags=_WAITS)
def _forward(*arguments: Any) -> tuple[Tensor, ...]:
    inputs, options, weights, impl = _split(arguments[:-3])
    chosen = backend(impl, inputs.student_hidden, "student_hidden")
    return losses_and_gradients(chosen, inputs, options, Wanted(*arguments[-3:]), *weights)


@_forward.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    return empty_results(Inputs(*arguments[:_INPUT_COUNT]), Wanted(*arguments[-3:]))


@operator(
    "linear_distillation_backward",
    f"Tensor? dce, Tensor? dkd, Tensor hidden, Tensor head, Tensor bias, {_SETTINGS}",
    3,
    tags=_WAITS,
)
def _backward(dce: Tensor | None, dkd: Tensor | None, *arguments: Any) -> tuple[Tensor, ...]:
    made, settings = arguments[:3], arguments[3:]
    gradients = _gradients(dce, dkd, made, settings, overwrite=False)
    leaves = settings[:3]
    return tuple(
        laid_out_like(x, y) if _is_made(x) and x.shape == y.shape else x for x, y in zip(gradients, leaves, strict=True)
    )


@_backward.register_fake
def _(dce: Tensor | None, dkd: Tensor | None, *arguments: Any) -> tuple[Tensor, ...]:
    made, leaves = arguments[:3], arguments[3:6]
    return tuple(torch.empty_like(y) if _is_made(x) else x.new_empty(0) for x, y in zip(made, leaves, strict=True))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)
    save_for_backward(ctx, *output[3:], *inputs[:-3])  # only another ratio will need the inputs
    ctx.arguments = len(inputs)


def _differentiate(ctx: Any, dce: Tensor | None, dkd: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if dce is None and dkd is None:
        return (None,) * ctx.arguments
    saved = saved_for_backward(ctx)
    made, settings = tuple(saved[:3]), tuple(saved[3:])
    keep = torch.is_grad_enabled() or torch._C._autograd._get_current_graph_task_keep_graph()
    if type(made[0]) is Tensor and not keep:
        # No other backward pass will read what was kept, so it may become the result, instead of a second (V,Hs).
        gradients = without_autocast(_gradients)(dce, dkd, made, settings, True)
    else:
        gradients = torch.ops.cdistill.linear_distillation_backward(dce, dkd, *made, *settings)
    found = [x if _is_made(x) else None for x in gradients]
    return *found, *(None,) * (ctx.arguments - len(found))


register_gradient("linear_distillation", _save, _differentiate)


def _require_side(side: str, hidden: Any, head: Any, bias: Tensor | None, rows: int) -> None:
    """Check hidden states, head and bias of the student or the teacher."""
    for name, tensor in ((f"{side}_hidden", hidden), (f"{side}_head", head)):
        require_tensor(name, tensor)
        if tensor.dim() != 2:
            raise ValueError(f"{name} must have 2 dimensions, got shape {tuple(tensor.shape)}")
        if tensor.dtype not in DTYPES:
            raise ValueError(f"{name} must be float16, bfloat16 or float32, got {tensor.dtype}")
    require_shape(f"{side}_hidden", hidden, (rows, hidden.shape[1]), "N, H", " by labels")
    require_shape(f"{side}_head", head, (head.shape[0], hidden.shape[1]), "V, H")
    if head.dtype != hidden.dtype:
        raise ValueError(f"{side}_head must have the dtype of {side}_hidden, {hidden.dtype}, got {head.dtype}")
    if bias is not None:
        require_shape(f"{side}_bias", bias, (head.shape[0],), "V")
        if not bias.is_floating_point():
            raise ValueError(f"{side}_bias must have a floating dtype, got {bias.dtype}")


def _require_topk(topk: Any, rows: int) -> tuple[Tensor, Tensor]:
    """Check ``teacher_topk`` and return its values and its indices as int64."""
    if not isinstance(topk, tuple | list) or len(topk) != 2:
        raise ValueError(f"teacher_topk must be a pair (values, indices), got {type(topk).__name__}")
    values, indices = topk
    for name, tensor in (("values", values), ("indices", indices)):
        require_tensor(f"teacher_topk {name}", tensor)
    if values.dim() != 2 or len(values) != rows or not values.shape[1]:
        raise ValueError(f"teacher_topk values must have shape (N, K) with N = {rows}, got {tuple(values.shape)}")
    require_shape("teacher_topk indices", indices, tuple(values.shape), "N, K")
    if not values.is_floating_point():
        raise ValueError(f"teacher_topk values must have a floating dtype, got {values.dtype}")
    if indices.is_floating_point() or indices.is_complex() or indices.dtype == torch.bool:
        raise ValueError(f"teacher_topk indices must have an integer dtype, got {indices.dtype}")
    return values.detach(), indices.long()


def _require_number(name: str, value: Any, low: float, high: float, text: str) -> float:
    """Raise ValueError unless low < value < high, which ``text`` says in words."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not low < value < high:
        raise ValueError(f"{name} must be {text}, got {value!r}")
    return float(value)


Side = tuple[Tensor | None, Tensor | None, Tensor | None]  # hidden states (N,H), head (V,H) and bias (V,)


def _inputs(student: Side, teacher: Side, topk: Any, labels: Tensor) -> Inputs:
    """Check all tensors, and detach those of the teacher."""
    require_tensor("labels", labels)
    if labels.dim() != 1 or labels.dtype != torch.int64:
        raise ValueError(f"labels must be int64 of shape (N,), got {labels.dtype} of shape {tuple(labels.shape)}")
    _require_side("student", *student, len(labels))
    top: tuple[Tensor | None, Tensor | None] = (None, None)
    if topk is None:
        _require_side("teacher", *teacher, len(labels))
    elif any(x is not None for x in teacher):
        raise ValueError("teacher_hidden, teacher_head and teacher_bias must be None with teacher_topk")
    else:
        top = _require_topk(topk, len(labels))
    hidden, head, bias = student
    assert hidden is not None and head is not None
    teacher_hidden, teacher_head, teacher_bias = (x if x is None else x.detach() for x in teacher)
    inputs = Inputs(hidden, head, bias, teacher_hidden, teacher_head, teacher_bias, *top, labels)
    for name, tensor in zip(Inputs._fields, inputs, strict=True):
        if tensor is not None:
            require_device(name.replace("top_", "teacher_topk "), tensor, hidden.device, "student_hidden")
    return inputs


def _options(
    inputs: Inputs,
    divergence: str,
    temperature: float,
    beta: float,
    ignore_index: int,
    vocab_size: int | None,
    chunk_size: int | None,
) -> Options:
    """Check all options; sizes become those of the inputs where the caller leaves them open."""
    require_choice("divergence", divergence, DIVERGENCES)
    temperature = _require_number("temperature", temperature, TINY, HUGE, "a finite number above 0")
    beta = _require_number("beta", beta, 0, 1, "a number between 0 and 1")
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int) or abs(ignore_index) >= 2**63:
        raise ValueError(f"ignore_index must be a whole number, got {ignore_index!r}")
    heads = inputs.student_head, inputs.teacher_head
    shared = min(head.shape[0] for head in heads if head is not None)
    if vocab_size is None:
        vocab_size = shared
    if isinstance(vocab_size, bool) or not isinstance(vocab_size, int) or not 1 <= vocab_size <= shared:
        raise ValueError(f"vocab_size must be from 1 to {shared}, the smaller of the two heads, got {vocab_size!r}")
    if inputs.top_values is not None and inputs.top_values.shape[1] >= vocab_size:
        got = inputs.top_values.shape[1]
        raise ValueError(f"teacher_topk must hold fewer than vocab_size = {vocab_size} tokens a row, got {got}")
    if chunk_size is not None and (isinstance(chunk_size, bool) or not isinstance(chunk_size, int) or chunk_size < 1):
        raise ValueError(f"chunk_size must be None or a whole number above 0, got {chunk_size!r}")
    chunk_size = min(chunk_size or 0, max(len(inputs.labels), 1))
    return Options(divergence, temperature, beta, ignore_index, vocab_size, chunk_size)


def _weights(loss_weights: Any) -> list[float]:
    if not isinstance(loss_weights, tuple | list) or len(loss_weights) != 2 or not any(loss_weights):
        raise ValueError(f"loss_weights must be two numbers that are not both 0, got {loss_weights!r}")
    return [_require_number("loss_weights", w, -HUGE, HUGE, "two finite numbers") for w in loss_weights]


def linear_distillation(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_hidden: Tensor | None,
    teacher_head: Tensor | None,
    labels: Tensor,
    *,
    divergence: str = "forward_kl",
    temperature: float = 1.0,
    beta: float = 0.5,
    ignore_index: int = -100,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    teacher_topk: tuple[Tensor, Tensor] | None = None,
    vocab_size: int | None = None,
    chunk_size: int | None = None,
    loss_weights: tuple[float, float] = (1.0, 1.0),
    impl: str | None = None,
) -> LinearDistillation:
    """Cross-entropy and teacher-student divergence over the vocabulary, from hidden states (paper 3.1, L_ar and L_kd).

    Args:
        student_hidden: (N,Hs) fp16, bf16 or fp32, already shifted against labels.
        student_head: (Vs,Hs), the weight of the student's output layer, same dtype.
        teacher_hidden, teacher_head: (N,Ht) and (Vt,Ht), also of another dtype than the student's, at the price of
            logits in one that holds both; the teacher gets no gradient. None with ``teacher_topk``.
        labels: (N,) int64 token ids below vocab_size, or ignore_index, whose rows are dropped before anything is computed.
        divergence: of the softmax of logits / temperature, not multiplied by temperature squared, with student p and
            teacher q: "forward_kl" KL(q||p), "reverse_kl" KL(p||q), or "jsd", beta KL(q||m) + (1 - beta) KL(p||m) with
            m = beta q + (1 - beta) p.
        temperature, beta: above 0; of "jsd", between 0 and 1.
        student_bias, teacher_bias: (Vs,) and (Vt,).
        teacher_topk: (values, indices), both (N,K), of a teacher that ran earlier: natural log-probabilities at this
            temperature and the distinct tokens they belong to. All other tokens are one more outcome, for both models,
            with the probability that is left (at least 2^-24). "triton" takes up to 1,024 of them.
        vocab_size: columns of both heads that are real tokens, min(Vs,Vt) by default; the others are masked with -inf
            in both losses.
        chunk_size: rows per chunk; by default as many as keep both models' logits of a chunk at 64 MB on the CPU, and on
            CUDA at 512 MB or the size of the head's fp32 gradient, if that is wanted and larger.
        loss_weights: with which ce and kd will be added. Any ratio of them in the backward pass gives the right gradient,
            but only this one without computing everything a second time.
        impl: "torch", "cpp", "triton", or None to choose by device.

    Returns:
        LinearDistillation(ce, kd, tokens): sums over the rows that are not ignored, fp32, in nats, and their number, int64.
        Both sums are differentiable once in student_hidden, student_head and student_bias; without any valid row they are 0
        with gradient 0. inf and NaN in the inputs of a valid row reach the losses. Beside the gradients (of a head in half
        precision also in fp32) the op holds the logits of one chunk. On CUDA each pass waits for the device once.

    Raises:
        ValueError: an argument has a wrong shape, dtype, device or value, or impl cannot run here. On CUDA labels and
            indices outside the vocabulary trip a device-side assertion instead, because reading them would synchronise.
    """
    student, teacher = (student_hidden, student_head, student_bias), (teacher_hidden, teacher_head, teacher_bias)
    inputs = _inputs(student, teacher, teacher_topk, labels)
    options = _options(inputs, divergence, temperature, beta, ignore_index, vocab_size, chunk_size)
    wanted = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in student]
    arguments = (*inputs, *options, *_weights(loss_weights), impl, *wanted)
    ce, kd, tokens, *_ = torch.ops.cdistill.linear_distillation(*arguments)
    return LinearDistillation(ce, kd, tokens)
