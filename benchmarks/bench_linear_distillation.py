"""linear_distillation on the CPU against eager and against liger-kernel's chunked loss, forward and backward.

`python -m pytest benchmarks/bench_linear_distillation.py`, about 3 minutes on two cores. All of them are compared with
float64 first, then timed in turns, so that other load on the machine meets all; claims are about the best rounds, which it
disturbs least. liger-kernel has JSD only; it is timed as it comes, which is compiled.
"""

import statistics
import time

import pytest
import torch

from benchmarks._contenders import DTYPES
from benchmarks._distillation import CHUNKED, DIVERGENCES, EAGER, OURS, Size, contenders, draw
from benchmarks._exactness_distillation import errors, results_of
from benchmarks._measure import judged
from benchmarks._results import version

_C = pytest.importorskip("cdistill._C", reason="cdistill._C was not built: nothing was measured")
pytestmark = pytest.mark.long

CPU = torch.device("cpu")
WIDTHS = ((256, 256), (256, 512), (512, 512))
ROUNDS = 5
CLAIM = 1.3


def claimed(rival: str, dtype: str, student: int) -> bool:
    """Whether we claim to be CLAIM times as fast; every other speedup is recorded all the same.

    The wider the student, the less there is beside the products, which nobody saves. In bf16 ours sums the head's gradient
    in fp32, liger-kernel in bf16.
    """
    return rival == EAGER or (rival == CHUNKED and dtype == "fp32" and student < 512)


def speedups(seconds: dict[str, float]) -> dict[str, float]:
    """Of ours over each rival."""
    return {name: taken / seconds[OURS] for name, taken in seconds.items() if name != OURS}


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("widths", WIDTHS, ids=lambda w: "{}-{}".format(*w))
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_is_faster_than_eager_and_liger(benchmark, cpu_environment, target, widths, dtype, divergence):
    torch._dynamo.reset()
    size = Size("cpu", 512, *widths, 32000)
    p = draw(size, DTYPES[dtype], CPU)
    found, left_out = contenders(size, divergence, CPU)
    found = [c for c in found if not c.alone]
    rows, problems = judged(found, errors(p, divergence))
    assert not problems, "\n".join(problems)

    runs = {c.name: c.run for c in found if "skipped" not in rows[c.name]}
    seconds: dict[str, list[float]] = {name: [] for name in runs}

    def timed(name):
        start = time.perf_counter()
        results_of(runs[name], p)
        seconds[name].append(time.perf_counter() - start)

    def rivals():
        for name in runs:
            if name != OURS:
                timed(name)

    benchmark.pedantic(timed, args=(OURS,), setup=rivals, rounds=ROUNDS)
    medians, best = ({name: of(taken) for name, taken in seconds.items()} for of in (statistics.median, min))
    benchmark.extra_info.update(
        cpu_environment,
        liger_kernel=version("liger-kernel"),
        threads=torch.get_num_threads(),
        isa=_C.isa(),
        size=f"{size} {dtype}",
        gflops=size.flops / medians[OURS] / 1e9,
        median_s=medians,
        speedup=speedups(medians),
        best_s=best,
        speedup_of_best=speedups(best),
        error_over_allowed={name: rows[name]["error_over_allowed"] for name in runs},
        left_out=left_out | {name: row["skipped"] for name, row in rows.items() if "skipped" in row},
    )
    for name, x in speedups(best).items():
        if claimed(name, dtype, size.student):
            target(f"times as fast as {name}", x, at_least=CLAIM)
