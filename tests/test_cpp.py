"""The C++ module: every instruction set against float64, any number of threads bit for bit, strides, the build."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from op_cases import (
    CASES,
    Case,
    assert_as_exact_as_eager,
    draw,
    with_gradients,
)

from cdistill import _C
from cdistill.ops import _cpp, _torch, attention_alignment, attention_slice, reference
from cdistill.ops._problem import VocabularyOptions, VocabularyRows

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.usefixtures("poisoned_empty")

# More rows than one part of the work has (288), more columns than one tile (128), a head dim that fills no vector.
LARGE = Case(batch=1, q_heads=4, k_heads=2, tokens=330, rows=300, cols=150, width=40, padding=7, masked="right")


@pytest.fixture
def set_threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def slice_results(case, heads="mean", seed=0):
    """The slice and its gradients from the module, from eager attention in the same dtype, and in float64."""
    inputs = draw(case, seed)
    rows, cols = inputs["rows"], inputs["cols"]
    options = case.options(inputs) | {"heads": heads}
    leaves = [inputs["q"], inputs["k"]]
    shape = (case.q_heads, case.rows, case.cols) if heads == "each" else (case.rows, case.cols)
    grad = torch.randn(case.batch, *shape, generator=torch.Generator().manual_seed(seed + 1))

    def oracle(q, k):
        return reference.attention_slice(q, k, rows, cols, **options)

    def op(q, k):
        return attention_slice(q, k, rows, cols, impl="cpp", **options)

    exact = with_gradients(oracle, [x.double() for x in leaves], grad)
    return with_gradients(op, leaves, grad), with_gradients(oracle, leaves, grad), exact


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_instruction_set_is_as_exact_as_eager(isa, dtype):
    assert_as_exact_as_eager(*slice_results(Case(**{**LARGE.__dict__, "dtype": dtype})))


@pytest.mark.parametrize("name", CASES)
def test_every_instruction_set_on_every_shape(isa, name):
    assert_as_exact_as_eager(*slice_results(CASES[name], heads="each"))


@pytest.mark.parametrize("width", [16, 24, 64, 72, 136, 256])
def test_head_dims_that_do_and_do_not_fill_the_registers(isa, width):
    assert_as_exact_as_eager(*slice_results(Case(width=width, padding=1)))


def test_strides_do_not_change_a_bit(isa):
    case = Case(**{**LARGE.__dict__, "dtype": torch.bfloat16})
    inputs = draw(case)
    positions = inputs["rows"], inputs["cols"]
    dense = with_gradients(lambda q, k: attention_slice(q, k, *positions, impl="cpp"), [inputs["q"], inputs["k"]])

    def spread(x):  # (B,H,T,D) with a gap after every token and the tokens outermost
        wide = torch.full((x.shape[2], x.shape[0], x.shape[1], x.shape[3] + 8), torch.nan, dtype=x.dtype)
        wide[..., 8:] = x.permute(2, 0, 1, 3)
        return wide[..., 8:].permute(1, 2, 0, 3)

    views = spread(inputs["q"]), spread(inputs["k"])
    leaves = [x.requires_grad_() for x in views]
    a = attention_slice(*leaves, *positions, impl="cpp")
    gradients = torch.autograd.grad(a.sum(), leaves)
    for x, y in zip(dense, (a.detach(), *gradients), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("k_heads", [1, 4])
def test_the_number_of_threads_does_not_change_a_bit(isa, k_heads, set_threads):
    case = Case(**{**LARGE.__dict__, "k_heads": k_heads})
    inputs = draw(case)
    positions, target = (inputs["rows"], inputs["cols"]), inputs["target"][:, 0].contiguous()

    def results(threads):
        set_threads(threads)
        found = []
        for kind in (
            {"reduction": "row"},
            {"reduction": "matrix", "loss": "kl"},
            {"reduction": "column", "sink_filter": True},
        ):
            found += with_gradients(
                lambda q, k, kind=kind: attention_alignment(q, k, target, *positions, impl="cpp", **kind),
                [inputs["q"], inputs["k"]],
            )
        return found

    one = results(1)
    assert all(x.any() for x in one)
    for threads in (2, 3):
        assert all(torch.equal(x, y) for x, y in zip(one, results(threads), strict=True))


def vocabulary_results(module, vocab, dtype, divergence, temperature, top):
    """Losses of 9 rows of logits and their gradient, from one backend; logits from -40 to 40."""
    generator = torch.Generator().manual_seed(vocab)
    stride = -(-vocab // 64) * 64
    student, teacher = (10 * torch.randn(2, 9, stride, generator=generator)).to(dtype)[:, :, :vocab]
    labels = torch.randint(vocab, (9,), generator=generator)
    stored = None
    if top:
        values, indices = teacher.float().log_softmax(1).topk(top)
        stored = values, indices, (1 - values.double().exp().sum(1)).clamp(min=1e-7).log().float()
    losses = torch.empty(2, 9)
    options = VocabularyOptions(divergence, temperature, 0.3, 0.7, -1.3, gradient=True)
    module.vocabulary_losses(VocabularyRows(student, None if top else teacher, stored, labels, *losses), options)
    return losses, student


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab", [1, 5, 16, 531, 2048, 5003])
def test_rows_of_logits_on_every_instruction_set(isa, vocab, dtype):
    """Vocabularies below a vector, of whole vectors, and beyond the length that is summed at once."""
    for divergence in ("forward_kl", "reverse_kl", "jsd"):
        for temperature, top in ((1.0, 0), (2.0, 0), (1.0, 3), (0.5, 3)):
            if top < vocab:
                case = (vocab, dtype, divergence, temperature, top)
                losses, gradient = vocabulary_results(_cpp, *case)
                expected, expected_gradient = vocabulary_results(_torch, *case)
                torch.testing.assert_close(losses, expected, rtol=1e-5, atol=2e-5)
                rtol, atol = (1e-4, 1e-5) if dtype == torch.float32 else (2**-7, 2**-9)
                torch.testing.assert_close(gradient, expected_gradient, rtol=rtol, atol=atol)


def test_the_number_of_threads_does_not_change_a_bit_of_rows_of_logits(set_threads):
    results = []
    for threads in (1, 2, 5):
        set_threads(threads)
        results.append(vocabulary_results(_cpp, 5003, torch.float32, "jsd", 2.0, 0))
    for losses, gradient in results[1:]:
        assert torch.equal(losses, results[0][0]) and torch.equal(gradient, results[0][1])


def test_a_sample_alone_and_in_a_batch_give_the_same(isa):
    inputs = draw(Case(batch=3, padding=0))
    whole = attention_slice(inputs["q"], inputs["k"], inputs["rows"], inputs["cols"], impl="cpp")
    for b in range(3):
        one = attention_slice(*(inputs[name][b : b + 1] for name in ("q", "k", "rows", "cols")), impl="cpp")
        assert torch.equal(one[0], whole[b])


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan, 3e38])
def test_infinite_inputs_reach_only_their_own_rows(isa, value):
    inputs = draw(Case(batch=1, padding=0))
    q = inputs["q"].clone()
    bad = int(inputs["rows"][0, 2])
    q[:, :, bad] = value
    arguments = inputs["k"], inputs["rows"], inputs["cols"]
    clean = attention_slice(inputs["q"], *arguments, impl="cpp")
    q.requires_grad_()
    a = attention_slice(q, *arguments, impl="cpp")
    a.sum().backward()
    others = [r for r in range(7) if r != 2]
    assert torch.equal(a.detach()[:, others], clean[:, others])
    assert q.grad[:, :, [i for i in range(37) if i != bad]].isfinite().all()


def test_probabilities_far_below_the_smallest_number_are_zero_and_large_scores_do_not_overflow(isa):
    k = torch.zeros(1, 1, 3, 16)
    k[0, 0, :, 0] = torch.tensor([1000.0, 999.0, -1000.0])
    q = torch.zeros(1, 1, 3, 16)
    q[..., 0] = 1.0
    rows = cols = torch.arange(3)[None]
    a = attention_slice(q, k, rows, cols, causal=False, scale=1.0, impl="cpp")
    expected = torch.softmax(k[0, 0, :, 0].double(), 0)
    assert torch.allclose(a[0].double(), expected.expand(3, 3), rtol=1e-6, atol=0)
    assert (a[0, :, 2] == 0).all()


def test_the_environment_chooses_the_instruction_set(isa):
    assert _C.isa() == isa


@pytest.mark.parametrize("value", ["avx1024", "AVX2", ""])
def test_an_unknown_instruction_set_is_refused(monkeypatch, value):
    monkeypatch.setenv("CDISTILL_CPU_ISA", value)
    inputs = draw(Case())
    with pytest.raises(ValueError, match=f"CDISTILL_CPU_ISA={value} is not one of .*portable") as error:
        attention_slice(inputs["q"], inputs["k"], inputs["rows"], inputs["cols"], impl="cpp")
    assert "\n" not in str(error.value)


def test_without_a_compiler_the_build_succeeds_and_says_so_in_one_line(tmp_path):
    build = [sys.executable, "setup.py", "build_ext", "--build-lib", tmp_path, "--build-temp", tmp_path / "objects"]
    environment = {"PATH": str(tmp_path), "CC": "no-such-compiler", "CXX": "no-such-compiler"}
    done = subprocess.run(build, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = [line for line in (done.stdout + done.stderr).splitlines() if "was not built" in line]
    assert len(said) == 1
    assert "CPU ops will use the torch implementation" in said[0]
    assert not list(tmp_path.rglob("*.so"))
