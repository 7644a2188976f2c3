"""flash_attention against eager attention in float64: output, log-sum-exp, and gradients through either and both."""

import re
from dataclasses import replace
from unittest import mock

import pytest
import torch
from cdistill.kernels import _flash_blocks, _launch
from op_cases import CASES, Case, assert_as_exact_as_eager, device_of, draw, moved

from cdistill.ops import flash_attention, reference
from cdistill.ops._engines import ENGINES

IMPLS = ("torch", "triton")
SMALL = Case(q_heads=2, k_heads=1, tokens=21, width=16)


def inputs_of(case, impl, seed=0):
    """q, k, v, key_mask and upstream gradients of out and lse."""
    inputs = draw(case, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    inputs["v"] = torch.randn(inputs["k"].shape, generator=generator).to(case.dtype)
    inputs["dout"] = torch.randn(inputs["q"].shape, generator=generator).to(case.dtype)
    inputs["dlse"] = torch.randn(inputs["q"].shape[:3], generator=generator)
    inputs = {name: inputs[name] for name in ("q", "k", "v", "key_mask", "dout", "dlse")}
    return moved(inputs, device_of(impl))


def eager(inputs, case, dtype, use):
    """out, lse of the rows that see a key (0 elsewhere), and gradients, everything in ``dtype``."""
    q, k, v = (inputs[name].detach().to(dtype).requires_grad_() for name in ("q", "k", "v"))
    group = case.q_heads // case.k_heads
    options = {"causal": case.causal, "scale": case.scale, "key_mask": inputs["key_mask"]}
    p = reference.attention_probabilities(q, k, **options)
    out = p @ v.repeat_interleave(group, 1)
    s = q @ k.repeat_interleave(group, 1).mT * (case.width**-0.5 if case.scale is None else case.scale)
    seen = torch.ones(case.tokens, case.tokens, dtype=torch.bool, device=q.device)
    seen = (seen.tril() if case.causal else seen)[None, None]
    if inputs["key_mask"] is not None:
        seen = seen & inputs["key_mask"][:, None, None]
    lives = seen.any(-1).expand(q.shape[:3])
    lse = s.masked_fill(~seen & lives[..., None], -torch.inf).logsumexp(-1).masked_fill(~lives, 0.0)
    loss = 0.0
    if "out" in use:
        loss = loss + (out * inputs["dout"].to(dtype)).sum()
    if "lse" in use:
        loss = loss + (lse * inputs["dlse"].to(dtype)).sum()
    return [out.detach(), lse.detach(), *torch.autograd.grad(loss, (q, k, v), materialize_grads=True)], lives


def ours(inputs, case, use, impl=None, engine=None):
    leaves = [inputs[name].detach().requires_grad_() for name in ("q", "k", "v")]
    options = {"causal": case.causal, "scale": case.scale, "key_mask": inputs["key_mask"]}
    out, lse = flash_attention(*leaves, **options, impl=impl, engine=engine)
    results = {"out": (out, inputs["dout"]), "lse": (lse, inputs["dlse"])}
    outputs, upstream = zip(*(results[name] for name in use), strict=True)
    grads = torch.autograd.grad(outputs, leaves, upstream, materialize_grads=True, retain_graph=True)
    again = torch.autograd.grad(outputs, leaves, upstream, materialize_grads=True)
    assert all(torch.equal(x, y) for x, y in zip(grads, again, strict=True))
    return [out.detach(), lse.detach(), *grads]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    ("name", "use"),
    [(name, ("out", "lse")) for name in CASES]
    + [(name, (one,)) for name in ("full-left", "transposed-right") for one in ("out", "lse")],
)
def test_matches_float64(name, use, impl):
    case = CASES[name]
    inputs = inputs_of(case, impl)
    exact, lives = eager(inputs, case, torch.float64, use)
    rounded, _ = eager(inputs, case, case.dtype, use)
    got = ours(inputs, case, use, impl)
    assert torch.equal(got[1] == -torch.inf, ~lives)
    assert not got[0][~lives].any()
    got[1] = got[1].masked_fill(~lives, 0.0)
    cpu = [[x.cpu() for x in results] for results in (got, rounded, exact)]
    assert_as_exact_as_eager(*cpu)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", ["gqa", "transposed-right", "wide"])
def test_matches_float64_in_half_precision(name, impl):
    case = replace(CASES[name], dtype=torch.float16)
    inputs = inputs_of(case, impl)
    exact, _ = eager(inputs, case, torch.float64, ("out", "lse"))
    rounded, _ = eager(inputs, case, torch.float16, ("out", "lse"))
    got = ours(inputs, case, ("out", "lse"), impl)
    assert got[0].dtype == torch.float16 and got[1].dtype == torch.float32
    cpu = [[x.cpu() for x in results] for results in (got, rounded, exact)]
    assert_as_exact_as_eager(*cpu)


