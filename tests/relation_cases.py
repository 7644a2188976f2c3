"""Calls of attention_relation, drawn by hypothesis or by sizes, and how they are compared with float64."""

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from op_cases import device_of, with_gradients

from cdistill import choices
from cdistill.ops import _relation, attention_relation, reference

REDUCTIONS = [("row", False), ("matrix", False), ("column", False), ("column", True)]


@dataclass
class Side:
    """One model's tensors: a list of layers' queries and keys."""

    q: list
    k: list
    scale: float | None
    relation: str
    lse: list | None = None

    def read(self, layer):
        """Queries and keys of a layer's relation."""
        q, k = self.q[layer], self.k[layer]
        return {"qk": (q, k), "qq": (q, q), "kk": (k, k), "vv": (q, q)}[self.relation]

    def given(self, number=None):
        """What the op is given: None for what it does not read; a list for a window."""
        q = None if self.relation == "kk" else self.q
        k = None if self.relation in ("qq", "vv") else self.k
        return [None if x is None else x[0] if len(x) == 1 else x for x in (q, k)]


@dataclass
class Call:
    """Arguments of attention_relation on the CPU."""

    student: Side
    teacher: Side
    rows: torch.Tensor
    cols: torch.Tensor
    options: dict[str, Any] = field(default_factory=dict)
    block: int = 4

    def leaves(self):
        """What has a gradient: the student's tensors, and its lse if one is given."""
        found = [x for x in self.student.given() if x is not None]
        return found + (self.student.lse or [])

    def run(self, op, leaves, **options):
        """op on these leaves; everything else in their dtype and on their device, if they are float64."""
        like, rest = leaves[0], list(leaves)
        student = [None if x is None else rest.pop(0) for x in self.student.given()]
        wide = (lambda x: x.double()) if like.dtype == torch.float64 else (lambda x: x.to(like.device))

        def moved(x):
            return [wide(y) for y in x] if isinstance(x, list) else None if x is None else wide(x)

        lse = {"student_lse": rest.pop() if rest else None}
        lse["teacher_lse"] = None if self.teacher.lse is None else [x.to(like.device) for x in self.teacher.lse]
        if lse["teacher_lse"] is not None and len(self.teacher.q) == 1:
            lse["teacher_lse"] = lse["teacher_lse"][0]
        named = {k: v.to(like.device) if isinstance(v, torch.Tensor) else v for k, v in self.options.items()}
        named |= {"scale": self.student.scale, "teacher_scale": self.teacher.scale}
        named |= {"student_relation": self.student.relation, "teacher_relation": self.teacher.relation}
        places = self.rows.to(like.device), self.cols.to(like.device)
        return op(*student, *map(moved, self.teacher.given()), *places, **named, **lse, **options)


def positions(generator, batch, tokens, count, kept):
    """Distinct positions (B,count) in any order, ``kept`` of them in every sample, the others -1."""
    found = torch.full((batch, count), -1)
    for b in range(batch):
        n = min(kept[b % len(kept)], tokens, count)
        found[b, torch.randperm(count, generator=generator)[:n]] = torch.randperm(tokens, generator=generator)[:n]
    return found


def tensor(generator, order, gap, heads, batch, tokens, width, dtype=torch.float32):
    """(B,heads,T,D) with its axes in any order in memory, and unit stride on D."""
    sizes = [(batch, heads, tokens)[axis] for axis in order]
    x = torch.randn(*sizes, width + gap, generator=generator).to(dtype)[..., gap:]
    return x.permute(*(order.index(axis) for axis in range(3)), 3)


