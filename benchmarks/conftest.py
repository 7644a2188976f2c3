"""Shared by the benchmarks: what a result must say about where it was measured, what needs a GPU, and targets.

A benchmark fails for a wrong result. A missed target is shown at the end of the run, and fails it with ``--strict`` only: cores
that are shared or slow say little of the code.
"""

import os
import platform
import time

import pytest
import torch


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (FileNotFoundError, StopIteration):
        return platform.processor() or platform.machine()


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU: nothing was measured")


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda")


@pytest.fixture(scope="module")
def deadline(request) -> float:
    """When a module's SECONDS are over."""
    return time.monotonic() + request.module.SECONDS


MISSED = pytest.StashKey[list[str]]()


@pytest.fixture
def target(request, benchmark):
    """A function that notes beside the result whether a measured number is ``at_least`` or ``at_most`` what it should be."""

    def note(name: str, value: float, *, at_least: float | None = None, at_most: float | None = None) -> None:
        met = (at_least is None or value >= at_least) and (at_most is None or value <= at_most)
        bound = f"at most {at_most:g}" if at_least is None else f"at least {at_least:g}"
        benchmark.extra_info.setdefault("targets", {})[name] = {"value": value, "target": bound, "met": met}
        if not met:
            line = f"{request.node.nodeid.rpartition('/')[2]}: {name} {value:.3g}, target {bound}"
            request.config.stash.setdefault(MISSED, []).append(line)
            if request.config.getini("strict"):
                pytest.fail(line, pytrace=False)

    return note


def pytest_terminal_summary(terminalreporter, config):
    missed = config.stash.get(MISSED, [])
    if missed:
        terminalreporter.section("targets missed (--strict makes them fail)")
        for line in missed:
            terminalreporter.line(line)


@pytest.fixture
def cpu_environment():
    """Processor, number of cores, load before the measurement, and versions, for ``benchmark.extra_info``."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
