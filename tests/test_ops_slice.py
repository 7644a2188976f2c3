"""attention_slice in every implementation against the float64 oracle: values, gradients, masks, padding, bad input."""

import os
import re
import subprocess
import sys
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from op_cases import CASES, Case, assert_as_exact_as_eager, device_of, draw, moved, with_gradients

from cdistill.ops import _dispatch, attention_slice, reference

pytestmark = pytest.mark.usefixtures("poisoned_empty")

SMALL = Case(q_heads=2, k_heads=1)


def check(case, impl, heads, given_lse, seed=0):
    """Compare the slice and all its gradients with the oracle; return ours: result, dq, dk[, dlse]."""
    inputs = draw(case, seed)
    options = case.options(inputs) | {"heads": heads}
    rows, cols = inputs["rows"], inputs["cols"]
    leaves = [inputs["q"], inputs["k"]]
    if given_lse:
        scale = case.width**-0.5 if case.scale is None else case.scale
        keys = inputs["k"].double().repeat_interleave(case.q_heads // case.k_heads, 1)
        scores = inputs["q"].double() @ keys.mT * scale
        if case.causal:
            scores = scores.masked_fill(torch.ones(case.tokens, case.tokens, dtype=torch.bool).triu(1), -torch.inf)
        if inputs["key_mask"] is not None:
            scores = scores.masked_fill(~inputs["key_mask"][:, None, None], -torch.inf)
        leaves.append((scores.logsumexp(-1) + 0.1).float())
    generator = torch.Generator().manual_seed(seed + 1)
    shape = (case.q_heads, case.rows, case.cols) if heads == "each" else (case.rows, case.cols)
    grad = torch.randn(case.batch, *shape, generator=generator)

    def oracle(q, k, lse=None):
        return reference.attention_slice(q, k, rows, cols, lse=lse, **options)

    exact = with_gradients(oracle, [x.double() for x in leaves], grad)
    eager = with_gradients(oracle, leaves, grad)
    there = moved(inputs, device_of(impl))
    here = case.options(there) | {"heads": heads, "impl": impl}

    def op(q, k, lse=None):
        return attention_slice(q, k, there["rows"], there["cols"], lse=lse, **here)

    ours = with_gradients(op, [x.to(device_of(impl)) for x in leaves], grad)
    assert ours[0].dtype == torch.float32
    assert [x.dtype for x in ours[1:3]] == [case.dtype] * 2
    assert_as_exact_as_eager(ours, eager, exact)
    return ours


@pytest.mark.parametrize("heads, given_lse", [("mean", False), ("each", True)], ids=["mean-own-lse", "each-given-lse"])
@pytest.mark.parametrize("name", CASES)
def test_slice_and_gradients_match_float64(name, heads, given_lse, impl):
    check(CASES[name], impl, heads, given_lse)


@pytest.mark.parametrize("heads, given_lse", [("mean", True), ("each", False)], ids=["mean-given-lse", "each-own-lse"])
def test_other_pairs_of_heads_and_lse_match_float64(heads, given_lse, impl):
    check(CASES["gqa"], impl, heads, given_lse)


def test_half_precision_is_as_exact_as_eager_half_precision(impl):
    dtypes = [torch.float16] if impl == "triton" and device_of(impl) == "cpu" else [torch.float16, torch.bfloat16]
    for dtype in dtypes:
        check(replace(CASES["transposed-right"], dtype=dtype), impl, "mean", given_lse=False, seed=3)


def test_small_row_blocks_of_the_torch_backend_give_the_same(monkeypatch):
    monkeypatch.setattr("cdistill.ops._torch.BLOCK_BYTES", 4 * 2 * 37 * 3)
    check(CASES["gqa"], "torch", "mean", given_lse=False)
    check(CASES["causal-left"], "torch", "each", given_lse=True)


def test_hidden_keys_with_huge_scores_stay_zero(impl):
    device = device_of(impl)
    q = torch.ones(1, 1, 6, 16, device=device, requires_grad=True)
    k = torch.zeros(1, 1, 6, 16, device=device)
    k[0, 0, 4:] = 1e3  # exp(scale * q.k) overflows; row 3 does not see these keys
    k.requires_grad_()
    rows, cols = torch.tensor([[3]], device=device), torch.tensor([[1, 4, 5]], device=device)
    a = attention_slice(q, k, rows, cols, impl=impl)
    a.sum().backward()
    assert torch.allclose(a.cpu(), torch.tensor([[[0.25, 0.0, 0.0]]]))
    assert q.grad.isfinite().all()
    assert k.grad.isfinite().all()
    assert not k.grad[0, 0, 4:].any()


def test_rows_without_a_visible_key_are_zero_and_give_no_gradient(impl):
    case = replace(SMALL, batch=1, masked="left", tokens=12, rows=4, cols=4, padding=0)
    inputs = moved(draw(case), device_of(impl))
    inputs["rows"] = torch.tensor([[0, 3, 7, 11]], device=device_of(impl))  # keys 0..3 are masked
    for lse in (None, torch.full((1, 2, 12), -torch.inf), torch.full((1, 2, 12), torch.nan)):
        if lse is not None:
            lse[:, :, 4:] = 3.0
            lse = lse.to(device_of(impl)).requires_grad_()
        q, k = inputs["q"].clone().requires_grad_(), inputs["k"].clone().requires_grad_()
        key_mask = inputs["key_mask"]
        a = attention_slice(q, k, inputs["rows"], inputs["cols"], lse=lse, key_mask=key_mask, impl=impl)
        a.square().sum().backward()
        assert not a[0, :2].any()
        assert a[0, 2:].any()
        assert not q.grad[0, :, :4].any()
        assert not k.grad[0, :, :4].any()
        for grad in (q.grad, k.grad, *([] if lse is None else [lse.grad])):
            assert grad.isfinite().all()
            assert grad.any()


def test_gradient_of_padding_is_exactly_zero(impl):
    case = replace(SMALL, masked="right", rows=6, cols=6, padding=3)
    inputs = moved(draw(case), device_of(impl))
    q, k = inputs["q"].requires_grad_(), inputs["k"].requires_grad_()
    a = attention_slice(q, k, inputs["rows"], inputs["cols"], key_mask=inputs["key_mask"], impl=impl)
    a.backward(torch.full_like(a, 1e3))
    for b in range(case.batch):
        real = inputs["rows"][b][inputs["rows"][b] >= 0].tolist()
        others = [i for i in range(case.tokens) if i not in real]
        assert not q.grad[b, :, others].any()
    assert not k.grad[~inputs["key_mask"][:, None].expand(-1, case.k_heads, -1)].any()
    assert not a[-1][inputs["rows"][-1] < 0].any()
    assert not a[-1][:, inputs["cols"][-1] < 0].any()


@pytest.mark.parametrize("rows, cols", [(0, 3), (3, 0), (0, 0)])
@pytest.mark.parametrize("heads", ["mean", "each"])
def test_no_rows_or_no_columns(rows, cols, heads, impl):
    device = device_of(impl)
    q = torch.randn(2, 2, 5, 16, device=device, requires_grad=True)
    positions = [torch.zeros(2, n, dtype=torch.int64, device=device).add(torch.arange(n)) for n in (rows, cols)]
    lse = torch.zeros(2, 2, 5, device=device, requires_grad=True)
    a = attention_slice(q, q, *positions, lse=lse, heads=heads, impl=impl)
    assert a.shape == ((2, rows, cols) if heads == "mean" else (2, 2, rows, cols))
    a.sum().backward()
    assert not q.grad.any()
    assert not lse.grad.any()


def test_a_sample_of_padding_only(impl):
    inputs = moved(draw(replace(SMALL, padding=7, rows=7)), device_of(impl))
    q, k = inputs["q"].requires_grad_(), inputs["k"].requires_grad_()
    a = attention_slice(q, k, inputs["rows"], inputs["cols"], impl=impl)
    a.sum().backward()
    assert not a[1].any()
    assert a[0].any()
    assert not q.grad[1].any()
    assert not k.grad[1].any()


def test_second_backward_gives_identical_gradients(impl):
    inputs = moved(draw(SMALL), device_of(impl))
    q, k = inputs["q"].requires_grad_(), inputs["k"].requires_grad_()
    a = attention_slice(q, k, inputs["rows"], inputs["cols"], impl=impl)
    first = torch.autograd.grad(a.square().sum(), (q, k), retain_graph=True)
    second = torch.autograd.grad(a.square().sum(), (q, k), retain_graph=True)
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


def test_only_needed_gradients_are_made(impl):
    inputs = moved(draw(SMALL), device_of(impl))
    a = attention_slice(inputs["q"].requires_grad_(), inputs["k"], inputs["rows"], inputs["cols"], impl=impl)
    a.sum().backward()
    assert inputs["q"].grad is not None
    assert inputs["k"].grad is None


def test_int32_positions_and_sliced_rows(impl):
    inputs = moved(draw(SMALL), device_of(impl))
    args = inputs["q"], inputs["k"]
    whole = attention_slice(*args, inputs["rows"], inputs["cols"], impl=impl)
    part = attention_slice(*args, inputs["rows"][:, ::2].int(), inputs["cols"][:, 1::3].short(), impl=impl)
    assert torch.allclose(part, whole[:, ::2, 1::3], rtol=1e-5, atol=1e-7)


def test_runs_under_torch_compile():
    inputs = draw(SMALL)
    q = inputs["q"].requires_grad_()

    def step(q):
        return attention_slice(q * 2, inputs["k"], inputs["rows"], inputs["cols"], impl="torch").square().sum()

    (expected,) = torch.autograd.grad(step(q), q)
    (compiled,) = torch.autograd.grad(torch.compile(step, backend="aot_eager")(q), q)
    assert torch.allclose(compiled, expected)


GOOD = {
    "q": torch.zeros(2, 4, 8, 16),
    "k": torch.zeros(2, 2, 8, 16),
    "rows": torch.tensor([[1, 2], [3, -1]]),
    "cols": torch.tensor([[0, 1, 2], [5, -1, -1]]),
}
BAD = [
    ({"q": torch.zeros(4, 8, 16)}, "q must have 4 dimensions"),
    ({"q": torch.zeros(2, 4, 8, 16).double()}, "q must be float16, bfloat16 or float32"),
    ({"q": torch.zeros(2, 4, 16, 8).mT}, "q must have unit stride"),
    ({"q": torch.zeros(2, 4, 0, 16), "k": torch.zeros(2, 2, 0, 16)}, "q must hold at least one token"),
    ({"q": torch.zeros(2, 4, 8, 20), "k": torch.zeros(2, 2, 8, 20)}, "q must have a head dim that is a multiple of 8"),
    ({"q": torch.zeros(2, 4, 8, 264), "k": torch.zeros(2, 2, 8, 264)}, "q must have a head dim"),
    ({"q": [[0.0]]}, "q must be a tensor"),
    ({"k": torch.zeros(2, 2, 8, 16).half()}, "k must have the dtype of q"),
    ({"k": torch.zeros(2, 3, 8, 16)}, "k must have a number of heads that divides the 4 heads of q"),
    ({"k": torch.zeros(2, 2, 7, 16)}, "k must have the 8 tokens of q"),
    ({"k": torch.zeros(2, 2, 8, 16, device="meta")}, "k must be on cpu"),
    ({"rows": torch.tensor([1, 2])}, "rows must have shape (B, count)"),
    ({"rows": torch.tensor([[1.0], [2.0]])}, "rows must have an integer dtype"),
    ({"rows": torch.tensor([[True], [False]])}, "rows must have an integer dtype"),
    ({"rows": torch.tensor([[8], [0]])}, "rows must hold positions from 0 to T-1 = 7"),
    ({"rows": torch.tensor([[-2], [0]])}, "rows must hold positions"),
    ({"rows": torch.tensor([[1, 0, 1], [0, 1, 2]])}, "rows must hold distinct positions"),
    ({"cols": torch.tensor([[0], [8]])}, "cols must hold positions"),
    ({"cols": torch.tensor([[3, 3], [0, 1]])}, "cols must hold distinct positions"),
    ({"cols": torch.tensor([[0]])}, "cols must have shape (B, count)"),
    ({"lse": torch.zeros(2, 2, 8)}, "lse must have shape (B, Hq, T)"),
    ({"lse": torch.zeros(2, 4, 8).half()}, "lse must be float32"),
    ({"key_mask": torch.ones(2, 8)}, "key_mask must be bool"),
    ({"key_mask": torch.ones(8, dtype=torch.bool)}, "key_mask must have shape (B, T)"),
    ({"scale": float("nan")}, "scale must be None or a finite number"),
    ({"scale": torch.ones(())}, "scale must be None or a finite number"),
    ({"scale": 1e-46}, "scale must be 0 or of a size from 2^-100 to 2^100, got 1e-46"),
    ({"scale": -1e39}, "scale must be 0 or of a size from 2^-100 to 2^100"),
    ({"causal": "yes"}, "causal must be True or False"),
    ({"heads": "all"}, "heads must be one of"),
    ({"impl": "cuda"}, "impl must be None or one of"),
]


@pytest.mark.parametrize("change, message", BAD, ids=[f"{next(iter(c))}-{i}" for i, (c, _) in enumerate(BAD)])
def test_bad_input_names_the_argument(change, message):
    arguments = GOOD | {"impl": "torch"} | change
    tensors = [arguments.pop(name) for name in ("q", "k", "rows", "cols")]
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        attention_slice(*tensors, **arguments)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "change",
    [
        {"q": torch.zeros(2, 8, 4, 16), "k": torch.zeros(2, 8, 2, 16)},
        {"q": torch.zeros(2, 8, 4, 16), "k": torch.zeros(2, 8, 4, 16)},
        {
            "q": torch.zeros(2, 8, 4, 16),
            "k": torch.zeros(2, 8, 4, 16),
            "cols": torch.zeros(2, 1, dtype=torch.int64),
            "rows": torch.ones(2, 1, dtype=torch.int64),
            "key_mask": torch.ones(2, 8, dtype=torch.bool),
        },
    ],
)
def test_tokens_before_heads_are_told(change):
    arguments = GOOD | {"impl": "torch"} | change
    tensors = [arguments.pop(name) for name in ("q", "k", "rows", "cols")]
    with pytest.raises(ValueError, match=re.escape("; if these are (B, T, H, D), give x.transpose(1, 2)")):
        attention_slice(*tensors, **arguments)


