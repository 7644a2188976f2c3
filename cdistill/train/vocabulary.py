"""Losses over the vocabulary: from hidden states of labelled tokens and the heads of both models, never from whole logits
where there is a divergence."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cdistill.choices import KDConfig
from cdistill.data.tokens import Vocabularies
from cdistill.errors import InputError
from cdistill.models.load import Model
from cdistill.models.logits import AfterHead, after_head
from cdistill.models.parts import head_of
from cdistill.ops import linear_distillation
from cdistill.train.inside import KEYWORD, instead_of_forward, make_replaceable
from cdistill.train.left_out import hook_of_others
from cdistill.train.span_losses import Head, Side, span_losses
from cdistill.train.step import Signal, Step

MODULE = "vocabulary_losses"  # of a term that makes cross-entropy and divergence together
_WHOLE = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # dtypes whose values are the weights
_ENGINES = {"torch", "deepspeed", "accelerate", "transformers"}  # their hooks move weights and leave results alone


class VocabularyLosses(nn.Module):
    """Cross-entropy and divergence from the hidden states of labelled tokens and the heads of both models.

    A module of its own, because ZeRO-3 gathers a parameter around the module that reads it: here once before all chunks,
    and not for the whole forward pass. ``loss_weights`` are those with which the two will be added, by default 1 and
    ``kd.weight``.
    """

    def __init__(
        self,
        kd: KDConfig,
        student: AfterHead = AfterHead(),  # noqa: B008
        teacher: AfterHead = AfterHead(),  # noqa: B008
        loss_weights: tuple[float, float] | None = None,
    ) -> None:
        super().__init__()
        self.kd, self.student, self.teacher = kd, student, teacher
        self.loss_weights = loss_weights or (1.0, kd.weight)

    def forward(
        self,
        hidden: Tensor,
        head: nn.Linear,
        teacher_hidden: Tensor | None,
        teacher_head: nn.Linear | None,
        labels: Tensor,
        topk: tuple[Tensor, Tensor] | None = None,
        vocabulary: int | None = None,
        shares: Tensor | None = None,
        reference: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Sums of L_ar and L_kd over labels (N,), of hidden (N,Hs) and teacher_hidden (N,Ht), or the teacher's ``topk``.

        ``shares`` (N,) are factors of the rows in both sums, without gradient, 1 by default.
        ``reference`` (N,) bool are the rows of which L_ar is taken, by default all.
        The student's head counts as far as ``vocabulary``, beyond which it is padding for a teacher that is not here.
        """
        device = hidden.device.type
        if torch.is_autocast_enabled(device):  # as for any linear layer; norms leave fp32 behind
            dtype = torch.get_autocast_dtype(device)
            hidden = hidden.to(dtype)
            teacher_hidden = None if teacher_hidden is None else teacher_hidden.to(dtype)
        weight: Tensor = head.weight
        bias: Tensor | None = head.bias
        if vocabulary is not None and vocabulary < len(weight):
            weight, bias = weight[:vocabulary], None if bias is None else bias[:vocabulary]
        heads = (
            weight.to(hidden.dtype),
            None if teacher_hidden is None or teacher_head is None else teacher_head.weight.to(teacher_hidden),
        )
        losses = partial(
            linear_distillation,
            divergence=self.kd.divergence,
            temperature=self.kd.temperature,
            beta=self.kd.beta,
            student_bias=bias,
            teacher_bias=None
            if teacher_head is None or teacher_head.bias is None
            else teacher_head.bias.to(hidden.device),
            student_logit_scale=self.student.factor,
            student_logit_softcap=self.student.softcap,
            teacher_logit_scale=self.teacher.factor,
            teacher_logit_softcap=self.teacher.softcap,
        )
        if reference is None:
            signal: dict[str, Any] = {"teacher_topk": topk, "loss_weights": self.loss_weights, "weights": shares}
            result = losses(hidden, heads[0], teacher_hidden, heads[1], labels, **signal)
            return result.ce, result.kd
        assert teacher_hidden is not None  # of a reply nothing is cached
        ce = kd = hidden.new_zeros((), dtype=torch.float32)
        for rows, answers in ((reference, True), (~reference, False)):
            rows = rows.nonzero().squeeze(1)
            if len(rows):
                weights = self.loss_weights if answers else (0.0, 1.0)
                part = losses(
                    hidden[rows], heads[0], teacher_hidden[rows], heads[1], labels[rows], loss_weights=weights
                )
                ce, kd = part.ce if answers else ce, kd + part.kd
        return ce, kd


