"""The ops as torch sees them: registered operators that torch.compile takes whole and opcheck accepts."""

from dataclasses import replace

import pytest
import torch
from op_cases import Case, device_of, draw, moved

from cdistill.nn import DistillationHead
from cdistill.ops import (
    AttentionProblem,
    attention_alignment,
    attention_relation,
    attention_slice,
    attention_slice_accumulate,
    attention_with_alignment,
    flash_attention,
    linear_distillation,
)

CASE = Case(q_heads=2, k_heads=1, tokens=13, width=16, rows=4, cols=5, padding=1)
IMPLS = ("torch", "cpp", "triton")
ENGINES = {"torch": "torch_flash", "cpp": "torch_flash", "triton": "triton"}


def inputs_of(impl, case=CASE):
    if device_of(impl) == "cuda":
        case = replace(case, dtype=torch.float16)
    inputs = draw(case)
    inputs["v"] = torch.randn(inputs["k"].shape, generator=torch.Generator().manual_seed(1)).to(case.dtype)
    inputs["target"] = inputs["target"].mean(1)
    inputs["lse"] = torch.randn(inputs["q"].shape[:3], generator=torch.Generator().manual_seed(2)) + 3
    inputs = moved(inputs, device_of(impl))
    for name in ("q", "k", "v", "lse"):
        inputs[name].requires_grad_()
    return inputs


def calls(impl):
    """Every public op as a function of the drawn inputs."""
    positions = ("rows", "cols")
    options = {"impl": impl}
    flash = {"impl": "torch" if impl == "cpp" else impl}
    joint = {"impl": impl, "engine": ENGINES[impl]}
    return {
        "slice": lambda x: attention_slice(x["q"], x["k"], *(x[p] for p in positions), **options),
        "slice-lse": lambda x: attention_slice(x["q"], x["k"], *(x[p] for p in positions), lse=x["lse"], **options),
        "alignment": lambda x: attention_alignment(x["q"], x["k"], x["target"], *(x[p] for p in positions), **options),
        "relation": lambda x: attention_relation(
            x["q"], x["k"], [x["v"].roll(1, 2), x["v"]], [x["v"]] * 2, *(x[p] for p in positions), loss="kl", **options
        ),
        "flash": lambda x: sum(y.float().square().sum() for y in flash_attention(x["q"], x["k"], x["v"], **flash)),
        "joint": lambda x: sum(
            y.float().square().sum()
            for y in attention_with_alignment(x["q"], x["k"], x["v"], x["target"], *(x[p] for p in positions), **joint)
        ),
    }


def gradients(function, inputs):
    leaves = [inputs[name] for name in ("q", "k", "v", "lse")]
    result = function(inputs)
    return [result.detach(), *torch.autograd.grad(result.sum(), leaves, allow_unused=True, materialize_grads=True)]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", ["slice", "slice-lse", "alignment", "relation", "flash", "joint"])
