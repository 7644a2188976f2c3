"""Shared by the benchmarks: what a result must say about where it was measured."""

import os
import platform

import pytest
import torch


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (FileNotFoundError, StopIteration):
        return platform.processor() or platform.machine()


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
