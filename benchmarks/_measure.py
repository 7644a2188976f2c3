"""How the GPU benchmark measures: device time by events, peak memory, the two ceilings of the GPU, and the results file."""

import json
import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable
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


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def environment(device: torch.device) -> dict[str, Any]:
    """Where, when and with what the results were made."""
    cuda = device.type == "cuda"
    changes = _output("git", "status", "--porcelain", "--untracked-files=no")
    driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if cuda else None
    packages = ("triton", "flash-attn", "flash-attn-3", "flash-attn-4")
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
            **{name: _version(name) for name in packages if _version(name)},
        },
    }


def results_folder() -> Path:
    """benchmarks/results, or what CDISTILL_RESULTS says."""
    return Path(os.environ.get("CDISTILL_RESULTS") or ROOT / "benchmarks/results")


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


class ResultsFile:
    """attention.json of one GPU, written anew whenever something is added, so that a cut-off run leaves its results."""

    def __init__(self, folder: Path, device: torch.device):
        self.data: dict[str, Any] = environment(device)
        self.path = folder / slug(self.data["gpu"]) / "attention.json"

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
