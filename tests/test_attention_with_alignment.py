"""attention_with_alignment against eager attention in float64, for every pair of slice backend and attention engine."""

import re
from dataclasses import replace

import pytest
import torch
from cdistill.kernels import _launch
from op_cases import CASES, Case, assert_as_exact_as_eager, draw, peak_memory

from benchmarks._contenders import SHAPES
from benchmarks._contenders import draw as draw_shape
from cdistill import choices
from cdistill.ops import (
    _engines_flash_attn,
    attention_alignment,
    attention_with_alignment,
    flash_attention,
    reference,
)
from cdistill.ops._dispatch import backend
from cdistill.ops._engines import ENGINES

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
PAIRS = (
    [("triton", name) for name in ENGINES if ENGINES[name].missing() is None]
    if CUDA
    else [("torch", "torch_flash"), ("cpp", "torch_flash"), ("triton", "torch_flash"), ("triton", "triton")]
)
SMALL = Case(q_heads=2, k_heads=1, tokens=21, width=16)
LOSSES = [(loss, reduction, False) for loss in choices.ALIGNMENT_LOSSES for reduction in choices.REDUCTIONS]
LOSSES += [("cosine", "column", True)]


def inputs_of(case, seed=0, heads="mean"):
    inputs = draw(case, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    inputs["v"] = torch.randn(inputs["k"].shape, generator=generator).to(case.dtype)
    inputs["dout"] = torch.randn(inputs["q"].shape, generator=generator).to(case.dtype)
    inputs["dloss"] = torch.rand(case.batch, generator=generator) * 50 + 10
    if heads == "mean":
        inputs["target"] = inputs["target"].mean(1)
    return {name: None if x is None else x.to(DEVICE) for name, x in inputs.items()}


def through(function, inputs, dtype):
    """out, losses and the gradients of q, k, v for dout and dloss, with all inputs in ``dtype``."""
    leaves = [inputs[name].detach().to(dtype).requires_grad_() for name in ("q", "k", "v")]
    out, losses = function(*leaves)
    grads = torch.autograd.grad((out, losses), leaves, (inputs["dout"].to(out.dtype), inputs["dloss"].to(losses.dtype)))
    return [x.detach().cpu() for x in (out, losses, *grads)]


def eager(inputs, case, options):
    def function(q, k, v):
        attention = {"causal": case.causal, "scale": case.scale, "key_mask": inputs["key_mask"]}
        p = reference.attention_probabilities(q, k, **attention)
        positions = inputs["rows"], inputs["cols"]
        losses = reference.attention_alignment(q, k, inputs["target"].to(q.dtype), *positions, **attention, **options)
        return p @ v.repeat_interleave(case.q_heads // case.k_heads, 1), losses

    return function


def ours(inputs, case, options, impl, engine):
    def function(q, k, v):
        attention = {"causal": case.causal, "scale": case.scale, "key_mask": inputs["key_mask"]}
        tensors = (inputs[name] for name in ("target", "rows", "cols"))
        return attention_with_alignment(q, k, v, *tensors, **attention, **options, impl=impl, engine=engine)

    return function


def assert_matches_float64(case, options, impl, engine, **drawn):
    inputs = inputs_of(case, heads=options.get("heads", "mean"), **drawn)
    exact = through(eager(inputs, case, options), inputs, torch.float64)
    rounded = through(eager(inputs, case, options), inputs, case.dtype)
    assert_as_exact_as_eager(through(ours(inputs, case, options, impl, engine), inputs, case.dtype), rounded, exact)


@pytest.mark.parametrize(("impl", "engine"), PAIRS)
@pytest.mark.parametrize("name", CASES)
def test_matches_float64(name, impl, engine):
    case = replace(CASES[name], dtype=torch.bfloat16) if CUDA else CASES[name]
    if CUDA and case.masked and engine != "triton":
        with pytest.raises(ValueError, match="takes no key_mask"):
            assert_matches_float64(case, {}, impl, engine)
    else:
        assert_matches_float64(case, {}, impl, engine)


@pytest.mark.parametrize(
    ("impl", "engine", "heads"),
    [
        (*pair, heads)
        for pair in PAIRS
        for heads in ("mean", "each")
        if (*pair, heads) != ("triton", "torch_flash", "each")
    ],
)
@pytest.mark.parametrize(("loss", "reduction", "sink_filter"), LOSSES)
def test_every_loss_matches_float64(loss, reduction, sink_filter, impl, engine, heads):
    options = {"loss": loss, "reduction": reduction, "sink_filter": sink_filter, "heads": heads}
    assert_matches_float64(replace(SMALL, dtype=torch.float16) if CUDA else SMALL, options, impl, engine, seed=3)


@pytest.mark.parametrize(("impl", "engine"), PAIRS)
def test_matches_float64_in_half_precision(impl, engine):
    assert_matches_float64(replace(SMALL, dtype=torch.float16, tokens=60, rows=12, cols=30), {}, impl, engine)


@pytest.mark.parametrize(("impl", "engine"), PAIRS)
def test_same_as_the_two_ops_one_after_the_other(impl, engine):
    inputs = inputs_of(replace(SMALL, dtype=torch.float16) if CUDA else SMALL)

    def apart(q, k, v):
        out, lse = flash_attention(q, k, v, impl="triton" if engine == "triton" else "torch")
        tensors = (inputs[name] for name in ("target", "rows", "cols"))
        return out, attention_alignment(q, k, *tensors, lse=lse, impl=impl)

    one = through(ours(inputs, SMALL, {}, impl, engine), inputs, inputs["q"].dtype)
    two = through(apart, inputs, inputs["q"].dtype)
    for x, y in zip(one, two, strict=True):
        torch.testing.assert_close(x, y, rtol=2e-3 if CUDA else 1e-4, atol=2e-3 if CUDA else 1e-5)


@pytest.mark.parametrize(("impl", "engine"), PAIRS)
def test_either_result_may_be_left_unused(impl, engine):
    inputs = inputs_of(replace(SMALL, dtype=torch.float16) if CUDA else SMALL)
    function = ours(inputs, SMALL, {}, impl, engine)
    both = {}
    for use in ("out", "loss", "both"):
        leaves = [inputs[name].detach().requires_grad_() for name in ("q", "k", "v")]
        out, losses = function(*leaves)
        chosen = {"out": [out], "loss": [losses], "both": [out, losses]}[use]
        upstream = {"out": [inputs["dout"]], "loss": [inputs["dloss"]], "both": [inputs["dout"], inputs["dloss"]]}[use]
        both[use] = torch.autograd.grad(chosen, leaves, upstream, materialize_grads=True)
    assert not both["loss"][2].any()
    for of_out, of_loss, of_both in zip(both["out"], both["loss"], both["both"], strict=True):
        tolerance = (5e-3, 5e-3) if CUDA else (1e-4, 1e-5)
        torch.testing.assert_close(of_out + of_loss, of_both, rtol=tolerance[0], atol=tolerance[1])


@pytest.mark.parametrize(("impl", "engine"), PAIRS)
def test_second_backward_gives_identical_gradients_and_leaves_the_output_alone(impl, engine):
    inputs = inputs_of(replace(SMALL, dtype=torch.float16) if CUDA else SMALL)
    inputs["dout"][:, :, ::3] = 0  # rows whose dout cannot carry dlse
    leaves = [inputs[name].requires_grad_() for name in ("q", "k", "v")]
    out, losses = ours(inputs, SMALL, {}, impl, engine)(*leaves)
    before = out.detach().clone()
    upstream = inputs["dout"], inputs["dloss"]
    first = torch.autograd.grad((out, losses), leaves, upstream, retain_graph=True)
    assert torch.equal(out, before)
    second = torch.autograd.grad((out, losses), leaves, upstream)
    if ENGINES[engine].deterministic and not (CUDA and engine != "triton"):
        assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))
    with torch.random.fork_rng(), pytest.raises(RuntimeError, match="no autograd formula"):
        out, losses = ours(inputs, SMALL, {}, impl, engine)(*leaves)
        (once,) = torch.autograd.grad(losses.sum(), leaves[:1], create_graph=True)
        once.sum().backward()


