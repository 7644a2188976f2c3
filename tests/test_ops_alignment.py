"""attention_alignment in every implementation against the float64 oracle, for every loss, reduction and head option."""

import math
import re
from dataclasses import replace

import pytest
import torch
from op_cases import CASES, Case, assert_as_exact_as_eager, device_of, draw, moved, with_gradients

from cdistill import choices
from cdistill.ops import attention_alignment, attention_slice, reference

pytestmark = pytest.mark.usefixtures("poisoned_empty")

KINDS = [
    {"loss": loss, "reduction": reduction, "sink_filter": sink_filter}
    for loss in choices.ALIGNMENT_LOSSES
    for reduction, sink_filter in (("row", False), ("matrix", False), ("column", False), ("column", True))
]
KIND_NAMES = [f"{k['loss']}-{k['reduction']}{'-sink' * k['sink_filter']}" for k in KINDS]
each_kind = pytest.mark.parametrize("kind", KINDS, ids=KIND_NAMES)
some_kinds = pytest.mark.parametrize(
    "kind", [KINDS[i] for i in (0, 3, 5, 10)], ids=[KIND_NAMES[i] for i in (0, 3, 5, 10)]
)

SMALL = Case(q_heads=2, k_heads=1)


def check(case, impl, kind, heads="mean", seed=0, inputs=None):
    """Compare losses and gradients with the oracle; return ours: losses (B,), dq, dk."""
    inputs = draw(case, seed) if inputs is None else inputs
    target = inputs["target"] if heads == "each" else inputs["target"].mean(1)
    options = case.options(inputs) | kind | {"heads": heads}
    grad = torch.arange(1, case.batch + 1).float()

    def oracle(q, k):
        return reference.attention_alignment(q, k, target.to(q.dtype), inputs["rows"], inputs["cols"], **options)

    leaves = [inputs["q"], inputs["k"]]
    exact = with_gradients(oracle, [x.double() for x in leaves], grad)
    eager = with_gradients(oracle, leaves, grad)
    there = moved(inputs | {"target": target}, device_of(impl))
    here = case.options(there) | kind | {"heads": heads, "impl": impl}

    def op(q, k):
        return attention_alignment(q, k, there["target"], there["rows"], there["cols"], **here)

    ours = with_gradients(op, [there["q"], there["k"]], grad)
    assert ours[0].dtype == torch.float32
    assert_as_exact_as_eager(ours, eager, exact)
    return ours


@each_kind
def test_losses_and_gradients_match_float64(kind, impl):
    check(replace(SMALL, masked="left", tokens=23, rows=9, cols=8), impl, kind)


@some_kinds
def test_losses_of_each_head_match_float64(kind, impl):
    check(replace(SMALL, masked="right", tokens=23, rows=9, cols=8), impl, kind, heads="each")


@pytest.mark.parametrize("case", ["full-left", "causal-left", "many-tiles", "wide"])
def test_row_cosine_of_each_head_matches_float64(case, impl):
    check(CASES[case], impl, KINDS[0], heads="each")


@pytest.mark.parametrize("ascending", [False, True])
def test_row_cosine_of_each_head_where_columns_grow(ascending, impl):
    """Slices and targets of which a later part is larger by orders of magnitude, in the same order or in reverse."""
    inputs = draw(Case(batch=1, q_heads=2, k_heads=1, tokens=120, rows=5, cols=100, padding=0, causal=False))
    inputs["cols"] = inputs["cols"].sort(1).values
    ramp = torch.logspace(-3, 0, 120)
    inputs["k"] = inputs["k"] * 0.1
    inputs["q"][..., 0], inputs["k"][..., 0] = 4.0, ramp.log()
    inputs["target"] *= ramp[: inputs["cols"].shape[1]] if ascending else ramp[: inputs["cols"].shape[1]].flip(0)
    check(Case(batch=1, causal=False), impl, KINDS[0], heads="each", inputs=inputs)


