"""Packed documents (cu_seqlens) and queries fewer than keys, in every op, backend and engine, against float64."""

import random
from unittest import mock

import pytest
import torch
from op_cases import assert_as_exact_as_eager, peak_memory

from cdistill.ops import (
    AttentionProblem,
    _pieces,
    attention_relation,
    attention_slice,
    attention_slice_accumulate,
    attention_with_alignment,
    flash_attention,
    reference,
)

IMPLS = ("torch", "cpp", "triton")
DRAWS = {"torch": 12, "cpp": 12, "triton": 1}


class Drawn:
    """A problem drawn from a seed, its call of every op, and the same call of the oracles."""

    def __init__(self, kind, impl, seed):
        draw, torch_draw = random.Random(f"{kind} {seed}"), torch.Generator().manual_seed(seed)
        self.impl, self.engine = impl, "triton" if impl == "triton" else "torch_flash"
        tokens = draw.randint(2, 20 if impl == "triton" else 45)
        queries, self.documents, batch = tokens, None, 1
        if kind == "documents":  # some empty, some of one token
            self.documents = [0, *sorted(draw.choices(range(tokens + 1), k=draw.randint(1, 4))), tokens]
        else:
            queries, batch = draw.randint(1, tokens - 1), draw.randint(1, 2)
        k_heads, group, self.heads = draw.randint(1, 2), draw.randint(1, 2), draw.choice(("mean", "each"))

        def normal(*shape):
            return torch.randn(*shape, generator=torch_draw)

        self.q = normal(batch, k_heads * group, queries, 16)
        self.k, self.v, self.teacher_k = (normal(batch, k_heads, tokens, 16) for _ in range(3))
        count, first = draw.randint(1, queries), tokens - queries

        def positions(n, lowest, count):
            found = [torch.randperm(n, generator=torch_draw)[:count] + lowest for _ in range(batch)]
            found[-1][draw.randrange(count)] = -1
            return torch.stack(found)

        self.rows, self.cols = positions(queries, first, count), positions(tokens, 0, draw.randint(1, tokens))
        mask = torch.rand(batch, tokens, generator=torch_draw) > 0.2 if draw.random() < 0.5 else None
        self.options = {"causal": draw.random() < 0.7, "key_mask": mask, "scale": draw.choice((None, 0.4, -0.3))}
        self.options["cu_seqlens"] = self.documents
        slices = (k_heads * group,) if self.heads == "each" else ()
        self.target = torch.rand(batch, *slices, count, self.cols.shape[1], generator=torch_draw)
        self.compared = {"loss": draw.choice(("cosine", "mse", "jsd")), "reduction": draw.choice(("row", "matrix"))}
        self.grads = [normal(*shape) for shape in (self.target.shape, (batch,), self.q.shape, (batch,))]

    def ours(self, q, k, v):
        """Slice, alignment and relation losses, attention and losses made together."""
        where, options = (self.rows, self.cols), {**self.options, "impl": self.impl, "heads": self.heads}
        if self.documents is not None:
            options["cu_seqlens"] = torch.tensor(self.documents, dtype=torch.int32)
        a = attention_slice(q, k, *where, **options)
        relation = attention_relation(q, k, [q.detach(), q.detach()], [k, self.teacher_k], *where, **options)
        fused = attention_with_alignment(q, k, v, self.target, *where, **options, **self.compared, engine=self.engine)
        return a, relation, *fused

    def wanted(self, q, k, v):
        """The same by the oracles, in the dtype of the arguments."""
        where, options = (self.rows, self.cols), {**self.options, "heads": self.heads}
        a = reference.attention_slice(q, k, *where, **options)
        teacher = [q.detach(), q.detach()], [k.detach(), self.teacher_k.to(k.dtype)]
        relation = reference.attention_relation(q, k, *teacher, *where, **options)
        losses = reference.attention_alignment(q, k, self.target.to(q.dtype), *where, **options, **self.compared)
        p = reference.attention_probabilities(q, k, **self.options)
        return a, relation, p @ v.repeat_interleave(q.shape[1] // k.shape[1], 1), losses

    def results(self, function, dtype):
        """Results of a function, and its gradients in q, k and v."""
        leaves = [x.to(dtype).requires_grad_() for x in (self.q, self.k, self.v)]
        results = function(*leaves)
        total = sum((x * g.to(dtype)).sum() for x, g in zip(results, self.grads, strict=False))
        gradients = torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)
        return [*(x.detach() for x in results), *gradients]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", ["documents", "fewer queries"])
def test_results_and_gradients_are_those_of_a_whole_masked_attention(kind, impl):
    for seed in range(1, DRAWS[impl] + 1):
        drawn = Drawn(kind, impl, seed)
        exact, eager = (drawn.results(drawn.wanted, dtype) for dtype in (torch.float64, torch.float32))
        assert_as_exact_as_eager(drawn.results(drawn.ours, torch.float32), eager, exact)


@pytest.mark.parametrize("impl", IMPLS)
def test_documents_where_their_rows_cannot_be_counted(impl):
    """As on a GPU, where rows and columns of other documents become padding instead of being left out."""
    with mock.patch.object(_pieces, "counts_at_once", lambda positions: False):
        for seed in range(1, DRAWS[impl] + 1):
            drawn = Drawn("documents", impl, seed)
            exact, eager = (drawn.results(drawn.wanted, dtype) for dtype in (torch.float64, torch.float32))
            assert_as_exact_as_eager(drawn.results(drawn.ours, torch.float32), eager, exact)


