"""Ops give the same numbers in every state of the process: defaults, modes, threads, and what stands where nothing is seen."""

import itertools
from contextlib import contextmanager

import pytest
import torch
from op_cases import Case, device_of, draw, moved
from torch.utils.checkpoint import checkpoint

from cdistill.ops import (
    attention_alignment,
    attention_relation,
    attention_slice,
    attention_with_alignment,
    flash_attention,
    linear_distillation,
    reference,
)

INPUTS = draw(Case(batch=1, q_heads=2, k_heads=1, masked="right", tokens=11, rows=3, cols=4, padding=1))


def alignment(loss, reduction, heads="mean", sink_filter=False):
    options = {"loss": loss, "reduction": reduction, "heads": heads, "sink_filter": sink_filter}

    def op(x, q, k, impl):
        target = x["target"] if heads == "each" else x["target"].mean(1)
        return attention_alignment(q, k, target, x["rows"], x["cols"], key_mask=x["key_mask"], impl=impl, **options)

    return op


def relation(loss, reduction, heads="mean", sink_filter=False):
    options = {"loss": loss, "reduction": reduction, "heads": heads, "sink_filter": sink_filter}

    def op(x, q, k, impl):
        teacher = [x["q"].roll(n, 3) for n in (1, 2)], [x["k"].roll(n, 3) for n in (3, 1)]
        return attention_relation(q, k, *teacher, x["rows"], x["cols"], key_mask=x["key_mask"], impl=impl, **options)

    return op


def one_pass(x, q, k, impl):
    engine = "triton" if impl == "triton" else None
    options = {"key_mask": x["key_mask"], "impl": impl, "engine": engine, "loss": "kl"}
    out, loss = attention_with_alignment(q, k, k.sin(), x["target"].mean(1), x["rows"], x["cols"], **options)
    return out[:, :, :8].square().sum() + loss.sum()


def flash(x, q, k, impl):
    out, lse = flash_attention(q, k, k.sin(), key_mask=x["key_mask"], impl=None if impl == "cpp" else impl)
    return out.square().sum() + lse.sin().sum()


def vocabulary(x, q, k, impl):
    hidden, head = q.flatten(0, 2), k.flatten(0, 2)
    labels = torch.arange(len(hidden), device=q.device) % len(head)
    made = linear_distillation(hidden, head, hidden.detach().cos(), head.detach().cos(), labels, impl=impl)
    return (made.ce + made.kd) / made.tokens


OPS = {
    "slice": lambda x, q, k, impl: attention_slice(q, k, x["rows"], x["cols"], key_mask=x["key_mask"], impl=impl).sin(),
    "cosine-each": alignment("cosine", "row", heads="each"),
    "kl-row": alignment("kl", "row"),
    "mse-column": alignment("mse", "column"),
    "cosine-sink": alignment("cosine", "column", sink_filter=True),
    "kl-matrix-each": alignment("kl", "matrix", heads="each"),
    "relation-row": relation("reverse_kl", "row", heads="each"),
    "relation-sink": relation("cosine", "column", sink_filter=True),
    "one-pass": one_pass,
    "flash": flash,
    "vocabulary": vocabulary,
}


def results(op, impl, inputs, around=lambda op: op):
    """The op's result and gradients of q and k."""
    q, k = (inputs[name].detach().clone().requires_grad_() for name in ("q", "k"))
    out = around(lambda q, k: op(inputs, q, k, impl))(q, k)
    return [out.detach(), *torch.autograd.grad(out.sum(), (q, k))]


@contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


STATES = {
    "default float64": lambda: default_dtype(torch.float64),
    "default bfloat16": lambda: default_dtype(torch.bfloat16),
    "default float16": lambda: default_dtype(torch.float16),
    "default device": lambda: torch.device("meta"),
    "autocast bfloat16": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "autocast float16": lambda: torch.autocast("cpu", dtype=torch.float16),
    "deterministic algorithms": deterministic,
    "anomaly mode": lambda: torch.autograd.set_detect_anomaly(True),
}
IMPLS = ("torch", "cpp", "triton")
# Every pair of state and op, of state and impl, and of op and impl.
DRAWN = [
    (state, op, IMPLS[(i + j) % 3]) for (i, state), (j, op) in itertools.product(enumerate(STATES), enumerate(OPS))
]


