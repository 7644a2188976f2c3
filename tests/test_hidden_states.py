"""The baseline of hidden states: its value and gradients in float64, and a stage of it."""

import copy

import pytest
import torch
import torch.nn.functional as F
from builtin_models import make_recipe
from family_models import build_pair, draw
from test_terms import answers, gradients
from test_train_stages import metrics

import cdistill
from cdistill.choices import KDConfig
from cdistill.models.load import load_model
from cdistill.train import run

NAME = "qwen2_vl"


def test_value_and_gradients_are_those_of_hidden_states_in_float64():
    student = build_pair(NAME)[0]
    teacher = copy.deepcopy(student)
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.add_(0.3 * parameter.std() * torch.randn_like(parameter) if parameter.numel() > 1 else 0.0)
    batch = draw(NAME, 31)
    distillation = cdistill.distill(teacher, student, kd=KDConfig(weight=0.0), vat_weight=0.0, terms=["hidden"])
    found = distillation(batch)
    exact, theirs = copy.deepcopy(student).double(), copy.deepcopy(teacher).double()
    wide = {name: x.double() if x.is_floating_point() else x for name, x in batch.items()}
    with torch.no_grad():
        target = answers(theirs, wide)
    ours = answers(exact, wide)
    value = (1 - F.cosine_similarity(ours, target)).mean()
    assert 0.01 < value < 1
    torch.testing.assert_close(found["hidden"].double(), value, rtol=1e-5, atol=1e-6)
    expected = gradients(value, exact)
    made = gradients(found["loss"] - found["ar"], student)
    whole = max(g.abs().max() for g in expected.values())
    for name, gradient in expected.items():
        if name in made:
            assert (made[name].double() - gradient).abs().max() <= 1e-4 * whole, name


def test_a_stage_trains_a_map_between_widths_and_throws_it_away(models, tmp_path):
    section = {
        "objective": "hidden",
        "samples": 96,
        "global_batch_size": 8,
        "learning_rate": 1e-2,
        "data": {"turns": 1},
    }
    final = run(make_recipe(tmp_path / "run", models, stages=["near"], stage__near=section))
    values = [line["hidden"] for line in metrics(tmp_path / "run")]
    assert values[-1] < 0.8 * values[0]
    assert not any("hidden_map" in name for name in load_model(final).state_dict())


def test_distill_refuses_a_map_that_it_could_not_train():
    student, teacher = build_pair(NAME)
    with pytest.raises(ValueError, match="hidden"):
        cdistill.distill(teacher, student, terms=["hidden"])
