"""Distillation across vocabularies: what two models predict for the spans of an answer, in chunks of their logits.

A span is a stretch of the answer where the tokens of both tokenizers begin and end together: tokens s_1..s_a of the student,
t_1..t_b of the teacher, with P = prod p(s_i | s_<i) and Q = prod q(t_j | t_<j), the probabilities of its text.

``merged``, after GOLD (Patino et al. 2025): where the span begins both models choose among the outcomes "the span", each token
that both vocabularies have, and "something else". The first has P and Q, the others the probabilities of the first position;
what of p(s_1) does not go on as the span does, p(s_1) - P, is something else. Their divergence is that of ``kd``. To it is
added the ULD distance of the tokens that only one vocabulary has. With one vocabulary every span is a token, nothing is left
over, and the loss is plain KD.

``uld`` (Boizard et al. 2024): p and q of the last position, times the probabilities of the tokens before it, both sorted;
sum |p - q|, the shorter one padded by zeros. Vocabularies need have nothing in common.

Logits exist for a chunk of spans at a time; gradients are made with them in the forward pass, like those of
`cdistill.ops.linear_distillation`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cdistill.choices import KDConfig
from cdistill.data.tokens import Vocabularies
from cdistill.models.logits import AfterHead

CHUNK_NUMBERS = {"cpu": 1 << 21, "cuda": 1 << 23}  # logits of both models at a time, of which some ten copies exist
SAME_RATIO = 1e-6
LEAST = 2.0**-126  # whose logarithm stands for that of no probability


class Side(NamedTuple):
    """One model's labelled tokens, sorted by span."""

    hidden: Tensor  # (N, H)
    labels: Tensor  # (N,)
    spans: Tensor  # (N,) from 1 on; 0: in none


class Head(NamedTuple):
    """What makes logits of hidden states."""

    weight: Tensor
    bias: Tensor | None
    after: AfterHead
    size: int  # tokens, beyond which the weight is padding

    def __call__(self, hidden: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias[: self.size].to(hidden.dtype)
        logits = self.after(F.linear(hidden, self.weight[: self.size].to(hidden.dtype), bias))
        return logits if logits.dtype == torch.float64 else logits.float()


class Losses(NamedTuple):
    """What `span_losses` adds up, of tensors of one chunk or of all."""

    ce: Tensor
    kd: Tensor


class _Problem(NamedTuple):
    student: Side
    teacher: Side
    head: Head
    teacher_head: Head
    vocabularies: Vocabularies
    kd: KDConfig


def span_losses(
    student: Side,
    head: Head,
    teacher: Side,
    teacher_head: Head,
    vocabularies: Vocabularies,
    kd: KDConfig,
    loss_weights: tuple[float, float] = (1.0, 1.0),
) -> Losses:
    """Sums of the cross-entropy over the student's labels (N,), and over spans of their divergence, in nats (ULD: no unit).

    Args:
        student, teacher: their labelled tokens: hidden states (N, Hs) and (M, Ht) at the places that predict them, labels,
            and spans, those of one number consecutive; a span on one side alone does not count.
        head, teacher_head: their heads; the teacher gets no gradient.
        vocabularies: which tokens say the same, on the device of the hidden states.
        kd: alignment (``merged`` or ``uld``), divergence and beta (of merged), temperature.
        loss_weights: with which the two will be added; another ratio in the backward pass computes everything again.

    Returns:
        Sums differentiable once in the student's hidden states, weight and bias. Beside gradients the function holds the logits
        of one chunk. Waits for the device once a pass.
    """
    both = [_sorted(side) for side in (student, teacher)]
    problem = _Problem(both[0], both[1]._replace(hidden=both[1].hidden.detach()), head, teacher_head, vocabularies, kd)
    ce, kd_sum = _SpanLosses.apply(problem.student.hidden, head.weight, head.bias, problem, loss_weights)
    return Losses(ce, kd_sum)


def _sorted(side: Side) -> Side:
    """By span, those in none first."""
    order = side.spans.argsort(stable=True)
    return Side(side.hidden[order], side.labels[order], side.spans[order])


class _SpanLosses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        problem: _Problem,
        weights: tuple[float, float],
    ) -> tuple[Tensor, Tensor]:
        wanted = ctx.needs_input_grad[:3]
        losses, gradients = _computed(
            problem._replace(student=problem.student._replace(hidden=hidden)), weights, wanted
        )
        ctx.problem, ctx.weights, ctx.wanted = problem, weights, wanted
        ctx.save_for_backward(hidden, weight, bias, *gradients)
        return losses.ce, losses.kd

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dce: Tensor, dkd: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, *gradients = ctx.saved_tensors
        upstream = torch.stack((dce, dkd)).tolist()
        leading = 0 if abs(ctx.weights[0]) >= abs(ctx.weights[1]) else 1
        factor = upstream[leading] / ctx.weights[leading]
        other = factor * ctx.weights[1 - leading]
        if abs(upstream[1 - leading] - other) > SAME_RATIO * max(abs(other), abs(upstream[leading])):
            problem = ctx.problem
            problem = problem._replace(
                student=problem.student._replace(hidden=hidden), head=problem.head._replace(weight=weight, bias=bias)
            )
            _, gradients = _computed(problem, (upstream[0], upstream[1]), ctx.wanted)
            factor = 1.0
        found = [
            None if not wanted else (gradient * factor).to(like.dtype)
            for wanted, gradient, like in zip(ctx.wanted, gradients, (hidden, weight, bias), strict=True)
        ]
        return *found, None, None