def test_compiles_without_a_graph_break(name, impl):
    inputs = inputs_of(impl)
    function = calls(impl)[name]
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    for got, want in zip(gradients(compiled, inputs), gradients(function, inputs), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", ["slice", "alignment", "relation", "flash", "joint"])
def test_autocast_rounds_nothing(name, impl):
    inputs = inputs_of(impl)
    with torch.autocast(device_of(impl), dtype=torch.bfloat16):
        results = gradients(calls(impl)[name], inputs)
    for got, want in zip(results, gradients(calls(impl)[name], inputs), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("impl", IMPLS)
def test_results_lie_in_memory_as_the_compiler_was_told(impl, transposed):
    """Inductor checks the strides of every result, also of the gradients."""
    inputs = inputs_of(impl, replace(CASE, transposed=transposed))

    def function(x):
        return sum(call({**x, "q": 2 * x["q"]}).float().sum() for call in calls(impl).values())

    compiled = torch.compile(function, fullgraph=True)
    for got, want in zip(gradients(compiled, inputs), gradients(function, inputs), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("impl", IMPLS)
def test_opcheck(impl):
    x, ops = inputs_of(impl), torch.ops.cdistill
    problem = AttentionProblem(x["q"], x["k"], None, x["key_mask"], True, 0.3, None, x["rows"], x["cols"])
    loss = (x["target"], "cosine", "row", False)
    for given in (problem, problem._replace(lse=x["lse"])):
        torch.library.opcheck(ops.attention_slice, (*given, impl))
        torch.library.opcheck(ops.attention_alignment, (*given, *loss, impl))
        of_heads = (*given._replace(each=True), x["target"][:, None].repeat(1, 2, 1, 1), *loss[1:], impl)
        torch.library.opcheck(ops.attention_alignment, of_heads, test_utils="test_faketensor")
    teacher = [x["q"].detach(), 2 * x["q"].detach()], [x["k"].detach()] * 2, []
    for how in (("kl", "matrix", False), ("cosine", "column", True)):
        options = (*teacher, x["key_mask"], 0.4, None, x["rows"], x["cols"], 1, *how, impl)
        torch.library.opcheck(ops.attention_relation, (*problem, *options))
    a = attention_slice(x["q"], x["k"], x["rows"], x["cols"], impl=impl).detach().requires_grad_()
    valid = x["rows"] >= 0, x["cols"] >= 0
    for target in (x["target"], x["target"].clone().requires_grad_()):
        of_slices = (a, target, *valid, "kl", "row", False, target.requires_grad, impl)
        torch.library.opcheck(ops.slice_alignment, of_slices)
    whole = problem._replace(v=x["v"])
    torch.library.opcheck(ops.attention_with_alignment, (*whole, *loss, impl, ENGINES[impl]))
    flash = (x["q"], x["k"], x["v"], None, True, 0.3, None, None if impl == "cpp" else impl, None)
    torch.library.opcheck(ops.flash_attention, flash)
    detached = problem._replace(q=x["q"].detach(), k=x["k"].detach())
    sums = torch.zeros(3, *x["target"].shape, device=x["q"].device)
    torch.library.opcheck(ops.attention_slice_accumulate, (*detached, sums, [0, 2], impl))


def heads(impl, transposed=False, k=0):
    """Arguments of linear_distillation: (13,8) and (29,8) student, (13,12) and (31,12) teacher or its top-k, labels."""
    generator = torch.Generator().manual_seed(4)

    def normal(*shape):
        x = torch.randn(*shape[::-1], generator=generator).T if transposed else torch.randn(*shape, generator=generator)
        return x.to(device_of(impl))

    labels = torch.randint(29, (13,), generator=generator).to(device_of(impl))
    labels[3:6] = -100
    student = [normal(13, 8).requires_grad_(), normal(29, 8).requires_grad_(), normal(29).requires_grad_()]
    if not k:
        return student, [normal(13, 12), normal(31, 12), normal(31)], None, labels
    values, indices = normal(13, 29).log_softmax(1).topk(k)
    return student, [None, None, None], (values, indices), labels


def vocabulary_losses(impl, student, teacher, topk, labels):
    result = linear_distillation(
        *student[:2],
        *teacher[:2],
        labels,
        student_bias=student[2],
        teacher_bias=teacher[2],
        teacher_topk=topk,
        divergence="jsd",
        loss_weights=(1.0, 2.0),
        impl=impl,
    )
    return result.ce + 2 * result.kd


def vocabulary_gradients(function, impl, student, *others, retain_graph=False):
    loss = function(impl, student, *others)
    return [loss.detach(), *torch.autograd.grad(loss, student, retain_graph=retain_graph)]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("k", [0, 5])
@pytest.mark.parametrize("impl", IMPLS)
def test_linear_distillation_compiles_without_a_graph_break(impl, k, transposed):
    torch._dynamo.reset()
    arguments = heads(impl, transposed, k)
    compiled = torch.compile(vocabulary_losses, fullgraph=True)
    want = vocabulary_gradients(vocabulary_losses, impl, *arguments)
    for got, x in zip(vocabulary_gradients(compiled, impl, *arguments), want, strict=True):
        torch.testing.assert_close(got, x)


def test_a_count_of_tokens_breaks_no_graph():
    torch._dynamo.reset()
    hidden, weight, _ = heads("cpp")[0]
    labels = heads("cpp")[3]

    def mean(count):
        return DistillationHead()(hidden, weight, labels, num_items=count).loss

    compiled = torch.compile(mean, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(torch.tensor(7)), mean(7))
    with pytest.raises(RuntimeError, match="num_items must be above 0 where labels count"):
        compiled(torch.tensor(-7))


@pytest.mark.parametrize("impl", IMPLS)
def test_autocast_does_not_round_linear_distillation(impl):
    arguments = heads(impl)
    want = vocabulary_gradients(vocabulary_losses, impl, *arguments)
    for retain_graph in (False, True):
        with torch.autocast(device_of(impl), dtype=torch.bfloat16):
            results = vocabulary_gradients(vocabulary_losses, impl, *arguments, retain_graph=retain_graph)
        assert all(torch.equal(got, x) for got, x in zip(results, want, strict=True))


@pytest.mark.parametrize("k", [0, 5])
@pytest.mark.parametrize("impl", IMPLS)
def test_opcheck_of_linear_distillation(impl, k):
    student, teacher, topk, labels = heads(impl, k=k)
    weights = torch.rand(len(labels), device=labels.device)
    options = ("jsd", 1.5, 0.4, -100, 29, 4, True, 0.5, 3.0, 1.0, 0.0)
    for wanted in ((True, True, True), (True, False, False), (False, False, False)):
        leaves = [x if w else x.detach() for x, w in zip(student, wanted, strict=True)]
        inputs = (*leaves, *teacher, *(topk or (None, None)), labels, weights)
        torch.library.opcheck(torch.ops.cdistill.linear_distillation, (*inputs, *options, 1.0, 2.0, impl, *wanted))
    detached = [x if x is None else x.detach() for x in inputs]
    torch.library.opcheck(torch.ops.cdistill.linear_token_losses, (*detached, *options, impl))


def test_bad_positions_raise_from_compiled_code():
    inputs = inputs_of("cpp")
    inputs["rows"] = inputs["rows"] + CASE.tokens
    compiled = torch.compile(calls("cpp")["slice"], backend="aot_eager", fullgraph=True)
    with pytest.raises(ValueError, match="rows must hold positions"):
        compiled(inputs)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("heads", ["mean", "each"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_slices_accumulate_in_their_windows(dtype, heads, impl):
    inputs = inputs_of(impl, replace(CASE, masked="left", tokens=40, rows=18, cols=35, padding=3))
    arguments = [inputs[name] for name in ("q", "k", "rows", "cols")]
    options = {"key_mask": inputs["key_mask"], "heads": heads, "impl": impl}
    a = attention_slice(*arguments, **options).detach()
    start = torch.rand(70, *a.shape, generator=torch.Generator().manual_seed(5)).to(a.device, dtype)
    sums = start.clone()
    windows = [0, 3, 61, 62, 69]  # more than the bits of one launch
    attention_slice_accumulate(*arguments, sums, windows, **options)
    attention_slice_accumulate(*arguments, sums, [], **options)
    for w in range(len(sums)):
        want = start[w] + a if w in windows else start[w].float()
        torch.testing.assert_close(sums[w].float(), want.to(dtype).float(), rtol=0, atol=torch.finfo(dtype).eps)
        assert w in windows or torch.equal(sums[w], start[w])


@pytest.mark.parametrize(
    ("shape", "dtype", "windows", "message"),
    [
        ((2, 2, 4, 6), torch.float32, [0], "sums must have shape (W, B, R, V) = (2, 2, 4, 5)"),
        ((2, 2, 4, 5), torch.float64, [0], "sums must be float16, bfloat16 or float32"),
        ((2, 2, 4, 5), torch.float32, [2], "windows must hold distinct indices from 0 to 1"),
        ((2, 2, 4, 5), torch.float32, [1, 1], "windows must hold distinct indices"),
        ((2, 2, 4, 5), torch.float32, [0.5], "windows must hold distinct indices"),
        ((2, 2, 4, 5), torch.float32, 0, "windows must be a list of indices, got int"),
        ((2, 2, 4, 5), torch.float32, None, "windows must be a list of indices, got NoneType"),
        ((2, 2, 4, 5), torch.float32, [True], "windows must hold distinct indices"),
    ],
)
def test_bad_window_sums(shape, dtype, windows, message):
    inputs = inputs_of("torch")
    arguments = [inputs[name] for name in ("q", "k", "rows", "cols")]
    with pytest.raises(ValueError) as error:
        attention_slice_accumulate(*arguments, torch.zeros(shape, dtype=dtype), windows)
    assert message in str(error.value)
