"""The C++ module at its limits: numbers that are not finite or subnormal, long sequences, memory, threads of torch."""

from unittest import mock

import pytest
import torch
from op_cases import Case, draw, with_gradients

from cdistill import _C
from cdistill.ops import _cpp, attention_alignment, attention_slice, reference

pytestmark = pytest.mark.usefixtures("poisoned_empty")


def spoilt(where, value, dtype):
    """Inputs with one strange value: in a query, in a key of the slice, in a key behind the mask, or in another key."""
    inputs = draw(Case(batch=1, q_heads=2, k_heads=1, padding=0, masked="right", dtype=dtype))
    token = {"query": inputs["rows"][0, 2], "column": inputs["cols"].min(), "masked key": 36, "other key": 23}[where]
    inputs["q" if where == "query" else "k"][:, 0, int(token), 3] = value
    return inputs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("where", ["query", "column", "masked key", "other key"])
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan, "largest", "subnormal"])
def test_strange_values_give_what_eager_attention_gives(isa, dtype, where, value):
    """Not finite where eager is not; the gradient may be finite where eager multiplies 0 by infinity."""
    info = torch.finfo(dtype)
    value = {"largest": info.max, "subnormal": info.tiny / 4}.get(value, value)
    inputs = spoilt(where, value, dtype)
    leaves, rows, cols = (inputs["q"], inputs["k"]), inputs["rows"], inputs["cols"]
    grad = torch.randn(1, 7, 11, generator=torch.Generator().manual_seed(1))
    options = {"key_mask": inputs["key_mask"]}

    def op(q, k):
        return attention_slice(q, k, rows, cols, impl="cpp", **options)

    def oracle(q, k):
        return reference.attention_slice(q, k, rows, cols, **options)

    ours, eager = with_gradients(op, leaves, grad), with_gradients(oracle, [x.float() for x in leaves], grad)
    exact = with_gradients(oracle, [x.double() for x in leaves], grad)
    assert torch.equal(ours[0].isfinite(), eager[0].isfinite())
    for x, y, z in zip(ours, eager, exact, strict=True):
        finite = y.isfinite() & z.isfinite()
        x, y, z = (t[finite].double() for t in (x, y, z))
        assert x.isfinite().all()
        if len(z):
            assert (x - z).abs().max() <= 2 * (y - z).abs().max() + (1e-5 + 2 * info.eps) * z.abs().max() + 1e-6
    # the gradient of a query is spoilt in the heads whose own probabilities are, and in no other
    real = rows[0] >= 0
    spoilt_slices = attention_slice(*leaves, rows, cols, impl="cpp", heads="each", **options)[0, :, real].isnan().any(2)
    assert torch.equal(ours[1][0][:, rows[0][real].long()].isnan().any(2), spoilt_slices)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_subnormal_inputs_count(isa, dtype):
    """Scores of subnormal queries and huge keys, and gradients of subnormal keys; a dot product of pairs drops both."""
    q, k = torch.zeros(1, 1, 2, 16, dtype=dtype), torch.zeros(1, 1, 2, 16, dtype=dtype)
    q[..., 0], k[0, 0, 0, 0] = 2.0**-130, 2.0**127
    rows = cols = torch.arange(2)[None]
    a = attention_slice(q, k, rows, cols, scale=8.0, causal=False, impl="cpp")
    assert torch.allclose(a[0, 0], torch.tensor([1.0, 0.0]).softmax(0), atol=1e-6)
    k[0, 0, 0, 0], q[..., 0] = 2.0**-130, 1.0
    _, dq, _ = with_gradients(
        lambda q, k: attention_slice(q, k, rows, cols, impl="cpp"), [q, k], 64 * torch.eye(2)[None]
    )
    assert torch.equal(dq[0, 0, 1, 0].float(), torch.tensor(-4.0 * 2.0**-130))