def _computed(
    problem: _Problem, weights: tuple[float, float], wanted: tuple[bool, ...]
) -> tuple[Losses, list[Tensor | None]]:
    """Both sums, and the gradients of weights[0] * ce + weights[1] * kd in hidden states, weight and bias that are wanted."""
    hidden, head = problem.student.hidden, problem.head
    exact = hidden.dtype if hidden.dtype == torch.float64 else torch.float32
    sums = hidden.new_zeros(2, dtype=exact)
    leaves = [hidden, head.weight, head.bias]
    made = [
        torch.zeros_like(leaf, dtype=exact) if want and leaf is not None else None
        for leaf, want in zip(leaves, wanted, strict=True)
    ]
    for ours, theirs in _chunks(problem):
        with torch.enable_grad():
            part = hidden[ours].detach().requires_grad_(wanted[0])
            weight = head.weight.detach().requires_grad_(wanted[1])
            bias = None if head.bias is None else head.bias.detach().requires_grad_(wanted[2])
            losses = _of_chunk(problem, part, head._replace(weight=weight, bias=bias), ours, theirs)
            total = weights[0] * losses.ce + weights[1] * losses.kd
        sums += torch.stack((losses.ce.detach(), losses.kd.detach()))
        asked = [
            x for x, target in zip((part, weight, bias), made, strict=True) if target is not None and x is not None
        ]
        if not asked:
            continue
        targets = [None if made[0] is None else made[0][ours], *made[1:]]
        found = torch.autograd.grad(total, asked)
        for target, gradient in zip([x for x in targets if x is not None], found, strict=True):
            target += gradient
    return Losses(*sums.unbind()), made


def _chunks(problem: _Problem) -> Iterator[tuple[slice, slice]]:
    """Rows of student and teacher that are worked on together: whole spans, in order."""
    counts = [side.spans.tolist() for side in (problem.student, problem.teacher)]
    room = CHUNK_NUMBERS["cuda" if problem.student.hidden.is_cuda else "cpu"]
    sizes = (problem.head.size, problem.teacher_head.size)
    starts, here = [0, 0], [0, 0]
    while any(i < len(of) for i, of in zip(here, counts, strict=True)):
        span = min(of[i] for i, of in zip(here, counts, strict=True) if i < len(of))
        ends = []
        for i, of in zip(here, counts, strict=True):
            end = i + (1 if span == 0 and i < len(of) and of[i] == 0 else 0)  # rows in no span are one by one
            while span and end < len(of) and of[end] == span:
                end += 1
            ends.append(end)
        if here != starts and sum((e - s) * v for e, s, v in zip(ends, starts, sizes, strict=True)) > room:
            yield slice(starts[0], here[0]), slice(starts[1], here[1])
            starts = here
        here = ends
    if here != starts:
        yield slice(starts[0], here[0]), slice(starts[1], here[1])


class _Predictions(NamedTuple):
    """What one model predicts in the spans of a chunk."""

    log_p: Tensor  # (n, V)
    first: Tensor  # (c,) rows where the spans begin
    last: Tensor  # (c,) and end
    token: Tensor  # (c,) the first tokens
    whole: Tensor  # (c,) log-probability of the spans
    final: Tensor  # (c,) that of their last tokens


def _of_chunk(problem: _Problem, part: Tensor, head: Head, ours: slice, theirs: slice) -> Losses:
    labels, spans = problem.student.labels[ours], problem.student.spans[ours]
    their_spans = problem.teacher.spans[theirs]
    logits = head(part)
    ce = F.cross_entropy(logits, labels, reduction="sum")
    common = spans[torch.isin(spans, their_spans) & (spans > 0)].unique()
    if not len(common):
        return Losses(ce, ce * 0.0)
    temperature = problem.kd.temperature
    student = _predictions(logits / temperature, labels, spans, common)
    with torch.no_grad():
        theirs_logits = problem.teacher_head(problem.teacher.hidden[theirs]).to(logits.dtype) / temperature
        teacher = _predictions(theirs_logits, problem.teacher.labels[theirs], their_spans, common)
    if problem.kd.alignment == "uld":
        return Losses(ce, _l1_of_sorted(*(_merged_last(x) for x in (student, teacher))))
    return Losses(ce, _merged(student, teacher, problem.vocabularies, problem.kd))


