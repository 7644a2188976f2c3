"""Small runs to which everything happens: ``python -m benchmarks.soak [--minutes 10] [--seed 0] [--kill-points]``.

A trial is a run of `cdistill train` on the built-in world, two stages of a few steps, which is killed, stopped, continued,
damaged, started twice or given a full disk, as often as a seed draws, and started again with ``--resume`` until it ends. It
fails with a traceback, more or less than one line about an error, a hang, anything left behind, or a single bit that differs
from the run to which nothing has happened. ``--kill-points`` ends commands at file operations spread over all that they do.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import signal
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks._results import environment, results_folder, version
from benchmarks._troubled_runs import Start, cleared, difference, prepare, state

LIBRARIES = ("transformers", "deepspeed", "accelerate", "safetensors", "tokenizers")
RECIPE = """\
extends: demo-compodistill
output: {output}
seed: 1
deepspeed: {zero}
processes: 1
logging_steps: 1
save_steps: 1
vat: {{weight: 1.0}}
teacher_memory: {{{cache}}}
stages: [dpt, dft]
stage:
  dpt: {{samples: 8, global_batch_size: 4}}
  dft: {{samples: 12, global_batch_size: 4}}
"""
COMMANDS = ("zero-off", "zero-2", "zero-3", "cache", "export")  # of kill points
TROUBLES = {
    "kill": 3,
    "kill at operation": 3,
    "stop": 1,
    "terminate": 1,
    "full disk": 2,
    "damage": 4,
    "two starters": 2,
}
LAST = "2-dft"  # the result of the last stage
LOGS = ("metrics.jsonl", "events.out.tfevents")  # of which damage costs no result


@dataclass
class Undisturbed:
    """A run to which nothing has happened: what it leaves, its file operations, its seconds."""

    state: dict[str, str]
    operations: int
    seconds: float


class Bench:
    """The folder in which runs of one engine are made, always in the same place, so that all of their files can be compared."""

    def __init__(self, lab: Path, zero: str) -> None:
        self.lab, self.folder = lab, cleared(lab / f"zero-{zero}")
        self.output, self.recipe = self.folder / "run", lab / f"zero-{zero}.yaml"
        self.recipe.write_text(RECIPE.format(output=self.output, zero=quoted(zero), cache=""))
        self.zero = zero
        self.undisturbed = undisturbed(self.words(), self.folder)

    def words(self) -> list[object]:
        """The command that begins the run, or goes on with it."""
        words: list[object] = ["train", self.recipe]
        return [*words, "--resume"] if (self.output / "recipe.yaml").is_file() else words


def quoted(zero: str) -> str:
    """A stage of ZeRO in YAML, where off would be a truth value."""
    return zero if zero.isdigit() else f"'{zero}'"


def undisturbed(words: list[object], folder: Path) -> Undisturbed:
    """What a command does when it is left alone; ends the program if it fails."""
    log = folder.with_suffix(".log")
    log.unlink(missing_ok=True)
    start = Start(words, folder, log=log)
    if start.end() or start.code:
        sys.exit(f"the undisturbed {words[0]} has failed:\n{start.text()}")
    return Undisturbed(state(folder), len(log.read_text().splitlines()), time.monotonic() - start.begun)


@dataclass
class Trial:
    """One run and its troubles, drawn by a seed."""

    bench: Bench
    seed: str
    starts: list[dict[str, Any]] = field(default_factory=list)
    log_damaged: bool = False
    fault: str | None = None

    def run(self) -> dict[str, Any]:
        """Let the troubles happen, then let the run end; returns what is kept of it."""
        cleared(self.bench.folder)
        self.draw = random.Random(self.seed)
        kinds = self.draw.choices(list(TROUBLES), list(TROUBLES.values()), k=self.draw.randint(1, 4))
        for kind in kinds:
            if kind != "damage" and (self.bench.output / LAST).is_dir():  # nothing more would happen to it
                self.finish()
            if self.fault is None:
                getattr(self, kind.replace(" ", "_"))(kind)
        self.finish()
        record = {"seed": self.seed, "zero": self.bench.zero, "starts": self.starts, "fault": self.fault}
        return record

    def finish(self) -> None:
        """Let the run end, compare what it leaves, and make room for another."""
        if self.fault is None:
            self.judge("to the end", Start(self.bench.words(), self.bench.folder), (0,))
        self.fault = self.fault or self.compare()
        if self.fault is None:
            cleared(self.bench.folder)
            self.log_damaged = False

    def compare(self) -> str | None:
        """What differs at the end from the undisturbed run."""
        expected = {
            n: h for n, h in self.bench.undisturbed.state.items() if n != "run/metrics.jsonl" or not self.log_damaged
        }
        try:  # what a damaged log has held is lost, no result
            return difference(expected, state(self.bench.folder, logs=not self.log_damaged))
        except ValueError:
            return "metrics.jsonl cannot be read at the end"

    def judge(self, trouble: str, start: Start, codes: tuple[int, ...], **more: Any) -> None:
        """Note how a start has ended; a fault where it should not have ended like this."""
        fault = start.end()
        if fault is None and start.code not in codes:
            fault = f"exit status {start.code}"
        self.starts.append({"trouble": trouble, **more, "exit": start.code, "said": start.said(self.bench.lab)})
        if fault is not None:
            self.fault = self.fault or f"{trouble}: {fault}"
            self.starts[-1]["text"] = start.text()[-3000:].replace(str(self.bench.lab), "LAB")

    def moment(self) -> float:
        return self.draw.uniform(0.0, 1.1 * self.bench.undisturbed.seconds)

    def operation(self) -> int:
        return self.draw.randint(1, self.bench.undisturbed.operations)

    # What may happen.

    def kill(self, kind: str) -> None:
        seconds = self.moment()
        start = Start(self.bench.words(), self.bench.folder)
        start.wait(seconds)
        start.send(signal.SIGKILL)
        self.judge(kind, start, (0, -signal.SIGKILL), after_s=round(seconds, 2))

    def kill_at_operation(self, kind: str) -> None:
        at = self.operation()
        start = Start(self.bench.words(), self.bench.folder, at=at)
        self.judge(kind, start, (0, -signal.SIGKILL), operation=at)

    def stop(self, kind: str) -> None:
        seconds = self.moment()
        start = Start(self.bench.words(), self.bench.folder)
        start.wait(seconds)
        start.send(signal.SIGSTOP)
        time.sleep(self.draw.uniform(0.05, 1.0))
        start.send(signal.SIGCONT)
        self.judge(kind, start, (0,), after_s=round(seconds, 2))

    def terminate(self, kind: str) -> None:
        seconds = self.moment()
        start = Start(self.bench.words(), self.bench.folder)
        start.wait(seconds)
        start.send(signal.SIGTERM)
        self.judge(kind, start, (0, 128 + signal.SIGTERM, -signal.SIGTERM), after_s=round(seconds, 2))

    def full_disk(self, kind: str) -> None:
        at = self.operation()
        start = Start(self.bench.words(), self.bench.folder, at=at, full=True)
        self.judge(kind, start, (0, 1), operation=at)

    def two_starters(self, kind: str) -> None:
        words = self.bench.words()
        pause, seconds = self.draw.choice((0.0, self.draw.uniform(0.0, 0.5))), self.moment()
        first = Start(words, self.bench.folder)
        time.sleep(pause)
        second = Start(words, self.bench.folder)
        killed = self.draw.random() < 0.5
        if killed:
            first.wait(seconds)
            first.send(signal.SIGKILL)
        for name, start in (("first", first), ("second", second)):
            codes = (0, 2, -signal.SIGKILL) if killed and start is first else (0, 2)
            self.judge(
                kind, start, codes, who=name, apart_s=round(pause, 2), killed_after_s=seconds if killed else None
            )
        if not killed and self.fault is None and 0 not in (first.code, second.code):
            self.fault = f"{kind}: neither has trained"

    def damage(self, kind: str) -> None:
        """A file of a killed run loses a bit, its end, or itself: it is refused in one line, made good, or left out."""
        if not self.bench.output.is_dir():
            self.kill("kill")
        files = sorted(path for path in self.bench.output.rglob("*") if path.is_file()) if self.fault is None else []
        if not files:
            return
        path = self.draw.choice(files)
        content, how = path.read_bytes(), self.draw.choice(("flip", "cut", "remove"))
        more = {"file": str(path.relative_to(self.bench.output)), "how": how}
        if how == "remove":
            path.unlink()
        elif content:
            place = self.draw.randrange(len(content))
            flipped = bytes([content[place] ^ 1 << self.draw.randrange(8)])
            path.write_bytes(content[:place] + (flipped + content[place + 1 :] if how == "flip" else b""))
        log = path.name.startswith(LOGS)
        self.log_damaged = self.log_damaged or log
        before = contents(self.bench.output)
        if path.name == "recipe.yaml" and how == "remove":  # nothing else says that there is a run
            words: list[object] = ["train", self.bench.recipe, "--resume"]
        else:
            words = self.bench.words()
        start = Start(words, self.bench.folder)
        self.judge(kind, start, (0, 2) if not log else (0,), **more)
        if self.fault is None and start.code == 2:
            if path.name not in start.text() and path.parent.name not in start.text():
                self.fault = f"{kind}: {more['file']} is not named"
            elif contents(self.bench.output) != before:
                self.fault = f"{kind}: a refused start has changed something"
            path.write_bytes(content)  # "put it back"


def contents(folder: Path) -> dict[str, bytes]:
    """All files below a folder but the lock and what was being written, which any start removes."""
    return {
        str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file() and ".cdistill" not in path.name
    }


def soak(lab: Path, minutes: float, seed: int, only: str | None) -> dict[str, Any]:
    """Trials until the time is over."""
    benches, deadline = [Bench(lab, "off"), Bench(lab, "2")], time.monotonic() + 60 * minutes
    draw, trials = random.Random(seed), []
    while time.monotonic() < deadline:
        bench = draw.choices(benches, (3, 1))[0]
        name = f"{seed}-{len(trials)}"
        skipped = only is not None and only != name
        trials.append({} if skipped else Trial(bench, name).run())
        if not skipped:
            said = [start["trouble"] for start in trials[-1]["starts"]]
            print(f"{name} zero {bench.zero}: {', '.join(said)}: {trials[-1]['fault'] or 'held'}", flush=True)
            if only is not None:
                print("\n".join(map(str, trials[-1]["starts"])))
                break
    trials = [trial for trial in trials if trial]
    happened = Counter(start["trouble"] for trial in trials for start in trial["starts"])
    return {"minutes": minutes, "troubles": dict(sorted(happened.items())), "trials": trials}


def kill_points(lab: Path, name: str, count: int) -> dict[str, Any]:
    """A command ended at file operations spread over all that it does, and started again."""
    trials, folder = [], cleared(lab / "points")
    words = command(name, lab, folder)
    alone = undisturbed(words, folder)
    log = folder.with_suffix(".log").read_text().splitlines()
    for i in range(count):
        at = 1 + round(i * (alone.operations - 1) / max(1, count - 1))
        for full in (False, True) if name in ("cache", "export") else (False,):  # of training `Trial` fills the disk
            where = log[at - 1].partition(" ")[2].replace(f"{lab}/", "")
            what = {"trouble": "full disk" if full else "kill", "operation": at, "at": where}
            trials.append(what | ended_at(at, full, words, folder, alone))
            print(f"{name}: {', '.join(map(str, what.values()))}: {trials[-1]['fault'] or 'held'}", flush=True)
    return {"of": name, "operations": alone.operations, "trials": trials}


def ended_at(at: int, full: bool, words: list[object], folder: Path, alone: Undisturbed) -> dict[str, Any]:
    """End a command at an operation, or let the disk be full from there on, and start it again; what is kept of it."""
    cleared(folder)
    first = Start(words, folder, at=at, full=full)
    fault = first.end()
    if fault is None and first.code not in ((0, 1, 2) if full else (0, -signal.SIGKILL)):
        fault = f"exit status {first.code}"
    begun = words[0] == "train" and (folder / "run" / "recipe.yaml").is_file()
    # an export that is whole is not written again
    there = words[0] == "export" and difference(alone.state, state(folder)) is None
    second = Start([*words, "--resume"] if begun else words, folder)
    failed = second.end() or (None if second.code == (2 if there else 0) else f"exit status {second.code}")
    fault = fault or failed or difference(alone.state, state(folder))
    kept = {"exit": first.code, "said": first.said(folder.parent) if full else "", "again": second.code, "fault": fault}
    return kept | ({"text": first.text()[-3000:] + second.text()[-3000:]} if fault else {})


def command(name: str, lab: Path, folder: Path) -> list[object]:
    """The command line of a kind of kill points; all that it writes lies below the folder."""
    if name == "export":
        return ["export", "builtin:teacher", folder / "run", "--dtype", "bf16"]
    recipe, cached = lab / "points.yaml", name == "cache"
    cache = f"cache: {folder / 'run'}, top_k: 8" if cached else ""
    zero = name.removeprefix("zero-") if name.startswith("zero-") else "off"
    output = lab / "unused" if cached else folder / "run"
    recipe.write_text(RECIPE.format(output=output, zero=quoted(zero), cache=cache))
    return ["cache" if cached else "train", recipe]


def write(path: Path, found: dict[str, Any], made: dict[str, Any], command_line: str) -> None:
    """A result, one trial in a line."""
    trials = found.pop("trials")
    found |= {"failed": sum(trial["fault"] is not None for trial in trials), "count": len(trials)}
    head = json.dumps({"command": command_line, **made, **found}, indent=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(head[:-2] + ',\n "trials": [\n' + ",\n".join(map(json.dumps, trials)) + "\n]}\n")
    print(f"{found['failed']} of {len(trials)} failed -> {path}")


def main() -> int:
    """Returns 1 where a trial has failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0, help="of the soak; 0 for kill points alone")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="one trial of a seed, as 0-17; nothing is written")
    parser.add_argument(
        "--kill-points",
        nargs="*",
        choices=COMMANDS,
        metavar="COMMAND",
        help="end these commands, too (none named: all)",
    )
    parser.add_argument("--points", type=int, default=20, help="of each command (default: 20)")
    options = parser.parse_args()
    lab, line = prepare("benchmarks.soak"), " ".join(["python -m benchmarks.soak", *sys.argv[1:]])
    made = environment(torch.device("cpu"))
    made["versions"] |= {name: version(name) for name in LIBRARIES}
    failed, folder = False, results_folder() / "soak"
    names = COMMANDS if options.kill_points == [] else options.kill_points or ()
    try:
        if options.minutes:
            found = soak(lab, options.minutes, options.seed, options.only)
            failed = any(trial["fault"] for trial in found["trials"])
            if options.only is None:
                write(folder / f"seed_{options.seed}.json", found, made, line)
        for name in names:
            found = kill_points(lab, name, options.points)
            failed = failed or any(trial["fault"] for trial in found["trials"])
            write(folder / f"kill_points_{name}.json", found, made, line)
        return int(failed)
    finally:
        shutil.rmtree(lab, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
