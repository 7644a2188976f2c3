"""A vocabulary layer with its losses: hidden states and heads in, a loss out, no logits between."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from cdistill.choices import DIVERGENCES
from cdistill.errors import InputError
from cdistill.ops import linear_distillation, linear_token_losses
from cdistill.ops._contract import HUGE, is_number, require_bool, require_values
from cdistill.ops._vocabulary_contract import require_number

REDUCTIONS = ("mean", "sum", "none")
_FULL = {0.0: "forward_kl", 1.0: "reverse_kl"}  # what "jsd" is at the ends of beta, as Liger and TRL have it


class HeadLosses(NamedTuple):
    """What `DistillationHead` returns. With reduction "none" every loss has the shape of the labels."""

    loss: Tensor  # () fp32: ce_weight * ce + kd_weight * kd
    ce: Tensor  # () fp32, nats, detached
    kd: Tensor  # () fp32, nats, detached
    tokens: Tensor  # () int64: labels that are not ignored


class DistillationHead(nn.Module):
    """Cross-entropy of the labels and divergence from a teacher, by `cdistill.ops.linear_distillation`. It has no parameters.

    Args:
        ce_weight, kd_weight: of the two losses in ``loss``; not both 0.
        divergence: "forward_kl", "reverse_kl" or "jsd".
        beta: of "jsd", from 0 to 1: share of the teacher in the mixture; 0 is forward and 1 reverse KL, as in Liger and TRL.
        temperature: divides both models' logits in the divergence, which is not multiplied by its square.
        reduction: "mean" over the labels that count (or over ``num_items``), "sum", or "none".
        ignore_index: label of tokens that do not count.
        shift: whether hidden states (B,T,H) predict the label of the next token, as causal language models are called.
        vocab_size, chunk_size, impl, topk_tail, student_logit_scale, student_logit_softcap, teacher_logit_scale,
            teacher_logit_softcap: of `cdistill.ops.linear_distillation`.

    Raises:
        ValueError: an argument is none of those named; the message says which.
    """

    def __init__(
        self,
        *,
        ce_weight: float = 1.0,
        kd_weight: float = 1.0,
        divergence: str = "forward_kl",
        beta: float = 0.5,
        temperature: float = 1.0,
        reduction: str = "mean",
        ignore_index: int = -100,
        shift: bool = False,
        **options: Any,
    ) -> None:
        super().__init__()
        for name, value, allowed in (("reduction", reduction, REDUCTIONS), ("divergence", divergence, DIVERGENCES)):
            if value not in allowed:
                raise InputError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
        if not is_number(beta) or not 0 <= beta <= 1:
            raise InputError(f"beta must be from 0 to 1, got {beta!r}")
        require_bool("shift", shift)
        both = (("ce_weight", ce_weight), ("kd_weight", kd_weight))
        ce, kd = (require_number(name, weight, -HUGE, HUGE, "a finite number") for name, weight in both)
        self.weights = (ce, kd)
        if not any(self.weights):
            raise InputError("ce_weight and kd_weight must not both be 0")
        unknown = set(options) - _OPTIONS
        if unknown:
            raise InputError(
                f"{', '.join(sorted(unknown))}: no option of DistillationHead; it takes {sorted(_OPTIONS)}"
            )
        if divergence == "jsd" and beta in _FULL:
            divergence, beta = _FULL[beta], 0.5
        self.reduction, self.ignore_index, self.shift = reduction, ignore_index, shift
        self.options = options | {"divergence": divergence, "beta": beta, "temperature": temperature}
        self.options["ignore_index"] = ignore_index

    def extra_repr(self) -> str:
        return f"ce_weight={self.weights[0]}, kd_weight={self.weights[1]}, reduction={self.reduction!r}, {self.options}"

    def forward(
        self,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor | None = None,
        *,
        bias: Tensor | None = None,
        teacher_hidden: Tensor | None = None,
        teacher_weight: Tensor | None = None,
        teacher_bias: Tensor | None = None,
        teacher_topk: tuple[Tensor, Tensor] | None = None,
        weights: Tensor | None = None,
        num_items: Tensor | float | None = None,
    ) -> HeadLosses:
        """The losses of a batch.

        Args:
            hidden, weight, bias: (..., H) and (V,H), fp16, bf16 or fp32, and (V,) of the student. Under torch.autocast both
                are taken in its dtype, as a linear layer takes them.
            labels: (...) integer token ids; all tokens count if None, which needs a ce_weight of 0.
            teacher_hidden, teacher_weight, teacher_bias: (..., Ht), (Vt,Ht) and (Vt,), also of another dtype; without a teacher
                kd is 0.
            teacher_topk: (values, indices) (..., K) of a teacher that ran earlier.
            weights: (...) of each token's losses, without gradient; a mean still divides by the number of tokens.
            num_items: what a mean divides by in place of this batch's labels: those of a global batch.

        Where all labels are ignored every loss is 0, with gradient 0.

        Raises:
            ValueError: what `cdistill.ops.linear_distillation` refuses, or weights with reduction "none".
        """
        if num_items is not None and self.reduction != "mean":
            raise InputError(f"num_items is what a mean divides by, and reduction is {self.reduction!r}")
        if not self.weights[0] and teacher_hidden is None and teacher_topk is None:
            raise InputError("a teacher must be given where ce_weight is 0: nothing would be learned")
        if labels is None:
            if self.weights[0] != 0:
                raise InputError("labels must be given where ce_weight is not 0")
            labels = torch.zeros(hidden.shape[:-1], dtype=torch.int64, device=hidden.device)
        if teacher_topk is not None and (not isinstance(teacher_topk, tuple | list) or len(teacher_topk) != 2):
            raise InputError(f"teacher_topk must be a pair (values, indices), got {type(teacher_topk).__name__}")
        of_rows = {"hidden": hidden, "teacher_hidden": teacher_hidden, "weights": weights}
        of_rows |= dict(zip(("values", "indices"), teacher_topk or (None, None), strict=True))
        labels, rows = self._rows(labels, of_rows)
        shape, labels, taught = labels.shape, labels.flatten().long(), rows["teacher_hidden"]
        arguments: Any = (*_autocast(rows["hidden"], weight), *_autocast(taught, teacher_weight), labels)
        topk = None if teacher_topk is None else (rows["values"], rows["indices"])
        options: dict[str, Any] = self.options | {
            "student_bias": bias,
            "teacher_bias": teacher_bias,
            "teacher_topk": topk,
        }
        if self.reduction == "none":
            return self._each(arguments, options, weights, shape)
        factors = (1.0, 0.0) if taught is None and topk is None else self.weights
        ce, kd, tokens = linear_distillation(*arguments, **options, weights=rows["weights"], loss_weights=factors)
        if self.reduction == "mean":
            count = tokens.clamp(min=1) if num_items is None else divisor("num_items", num_items, tokens)
            ce, kd = ce / count, kd / count
        return HeadLosses(_weighted(self.weights, ce, kd), ce.detach(), kd.detach(), tokens)

    def _rows(self, labels: Tensor, of_rows: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        """Labels (...), shifted if so asked, and what belongs to them, flat: (N,), or (N,H)."""
        if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
            raise InputError(f"labels must have an integer dtype, got {labels.dtype}")
        if self.shift and labels.dim() != 2:
            raise InputError(f"labels must have shape (B, T) with shift=True, got {tuple(labels.shape)}")
        labels = labels[:, 1:] if self.shift else labels
        rows: dict[str, Any] = {}
        for name, x in of_rows.items():
            if x is None:
                rows[name] = None
                continue
            inner = () if name == "weights" else x.shape[-1:]
            if self.shift:
                x = x[:, 1:] if name == "weights" else x[:, :-1]
            if x.shape != (*labels.shape, *inner):
                raise InputError(f"{name} must have the shape of labels {tuple(labels.shape)}, got {tuple(x.shape)}")
            rows[name] = x.reshape(-1, *inner)
        return labels, rows

    def _each(
        self, arguments: tuple[Any, ...], options: dict[str, Any], weights: Tensor | None, shape: torch.Size
    ) -> HeadLosses:
        if weights is not None:
            raise InputError("weights are for sums: with reduction 'none' multiply the losses yourself")
        with torch.no_grad():
            found = linear_token_losses(*arguments, **options)
        loss = _weighted(self.weights, found.ce, found.kd)
        leaves = (arguments[0], arguments[1], options["student_bias"])
        if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in leaves):
            loss = _EachLoss.apply(loss, arguments, options, self.weights, *leaves)
        tokens = (arguments[4] != self.ignore_index).sum()
        return HeadLosses(loss.view(shape), found.ce.view(shape), found.kd.view(shape), tokens)


_OPTIONS = {
    "vocab_size",
    "chunk_size",
    "impl",
    "topk_tail",
    "student_logit_scale",
    "student_logit_softcap",
    "teacher_logit_scale",
    "teacher_logit_softcap",
}


class _EachLoss(torch.autograd.Function):
    """Losses of tokens, whose gradients are made in the backward pass, when it is known what each of them counts."""

    @staticmethod
    def forward(
        ctx: Any, loss: Tensor, arguments: tuple[Any, ...], options: dict[str, Any], factors: Any, *leaves: Any
    ) -> Tensor:
        ctx.arguments, ctx.options, ctx.factors = arguments[2:], options, factors
        ctx.save_for_backward(*leaves)
        return loss.view_as(loss)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        made: list[Any] = [x if x is None else x.detach().requires_grad_(x.requires_grad) for x in ctx.saved_tensors]
        options = ctx.options | {"student_bias": made[2], "weights": grads[0].flatten()}
        with torch.enable_grad():
            alone = ctx.arguments[0] is None and options["teacher_topk"] is None
            factors = (1.0, 0.0) if alone else ctx.factors
            ce, kd, _ = linear_distillation(made[0], made[1], *ctx.arguments, **options, loss_weights=factors)
            wanted = [x for x in made if x is not None and x.requires_grad]
            found = iter(torch.autograd.grad(ctx.factors[0] * ce + ctx.factors[1] * kd, wanted))
        return None, None, None, None, *(next(found) if x is not None and x.requires_grad else None for x in made)


def _weighted(weights: tuple[float, float], ce: Tensor, kd: Tensor) -> Tensor:
    """The sum of both losses; one of weight 0 has no part in it, also where it is infinite."""
    loss = sum(w * x for w, x in zip(weights, (ce, kd), strict=True) if w)
    assert isinstance(loss, Tensor)
    return loss


def divisor(name: str, num_items: Any, tokens: Tensor) -> Any:
    """What a sum over () tokens is divided by; 1 where none counts, whose losses are 0."""
    if isinstance(num_items, Tensor):
        if num_items.numel() != 1:
            raise InputError(f"{name} must be one number, got shape {tuple(num_items.shape)}")
        num_items = num_items.reshape(()).to(tokens.device)
        require_values((num_items > 0) | (tokens == 0), f"{name} must be above 0 where labels count")
        return torch.where(tokens == 0, 1, num_items)
    if not is_number(num_items) or not 0 <= num_items < HUGE:
        raise InputError(f"{name} must be a number above 0, got {num_items!r}")
    if num_items == 0:
        require_values(tokens == 0, f"{name} must be above 0 where labels count, got 0")
        return 1
    return num_items


def _autocast(hidden: Tensor | None, weight: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    if hidden is None or weight is None or not torch.is_autocast_enabled(hidden.device.type):
        return hidden, weight
    dtype = torch.get_autocast_dtype(hidden.device.type)
    return hidden.to(dtype), weight.to(dtype)