class SpanLosses(nn.Module):
    """Cross-entropy, and what `span_losses` compares of two models with different tokenizers; else as `VocabularyLosses`."""

    def __init__(self, kd: KDConfig, vocabularies: Vocabularies, student: AfterHead, teacher: AfterHead) -> None:
        super().__init__()
        self.kd, self.vocabularies, self.student, self.teacher = kd, vocabularies, student, teacher

    def forward(self, head: nn.Linear, teacher_head: nn.Linear, ours: Side, theirs: Side) -> tuple[Tensor, Tensor]:
        """Sums of L_ar over the student's labels, and of L_kd over spans."""
        device = ours.hidden.device
        if torch.is_autocast_enabled(device.type):
            dtype = torch.get_autocast_dtype(device.type)
            ours, theirs = (side._replace(hidden=side.hidden.to(dtype)) for side in (ours, theirs))
        self.vocabularies = self.vocabularies.to(device)
        sizes = self.vocabularies.student, self.vocabularies.teacher
        with torch.autocast(device.type, enabled=False):
            return span_losses(
                ours,
                Head(head.weight, head.bias, self.student, sizes[0]),
                theirs,
                Head(teacher_head.weight.to(device), teacher_head.bias, self.teacher, sizes[1]),
                self.vocabularies,
                self.kd,
                (1.0, self.kd.weight),
            )