LONG = Case(batch=1, q_heads=2, k_heads=1, tokens=100, width=16, dtype=torch.float16)


@pytest.mark.parametrize(
    ("causal", "hidden"),
    [(True, None), (True, slice(0, 40)), (True, slice(70, 71)), (False, slice(80, 100)), (False, slice(0, 90))],
)
def test_loops_with_the_mask_apart(causal, hidden):
    """What some GPUs run: no block is left out and none counted twice, whatever keys are hidden, all blocks plain or none."""
    case = replace(LONG, causal=causal)
    inputs = inputs_of(case, "triton")
    if hidden is not None:
        inputs["key_mask"] = torch.ones(1, case.tokens, dtype=torch.bool, device=inputs["q"].device)
        inputs["key_mask"][:, hidden] = False
    exact, lives = eager(inputs, case, torch.float64, ("out", "lse"))
    rounded, _ = eager(inputs, case, torch.float16, ("out", "lse"))
    here = _launch.architecture(inputs["q"].device)
    with mock.patch.dict(_flash_blocks.PARTED, {"flash_forward": (here,), "flash_dkdv": (here,)}):
        got = ours(inputs, case, ("out", "lse"), "triton")
    got[1] = got[1].masked_fill(~lives, 0.0)
    cpu = [[x.cpu() for x in results] for results in (got, rounded, exact)]
    assert_as_exact_as_eager(*cpu)


@pytest.mark.parametrize("impl", IMPLS)
def test_rows_without_keys_have_no_gradient(impl):
    case = replace(SMALL, masked="left")
    inputs = inputs_of(case, impl)
    inputs["key_mask"][0] = False
    _, lse, dq, dk, dv = ours(inputs, case, ("out", "lse"), impl)
    assert (lse[0] == -torch.inf).all()
    for grad in (dq, dk, dv):
        assert grad.isfinite().all() and not grad[0].any() and grad[1].any()
    assert not dk.transpose(1, 2)[~inputs["key_mask"]].any()
    assert not dv.transpose(1, 2)[~inputs["key_mask"]].any()


@pytest.mark.parametrize("impl", IMPLS)
def test_rows_whose_output_has_no_gradient_still_carry_that_of_their_lse(impl):
    inputs = inputs_of(SMALL, impl)
    inputs["dout"][:, :, ::2] = 0
    inputs["dout"][:, :, 1::4] *= 1e-9
    exact, _ = eager(inputs, SMALL, torch.float64, ("out", "lse"))
    rounded, _ = eager(inputs, SMALL, torch.float32, ("out", "lse"))
    cpu = [[x.cpu() for x in results] for results in (ours(inputs, SMALL, ("out", "lse"), impl), rounded, exact)]
    assert_as_exact_as_eager(*cpu)


@pytest.mark.parametrize("impl", IMPLS)
def test_the_output_is_as_it_was_after_the_backward_pass(impl):
    inputs = inputs_of(SMALL, impl)
    leaves = [inputs[name].requires_grad_() for name in ("q", "k", "v")]
    out, lse = flash_attention(*leaves, impl=impl)
    before = out.detach().clone(), lse.detach().clone(), inputs["dout"].clone(), inputs["dlse"].clone()
    torch.autograd.backward((out, lse), (inputs["dout"], inputs["dlse"]))
    after = out, lse, inputs["dout"], inputs["dlse"]
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("scale", [-0.3, 0.0])
def test_scales_that_are_not_positive(scale, impl):
    case = replace(SMALL, scale=scale, masked="right")
    inputs = inputs_of(case, impl)
    exact, lives = eager(inputs, case, torch.float64, ("out", "lse"))
    rounded, _ = eager(inputs, case, torch.float32, ("out", "lse"))
    found = ours(inputs, case, ("out", "lse"), impl)
    found[1] = found[1].masked_fill(~lives, 0.0)
    assert_as_exact_as_eager(found, [x.cpu() for x in rounded], [x.cpu() for x in exact])


@pytest.mark.parametrize("impl", IMPLS)
def test_a_gradient_that_is_the_output_itself(impl):
    """As of a loss out * out / 2 whose backward returns what it saved."""
    inputs = inputs_of(SMALL, impl)
    leaves = [inputs[name].requires_grad_() for name in ("q", "k", "v")]
    results = flash_attention(*leaves, impl=impl)
    for dout in (results[0].detach(), results[0].detach().transpose(1, 2).clone().transpose(1, 2)):
        inputs[dout.data_ptr() == results[0].data_ptr()] = torch.autograd.grad(
            results, leaves, (dout, inputs["dlse"]), retain_graph=True
        )
    for alone, aliased in zip(inputs[False], inputs[True], strict=True):
        torch.testing.assert_close(aliased, alone, rtol=1e-4, atol=1e-5)


