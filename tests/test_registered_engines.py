"""Attention engines of other packages: the one of docs/walks/add-an-engine.md, as it stands there, against float64."""

import math
import re
from pathlib import Path

import pytest
import torch
from op_cases import CASES, assert_as_exact_as_eager
from test_attention_with_alignment import eager, inputs_of, ours, through
from test_flash_attention import eager as flash_eager
from test_flash_attention import inputs_of as flash_inputs_of
from test_flash_attention import ours as flash_ours
from test_vat_training import training_step
from vat_models import draw_batch, student_and_teacher

from cdistill import choices
from cdistill.ops import AttentionEngine, _engines, attention_with_alignment, flash_attention, register_attention_engine
from cdistill.train.recipes import load_recipe
from cdistill.vat import VATConfig, install

PAGE = Path(__file__).parent.parent / "docs/walks/add-an-engine.md"


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    """The page's engine by its name, and as one that takes no dlse; forgotten after the test."""
    monkeypatch.setattr(_engines, "REGISTERED", {})
    monkeypatch.setattr(choices, "REGISTERED_ENGINES", [])
    names = {}
    exec(re.search(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)[1], names)

    class Folding(names["EagerAttention"]):
        takes_dlse = False

        def backward(self, problem, out, dout, dlse):
            assert dlse is None and dout is not None
            return super().backward(problem, out, dout, dlse)

    register_attention_engine("folding", Folding())
    return names["EagerAttention"]


@pytest.mark.parametrize("impl", ["torch", "cpp"])
@pytest.mark.parametrize("engine", ["eager_fp32", "folding"])
@pytest.mark.parametrize("name", ["gqa", "full-left", "causal-left"])
def test_attention_and_losses_match_float64(name, engine, impl):
    case = CASES[name]
    inputs = inputs_of(case)
    exact, same = (through(eager(inputs, case, {}), inputs, dtype) for dtype in (torch.float64, torch.float32))
    assert_as_exact_as_eager(through(ours(inputs, case, {}, impl, engine), inputs, torch.float32), same, exact)


@pytest.mark.parametrize("use", [("out",), ("lse",), ("out", "lse")])
@pytest.mark.parametrize("engine", ["eager_fp32", "folding"])
def test_either_result_of_flash_attention_matches_float64(engine, use):
    case = CASES["full-left"]
    inputs = flash_inputs_of(case, "torch")
    (exact, lives), (same, _) = (flash_eager(inputs, case, dtype, use) for dtype in (torch.float64, torch.float32))
    got = flash_ours(inputs, case, use, engine=engine)
    assert torch.equal(got[1] == -torch.inf, ~lives)
    got[1] = got[1].masked_fill(~lives, 0.0)
    assert_as_exact_as_eager(got, same, exact)


def test_it_compiles_without_a_graph_break():
    inputs = inputs_of(CASES["gqa"])
    function = ours(inputs, CASES["gqa"], {}, "cpp", "eager_fp32")
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    for got, want in zip(*(through(f, inputs, torch.float32) for f in (compiled, function)), strict=True):
        torch.testing.assert_close(got, want)


def test_a_model_trains_with_it_as_with_sdpa():
    recipe = load_recipe("demo-compodistill", ["vat.engine=eager_fp32"])
    assert recipe.vat.engine == VATConfig(engine="eager_fp32").engine == "eager_fp32"
    student, teacher = map(install_in, student_and_teacher())
    batch = draw_batch(20, "left")
    (beside, wanted), (inside, found) = (
        training_step(student, teacher, batch, None, e) for e in ("sdpa", "eager_fp32")
    )
    torch.testing.assert_close(inside.loss(), beside.loss())
    for name, grad in found.items():
        scale = wanted[name.replace("k_proj.bias", "k_proj.weight")].abs().max()
        assert (grad - wanted[name]).abs().max() <= 1e-5 * scale, name


def install_in(model):
    install(model)
    return model


@pytest.mark.parametrize(
    ("name", "engine", "message"),
    [
        ("eager_fp32", "one", "name 'eager_fp32' is taken by another attention engine: choose one that is not"),
        ("torch_flash", "one", "name 'torch_flash' is taken by another attention engine: choose one that is not"),
        ("sdpa", "one", "name 'sdpa' is taken by another attention engine: choose one that is not"),
        ("my engine", "one", "name must be an identifier, as my_engine, got 'my engine'"),
        (None, "one", "name must be an identifier, as my_engine, got None"),
        (
            "mine",
            "class",
            "engine must be an instance of a subclass of cdistill.ops.AttentionEngine, got the class EagerA",
        ),
        ("mine", "other", "engine must be an instance of a subclass of cdistill.ops.AttentionEngine, got dict"),
    ],
)
def test_what_is_no_engine_or_no_new_name_is_refused(registered, name, engine, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}") as error:
        register_attention_engine(name, {"one": registered(), "class": registered, "other": {}}[engine])
    assert "\n" not in str(error.value) and choices.REGISTERED_ENGINES == ["eager_fp32", "folding"]


