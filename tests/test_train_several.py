"""Several teachers with weights per kind of sample: against full matrices in float64, against one teacher, and in runs."""

import copy

import pytest
import torch
from builtin_models import make_recipe, save_teacher
from test_train_losses import batch_of_three, eager, oracle

from cdistill.choices import KDConfig
from cdistill.errors import InputError
from cdistill.models.pair import shares_encoder
from cdistill.train.build import build_models
from cdistill.train.kinds import WEIGHTS
from cdistill.train.model import DistillationModel
from cdistill.train.objectives import OBJECTIVES
from cdistill.train.teacher import Teacher
from cdistill.train.teacher_source import InMemory, Several
from cdistill.vat import VAT, VATConfig

SUMS = {"ar": 1.0, "kd": 0.7, "vat": 3.0}
MIXED = [[1.0, 0.0], [0.5, 0.25], [0.5, 2.0]]
WINDOWS = {4: ((0, 1, 2), (1, 2, 3)), 3: ((0, 1), (1, 2))}


@pytest.fixture(scope="module")
def second(tmp_path_factory):
    """Another teacher, of another depth, width and encoder."""
    folder = tmp_path_factory.mktemp("second")
    return save_teacher(folder / "teacher", seed=2, hidden_size=48, num_hidden_layers=3, num_attention_heads=2)


@pytest.fixture
def built(models, second, tmp_path):
    """A student that fetches the adapter of the first of two teachers."""
    teachers = {"a": {"model": str(models / "teacher"), "weights": {"default": 1}}}
    teachers["b"] = {"model": str(second), "weights": {"default": 1}}
    changes = {"teacher": None, "teachers": teachers, "student__taf_teacher": "a"}
    return build_models(make_recipe(tmp_path / "run", models, **changes))


def losses_by(student, teachers, **vat):
    """The losses of a student and teachers by name; of one without weights where it is not in a mapping."""
    config, kd = VATConfig(layers="all", **{"rows": "answer"} | vat), KDConfig(weight=SUMS["kd"])
    if not isinstance(teachers, dict):
        terms = OBJECTIVES["dft"].terms(kd=kd, vat=VAT(config, 2, 4))
        return DistillationModel(student, terms, teacher=teachers)
    sources = {
        name: InMemory(Teacher(model, shares_vision=shares_encoder(student, model))) for name, model in teachers.items()
    }
    vats = tuple(VAT(config, 2, model.config.text_config.num_hidden_layers) for model in teachers.values())
    terms = OBJECTIVES["dft"].terms(kd=kd, vats=vats, teachers=tuple(sources))
    return DistillationModel(student, terms, teacher=Several(sources, next(iter(sources))))


def gradients(student, losses):
    """Of the weighted sum, for parameters that have one."""
    student.zero_grad()
    sum(weight * losses[name] for name, weight in SUMS.items()).backward()
    return {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}


def one_by_one(batch):
    """The samples of `batch_of_three` as batches of their own."""
    for i, image in enumerate((0, None, 1)):
        alone = {name: batch[name][i : i + 1] for name in ("input_ids", "labels", "attention_mask")}
        yield alone if image is None else alone | {"pixel_values": batch["pixel_values"][image : image + 1]}


def test_losses_and_gradients_are_weighted_sums_of_full_matrices(built):
    student, batch = built.student, batch_of_three(seed=21)
    student.requires_grad_(True).model.vision_tower.requires_grad_(False)
    student.model.multi_modal_projector.teacher.requires_grad_(False)
    found = losses_by(student, built.teachers)(**batch, **{WEIGHTS: torch.tensor(MIXED)})
    ours = gradients(student, found)
    truth, teachers = eager(student, torch.float64), built.teachers.values()
    exact = dict.fromkeys(SUMS, 0.0)
    parts = {"kd": [0.0, 0.0], "vat": [0.0, 0.0]}
    for i, alone in enumerate(one_by_one(batch)):
        for t, teacher in enumerate(teachers):
            windows = WINDOWS[teacher.config.text_config.num_hidden_layers]
            sums = oracle(truth, eager(teacher, torch.float64), alone, torch.float64, windows)
            exact["ar"] = exact["ar"] + sums["ar"] / 2
            for name, of in parts.items():
                of[t] = of[t] + MIXED[i][t] * sums[name]
    exact |= {name: sum(of) for name, of in parts.items()}
    for name, value in exact.items():
        assert found[name].item() == pytest.approx(value.item(), rel=2e-5), name
    for name, of in parts.items():
        assert found[f"{name}_teachers"].tolist() == pytest.approx([x.item() for x in of], rel=2e-5)
    assert found["vat_layers"].mean().item() == pytest.approx(exact["vat"].item(), rel=2e-5)
    expected = gradients(truth, exact)
    assert ours.keys() == expected.keys()
    largest = max(g.abs().max() for g in expected.values())
    for name, gradient in ours.items():
        assert (gradient - expected[name]).abs().max() <= 1e-4 * expected[name].abs().max() + 1e-6 * largest, name


@pytest.mark.parametrize("vat", [{}, {"target": "recomputed"}, {"rows": "text", "loss": "kl"}], ids=str)
def test_one_teacher_with_weight_1_is_the_plain_way_bit_for_bit(built, vat):
    student, batch = built.student, batch_of_three(seed=22)
    plain = losses_by(student, built.teacher, **vat)(**batch)
    wanted = gradients(student, plain)
    several = losses_by(student, {"a": built.teacher}, **vat)(**batch, **{WEIGHTS: torch.ones(3, 1)})
    found = gradients(student, several)
    assert all(torch.equal(plain[name], several[name]) for name in plain)
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_two_equal_teachers_by_halves_are_one(built):
    student, batch = built.student, batch_of_three(seed=23)
    plain = losses_by(student, built.teacher)(**batch)
    wanted = gradients(student, plain)
    same = {"a": built.teacher, "b": copy.deepcopy(built.teacher)}
    halves = losses_by(student, same)(**batch, **{WEIGHTS: torch.full((3, 2), 0.5)})
    found = gradients(student, halves)
    for name in SUMS:
        torch.testing.assert_close(halves[name], plain[name], rtol=1e-6, atol=1e-6)
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5 * gradient.abs().max().item())
    torch.testing.assert_close(halves["kd_teachers"], plain["kd"].detach().expand(2) / 2)


def test_a_teacher_that_no_sample_learns_of_is_not_run(built):
    student, batch = built.student, batch_of_three(seed=24)
    model = losses_by(student, built.teachers)
    model.source.sources["b"]._run = None  # whose call would raise
    ones = torch.tensor([[1.0, 0.0]] * 3)
    found = model(**batch, **{WEIGHTS: ones})
    plain = losses_by(student, built.teacher)(**batch)
    assert all(torch.equal(found[name], plain[name]) for name in SUMS)
    assert found["kd_teachers"][1] == found["vat_teachers"][1] == 0
    with pytest.raises(TypeError):
        model(**batch, **{WEIGHTS: ones.flip(1)})
    with pytest.raises(InputError, match=f"{WEIGHTS}.*must be"):
        model(**batch)
