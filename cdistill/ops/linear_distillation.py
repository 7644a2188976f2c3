"""Cross-entropy and distillation through the language-model heads, without the (N,V) logits of either model.

``ce`` and ``kd`` are two outputs with two upstream gradients, but their gradients in hidden states and head are made
together, in the forward pass, for the ratio of ``loss_weights``: one fp32 (V,Hs) tensor, not two. The backward pass
scales it. If it finds another ratio there it makes the gradients anew.
"""

from typing import Any, NamedTuple, Unpack

import torch
from torch import Tensor

from cdistill.errors import InputError
from cdistill.ops._contract import HUGE, TINY, laid_out_like
from cdistill.ops._dispatch import backend, warn_once
from cdistill.ops._operators import operator, register_gradient, save_for_backward, saved_for_backward, without_autocast
from cdistill.ops._vocabulary import (
    BLOCK,
    Inputs,
    Options,
    Wanted,
    empty_results,
    losses_and_gradients,
    token_losses,
)
from cdistill.ops._vocabulary_contract import Given, LogitOptions, checked_inputs, checked_options, require_number

SAME_RATIO = 1e-5  # relative: upstream gradients are rounded

_INPUTS = (
    "Tensor student_hidden, Tensor student_head, Tensor? student_bias, Tensor? teacher_hidden, Tensor? teacher_head, "
    "Tensor? teacher_bias, Tensor? top_values, Tensor? top_indices, Tensor labels, Tensor? weights"
)
_OPTIONS = (
    "str divergence, float temperature, float beta, int ignore_index, SymInt vocab_size, SymInt chunk_size, bool tail, "
    "float student_scale, float student_softcap, float teacher_scale, float teacher_softcap"
)
_SETTINGS = f"{_INPUTS}, {_OPTIONS}, float ce_weight, float kd_weight, str? impl"
_INPUT_COUNT = len(Inputs._fields)
_WAITS = (torch.Tag.cudagraph_unsafe,)  # for a CUDA device


class LinearDistillation(NamedTuple):
    """Sums over valid tokens, and how many there are."""

    ce: Tensor  # () fp32, nats
    kd: Tensor  # () fp32, nats
    tokens: Tensor  # () int64


class TokenLosses(NamedTuple):
    """Losses of every row, without gradients; 0 for those that are ignored."""

    ce: Tensor  # (N,) fp32, nats: minus the student's log-probability of the label
    kd: Tensor  # (N,) fp32, nats
    teacher_ce: Tensor | None  # (N,) fp32, nats, likewise the teacher's; None without its whole logits


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
    same = abs(upstream[1 - leading] - other) <= SAME_RATIO * max(abs(other), abs(upstream[leading]))
    if not same:  # NaN is not, and must reach the gradients
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


@operator("linear_token_losses", f"{_INPUTS}, {_OPTIONS}, str? impl", 3, tags=_WAITS)
def _token_losses(*arguments: Any) -> tuple[Tensor, ...]:
    inputs, options, impl = Inputs(*arguments[:_INPUT_COUNT]), Options(*arguments[_INPUT_COUNT:-1]), arguments[-1]
    return token_losses(backend(impl, inputs.student_hidden, "student_hidden"), inputs, options)[1:]


@_token_losses.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    inputs = Inputs(*arguments[:_INPUT_COUNT])
    return tuple(inputs.labels.new_empty(len(inputs.labels), dtype=torch.float32) for _ in range(3))


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