@pytest.mark.parametrize(("impl", "engine"), PAIRS)
@pytest.mark.parametrize("scale", [-0.3, 0.0])
def test_scales_that_are_not_positive(scale, impl, engine):
    case = replace(SMALL, scale=scale, dtype=torch.float16 if CUDA else torch.float32)
    assert_matches_float64(case, {}, impl, engine)


@pytest.mark.skipif(CUDA, reason="spies on CPU backends")
@pytest.mark.parametrize("impl", ["torch", "cpp", "triton"])
def test_an_explicit_impl_does_all_that_the_engine_lacks(impl, monkeypatch):
    used = []
    for name in ("torch", "cpp", "triton"):
        module = backend(name, torch.zeros(1))
        for primitive in ("fold_dlse", "unfold_dlse", "row_lse_backward", "slice_backward"):
            function = getattr(module, primitive)
            monkeypatch.setattr(module, primitive, lambda *a, n=name, f=function, **o: used.append(n) or f(*a, **o))
    inputs = inputs_of(SMALL)
    through(ours(inputs, SMALL, {}, impl, "torch_flash"), inputs, torch.float32)
    assert set(used) == {impl}


@pytest.mark.parametrize(("impl", "engine"), PAIRS)
def test_dout_that_cannot_carry_dlse(impl, engine):
    """Rows with dout zero, or so small that dlse / |dout| overflows, as in the last layer of a model."""
    case = replace(SMALL, dtype=torch.float16) if CUDA else SMALL
    inputs = inputs_of(case)
    for b in range(case.batch):
        inputs["dout"][b, :, inputs["rows"][b, :3].clamp(min=0)] = 0
        inputs["dout"][b, :, inputs["rows"][b, 3].clamp(min=0)] *= 1e-7
    exact = through(eager(inputs, case, {}), inputs, torch.float64)
    rounded = through(eager(inputs, case, {}), inputs, case.dtype)
    assert_as_exact_as_eager(through(ours(inputs, case, {}, impl, engine), inputs, case.dtype), rounded, exact)


