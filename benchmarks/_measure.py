"""How times are taken, by events on a GPU and by the clock on a CPU; peak memory, the two ceilings, and the results file."""

import os
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

REHEARSAL = "CDISTILL_REHEARSAL"  # in the environment: tiny sizes on the CPU in the place of a GPU
CYCLES_PER_MS = 2_000_000  # of a GPU at its highest clock
MOST_REPEATS, FEWEST_REPEATS = 60, 2
MOST_ROUNDS, FEWEST_ROUNDS = 15, 3
LONGEST_WAIT_MS = 20.0
NO_FAILURES: Mapping[str, str] = {}

Row = dict[str, Any]  # of one contender


def rehearsing() -> bool:
    return REHEARSAL in os.environ


def gpu() -> torch.device:
    """What the GPU benchmarks run on."""
    return torch.device("cpu" if rehearsing() else "cuda")


def one_line(error: Exception) -> str:
    """The kind of an error and the first line of its text."""
    text = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {text[0][:200]}"


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _mark(device: torch.device) -> Any:
    """A point in time, of the device's queue."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _ms_between(first: Any, second: Any) -> float:
    return (second - first) * 1e3 if isinstance(first, float) else first.elapsed_time(second)


@cache
def _flushed(device: torch.device) -> Tensor:
    """Memory of twice the L2 cache; writing it leaves nothing else there."""
    return torch.empty(2 * torch.cuda.get_device_properties(device).L2_cache_size, dtype=torch.uint8, device=device)


def _settle(device: torch.device, host_ms: float) -> None:
    """Empty the L2 cache, and let the device wait until the host has issued ``host_ms`` of work: no gaps are timed."""
    if device.type == "cuda":
        _flushed(device).zero_()
        torch.cuda._sleep(int(min(1.5 * host_ms, LONGEST_WAIT_MS) * CYCLES_PER_MS))


class Sample(NamedTuple):
    """Milliseconds of one repeat; host is what issuing both took, a lower bound where the GPU waits for it."""

    forward: float
    backward: float
    both: float
    host: float


Forward = Callable[[], Any]
Backward = Callable[[Any], Any]


def samples(forward: Forward, backward: Backward, device: torch.device, seconds: float) -> list[Sample]:
    """Repeat a forward and its backward pass for about this long, after one or two that do not count."""
    host_ms, each = 0.0, 0.0
    for _ in range(2):
        synchronize(device)
        start = time.perf_counter()
        backward(forward())
        host_ms = (time.perf_counter() - start) * 1e3
        synchronize(device)
        each = time.perf_counter() - start
        if each > seconds and host_ms < 500 * each:  # long on the device, not because it was compiled
            break
    each += min(1.5 * host_ms, LONGEST_WAIT_MS) / 1e3 if device.type == "cuda" else 0.0
    marks = []
    for _ in range(max(FEWEST_REPEATS, min(MOST_REPEATS, int(seconds / each)))):
        _settle(device, host_ms)
        start = time.perf_counter()
        points = [_mark(device)]
        outputs = forward()
        points.append(_mark(device))
        backward(outputs)
        points.append(_mark(device))
        marks.append((*points, (time.perf_counter() - start) * 1e3))
        del outputs
    synchronize(device)
    return [Sample(_ms_between(a, b), _ms_between(b, c), _ms_between(a, c), host) for a, b, c, host in marks]


def one_sample(forward: Forward, backward: Backward, device: torch.device) -> Sample:
    """One repeat on the CPU, which works while the host waits."""
    points = [_mark(device)]
    outputs = forward()
    points.append(_mark(device))
    backward(outputs)
    points.append(_mark(device))
    both = _ms_between(points[0], points[2])
    return Sample(_ms_between(*points[:2]), _ms_between(*points[1:]), both, both)


def medians(found: list[Sample]) -> Sample:
    return Sample(*(statistics.median(x) for x in zip(*found, strict=True)))


def peak_mb(forward: Forward, backward: Backward, device: torch.device) -> float | None:
    """Memory that one forward and backward pass needs beyond its inputs, its results included; None on the CPU."""
    if device.type != "cuda":
        return None
    synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    backward(forward())
    synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / 1e6


@dataclass(frozen=True)
class Implementation:
    """One of several ways to compute the same; ``parts`` are the checks it stands on: empty for what is not ours."""

    name: str
    run: Callable[..., Any]
    parts: frozenset[str] = frozenset()


def judged(
    found: Iterable[Implementation],
    error_of: Callable[[Any], tuple[float, str]],
    failed: Mapping[str, str] = NO_FAILURES,
    deadline: float = float("inf"),
) -> tuple[dict[str, Row], list[str]]:
    """Rows of all ways with how exact they are, or why they are not timed; and what must fail the test.

    ``error_of`` gives the largest error over what is allowed, and the result that has it.
    """
    rows: dict[str, Row] = {}
    problems = []
    for way in found:
        row = rows[way.name] = {}
        if broken := [part for part in failed if way.parts and part in {"", *way.parts}]:
            row["skipped"] = f"its check failed: {broken[0]} {failed[broken[0]]}"
            continue
        if time.monotonic() > deadline:
            row["skipped"] = "out of time"
            continue
        try:
            ratio, name = error_of(way)
        except Exception as error:
            row["skipped"] = one_line(error)
            problems += [f"{way.name}: {row['skipped']}"] if way.parts else []
            continue
        row["error_over_allowed"] = ratio
        if ratio > 1 and way.parts:
            row["skipped"] = f"inexact at this shape: {name}"
            problems.append(f"{way.name}: {name}, error {ratio:.2f} times what is allowed")
    return rows, problems


def timings(halves: list[list[Sample]]) -> Row:
    """Medians; spread is by how much those of two halves differ."""
    found = [sample for half in halves for sample in half]
    values = {f"{name}_ms": value for name, value in medians(found)._asdict().items()}
    differences = [medians(half).both for half in halves]
    spread = 100 * (max(differences) - min(differences)) / values["both_ms"] if len(halves) > 1 else None
    return values | {"spread_percent": spread, "repeats": len(found)}


def passes(
    ready: Mapping[str, tuple[Forward, Backward]], device: torch.device, deadline: float, pass_seconds: float = 0.25
) -> dict[str, list[list[Sample]]]:
    """Two passes over all contenders, the second in reverse order; each has all samples of one in a row."""
    taken: dict[str, list[list[Sample]]] = {name: [] for name in ready}
    for name in [*ready, *reversed(ready)]:
        if time.monotonic() < deadline:
            taken[name].append(samples(*ready[name], device, pass_seconds))
    return taken


def rounds(
    ready: Mapping[str, tuple[Forward, Backward]], device: torch.device, deadline: float, seconds: float
) -> dict[str, list[list[Sample]]]:
    """Rounds in which all contenders take a turn, so that other load on the machine meets all; the first does not count."""
    taken: dict[str, list[list[Sample]]] = {name: [[], []] for name in ready}
    count, start = 1, time.monotonic()
    for number in range(1 + MOST_ROUNDS):
        if number > count or time.monotonic() > deadline:
            break
        for name, steps in ready.items():
            sample = one_sample(*steps, device)
            if number:
                taken[name][number % 2].append(sample)
        if not number:
            count = max(FEWEST_ROUNDS, int(seconds / (time.monotonic() - start + 1e-9)))
    return taken


def times_ours(theirs: list[Sample], own: list[Sample]) -> float:
    """How many times as long: the median over rounds, where both took turns."""
    if len(theirs) == len(own):
        return statistics.median(a.both / b.both for a, b in zip(theirs, own, strict=True))
    return medians(theirs).both / medians(own).both


def rates(device: torch.device, size: int = 8192, copied: int = 2**32, seconds: float = 0.3) -> dict[str, float]:
    """The ceilings, best of several: a product of random square matrices (bf16 on a GPU), a copy counting reads and writes."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    a, b = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
    source = torch.ones(copied, dtype=torch.uint8, device=device)
    destination = torch.empty_like(source)
    product = min(sample.forward for sample in samples(lambda: a @ b, lambda _: None, device, seconds))
    copy = min(sample.forward for sample in samples(lambda: destination.copy_(source), lambda _: None, device, seconds))
    return {"matmul_tflops": 2 * size**3 / product / 1e9, "copy_tb_per_s": 2 * copied / copy / 1e9}
