"""The demo: three students from one base, what it says of them, and what it ships of runs with several seeds."""

import json
import statistics
from dataclasses import replace

import pytest
import torch
import yaml
from builtin_models import TOKENIZER, llava, shape, text_config
from pages import Page
from test_reproduce import Here
from transformers import Qwen2ForCausalLM

from benchmarks import demo_seeds
from cdistill import cli
from cdistill.builtin.scorer import FAMILIES
from cdistill.demo import demo as demos
from cdistill.demo.page import page
from cdistill.demo.result import DISTILLED, SEEDS, SFT, SHOWN, STUDENTS, UNALIGNED, Demo
from cdistill.demo.text import text
from cdistill.eval.builtin_task import Exam
from cdistill.models.load import load_for_evaluation, load_model, resolve_folder
from cdistill.reproduce import runs, schedule
from cdistill.train.recipes import load_recipe


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """The demo's recipe with random models of other sizes and two steps a stage."""
    folder = tmp_path_factory.mktemp("pair")
    torch.manual_seed(1)
    for name, model in (("teacher", llava(**shape(4))), ("base", Qwen2ForCausalLM(text_config(**shape(2, 32))))):
        model.save_pretrained(folder / name)
        TOKENIZER.save_pretrained(folder / name)
    stage = {"samples": 8, "global_batch_size": 4}
    models = {"teacher": str(folder / "teacher"), "student": {"base": str(folder / "base")}}
    changes = {"vat": {"measure_samples": 4}, "stage": dict.fromkeys(("dpt", "dft", "sft"), stage)}
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump({"extends": "demo-compodistill", "name": "tiny"} | models | changes))
    return path


@pytest.fixture
def here(pair, monkeypatch):
    """Runs in this process, few questions looked at, and results of seeds that lie beside the runs."""
    monkeypatch.setattr(schedule, "start_process", Here)
    monkeypatch.setattr(schedule, "POLL_SECONDS", 0.0)
    monkeypatch.setattr(Here, "started", [])
    monkeypatch.setattr(demos, "PAIR", str(pair))
    monkeypatch.setattr(demos, "LOOKED_AT", 14)
    return Here


def test_from_end_to_end(here, tmp_path, capsys):
    words = ["demo", "--output", str(tmp_path), "--n", "3", "--processes", "2", "stage.sft.samples=4"]
    assert cli.main(words) == 0
    assert len(here.started) == 3 and all(recipe.stage["sft"].samples == 4 for recipe in here.started)
    objectives = [[recipe.stage[name].objective for name in recipe.stages] for recipe in here.started]
    assert sorted(objectives) == [["dpt", "dft", "sft"], ["dpt", "dft", "sft"], ["pt", "sft", "sft"]]
    assert sorted((recipe.student.taf, recipe.vat.enabled) for recipe in here.started)[1:] == [
        (True, False),
        (True, True),
    ]
    printed = capsys.readouterr().out
    results = json.loads((tmp_path / "results.json").read_text())
    assert list(results["accuracy"]) == list(SHOWN)
    # numbers are those of the students that lie there
    exam = Exam(n=3, seed=runs.REPORTED)
    for recipe in here.started:
        (folder,) = {path.parent for path in tmp_path.glob("work/*/run") if str(path) == recipe.output}
        both = exam.evaluate_both(load_for_evaluation(str(folder / "run" / "3-sft"), "student"))
        name = SFT if not recipe.student.taf else DISTILLED if recipe.vat.enabled else UNALIGNED
        for family, way in (("recognition", "greedy"), ("compositional", "choice")):
            assert results["accuracy"][name][family] == pytest.approx(both[way][family], abs=1e-6)
            average = f"{100 * both[way][family]['avg']:.1f}"
            line = next(line for line in printed.split(f"\n{family}")[1].splitlines() if line.startswith("  avg"))
            assert average in line
    for name in ("sft", "kd-taf", "compodistill"):
        assert load_model(resolve_folder(str(tmp_path / name), "model")).config.image_seq_length == 36
    shown = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert all(reference.startswith(("data:", "#")) for reference in shown.references)
    assert not {"script", "link"} & set(shown.tags)
    # finished runs are used again
    before = (tmp_path / "results.json").read_text()
    assert cli.main(words) == 0 and len(here.started) == 3
    assert (tmp_path / "results.json").read_text() == before
    assert {record.status for record in runs.read_records(tmp_path).values()} == {"finished"}