def near_lse(q, k, scale, generator):
    """Somewhat off the log-sum-exp over all keys, so that no probability is huge."""
    scores = q.float() @ k.float().repeat_interleave(q.shape[1] // k.shape[1], 1).mT
    lse = (scores * (q.shape[3] ** -0.5 if scale is None else scale)).logsumexp(3)
    return lse + 0.3 * torch.randn(lse.shape, generator=generator)


@st.composite
def sides(draw, generator, batch, tokens, heads, layers, dtype):
    k_heads = draw(st.sampled_from([h for h in range(1, heads + 1) if heads % h == 0]))
    relation = draw(st.sampled_from(["qk", "qk", *choices.RELATIONS]))
    k_heads = heads if relation == "kk" else k_heads
    width = 8 * draw(st.integers(2, 6))

    def tensors(heads):
        order, gap = draw(st.permutations(range(3))), draw(st.sampled_from([0, 3, 8]))
        return [tensor(generator, order, gap, heads, batch, tokens, width, dtype) for _ in range(layers)]

    side = Side(tensors(heads), tensors(k_heads), draw(st.sampled_from([None, 0.7, -0.3])), relation)
    if draw(st.integers(0, 3)) == 0:
        side.lse = [near_lse(*side.read(i), side.scale, generator) for i in range(layers)]
    return side


@st.composite
def calls(draw, dtypes=(torch.float32,)):
    """Any call that the op takes."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    batch, tokens = draw(st.integers(1, 3)), draw(st.integers(1, 40))
    elsewhere = draw(st.booleans())
    of_teacher = draw(st.integers(1, 40)) if elsewhere else tokens
    heads = draw(st.sampled_from(["mean", "each"]))
    fewer, times = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    more = draw(st.integers(1, 4)) if heads == "mean" else fewer * times
    numbers = draw(st.permutations((fewer, more)))
    loss = draw(st.sampled_from(choices.RELATION_LOSSES))
    reduction, sink_filter = draw(st.sampled_from(REDUCTIONS))
    layers = draw(st.integers(1, 3))
    student = draw(sides(generator, batch, tokens, numbers[0], 1, draw(st.sampled_from(dtypes))))
    teacher = draw(sides(generator, batch, of_teacher, numbers[1], layers, draw(st.sampled_from(dtypes))))
    counts = [draw(st.integers(1, 14)) for _ in range(2)]
    kept = [draw(st.lists(st.integers(0, 14), min_size=1, max_size=3)) for _ in range(2)]
    places = [positions(generator, batch, tokens, n, k) for n, k in zip(counts, kept, strict=True)]
    options = {"loss": loss, "reduction": reduction, "sink_filter": sink_filter, "heads": heads}
    options["causal"] = draw(st.booleans())
    if elsewhere:
        for name, n, k in zip(("teacher_rows", "teacher_cols"), counts, kept, strict=True):
            options[name] = positions(generator, batch, of_teacher, n, k)
    if draw(st.booleans()):
        share = draw(st.sampled_from([0.1, 0.5, 0.9]))
        options["key_mask"] = torch.rand(batch, tokens, generator=generator) < share
        if elsewhere or draw(st.booleans()):
            options["teacher_key_mask"] = torch.rand(batch, of_teacher, generator=generator) < share
    return Call(student, teacher, *places, options, block=draw(st.integers(1, 6)))


def check(call, impl):
    """Losses and gradients against float64: |ours - exact| <= 2 * |eager - exact| + 1e-5 * |exact| + 1e-6.

    Where terms cancel, one eager result may be nearer to the exact one than its arithmetic is: then eager's error is the
    largest of a few calls within 1e-6 of this one. Eager fp16 has no number for the least share: there, fp32 and the rounding
    of fp16 take its place.
    """
    leaves = call.leaves()
    grad = torch.arange(1.0, len(call.rows) + 1)

    def oracle(*leaves):
        return call.run(reference.attention_relation, leaves) + 0 * sum(x.sum() for x in leaves)

    with pytest.MonkeyPatch.context() as patch:
        for name in ("CPU_ROWS", "CUDA_ROWS", "FEWEST_ROWS"):
            patch.setattr(_relation, name, call.block)
        there = [x.to(device_of(impl)) for x in leaves]
        ours = with_gradients(lambda *x: call.run(attention_relation, x, impl=impl), there, grad)
    coarse = leaves[0].dtype == torch.float16 and call.options["loss"] in choices.SHARES
    exact = with_gradients(oracle, [x.double() for x in leaves], grad)
    assert ours[0].dtype == torch.float32
    relative, generator = 1e-5 + 2.0**-9 * coarse, torch.Generator().manual_seed(0)
    eager = [0.0] * len(exact)
    for neighbour in range(5):
        near = [x if neighbour == 0 else _beside(x, generator) for x in leaves]
        rough = with_gradients(oracle, [x.float() for x in near] if coarse else near, grad)
        there = with_gradients(oracle, [x.double() for x in near], grad) if neighbour else exact
        eager = [max(e, float((y - z).abs().max())) for e, y, z in zip(eager, rough, there, strict=True)]
        errors = [float((x.cpu() - z).abs().max()) for x, z in zip(ours, exact, strict=True)]
        allowed = [2 * e + relative * float(z.abs().max()) + 1e-6 for e, z in zip(eager, exact, strict=True)]
        if all(error <= most for error, most in zip(errors, allowed, strict=True)):
            return ours
    raise AssertionError(f"errors of losses and gradients {errors}, allowed {allowed}")


def _beside(x, generator):
    """x with every number up to 2^-20 of itself off."""
    return (x * (1 + 2.0**-20 * (2 * torch.rand(x.shape, generator=generator) - 1))).to(x.dtype)


def drawn(numbers=(2, 4), layers=1, seed=0, tokens=(23, 31), dtype=torch.float32, **options):
    """A call with padding, a key mask, grouped queries of the teacher, other tokens and other widths than the student's."""
    generator = torch.Generator().manual_seed(seed)
    sizes = zip(numbers, tokens, (16, 24), (1, layers), strict=True)
    student, teacher = (
        Side(
            [tensor(generator, (0, 1, 2), 0, h, 2, t, d, dtype) for _ in range(n)],
            [tensor(generator, (0, 1, 2), 0, max(1, h // 2), 2, t, d, dtype) for _ in range(n)],
            None,
            "qk",
        )
        for h, t, d, n in sizes
    )
    places = [positions(generator, 2, tokens[0], n, [n, n - 2]) for n in (9, 11)]
    options["teacher_rows"], options["teacher_cols"] = (positions(generator, 2, tokens[1], n, [n]) for n in (9, 11))
    for name, count in (("key_mask", tokens[0]), ("teacher_key_mask", tokens[1])):
        options[name] = torch.arange(count).expand(2, -1) >= torch.tensor([[0], [5]])
    return Call(student, teacher, *places, options)
