"""Runs are killed, stopped and damaged in many ways; resumed, they end with the bits of a run that nothing happened to."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from builtin_models import recipe_values
from forks import ROOT
from survive_runs import command as run_command

from cdistill.runtime import checkpoints
from cdistill.runtime.signals import stop_on_signals
from cdistill.train import run_folder
from cdistill.train.recipes import recipe_from_dict

STAGES = ("1-dpt", "2-dft")
ENGINES = {"plain": ("off", 1), "plainx2": ("off", 2), "zero2": (2, 1), "zero2x2": (2, 2), "zero3x2": (3, 2)}


class Run:
    """One output folder and its recipe; stage dpt has 3 steps, dft 4."""

    def __init__(self, folder, models, engine, **changes):
        self.output, self.path = folder / "run", folder / "recipe.yaml"
        zero, self.processes = ENGINES[engine]
        values = {"stages": ["dpt", "dft"], "stage__dft__samples": 16, "save_steps": 1, "vat__loss": "mse"}
        content = recipe_values(self.output, models, deepspeed=zero, **(values | changes))
        folder.mkdir(parents=True, exist_ok=True)
        self.path.write_text(yaml.safe_dump(content))

    def train(self, *options, plan=None):
        options = [f"processes={self.processes}", *options]
        return run_command("train", self.path, *options, plan=plan)

    def resume(self, plan=None):
        return self.train("--resume", plan=plan)

    def checkpoints(self, stage="2-dft"):
        return sorted(path.name for path in (self.output / "checkpoints" / stage).glob("*"))

    def result(self):
        """The bytes of both stages' weights and all that was logged but times."""
        weights = [(self.output / stage / "model.safetensors").read_bytes() for stage in STAGES]
        entries = [json.loads(line) for line in (self.output / "metrics.jsonl").read_text().splitlines()]
        times = ("samples_per_s", "tokens_per_s", "elapsed_s", "memory_mb")
        return weights, [{k: v for k, v in entry.items() if k not in times} for entry in entries]


@pytest.fixture(scope="module")
def new_run(models, tmp_path_factory):
    return lambda engine="plain", **changes: Run(tmp_path_factory.mktemp("run"), models, engine, **changes)


@pytest.fixture(scope="module")
def undisturbed(new_run):
    """Results of runs that nothing happens to, by engine and changes; each is made once, with a save in every step."""
    results = {}

    def result(engine, save_steps=1, **changes):
        key = (engine, *sorted(changes.items()))
        if key not in results:
            run = new_run(engine, **changes)
            code, text = run.train()
            assert code == 0, text
            results[key] = run.result()
        return results[key]

    return result


def assert_ends_like(run, expected, text=""):
    weights, logged = run.result()
    assert logged == expected[1], text
    assert weights == expected[0], text
    left = {path.name for path in run.output.iterdir()}
    assert left == {*STAGES, "recipe.yaml", "metrics.jsonl", "tensorboard"}


KILLS = {
    "before the recipe has its name": ({"call": "os.replace", "match": "recipe.yaml"}, None),
    "in the first step": ({"step": ["1-dpt", 1]}, None),
    "in a file of the first checkpoint": ({"call": "torch.save", "half": True}, None),
    "in a file of a later checkpoint": ({"call": "torch.save", "match": "2-dft/checkpoint-3", "half": True}, 2),
    "in a file of its end": ({"call": "torch.save", "match": "2-dft/checkpoint-3", "nth": 5, "half": True}, 2),
    "before the manifest": ({"call": "os.replace", "match": "2-dft/checkpoint-3/complete"}, 2),
    "in the removal of an old one": ({"call": "shutil.rmtree", "match": "2-dft/checkpoint-1", "half": True}, 3),
    "before a save": ({"step": ["2-dft", 3]}, 2),
    "in the result of a stage": (
        {"call": "transformers.modeling_utils.safe_save_file", "match": ".1-dpt.cdistill-", "half": True},
        3,
    ),
    "before the result has its name": ({"call": "os.replace", "match": ".2-dft.cdistill-"}, 4),
    "in the removal of all checkpoints": ({"call": "shutil.rmtree", "match": "/checkpoints'", "half": True}, None),
    "in the last removal": ({"call": "shutil.rmtree", "match": "/checkpoints'", "nth": 2, "half": True}, None),
    "between stages": ({"call": "cdistill.train.stages.load_model", "match": "1-dpt"}, None),
}


