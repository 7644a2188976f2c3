"""What a run's folder tells of it: its stages in order, what they have logged, and whether it goes on."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cdistill.data import strict_yaml
from cdistill.errors import InputError
from cdistill.files import is_owned
from cdistill.models.load import METRICS, RECIPE
from cdistill.runtime.bad_samples import FILE as BAD_SAMPLES
from cdistill.runtime.json_lines import read_lines, say_damaged
from cdistill.train.recipes import Recipe, recipe_to_dict
from cdistill.train.replies import FILE as REPLIES
from cdistill.train.run_folder import read_recipe, stage_folders

PLACE = ("stage", "step", "samples")  # keys of every entry
REPLY = ("prompt", "reply", "reference")
MEASURED = ("validation", "eval")  # keys of entries that hold several values
UNKNOWN, WAITING, RUNNING, STOPPED, DONE = "unknown", "not begun", "running", "stopped", "done"


@dataclass(frozen=True)
class StageHistory:
    """One stage of a run.

    Attributes:
        label: folder name of the stage, such as ``2-dft``.
        objective: what it trains.
        steps, samples: of the whole stage.
        before: samples of the stages before it.
        logged: entries of its steps, in order; measurements of the student are `measured`.
        bad: reasons of samples that were left out, counted.
        state: one of `WAITING`, `RUNNING`, `STOPPED`, `DONE`.
    """

    label: str
    objective: str
    steps: int
    samples: int
    before: int
    logged: Sequence[dict[str, Any]]
    measured: Sequence[dict[str, Any]]
    bad: Counter[str]
    state: str

    @property
    def step(self) -> int:
        """The last step that was logged."""
        return int(self.logged[-1]["step"]) if self.logged else 0

    @property
    def seconds(self) -> float:
        """Of training, over all attempts."""
        return float(self.logged[-1].get("elapsed_s") or 0.0) if self.logged else 0.0

    @property
    def seconds_left(self) -> float | None:
        """At the rate so far; None where none is known."""
        if self.state == DONE or not self.step:
            return None
        return self.seconds / self.step * (self.steps - self.step)


@dataclass(frozen=True)
class RunHistory:
    """A run.

    Attributes:
        folder: of the run.
        recipe: of the run, resolved.
        stages: in order.
        replies: of the student, those of the last step of each stage that shows some.
    """

    folder: Path
    recipe: Recipe
    stages: Sequence[StageHistory]
    replies: Sequence[dict[str, Any]] = ()

    @property
    def state(self) -> str:
        """The run's own, one of the states of a stage."""
        states = {stage.state for stage in self.stages}
        for state in (RUNNING, STOPPED):
            if state in states:
                return state
        return WAITING if states == {WAITING} else DONE if states == {DONE} else STOPPED

    @property
    def seconds(self) -> float:
        """Of training, over all stages."""
        return sum(stage.seconds for stage in self.stages)

    @property
    def process_hours(self) -> float:
        """Hours of training times the processes (on GPUs: GPU-hours)."""
        return sum(stage.seconds * _processes(stage, self.recipe) for stage in self.stages) / 3600

    @property
    def text(self) -> str:
        """The recipe as YAML."""
        return strict_yaml.dump(recipe_to_dict(self.recipe))

    def series(self, key: str) -> tuple[list[int], list[float | None]]:
        """Samples seen since the run's start, and a logged number; None where it is none. Empty where nothing has logged it.

        Keys of measurements have two parts: ``validation.kd``.
        """
        group, _, name = key.partition(".")
        x: list[int] = []
        y: list[float | None] = []
        for stage in self.stages:
            entries = stage.measured if group in MEASURED else stage.logged
            for entry in entries:
                value = _measured(entry, group).get(name) if group in MEASURED else entry.get(key)
                if value is not None:
                    x.append(stage.before + int(entry["samples"]))
                    y.append(_number(value))
        return x, y

    def layers(self, key: str) -> tuple[list[int], list[list[float]]]:
        """Samples seen and the values of every layer, of what ``log_layers`` logs."""
        found = [
            (stage.before + int(entry["samples"]), [float(value) for value in entry[key]])
            for stage in self.stages
            for entry in stage.logged
            if isinstance(entry.get(key), list) and entry[key] and all(_number(each) is not None for each in entry[key])
        ]
        return [x for x, _ in found], [values for _, values in found]

    def logged_keys(self) -> list[str]:
        """Everything that has been logged as a number, and what was measured."""
        logged = {key: None for stage in self.stages for entry in stage.logged for key in entry}
        measured = {
            f"{group}.{name}": None
            for stage in self.stages
            for entry in stage.measured
            for group in MEASURED
            for name in _measured(entry, group)
        }
        return [*logged, *measured]


def read_run(folder: Path) -> RunHistory:
    """The run in a folder. Raises ValueError if there is none, OSError if it cannot be read."""
    if not (folder / RECIPE).is_file():
        raise InputError(
            f"{folder} holds no run: {RECIPE} is missing; name the folder that `cdistill train` has written to"
        )
    recipe = read_recipe(folder)
    entries, damaged = read_lines(folder / METRICS, *PLACE)
    say_damaged(folder / METRICS, damaged)
    listed, damaged = read_lines(folder / BAD_SAMPLES, "stage", "reason")
    say_damaged(folder / BAD_SAMPLES, damaged)
    owned, before = is_owned(folder), 0
    stages: list[StageHistory] = []
    for name, path in zip(recipe.stages, stage_folders(recipe, folder), strict=True):
        config = recipe.stage[name]
        own = [entry for entry in entries if entry["stage"] == name and _is_whole(entry)]
        logged = [entry for entry in own if "loss" in entry]
        begun = bool(logged) or (owned and all(stage.state == DONE for stage in stages))
        state = DONE if path.is_dir() else WAITING if not begun else RUNNING if owned else STOPPED
        stages.append(
            StageHistory(
                label=path.name,
                objective=config.objective,
                steps=config.steps,
                samples=config.steps * config.global_batch_size,
                before=before,
                logged=logged,
                measured=[entry for entry in own if any(isinstance(entry.get(key), dict) for key in MEASURED)],
                bad=Counter(str(entry["reason"]) for entry in listed if entry["stage"] == path.name),
                state=state,
            )
        )
        before += stages[-1].samples
    return RunHistory(folder, recipe, stages, _last_replies(folder, recipe))


def _last_replies(folder: Path, recipe: Recipe) -> list[dict[str, Any]]:
    found, damaged = read_lines(folder / REPLIES, "stage", "step", *REPLY)
    say_damaged(folder / REPLIES, damaged)
    last = {entry["stage"]: entry["step"] for entry in found}
    return [e for name in recipe.stages for e in found if e["stage"] == name and e["step"] == last[name]]


def _processes(stage: StageHistory, recipe: Recipe) -> int:
    return int(stage.logged[-1].get("processes") or recipe.processes) if stage.logged else recipe.processes


def _is_whole(entry: dict[str, Any]) -> bool:
    """Whether an entry says where it stands; a damaged one may not."""
    return all(type(entry[key]) is int for key in ("step", "samples"))


def _measured(entry: dict[str, Any], group: str) -> dict[str, Any]:
    value = entry.get(group)
    return value if isinstance(value, dict) else {}


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None