@pytest.mark.parametrize("factor", [1.0, 2.0**-80])
def test_row_cosine_of_each_head_of_faint_rows(factor, impl):
    """Row cosine does not depend on the size of a or of the target, down to squares that fp32 cannot hold.

    The tolerance is what rounding lse to fp32 does to a difference of 1e-3 between a and the target.
    """
    inputs = draw(replace(SMALL, rows=4, cols=9, padding=1, tokens=40))
    a = attention_slice(inputs["q"], inputs["k"], inputs["rows"], inputs["cols"], heads="each", impl="torch")
    target = a * (1 + 1e-3 * torch.randn(a.shape, generator=torch.Generator().manual_seed(2)))
    lse = torch.full((2, 2, 40), 3.0)

    def oracle(q, k, lse):
        x = (q, k, target.to(q.dtype), inputs["rows"], inputs["cols"])
        return reference.attention_alignment(*x, lse=lse, heads="each")

    grad = torch.ones(2)
    exact = with_gradients(oracle, [x.double() for x in (inputs["q"], inputs["k"], lse)], grad)
    faint = lse - torch.log(torch.tensor(factor))
    there = moved(inputs | {"target": target * factor, "lse": faint}, device_of(impl))

    def op(q, k, lse):
        return attention_alignment(
            q, k, *(there[n] for n in ("target", "rows", "cols")), lse=lse, heads="each", impl=impl
        )

    losses, dq, dk, _ = with_gradients(op, [there[n] for n in ("q", "k", "lse")], grad)
    torch.testing.assert_close(losses.double().cpu(), exact[0], rtol=2e-2, atol=0)
    for got, want in ((dq, exact[1]), (dk, exact[2])):
        assert (got.double().cpu() - want).abs().max() <= 2e-2 * want.abs().max()


@pytest.mark.parametrize("kind", [KINDS[0], KINDS[3]], ids=[KIND_NAMES[0], KIND_NAMES[3]])
def test_slices_of_many_tiles_match_float64(kind, impl):
    check(CASES["many-tiles"], impl, kind)


def test_grouped_heads_match_float64(impl):
    check(CASES["gqa"], impl, KINDS[0])


def test_half_precision_is_as_exact_as_eager_half_precision(impl):
    dtypes = [torch.float16] if impl == "triton" and device_of(impl) == "cpu" else [torch.float16, torch.bfloat16]
    for dtype in dtypes:
        check(replace(SMALL, dtype=dtype, padding=0), impl, KINDS[0], seed=2)


@some_kinds
def test_rows_that_see_no_visual_key_count_as_padding(kind, impl):
    case = replace(SMALL, batch=1, tokens=12, rows=5, cols=3, padding=0)
    inputs = draw(case)
    inputs["cols"] = torch.tensor([[6, 5, 9]])
    inputs["rows"] = torch.tensor([[2, 7, 4, 11, 5]])  # rows 2 and 4 come before every column
    ours = check(case, impl, kind, inputs=inputs)
    shorter = inputs | {"rows": torch.tensor([[7, 11, 5]]), "target": inputs["target"][:, :, [1, 3, 4]]}
    fewer = check(replace(case, rows=3), impl, kind, inputs=shorter)
    for x, y in zip(ours, fewer, strict=True):
        assert torch.allclose(x, y, rtol=1e-4, atol=1e-7)


@some_kinds
def test_zero_target_vectors(kind, impl):
    case = replace(SMALL, padding=0)
    inputs = draw(case)
    inputs["target"][0, :, 2] = 0.0
    inputs["target"][0, :, :, 3] = 0.0
    inputs["target"][1] = 0.0
    losses, dq, dk = check(case, impl, kind, inputs=inputs)
    if kind["loss"] != "mse":
        assert losses[1] == (1.0 if kind["loss"] == "cosine" else 0.0)
        assert not dq[1].any()
        assert not dk[1].any()


@some_kinds
def test_a_single_row_and_column(kind, impl):
    check(replace(SMALL, batch=1, rows=1, cols=1, padding=0, causal=False), impl, kind, seed=5)


@some_kinds
def test_samples_without_rows_or_columns_have_no_loss_and_no_gradient(kind, impl):
    case = replace(SMALL, batch=3, padding=0)
    inputs = draw(case)
    inputs["rows"][0] = -1
    inputs["cols"][2] = -1
    losses, dq, dk = check(case, impl, kind, inputs=inputs)
    for b in (0, 2):
        assert losses[b] == 0
        assert not dq[b].any()
        assert not dk[b].any()
    assert losses[1] > 0


