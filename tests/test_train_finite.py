"""Steps whose loss or gradients are not finite change nothing, are counted, and end the run after too many in a row."""

import json

import pytest
import torch
from builtin_models import make_recipe
from test_train_stages import assert_near
from torch.utils.data import Subset
from transformers import TrainerCallback

from cdistill.models.load import load_model
from cdistill.runtime.errors import RunError
from cdistill.runtime.finite import FiniteAdamW, poisoned
from cdistill.train import prepare, run
from cdistill.train.trainer import DistillTrainer

STEPS, BATCH = 5, 4
SETTINGS = {"stages": ["dft"], "stage__dft__samples": STEPS * BATCH, "vat__loss": "mse"}
NAN, INF = float("nan"), float("inf")


def metrics(output):
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def weights(folder):
    return {name: p.detach().clone() for name, p in load_model(folder).named_parameters()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture
def spoil(monkeypatch):
    """Makes a loss (its value, or only its gradient) of a micro-batch in chosen steps not finite."""

    def spoil(steps, *, value=NAN, name="ar", micro_batch=0, gradient_only=False):
        compute_loss, calls = DistillTrainer.compute_loss, {}

        def compute(self, model, inputs, *args, **kwargs):
            step = self.state.global_step
            calls[self, step] = calls.get((self, step), -1) + 1
            if step not in steps or calls[self, step] != micro_batch:
                return compute_loss(self, model, inputs, *args, **kwargs)

            def spoilt(**batch):
                losses = model(**batch)
                bad = GradientOnly.apply(losses[name], value) if gradient_only else losses[name] + value
                return {**losses, name: bad}

            return compute_loss(self, spoilt, inputs, *args, **kwargs)

        monkeypatch.setattr(DistillTrainer, "compute_loss", compute)

    return spoil


class GradientOnly(torch.autograd.Function):
    """A loss as it is, with a gradient times a number."""

    @staticmethod
    def forward(ctx, loss, value):
        ctx.value = value
        return loss.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.value, None


class Keep(TrainerCallback):
    """Keeps the weights after some steps, and after which step the schedule is where."""

    def __init__(self):
        self.states = {}

    def on_step_end(self, args, state, control, model=None, **kwargs):
        student = getattr(model, "module", model).student
        self.states[state.global_step] = {n: p.detach().clone() for n, p in student.named_parameters()}


@pytest.fixture(scope="module")
def without(models, tmp_path_factory):
    """Weights after the steps of a run whose data lack the samples of some steps; later ones move up."""
    results = {}

    def trained(missing, **changes):
        key = (missing, *changes.items())
        if key not in results:
            kept = [i for step in range(STEPS) if step not in missing for i in range(step * BATCH, (step + 1) * BATCH)]
            kept += range(BATCH * len(missing))  # the steps at the end, whose result is not looked at
            keep, patch = Keep(), pytest.MonkeyPatch()
            original = prepare.open_stage

            def stage_dataset(*args):
                dataset, collator = original(*args)
                return Subset(dataset, kept), collator

            patch.setattr(prepare, "open_stage", stage_dataset)
            run(
                make_recipe(tmp_path_factory.mktemp("without") / "run", models, **SETTINGS, **changes), callbacks=[keep]
            )
            patch.undo()
            results[key] = keep.states
        return results[key]

    return trained


@pytest.mark.parametrize("zero", ["off", 0, 1, 2, 3])
def test_training_goes_on_as_if_the_batch_had_not_been_there(models, tmp_path, spoil, without, zero):
    changes = {"deepspeed": zero}
    expected = without((1, 2), **changes)
    spoil({1, 2})
    keep = Keep()
    final = run(make_recipe(tmp_path / "run", models, **SETTINGS, **changes), callbacks=[keep])
    if zero != 3:  # its parameters are shards during training
        assert same(keep.states[1], keep.states[3]) and same(keep.states[5], expected[3])
        assert same(weights(final), {n: expected[3][n] for n in weights(final)})
    entries = metrics(tmp_path / "run")
    assert [e["skipped"] for e in entries] == [0, 1, 2, 2, 2]
    assert [e["loss"] is None for e in entries] == [False, True, True, False, False]
    rates = [e["learning_rate"] for e in entries]
    assert rates[1] == rates[2] == rates[3] and rates[4] < rates[3]  # the schedule has stood still


def test_zero_3_skips_what_plain_training_skips(models, tmp_path, spoil):
    spoil({1, 2})
    finals = [run(make_recipe(tmp_path / str(z), models, **SETTINGS, deepspeed=z)) for z in ("off", 3)]
    assert_near(*map(weights, finals))


@pytest.mark.parametrize("zero", ["off", 2])
@pytest.mark.parametrize(
    "how",
    [{"value": INF}, {"value": NAN, "gradient_only": True}, {"value": INF, "gradient_only": True}, {"name": "vat"}],
    ids=["infinite loss", "NaN in gradients", "infinity in gradients", "another loss"],
)
def test_whatever_is_not_finite(models, tmp_path, spoil, without, zero, how):
    expected = without((3,), deepspeed=zero)
    spoil({3}, **how)
    final = run(make_recipe(tmp_path / "run", models, **SETTINGS, deepspeed=zero))
    assert same(weights(final), {n: expected[4][n] for n in weights(final)})
    assert metrics(tmp_path / "run")[-1]["skipped"] == 1


@pytest.mark.parametrize("changes", [{"deepspeed": "off"}, {"deepspeed": 2}, {"deepspeed": 2, "precision": "bf16"}])
def test_one_bad_micro_batch_skips_its_whole_step(models, tmp_path, spoil, without, changes):
    changes = {**changes, "stage__dft__micro_batch_size": 2}
    expected = without((1,), **changes)
    keep = Keep()
    for micro_batch in (0, 1):
        spoil({1}, micro_batch=micro_batch)
        output = tmp_path / str(micro_batch)
        run(make_recipe(output, models, **SETTINGS, **changes), callbacks=[keep])
        assert same(keep.states[5], expected[4])
        assert metrics(output)[-1]["skipped"] == 1


def test_logged_means_are_of_the_other_steps(models, tmp_path, spoil, capsys):
    run(make_recipe(tmp_path / "each", models, **SETTINGS))
    spoil({4})
    run(make_recipe(tmp_path / "pairs", models, **SETTINGS, logging_steps=5))
    each, (entry,) = metrics(tmp_path / "each"), metrics(tmp_path / "pairs")
    for name in ("loss", "ar", "kd", "vat"):
        assert entry[name] == pytest.approx(sum(e[name] for e in each[:4]) / 4, rel=1e-5)
    assert ", 1 steps skipped (not finite) -> " in capsys.readouterr().out


@pytest.mark.parametrize("zero", ["off", 2])
@pytest.mark.parametrize(
    ("how", "culprit"),
    [({}, "loss ar is"), ({"name": "kd", "value": INF}, "loss kd is"), ({"gradient_only": True}, "its gradients are")],
)
def test_too_many_in_a_row_end_the_run(models, tmp_path, spoil, zero, how, culprit):
    recipe = make_recipe(tmp_path / "run", models, **SETTINGS, deepspeed=zero, max_nonfinite_steps=2, save_steps=1)
    spoil({1, 3, 4}, **how)
    with pytest.raises(RunError) as error:
        run(recipe)
    message = f"1-dft, step 5: {culprit} not finite, and 2 steps in a row had to be skipped (max_nonfinite_steps)"
    assert str(error.value).startswith(message) and "\n" not in str(error.value)
    folder = tmp_path / "run" / "checkpoints" / "1-dft"
    assert sorted(p.name for p in folder.iterdir()) == ["checkpoint-3", "checkpoint-4"]


def test_counters_survive_a_resume(models, tmp_path, spoil):
    recipe = make_recipe(tmp_path / "run", models, **SETTINGS, max_nonfinite_steps=3, save_steps=1, logging_steps=5)
    whole = make_recipe(tmp_path / "whole", models, **SETTINGS, max_nonfinite_steps=3, logging_steps=5)
    spoil({1, 2})

    class Crash(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 4:
                raise KeyboardInterrupt

    run(whole)
    with pytest.raises(KeyboardInterrupt):
        run(recipe, callbacks=[Crash()])  # goes on after step 3, in which two had been skipped
    spoil({3})
    with pytest.raises(RunError, match=r"step 4: .* and 3 steps in a row"):
        run(recipe, resume=True)


def test_a_resumed_run_logs_what_the_whole_one_does(models, tmp_path, spoil):
    def recipe(name):
        return make_recipe(tmp_path / name, models, **SETTINGS, save_steps=1, logging_steps=5)

    class Crash(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 4:
                raise KeyboardInterrupt

    spoil({1})
    final = run(recipe("whole"))
    with pytest.raises(KeyboardInterrupt):
        run(recipe("cut"), callbacks=[Crash()])
    assert same(weights(final), weights(run(recipe("cut"), resume=True)))
    (a,), (b,) = metrics(tmp_path / "whole"), metrics(tmp_path / "cut")
    assert {n: a[n] for n in ("loss", "ar", "kd", "vat", "skipped")} == {
        n: b[n] for n in ("loss", "ar", "kd", "vat", "skipped")
    }
    assert a["skipped"] == 1


def test_poisoned_is_the_identity_of_finite_losses():
    for value in (3.0, -0.0, 1e-42, 3e38):
        loss = torch.tensor(value, requires_grad=True)
        result = poisoned(loss)
        result.backward()
        assert torch.equal(result, loss) and loss.grad == 1
    for value in (NAN, INF, -INF):
        loss = torch.tensor(value, requires_grad=True)
        poisoned(loss).backward()
        assert not torch.isfinite(loss.grad)


def test_adamw_of_zero_0_looks_at_every_gradient():
    parameters = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    optimizer = FiniteAdamW(parameters, lr=0.1)
    for bad in (NAN, INF):
        for parameter, grad in zip(parameters, (1.0, bad), strict=True):
            parameter.grad = torch.tensor([1.0, grad, 1.0])
        optimizer.step()
        assert optimizer.overflow and not optimizer.state and all(torch.equal(p, torch.ones(3)) for p in parameters)
    for parameter in parameters:
        parameter.grad = torch.ones(3)
    optimizer.step()
    assert not optimizer.overflow and not torch.equal(parameters[0], torch.ones(3))
