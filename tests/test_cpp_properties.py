"""The C++ module on whatever calls hypothesis thinks of: against float64, and bit for bit on any number of threads."""

import os
from unittest import mock

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_cases import ISAS, with_gradients

from cdistill import choices
from cdistill.ops import attention_alignment, attention_slice, reference

ROUNDING = {torch.float32: 2.0**-20, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}


@st.composite
def positions(draw, batch, tokens, most, generator):
    """Distinct positions (B,N) in any order, in every sample any number of them -1."""
    count = draw(st.integers(1, most))
    found = torch.full((batch, count), -1)
    for b in range(batch):
        kept = draw(st.integers(0, min(count, tokens)))
        found[b, torch.randperm(count, generator=generator)[:kept]] = torch.randperm(tokens, generator=generator)[:kept]
    return found.to(draw(st.sampled_from([torch.int32, torch.int64])))


@st.composite
def calls(draw, dtypes):
    """Arguments of attention_slice: q, k, rows, cols and options; and how many threads."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    batch, k_heads, group = draw(st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3)))
    tokens = draw(st.one_of(st.integers(1, 20), st.integers(100, 300)))
    width = 8 * draw(st.one_of(st.integers(2, 4), st.integers(2, 20)))
    dtype = draw(st.sampled_from(dtypes))

    def tensor(heads):
        order, gap = draw(st.permutations(range(3))), draw(st.sampled_from([0, 3, 8]))
        sizes = [(batch, heads, tokens)[axis] for axis in order]
        x = torch.randn(*sizes, width + gap, generator=generator).to(dtype)[..., gap:]
        return x.permute(*(order.index(axis) for axis in range(3)), 3)

    key_mask = None
    if draw(st.booleans()):
        key_mask = torch.rand(batch, tokens, generator=generator) < draw(st.sampled_from([0.1, 0.5, 0.9]))
    return {
        "q": tensor(k_heads * group),
        "k": tensor(k_heads),
        "rows": draw(positions(batch, tokens, min(tokens, 110) + 2, generator)),
        "cols": draw(positions(batch, tokens, tokens + 2, generator)),
        "options": {"causal": draw(st.booleans()), "scale": draw(st.sampled_from([None, 0.7])), "key_mask": key_mask},
        "threads": draw(st.integers(2, 7)),
        "generator": generator,
    }


def bits(x):
    return x.contiguous().view(torch.uint8)


def at_one_and_more_threads(threads, step):
    """The results of a step, the same ones with any number of threads."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = step()
        torch.set_num_threads(threads)
        assert all(torch.equal(bits(x), bits(y)) for x, y in zip(one, step(), strict=True))
    finally:
        torch.set_num_threads(before)
    return one


def masses(call):
    """The most that P sums to, over the keys of one row and over the rows and heads of one key, in float64."""
    q, k, rows = call["q"].double(), call["k"].double(), call["rows"]
    p = reference.attention_probabilities(q, k, **call["options"])
    p = p.gather(2, rows.clamp(min=0).long()[:, None, :, None].expand(-1, q.shape[1], -1, q.shape[2]))
    p = p.masked_fill((rows < 0)[:, None, :, None], 0.0)
    by_key = p.unflatten(1, (k.shape[1], -1)).sum((2, 3))
    return p.sum(3).max().item(), by_key.max().item()


def assert_close(ours, eager, exact, absolute):
    """|ours - exact| <= 2 * |eager - exact| + 1e-5 * |exact| + absolute, in the maximum norm.

    ``absolute`` is the rounding of the terms of a sum, which may be far larger than the sum.
    """
    for x, y, z, rounding in zip(ours, eager, exact, absolute, strict=True):
        assert ((x - z).abs().max() <= 2 * (y - z).abs().max() + 1e-5 * z.abs().max() + rounding).all()


@settings(max_examples=150, deadline=None)
@given(calls([torch.float32, torch.bfloat16, torch.float16]), st.sampled_from(ISAS), st.sampled_from(["mean", "each"]))
def test_slices_and_gradients_of_any_call(call, instructions, heads):
    q, k, rows, cols, options = (call[name] for name in ("q", "k", "rows", "cols", "options"))
    options = options | {"heads": heads}
    shape = reference.attention_slice(q, k, rows, cols, **options).shape
    grad = torch.randn(shape, generator=call["generator"])

    def op(q, k):
        return attention_slice(q, k, rows, cols, impl="cpp", **options)

    def oracle(q, k):
        return reference.attention_slice(q, k, rows, cols, **options)

    with mock.patch.dict(os.environ, {"CDISTILL_CPU_ISA": instructions}):
        ours = at_one_and_more_threads(call["threads"], lambda: with_gradients(op, [q, k], grad))
    eager = with_gradients(oracle, [q, k], grad)
    exact = with_gradients(oracle, [q.double(), k.double()], grad)
    by_row, by_key = masses(call)
    share = 1 if heads == "each" else 1 / q.shape[1]
    slope = ROUNDING[q.dtype] * grad.abs().max() * share * (options["scale"] or q.shape[3] ** -0.5)
    absolute = 1e-6, slope * by_row * k.abs().max(), slope * by_key * q.abs().max()
    assert_close(ours, eager, exact, absolute)
    real = torch.zeros(q.shape[0], q.shape[2], dtype=torch.bool)
    for b, r in enumerate(rows):
        real[b, r[r >= 0].long()] = True
    assert not ours[1].masked_fill(real[:, None, :, None], 0.0).any()


@settings(max_examples=100, deadline=None)
@given(
    calls([torch.float32]),
    st.sampled_from(ISAS),
    st.sampled_from(["mean", "each"]),
    st.sampled_from(choices.ALIGNMENT_LOSSES),
    st.sampled_from([("row", False), ("matrix", False), ("column", False), ("column", True)]),
)
def test_losses_and_gradients_of_any_call(call, instructions, heads, loss, reduction):
    q, k, rows, cols = (call[name] for name in ("q", "k", "rows", "cols"))
    options = call["options"] | {"heads": heads, "loss": loss, "reduction": reduction[0], "sink_filter": reduction[1]}
    shape = reference.attention_slice(q, k, rows, cols, **call["options"], heads=heads).shape
    target = torch.rand(shape, generator=call["generator"]) / q.shape[2]

    def op(q, k):
        return attention_alignment(q, k, target, rows, cols, impl="cpp", **options)

    def oracle(q, k):
        return reference.attention_alignment(q, k, target, rows, cols, **options) + 0 * (q.sum() + k.sum())

    with mock.patch.dict(os.environ, {"CDISTILL_CPU_ISA": instructions}):
        ours = at_one_and_more_threads(call["threads"], lambda: with_gradients(op, [q, k]))
    eager = with_gradients(oracle, [q, k])
    exact = with_gradients(oracle, [q.double(), k.double()])
    assert_close(ours, eager, exact, (1e-6, 1e-6, 1e-6))