@pytest.mark.parametrize("rows, cols", [(0, 3), (3, 0)])
@pytest.mark.parametrize("heads", ["mean", "each"])
def test_no_rows_or_no_columns_at_all(rows, cols, heads, impl):
    q = torch.randn(2, 2, 5, 16, device=device_of(impl), requires_grad=True)
    positions = [torch.arange(n, device=q.device).expand(2, -1) for n in (rows, cols)]
    target = torch.zeros(2, *([2] if heads == "each" else []), rows, cols, device=q.device)
    losses = attention_alignment(q, q, target, *positions, heads=heads, impl=impl)
    losses.sum().backward()
    assert losses.tolist() == [0.0, 0.0]
    assert not q.grad.any()


@some_kinds
def test_target_values_at_padding_are_ignored(kind, impl):
    inputs = draw(SMALL)
    padding = (inputs["rows"][:, :, None] < 0) | (inputs["cols"][:, None] < 0)
    clean = check(SMALL, impl, kind, inputs=inputs)
    poisoned = moved(inputs | {"target": inputs["target"].mean(1).masked_fill(padding, torch.nan)}, device_of(impl))

    def op(q, k):
        return attention_alignment(q, k, poisoned["target"], poisoned["rows"], poisoned["cols"], impl=impl, **kind)

    again = with_gradients(op, [poisoned["q"], poisoned["k"]], torch.tensor([1.0, 2.0]))
    assert all(torch.equal(x, y) for x, y in zip(clean, again, strict=True))


@some_kinds
def test_equal_slices_have_no_distance(kind, impl):
    inputs = moved(draw(SMALL), device_of(impl))
    args = inputs["q"], inputs["k"]
    a = attention_slice(*args, inputs["rows"], inputs["cols"], impl=impl)
    losses = attention_alignment(*args, a, inputs["rows"], inputs["cols"], impl=impl, **kind)
    assert losses.abs().max() < 1e-6


def test_cosine_keeps_its_digits_near_one(impl):
    """Near cos = 1 the difference 1 - cos would lose every digit in fp32; half the squared distance does not."""
    inputs = draw(replace(SMALL, padding=0, causal=False))
    exact = reference.attention_slice(
        inputs["q"].double(), inputs["k"].double(), inputs["rows"], inputs["cols"], causal=False
    )
    noise = torch.randn(exact.shape, generator=torch.Generator().manual_seed(1))
    target = (exact * (1 + 1e-3 * noise)).float()
    expected = reference.attention_alignment(
        inputs["q"].double(), inputs["k"].double(), target.double(), inputs["rows"], inputs["cols"], causal=False
    )
    there = moved(inputs | {"target": target}, device_of(impl))
    args = (there[name] for name in ("q", "k", "target", "rows", "cols"))
    losses = attention_alignment(*args, causal=False, impl=impl)
    assert losses.max() < 2e-6
    assert torch.allclose(losses.double().cpu(), expected, rtol=2e-3)


def test_gradient_reaches_a_given_lse(impl):
    inputs = moved(draw(SMALL), device_of(impl))
    lse = torch.full((2, 2, 37), 3.5)

    def oracle(q, k, lse):
        return reference.attention_alignment(
            q, k, target.to(q.dtype), inputs["rows"], inputs["cols"], lse=lse, loss="mse"
        )

    def op(q, k, lse):
        return attention_alignment(q, k, target, inputs["rows"], inputs["cols"], lse=lse, loss="mse", impl=impl)

    target = inputs["target"].mean(1)
    leaves = [inputs["q"], inputs["k"], lse.to(device_of(impl))]
    exact = with_gradients(oracle, [x.double() for x in leaves])
    assert_as_exact_as_eager(with_gradients(op, leaves), with_gradients(oracle, leaves), exact)
    assert exact[3].any()


@some_kinds
def test_second_backward_is_identical_and_gradients_scale(kind, impl):
    inputs = moved(draw(SMALL), device_of(impl))
    q, k = inputs["q"].requires_grad_(), inputs["k"].requires_grad_()
    target = inputs["target"].mean(1).requires_grad_()
    losses = attention_alignment(q, k, target, inputs["rows"], inputs["cols"], impl=impl, **kind).sum()
    first = torch.autograd.grad(losses, (q, k), retain_graph=True)
    second = torch.autograd.grad(losses, (q, k), retain_graph=True)
    tripled = torch.autograd.grad(losses * 3, (q, k))
    for x, y, z in zip(first, second, tripled, strict=True):
        assert torch.equal(x, y)
        assert torch.allclose(3 * x, z, rtol=1e-4, atol=1e-6 * float(z.abs().max()))
    assert target.grad is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_targets_of_other_dtypes(dtype, impl):
    inputs = moved(draw(SMALL), device_of(impl))
    target = inputs["target"].mean(1).to(dtype)
    args = inputs["q"], inputs["k"]
    positions = inputs["rows"], inputs["cols"]
    ours = attention_alignment(*args, target, *positions, impl=impl)
    assert torch.equal(ours, attention_alignment(*args, target.float(), *positions, impl=impl))


