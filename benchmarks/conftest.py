"""Shared by the benchmarks: what a result must say about where it was measured, and what needs a GPU."""

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