@pytest.mark.parametrize("point", KILLS)
def test_a_killed_run_goes_on_from_its_last_complete_checkpoint(new_run, undisturbed, point):
    plan, step = KILLS[point]
    run = new_run()
    code, text = run.train(plan=plan)
    assert code == -signal.SIGKILL, text
    code, text = run.resume()
    assert code == 0, text
    assert re.findall(r"from step (\d+)", text) == ([] if step is None else [str(step)])
    assert "damaged" not in text
    assert_ends_like(run, undisturbed("plain"), text)


@pytest.mark.parametrize("engine", ["zero2", "plainx2", "zero2x2", "zero3x2"])
def test_other_engines_killed_in_a_save(new_run, undisturbed, engine):
    several = ENGINES[engine][1] > 1
    run = new_run(engine)
    plan = {"call": "torch.save", "match": "2-dft/checkpoint-3", "half": True, "rank": 1 if several else 0}
    code, text = run.train(plan=plan)
    if several:
        assert code == 1 and "cdistill: error: process 1 of 2 was killed by SIGKILL; the others are stopped" in text
    else:
        assert code == -signal.SIGKILL, text
    code, text = run.resume()
    assert code == 0 and ", from step 2" in text, text
    assert_ends_like(run, undisturbed(engine), text)


def test_killed_again_and_again_at_random_moments(new_run, undisturbed):
    seed = random.randrange(10**6)
    draw = random.Random(seed)
    run, kills = new_run(), 0
    options = ()
    for _ in range(5):
        code, text = run.train(*options, plan={"seconds": draw.uniform(0.05, 0.5)})
        assert code in (0, -signal.SIGKILL), (seed, text)
        kills += code != 0
        options = ("--resume",) if (run.output / "recipe.yaml").exists() else ()
    code, text = run.train(*options)
    assert code == 0 and kills, (seed, text)
    assert_ends_like(run, undisturbed("plain"), f"seed {seed}: {text}")


def test_ranks_do_not_outlive_the_process_that_started_them(new_run, undisturbed):
    run = new_run("zero2x2")
    code, _ = run.train(plan={"seconds": 1.0, "rank": -1})
    assert code == -signal.SIGKILL
    code, text = run.resume() if (run.output / "recipe.yaml").exists() else run.train()
    assert code == 0, text
    assert_ends_like(run, undisturbed("zero2x2"), text)


# --- damaged checkpoints ---


def largest(folder):
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "missing": (lambda folder: largest(folder).unlink(), r"\S+ is missing"),
    "truncated": (lambda folder: os.truncate(largest(folder), 1000), r"\S+ has 1,000 of [\d,]+ bytes"),
    "flipped": (lambda folder: flip(largest(folder)), r"\S+ has changed"),
    "marker": (lambda folder: flip(folder / "complete"), r"its manifest, the file complete, cannot be read"),
    "empty marker": (lambda folder: os.truncate(folder / "complete", 0), r"its manifest, .* cannot be read"),
}


@pytest.fixture(scope="module")
def stopped(new_run):
    """A run stopped in its second stage, with checkpoints after steps 2 and 3."""
    run = new_run()
    code, text = run.train(plan={"step": ["2-dft", 3], "signal": "SIGTERM"})
    assert code == 143, text
    assert run.checkpoints() == ["checkpoint-2", "checkpoint-3"]
    return run


def copy_of(run, new_run, engine="plain"):
    copy = new_run(engine)
    shutil.copytree(run.output, copy.output)
    return copy


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_checkpoint_is_skipped_with_a_line(new_run, undisturbed, stopped, kind):
    harm, reason = DAMAGES[kind]
    run = copy_of(stopped, new_run)
    if kind == "marker":  # a bit of the structure, not one of a number, which would be a wrong checksum
        marker = run.output / "checkpoints" / "2-dft" / "checkpoint-3" / "complete"
        marker.write_text(marker.read_text()[:-4])
    else:
        harm(run.output / "checkpoints" / "2-dft" / "checkpoint-3")
    code, text = run.resume()
    assert code == 0, text
    lines = [line for line in text.splitlines() if "damaged" in line]
    assert len(lines) == 1 and re.fullmatch(rf"\S+/2-dft/checkpoint-3 is damaged and skipped: {reason}", lines[0])
    assert "from step 2" in text
    assert_ends_like(run, undisturbed("plain"))


def test_with_all_checkpoints_damaged_the_stage_starts_again(new_run, undisturbed, stopped):
    run = copy_of(stopped, new_run)
    for name in run.checkpoints():
        flip(largest(run.output / "checkpoints" / "2-dft" / name))
    code, text = run.resume()
    assert code == 0 and text.count("is damaged and skipped") == 2 and "from step" not in text
    assert_ends_like(run, undisturbed("plain"))


