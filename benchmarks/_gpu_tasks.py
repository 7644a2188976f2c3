"""The plan of `benchmarks.gpu`: what is checked, and what is timed, in this order.

`python -m benchmarks._gpu_tasks RESULTS UNTIL TASK...` runs tasks until that time, in seconds since 1970.
"""

import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import _exactness_attention, _exactness_distillation, _passes, _relation
from benchmarks._cases import Case, attention, measured, relation, vocabulary
from benchmarks._contenders import SHAPES, Contender, Shape, ours
from benchmarks._distillation import DIVERGENCES, SIZES
from benchmarks._exactness import run_apart
from benchmarks._exactness_attention import CANDIDATES
from benchmarks._measure import gpu, one_line, rates, rehearsing, synchronize
from benchmarks._results import ResultsFile

Problems = list[str]
DEAD = 3  # exit code of a process whose device no longer answers


@dataclass(frozen=True)
class Task:
    """What is timed, and whether it is begun: with ``need`` seconds left. It stops by itself after ``most`` seconds."""

    run: Callable[[ResultsFile, float], Problems]
    need: float
    most: float


def failed_parts(file: ResultsFile, start: str) -> dict[str, str]:
    """What failed in the checks whose names begin like this."""
    failed = {name.removeprefix("check "): found for name, found in file.data.get("failed_parts", {}).items()}
    return {part: what for name, found in failed.items() if name.startswith(start) for part, what in found.items()}


def _measure_rates(file: ResultsFile, seconds: float) -> Problems:
    sizes = (64, 2**16, 0.01) if rehearsing() else ()
    file.add("rates", rates(gpu(), *sizes))
    return []


def _dtype() -> str:
    return "fp32" if rehearsing() else "bf16"


def _time(case: Case, checks: str, file: ResultsFile, seconds: float) -> Problems:
    """All contenders of a case but those of ours whose check, begun like ``checks``, failed."""
    rows, problems = measured(case, _dtype(), gpu(), failed=failed_parts(file, checks), seconds=seconds)
    file.add("rows", rows)
    return [*problems, *([] if "both_ms" in rows[0] else [f"ours: {rows[0].get('skipped')}"])]


def _tiny(shape: Shape) -> Shape:
    small = replace(shape, batch=1, q_heads=2, kv_heads=1, tokens=40, width=16, rows=3, cols=9)
    return small if rehearsing() else shape


def _time_attention(shape: Shape, file: ResultsFile, seconds: float) -> Problems:
    return _time(attention(_tiny(shape)), f"bf16-d{shape.width}-", file, seconds)


def _time_vocabulary(size: Any, divergence: str, file: ResultsFile, seconds: float) -> Problems:
    size = replace(size, rows=9, student=16, teacher=24, vocab=101, ignored=0) if rehearsing() else size
    return _time(vocabulary(size, divergence, compiling=not rehearsing()), "vocabulary-bf16-", file, seconds)


def _time_relation(size: Any, file: ResultsFile, seconds: float) -> Problems:
    size = replace(size, tokens=40, rows=3, cols=9, width=16) if rehearsing() else size
    return _time(relation(size), f"bf16-d{size.width}-", file, seconds)


def _time_slices(shape: Shape, file: ResultsFile, seconds: float) -> Problems:
    broken = failed_parts(file, f"bf16-d{shape.width}-").keys() & {"", "slice", "alignment"}
    if broken:
        return ["not timed: its check failed"]
    if "rates" not in file.data:
        _measure_rates(file, seconds)
    file.add("slices", _passes.slice_passes(_tiny(shape), _dtype(), gpu(), file.data["rates"], min(0.25, seconds)))
    return []


def _time_kernels(shape: Shape, file: ResultsFile, seconds: float) -> Problems:
    if failed_parts(file, f"bf16-d{shape.width}-"):
        return ["not timed: its check failed"]
    for found in (Contender("ours", ours(None)), Contender("ours/triton", ours("triton"))):
        file.add("kernels", _passes.kernel_times(_tiny(shape), _dtype(), gpu(), found))
    return []


def _time_tiles(key: tuple[str, int, int], file: ResultsFile, seconds: float) -> Problems:
    shape = _tiny(next(s for s in SHAPES if s.name == _passes.TILE_SHAPES[key[2]]))
    done = file.data["done"]
    checks = [name for name in file.data["planned"] if name.startswith("check tile-")]
    failed = {name.removeprefix("check "): "; ".join(done.get(name, ["not reached"])) for name in checks}
    failed = {name: reason for name, reason in failed.items() if reason}
    tiles = [] if rehearsing() else CANDIDATES[key]
    file.add("tiles", _passes.timed_tiles(key, tiles, shape, _dtype(), gpu(), failed=failed))
    return []


