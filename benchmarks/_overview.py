"""What `pytest benchmarks/` measures on any computer: problems of a laptop's size, and the memory of each contender.

`python -m benchmarks._overview NAME...` prints the MB that a step of each contender of a problem adds to this process at most.
"""

import contextlib
import ctypes
import json
import subprocess
import sys
from dataclasses import replace
from typing import NamedTuple

import torch

from benchmarks import _distillation, _relation
from benchmarks._cases import Case, attention, relation, vocabulary
from benchmarks._contenders import DTYPES, STACK, Shape
from benchmarks._results import ROOT

CPU = torch.device("cpu")
DTYPE = "fp32"
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


class Problem(NamedTuple):
    """A case; the same with tiny sizes, to load what a first call loads; and how many times as fast we claim to be."""

    case: Case
    tiny: Case
    claims: dict[str, float]


def _attention(shape: Shape) -> Problem:
    return Problem(attention(shape), attention(replace(shape, tokens=40, rows=3, cols=9)), {STACK: 1.0, "eager": 1.0})


def _vocabulary(size: _distillation.Size) -> Problem:
    tiny = replace(size, rows=8, vocab=101)
    claims = {_distillation.EAGER: 1.3, _distillation.THRIFTY: 1.3, _distillation.UNCOMPILED: 1.3}
    return Problem(*(vocabulary(x, "jsd", compiling=False) for x in (size, tiny)), claims)


def _relation_of(size: _relation.Size) -> Problem:
    tiny = replace(size, tokens=40, rows=3, cols=9)
    return Problem(relation(size), relation(tiny), {_relation.CHUNKED: 3.0})


# 16 heads of 64 are Qwen1.5-0.5B's; an image of 729 tokens is the paper's.
PROBLEMS = {
    "attention-T512": _attention(Shape("T512", 1, 16, 16, 512, 64, 64, 256)),
    "attention-T1024": _attention(Shape("T1024", 1, 16, 16, 1024, 64, 128, 729)),
    "attention-T2048": _attention(Shape("T2048", 1, 16, 16, 2048, 64, 128, 729)),
    "vocabulary": _vocabulary(_distillation.Size("trained", 256, 256, 256, 32000)),
    "relation": _relation_of(_relation.Size("one-layer", 16, 20, 1, 128, 729, 2048, 64)),
}


def _resident(field: str) -> float:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 / 1e6 for line in status if line.startswith(field))


def _forget_peak(libc: ctypes.CDLL) -> None:
    """Large blocks go back to the system when they are freed, so that those of the next pass count anew."""
    libc.mallopt(M_MMAP_THRESHOLD, 65536)
    libc.mallopt(M_TRIM_THRESHOLD, 65536)
    libc.malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as clear_refs:
        clear_refs.write("5")


def added_mb(problem: Problem, dtype: str = DTYPE) -> dict[str, float]:
    """What a forward and backward pass of each contender adds to this process at most.

    Nothing without /proc or glibc, nor of a contender that fails, which `measured` reports.
    """
    libc, found = ctypes.CDLL(None), {}
    try:
        _forget_peak(libc)
    except (OSError, AttributeError):
        return {}
    inputs, tiny = (case.draw(DTYPES[dtype], CPU) for case in problem[:2])
    small = {c.name: c for c in problem.tiny.contenders(tiny, CPU)[0]}
    for c in problem.case.contenders(inputs, CPU)[0]:
        with contextlib.suppress(Exception):
            forward, backward = problem.tiny.steps(small[c.name], tiny)
            backward(forward())
            forward, backward = problem.case.steps(c, inputs)
            _forget_peak(libc)
            before = _resident("VmRSS")
            backward(forward())
            found[c.name] = _resident("VmHWM") - before
    return found


def fresh_peaks(names: list[str]) -> dict[str, dict[str, float]]:
    """`added_mb` of these problems in a fresh process."""
    command = [sys.executable, "-m", "benchmarks._overview", *names]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"memory was not measured: {done.stderr.strip()[-500:] or f'exit {done.returncode}'}")
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    print(json.dumps({name: added_mb(PROBLEMS[name]) for name in sys.argv[1:]}))