class WeightedLosses(nn.Module):
    """Cross-entropy, and the divergences from several teachers by the weights of labels; else as `VocabularyLosses`.

    Where a label's first teacher has weight 1, its cross-entropy is made together with that divergence, elsewhere by itself.
    """

    def __init__(self, kd: KDConfig, student: AfterHead) -> None:
        super().__init__()
        self.kd, self.student = kd, student

    def forward(
        self,
        hidden: Tensor,
        head: nn.Linear,
        teachers: Sequence[tuple[Tensor, nn.Linear, AfterHead] | None],
        labels: Tensor,
        weights: Tensor,
        reference: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Sums of L_ar and weighted L_kd over labels (N,), and of the latter the part of each teacher (detached).

        ``teachers`` are their hidden states (N, d_T), heads and what they do to logits, None for one without weight;
        ``weights`` is (N, teachers).
        """
        left = torch.ones_like(labels, dtype=torch.bool) if reference is None else reference.clone()
        ce: Any = 0.0
        kds: list[Any] = [0.0] * len(teachers)

        def add(i: int | None, which: Tensor, factors: tuple[float, float], shares: Tensor | None) -> Tensor | None:
            """The cross-entropy of some labels; their divergence from a teacher joins its sum."""
            rows = which.nonzero().squeeze(1)
            if not len(rows) and i is not None:
                return None
            of = teachers[i] if i is not None else None
            whole = len(rows) == len(labels)
            pick = (lambda x: x) if whole else (lambda x: x[rows])
            theirs = None if of is None else pick(of[0])
            losses = VocabularyLosses(self.kd, self.student, AfterHead() if of is None else of[2], factors)
            taken = None if shares is None else pick(shares)
            made = losses(pick(hidden), head, theirs, None if of is None else of[1], pick(labels), shares=taken)
            if i is not None:
                kds[i] = made[1] + kds[i]
            return made[0]

        for i, teacher in enumerate(teachers):
            if teacher is None:
                continue
            share = weights[:, i]
            together = left & (share == 1)
            made = add(i, together, (1.0, self.kd.weight), None)
            ce = ce if made is None else made + ce
            add(i, (share > 0) & ~together, (0.0, 1.0), share)
            left = left & ~together
        if isinstance(ce, float) or bool(left.any()):
            ce = add(None, left, (1.0, 0.0), None) + ce
        zero = ce.detach() * 0
        parts = torch.stack([zero if isinstance(kd, float) else kd.detach() for kd in kds])
        made_kds = [kd for kd in kds if not isinstance(kd, float)]
        return ce, sum(made_kds[1:], made_kds[0]) if made_kds else zero, parts


def cross_entropy(step: Step) -> Tensor:
    """Sum of the cross-entropy over the labels of a batch, made with the divergence where a term asks for that."""
    if MODULE in step.modules:
        return _both(step)[0]
    hidden, targets = step.hidden, step.targets
    if step.reference is not None:
        hidden, targets = hidden[step.reference], targets[step.reference]
    logits = after_head(step.student)(head_of(step.student)(hidden))
    return F.cross_entropy(logits.float(), targets, reduction="sum")


def divergence(step: Step) -> Tensor:
    """Sum of the divergence over the labels of a batch."""
    return _both(step)[1]


def _both(step: Step) -> tuple[Tensor, Tensor]:
    """Both sums, made by the first term that asks."""
    if MODULE in step.shared:
        return step.shared[MODULE]
    head, losses, teacher, targets = head_of(step.student), step.modules[MODULE], step.teacher, step.targets
    assert teacher is not None
    make_replaceable(head)  # what gathers its weight is a hook on its call
    made: Any
    spans = step.spans
    if teacher.parts:
        made = _of_several(step, head, losses, teacher.parts)
    elif spans is not None:
        assert teacher.head is not None and teacher.hidden is not None
        view = step.teacher_view
        ours = Side(step.hidden, targets, spans[0].flatten()[step.places + 1])
        other = Side(teacher.hidden, view.targets, spans[1].flatten()[view.places + 1])
        with teacher.head() as theirs:
            made = head(step.hidden, **instead_of_forward(lambda _: losses(head, theirs, ours, other)))
    elif teacher.topk is not None:
        known, topk = teacher.vocabulary, teacher.topk
        made = head(step.hidden, **instead_of_forward(lambda x: losses(x, head, None, None, targets, topk, known)))
    else:
        assert teacher.head is not None
        with teacher.head() as theirs:
            given = partial(losses, reference=step.reference)
            made = head(step.hidden, **instead_of_forward(lambda x: given(x, head, teacher.hidden, theirs, targets)))
    step.shared[MODULE] = made
    return made


def _of_several(
    step: Step, head: nn.Module, losses: nn.Module, parts: Sequence[Signal | None]
) -> tuple[Tensor, Tensor]:
    """Both sums of several teachers, whose own parts are left for the term that tells them."""
    with ExitStack() as opened:
        teachers = [
            None
            if part is None or part.head is None
            else (part.hidden, opened.enter_context(part.head()), part.after_head or AfterHead())
            for part in parts
        ]
        given = partial(losses, labels=step.targets, weights=step.label_weights, reference=step.reference)
        ce, kd, of_teachers = head(step.hidden, **instead_of_forward(lambda x: given(x, head, teachers)))
    step.shared["kd_teachers"] = of_teachers
    return ce, kd


def after_heads(student: Model, teacher: Model | None) -> tuple[AfterHead, AfterHead]:
    """What both models do to their logits; nothing for a teacher that is not here."""
    return after_head(student), AfterHead() if teacher is None else after_head(teacher)


def visual_losses(kd: KDConfig, student: Model, teacher: Model | None) -> VocabularyLosses:
    """What `visual_divergence` calls, as a module of a term."""
    return VocabularyLosses(kd, *after_heads(student, teacher), loss_weights=(0.0, 1.0))


def visual_divergence(step: Step, module: str, shares: Tensor) -> Tensor:
    """Sum of the divergence over the visual tokens of a batch, each multiplied by its share (M,), without gradient.

    ``module`` is the name of the term's `visual_losses`.
    """
    head, losses, teacher = head_of(step.student), step.modules[module], step.teacher
    assert teacher is not None and teacher.visual is not None and teacher.head is not None
    theirs, none = teacher.visual, torch.zeros(len(shares), dtype=torch.int64, device=shares.device)
    make_replaceable(head)
    with teacher.head() as of_teacher:
        made: Any = head(
            step.visual, **instead_of_forward(lambda x: losses(x, head, theirs, of_teacher, none, shares=shares))
        )
    return made[1]


def require_plain_heads(student: Model, teacher: Model | None) -> None:
    """As `require_plain_head`, of both models whose heads a divergence reads."""
    require_plain_head(student, "student", linear=True)
    if teacher is not None:
        require_plain_head(teacher, "teacher", linear=True)


def require_plain_head(model: Model, side: str, *, linear: bool) -> None:
    """Raise ValueError unless logits are what `after_head` makes of the head's, and (``linear``) it is its weight."""
    head = head_of(model)
    after_head(model, side)
    if not linear:
        return
    if not (isinstance(head, nn.Linear) and type(head).forward is nn.Linear.forward):
        raise InputError(
            f"the {side}'s lm_head must be a torch.nn.Linear for the KD loss, got {type(head).__module__}."
            f"{type(head).__qualname__}: leave lm_head out of LoRA's target_modules and modules_to_save and out of quantisation"
        )
    weight = head.weight
    if not (type(weight).__module__.startswith("torch.") and weight.dtype in _WHOLE):
        raise InputError(
            f"the {side}'s lm_head has a quantised weight ({type(weight).__qualname__}, {weight.dtype}): leave lm_head out of "
            "quantisation for the KD loss"
        )
    added = _added(head)
    if added is not None:
        raise InputError(
            f"the {side}'s lm_head has {added}, which the KD loss, taken from its weight, would leave out: remove it"
        )


def _added(head: nn.Module) -> str | None:
    """What somebody has put around the forward pass of a head, other than what moves its weights; None if nothing."""
    forward = vars(head).get("forward")
    if forward is not None and not hasattr(forward, KEYWORD) and not hasattr(head, "_hf_hook"):
        return "a forward pass of its own"
    return hook_of_others((*head._forward_pre_hooks.values(), *head._forward_hooks.values()), _ENGINES)