def _weights(loss_weights: Any) -> list[float]:
    if not isinstance(loss_weights, tuple | list) or len(loss_weights) != 2 or not any(loss_weights):
        raise InputError(f"loss_weights must be two numbers that are not both 0, got {loss_weights!r}")
    found = [require_number("loss_weights", w, -HUGE, HUGE, "two finite numbers") for w in loss_weights]
    if max(map(abs, found)) <= TINY:  # by which gradients are divided in fp32
        raise InputError(f"loss_weights must not both be within 2^-100 of 0, got {loss_weights!r}")
    return found


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
    weights: Tensor | None = None,
    **options: Unpack[LogitOptions],
) -> LinearDistillation:
    """Cross-entropy and teacher-student divergence over the vocabulary, from hidden states (paper 3.1, L_ar and L_kd).

    Args:
        student_hidden, student_head: (N,Hs), already shifted against labels, and (Vs,Hs), fp16, bf16 or fp32 of one dtype.
        teacher_hidden, teacher_head: (N,Ht) and (Vt,Ht), also of another dtype than the student's, at the price of
            logits in one that holds both; the teacher gets no gradient. None with ``teacher_topk``, or without a teacher:
            then kd is 0.
        labels: (N,) int64 token ids below vocab_size, or ignore_index, whose rows are dropped before anything is computed.
        divergence: of the softmax of logits / temperature, not multiplied by temperature squared, with student p and
            teacher q: "forward_kl" KL(q||p), "reverse_kl" KL(p||q), or "jsd", beta KL(q||m) + (1 - beta) KL(p||m) with
            m = beta q + (1 - beta) p.
        temperature, beta: above 0, and of "jsd", between 0 and 1. student_bias, teacher_bias: (Vs,) and (Vt,).
        teacher_topk: (values, indices), both (N,K), of a teacher that ran earlier: log-probabilities at this temperature, of
            distinct tokens (at most 1,024 on "triton"). All others are one more outcome, for both models, with what is left.
        vocab_size: columns of both heads that are real tokens, min(Vs,Vt) by default; the others count as -inf.
        chunk_size: rows per chunk; by default 64 MB of logits on the CPU, on CUDA 512 MB or the head's gradient if larger.
        loss_weights: with which ce and kd will be added; another ratio in the backward pass computes everything again.
        impl: "torch", "cpp", "triton", or None to choose by device.
        weights: (N,) of each row's losses in both sums, any floating dtype, without gradient; 1 by default.
        options: what models do to their logits, and what the tokens beside a top-k are: `LogitOptions`.

    Returns:
        LinearDistillation(ce, kd, tokens): sums over the rows that are not ignored, fp32, in nats, and their number, int64.
        Both sums are differentiable once in student_hidden, student_head and student_bias; without any valid row they are 0
        with gradient 0. inf and NaN in the inputs of a valid row reach the losses. Beside the gradients (of a head in half
        precision also in fp32) the op holds the logits of one chunk. On CUDA each pass waits for the device once.

    Raises:
        ValueError: an argument has a wrong shape, dtype, device or value, or impl cannot run here. On CUDA labels and indices
            outside the vocabulary trip a device-side assertion instead: reading them would synchronise.
    """
    student, teacher = (student_hidden, student_head, student_bias), (teacher_hidden, teacher_head, teacher_bias)
    inputs = checked_inputs(student, teacher, teacher_topk, labels, weights)
    given = Given(divergence, temperature, beta, ignore_index, vocab_size, chunk_size, **options)
    wanted = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in student]
    alone = inputs.teacher_hidden is None and inputs.top_values is None
    arguments = (*inputs, *checked_options(inputs, given), *([1.0, 0.0] if alone else _weights(loss_weights)), impl)
    ce, kd, tokens, *_ = torch.ops.cdistill.linear_distillation(*arguments, *wanted)
    return LinearDistillation(ce, kd.detach() if alone else kd, tokens)


def linear_token_losses(
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
    impl: str | None = None,
    **options: Unpack[LogitOptions],
) -> TokenLosses:
    """The losses of every token, of which `linear_distillation` returns the sums: for weights, filters and reports.

    Args and errors are those of `linear_distillation`. Nothing here has a gradient: the gradient of sum(w * ce) is that of
    linear_distillation(..., weights=w).ce.

    Returns:
        TokenLosses(ce, kd, teacher_ce), each (N,) fp32 in nats, 0 where the label is ignored. ce and teacher_ce are minus the
        log-probabilities of the labels at temperature 1; teacher_ce is None without the teacher's hidden states.
    """
    student, teacher = (student_hidden, student_head, student_bias), (teacher_hidden, teacher_head, teacher_bias)
    inputs = checked_inputs(student, teacher, teacher_topk, labels, None)
    given = Given(divergence, temperature, beta, ignore_index, vocab_size, chunk_size, **options)
    alone = [x if x is None else x.detach() for x in inputs]
    ce, kd, teacher_ce = torch.ops.cdistill.linear_token_losses(*alone, *checked_options(inputs, given), impl)
    return TokenLosses(ce, kd, None if teacher_hidden is None else teacher_ce)