def _check_apart(module: str, name: str, file: ResultsFile, seconds: float) -> Problems:
    """A check that needs most of the GPU's memory."""
    found = run_apart(module, name, seconds)
    return [f"{part} {what}" for part, what in (found or {}).items()]


def _of_shapes(kind: str, time_shape: Callable[..., Problems], need: float, most: float) -> dict[str, Task]:
    return {f"{kind} {shape.name}": Task(partial(time_shape, shape), need, most) for shape in SHAPES}


def _tasks() -> dict[str, Task]:
    by_attention = _of_shapes("attention", _time_attention, 30.0, 80.0)
    by_slices = _of_shapes("slices", _time_slices, 8.0, 10.0)
    by_kernels = _of_shapes("kernels", _time_kernels, 8.0, 10.0)
    by_vocabulary = {
        f"vocabulary {size.name}, {divergence}": Task(partial(_time_vocabulary, size, divergence), 15.0, 30.0)
        for size in SIZES
        for divergence in DIVERGENCES
    }
    by_relation = {f"relation {size.name}": Task(partial(_time_relation, size), 10.0, 20.0) for size in _relation.SIZES}
    by_tiles = {f"tiles {key[0]} D{key[2]}": Task(partial(_time_tiles, key), 8.0, 15.0) for key in CANDIDATES}
    modules = {"attention": _exactness_attention, "vocabulary": _exactness_distillation}
    by_size = {
        f"large {kind}, {name}": Task(partial(_check_apart, module.MODULE, name), 30.0, 60.0)
        for kind, module in modules.items()
        for name in module.ALONE
    }
    every = {"rates": Task(_measure_rates, 5.0, 10.0)}
    every |= by_attention | by_slices | by_kernels | by_vocabulary | by_relation | by_tiles
    first = ["rates", "attention T4096", "attention T32768", "slices T4096", "kernels T4096", "vocabulary trained, jsd"]
    first += ["relation one-layer", "slices T32768", "kernels T32768", "vocabulary trained, forward_kl"]
    first += [name for name in by_tiles if name.endswith("D128")]
    last = {name: every.pop(name) for name in ("attention T131072", "slices T131072", "kernels T131072")} | by_size
    return {name: (every | last)[name] for name in dict.fromkeys([*first, *every, *last])}


def _checks() -> dict[str, tuple[str, str]]:
    """(module, name) of what is checked side by side, that of the timed shapes first; a preparation fills caches."""
    attention_checks = {name: (_exactness_attention.MODULE, name) for name in _exactness_attention.TOGETHER}
    others = {f"vocabulary-{name}": (_exactness_distillation.MODULE, name) for name in _exactness_distillation.TOGETHER}
    first = ["compile-T4096", "compile-T32768", *(n for n in attention_checks if n.startswith("bf16-d128-"))]
    first += [name for name in (*others, *attention_checks) if "bf16" in name]
    every = attention_checks | others
    return {f"check {name}": every[name] for name in dict.fromkeys([*first, *every])}


CHECKS = _checks()
TASKS = _tasks()
REHEARSED = {
    *(f"check {config}" for config in _exactness_attention.CONFIGS),
    *(f"check vocabulary-{config}" for config in _exactness_distillation.CONFIGS),
    *(name for name in TASKS if not name.startswith("large ")),
}


def work(file: ResultsFile, names: list[str], until: float) -> int:
    """Run tasks one by one; the exit code is DEAD if the device no longer answers."""
    for name in names:
        left, task = until - time.time(), TASKS[name]
        if left < task.need and not rehearsing():
            print(f"left out: {name}, which needs {task.need:.0f} s; {left:.0f} s are left", flush=True)
            continue
        if left < 0:
            break
        file.add("begun", {name: time.time()})
        start = time.monotonic()
        try:
            problems = task.run(file, min(left, task.most))
        except Exception as error:
            traceback.print_exc()
            problems = [one_line(error)]
        file.add("done", {name: problems})
        print(f"{'FAILED' if problems else 'ok':6} {name}: {time.monotonic() - start:.1f} s", *problems, flush=True)
        try:
            synchronize(gpu())
        except Exception as error:
            print(one_line(error), flush=True)
            return DEAD
        if gpu().type == "cuda":
            torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    raise SystemExit(work(ResultsFile.read(Path(sys.argv[1])), sys.argv[3:], float(sys.argv[2])))
