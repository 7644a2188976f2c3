"""What may change of a recipe whose run has failed, been cut off or not begun, and what may not."""

import shutil

import pytest
from builtin_models import make_recipe
from test_train_stages import Crash, metrics, refused, same, weights
from transformers import TrainerCallback

from cdistill import files
from cdistill.data.strict_yaml import dump
from cdistill.train import run, run_folder
from cdistill.train.recipes import recipe_to_dict


class FailsAtOnce(TrainerCallback):
    """Ends a run where its first batch would be read, as a data set does that holds nothing it can use."""

    def __init__(self, stage):
        self.stage = stage

    def on_step_begin(self, args, state, control, **kwargs):
        if self.stage in args.output_dir:
            raise KeyboardInterrupt


def cut(recipe, callback, **options):
    with pytest.raises(KeyboardInterrupt):
        run(recipe, callbacks=[callback], **options)


def logged(output):
    return [(entry["stage"], entry["step"], entry["loss"]) for entry in metrics(output)]


@pytest.mark.parametrize("resume", [False, True])
def test_a_run_that_failed_before_its_first_step_leaves_its_folder_to_another(models, tmp_path, capsys, resume):
    output = tmp_path / "run"
    cut(make_recipe(output, models, stages=["dpt", "dft"]), FailsAtOnce("1-dpt"))
    assert (output / "recipe.yaml").is_file()
    changes = {"stages": ["dft"], "seed": 3, "kd__weight": 0.5, "stage__dft__data": {"turns": 1}}
    final = run(make_recipe(output, models, **changes), resume=resume)
    assert (
        'goes on with a changed recipe: stages differs (["dpt", "dft"] there, ["dft"] here)' in capsys.readouterr().out
    )
    assert same(weights(final), weights(run(make_recipe(tmp_path / "fresh", models, **changes))))
    assert logged(output) == logged(tmp_path / "fresh")
    refused(make_recipe(output, models, **changes), output, "already holds a run of this recipe")


def test_stages_that_have_not_begun_may_change(models, tmp_path):
    output, stages = tmp_path / "run", ["dpt", "dft"]
    cut(make_recipe(output, models, stages=stages, save_steps=1), FailsAtOnce("2-dft"))
    for changes in ({"stage__dpt__learning_rate": 0.5}, {"vat__weight": 2.0}, {"stages": ["dft"]}, {"seed": 1}):
        refused(make_recipe(output, models, **({"stages": stages} | changes)), output, "different run", resume=True)
    refused(make_recipe(output, models, stages=["dpt", "sft"]), output, "already holds a run")
    later = {"stages": ["dpt", "sft", "dft"], "stage__sft__data": {"turns": 1}, "stage__dft__learning_rate": 2e-3}
    final = run(make_recipe(output, models, **later), resume=True)
    assert final == output / "3-dft"
    assert same(weights(final), weights(run(make_recipe(tmp_path / "fresh", models, **later))))
    shutil.rmtree(output / "3-dft")  # its logged steps are there still
    other = make_recipe(output, models, **(later | {"stage__dft__learning_rate": 3e-3}))
    refused(other, output, r"stage\.dft\.learning_rate differs \(0\.002 there, 0\.003 here\); choose", resume=True)


def test_keys_that_change_no_result_may_change_within_a_stage(models, tmp_path):
    whole = run(make_recipe(tmp_path / "whole", models, stages=["dft"], vat__loss="mse"))
    output = tmp_path / "run"
    cut(make_recipe(output, models, stages=["dft"], vat__loss="mse", save_steps=2, logging_steps=3), Crash(3))
    changes = {"save_steps": 1, "logging_steps": 1, "log_layers": True, "max_nonfinite_steps": 3, "name": "other"}
    changes |= {"workers": 1, "max_bad_samples": 1, "stage__sft__samples": 16}
    final = run(make_recipe(output, models, stages=["dft"], vat__loss="mse", **changes), resume=True)
    assert same(weights(final), weights(whole))
    assert [step for _, step, _ in logged(output)] == [3]
    assert run_folder.begun_stages(make_recipe(output, models, stages=["dft"]), output) == 1


def test_what_differs_is_named_with_both_values(models, tmp_path):
    output = tmp_path / "run"
    run(make_recipe(output, models, stages=["dft"]))
    changes = {"stage__dft__data": {"turns": 2, "caption": 0.5}, "precision": "fp32", "teacher": "t" * 200}
    message = (
        rf"^output {output} holds a different run: stage\.dft\.data\.caption differs \(0\.0 there, 0\.5 here\), "
        r'precision differs \("auto" there, "fp32" here\), '
        r'teacher differs \("[^ ]+" there, "t{76}\.\.\. here\); choose another folder'
    )
    refused(make_recipe(output, models, stages=["dft"], **changes), output, message, resume=True)
    many = {"seed": 9, "packing": False, "compile": True, "precision": "fp32", "kd__beta": 0.1, "kd__weight": 0.1}
    refused(make_recipe(output, models, stages=["dft"], **many), output, r"and 1 more; choose", resume=True)


def test_one_run_at_a_time_has_a_folder(models, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "WAIT_SECONDS", 0.0)
    recipe, told = make_recipe(tmp_path / "run", models, stages=["dpt"]), []

    class Second(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            for resume in (False, True):
                with pytest.raises(
                    ValueError, match=r"is in use by another run \(process \d+ on .*\): wait for its end"
                ) as error:
                    run(recipe, resume=resume)
                told.append(str(error.value))

    final = run(recipe, callbacks=[Second()])
    assert len(told) == 6 and final.is_dir()
    assert run(recipe, resume=True) == final, "it has been let go"


@pytest.mark.parametrize(
    "content", [b"", b"- a", b"\xff", b"a: [", b"name: x", lambda whole: whole[: whole.index(b"  dft:")]]
)
def test_a_recorded_recipe_that_is_damaged_is_named(models, tmp_path, content):
    recipe = make_recipe(tmp_path / "run", models, stages=["dft"])
    path, whole = tmp_path / "run" / "recipe.yaml", dump(recipe_to_dict(recipe)).encode()
    path.parent.mkdir()
    path.write_bytes(content if isinstance(content, bytes) else content(whole))
    message = rf"^output: {path} is not a recipe \([^\n]+\): put it back, or choose another folder$"
    for resume in (False, True):
        with pytest.raises(ValueError, match=message):
            run_folder.check_output(recipe, tmp_path / "run", resume)
