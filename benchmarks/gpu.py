"""What a GPU can tell in nine minutes: `python -m benchmarks.gpu`.

Checks against float64 come first, each in a process of its own, side by side, for at most a third of the time. Then one process
times what matters most first: attention at T4096 and T32768 against all rivals, the vocabulary layer, the rest as time is
left; what failed its check is not timed. If that process dies, another goes on behind the task in which it did. Every result
is written to results/<gpu>/results.json (or to the folder CDISTILL_RESULTS) as soon as it is known; the report that ends the
run says what was not reached. The exit code is 1 if a result was wrong or a task failed.

`-k` takes tasks by words of their names: `-k "not check"`, `-k "T4096 and not tiles or vocabulary"`. `--rehearse` goes through
all of it on the CPU with tiny sizes and Triton's interpreter.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

import torch

from benchmarks import report
from benchmarks._exactness import run_apart
from benchmarks._gpu_tasks import CHECKS, REHEARSED, TASKS
from benchmarks._measure import REHEARSAL, gpu
from benchmarks._results import ROOT, ResultsFile, results_folder

SECONDS = 540.0
FOR_CHECKS, FOR_REPORT = 0.35, 20.0  # of the seconds; seconds, with those in which this process starts
LEAST = 8.0  # seconds in which a process can do anything


def matches(words: str, name: str) -> bool:
    """Whether a name has the words of an expression of ``and``, ``or`` and ``not``, as pytest's -k without brackets."""

    def has(word: str) -> bool:
        word = word.strip()
        return not has(word[4:]) if word.startswith("not ") else word.lower() in name.lower()

    return any(all(map(has, part.split(" and "))) for part in words.split(" or "))


def run_checks(file: ResultsFile, names: list[str], deadline: float) -> None:
    """All checks side by side; what has not ended by the deadline is not reached."""

    def check(name: str) -> dict[str, str] | None:
        left = deadline - time.monotonic()
        return run_apart(*CHECKS[name], left) if left > LEAST else None

    with ThreadPoolExecutor(max(1, min(14, (os.cpu_count() or 2) - 2))) as pool:
        running = {pool.submit(check, name): name for name in names}
        for ended in as_completed(running):
            name, found = running[ended], ended.result()
            if found is None:
                continue
            file.add("done", {name: [f"{part} {what}".strip() for part, what in found.items()]})
            file.add("failed_parts", {name: found} if found else {})
            print(f"{'FAILED' if found else 'ok':6} {name}", *found.values(), flush=True)


def run_tasks(file: ResultsFile, names: list[str], deadline: float, spawn: Callable[..., Any] = subprocess.run) -> None:
    """Timings in a process, and what it left when it died in another; a task that it died of has failed."""
    while (left := deadline - time.monotonic()) > LEAST and names:
        command = [sys.executable, "-m", "benchmarks._gpu_tasks", str(file.path), f"{time.time() + left}", *names]
        try:
            code = spawn(command, cwd=ROOT, timeout=left).returncode
        except subprocess.TimeoutExpired:
            code = None
        file.data = ResultsFile.read(file.path).data
        begun = [name for name in names if name in file.data.get("begun", {})] or names[:1]
        names = [name for name in names if name not in begun]
        died = [name for name in begun if name not in file.data["done"]]
        if not code:  # all is done, or time is over
            return
        file.add("done", {name: [f"its process ended with exit code {code}"] for name in died})


def run(names: list[str], seconds: float) -> ResultsFile:
    """These checks and tasks, in the order of the plan."""
    start = time.monotonic()
    file = ResultsFile.new(results_folder(), gpu())
    file.add("planned", [name for name in (*CHECKS, *TASKS) if name in names])
    file.add("done", {})
    run_checks(file, [name for name in CHECKS if name in names], start + FOR_CHECKS * seconds)
    run_tasks(file, [name for name in TASKS if name in names], start + seconds - FOR_REPORT)
    return file


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description="All checks and timings on a GPU.")
    parser.add_argument("-k", metavar="WORDS", default="", help='names that are run, as "T4096 and not check"')
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of the whole run (default: 540)")
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes on the CPU, with Triton's interpreter")
    options = parser.parse_args(arguments)
    if options.rehearse:
        os.environ |= {REHEARSAL: "1", "TRITON_INTERPRET": "1"}
    elif not torch.cuda.is_available():
        parser.error("there is no CUDA GPU here; --rehearse goes through all of it on the CPU")
    names = [name for name in (*CHECKS, *TASKS) if matches(options.k, name)]
    if not names:
        parser.error(f"-k {options.k!r}: nothing has these words in its name, such as {', '.join([*TASKS][:4])}")
    file = run([name for name in names if name in REHEARSED] if options.rehearse else names, options.seconds)
    print("", *report.closing(file.path), "python -m benchmarks.report: all tables, and targets", sep="\n")
    return int(any(file.data["done"].values()))


if __name__ == "__main__":
    raise SystemExit(main())
