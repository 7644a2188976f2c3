"""Runs whose heads are matched: assigned by measured distances, or mixed by weights that a stage trains."""

import json

import pytest
import torch
from builtin_models import make_recipe
from test_train_deepspeed import run_mixed
from test_train_stages import Crash, assert_near, metrics, weights

from cdistill.train import alignment, run

KEYS = {"stages": ["dft"], "vat__heads": "match", "vat__measure_samples": 8, "vat__loss": "mse"}


def recipe_of(output, models, matching, **changes):
    return make_recipe(output, models, **KEYS, vat__head_matching=matching, **changes)


def found(output):
    return [entry["vat"] for entry in metrics(output)], weights(output / "1-dft")


@pytest.mark.parametrize("matching", ["assignment", "mixture"])
def test_a_resumed_run_ends_with_the_same_bits_and_measures_nothing_again(models, tmp_path, monkeypatch, matching):
    run(recipe_of(tmp_path / "whole", models, matching, save_steps=2))
    with pytest.raises(KeyboardInterrupt):
        run(recipe_of(tmp_path / "cut", models, matching, save_steps=2), callbacks=[Crash(3)])
    monkeypatch.setattr(alignment, "_measured", None)
    run(recipe_of(tmp_path / "cut", models, matching, save_steps=2), resume=True)
    (values, whole), (again, cut) = found(tmp_path / "whole"), found(tmp_path / "cut")
    assert values == again and all(value > 0 for value in values)
    assert all(torch.equal(value, cut[name]) for name, value in whole.items())
    path = tmp_path / "whole" / alignment.MATCHES
    assert path.is_file() == (matching == "assignment")
    if matching == "assignment":
        (first, *_), *_ = (json.loads(path.read_text()).values(),)
        assert first[0]["student"] == 0 and len(first[0]["heads"]) == len(first[0]["teachers"]) == 3
        assert all(len({head for (head,) in groups}) == 2 for groups in first[0]["heads"])


@pytest.mark.parametrize(("matching", "zero", "train"), [("assignment", 2, run), ("mixture", 3, run_mixed)])
def test_two_processes_train_as_one_does(models, ranks, tmp_path, matching, zero, train):
    """Also where one of them has no images, whose mixture has nothing to do."""
    train(recipe_of(tmp_path / "one", models, matching))
    ranks.call(train, recipe_of(tmp_path / "two", models, matching, deepspeed=zero))
    (values, one), (ours, two) = found(tmp_path / "one"), found(tmp_path / "two")
    assert ours == pytest.approx(values, rel=2e-4)
    assert_near(two, one)
    files = [tmp_path / name / alignment.MATCHES for name in ("one", "two")]
    assert matching == "mixture" or files[0].read_text() == files[1].read_text()


def test_a_batch_without_images_trains_on_with_a_mixture(models, tmp_path):
    text = {"modality": "text", "turns": 1}
    run(recipe_of(tmp_path / "run", models, "mixture", stage__dft__data=text))
    assert found(tmp_path / "run")[0] == [0.0] * 3


def test_a_file_of_matches_that_says_nothing_is_refused(models, tmp_path):
    output = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        run(recipe_of(output, models, "assignment", save_steps=2), callbacks=[Crash(3)])
    (output / alignment.MATCHES).write_text('{"1-dft": [{"student": 0}]}')
    with pytest.raises(ValueError, match=r"^output: .*matches\.json does not hold matched layers .*or delete it$"):
        run(recipe_of(output, models, "assignment", save_steps=2), resume=True)


@pytest.mark.parametrize(
    ("matching", "changes", "message"),
    [
        (
            "group",
            {"vat__heads": "each"},
            r"^vat\.heads each needs equal head counts, got 2 and 4 for the teacher: use match$",
        ),
        (
            "mixture",
            {"vat__engine": "triton"},
            r"^vat\.engine must be sdpa with vat\.head_matching mixture, got triton$",
        ),
        (
            "assignment",
            {"teacher_memory__cache": "cache"},
            r"^vat\.head_matching must be group with teacher_memory\.cache",
        ),
    ],
)
def test_keys_that_do_not_go_together_are_refused(models, tmp_path, matching, changes, message):
    with pytest.raises(ValueError, match=message) as error:
        run(make_recipe(tmp_path / "run", models, **(KEYS | {"vat__head_matching": matching} | changes)))
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()