@pytest.mark.parametrize("kind", ["documents", "fewer queries"])
def test_log_sum_exps_and_their_gradients(kind):
    """Flash attention's lse, given to the slice: a gradient flows through both."""
    for seed in range(6):
        drawn = Drawn(kind, "cpp", seed)

        def both(q, k, v, drawn=drawn):
            lse = flash_attention(q, k, v, engine=drawn.engine, **drawn.options)[1]
            options = {**drawn.options, "heads": drawn.heads}
            return [attention_slice(q, k, drawn.rows, drawn.cols, lse=lse, **options)]

        def slice_alone(q, k, v, drawn=drawn):
            return drawn.wanted(q, k, v)[:1]

        exact, eager = (drawn.results(slice_alone, dtype) for dtype in (torch.float64, torch.float32))
        assert_as_exact_as_eager(drawn.results(both, torch.float32), eager, exact)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", ["documents", "fewer queries"])
def test_operators_and_the_compiler(kind, impl):
    drawn, ops = Drawn(kind, impl, 3), torch.ops.cdistill
    q, k, v = (x.clone().requires_grad_() for x in (drawn.q, drawn.k, drawn.v))
    problem = AttentionProblem(
        q, k, v, documents=drawn.documents, rows=drawn.rows, cols=drawn.cols, each=drawn.heads == "each"
    )
    compared = drawn.target, "kl", "row", False
    torch.library.opcheck(ops.attention_slice, (*problem._replace(v=None), impl))
    torch.library.opcheck(ops.attention_with_alignment, (*problem, *compared, impl, drawn.engine))
    options = {"cu_seqlens": drawn.documents, "impl": impl}

    def function(q, k):
        return attention_slice(q, k, drawn.rows, drawn.cols, **options).square().sum()

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    for got, want in zip(*(torch.autograd.grad(f(q, k), (q, k)) for f in (compiled, function)), strict=True):
        torch.testing.assert_close(got, want)


def test_slices_of_documents_are_added_to_their_windows():
    drawn = Drawn("documents", "cpp", 5)
    options = {**drawn.options, "heads": drawn.heads}
    sums = torch.ones(2, *drawn.target.shape)
    attention_slice_accumulate(drawn.q, drawn.k, drawn.rows, drawn.cols, sums, [1], **options)
    assert (sums[0] == 1).all()
    wanted = reference.attention_slice(drawn.q.double(), drawn.k.double(), drawn.rows, drawn.cols, **options) + 1
    torch.testing.assert_close(sums[1].double(), wanted, rtol=1e-5, atol=1e-6)


def test_a_chunk_is_the_end_of_the_whole():
    """Queries of the last tokens give what all queries give there."""
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(1, 4, 33, 16, generator=generator), torch.randn(1, 2, 33, 16, generator=generator)
    rows, cols = torch.tensor([[32, 30, -1, 31]]), torch.arange(9)[None]
    for impl in IMPLS:
        whole = attention_slice(q, k, rows, cols, impl=impl)
        assert torch.equal(attention_slice(q[:, :, 30:], k, rows, cols, impl=impl), whole)


@pytest.mark.parametrize("impl", ["torch", "cpp"])
def test_a_token_on_a_long_cache_takes_no_memory_of_the_other_queries(impl):
    q, k = torch.randn(1, 32, 1, 64), torch.randn(1, 2, 4096, 64)
    rows, cols = torch.tensor([[4095]]), torch.arange(100)[None]
    assert peak_memory(lambda: attention_slice(q, k, rows, cols, impl=impl)) < 0.1 * q.nbytes * 4096


REFUSED = {
    "B": (
        {"batch": 2},
        {"cu_seqlens": [0, 8]},
        "cu_seqlens needs documents packed into one row, q (1, H, T, D), got B = 2",
    ),
    "first": (
        {},
        {"cu_seqlens": [1, 8]},
        "cu_seqlens must go from 0 to T = 8, where the last document ends, got 1 to 8",
    ),
    "last": ({}, {"cu_seqlens": torch.tensor([0, 7])}, "cu_seqlens must go from 0 to T = 8"),
    "none": ({}, {"cu_seqlens": []}, "cu_seqlens must go from 0 to T = 8, where the last document ends, got nothing"),
    "order": ({}, {"cu_seqlens": [0, 5, 3, 8]}, "cu_seqlens must not decrease, got 3 after 5"),
    "dtype": (
        {},
        {"cu_seqlens": torch.tensor([0.0, 8.0])},
        "cu_seqlens must be int32 or int64 of shape (documents + 1,)",
    ),
    "text": ({}, {"cu_seqlens": "08"}, "cu_seqlens must be a tensor (documents + 1,) or a list of ints, got '08'"),
    "number": ({}, {"cu_seqlens": 8}, "cu_seqlens must be a tensor (documents + 1,) or a list of ints, got 8"),
    "both": ({"queries": 3}, {"cu_seqlens": [0, 8]}, "cu_seqlens needs as many queries as keys, got 3 and 8"),
    "row": ({"queries": 3, "row": 4}, {}, "rows must hold positions from 5 to T-1 = 7 (those of the last 3 tokens"),
    "longer": ({"queries": 9}, {}, "k must have the 9 tokens of q, or more before them, got (1, 2, 8, 16)"),
    "mask": (
        {"queries": 3},
        {"key_mask": torch.ones(1, 3, dtype=torch.bool)},
        "key_mask must have shape (B, T) = (1, 8)",
    ),
}


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_bad_documents_and_chunks(case):
    sizes, options, message = case
    batch, queries = sizes.get("batch", 1), sizes.get("queries", 8)
    q, k = torch.randn(batch, 2, queries, 16), torch.randn(batch, 2, 8, 16)
    rows = torch.full((batch, 1), sizes.get("row", 7))
    with pytest.raises(ValueError) as error:
        attention_slice(q, k, rows, torch.zeros_like(rows), **options)
    assert message in str(error.value) and "\n" not in str(error.value)
