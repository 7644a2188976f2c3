"""linear_distillation against float64 logits: losses and gradients, chunks, vocabularies, dtypes, top-k teachers."""

import warnings

import pytest
import torch
from op_cases import device_of
from vocabulary_cases import (
    DIVERGENCES,
    IMPL_DTYPES,
    LEAVES,
    call,
    check,
    doubled,
    draw,
    gradients_of,
    run,
    values_and_gradients,
    with_topk,
)

from cdistill.ops import LinearDistillation, reference
from cdistill.ops._dispatch import backend, warn_once

pytestmark = pytest.mark.usefixtures("poisoned_empty")


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.0, 1.0), (0.7, -1.3)])
def test_values_and_gradients_match_float64(impl, divergence, temperature, weights):
    check(impl, draw(), divergence=divergence, temperature=temperature, weights=weights)


@pytest.mark.parametrize("impl, dtype", IMPL_DTYPES)
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_every_dtype_is_as_exact_as_eager(impl, dtype, divergence, temperature):
    inputs = draw(n=12, vocab=(531, 533), width=(24, 40), dtype=dtype, seed=1)
    check(impl, inputs, chunk_size=5, divergence=divergence, temperature=temperature)


@pytest.mark.parametrize("impl", ["torch", "cpp"])
def test_memory_that_nobody_has_written_is_not_read(impl):
    """Deterministic torch fills new tensors with NaN; rows of logits are padded, and CPUs multiply tiles of them."""
    inputs = draw(n=60, vocab=(70, 75), dtype=torch.bfloat16, seed=4)
    torch.use_deterministic_algorithms(True)
    try:
        check(impl, inputs, chunk_size=21)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("weights", [(1.0, 1.0), (1.0, 1.001), (1.0, 0.0), (0.0, 3.0), (0.3, 0.2)])
@pytest.mark.parametrize("loss_weights", [(1.0, 1.0), (2.0, 0.0), (0.0, 1.0), (-1, 2.5)])
def test_any_ratio_of_the_losses_gives_the_right_gradients(impl, weights, loss_weights):
    check(impl, draw(seed=7), weights=weights, loss_weights=loss_weights, divergence="reverse_kl")


def test_another_ratio_is_told_once():
    warn_once.cache_clear()
    for weights, loss_weights, told in (
        ((1, 1), (2, 2), 0),
        ((1, 0.3), (1, 0.3), 0),
        ((1, 1), (1, 2), 1),
        ((1, 0), (1, 1), 0),
    ):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            values_and_gradients("cpp", draw(), weights, loss_weights=loss_weights)
        messages = [str(w.message) for w in caught if "another ratio than that of loss_weights" in str(w.message)]
        assert len(messages) == told


@pytest.mark.parametrize("of_ce, of_kd", [(1.0, torch.nan), (torch.nan, 1.0)])
def test_a_gradient_that_is_no_number_reaches_the_leaves(impl, of_ce, of_kd):
    hidden = draw()["student_hidden"].requires_grad_()
    result = run(impl, draw() | {"student_hidden": hidden})
    (of_ce * result.ce + of_kd * result.kd).backward()
    counted = draw()["labels"] != -100
    assert hidden.grad[counted].isnan().all()