def test_half_of_an_engine_cannot_be_made():
    class Half(AttentionEngine):
        def forward(self, problem):
            return problem.q, problem.q[..., 0]

    with pytest.raises(TypeError, match=r"abstract method '?backward"):
        Half()


def test_messages_name_what_is_registered():
    q, positions = torch.randn(1, 2, 5, 16), torch.tensor([[1]])
    with pytest.raises(ValueError, match=r"^engine must be None or one of .*'eager_fp32', 'folding'\), got 'mine'$"):
        flash_attention(q, q, q, engine="mine")
    with pytest.raises(ValueError, match=r"^vat\.engine must be one of sdpa, .*, eager_fp32, folding, got 'mine'$"):
        VATConfig(engine="mine")
    many = torch.empty(1, 1, 1, 16).expand(1, 1, 20000, 16)
    with pytest.raises(
        ValueError, match=r"^engine='eager_fp32' holds a score for every pair of tokens, .*, q has 20000$"
    ):
        attention_with_alignment(many, many, many, torch.zeros(1, 1, 1), positions, positions, engine="eager_fp32")


@pytest.mark.parametrize(
    ("what", "change", "got"),
    [
        ("lse", lambda out, lse, grads: (out, lse.double(), grads), r"torch.float64 \(1, 2, 128\) on cpu"),
        ("lse", lambda out, lse, grads: (out, lse[..., None], grads), r"torch.float32 \(1, 2, 128, 1\) on cpu"),
        ("out", lambda out, lse, grads: (out.transpose(1, 2), lse, grads), r"torch.float32 \(1, 128, 2, 16\) on cpu"),
        ("dk", lambda out, lse, grads: (out, lse, (grads[0], grads[1].half(), grads[2])), "torch.float16 "),
        ("dv", lambda out, lse, grads: (out, lse, (*grads[:2], None)), "NoneType"),
    ],
)
def test_results_that_do_not_fit_are_refused(registered, what, change, got):
    class Misfit(registered):
        def forward(self, problem):
            return change(*super().forward(problem), (None,) * 3)[:2]

        def backward(self, problem, *arguments):
            return change(None, problem.lse, super().backward(problem, *arguments))[2]

    if what in ("dk", "dv"):
        Misfit.forward = registered.forward
    register_attention_engine("misfit", Misfit())
    q = torch.randn(1, 2, 5, 16, requires_grad=True)
    with pytest.raises(
        ValueError, match=f"^attention engine 'misfit' must return {what} as torch.float32 .*, got {got}"
    ):
        flash_attention(q, q, q, engine="misfit")[0].sum().backward()


@pytest.mark.parametrize(
    ("what", "change"),
    [
        ("lse", lambda out, lse, grads: (out, lse / math.log(2), grads)),
        ("lse", lambda out, lse, grads: (out, torch.where(lse == -torch.inf, torch.inf, lse), grads)),
        ("out", lambda out, lse, grads: (out.flip(1), lse, grads)),
        ("out", lambda out, lse, grads: (out.masked_fill(out == 0, torch.nan), lse, grads)),
        ("dq", lambda out, lse, grads: (out, lse, (grads[0] * 0.9, *grads[1:]))),
        ("dk", lambda out, lse, grads: (out, lse, (grads[0], grads[1].flip(1), grads[2]))),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_engine_that_computes_something_else_is_refused_before_its_first_result(registered, what, change, dtype):
    class Wrong(registered):
        def forward(self, problem):
            return change(*super().forward(problem), (torch.zeros(1, 2),) * 3)[:2]

        def backward(self, problem, *arguments):
            zero = torch.zeros(1, 2)
            return change(zero, zero, super().backward(problem, *arguments))[2]

    register_attention_engine("wrong", Wrong())
    q, k = torch.randn(1, 2, 5, 16, dtype=dtype), torch.randn(1, 1, 5, 16, dtype=dtype)
    mask = torch.ones(1, 5, dtype=torch.bool)
    with pytest.raises(ValueError, match=f"^attention engine 'wrong' computes a wrong {what}: "):
        flash_attention(q, k, k, key_mask=mask, engine="wrong")
