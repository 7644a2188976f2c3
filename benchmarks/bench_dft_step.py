"""What alignment costs a DFT step on the CPU: time and peak memory with VAT on, off, and from whole matrices.

`python -m pytest benchmarks/bench_dft_step.py`, about 5 minutes on two cores. Losses and gradients of VAT on are compared with
float64 first; then all ways take turns, so that other load on the machine meets all. Memory is that of fresh processes.
"""

import os
import statistics
import subprocess
import sys
import time

import pytest
import torch

from benchmarks._dft_step import EAGER, OFF, ON, SHAPES, WAYS, Step

pytestmark = pytest.mark.long

ROUNDS = {"T2048": 5, "T512": 9, "T128": 41}
MOST_TIME, MOST_MEMORY = 1.10, 1.05  # of VAT off


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def assert_exact(shape):
    """VAT on is at most twice as far from float64 as eager attention is, in the loss and every gradient."""
    exact = Step(EAGER, shape, torch.float64).gradients()
    eager, ours = (Step(way, shape).gradients() for way in (EAGER, ON))
    for x, y, z in zip(ours, eager, exact, strict=True):
        assert (x - z).abs().max() <= 2 * (y - z).abs().max() + 1e-5 * z.abs().max()


@pytest.mark.parametrize("name", SHAPES)
def test_time_of_a_step(benchmark, cpu_environment, target, one_thread, name):
    shape = SHAPES[name]
    assert_exact(shape)
    steps = {way: Step(way, shape) for way in WAYS}
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    for step in steps.values():
        step.run()

    def timed(way):
        start = time.perf_counter()
        steps[way].run()
        seconds[way].append(time.perf_counter() - start)

    def others():
        timed(OFF)
        timed(EAGER)

    benchmark.pedantic(timed, args=(ON,), setup=others, rounds=ROUNDS[name])
    median = {way: statistics.median(taken) for way, taken in seconds.items()}
    times = {way: taken / median[OFF] for way, taken in median.items()}
    benchmark.extra_info.update(cpu_environment, threads=1, shape=shape._asdict(), median_s=median, times_vat_off=times)
    target("time over VAT off", times[ON], at_most=MOST_TIME)


def test_peak_memory_of_a_step(benchmark, cpu_environment, target):
    """Both of what the step adds and of the whole process; freed blocks go back to the system at once."""
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    added, whole = {}, {}

    def measure():
        for way in WAYS:
            command = [sys.executable, "-m", "benchmarks._dft_step", way, "T2048"]
            printed = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
            added[way], whole[way] = map(float, printed.split()[-2:])

    benchmark.pedantic(measure, rounds=1)
    times = {way: mb / added[OFF] for way, mb in added.items()}
    benchmark.extra_info.update(
        cpu_environment,
        shape=SHAPES["T2048"]._asdict(),
        added_mb=added,
        whole_mb=whole,
        times_vat_off=times,
        whole_times_vat_off={way: mb / whole[OFF] for way, mb in whole.items()},
    )
    target("memory over VAT off", times[ON], at_most=MOST_MEMORY)
