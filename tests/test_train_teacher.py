"""Teachers that do not fit: partitioned, quantised, without what the student has, or cached and not there at all."""

import importlib.util

import pytest
from builtin_models import make_recipe, save_base, save_teacher
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from test_train_stages import assert_near, metrics, refused, weights

from cdistill.train import run
from cdistill.train import teacher as teacher_module
from cdistill.train.build import build_models
from cdistill.train.teacher import Teacher

LOSSES = ("loss", "ar", "kd", "vat")
STAGES = ["dpt", "dft"]  # that have a teacher


def losses(output):
    return [[e[name] for name in LOSSES if e[name] is not None] for e in metrics(output)]


def assert_close(a, b, rel):
    assert len(a) == len(b) > 0
    for ours, theirs in zip(a, b, strict=True):
        assert ours == pytest.approx(theirs, rel=rel)


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A teacher wide enough for blocks of quantised weights, one with a head of its own, and a base."""
    folder = tmp_path_factory.mktemp("wide")
    shape = {"hidden_size": 128, "intermediate_size": 128, "num_key_value_heads": 4}
    save_teacher(folder / "teacher", **shape)
    save_teacher(folder / "untied", **shape, tie_word_embeddings=False)
    save_base(folder / "base")
    return folder


@pytest.fixture(scope="module")
def whole(wide, tmp_path_factory):
    """Losses and weights with the teacher whole on every process."""
    output = tmp_path_factory.mktemp("whole")
    return {
        teacher: (
            run(make_recipe(output / teacher, wide, stages=STAGES, teacher=str(wide / teacher))),
            losses(output / teacher),
        )
        for teacher in ("teacher", "untied")
    }


@pytest.fixture
def nothing_stays(monkeypatch):
    """Small parameters are partitioned, too, which DeepSpeed keeps whole otherwise."""
    make = teacher_module.teacher_config

    def config(**options):
        made = make(**options)
        made["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        return made

    monkeypatch.setattr(teacher_module, "teacher_config", config)


@pytest.mark.parametrize(
    ("teacher", "zero", "offload"), [("teacher", 2, False), ("untied", 2, True), ("untied", 3, False)]
)
def test_a_partitioned_teacher_trains_the_same_student(
    wide, whole, tmp_path, monkeypatch, nothing_stays, teacher, zero, offload
):
    seen = set()
    forward = Teacher.forward

    def watched(self, *args, **kwargs):
        seen.update(p.ds_status for p in self.model.model.language_model.layers.parameters())
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(Teacher, "forward", watched)
    memory = {"zero": 3, "offload": offload}
    recipe = make_recipe(
        tmp_path / "run", wide, stages=STAGES, teacher=str(wide / teacher), deepspeed=zero, teacher_memory=memory
    )
    final = run(recipe)
    assert seen == {ZeroParamStatus.NOT_AVAILABLE}, "between its layers' turns the teacher is partitioned"
    reference, values = whole[teacher]
    assert_close(losses(tmp_path / "run"), values, 1e-4)
    assert_near(weights(final), weights(reference))


def test_a_teacher_partitioned_over_two_processes(wide, whole, ranks, tmp_path):
    ranks.call(run, make_recipe(tmp_path / "run", wide, stages=STAGES, deepspeed=3, teacher_memory={"zero": 3}))
    assert_close(losses(tmp_path / "run"), whole["teacher"][1], 2e-4)


@pytest.mark.parametrize(("kind", "layer", "rel"), [("8bit", "Linear8bitLt", 0.05), ("4bit", "Linear4bit", 0.3)])
def test_a_quantised_teacher_is_near_the_whole_one(wide, whole, tmp_path, kind, layer, rel):
    recipe = make_recipe(tmp_path / "run", wide, stages=STAGES, teacher_memory={"quantization": kind})
    teacher = build_models(recipe).teacher
    kinds = {name: type(module).__name__ for name, module in teacher.named_modules()}
    linear = {name for name, kind in kinds.items() if "Linear" in kind}
    quantised = {name for name in linear if kinds[name] == layer}
    assert len(quantised) == 7 * 4 and all("language_model.layers" in name for name in quantised)
    assert "lm_head" in linear - quantised
    run(recipe)
    found, exact = losses(tmp_path / "run"), whole["teacher"][1]
    assert found != exact
    assert_close(found, exact, rel)


def test_quantisation_without_its_package_is_told(wide, tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else find(name))
    recipe = make_recipe(tmp_path / "run", wide, teacher_memory={"quantization": "8bit"})
    refused(recipe, tmp_path / "run", r"needs bitsandbytes: pip install cdistill\[quantization\]")


@pytest.mark.parametrize("taf", [True, False])
def test_the_teacher_keeps_no_copy_of_what_the_student_has(models, tmp_path, taf):
    built = build_models(make_recipe(tmp_path / "run", models, student__taf=taf))
    teacher = Teacher(built.teacher, shares_vision=True)
    teacher.drop_shared_parts(built.student)
    kept = {name.split(".")[2] for name, _ in teacher.named_parameters() if name.startswith("model.model.")}
    assert kept == ({"language_model"} if taf else {"language_model", "multi_modal_projector"})
