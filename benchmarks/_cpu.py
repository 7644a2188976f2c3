"""What the processor can do at most: multiply-adds per second of each instruction set, measured."""

import ctypes
import subprocess
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

CHAINS = 12
STEPS = 10_000_000
MULTIPLY_ADDS = {"avx2": 8, "avx512": 16, "avx512_bf16": 32}  # of one instruction


@cache
def _library() -> ctypes.CDLL:
    compiler = (sysconfig.get_config_var("CXX") or "c++").split()[0]
    source = Path(__file__).with_name("_fma_peak.cpp")
    with tempfile.TemporaryDirectory() as folder:
        library = f"{folder}/fma_peak.so"
        subprocess.run([compiler, "-O3", "-shared", "-fPIC", "-std=gnu++17", source, "-o", library], check=True)
        return ctypes.CDLL(library)


def peak_multiply_adds(isa: str, threads: int) -> float:
    """Multiply-adds per second, fp32 or pairs of bf16, with this many threads: the best of five short runs."""
    run = getattr(_library(), f"peak_{isa}")
    run.restype, run.argtypes = ctypes.c_double, [ctypes.c_long]
    with ThreadPoolExecutor(threads) as pool:
        slowest = min(max(pool.map(run, [STEPS] * threads)) for _ in range(5))
    return threads * STEPS * CHAINS * MULTIPLY_ADDS[isa] / slowest
