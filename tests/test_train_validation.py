"""Losses on held-out samples: right, of samples that are never trained on, and without a trace in the training."""

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from builtin_models import make_recipe
from test_train_files import files, recipe_of  # noqa: F401
from test_train_stages import Crash, metrics, same, weights

from cdistill.builtin.dataset import BuiltinDataset, Collator
from cdistill.builtin.task import BuiltinTask
from cdistill.data.mix import Mix, Order, Part
from cdistill.models.load import load_model
from cdistill.runtime import checkpoints
from cdistill.train import run
from cdistill.train.build import build_models
from cdistill.train.data import open_stage, open_validation
from cdistill.train.measuring import METRIC, VALUE, is_best
from cdistill.train.resolve import resolve

HELD_OUT = {"samples": 10, "every": 2}


def recipe(output, models, **changes):
    return make_recipe(
        output, models, **{"stages": ["dft"], "stage__dft__validation": HELD_OUT, "save_steps": 2} | changes
    )


def validations(output):
    return [(line["step"], line["validation"]) for line in metrics(output) if "validation" in line]


def logged(output):
    return [(line["step"], line["loss"]) for line in metrics(output) if "loss" in line]


@pytest.fixture(scope="module")
def measured(models, tmp_path_factory):
    """A run that is measured at steps 2 and 4 of 5 and at the end, and the folder of its result."""
    output = tmp_path_factory.mktemp("measured") / "run"
    return output, run(recipe(output, models, stage__dft__keep_best="validation.ar"))


def test_values_are_those_of_whole_logits_on_held_out_scenes(measured, models):
    output, final = measured
    steps = [step for step, _ in validations(output)]
    last = logged(output)[-1][0]
    assert steps == [step for step in range(1, last + 1) if step % 2 == 0 or step == last]
    student, teacher = load_model(final), load_model(models / "teacher")
    data = BuiltinDataset(BuiltinTask(turns=2), size=10, seed=0, held_out=True)
    batch = Collator(data.tokenizer.pad_token_id)([data[i] for i in range(10)])
    labels = batch.pop("labels")
    places = F.pad(labels[:, 1:] != -100, (0, 1))
    with torch.no_grad():
        p, q = (model(**batch).logits[places].double().log_softmax(-1) for model in (student, teacher))
    wanted = {
        "ar": F.nll_loss(p, labels[:, 1:][labels[:, 1:] != -100]).item(),
        "kd": F.kl_div(p, q, log_target=True, reduction="sum").item() / len(p),
    }
    found = validations(output)[-1][1]
    for name, value in wanted.items():
        assert found[name] == pytest.approx(value, rel=1e-4)
    assert 0 < found["vat"] < 2
    assert found["loss"] == pytest.approx(found["ar"] + found["kd"] + found["vat"])


def test_the_best_student_is_kept(measured, models):
    output, _ = measured
    values = {step: value["ar"] for step, value in validations(output)}
    manifest = json.loads((output / "1-dft-best" / "complete").read_text())
    assert manifest["metric"] == "validation.ar"
    assert values[manifest["step"]] == manifest["best"] == min(values.values())
    load_model(output / "1-dft-best")


def test_which_student_is_better(tmp_path):
    """A value that is not finite never is; one by another metric, after the recipe has changed, cannot be compared."""
    assert is_best(tmp_path / "none", "validation.ar", 3.0) and not is_best(
        tmp_path / "none", "validation.ar", math.nan
    )
    (tmp_path / "best").mkdir()
    checkpoints.seal(tmp_path / "best", step=2, **{METRIC: "validation.ar", VALUE: 1.0})
    for metric, value, better in (("ar", 0.5, True), ("ar", 1.0, False), ("ar", -math.inf, False), ("kd", 9.0, True)):
        assert is_best(tmp_path / "best", f"validation.{metric}", value) is better


def test_measuring_leaves_no_trace_in_the_training(measured, models, tmp_path):
    output, final = measured
    plain = run(make_recipe(tmp_path / "plain", models, stages=["dft"]))
    assert same(weights(plain), weights(final))
    assert logged(tmp_path / "plain") == logged(output)


def test_a_resumed_run_measures_the_same(measured, models, tmp_path):
    output, final = measured
    again = recipe(tmp_path / "cut", models, stage__dft__keep_best="validation.ar")
    with pytest.raises(KeyboardInterrupt):
        run(again, callbacks=[Crash(3)])
    resumed = run(again, resume=True)
    assert same(weights(resumed), weights(final))
    assert validations(tmp_path / "cut") == validations(output)
    assert same(weights(tmp_path / "cut" / "1-dft-best"), weights(output / "1-dft-best"))


