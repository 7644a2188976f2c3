"""linear_distillation against float64 logits: losses, gradients, chunks, vocabularies, ignored rows, bad input."""

import re

import pytest
import torch
from op_cases import assert_as_exact_as_eager
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from cdistill.ops import LinearDistillation, linear_distillation, reference

pytestmark = pytest.mark.usefixtures("poisoned_empty")

LEAVES = ("student_hidden", "student_head", "student_bias")
DIVERGENCES = ["forward_kl", "reverse_kl", "jsd"]


def draw(n=13, vocab=(29, 31), width=(8, 12), dtype=torch.float32, ignored=0.4, seed=0):
    """Arguments by name; the shares of rows that are ignored are random."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    labels = torch.randint(min(vocab), (n,), generator=generator)
    labels[torch.rand(n, generator=generator) < ignored] = -100
    return {
        "student_hidden": normal(n, width[0]),
        "student_head": normal(vocab[0], width[0]),
        "teacher_hidden": normal(n, width[1]),
        "teacher_head": normal(vocab[1], width[1]),
        "labels": labels,
        "student_bias": normal(vocab[0]),
        "teacher_bias": normal(vocab[1]),
    }


def call(function, inputs, **options):
    """function on the inputs, its tensors positional where the contract says so."""
    inputs = dict(inputs)
    tensors = [inputs.pop(name) for name in list(inputs)[:5]]
    return function(*tensors, **inputs, **options)


def values_and_gradients(function, inputs, weights=(1.0, 1.0), leaves=LEAVES, **options):
    """ce, kd and the gradients of weights[0] * ce + weights[1] * kd."""
    inputs = inputs | {name: inputs[name].detach().requires_grad_() for name in leaves}
    result = call(function, inputs, **options)
    (weights[0] * result.ce + weights[1] * result.kd).backward()
    return [result.ce.detach(), result.kd.detach(), *(inputs[name].grad for name in leaves)]


def doubled(inputs):
    return {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}


def check(inputs, leaves=LEAVES, weights=(0.7, -1.3), chunk_size=4, **options):
    exact = values_and_gradients(reference.linear_distillation, doubled(inputs), weights, leaves, **options)
    eager = values_and_gradients(reference.linear_distillation, inputs, weights, leaves, **options)
    ours = values_and_gradients(linear_distillation, inputs, weights, leaves, chunk_size=chunk_size, **options)
    assert [x.dtype for x in ours[:2]] == [torch.float32] * 2
    assert [x.dtype for x in ours[2:]] == [inputs[name].dtype for name in leaves]
    assert_as_exact_as_eager(ours, eager, exact)
    return ours


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.0, 1.0), (0.7, -1.3)])
def test_values_and_gradients_match_float64(divergence, temperature, weights):
    check(draw(), divergence=divergence, temperature=temperature, weights=weights)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_half_precision_is_as_exact_as_eager_half_precision(dtype, divergence):
    check(draw(dtype=dtype, seed=1), divergence=divergence, temperature=2.0)


@pytest.mark.parametrize("chunk_size", [1, 5, 1000, None])
def test_chunks_do_not_change_the_result(chunk_size):
    check(draw(n=21), chunk_size=chunk_size)


def test_non_contiguous_inputs_and_large_logits():
    inputs = draw()
    inputs["student_hidden"] = (inputs["student_hidden"] * 30).T.contiguous().T
    inputs["teacher_head"] = inputs["teacher_head"].repeat(1, 2)[:, ::2]
    inputs["teacher_hidden"] = inputs["teacher_hidden"][:, : inputs["teacher_head"].shape[1]]
    for divergence in ("forward_kl", "jsd"):
        assert all(x.isfinite().all() for x in values_and_gradients(linear_distillation, inputs, divergence=divergence))
    check(inputs)


@pytest.mark.parametrize("vocab, vocab_size", [((40, 29), None), ((29, 40), None), ((40, 40), 29), ((40, 35), 30)])
def test_padding_of_the_vocabulary_is_masked_on_both_sides(vocab, vocab_size):
    inputs = draw(vocab=vocab)
    inputs["labels"].clamp_(max=28)
    used = min(vocab) if vocab_size is None else vocab_size
    _, _, _, dhead, dbias = check(inputs, vocab_size=vocab_size)
    assert not dhead[used:].any()
    assert not dbias[used:].any()
    changed = dict(inputs)
    for name in ("student_head", "teacher_head", "student_bias", "teacher_bias"):
        changed[name] = inputs[name].clone()
        changed[name][used:] = 1e4
    for x, y in zip(
        call(linear_distillation, inputs, vocab_size=vocab_size),
        call(linear_distillation, changed, vocab_size=vocab_size),
        strict=True,
    ):
        assert torch.equal(x, y)


@pytest.mark.parametrize("leaves", [("student_hidden",), ("student_head",), ("student_bias",), LEAVES[:2]])
def test_only_needed_gradients_are_made(leaves):
    check(draw(), leaves=leaves)


def test_biases_are_optional_and_independent():
    inputs = draw()
    for missing in ({"student_bias"}, {"teacher_bias"}, {"student_bias", "teacher_bias"}):
        kept = {name: x for name, x in inputs.items() if name not in missing}
        check(kept, leaves=[name for name in LEAVES if name in kept])


def test_ignored_rows_do_not_matter_and_get_no_gradient():
    inputs = draw(ignored=0.5, seed=4)
    ignored = inputs["labels"] == -100
    for name in ("student_hidden", "teacher_hidden"):
        inputs[name][ignored] = torch.nan
    ce, kd, dhidden, dhead, dbias = values_and_gradients(linear_distillation, inputs)
    kept = inputs | {name: inputs[name][~ignored] for name in ("student_hidden", "teacher_hidden", "labels")}
    expected = values_and_gradients(linear_distillation, kept)
    assert torch.equal(ce, expected[0])
    assert torch.equal(kd, expected[1])
    assert torch.equal(dhidden[~ignored], expected[2])
    assert not dhidden[ignored].any()
    assert torch.equal(dhead, expected[3])
    assert torch.equal(dbias, expected[4])


def test_other_ignore_index():
    inputs = draw(ignored=0.0)
    inputs["labels"][3] = 7
    check(inputs, ignore_index=7)


@pytest.mark.parametrize("n", [0, 5])
def test_without_valid_rows_everything_is_zero(n):
    inputs = draw(n=n)
    inputs["labels"].fill_(-100)
    values = values_and_gradients(linear_distillation, inputs)
    assert all(not x.any() and x.isfinite().all() for x in values)
    assert [x.shape for x in values[2:]] == [inputs[name].shape for name in LEAVES]
    assert call(linear_distillation, inputs).tokens == 0


def test_result_counts_tokens_and_is_named():
    inputs = draw()
    result = call(linear_distillation, inputs)
    assert isinstance(result, LinearDistillation)
    assert result._fields == ("ce", "kd", "tokens")
    assert result.tokens.dtype == torch.int64
    assert result.tokens.shape == ()
    assert result.tokens == (inputs["labels"] != -100).sum()


def test_equal_models_have_no_divergence():
    inputs = draw(vocab=(29, 29), width=(8, 8))
    for kind in ("hidden", "head", "bias"):
        inputs[f"teacher_{kind}"] = inputs[f"student_{kind}"]
    for divergence in DIVERGENCES:
        _, kd, *gradients = values_and_gradients(linear_distillation, inputs, (0.0, 1.0), divergence=divergence)
        assert abs(kd) < 1e-5
        assert all(x.abs().max() < 1e-5 for x in gradients)


def test_second_backward_is_identical_and_the_teacher_gets_nothing():
    inputs = {name: x.requires_grad_() if x.is_floating_point() else x for name, x in draw().items()}
    result = call(linear_distillation, inputs)
    leaves = [inputs[name] for name in LEAVES]
    loss = result.ce + 0.5 * result.kd
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    second = torch.autograd.grad(loss, leaves, retain_graph=True)
    tripled = torch.autograd.grad(loss * 3, leaves, retain_graph=True)
    for x, y, z in zip(first, second, tripled, strict=True):
        assert torch.equal(x, y)
        assert torch.allclose(3 * x, z, rtol=1e-5, atol=1e-6)
    loss.backward()
    assert all(inputs[f"teacher_{kind}"].grad is None for kind in ("hidden", "head", "bias"))


def test_gradients_agree_with_finite_differences():
    inputs = doubled(draw(n=4, vocab=(6, 6), width=(3, 3), ignored=0.0))
    inputs = {name: x.float() if x.is_floating_point() else x for name, x in inputs.items()}
    *_, dhidden, _, _ = values_and_gradients(linear_distillation, inputs, divergence="jsd", temperature=1.5)
    step = torch.zeros_like(inputs["student_hidden"])
    step[1, 2] = 1e-2
    ends = [
        call(
            linear_distillation,
            inputs | {"student_hidden": inputs["student_hidden"] + sign * step},
            divergence="jsd",
            temperature=1.5,
        )
        for sign in (1, -1)
    ]
    slope = sum(s * (r.ce + r.kd) for s, r in zip((1, -1), ends, strict=True)) / 2e-2
    assert abs(slope - dhidden[1, 2]) < 1e-3


class _Largest(TorchDispatchMode):
    """Remembers the largest number of elements of any tensor an op returned."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        sizes = [x.numel() for x in tree_iter(result) if isinstance(x, torch.Tensor)]
        self.elements = max(self.elements, *sizes, 0)
        return result


