"""Benchmarks during training: the answers of `cdistill eval`, and no trace in the training."""

import json
import math
import random
import shutil
from itertools import pairwise

import pytest
import torch
from builtin_models import make_recipe
from test_train_stages import Crash, metrics, same, weights

from cdistill.builtin.questions import COMPOSITIONAL, RECOGNITION
from cdistill.builtin.writer import write
from cdistill.cli import main
from cdistill.eval.contract import Question
from cdistill.eval.inference import Inference
from cdistill.eval.tasks import prepare, spread
from cdistill.models.load import load_model
from cdistill.train import run

TASKS = ("builtin", "sugarcrepe")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write("sugarcrepe", folder / "sugarcrepe", n=2)
    return folder


def recipe(output, models, data, **changes):
    section = {"tasks": list(TASKS), "data": str(data), "limit": 10, "every": 2}
    values = {"stages": ["dft"], "stage__dft__eval": section, "save_steps": 2}
    values |= {"student__taf": False, "student__vision": str(models / "teacher")}
    return make_recipe(output, models, **values | changes)


def evaluations(output):
    return [(line["step"], line["eval"]) for line in metrics(output) if "eval" in line]


@pytest.fixture(scope="module")
def evaluated(models, data, tmp_path_factory):
    output = tmp_path_factory.mktemp("evaluated") / "run"
    best = {"stage__dft__keep_best": "eval.sugarcrepe.mean"}
    return output, run(recipe(output, models, data, **best))


def test_values_are_those_of_the_command(evaluated, data, tmp_path):
    """After the last step, of the student that is published; both tasks, one in files."""
    output, final = evaluated
    assert [step for step, _ in evaluations(output)] == [2, 3]
    command = ["eval", str(final), "--data", str(data), "--limit", "10", "--json", str(tmp_path / "found.json")]
    assert main([*command, *(part for task in TASKS for part in ("--task", task))]) == 0
    found = json.loads((tmp_path / "found.json").read_text())
    wanted = {f"{task}.{name}": value for task in TASKS for name, value in found[task]["metrics"].items()}
    assert found["sugarcrepe"]["answers"] == 10 and found["builtin"]["answers"] == 10
    assert evaluations(output)[-1][1] == wanted


def test_it_leaves_no_trace_and_resumes_the_same(evaluated, models, data, tmp_path):
    output, final = evaluated
    plain = run(recipe(tmp_path / "plain", models, data, stage__dft__eval=None))
    assert same(weights(plain), weights(final))
    again = recipe(tmp_path / "cut", models, data)
    with pytest.raises(KeyboardInterrupt):
        run(again, callbacks=[Crash(3)])
    assert same(weights(run(again, resume=True)), weights(final))
    assert evaluations(tmp_path / "cut") == evaluations(output)


def test_the_best_student_by_a_benchmark_is_kept(evaluated):
    output, _ = evaluated
    manifest = json.loads((output / "1-dft-best" / "complete").read_text())
    values = {step: found["sugarcrepe.mean"] for step, found in evaluations(output)}
    assert manifest["metric"] == "eval.sugarcrepe.mean"
    assert manifest["best"] == values[manifest["step"]] == max(values.values())
    load_model(output / "1-dft-best")


@pytest.mark.parametrize("zero", [2, 3])
def test_two_processes_find_what_one_does(evaluated, models, data, ranks, tmp_path, zero):
    """Questions are shared, or where parameters are partitioned asked by both at once."""
    output, _ = evaluated
    ranks.call(run, recipe(tmp_path / "run", models, data, deepspeed=zero), world=2)
    assert evaluations(tmp_path / "run") == evaluations(output)


def test_what_may_change_when_a_run_goes_on(models, data, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(recipe(tmp_path / "run", models, data, stage__dft__eval=None), callbacks=[Crash(3)])
    run(recipe(tmp_path / "run", models, data), resume=True)
    assert [step for step, _ in evaluations(tmp_path / "run")] == [3]


def test_numbers_that_are_none_do_not_end_a_run(models, data, tmp_path, monkeypatch, capsys):
    """The benchmark is named, and has no values at this step."""
    monkeypatch.setattr(Inference, "_measure", lambda self, prompts: torch.full((3, len(prompts)), math.nan))
    run(recipe(tmp_path / "run", models, data, stage__dft__keep_best="eval.builtin.recognition"))
    assert evaluations(tmp_path / "run") == [(2, {}), (3, {})]
    said = capsys.readouterr()
    assert "1-dft: builtin could not be evaluated: model: " in said.out + said.err
    assert not (tmp_path / "run" / "1-dft-best").exists()


REFUSED = [
    ({"eval": {"tasks": []}}, r"stage\.dft\.eval\.tasks must name at least one benchmark"),
    ({"eval": {"tasks": ["sugarcrap"]}}, r"stage\.dft\.eval\.tasks must be benchmarks: there is no task 'sugarcrap'"),
    ({"eval": {"tasks": ["paper"]}}, r"stage\.dft\.eval\.data must name the folder of the files of vqav2"),
    ({"eval": {"tasks": ["builtin"], "every": 0}}, r"stage\.dft\.eval\.every must be at least 1, got 0"),
    (
        {"eval": {"tasks": ["builtin"]}, "keep_best": "eval.sugarcrepe.mean"},
        r"stage\.dft\.keep_best must be a metric of this stage \(eval\.builtin\.METRIC\), got 'eval\.sugarcrepe\.mean'",
    ),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_bad_keys(models, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        make_recipe(tmp_path, models, stages=["dft"], **{f"stage__dft__{key}": value for key, value in changes.items()})


def test_what_is_told_before_anything_is_trained(models, data, tmp_path):
    shutil.copytree(data, tmp_path / "data")
    shutil.rmtree(tmp_path / "data" / "sugarcrepe" / "images")
    for changes, message in (
        (
            {"stage__dft__keep_best": "eval.sugarcrepe.swap"},
            r"^stage\.dft\.keep_best must be a metric of the benchmark \(eval\.",
        ),
        ({"stage__dft__eval__data": str(tmp_path)}, r"^stage\.dft\.eval\.data: .* has no folder sugarcrepe"),
        (
            {"stage__dft__eval__data": str(tmp_path / "data")},
            r"^stage\.dft\.eval: sugarcrepe: none of its images is there .*; see images",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            run(recipe(tmp_path / "run", models, data, **changes))
        assert not (tmp_path / "run").exists()


def test_a_part_of_a_benchmark_is_spread_over_it_and_cuts_no_entry():
    rng = random.Random(0)
    for _ in range(200):
        sizes = [rng.randint(1, 4) for _ in range(rng.randint(1, 40))]
        questions = [Question(f"{i}/{j}", "", facts={"item": str(i)}) for i, n in enumerate(sizes) for j in range(n)]
        limit = rng.randint(1, len(questions) + 5)
        chosen = spread(questions, limit)
        entries = list(dict.fromkeys(int(q.facts["item"]) for q in chosen))
        assert chosen == [q for q in questions if int(q.facts["item"]) in entries]
        wanted = min(len(sizes), -(-limit * len(sizes) // len(questions)))
        gaps = {b - a for a, b in pairwise(entries)}
        assert len(entries) == wanted and entries[0] == 0 and (not gaps or max(gaps) - min(gaps) <= 1)
    drawn = [question.facts["subtype"] for question in prepare("builtin", limit=15).asked]
    assert len(drawn) == 15 and set(drawn) == {*RECOGNITION, *COMPOSITIONAL}