@pytest.mark.parametrize(("impl", "engine"), PAIRS)
@pytest.mark.parametrize(("rows", "cols"), [(0, 4), (4, 0)])
def test_nothing_to_align(rows, cols, impl, engine):
    inputs = inputs_of(replace(SMALL, rows=rows, cols=cols, padding=0, dtype=torch.float16 if CUDA else torch.float32))
    leaves = [inputs[name].detach().requires_grad_() for name in ("q", "k", "v")]
    out, losses = ours(inputs, SMALL, {}, impl, engine)(*leaves)
    assert losses.tolist() == [0, 0]
    grads = torch.autograd.grad((out, losses), leaves, (inputs["dout"], inputs["dloss"]))
    plain, _ = flash_attention(*leaves, impl="triton" if engine == "triton" else "torch")
    for got, want in zip(grads, torch.autograd.grad(plain, leaves, inputs["dout"]), strict=True):
        torch.testing.assert_close(got, want)


GOOD = {
    "q": torch.zeros(2, 4, 8, 16),
    "k": torch.zeros(2, 2, 8, 16),
    "v": torch.zeros(2, 2, 8, 16),
    "target": torch.zeros(2, 2, 3),
    "rows": torch.tensor([[1, 2], [3, -1]]),
    "cols": torch.tensor([[0, 1, 2], [5, -1, -1]]),
}
BAD = [
    ({"v": torch.zeros(2, 2, 9, 16)}, "v must have shape"),
    ({"rows": torch.tensor([[8], [0]]), "target": torch.zeros(2, 1, 3)}, "rows must hold positions from 0 to T-1 = 7"),
    ({"cols": torch.tensor([[3, 3, 1], [0, 1, 2]])}, "cols must hold distinct positions"),
    ({"target": torch.zeros(2, 2, 4)}, "target must have shape (B, R, V) = (2, 2, 3)"),
    ({"key_mask": torch.ones(2, 1, 8, 8, dtype=torch.bool)}, "key_mask must have shape (B, T)"),
    ({"loss": "l1"}, "loss must be one of"),
    ({"heads": "all"}, "heads must be one of"),
    ({"engine": "cudnn"}, "engine must be None or one of ('triton', 'torch_flash', "),
    ({"engine": "torch_cudnn"}, "engine='torch_cudnn' needs CUDA tensors, q is on cpu"),
    ({"impl": "cuda"}, "impl must be None or one of"),
]


@pytest.mark.parametrize("change, message", BAD, ids=[f"{next(iter(c))}-{i}" for i, (c, _) in enumerate(BAD)])
def test_bad_input_names_the_argument(change, message):
    arguments = GOOD | change
    tensors = [arguments.pop(name) for name in ("q", "k", "v", "target", "rows", "cols")]
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        attention_with_alignment(*tensors, **arguments)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["flash_attn_2", "flash_attn_3", "flash_attn_4"])
def test_an_engine_that_is_not_installed_says_what_is_missing(name, monkeypatch):
    engine = ENGINES[name]
    monkeypatch.setattr(_engines_flash_attn, "find_spec", lambda module: None)
    with pytest.raises(ValueError, match=f"engine='{name}' cannot run: the module {engine.module} is not installed: "):
        attention_with_alignment(*GOOD.values(), engine=name)


@pytest.mark.skipif(CUDA, reason="on a GPU the benchmark measures it")
@pytest.mark.parametrize("name", ["paper", "T4096"])
def test_extra_memory_is_at_most_three_slices(name, monkeypatch):
    """At the sizes of the benchmark: all buffers are allocated as on a GPU, only the kernels that fill them do not run."""
    shape = next(s for s in SHAPES if s.name == name)
    p = draw_shape(shape, torch.float16, DEVICE)
    launch = _launch.launch

    def launch_checks(kernel, *arguments, **named):
        if kernel.__name__ in ("claim_kernel", "check_kernel"):  # whose results are read at once
            launch(kernel, *arguments, **named)

    monkeypatch.setattr(_launch, "launch", launch_checks)

    def plain():
        out, _ = flash_attention(*p.leaves, impl="triton")
        torch.autograd.grad(out, p.leaves, p.dout)

    def aligned():
        outputs = attention_with_alignment(*p.inputs, impl="triton", engine="triton")
        torch.autograd.grad(outputs, p.leaves, (p.dout, p.dlosses))

    plain()  # what only a first call allocates
    extra = peak_memory(aligned) - peak_memory(plain)
    assert shape.slice_bytes < extra <= 3 * shape.slice_bytes