def test_several_processes_agree_on_the_checkpoint(new_run, undisturbed):
    run = new_run("zero2x2")
    code, text = run.train(plan={"step": ["2-dft", 3], "signal": "SIGTERM", "rank": 1})
    assert code == 143, text
    flip(next((run.output / "checkpoints" / "2-dft" / "checkpoint-3").rglob("*pp_rank_1_*")))
    code, text = run.resume()
    assert code == 0 and text.count("checkpoint-3 is damaged and skipped") == 1 and "from step 2" in text, text
    assert_ends_like(run, undisturbed("zero2x2"))


def test_a_checkpoint_of_another_number_of_processes_is_refused(stopped, new_run):
    run = copy_of(stopped, new_run)
    folder = run.output / "checkpoints" / "2-dft"
    with pytest.raises(ValueError, match=r"checkpoint-3 was written by 1 processes and this run has 4: resume with 1"):
        checkpoints.choose(folder, processes=4)


def test_a_checkpoint_is_partial_from_the_start_of_its_removal(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    checkpoints.seal(tmp_path)
    monkeypatch.setattr(shutil, "rmtree", lambda folder: None)
    checkpoints.remove(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_the_last_good_checkpoint_stays_until_the_new_one_is_complete(tmp_path):
    for step in (1, 2, 3):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "file").write_bytes(b"x" * 10)
        if step < 3:
            checkpoints.seal(folder, step=step, processes=1)
    checkpoints.rotate(tmp_path)  # 3 is partial
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-1", "checkpoint-2"]
    (tmp_path / "checkpoint-1" / "complete").unlink()
    assert checkpoints.choose(tmp_path, processes=1) == tmp_path / "checkpoint-2"
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-2"], "partial ones are removed"


# --- stages that are missing or damaged ---


def refused(run, message):
    before = {p: p.stat().st_mtime_ns for p in run.output.rglob("*")}
    code, text = run.resume()
    assert code == 2, text
    errors = [line for line in text.splitlines() if line.startswith("cdistill: error:")]
    assert len(errors) == 1 and re.search(message, errors[0]), text
    assert {p: p.stat().st_mtime_ns for p in run.output.rglob("*")} == before


def test_a_stage_that_later_ones_went_on_from_must_be_there(new_run, stopped):
    run = copy_of(stopped, new_run)
    flip(run.output / "1-dpt" / "model.safetensors")
    refused(run, r"output: \S+/1-dpt is damaged \(model.safetensors has changed\)")
    shutil.rmtree(run.output / "1-dpt")
    refused(run, r"output: \S+/1-dpt is missing, but 2-dft, which went on from it, has begun.*delete 2-dft in")
    shutil.rmtree(run.output / "checkpoints")
    (run.output / "2-dft").mkdir()
    refused(run, r"output: \S+/1-dpt is missing, but 2-dft, which went on from it, has begun")


# --- signals ---


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGINT", 130)])
def test_a_signal_saves_and_stops(new_run, undisturbed, name, code):
    changes = {"save_steps": 0, "logging_steps": 2}  # the second logging interval goes on across the stop
    run = new_run(**changes)
    got, text = run.train(plan={"step": ["2-dft", 3], "signal": name})
    assert got == code, text
    line = f"2-dft: saved after step 3 of 4 in {run.output}/checkpoints/2-dft/checkpoint-3 and stopped by {name}"
    assert text.count(line) == 1 and "error" not in text
    assert run.checkpoints() == ["checkpoint-3"]
    got, text = run.resume()
    assert got == 0 and "from step 3" in text
    assert_ends_like(run, undisturbed("plain", **changes))


def test_a_signal_in_the_last_step_of_a_stage_stops_after_it(new_run, undisturbed):
    run = new_run(save_steps=0)
    code, text = run.train(plan={"step": ["1-dpt", 3], "signal": "SIGTERM"})
    assert code == 143 and "1-dpt: done, and stopped by SIGTERM; go on with --resume" in text
    assert not (run.output / "checkpoints").exists()
    code, text = run.resume()
    assert code == 0
    assert_ends_like(run, undisturbed("plain", save_steps=0))


def test_a_signal_to_one_rank_stops_all_in_the_same_step(new_run, undisturbed):
    run = new_run("plainx2", save_steps=0)
    code, text = run.train(plan={"step": ["2-dft", 2], "signal": "SIGTERM", "rank": 1})
    assert code == 143 and text.count("saved after step 2 of 4") == 1 and "error" not in text, text
    assert run.resume()[0] == 0
    assert_ends_like(run, undisturbed("plainx2", save_steps=0))


def test_a_signal_to_the_starting_process_stops_its_ranks(new_run, undisturbed):
    run = new_run("zero2x2", save_steps=0, stage__dpt__samples=4000)
    code, text = run.train(plan={"seconds": 3.0, "signal": "SIGINT", "rank": -1})
    assert code == 130 and len(re.findall(r"1-dpt: saved after step \d+ of 1,000 in", text)) == 1, text
    assert "error" not in text


def test_a_second_signal_acts_at_once():
    pid = os.fork()
    if not pid:
        with stop_on_signals() as request:
            for _ in range(2):  # the same Ctrl-C, passed on twice
                os.kill(os.getpid(), signal.SIGTERM)
            if request.received != signal.SIGTERM:
                os._exit(1)
            time.sleep(0.6)
            os.kill(os.getpid(), signal.SIGTERM)
        os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGTERM


def test_the_command_itself(new_run, undisturbed):
    """A process started as users do, stopped from outside."""
    run = new_run(save_steps=0, stage__dpt__samples=40000)
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "cdistill", "train", str(run.path)]
    process = subprocess.Popen(
        command, cwd=ROOT, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    metrics = run.output / "metrics.jsonl"
    while process.poll() is None and not (metrics.is_file() and metrics.read_text()):
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 143, errors
    step = int(re.search(r"1-dpt: saved after step ([\d,]+) of 10,000", output)[1].replace(",", ""))
    assert [json.loads(line)["step"] for line in metrics.read_text().splitlines()] == list(range(1, step + 1))
    assert run.checkpoints("1-dpt") == [f"checkpoint-{step}"]
    code, text = run.resume(plan={"step": ["1-dpt", step + 1], "signal": "SIGTERM"})
    assert code == 143 and f"from step {step}\n" in text


# --- steps that are not finite ---


@pytest.mark.parametrize("engine", ["plainx2", "zero2x2"])
def test_a_loss_that_is_not_finite_on_one_rank_skips_the_step_on_all(new_run, engine):
    results = []
    for rank in ({}, {"rank": 1}):
        run = new_run(engine)
        code, text = run.train(plan={"spoil": ["1-dpt", 1], **rank})
        assert code == 0 and "1-dpt: done" in text and text.count("1 steps skipped") == 1, text
        results.append(run.result())
    assert results[0] == results[1]
    assert [entry["skipped"] for entry in results[0][1]] == [0, 1, 1, 0, 0, 0, 0]


# --- full disks ---


def test_a_full_disk_leaves_the_last_checkpoint(new_run, undisturbed):
    run = new_run()
    code, text = run.train(plan={"step": ["2-dft", 3], "bytes": 60_000})
    assert code == 1, text
    error = r"cdistill: error: \S+/2-dft/checkpoint-3 could not be saved .* needs about [\d.]+ MB, [\d,.]+ MB are free"
    assert len(re.findall(error, text)) == 1 and "Traceback" not in text, text
    assert run.checkpoints() == ["checkpoint-1", "checkpoint-2"]
    code, text = run.resume()
    assert code == 0 and "from step 2" in text
    assert_ends_like(run, undisturbed("plain"))


def test_a_full_disk_at_the_end_of_a_stage(new_run, undisturbed):
    run = new_run(save_steps=0)
    code, text = run.train(plan={"step": ["1-dpt", 3], "bytes": 60_000})
    assert code == 1 and re.search(r"error: \S+/1-dpt could not be saved", text) and "Traceback" not in text, text
    assert not (run.output / "1-dpt").exists()
    code, text = run.resume()
    assert code == 0
    assert_ends_like(run, undisturbed("plain", save_steps=0))


def test_a_full_disk_of_one_rank(new_run, undisturbed):
    run = new_run("zero2x2")
    code, text = run.train(plan={"step": ["2-dft", 3], "bytes": 30_000, "rank": 1})
    assert code == 1 and re.search(r"error: \S+/2-dft/checkpoint-3 could not be saved", text), text
    assert "cdistill: error: process 1 of 2 failed with exit code 1; its message is above" in text
    assert "Traceback" not in text
    code, text = run.resume()
    assert code == 0 and "from step 2" in text
    assert_ends_like(run, undisturbed("zero2x2"))


def test_a_begun_output_folder_can_be_used(tmp_path):
    (tmp_path / ".recipe.yaml.cdistill-0123abcd").touch()
    recipe = recipe_from_dict(recipe_values(tmp_path, Path("models")))
    for resume in (False, True):
        run_folder.check_output(recipe, tmp_path, resume)
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ValueError, match="is not empty and holds no run"):
        run_folder.check_output(recipe, tmp_path, True)