GOOD = [
    torch.zeros(2, 4, 8, 16),
    torch.zeros(2, 2, 8, 16),
    torch.zeros(2, 2, 3),
    torch.tensor([[1, 2], [3, -1]]),
    torch.tensor([[0, 1, 2], [5, -1, -1]]),
]
BAD = [
    ({"target": torch.zeros(2, 3, 2)}, "target must have shape (B, R, V) = (2, 2, 3)"),
    ({"heads": "each"}, "target must have shape (B, Hq, R, V) = (2, 4, 2, 3)"),
    ({"target": torch.zeros(2, 2, 3, dtype=torch.int64)}, "target must have a floating dtype"),
    ({"target": torch.zeros(2, 2, 3, device="meta")}, "target must be on cpu"),
    ({"target": None}, "target must be a tensor"),
    ({"loss": "l1"}, "loss must be one of"),
    ({"reduction": "mean"}, "reduction must be one of"),
    ({"sink_filter": True}, "sink_filter needs reduction='column'"),
    ({"sink_filter": 1}, "sink_filter must be True or False"),
    ({"scale": "1"}, "scale must be None or a finite number"),
]


@pytest.mark.parametrize("change, message", BAD, ids=[f"{next(iter(c))}-{i}" for i, (c, _) in enumerate(BAD)])
def test_bad_input_names_the_argument(change, message):
    q, k, target, rows, cols = GOOD
    options = {"impl": "torch"} | change
    with pytest.raises(ValueError, match=re.escape(message)):
        attention_alignment(q, k, options.pop("target", target), rows, cols, **options)


def test_jsd_is_symmetric_and_at_most_log_2(impl):
    """It is half of KL(s||m) + KL(t||m) with m = (s + t) / 2, whichever slice is the target's; for disjoint ones log 2."""
    inputs = moved(draw(replace(SMALL, padding=0)), device_of(impl))
    q, k = inputs["q"], inputs["k"]
    a = attention_slice(q, k, inputs["rows"], inputs["cols"], impl=impl)
    target = torch.rand(a.shape, generator=torch.Generator().manual_seed(3)).to(a.device)
    s, t = (x.double() / x.double().sum(-1, keepdim=True) for x in (a, target))
    m = (s + t) / 2
    expected = sum(torch.xlogy(x, x / m).sum(-1) for x in (s, t)).mean(-1) / 2

    def distance(target):
        options = {"loss": "jsd", "impl": impl}
        return attention_alignment(q, k, target, inputs["rows"], inputs["cols"], **options).double()

    torch.testing.assert_close(distance(target), expected, rtol=1e-5, atol=1e-7)
    ends = torch.where(torch.arange(a.shape[-1], device=a.device) < 0, 1.0, 0.0)
    ends[-1] = 1.0
    hidden = attention_slice(q, k, inputs["rows"], inputs["cols"], impl=impl)[..., -1] == 0
    assert hidden.any(), "columns that a row does not see"
    rows = distance(ends.expand_as(a).contiguous())
    assert (rows <= math.log(2) + 1e-6).all()


def test_jsd_keeps_its_digits_near_equality(impl):
    """Shares that differ by a thousandth have a distance of some 1e-7, of which the usual form keeps no digit in fp32."""
    inputs = draw(replace(SMALL, padding=0, causal=False))
    places = inputs["rows"], inputs["cols"]
    exact = reference.attention_slice(inputs["q"].double(), inputs["k"].double(), *places, causal=False)
    noise = torch.randn(exact.shape, generator=torch.Generator().manual_seed(1))
    target = (exact * (1 + 1e-3 * noise)).float()
    options = {"loss": "jsd", "causal": False}
    want = reference.attention_alignment(
        inputs["q"].double(), inputs["k"].double(), target.double(), *places, **options
    )
    there = moved(inputs | {"target": target}, device_of(impl))
    places = there["rows"], there["cols"]
    got = attention_alignment(there["q"], there["k"], there["target"], *places, impl=impl, **options)
    torch.testing.assert_close(got.cpu().double(), want, rtol=2e-3, atol=0)