def largest_tensor(function, frozen_head, **options):
    inputs = draw(n=32, vocab=(512, 512), ignored=0.0)
    with _Largest() as largest:
        leaves = ("student_hidden",) if frozen_head else LEAVES
        values_and_gradients(function, inputs, leaves=leaves, **options)
    return largest.elements


def test_no_logits_of_all_rows_and_no_head_gradient_when_frozen():
    chunk, head = 4 * 512, 512 * 12
    assert largest_tensor(linear_distillation, True, chunk_size=4) <= head
    assert largest_tensor(linear_distillation, False, chunk_size=4) <= head
    assert largest_tensor(linear_distillation, True, chunk_size=16) == 4 * chunk
    assert largest_tensor(reference.linear_distillation, True) == 32 * 512


BAD = [
    ({"temperature": 0.0}, "temperature must be a finite number above 0"),
    ({"temperature": -1}, "temperature must be"),
    ({"temperature": float("inf")}, "temperature must be"),
    ({"divergence": "kl"}, "divergence must be one of"),
    ({"impl": "triton"}, "impl must be None or 'torch'"),
    ({"chunk_size": 0}, "chunk_size must be"),
    ({"vocab_size": 30}, "vocab_size must be from 1 to 29"),
    ({"vocab_size": 0}, "vocab_size must be from 1 to 29"),
    ({"labels": torch.full((13,), 29)}, "labels must be from 0 to vocab_size-1 = 28"),
    ({"labels": torch.full((13,), -1)}, "labels must be from 0"),
    ({"labels": torch.zeros(13)}, "labels must be int64"),
    ({"labels": torch.zeros(12, dtype=torch.int64)}, "student_hidden must have shape (N, H) = (12, 8)"),
    ({"teacher_hidden": torch.zeros(12, 12)}, "teacher_hidden must have shape (N, H) = (13, 12)"),
    ({"student_head": torch.zeros(29, 9)}, "student_head must have shape (V, H) = (29, 8)"),
    ({"student_head": torch.zeros(29, 8).half()}, "student_head must have the dtype of student_hidden"),
    ({"teacher_head": torch.zeros(31)}, "teacher_head must have 2 dimensions"),
    ({"student_hidden": torch.zeros(13, 8).double()}, "student_hidden must be float16, bfloat16 or float32"),
    ({"student_bias": torch.zeros(31)}, "student_bias must have shape (V) = (29,)"),
    ({"teacher_bias": torch.zeros(31, dtype=torch.int64)}, "teacher_bias must have a floating dtype"),
    ({"teacher_hidden": torch.zeros(13, 12, device="meta")}, "teacher_hidden must be on cpu"),
]


@pytest.mark.parametrize("change, message", BAD, ids=[f"{next(iter(c))}-{i}" for i, (c, _) in enumerate(BAD)])
def test_bad_input_names_the_argument(change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call(linear_distillation, draw() | change)
