"""What rows weigh, what models do to their logits, no teacher, no tail: linear_distillation and linear_token_losses."""

import numpy as np
import pytest
import torch
from vocabulary_cases import (
    DIVERGENCES,
    IMPL_DTYPES,
    call_tokens,
    check,
    draw,
    run,
    values_and_gradients,
    with_topk,
)

pytestmark = pytest.mark.usefixtures("poisoned_empty")


OPTIONS = {
    "weights": ("weights",),
    "no teacher": (),
    "no teacher, weights, softcap": ("weights", "student_logit_softcap"),
    "scale": ("student_logit_scale", "teacher_logit_scale"),
    "softcap": ("student_logit_softcap", "teacher_logit_softcap"),
    "all": ("weights", "student_logit_scale", "student_logit_softcap", "teacher_logit_scale", "teacher_logit_softcap"),
    "top, no tail": ("weights", "student_logit_softcap"),
}
VALUES = {
    "student_logit_scale": 0.4,
    "student_logit_softcap": 1.5,
    "teacher_logit_scale": 1.7,
    "teacher_logit_softcap": 3.0,
}


def chosen(case, inputs, divergence):
    """Inputs and options of a case of OPTIONS."""
    options = {name: VALUES[name] for name in OPTIONS[case] if name in VALUES} | {"divergence": divergence}
    if "weights" in OPTIONS[case]:
        inputs = inputs | {"weights": torch.randn(len(inputs["labels"]), generator=torch.Generator().manual_seed(3))}
    if case.startswith("no teacher"):
        inputs = inputs | dict.fromkeys(("teacher_hidden", "teacher_head", "teacher_bias"))
    if case == "top, no tail":
        inputs, options = with_topk(inputs, 5, 2.0), options | {"temperature": 2.0, "topk_tail": False}
    return inputs, options


@pytest.mark.parametrize("case", OPTIONS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("impl, dtype", IMPL_DTYPES)
def test_what_a_model_does_to_its_logits_and_what_rows_weigh(impl, case, divergence, dtype):
    rows = 12 if dtype == torch.float32 else 60  # or the roundings of one row decide
    inputs, options = chosen(case, draw(n=rows, vocab=(70, 75), dtype=dtype, seed=4), divergence)
    weights = (0.7, 0.0) if case.startswith("no teacher") else (0.7, -1.3)
    check(impl, inputs, weights=weights, chunk_size=rows // 3 + 1, **options)


@pytest.mark.parametrize("case", OPTIONS)
def test_token_losses_are_the_parts_of_the_sums(impl, case):
    inputs, options = chosen(case, draw(seed=5), "reverse_kl")
    weights = inputs.pop("weights", torch.ones(13))
    sums = run(impl, inputs | {"weights": weights}, **options)
    found = call_tokens(impl, inputs, **options)
    for total, rows in zip(sums[:2], found[:2], strict=True):
        assert rows.shape == (13,) and rows.dtype == torch.float32 and not rows.requires_grad
        assert (rows[inputs["labels"] == -100] == 0).all()
        torch.testing.assert_close((rows.cpu() * weights).sum(), total.cpu())
    if inputs["teacher_hidden"] is None:
        assert found.teacher_ce is None
        return
    scale, cap = (options.get(f"teacher_logit_{name}") for name in ("scale", "softcap"))
    logits = (inputs["teacher_hidden"] @ inputs["teacher_head"].T + inputs["teacher_bias"])[:, :29] * (scale or 1.0)
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    expected = torch.nn.functional.cross_entropy(logits, inputs["labels"], reduction="none")
    torch.testing.assert_close(found.teacher_ce.cpu(), expected)


def test_weights_of_ignored_rows_are_not_read(impl):
    inputs = draw(seed=6)
    weights = torch.where(inputs["labels"] == -100, torch.inf, 1.0)
    for found, expected in zip(
        values_and_gradients(impl, inputs | {"weights": weights}), values_and_gradients(impl, inputs), strict=True
    ):
        torch.testing.assert_close(found, expected)


def test_scalars_of_numpy_are_numbers(impl):
    options = {"temperature": 2.0, "beta": 0.25, "vocab_size": 20, "ignore_index": -100, "student_logit_softcap": 3.0}
    kinds = {int: np.int64, float: np.float32}
    inputs = draw(seed=8)
    inputs["labels"].clamp_(max=19)
    found = [
        values_and_gradients(impl, inputs, divergence="jsd", **given)
        for given in (options, {name: kinds[type(value)](value) for name, value in options.items()})
    ]
    assert all(map(torch.equal, *found))
