"""DistillationHead and the losses by Liger's and TRL's names: against float64 formulas and Liger's own chunked loss."""

import math

import pytest
import torch
import torch.nn.functional as F
from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss as OfLiger

from cdistill.nn import (
    DistillationHead,
    LigerFusedLinearCrossEntropyLoss,
    LigerFusedLinearJSDLoss,
    generalized_jsd_loss,
)

N, H, V = 20, 16, 50


@pytest.fixture
def drawn():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(V, (N,), generator=generator)
    labels[3:7] = -100
    shapes = {"hidden": (N, H), "weight": (V, H), "bias": (V,), "teacher_hidden": (N, 24), "teacher_weight": (V, 24)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()} | {"labels": labels}


def leaves(drawn, dtype=torch.float32):
    return [drawn[name].detach().clone().to(dtype).requires_grad_() for name in ("hidden", "weight", "bias")]


def divergence(student, teacher, beta):
    """(n,) of logits: the generalised JSD, at its ends the two KLs."""
    p, q = student.log_softmax(-1), teacher.log_softmax(-1)
    if beta in (0, 1):
        p, q = (p, q) if beta == 0 else (q, p)
        return (q.exp() * (q - p)).sum(-1)
    m = torch.stack([p + math.log(1 - beta), q + math.log(beta)]).logsumexp(0)
    return beta * (q.exp() * (q - m)).sum(-1) + (1 - beta) * (p.exp() * (p - m)).sum(-1)