@pytest.mark.parametrize("state", STATES)
def test_a_state_of_the_process_changes_no_bit(state):
    for name, impl in ((op, impl) for drawn, op, impl in DRAWN if drawn == state):
        inputs = moved(INPUTS, device_of(impl))
        expected = results(OPS[name], impl, inputs)
        with STATES[state]():
            found = results(OPS[name], impl, inputs)
        for x, y in zip(found, expected, strict=True):
            assert x.dtype == y.dtype and torch.equal(x, y), (name, impl)


@pytest.mark.parametrize("name", OPS)
def test_inputs_made_in_inference_mode_and_checkpointing(name, impl):
    inputs = moved(INPUTS, device_of(impl))
    expected = results(OPS[name], impl, inputs)
    with torch.inference_mode():
        made = {key: None if x is None else x.clone() for key, x in inputs.items()}
        shown = OPS[name](made, made["q"], made["k"], impl)
    assert torch.equal(shown, expected[0])
    inferred = made | {key: inputs[key] for key in ("q", "k")}
    again = [results(OPS[name], impl, inferred)]
    again.append(results(OPS[name], impl, inputs, lambda op: lambda q, k: checkpoint(op, q, k, use_reentrant=False)))
    for found in again:
        assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


@pytest.mark.parametrize("name", [name for name in OPS if name not in ("vocabulary", "flash")])
def test_numbers_do_not_depend_on_the_number_of_threads(name):
    expected, before = results(OPS[name], "cpp", INPUTS), torch.get_num_threads()
    try:
        for threads in (2, 3, 4):
            torch.set_num_threads(threads)
            found = results(OPS[name], "cpp", INPUTS)
            assert all(torch.equal(x, y) for x, y in zip(found[:1], expected[:1], strict=True))
            if name != "one-pass":  # attention itself is torch's
                assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("gap", [18.0, 60.0, 80.0])
