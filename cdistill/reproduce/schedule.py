"""Runs side by side, each a process with its share of threads; killed and gone on with at any time."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from cdistill.builtin.scorer import FAMILIES
from cdistill.data import strict_yaml
from cdistill.files import write_text
from cdistill.reproduce.findings import samples_of
from cdistill.reproduce.runs import FAILED, FINISHED, STARTED, STOPPED, Record, Run
from cdistill.reproduce.worker import JOB, RESULT, WEIGHTS
from cdistill.runtime.errors import Stopped
from cdistill.runtime.launch import PARENT, POLL_SECONDS, where_the_package_is
from cdistill.runtime.provenance import provenance
from cdistill.runtime.signals import stop_on_signals
from cdistill.train.recipes import recipe_to_dict
from cdistill.train.run_folder import METRICS, stage_folders

PROGRAM = (sys.executable, "-P", "-m", "cdistill.reproduce.worker")
PARTS = "parts"  # folder of models that rows are made of, likewise
WORK = "work"  # folder of what is being trained, below that of the results
SAVES = 10  # checkpoints of a stage, at least, so that a kill costs little
SUBTYPES = sum(map(len, FAMILIES.values()))  # of questions
CODES_OF_STOPS = (128 + signal.SIGTERM, 128 + signal.SIGINT, -signal.SIGTERM, -signal.SIGINT)


@dataclass
class Started:
    """A process that works on a run."""

    run: Run
    record: Record
    process: subprocess.Popen
    since: float


@dataclass
class Schedule:
    """Runs to be made, and where their records go.

    Attributes:
        folder: of the results.
        records: of all runs in it, by hash; changed as runs begin and end.
        processes: runs at once.
        keep: keep the weights of finished runs.
        say: prints a line, above the bar.
    """

    folder: Path
    records: dict[str, Record]
    processes: int = 1
    keep: bool = False
    say: Callable[[str], None] = tqdm.write

    def work(self, runs: Sequence[Run]) -> None:
        """Make the runs that are not finished. A run that fails is recorded, and the others go on.

        Raises:
            Stopped: a signal came; what runs has saved a checkpoint.
        """
        left = [run for run in runs if not self.is_done(run)]
        total, done, past, whole, begun = len(left), 0, 0, sum(map(cost, left)), time.monotonic()
        busy: list[Started] = []
        bar = tqdm(total=whole, desc="runs", unit=" samples", disable=None, smoothing=0)  # on a terminal
        with bar, stop_on_signals() as request:
            try:
                while (left and not request.received) or busy:
                    while left and len(busy) < self.processes and not request.received:
                        busy.append(self._start(left.pop(0)))
                    if request.received:
                        for each in busy:
                            each.process.send_signal(signal.SIGTERM)
                    for each in [each for each in busy if _ended(each, wait=bool(request.received))]:
                        busy.remove(each)
                        done, past = done + 1, past + cost(each.run)
                        left_over = _left(time.monotonic() - begun, whole - past, past)
                        self._end(each, request.received, f"{done}/{total}", left_over)
                    bar.update(past + sum(self._seen(each.run) for each in busy) - bar.n)
                    time.sleep(POLL_SECONDS)
            finally:
                for each in busy:
                    each.process.kill()
                    each.process.wait()
        if request.received:
            raise Stopped(request.received)

    def is_done(self, run: Run) -> bool:
        """Whether a run is finished; a part also must be there."""
        done = self.records[run.hash].status == FINISHED
        return done and (run.exam is not None or part_folder(self.folder, run).is_dir())

    def _start(self, run: Run) -> Started:
        place = self.folder / WORK / run.hash
        place.mkdir(parents=True, exist_ok=True)
        (place / RESULT).unlink(missing_ok=True)
        steps = min(stage.steps for stage in run.recipe.stage.values())
        recipe = replace(run.recipe, output=str(place / WEIGHTS), save_steps=max(1, steps // SAVES))
        write_text(place / "recipe.yaml", strict_yaml.dump(recipe_to_dict(recipe)))
        job = {
            "exam": None if run.exam is None else run.exam.facts(),
            "model": run.model,
            "title": f"{run.row}, seed {run.recipe.seed}",
        }
        write_text(place / JOB, json.dumps(job) + "\n")
        threads = max(1, len(os.sched_getaffinity(0)) // self.processes)
        record = self.records[run.hash]
        record.attempts.append({"status": STARTED, "threads": threads, **provenance()})
        record.write(self.folder)
        process = start_process(place, threads)
        return Started(run, record, process, time.monotonic())

    def _seen(self, run: Run) -> int:
        """Samples that a run has been trained on, by its metrics."""
        path = self.folder / WORK / run.hash / WEIGHTS / METRICS
        try:
            lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        except (OSError, ValueError):  # not begun, or half written
            return 0
        return sum({line["stage"]: line["samples"] for line in lines}.values())

    def _end(self, each: Started, stopped: int, number: str, left: str) -> None:
        """Record how a run ended."""
        place, record, code = self.folder / WORK / each.run.hash, each.record, each.process.returncode
        attempt: dict[str, Any] = record.attempts[-1]
        attempt["seconds"] = round(time.monotonic() - each.since, 1)
        if code == 0:
            result = json.loads((place / RESULT).read_text(encoding="utf-8"))
            record.accuracy, record.model = result["accuracy"], result["model"]
            attempt |= {"status": FINISHED, "cpu_seconds": result["cpu_seconds"]}
        elif stopped or code in CODES_OF_STOPS:
            attempt["status"] = STOPPED
        else:
            attempt |= {"status": FAILED, "reason": _reason(place / "log", code)}
        record.write(self.folder)
        if code == 0 and each.run.exam is None:
            part_folder(self.folder, each.run).parent.mkdir(exist_ok=True)
            (place / WEIGHTS).rename(part_folder(self.folder, each.run))
        if code == 0 and not self.keep:
            shutil.rmtree(place)
        self.say(f"{number} {each.run.row}, seed {each.run.recipe.seed}{_size(each.run)}: {outcome(record)}{left}")


def part_folder(folder: Path, run: Run) -> Path:
    """Where the weights of a part are kept."""
    return folder / PARTS / run.hash


def weights_folder(folder: Path, run: Run) -> Path:
    """Where the student of a finished run is, if weights are kept."""
    return stage_folders(run.recipe, folder / WORK / run.hash / WEIGHTS)[-1]


def start_process(place: Path, threads: int) -> subprocess.Popen:
    """A worker for the job in a folder, which has its log. In a session of its own: Ctrl-C reaches this process alone."""
    environ = {**os.environ, "OMP_NUM_THREADS": str(threads), PARENT: str(os.getpid()), **where_the_package_is()}
    with (place / "log").open("ab") as log:
        return subprocess.Popen(
            [*PROGRAM, str(place)], env=environ, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )


def _ended(each: Started, *, wait: bool) -> bool:
    if wait:
        each.process.wait()
    return each.process.poll() is not None


def _size(run: Run) -> str:
    return "" if run.size == 1 else f", samples x {run.size:g}"


def _left(seconds: float, ahead: int, past: int) -> str:
    minutes = max(1, round(seconds * ahead / past / 60)) if ahead else 0
    return f"; about {minutes} minute{'' if minutes == 1 else 's'} left" if ahead else ""


def cost(run: Run) -> int:
    """What a run takes, in samples of training: a question is a forward pass, about a third of that."""
    questions = 0 if run.exam is None else run.exam.n * SUBTYPES
    return (0 if run.model else samples_of(run.recipe.stages, run.recipe.stage)) + questions // 3


def outcome(record: Record) -> str:
    """How a run ended, in words."""
    if record.status != FINISHED:
        reason = record.attempts[-1].get("reason") if record.attempts else None
        return f"{record.status}{f' ({reason})' if reason else ''}"
    if record.accuracy is None:
        return f"trained in {record.attempts[-1]['seconds']:.0f} s"
    greedy, choice = (record.accuracy[way] for way in ("greedy", "choice"))
    seconds = record.attempts[-1]["seconds"]
    return (
        f"recognition {100 * greedy['recognition']['avg']:.1f}, compositional {100 * choice['compositional']['avg']:.1f} "
        f"({100 * greedy['compositional']['avg']:.1f} greedy) in {seconds:.0f} s"
    )


def _reason(log: Path, code: int) -> str:
    """The last line of a failed run's log that says something, or the signal that killed it."""
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    lines = log.read_text(encoding="utf-8", errors="replace").replace("\r", "\n").split("\n")
    last = next((line.strip() for line in reversed(lines) if line.strip()), "")
    return last.removeprefix("cdistill: error: ")[:200] or f"exit code {code}"