def _predictions(logits: Tensor, labels: Tensor, spans: Tensor, common: Tensor) -> _Predictions:
    log_p = logits.log_softmax(1)
    said = log_p.gather(1, labels[:, None])[:, 0]
    first = torch.searchsorted(spans, common)
    last = torch.searchsorted(spans, common, right=True) - 1
    at = first[:, None] + torch.arange(int((last - first).max()) + 1, device=said.device)
    whole = said[at.clamp(max=len(said) - 1)].masked_fill(at > last[:, None], 0.0).sum(1)  # in a fixed order
    return _Predictions(log_p, first, last, labels[first], whole, said[last])


def _merged_last(of: _Predictions) -> Tensor:
    """(c, V) probabilities of the last position together with the tokens before it."""
    return (of.log_p[of.last] + (of.whole - of.final)[:, None]).exp()


def _l1_of_sorted(p: Tensor, q: Tensor) -> Tensor:
    p, q = (x.sort(dim=1, descending=True).values for x in (p, q))
    width = max(p.shape[1], q.shape[1])
    return (F.pad(p, (0, width - p.shape[1])) - F.pad(q, (0, width - q.shape[1]))).abs().sum()


def _merged(student: _Predictions, teacher: _Predictions, vocabularies: Vocabularies, kd: KDConfig) -> Tensor:
    contexts = vocabularies.student_spaces[student.token].long() - vocabularies.teacher_spaces[teacher.token].long()
    total = student.whole.new_zeros(())
    for context in contexts.unique().tolist():
        rows = contexts == context
        total = total + _in_context(_taken(student, rows), _taken(teacher, rows), vocabularies.matches[context], kd)
    return total


def _taken(of: _Predictions, rows: Tensor) -> _Predictions:
    """Of some spans: ``log_p`` at their first positions."""
    first = of.first[rows]
    return _Predictions(of.log_p[first], first, of.last[rows], of.token[rows], of.whole[rows], of.final[rows])


def _in_context(student: _Predictions, teacher: _Predictions, matches: Tensor, kd: KDConfig) -> Tensor:
    sides = (student, teacher)
    hits = [matches[i] == side.token[:, None] for i, side in enumerate(sides)]  # (c, K) the pair with the first token
    taken = hits[0] | hits[1]
    outcomes, rests = [], []
    for side, ids, own, other in zip(sides, matches, hits, reversed(hits), strict=True):
        common = side.log_p[:, ids]
        only = torch.ones_like(side.log_p, dtype=torch.bool)
        only[:, ids] = False
        only.scatter_(1, side.token[:, None], False)
        columns = only.any(0).nonzero()[:, 0]
        alone = side.log_p[:, columns].exp() * only[:, columns]
        # its own token for what the other side begins the span with, where that is not what it begins it with itself
        left = (common.exp() * (other & ~own)).sum(1, keepdim=True)
        rests.append(torch.cat((alone, left), 1))
        begun = side.log_p.gather(1, side.token[:, None])[:, 0]
        unlike = begun.exp() * -torch.expm1((side.whole - begun).clamp(max=0.0))
        tail = rests[-1].sum(1) + unlike
        logs = torch.cat((common.masked_fill(taken, 0.0), side.whole[:, None], tail.clamp(min=LEAST).log()[:, None]), 1)
        p = torch.cat((common.exp().masked_fill(taken, 0.0), side.whole.exp()[:, None], tail[:, None]), 1)
        outcomes.append((logs, p))
    return _divergence(outcomes[0], outcomes[1], kd) + _l1_of_sorted(rests[0], rests[1])


def _divergence(student: tuple[Tensor, Tensor], teacher: tuple[Tensor, Tensor], kd: KDConfig) -> Tensor:
    """Of outcomes' log-probabilities and probabilities (c, K), those that do not count having 0 of both."""
    (log_p, p), (log_q, q) = student, teacher
    if kd.divergence == "forward_kl":
        return (q * (log_q - log_p)).sum()
    if kd.divergence == "reverse_kl":
        return (p * (log_p - log_q)).sum()
    beta = kd.beta
    log_m = torch.logaddexp(log_p + math.log(1 - beta), log_q + math.log(beta))
    return (beta * q * (log_q - log_m) + (1 - beta) * p * (log_p - log_m)).sum()