def test_scalars_of_numpy_are_numbers(impl):
    inputs = [torch.randn(1, 2, 8, 16), torch.randn(1, 2, 8, 16), torch.tensor([[4, 7]]), torch.tensor([[0, 3]])]
    assert torch.equal(
        attention_slice(*inputs, scale=np.float32(0.5), impl=impl), attention_slice(*inputs, scale=0.5, impl=impl)
    )


def test_triton_on_cpu_tensors_is_refused_without_the_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="impl='triton' needs CUDA tensors"):
        attention_slice(*GOOD.values(), impl="triton")


def test_bfloat16_is_refused_on_the_triton_interpreter(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    q, k = GOOD["q"].bfloat16(), GOOD["k"].bfloat16()
    with pytest.raises(ValueError, match="bfloat16 under TRITON_INTERPRET=1"):
        attention_slice(q, k, GOOD["rows"], GOOD["cols"], impl="triton")


def test_without_the_cpp_module_the_default_warns_once_and_an_explicit_choice_raises(monkeypatch):
    monkeypatch.setattr(_dispatch, "_why_no_cpp", lambda: "not built")
    _dispatch.warn_once.cache_clear()
    with pytest.warns(UserWarning, match="CPU ops use the torch implementation"):
        attention_slice(*GOOD.values())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attention_slice(*GOOD.values())
    with pytest.raises(ValueError, match=r"needs the C\+\+ module .* \(not built\)"):
        attention_slice(*GOOD.values(), impl="cpp")


def test_importing_the_ops_loads_no_backend():
    code = "import sys, cdistill.ops; assert not {'triton', 'cdistill._C', 'cdistill.ops._cpp'} & set(sys.modules)"
    subprocess.run(
        [sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    )