@pytest.mark.parametrize("name", ["ce", "kd"])
def test_one_loss_alone(impl, name):
    inputs = draw(seed=3)
    weights = (1.0, 0.0) if name == "ce" else (0.0, 1.0)
    exact = gradients_of(lambda x: call(reference.linear_distillation, x), doubled(inputs), weights)[2:]
    leaves = {leaf: inputs[leaf].requires_grad_() for leaf in LEAVES}
    getattr(run(impl, inputs | leaves), name).backward()
    for leaf, gradient in zip(LEAVES, exact, strict=True):
        torch.testing.assert_close(leaves[leaf].grad.double(), gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
def test_generalised_jensen_shannon(impl, beta):
    check(impl, draw(seed=5), divergence="jsd", beta=beta, temperature=1.5)


@pytest.mark.parametrize("chunk_size", [1, 5, 1000, None])
def test_chunks_do_not_change_the_result(impl, chunk_size):
    check(impl, draw(n=21), chunk_size=chunk_size)


def test_non_contiguous_inputs_and_large_logits(impl):
    inputs = draw()
    inputs["student_hidden"] = (inputs["student_hidden"] * 30).T.contiguous().T
    inputs["teacher_head"] = inputs["teacher_head"].repeat(1, 2)[:, ::2]
    inputs["teacher_hidden"] = inputs["teacher_hidden"][:, : inputs["teacher_head"].shape[1]]
    for divergence in DIVERGENCES:
        assert all(x.isfinite().all() for x in values_and_gradients(impl, inputs, divergence=divergence))
    check(impl, inputs)


def test_a_certain_student_and_a_certain_teacher(impl):
    """Logits hundreds apart: probabilities that underflow, losses that do not."""
    inputs = draw(ignored=0.0)
    for name, factor in (("student_hidden", 60.0), ("teacher_hidden", -50.0)):
        inputs[name] = inputs[name] * factor
    for divergence in DIVERGENCES:
        exact = gradients_of(
            lambda x, d=divergence: call(reference.linear_distillation, x, divergence=d), doubled(inputs), (1.0, 1.0)
        )
        for x, y in zip(values_and_gradients(impl, inputs, divergence=divergence), exact, strict=True):
            torch.testing.assert_close(x.double(), y, rtol=1e-4, atol=1e-4 * y.abs().max().item())


@pytest.mark.parametrize("vocab, vocab_size", [((40, 29), None), ((29, 40), None), ((40, 40), 29), ((40, 35), 30)])
def test_padding_of_the_vocabulary_is_masked_on_both_sides(impl, vocab, vocab_size):
    inputs = draw(vocab=vocab)
    inputs["labels"].clamp_(max=28)
    used = min(vocab) if vocab_size is None else vocab_size
    _, _, _, dhead, dbias = check(impl, inputs, vocab_size=vocab_size)
    assert not dhead[used:].any()
    assert not dbias[used:].any()
    changed = dict(inputs)
    for name in ("student_head", "teacher_head", "student_bias", "teacher_bias"):
        changed[name] = inputs[name].clone()
        changed[name][used:] = 1e4
    for x, y in zip(run(impl, inputs, vocab_size=vocab_size), run(impl, changed, vocab_size=vocab_size), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("leaves", [("student_hidden",), ("student_head",), ("student_bias",), LEAVES[:2]])
def test_only_needed_gradients_are_made(impl, leaves):
    check(impl, draw(), leaves=leaves)


def test_biases_are_optional_and_independent(impl):
    inputs = draw()
    for missing in ({"student_bias"}, {"teacher_bias"}, {"student_bias", "teacher_bias"}):
        kept = {name: x for name, x in inputs.items() if name not in missing}
        check(impl, kept, leaves=[name for name in LEAVES if name in kept])


def test_ignored_rows_do_not_matter_and_get_no_gradient(impl):
    inputs = draw(ignored=0.5, seed=4)
    ignored = inputs["labels"] == -100
    for name in ("student_hidden", "teacher_hidden"):
        inputs[name][ignored] = torch.nan
    ce, kd, dhidden, dhead, dbias = values_and_gradients(impl, inputs)
    kept = inputs | {name: inputs[name][~ignored] for name in ("student_hidden", "teacher_hidden", "labels")}
    expected = values_and_gradients(impl, kept)
    assert torch.equal(ce, expected[0])
    assert torch.equal(kd, expected[1])
    assert torch.equal(dhidden[~ignored], expected[2])
    assert not dhidden[ignored].any()
    assert torch.equal(dhead, expected[3])
    assert torch.equal(dbias, expected[4])


def test_other_ignore_index(impl):
    inputs = draw(ignored=0.0)
    inputs["labels"][3] = 7
    check(impl, inputs, ignore_index=7)


@pytest.mark.parametrize("n", [0, 5])
def test_without_valid_rows_everything_is_zero(impl, n):
    inputs = draw(n=n)
    inputs["labels"].fill_(-100)
    for x in (inputs, with_topk(inputs, 3)):
        values = values_and_gradients(impl, x)
        assert all(not x.any() and x.isfinite().all() for x in values)
        assert [x.shape for x in values[2:]] == [inputs[name].shape for name in LEAVES]
        assert run(impl, x).tokens == 0


def test_result_counts_tokens_and_is_named(impl):
    inputs = draw()
    result = run(impl, inputs)
    assert isinstance(result, LinearDistillation)
    assert result._fields == ("ce", "kd", "tokens")
    assert result.tokens.dtype == torch.int64
    assert result.tokens.shape == ()
    assert result.tokens == (inputs["labels"] != -100).sum()


def test_equal_models_have_no_divergence(impl):
    inputs = draw(vocab=(29, 29), width=(8, 8))
    for kind in ("hidden", "head", "bias"):
        inputs[f"teacher_{kind}"] = inputs[f"student_{kind}"]
    for divergence in DIVERGENCES:
        _, kd, *gradients = values_and_gradients(impl, inputs, (0.0, 1.0), divergence=divergence)
        assert abs(kd) < 1e-5
        assert all(x.abs().max() < 1e-5 for x in gradients)


@pytest.mark.parametrize("loss_weights", [(1.0, 0.5), (1.0, 1.0)])  # the second: made anew in each backward pass
def test_second_backward_is_identical_and_the_teacher_gets_nothing(impl, loss_weights):
    inputs = {name: x.requires_grad_() if x.is_floating_point() else x for name, x in draw().items()}
    result = run(impl, inputs, loss_weights=loss_weights)
    leaves = [inputs[name] for name in LEAVES]
    loss = result.ce + 0.5 * result.kd
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    second = torch.autograd.grad(loss, leaves, retain_graph=True)
    tripled = torch.autograd.grad(loss * 3, leaves, retain_graph=True)
    for x, y, z in zip(first, second, tripled, strict=True):
        assert torch.equal(x, y)
        torch.testing.assert_close(3 * x, z, rtol=1e-5, atol=1e-5 * z.abs().max().item())
    loss.backward()  # the last one may use up what was saved
    for x, leaf in zip(first, leaves, strict=True):
        assert torch.equal(x, leaf.grad)
    assert all(inputs[f"teacher_{kind}"].grad is None for kind in ("hidden", "head", "bias"))


@pytest.mark.parametrize("loss_weights", [(1.0, 1.0), (1.0, 2.0)])
def test_a_teacher_that_ran_in_inference_mode(impl, loss_weights):
    inputs = draw(seed=6)
    want = values_and_gradients(impl, inputs)
    with torch.inference_mode():
        teacher = {name: x.clone() for name, x in inputs.items() if name.startswith("teacher")}
    for got, x in zip(values_and_gradients(impl, inputs | teacher, loss_weights=loss_weights), want, strict=True):
        torch.testing.assert_close(got, x)


def test_a_graph_of_the_gradient_is_refused_in_words(impl):
    """Not dropped from the second derivative in silence."""
    inputs = draw()
    leaf = inputs["student_hidden"].requires_grad_()
    result = run(impl, inputs)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        (gradient,) = torch.autograd.grad((result.ce + result.kd) ** 2, leaf, create_graph=True, retain_graph=False)
        gradient.sum().backward()


MIXED = [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16), (torch.float16, torch.float32)]


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("student, teacher", MIXED)
def test_models_of_different_dtypes(student, teacher, divergence):
    inputs = draw(n=40, vocab=(531, 533), width=(24, 40), seed=2)
    for name, x in inputs.items():
        if x.is_floating_point():
            inputs[name] = x.to(student if name.startswith("student") else teacher)
    for impl in ("torch", "cpp"):
        check(impl, inputs, chunk_size=16, divergence=divergence)


@pytest.mark.parametrize("temperature, factor", [(1.0, 20.0), (1.0, 60.0), (0.5, 10.0), (30.0, 1.0), (100.0, 1.0)])
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("impl", ["torch", "cpp"])
def test_certain_students_and_high_temperatures(impl, divergence, temperature, factor):
    """Where parts of what is subtracted agree to many digits."""
    for seed in range(3):
        inputs = draw(n=33, vocab=(531, 531), width=(8, 8), ignored=0.0, seed=seed)
        inputs["student_hidden"] = inputs["student_hidden"] * factor
        options = {"divergence": divergence, "temperature": temperature, "beta": 0.3}
        check(impl, inputs, weights=(0.0, 1.0), chunk_size=None, **options)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_loss_of_weight_0_leaves_the_other_alone(impl, divergence):
    inputs = draw(ignored=0.0)
    want = values_and_gradients(impl, inputs, (1.0, 0.0), loss_weights=(1, 0), divergence=divergence)[2:]
    inputs["teacher_hidden"][4, 3] = torch.nan
    for loss_weights in ((1, 0), (1, 1)):
        leaves = {name: inputs[name].detach().requires_grad_() for name in LEAVES}
        run(impl, inputs | leaves, loss_weights=loss_weights, divergence=divergence).ce.backward()
        for leaf, x in zip(leaves.values(), want, strict=True):
            torch.testing.assert_close(leaf.grad, x)


def test_gradients_accumulate_over_batches(impl):
    """A gradient handed to autograd is not written to again, by this op or by the next call."""
    inputs = [draw(seed=seed) for seed in (1, 2, 3)]
    head = inputs[0]["student_head"].clone().requires_grad_()
    parts = []
    for x in inputs:
        alone = x | {"student_head": inputs[0]["student_head"]}
        parts.append(values_and_gradients(impl, alone, leaves=["student_head"])[2])
        result = run(impl, x | {"student_head": head})
        (result.ce + result.kd).backward()
    torch.testing.assert_close(head.grad, sum(parts))


def test_tied_embeddings_get_both_gradients(impl):
    inputs = draw(ignored=0.0)
    tokens = torch.randint(29, (13,), generator=torch.Generator().manual_seed(8))

    def gradient(function, dtype):
        table = inputs["student_head"].to(dtype).requires_grad_()
        x = doubled(inputs) if dtype == torch.float64 else inputs
        result = function(x | {"student_hidden": table[tokens].tanh(), "student_head": table})
        (result.ce + 2 * result.kd).backward()
        return table.grad

    exact = gradient(lambda x: call(reference.linear_distillation, x), torch.float64)
    ours = gradient(lambda x: run(impl, x, loss_weights=(1, 2)), torch.float32)
    torch.testing.assert_close(ours.double(), exact, rtol=1e-4, atol=1e-5)


def kept_flags(impl, monkeypatch):
    """A list that receives the backend's flag ``gradient`` of every chunk from now on."""
    module = backend(impl, torch.zeros(0, device=device_of(impl)))
    losses, flags = module.vocabulary_losses, []

    def kept(rows, options):
        flags.append(options.gradient)
        return losses(rows, options)

    monkeypatch.setattr(module, "vocabulary_losses", kept)
    return flags


def test_no_gradient_is_made_under_no_grad(impl, monkeypatch):
    inputs = draw() | {name: draw()[name].requires_grad_() for name in LEAVES}
    for divergence in DIVERGENCES:
        expected = call(reference.linear_distillation, doubled(inputs), divergence=divergence)
        asked = kept_flags(impl, monkeypatch)
        with torch.no_grad():
            result = run(impl, inputs, divergence=divergence)
        assert asked == [False] and not result.ce.requires_grad
        values_and_gradients(impl, inputs, divergence=divergence)
        assert asked == [False, True]
        torch.testing.assert_close(torch.stack(result[:2]).double(), torch.stack(expected[:2]).detach().double())


def test_gradients_agree_with_finite_differences(impl):
    inputs = draw(n=4, vocab=(6, 6), width=(3, 3), ignored=0.0)
    *_, dhidden, _, _ = values_and_gradients(impl, inputs, divergence="jsd", temperature=1.5)
    step = torch.zeros_like(inputs["student_hidden"])
    step[1, 2] = 1e-2
    ends = [
        run(
            impl,
            inputs | {"student_hidden": inputs["student_hidden"] + sign * step},
            divergence="jsd",
            temperature=1.5,
        )
        for sign in (1, -1)
    ]
    slope = sum(s * (r.ce + r.kd) for s, r in zip((1, -1), ends, strict=True)) / 2e-2
    assert abs(slope - dhidden[1, 2]) < 1e-3


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("name", ["student_hidden", "teacher_hidden"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_what_is_not_finite_reaches_the_losses_and_gradients(impl, divergence, name, value):
    inputs = draw(ignored=0.0)
    inputs[name][4, 3] = value
    ce, kd, dhidden, *others = values_and_gradients(impl, inputs, divergence=divergence)
    assert not kd.isfinite()
    assert ce.isfinite() == (name == "teacher_hidden")
    assert not dhidden[4].isfinite().any()
    assert dhidden[[0, 1, 2, 3, 5]].isfinite().all()
    assert not any(x.isfinite().all() for x in others)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("k", [1, 5, 18])
def test_top_k_teacher_matches_float64(impl, k, temperature, divergence):
    inputs = with_topk(draw(ignored=0.2), k, temperature)
    inputs["labels"][0] = inputs["teacher_topk"][1][0, 0]
    check(impl, inputs, divergence=divergence, temperature=temperature, beta=0.3)


@pytest.mark.parametrize("impl, dtype", IMPL_DTYPES)
def test_top_k_teacher_in_every_dtype(impl, dtype):
    inputs = draw(n=12, vocab=(531, 531), width=(24, 40), dtype=dtype, seed=1)
    for divergence in DIVERGENCES:
        check(impl, with_topk(inputs, 50), chunk_size=5, divergence=divergence)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_all_tokens_but_one_say_what_the_whole_teacher_says(impl, divergence):
    inputs = draw(vocab=(29, 29), ignored=0.0)
    inputs["teacher_hidden"] = inputs["teacher_hidden"] / 10  # the last token's probability is not lost in 1 - sum
    whole = values_and_gradients(impl, inputs, divergence=divergence)
    top = values_and_gradients(impl, with_topk(inputs, 28), divergence=divergence)
    for x, y in zip(whole, top, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_top_k_tokens_that_hold_all_probability(impl, divergence):
    """Neither a student that leaves nothing to the others nor a teacher that does gives anything but finite numbers."""
    inputs = with_topk(draw(ignored=0.0), 4)
    values, indices = inputs["teacher_topk"]
    inputs["teacher_topk"] = (values.log_softmax(1), indices)
    inputs["student_bias"][indices] += 300.0
    assert all(x.isfinite().all() for x in values_and_gradients(impl, inputs, divergence=divergence))
