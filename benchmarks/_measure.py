"""How the GPU benchmarks measure: device time by events, peak memory, the two ceilings of the GPU, and the results file."""

import json
import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

ROOT = Path(__file__).parent.parent
CYCLES_PER_MS = 2_000_000  # of a GPU at its highest clock
MOST_REPEATS, FEWEST_REPEATS = 60, 2
LONGEST_WAIT_MS = 20.0
NO_FAILURES: Mapping[str, str] = {}

Row = dict[str, Any]  # of one contender


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


def medians(found: list[Sample]) -> Sample:
    return Sample(*(statistics.median(x) for x in zip(*found, strict=True)))


def peak_bytes(forward: Forward, backward: Backward, device: torch.device) -> int | None:
    """Memory that one forward and backward pass needs beyond its inputs, its results included; None on the CPU."""
    if device.type != "cuda":
        return None
    synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    backward(forward())
    synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


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


def timings(found: list[Sample], repeated: list[Sample]) -> dict[str, float]:
    """Medians over two passes; spread is by how much their medians differ."""
    all_of, first, second = medians(found + repeated), medians(found), medians(repeated or found)
    values = {f"{name}_ms": value for name, value in all_of._asdict().items()}
    spread = 100 * abs(first.both - second.both) / all_of.both if repeated else None
    return values | {"spread_percent": spread, "repeats": len(found) + len(repeated)}


def add_times(
    rows: dict[str, Row],
    steps_of: Callable[[Any], tuple[Forward, Backward]],
    found: Iterable[Implementation],
    device: torch.device,
    deadline: float,
    pass_seconds: float,
) -> None:
    """Time and peak memory of what `judged` let pass, in two passes, the second in reverse order."""
    ready = {way.name: steps_of(way) for way in found if "skipped" not in rows[way.name]}
    peaks = {name: peak_bytes(*steps, device) for name, steps in ready.items()}
    taken: dict[str, list[list[Sample]]] = {name: [] for name in ready}
    for name in [*ready, *reversed(ready)]:
        if time.monotonic() < deadline:
            taken[name].append(samples(*ready[name], device, pass_seconds))
    for name, passes in taken.items():
        if not passes:
            rows[name]["skipped"] = "out of time"
            continue
        peak = peaks[name]
        rows[name].update(timings(*passes, *[[]] * (2 - len(passes))))
        rows[name]["peak_mb"] = None if peak is None else peak / 1e6


def rates(device: torch.device, size: int = 8192, copied: int = 2**32, seconds: float = 0.3) -> dict[str, float]:
    """The ceilings of this GPU now: a bf16 product of random square matrices, and a copy counting reads and writes."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    a, b = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
    source = torch.ones(copied, dtype=torch.uint8, device=device)
    destination = torch.empty_like(source)
    product = medians(samples(lambda: a @ b, lambda _: None, device, seconds)).forward
    copy = medians(samples(lambda: destination.copy_(source), lambda _: None, device, seconds)).forward
    return {"matmul_tflops": 2 * size**3 / product / 1e9, "copy_tb_per_s": 2 * copied / copy / 1e9}


def _output(*command: str) -> str | None:
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (FileNotFoundError, subprocess.CalledProcessError):
        return None


def version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def environment(device: torch.device) -> dict[str, Any]:
    """Where, when and with what the results were made."""
    cuda = device.type == "cuda"
    changes = _output("git", "status", "--porcelain", "--untracked-files=no")
    driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if cuda else None
    packages = ("triton", "flash-attn", "flash-attn-3", "flash-attn-4", "liger-kernel")
    return {
        "gpu": torch.cuda.get_device_name(device) if cuda else "none",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _output("git", "rev-parse", "HEAD") or os.environ.get("CDISTILL_COMMIT"),
        "uncommitted_changes": None if changes is None else bool(changes),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version() if cuda else None,
            "driver": driver.splitlines()[0] if driver else None,
            **{name: version(name) for name in packages if version(name)},
        },
    }


def results_folder() -> Path:
    """benchmarks/results, or what CDISTILL_RESULTS says."""
    return Path(os.environ.get("CDISTILL_RESULTS") or ROOT / "benchmarks/results")


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


class ResultsFile:
    """NAME.json of one GPU, written anew whenever something is added, so that a cut-off run leaves its results."""

    def __init__(self, folder: Path, device: torch.device, name: str = "attention"):
        self.data: dict[str, Any] = environment(device)
        self.path = folder / slug(self.data["gpu"]) / f"{name}.json"

    def add(self, section: str, found: Any) -> None:
        """Put ``found`` into a section; lists grow."""
        if isinstance(found, list):
            self.data.setdefault(section, []).extend(found)
        else:
            self.data[section] = found
        self.path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self.path.with_suffix(".part")
        unfinished.write_text(json.dumps(self.data, indent=1) + "\n")
        unfinished.replace(self.path)