def test_two_processes_measure_what_one_does(measured, models, ranks, tmp_path):
    """Ten samples in batches that the processes cannot share evenly, the model partitioned over them."""
    output, _ = measured
    changes = {"deepspeed": 3, "stage__dft__micro_batch_size": 2, "stage__dft__keep_best": "validation.ar"}
    ranks.call(run, recipe(tmp_path / "run", models, **changes), world=2)
    best = (json.loads((folder / "1-dft-best" / "complete").read_text()) for folder in (tmp_path / "run", output))
    assert len({manifest["step"] for manifest in best}) == 1
    load_model(tmp_path / "run" / "1-dft-best")
    for (step, ours), (wanted, theirs) in zip(validations(tmp_path / "run"), validations(output), strict=True):
        assert step == wanted and ours == pytest.approx(theirs, rel=1e-3)


class Numbers:
    """A source of samples that are their own numbers."""

    in_order = False

    def __init__(self, count):
        self.name, self._count = f"set of {count}", count

    def __len__(self):
        return self._count


def test_what_is_held_out_is_never_trained_on_and_the_rest_keeps_its_order():
    rng = np.random.default_rng(0)
    for seed in range(30):
        parts = []
        for _ in range(rng.integers(1, 4)):
            count = int(rng.integers(5, 30))
            parts.append(Part(Numbers(count), np.arange(count), float(rng.choice([0.5, 1.0, 1.3, 2.0]))))
        source = Mix(parts, name="mix")
        whole, count = Order(source, seed), int(rng.integers(1, 5))
        order = Order(source, seed, held_out=count)
        held_out = {order.held_out[i] for i in range(count)}
        assert len(held_out) == count
        numbers = range(3 * whole.epoch_size)
        kept = [i for i in (whole[n] for n in numbers) if i not in held_out]
        assert [order[n] for n in range(len(kept))] == kept
        if all(part.weight == 1.0 for part in parts):  # until the part that is held out would come
            assert [order[n] for n in range(whole.epoch_size - count)] == [
                whole[n] for n in range(whole.epoch_size - count)
            ]
        shuffled = Order(source, seed, held_out=count)
        for n in rng.permutation(len(kept))[:20]:
            assert shuffled[int(n)] == kept[n]
    with pytest.raises(ValueError, match="set of 5 has 5 samples, of which 5 cannot be held out: none would be left"):
        Order(Numbers(5), 0, held_out=5)


@pytest.mark.parametrize("packing", [False, True])
def test_files_hold_out_a_part_of_themselves(models, files, tmp_path, packing):  # noqa: F811
    """Bad samples in the part give way to others of it."""
    given = recipe_of(
        tmp_path / "run", models, files, stage__dft__validation={"samples": 6, "every": 100}, packing=packing
    )
    found = build_models(given)
    stage = resolve(given, world=1).stages[0]
    seen = []
    for data, _ in (open_stage(stage, found), open_validation(stage, found)):
        seen.append([tuple(data[i][0].input_ids.tolist()) for i in range(len(data))])
    assert len(seen[1]) == 6 and not set(seen[0]) & set(seen[1])
    run(given)
    ((step, values),) = validations(tmp_path / "run")
    assert step == logged(tmp_path / "run")[-1][0] and all(np.isfinite(list(values.values())))


REFUSED = [
    ({"validation": {"samples": 0}}, r"stage\.dft\.validation\.samples must be at least 1, got 0"),
    (
        {"keep_best": "validation.ar"},
        r"stage\.dft\.keep_best must be a metric of this stage \(none, as validation and eval are null\)",
    ),
    (
        {"keep_best": "validation.kl", "validation": {}},
        r"must be a metric of this stage \(validation\.loss, .*, validation\.vat\), got 'validation\.kl'",
    ),
]


def test_the_best_by_an_alignment_that_is_not_made(models, tmp_path):
    changes = {"stage__dft__validation": HELD_OUT, "stage__dft__keep_best": "validation.vat", "vat__enabled": False}
    with pytest.raises(ValueError, match=r"stage\.dft\.keep_best must not be validation\.vat without vat\.enabled"):
        make_recipe(tmp_path, models, stages=["dft"], **changes)


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_bad_keys(models, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        make_recipe(tmp_path, models, stages=["dft"], **{f"stage__dft__{key}": value for key, value in changes.items()})


def test_what_holds_nothing_out(models, files, tmp_path):  # noqa: F811
    options = {"stage__dft__validation": {"samples": 500}}
    with pytest.raises(
        ValueError,
        match=r"stage\.dft\.data: set has 22 samples, of which 500 cannot be held out.*; lower validation\.samples",
    ):
        run(recipe_of(tmp_path / "run", models, files, **options))
    assert not (tmp_path / "run").exists()
    for changes, message in (
        ({"data": {"streaming": True}}, r"stage\.dft\.validation must be null with data\.streaming"),
        ({"teacher_memory__cache": "kept"}, r"stage\.dft\.validation must be null with teacher_memory\.cache"),
    ):
        with pytest.raises(ValueError, match=message):
            recipe_of(tmp_path / "run", models, files, **options, **changes)
