"""`cdistill demo`: both students on recipes of its shape whose models are tiny, from the command to the report."""

import argparse
import json

import pytest
import torch
import yaml
from builtin_models import llava, text_config
from test_report import TOKENIZER, Page, shape
from transformers import Qwen2ForCausalLM

from cdistill import demo
from cdistill.analysis.comparison import DISTILLED, SFT
from cdistill.train import load_recipe


@pytest.fixture(scope="module")
def tiny_recipes(tmp_path_factory):
    """Recipes of the demo's shape whose models are random and whose stages take two steps."""
    folder = tmp_path_factory.mktemp("recipes")
    torch.manual_seed(1)
    for name, model in (("teacher", llava(**shape(4))), ("base", Qwen2ForCausalLM(text_config(**shape(2, 32))))):
        model.save_pretrained(folder / name)
        TOKENIZER.save_pretrained(folder / name)
    common = {"seed": 4, "output": str(folder / "unused"), "deepspeed": "off", "logging_steps": 1}
    stage = {"learning_rate": 1e-3, "global_batch_size": 4, "samples": 8}
    captions, turns = {"caption": 1.0}, {"turns": 2}
    base, teacher = str(folder / "base"), str(folder / "teacher")
    sft = {
        "name": "tiny-sft",
        "student": {"base": base, "vision": teacher},
        "stages": ["pt", "last"],
        "stage": {"pt": stage | {"data": captions}, "last": stage | {"objective": "sft", "data": turns}},
    }
    distilled = {
        "name": "tiny-compodistill",
        "teacher": teacher,
        "student": {"base": base, "taf": True},
        "stages": ["dpt", "dft"],
        "stage": {"dpt": stage | {"data": captions}, "dft": stage | {"data": turns}},
    }
    paths = {}
    for model, recipe in ((SFT, sft), (DISTILLED, distilled)):
        paths[model] = folder / f"{recipe['name']}.yaml"
        paths[model].write_text(yaml.safe_dump(common | recipe), encoding="utf-8")
    return paths


def run_demo(arguments):
    parser = argparse.ArgumentParser()
    demo.add_arguments(parser)
    return demo.main(parser.parse_args(list(map(str, arguments))))


def test_demo_from_end_to_end(tiny_recipes, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "RECIPES", tiny_recipes)
    monkeypatch.setattr(demo, "LOOKED_THROUGH", 2)
    monkeypatch.setattr(demo, "SIMILARITY_QUESTIONS", 1)
    output = tmp_path / "demo"

    def results(folder=output):
        content = json.loads((folder / "results.json").read_text())
        assert content["meta"].pop("seconds").keys() == {"training", "evaluation"}
        return content

    arguments = [
        "--seeds",
        2,
        "--n",
        5,
        "--output",
        output,
        "sft:stage.last.samples=4",
        "compodistill:stage.dft.samples=4",
    ]
    assert run_demo(arguments) == 0
    first = results()
    assert [entry["seed"] for entry in first["seeds"]] == [4, 5]
    assert first["meta"]["n"] == 5
    printed = capsys.readouterr().out
    assert "spread of the margin" in printed
    Page((output / "report.html").read_text(encoding="utf-8"))
    for seed in (4, 5):
        for model, last in ((SFT, "last"), (DISTILLED, "dft")):
            run = output / f"seed-{seed}" / model
            assert (run / "metrics.jsonl").is_file()
            assert yaml.safe_load((run / "recipe.yaml").read_text())["stage"][last]["samples"] == 4
    # the finished runs are used, and another recipe is not mixed with them
    assert run_demo(arguments) == 0
    assert results() == first
    with pytest.raises(ValueError, match="different run"):
        run_demo(arguments[:-2])
    # training repeats, whatever other seeds are trained beside it
    assert run_demo(["--n", 5, "--output", tmp_path / "again", *arguments[-2:], "seed=5"]) == 0
    assert results(tmp_path / "again")["seeds"] == first["seeds"][1:]


def test_overrides_reach_both_recipes_or_one(tiny_recipes, monkeypatch):
    monkeypatch.setattr(demo, "RECIPES", tiny_recipes)
    recipes = demo.demo_recipes(["seed=9", "sft:stage.last.learning_rate=0.5", "compodistill:vat.matching=simple"])
    assert [recipe.seed for recipe in recipes.values()] == [9, 9]
    assert recipes[SFT].stage["last"].learning_rate == 0.5
    assert recipes[DISTILLED].stage["dft"].learning_rate == 1e-3
    assert recipes[DISTILLED].vat.matching == "simple"
    with pytest.raises(ValueError, match="use --output"):
        demo.demo_recipes(["output=elsewhere"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sft:seed=5", "seed differs"),
        ("sft:stage.last.samples=16", "samples of the stages differs"),
        ("compodistill:stage.dft.global_batch_size=2", "global_batch_size of the stages differs"),
        ("sft:stage.pt.data.caption=0.5", "data of the stages differs"),
        ("sft:stages=[pt]", "number of stages differs"),
    ],
)
def test_students_that_differ_in_more_than_the_method_are_not_compared(tiny_recipes, monkeypatch, override, message):
    monkeypatch.setattr(demo, "RECIPES", tiny_recipes)
    with pytest.raises(ValueError, match=message):
        demo.demo_recipes([override])


def test_impossible_demos_are_refused_before_anything_is_written(tiny_recipes, monkeypatch, tmp_path):
    monkeypatch.setattr(demo, "RECIPES", tiny_recipes)
    for wrong in (["--seeds", 0], ["--n", 0], ["compodistill:teacher=nowhere", "--n", 5]):
        with pytest.raises(ValueError, match=r"must be at least 1|nowhere"):
            run_demo([*wrong, "--output", tmp_path / "demo"])
        assert not (tmp_path / "demo").exists()


def test_the_shipped_recipes_differ_in_the_method_alone():
    recipes = demo.demo_recipes()
    sft, distilled = recipes[SFT], recipes[DISTILLED]
    assert sft == load_recipe("demo-sft")
    assert distilled == load_recipe("demo-compodistill")
    assert sft.student.base == distilled.student.base
    assert sft.seed == distilled.seed
    for a, b in zip(sft.stages, distilled.stages, strict=True):
        one, other = sft.stage[a], distilled.stage[b]
        assert (one.samples, one.global_batch_size, one.data) == (other.samples, other.global_batch_size, other.data)
    assert distilled.student.taf
    assert distilled.vat.enabled
    assert {distilled.stage[s].objective for s in distilled.stages} == {"dpt", "dft", "sft"}
    assert {sft.stage[s].objective for s in sft.stages} == {"pt", "sft"}
    assert not sft.student.taf