@pytest.mark.parametrize("reduction", ["row", "matrix", "column"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_kl_pulls_up_the_faintest_share(gap, reduction, dtype, impl):
    """Two logits 0 and -gap, target one half each: d loss / d logit is share - 1/2 whatever the share."""
    device = device_of(impl)
    q, k = (torch.zeros(1, 1, 2, 16, dtype=dtype) for _ in range(2))
    q[..., 0], k[0, 0, 1, 0] = 4.0, -gap
    rows, cols, target = torch.tensor([[1]]), torch.tensor([[0, 1]]), torch.full((1, 1, 2), 0.5)
    q, k, rows, cols, target = (x.to(device) for x in (q, k, rows, cols, target))
    k.requires_grad_()
    loss = attention_alignment(q, k, target, rows, cols, loss="kl", reduction=reduction, impl=impl)
    (dk,) = torch.autograd.grad(loss.sum(), k)
    z = torch.tensor([0.0, -gap], dtype=torch.float64).log_softmax(0)
    assert loss.item() == pytest.approx((0.5 * (torch.tensor(0.5).double().log() - z)).sum().item(), rel=1e-5)
    assert dk[0, 0, 1, 0].item() == pytest.approx(z[1].exp().item() - 0.5, rel=2e-3 if dtype == torch.float16 else 1e-5)


def test_kl_of_a_share_that_no_number_holds_is_finite(impl):
    q, k = torch.zeros(2, 1, 1, 2, 16).unbind()
    q[..., 0], k[0, 0, 1, 0] = 4.0, -300.0
    rows, cols, target = torch.tensor([[1]]), torch.tensor([[0, 1]]), torch.full((1, 1, 2), 0.5)
    x = {"q": q, "k": k, "rows": rows, "cols": cols, "target": target[:, None], "key_mask": None}
    loss, dq, dk = results(alignment("kl", "row"), impl, moved(x, device_of(impl)))
    exact = reference.attention_alignment(q.double(), k.double(), target, rows, cols, loss="kl")
    assert loss.item() == pytest.approx(exact.item(), rel=1e-5) and exact < 100
    assert dq.isfinite().all() and dk.isfinite().all()


@pytest.mark.parametrize("gap", [80.0, 88.0, 90.0, 100.0])
def test_faint_probabilities_do_not_vanish(gap):
    q, k = torch.zeros(2, 1, 1, 2, 16).unbind()
    q[..., 0], k[0, 0, 0, 0] = 4.0, -gap
    at = torch.tensor([[1]]), torch.tensor([[0]])
    found = attention_slice(q, k, *at, impl="cpp")
    exact = torch.tensor(-gap).double().exp()
    assert abs(found.double() - exact) <= 2e-6 * exact + 2.0**-149
    assert attention_alignment(q, k, torch.ones(1, 1, 1), *at, impl="cpp").item() == 0.0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["masked", "future"])
@pytest.mark.parametrize("name", ["slice", "kl-row", "relation-row", "one-pass", "flash"])
def test_what_no_row_sees_reaches_no_row(name, where, value, impl):
    inputs = moved(draw(Case(batch=1, q_heads=2, k_heads=1, tokens=14, rows=4, cols=5, padding=1)), device_of(impl))
    inputs["rows"] = torch.tensor([[4, 5, 9, -1]], device=inputs["q"].device)
    inputs["cols"] = torch.tensor([[0, 2, 3, 8, -1]], device=inputs["q"].device)
    if where == "masked":
        inputs["key_mask"] = torch.ones(1, 14, dtype=torch.bool, device=inputs["q"].device)
        inputs["key_mask"][:, 10:] = False

    def op(x, q, k, impl):
        if name == "flash":
            out, _ = flash_attention(q, k, k.sin(), key_mask=x["key_mask"], impl=None if impl == "cpp" else impl)
            return out[:, :, :10].sin()
        return OPS[name](x, q, k, impl)

    found = []
    for filling in (1.0, value):
        filled = inputs | {key: inputs[key].clone() for key in ("q", "k")}
        for key in ("q", "k"):
            filled[key][:, :, 10:] = filling
        out, *gradients = results(op, impl, filled)
        found.append([out, *(g[:, :, :10] for g in gradients)])
    for x, y in zip(*found, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["slice", "cosine-each", "one-pass"])
@pytest.mark.parametrize("size", [1e2, 4e4])
def test_large_scores_are_as_exact_as_eager(name, size):
    """Ten keys tie, so that log 10 is lost in an fp32 log-sum-exp: P sums to one and dS to zero all the same."""
    inputs = moved(draw(Case(batch=1, q_heads=2, k_heads=1, tokens=23, width=24, rows=6, cols=9)), device_of("triton"))
    inputs["rows"], inputs["cols"] = (
        torch.arange(x, y, device=inputs["q"].device)[None] for x, y in ((15, 21), (10, 19))
    )
    inputs["k"][:, :, 13:] = inputs["k"][:, :, 12:13]
    inputs["q"] = inputs["k"].repeat_interleave(2, 1).roll(1, 2) + 0.01 * inputs["q"]
    factor = (size / (inputs["q"] @ inputs["k"].mT * 24**-0.5).abs().max()).sqrt()
    inputs |= {x: inputs[x] * factor for x in ("q", "k")}
    upstream = torch.randn(1, 6, 9, generator=torch.Generator().manual_seed(1)).to(inputs["q"].device)

    def op(x, q, k, impl):
        if impl == "triton":
            attention = {"impl": impl, "engine": impl}
            made = (
                OPS[name](x, q, k, impl) if name != "slice" else attention_slice(q, k, x["rows"], x["cols"], impl=impl)
            )
            if name == "one-pass":
                made = attention_with_alignment(q, k, k.cos(), x["target"].mean(1), x["rows"], x["cols"], **attention)[
                    1
                ]
            return (made * upstream).sum() if name == "slice" else made
        if name == "slice":
            return (reference.attention_slice(q, k, x["rows"], x["cols"]) * upstream).sum()
        heads = "each" if name == "cosine-each" else "mean"
        target = x["target"].to(q.dtype)
        target = target if heads == "each" else target.mean(1)
        return reference.attention_alignment(q, k, target, x["rows"], x["cols"], heads=heads)

    ours, eager = results(op, "triton", inputs), results(op, "reference", inputs)
    exact = results(op, "reference", inputs | {x: inputs[x].double() for x in ("q", "k")})
    terms = 1e-6 * torch.stack([inputs[x].abs().max() for x in ("q", "k")]).max()  # of sums that cancel, in fp32
    for x, y, z, rounding in zip(ours, eager, exact, (1e-7, terms, terms), strict=True):
        assert (x - z).abs().max() <= 2 * (y - z).abs().max() + 1e-5 * z.abs().max() + rounding


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("where", ["query", "column", "masked key", "other key"])
def test_what_is_not_finite_gives_what_eager_attention_gives(where, value, impl):
    """Not finite where eager is not; gradients may be finite where eager multiplies 0 by infinity. C++: test_cpp_limits."""
    if impl == "cpp":
        return
    inputs = moved(draw(Case(batch=1, q_heads=2, k_heads=1, masked="right", padding=0)), device_of(impl))
    token = {"query": inputs["rows"][0, 2], "column": inputs["cols"].min(), "masked key": 36, "other key": 23}[where]
    inputs["q" if where == "query" else "k"][:, 0, int(token), 3] = value

    def op(x, q, k, impl):
        options = {"key_mask": x["key_mask"]} | ({"impl": impl} if impl else {})
        function = attention_slice if impl else reference.attention_slice
        return function(q, k, x["rows"], x["cols"], **options).sin()

    ours, eager = results(op, impl, inputs), results(op, None, inputs)
    assert torch.equal(ours[0].isfinite(), eager[0].isfinite())
    for x, y in zip(ours, eager, strict=True):
        torch.testing.assert_close(x[y.isfinite()], y[y.isfinite()], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("both", [True, False])
def test_an_empty_batch_has_empty_gradients(both, impl):
    q = torch.randn(0, 2, 5, 16, device=device_of(impl), requires_grad=True)
    out, lse = flash_attention(q, q, q, impl=None if impl == "cpp" else impl)
    assert torch.autograd.grad((out.sum() if both else 0) + lse.sum(), q)[0].shape == q.shape
    at = torch.zeros(2, 0, 3, dtype=torch.long, device=q.device)
    for name in ("slice", "cosine-each", "kl-row", "mse-column", "relation-row", "relation-sink", "one-pass"):
        x = {"rows": at[0], "cols": at[1], "target": torch.zeros(0, 2, 3, 3, device=q.device), "key_mask": None}
        assert results(OPS[name], impl, x | {"q": q, "k": q})[1].shape == q.shape


@pytest.mark.parametrize("transform", ["vmap", "jvp", "grad"])
@pytest.mark.parametrize("name", ["slice", "kl-row", "relation-row", "flash", "vocabulary"])
def test_function_transforms_give_the_numbers_or_refuse(name, transform):
    expected = results(OPS[name], "torch", INPUTS)

    def op(q):
        return OPS[name](INPUTS, q, INPUTS["k"], "torch").sum()

    q = INPUTS["q"]
    try:
        if transform == "grad":
            found = torch.func.grad(op)(q)
            torch.testing.assert_close(found, expected[1])
        elif transform == "jvp":
            found = torch.func.jvp(op, (q,), (torch.ones_like(q),))[1]
            torch.testing.assert_close(found, expected[1].sum(), rtol=1e-4, atol=1e-4)
        else:
            found = torch.func.vmap(op)(torch.stack([q, q]))
            torch.testing.assert_close(found, expected[0].sum().expand(2))
    except ValueError as error:
        assert transform == "jvp" and "backward pass only" in str(error)
    except RuntimeError as error:  # torch's own refusal: ops that read their inputs' memory have no rule for batches
        words = ("functorch", "Batching rule", *["vmap"] * (transform in ("vmap", "grad")))
        assert any(word in str(error) for word in words), error