def test_a_student_that_fails_ends_the_demo_in_one_line(here, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Here, "fails", {7: (1, "out of luck")})
    assert cli.main(["demo", "--output", str(tmp_path), "--n", "1", "seed=7"]) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("cdistill: error: demo: ") and line.endswith("failed: out of luck")
    assert not (tmp_path / "results.json").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--n", "0"], "--n must be at least 1, got 0"),
        (["--processes", "0"], "--processes must be at least 1, got 0"),
        (["stage.dft.sample=4"], "stage.dft.sample"),
        (["teacher=nowhere"], "nowhere"),
    ],
)
def test_impossible_demos_begin_nothing(here, tmp_path, capsys, words, message):
    assert cli.main(["demo", "--output", str(tmp_path / "out"), *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not (tmp_path / "out").exists() and not here.started


def test_what_is_shipped_of_seeds_is_what_the_results_say():
    """Also that the demo's recipe is the one that they were made with."""
    shipped = json.loads(SEEDS.read_text(encoding="utf-8"))
    assert shipped == demo_seeds.seeds()
    for model in STUDENTS:
        of = shipped["rows"][model]
        assert len(of["recognition"]) == len(of["compositional"]) >= 5
        assert len(shipped["curves"][model]) >= 3 and shipped["enough"][model]
    first = str(load_recipe("demo-compodistill").seed)
    assert first in shipped["rows"][DISTILLED]["compositional"]


@pytest.fixture(scope="module")
def found():
    """Numbers of no run."""
    accuracy = {
        model: {family: dict.fromkeys((*subtypes, "avg"), 0.9 - 0.1 * i) for family, subtypes in FAMILIES.items()}
        for i, model in enumerate(SHOWN)
    }
    curve = {"of": {"role": "teacher"}}
    entry = {"model": "teacher", "role": "teacher", "place": 0, "quantity": "visual", "layers": [0]}
    sets = [{"name": "set", "quantities": [entry | {"mean": [0.5], "low": [0.4], "high": [0.6]}], "averages": []}]
    similarity = {"teacher": {"name": "teacher", "layers": [0], "heads": 1}, "students": [], "sets": sets} | curve
    looks = {"similarity": similarity, "maps": similarity | {"words": None, "spans": [], "cases": []}}
    return Demo(None, accuracy, 300, looks, {"seed": 40, "versions": {"torch": "2"}})


@pytest.mark.parametrize(
    ("better", "spread", "words"),
    [(0.3, 0.01, "better than"), (-0.3, 0.01, "worse than"), (0.01, 0.2, "not beyond the spread")],
)
def test_the_headline_says_what_the_seeds_say(found, tmp_path, better, spread, words):
    values = [0.5, 0.5 + spread, 0.5 - spread]
    of = {
        model: {
            str(seed): 0.5 + (better + value - 0.5 if model == DISTILLED else 0.0) for seed, value in enumerate(values)
        }
        for model in STUDENTS
    }
    seeds = {
        "commands": {"curves": "command"},
        "rows": {model: {"recognition": of[model], "compositional": of[model]} for model in STUDENTS},
        "curves": {model: {"100": {"0": 0.5, "1": 0.6}, "200": {"0": 0.7, "1": 0.8}} for model in STUDENTS},
        "enough": {
            SFT: {"0": None, "1": None},
            UNALIGNED: {"0": 150.0, "1": None},
            DISTILLED: {"0": 100.0, "1": 200.0},
        },
    }
    shown = replace(found)
    shown.__dict__["seeds"] = seeds
    said = page(shown, tmp_path)
    Page(said)
    assert words in said.split("</h1>")[0]
    printed = text(shown)
    mean = 100 * statistics.fmean(of[DISTILLED].values())
    assert (
        f"{mean:.1f} [" in printed
        and "not reached (2 seeds)" in printed
        and "150 (150 to 150; 1 of 2 seeds)" in printed
    )