def close(ours, theirs, tolerance=1e-5):
    for found, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(found.double(), expected.double(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("beta", [0, 0.3, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_jsd_is_ligers(drawn, beta, temperature, dtype):
    found = []
    for kind in (OfLiger, LigerFusedLinearJSDLoss):
        options = {"temperature": temperature, "compiled": False, "chunk_size": 8, "return_soft_hard_loss": True}
        module = kind(0.3, 0.7, beta, **options)
        hidden, weight, bias = leaves(drawn, dtype)
        teacher = (drawn[name].to(dtype) for name in ("teacher_hidden", "teacher_weight"))
        results = module(hidden, weight, *teacher, drawn["labels"], bias)
        results[0].backward()
        found.append([*(x.detach() for x in results), hidden.grad, weight.grad, bias.grad])
    close(found[1], found[0], 1e-5 if dtype == torch.float32 else 0.05)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_cross_entropy_is_that_of_whole_logits(drawn, reduction, softcap):
    found = []
    for exact in (False, True):
        hidden, weight, bias = leaves(drawn, torch.float64 if exact else torch.float32)
        if exact:
            logits = F.linear(hidden, weight, bias)
            logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
            loss = F.cross_entropy(logits, drawn["labels"], reduction=reduction)
        else:
            loss = LigerFusedLinearCrossEntropyLoss(reduction=reduction, softcap=softcap)(
                weight, hidden, drawn["labels"], bias
            )
        loss.backward(torch.linspace(-1, 2, loss.numel(), dtype=loss.dtype).view_as(loss))
        found.append([loss.detach(), hidden.grad, weight.grad, bias.grad])
    close(*found)


def test_what_ligers_cross_entropy_can_and_ours_cannot_is_refused():
    for name, value in (("label_smoothing", 0.1), ("lse_square_scale", 1e-4), ("return_z_loss", True)):
        with pytest.raises(ValueError, match=f"{name} is not supported"):
            LigerFusedLinearCrossEntropyLoss(**{name: value})


@pytest.mark.parametrize("reduction", ["batchmean", "sum", "mean", "none", "num_items"])
@pytest.mark.parametrize("beta", [0, 0.2, 1])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("top_k", [0, 5])
def test_jsd_of_logits_is_trls(reduction, beta, masked, top_k):
    generator = torch.Generator().manual_seed(1)
    student, teacher = torch.randn(2, 2, 3, 40, generator=generator)
    labels = torch.tensor([[1, -100, 3], [2, 2, -100]]) if masked else None
    found = []
    for exact in (False, True):
        s, t = student.to(torch.float64 if exact else torch.float32).requires_grad_(), teacher
        if exact:
            given, other = s / 1.5, t.double() / 1.5
            if top_k:
                given, other = (x.gather(-1, t.topk(top_k).indices) for x in (given, other))
            rows = divergence(given, other, beta)
            rows = rows if labels is None else rows[labels != -100]
            over = {"mean": rows.numel() * given.shape[-1], "batchmean": len(rows), "num_items": 7}
            loss = rows.sum() / over.get(reduction, 1)
        else:
            global_count = {"num_items_in_batch": torch.tensor(7)} if reduction == "num_items" else {}
            named = reduction if reduction != "num_items" else "batchmean"
            loss = generalized_jsd_loss(s, t, labels, beta, 1.5, named, **global_count, top_k=top_k)
            if reduction == "none":  # terms, whose sum is compared
                assert loss.shape == (*((2, 3) if labels is None else (4,)), top_k or 40)
                loss = loss.sum()
        found.append([loss.detach(), *torch.autograd.grad(loss, s)])
    close(*found)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_a_causal_models_hidden_states_predict_the_next_label(drawn, reduction):
    """(B,T,H) with shift, with a global count of labels, is the same rows flat."""
    head = DistillationHead(kd_weight=0.5, divergence="jsd", beta=0.2, reduction=reduction, shift=True)
    whole = {name: x.view(2, 10, -1) if len(x) == N else x for name, x in drawn.items()}
    labels = whole.pop("labels")[..., 0]
    count = {"num_items": torch.tensor(40)} if reduction == "mean" else {}
    whole["hidden"].requires_grad_()
    found = head(**whole, labels=labels, **count)
    found.loss.sum().backward()
    hidden = whole["hidden"].detach().double().requires_grad_()
    logits = F.linear(hidden, drawn["weight"].double(), drawn["bias"].double())[:, :-1]
    taught = F.linear(whole["teacher_hidden"].double(), drawn["teacher_weight"].double())[:, :-1]
    after = labels[:, 1:]
    ce = F.cross_entropy(logits.transpose(1, 2), after, reduction="none")
    rows = ce + 0.5 * divergence(logits, taught, 0.2) * (after != -100)
    expected = {"mean": rows.sum() / 40, "sum": rows.sum(), "none": rows}[reduction]
    expected.sum().backward()
    close([found.loss.detach(), whole["hidden"].grad], [expected.detach(), hidden.grad])
    assert found.tokens == (after != -100).sum()


def test_without_a_label_that_counts_the_loss_is_0_with_gradient_0(drawn):
    for reduction, items in (("mean", None), ("mean", 0), ("mean", torch.tensor(0)), ("sum", None), ("none", None)):
        hidden, weight, bias = leaves(drawn)
        head = DistillationHead(reduction=reduction)
        loss = head(hidden, weight, torch.full((N,), -100), bias=bias, num_items=items).loss
        loss.sum().backward()
        assert (loss == 0).all() and all((x.grad == 0).all() for x in (hidden, weight, bias))


def test_a_global_count_of_0_divides_nothing(drawn):
    ignored = torch.full((N,), -100)
    assert generalized_jsd_loss(drawn["hidden"], drawn["hidden"] * 2, ignored, num_items_in_batch=0) == 0


def test_an_infinite_loss_of_weight_0_has_no_part(drawn):
    hidden, weight, bias = leaves(drawn)
    labels = drawn["labels"].clamp(max=V - 2)
    with torch.no_grad():
        bias[V - 1] = -torch.inf  # of a token that is no label: the divergence alone is infinite
    teacher = {name: drawn[name] for name in ("teacher_hidden", "teacher_weight")}
    found = DistillationHead(kd_weight=0.0, reduction="none")(hidden, weight, labels, bias=bias, **teacher)
    assert not found.kd[0].isfinite()
    torch.testing.assert_close(found.loss, F.cross_entropy(hidden @ weight.T + bias, labels, reduction="none"))


def test_divergence_alone_needs_no_labels(drawn):
    hidden, weight, _ = leaves(drawn)
    teacher = {name: drawn[name] for name in ("teacher_hidden", "teacher_weight")}
    found = DistillationHead(ce_weight=0.0, temperature=2.0)(hidden, weight, **teacher)
    logits, taught = hidden.double() @ weight.double().T, teacher["teacher_hidden"] @ teacher["teacher_weight"].T
    torch.testing.assert_close(found.loss.double(), divergence(logits / 2, taught.double() / 2, 0).mean())
    assert found.tokens == N


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_without_labels_all_tokens_count_whatever_is_ignored(drawn, reduction):
    arguments = {name: drawn[name] for name in ("hidden", "weight", "teacher_hidden", "teacher_weight")}
    plain, other = (
        DistillationHead(ce_weight=0.0, reduction=reduction, ignore_index=ignored)(**arguments) for ignored in (-100, 0)
    )
    assert torch.equal(other.loss, plain.loss) and other.loss.any() and other.tokens == N
    assert not plain.ce.any() and not other.ce.any()


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_logits_of_two_dtypes_are_compared_in_the_one_that_holds_both(drawn, reduction):
    student, teacher = drawn["hidden"], drawn["teacher_hidden"][:, :H].bfloat16()
    loss = generalized_jsd_loss(student, teacher, reduction=reduction)
    torch.testing.assert_close(loss.sum().double(), divergence(student.double(), teacher.double(), 0.5).sum())


def test_weights_of_tokens_and_autocast(drawn):
    hidden, weight, _ = leaves(drawn)
    weights = torch.linspace(0, 2, N)
    with torch.autocast("cpu", torch.bfloat16):
        found = DistillationHead(kd_weight=0.0)(hidden, weight, drawn["labels"], weights=weights)
    found.loss.backward()
    rows = F.cross_entropy(hidden @ weight.T, drawn["labels"], reduction="none")
    expected = (rows * weights).sum() / (drawn["labels"] != -100).sum()
    torch.testing.assert_close(found.loss, expected, rtol=0.02, atol=0.02)
    assert hidden.grad.dtype == torch.float32


def test_what_cannot_be_right_is_refused(drawn):
    hidden, weight, labels = drawn["hidden"], drawn["weight"], drawn["labels"]
    for options, message in (
        ({"reduction": "avg"}, "reduction must be one of mean, sum, none, got 'avg'"),
        ({"divergence": "kl"}, "divergence must be one of forward_kl, reverse_kl, jsd, got 'kl'"),
        ({"ce_weight": 0.0, "kd_weight": 0.0}, "ce_weight and kd_weight must not both be 0"),
        ({"beta": 1.5}, "beta must be from 0 to 1, got 1.5"),
        ({"ce_weight": float("nan")}, "ce_weight must be a finite number, got nan"),
        ({"kd_weight": "2"}, "kd_weight must be a finite number, got '2'"),
        ({"shift": "no"}, "shift must be True or False, got 'no'"),
        ({"softcap": 3.0}, "softcap: no option of DistillationHead"),
    ):
        with pytest.raises(ValueError, match=message):
            DistillationHead(**options)
    for head, given, message in (
        (DistillationHead(ce_weight=0.0), {"labels": labels}, "a teacher must be given where ce_weight is 0"),
        (DistillationHead(), {"labels": None}, "labels must be given where ce_weight is not 0"),
        (DistillationHead(), {"labels": labels[:-1]}, r"hidden must have the shape of labels \(19,\), got \(20, 16\)"),
        (DistillationHead(reduction="sum"), {"labels": labels, "num_items": 3}, "num_items is what a mean divides by"),
        (DistillationHead(), {"labels": labels, "num_items": -3}, "num_items must be a number above 0, got -3"),
        (DistillationHead(), {"labels": labels, "num_items": 0}, "num_items must be above 0 where labels count"),
        (DistillationHead(), {"labels": labels, "num_items": torch.tensor(-3)}, "num_items must be above 0"),
        (DistillationHead(), {"labels": labels, "num_items": torch.ones(2)}, "num_items must be one number"),
        (DistillationHead(), {"labels": labels + 0.5}, "labels must have an integer dtype, got torch.float32"),
        (DistillationHead(), {"labels": labels > 0}, "labels must have an integer dtype, got torch.bool"),
        (DistillationHead(), {"labels": labels, "teacher_topk": (hidden,) * 3}, "teacher_topk must be a pair"),
        (DistillationHead(shift=True), {"labels": labels}, r"labels must have shape \(B, T\) with shift=True"),
        (DistillationHead(reduction="none"), {"labels": labels, "weights": torch.ones(N)}, "weights are for sums"),
    ):
        with pytest.raises(ValueError, match=message):
            head(hidden, weight, **given)
    with pytest.raises(ValueError, match="reduction must be batchmean, sum, mean or none, got 'avg'"):
        generalized_jsd_loss(hidden, hidden, reduction="avg")
    for changes, message in (
        ({"temperature": 0}, "temperature must be a finite number above 0, got 0"),
        ({"student_logits": hidden.double()}, "student_logits must be float16, bfloat16 or float32"),
        ({"temperature": 1e-39}, "temperature must be between 1e-30 and"),
        ({"labels": labels + 0.5}, "labels must have an integer dtype, got torch.float32"),
        ({"labels": labels > 0}, "labels must have an integer dtype, got torch.bool"),
        ({"num_items_in_batch": -2}, "num_items_in_batch must be a number above 0, got -2"),
        ({"num_items_in_batch": torch.ones(2)}, "num_items_in_batch must be one number"),
        ({"num_items_in_batch": 0}, "num_items_in_batch must be above 0 where labels count"),
        ({"top_k": H + 1}, f"top_k must be from 0 to the {H} tokens"),
        ({"top_k": -1}, "top_k must be from 0"),
        ({"logits_are_probs": "no"}, "logits_are_probs must be True or False"),
    ):
        with pytest.raises(ValueError, match=message):
            generalized_jsd_loss(**({"student_logits": hidden, "teacher_logits": hidden} | changes))


def test_a_second_derivative_is_refused(drawn):
    hidden, weight, _ = leaves(drawn)
    losses = (
        generalized_jsd_loss(hidden, hidden.detach() * 2).square(),
        DistillationHead(reduction="none")(hidden, weight, drawn["labels"]).loss.square().sum(),
    )
    for loss in losses:
        (first,) = torch.autograd.grad(loss, hidden, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            first.square().sum().backward()
