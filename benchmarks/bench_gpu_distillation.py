"""linear_distillation on a GPU: checked against float64, then timed against eager and liger-kernel's fused losses.

`pytest benchmarks/bench_gpu_distillation.py`, about 3 minutes. Odd shapes of every kind are checked first, in processes of
their own; a divergence that fails is not timed. Then every contender is compared with float64 at the size it is timed at:
forward, backward, both, peak memory, and the share of the time that the products alone would take at the rate of a large
one. Results go to benchmarks/results/<gpu>/distillation.json, or to the folder CDISTILL_RESULTS; `python -m
benchmarks.report` reads them.
"""

import time
from collections.abc import Mapping
from typing import Any

import pytest
import torch

from benchmarks import _exactness_distillation
from benchmarks._contenders import DTYPES
from benchmarks._distillation import DIVERGENCES, OURS, SIZES, Contender, Problem, Size, contenders, draw, shape_name
from benchmarks._exactness_distillation import ALONE, TOGETHER, errors
from benchmarks._measure import NO_FAILURES, Backward, Forward, ResultsFile, add_times, judged, rates, results_folder

pytestmark = pytest.mark.gpu

SECONDS = 190.0  # of the whole suite; what has not begun by then is left out
SIZE_SECONDS = 40.0
PASS_SECONDS = 0.2  # of one contender; there are two passes, the second in reverse order


def steps(c: Contender, p: Problem) -> tuple[Forward, Backward]:
    """One forward pass of a contender, and the gradients of the student from its result."""
    return lambda: c.run(*p), lambda loss: torch.autograd.grad(loss, p.leaves)


def measured(
    size: Size,
    divergence: str,
    dtype: str,
    device: torch.device,
    matmul_tflops: float,
    *,
    failed: Mapping[str, str] = NO_FAILURES,
    seconds: float = SIZE_SECONDS,
    pass_seconds: float = PASS_SECONDS,
    compiling: bool = True,
) -> tuple[list[dict[str, Any]], list[str]]:
    """One row per contender, and what must fail the test."""
    deadline = time.monotonic() + seconds
    torch._dynamo.reset()
    p = draw(size, DTYPES[dtype], device)
    found, left_out = contenders(size, divergence, device, compiling)
    rows, problems = judged(found, errors(p, divergence), failed, deadline)
    add_times(rows, lambda c: steps(c, p), found, device, deadline, pass_seconds)
    floor, own = size.flops / matmul_tflops / 1e9, rows[OURS].get("both_ms")
    for row in rows.values():
        if "both_ms" in row:
            row |= {"floor_ms": floor, "floor_percent": 100 * floor / row["both_ms"]}
            row["times_ours"] = None if own is None else row["both_ms"] / own
    rows |= {name: {"skipped": reason} for name, reason in left_out.items()}
    same = {"shape": shape_name(size, divergence), "size": str(size), "dtype": dtype}
    return [{**same, "contender": name, **row} for name, row in rows.items()], problems


@pytest.fixture(scope="module")
def checked(deadline) -> dict[str, dict[str, str]]:
    """Every check's result, by its name: what failed."""
    return _exactness_distillation.run_checks()


@pytest.fixture(scope="module")
def results(device, checked) -> ResultsFile:
    file = ResultsFile(results_folder(), device, "distillation")
    file.add("rates", rates(device))
    failed = {name: found for name, found in checked.items() if found}
    file.add("checks", {"passed": len(checked) - len(failed), "failed": failed})
    return file


@pytest.mark.parametrize("name", [*TOGETHER, *ALONE])
def test_matches_float64(name, checked):
    assert not checked[name], "\n".join(f"{part} {found}" for part, found in checked[name].items())


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("size", SIZES, ids=lambda s: s.name.replace(" ", "-"))
def test_time_of_linear_distillation(size, divergence, device, checked, results, deadline, benchmark):
    seconds = min(SIZE_SECONDS, deadline - time.monotonic())
    assert seconds > 0, "out of time: not measured"
    failed = {part: found for name in checked if name.startswith("bf16-") for part, found in checked[name].items()}
    ceiling = results.data["rates"]["matmul_tflops"]
    rows, problems = measured(size, divergence, "bf16", device, ceiling, failed=failed, seconds=seconds)
    results.add("rows", rows)
    benchmark.extra_info.update(size=str(size), rows=rows)
    own = rows[0]
    if "both_ms" in own:
        p = draw(size, torch.bfloat16, device)
        forward, backward = steps(contenders(size, divergence, device)[0][0], p)
        benchmark.pedantic(lambda: (backward(forward()), torch.cuda.synchronize()), rounds=3, warmup_rounds=1)
    assert not problems, "\n".join(problems)
    assert "both_ms" in own, own.get("skipped")