def test_the_output_survives_a_backward_pass_that_fails(monkeypatch):
    inputs = inputs_of(SMALL, "torch")
    leaves = [inputs[name].requires_grad_() for name in ("q", "k", "v")]
    out, lse = flash_attention(*leaves, impl="torch")
    before = out.detach().clone()

    def fail(*arguments):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(ENGINES["torch_flash"], "backward", fail)
    with pytest.raises(torch.OutOfMemoryError):
        torch.autograd.backward((out, lse), (inputs["dout"], inputs["dlse"]))
    assert torch.equal(out, before)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a backend that cannot run")
def test_errors_name_impl():
    inputs = [x.bfloat16() for x in (GOOD["q"], GOOD["k"], GOOD["v"])]
    with pytest.raises(ValueError, match="impl='triton' cannot run: cannot compute in bfloat16"):
        flash_attention(*inputs, impl="triton")


def test_expanded_gradients():
    inputs = inputs_of(SMALL, "torch")
    for impl in IMPLS:
        leaves = [inputs[name].detach().to(device_of(impl)).requires_grad_() for name in ("q", "k", "v")]
        out, _ = flash_attention(*leaves, impl=impl)
        summed = torch.autograd.grad(out.sum(), leaves, retain_graph=True)
        dense = torch.autograd.grad(out, leaves, torch.ones_like(out))
        for one, two in zip(summed, dense, strict=True):
            torch.testing.assert_close(one, two)


GOOD = {"q": torch.zeros(2, 4, 8, 16), "k": torch.zeros(2, 2, 8, 16), "v": torch.zeros(2, 2, 8, 16)}
BAD = [
    ({"q": torch.zeros(2, 4, 8, 20)}, "k must have shape"),
    ({name: x[..., :8].contiguous() for name, x in GOOD.items()}, "q must have a head dim"),
    ({"v": torch.zeros(2, 2, 9, 16)}, "v must have shape (B, Hkv, T, D) = (2, 2, 8, 16)"),
    ({"v": torch.zeros(2, 2, 8, 16).half()}, "v must have the dtype of q"),
    ({"v": torch.zeros(2, 2, 16, 8).mT}, "v must have unit stride"),
    ({"v": torch.zeros(2, 2, 8, 16, device="meta")}, "v must be on cpu"),
    ({"v": None}, "v must be a tensor"),
    ({"key_mask": torch.ones(2, 1, 8, 8, dtype=torch.bool)}, "keys can be hidden as padding or by causal=True"),
    ({"key_mask": torch.ones(2, 8)}, "key_mask must be bool"),
    ({"causal": 1}, "causal must be True or False"),
    ({"scale": float("inf")}, "scale must be None or a finite number"),
    ({"impl": "cpp"}, "impl must be None, 'triton' or 'torch'"),
]


@pytest.mark.parametrize("change, message", BAD, ids=[f"{next(iter(c))}-{i}" for i, (c, _) in enumerate(BAD)])
def test_bad_input_names_the_argument(change, message):
    arguments = GOOD | change
    tensors = [arguments.pop(name) for name in ("q", "k", "v")]
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        flash_attention(*tensors, **arguments)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("impl", "engine"), [("triton", "triton"), ("torch", "torch_flash")])
def test_an_engine_is_what_stands_behind_an_implementation(impl, engine):
    case = SMALL
    inputs = inputs_of(case, impl)
    expected = ours(inputs, case, ("out", "lse"), impl)

    def result(**choice):
        leaves = [inputs[name].clone().requires_grad_() for name in ("q", "k", "v")]
        out, lse = flash_attention(*leaves, causal=case.causal, key_mask=inputs["key_mask"], **choice)
        return out, lse, *torch.autograd.grad(out.sum() + lse[lse.isfinite()].sum(), leaves)

    for x, y in zip(result(engine=engine), result(impl=impl), strict=True):
        assert torch.equal(x, y)
    assert torch.equal(result(engine=engine)[0], expected[0])


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"engine": "unheard-of"}, "engine must be None or one of"),
        ({"engine": "torch_cudnn"}, "engine='torch_cudnn'"),
        ({"engine": "torch_flash", "impl": "torch"}, "name the same choice: leave one of them out"),
    ],
)
def test_engines_that_cannot_be_had(choice, message):
    q = torch.randn(1, 2, 5, 16)
    with pytest.raises(ValueError, match=re.escape(message)):
        flash_attention(q, q, q, **choice)