@pytest.mark.parametrize("width", [24, 128])
@pytest.mark.parametrize("scale", [None, 1e3, -1e4, 1e10])
def test_large_scores_are_as_exact_as_eager(isa, width, scale):
    """Rows that agree with one key, or with many: a product that is not rounded before its maximum is taken off is not."""
    case = Case(width=width, scale=scale)
    inputs = draw(case)
    k = 4 * inputs["k"]
    k[:, :, 20:] = k[:, :, 20:21]
    q = k.repeat_interleave(2, 1).roll(1, 2)
    grad = torch.randn(2, 7, 11, generator=torch.Generator().manual_seed(1))

    def oracle(q, k):
        return reference.attention_slice(q, k, inputs["rows"], inputs["cols"], scale=scale)

    def op(q, k):
        return attention_slice(q, k, inputs["rows"], inputs["cols"], scale=scale, impl="cpp")

    results = with_gradients(op, [q, k], grad), with_gradients(oracle, [q, k], grad)
    exact = with_gradients(oracle, [q.double(), k.double()], grad)
    rounding_of_terms = (1e-7, *(1e-7 * max(1.0, abs(scale or 1.0)),) * 2)
    for x, y, z, rounding in zip(*results, exact, rounding_of_terms, strict=True):
        assert (x - z).abs().max() <= 2 * (y - z).abs().max() + 1e-5 * z.abs().max() + rounding


def test_a_row_whose_every_score_is_minus_infinity_is_not_a_number(isa):
    """As in eager attention; a row that sees no key is zero."""
    q, k = torch.ones(1, 1, 3, 16), torch.ones(1, 1, 3, 16)
    k[0, 0, 0, 3], q[0, 0, 0, 3] = torch.inf, -1.0
    rows = cols = torch.arange(3)[None]
    a = attention_slice(q, k, rows, cols, impl="cpp")
    assert torch.equal(a.isnan(), reference.attention_slice(q, k, rows, cols).isnan())
    assert a[0, 0, 0].isnan() and not a[0, 0, 1:].any()
    unseen = attention_slice(q, k, rows, cols, key_mask=torch.tensor([[False, True, True]]), impl="cpp")
    assert not unseen[0, 0].any()


def test_a_subnormal_number_changes_no_other_sample(isa):
    inputs = draw(Case(batch=2, padding=0, dtype=torch.bfloat16))
    positions = inputs["rows"], inputs["cols"]
    before = with_gradients(lambda q, k: attention_slice(q, k, *positions, impl="cpp"), [inputs["q"], inputs["k"]])
    inputs["k"][1, 0, 0, 0] = 2.0**-130
    after = with_gradients(lambda q, k: attention_slice(q, k, *positions, impl="cpp"), [inputs["q"], inputs["k"]])
    assert all(torch.equal(x[0], y[0]) for x, y in zip(before, after, strict=True))


LONG = {
    "exponentials of one tile of rows do not fit into the working memory": (45000, 16, 5, 44000, torch.float32),
    "probabilities of one tile of rows do not": (45000, 16, 40, 64, torch.float32),
    "only some rows do": (12000, 16, 200, 600, torch.float32),
    "the keys' gradient does not": (6300, 256, 3, 200, torch.bfloat16),
}


@pytest.mark.parametrize("name", LONG)
def test_long_sequences_take_other_ways_to_the_same_result(name):
    tokens, width, n_rows, n_cols, dtype = LONG[name]
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 1, tokens, width, generator=generator).to(dtype)
    order = torch.randperm(tokens, generator=generator)[None]
    rows, cols = order[:, :n_rows], order[:, n_rows : n_rows + n_cols]
    grad = torch.randn(1, n_rows, n_cols, generator=generator)

    def of(impl):
        return with_gradients(lambda q, k: attention_slice(q, k, rows, cols, impl=impl), [q, k], grad)

    for x, y in zip(of("cpp"), of("torch"), strict=True):
        rounding = 1e-5 if dtype == torch.float32 or x.dim() == 3 else 2.0**-7
        assert (x - y).abs().max() <= rounding * y.abs().max()


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("given_lse", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_module_runs_on_as_many_threads_as_torch(dtype, given_lse, threads):
    """The number that torch has is what reaches every call."""
    inputs, before, seen = draw(Case(dtype=dtype)), torch.get_num_threads(), []
    lse = torch.zeros(2, 4, 37) if given_lse else None
    names = ("slice_forward", "slice_forward_with_lse", "slice_backward", "alignment_loss", "alignment_grad")

    def spy(function):
        def call(*arguments):
            seen.append(arguments[-1])
            return function(*arguments)

        return call

    spies = {name: spy(getattr(_C, name)) for name in names}
    target = inputs["target"][:, 0].contiguous()
    try:
        torch.set_num_threads(threads)
        with mock.patch.multiple(_cpp._C, **spies):
            q, k = (inputs[name].requires_grad_() for name in ("q", "k"))
            attention_alignment(q, k, target, inputs["rows"], inputs["cols"], lse=lse, impl="cpp").sum().backward()
    finally:
        torch.set_num_threads(before)
    assert len(seen) == 4 and set(seen) == {threads}
