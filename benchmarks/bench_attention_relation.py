"""attention_relation on the CPU: the C++ module against torch, chunked by rows as far as torch alone can.

`python -m pytest benchmarks/bench_attention_relation.py`, about 15 minutes on two cores. One layer of the paper's student
against a layer, or a window of five, of its teacher, with 2,880 visual tokens. `chunked` is what one would write with torch:
whole rows of scores of all heads, a chunk of rows at a time, each recomputed in the backward pass (torch.utils.checkpoint),
so that it stores no slice either. Both are compared with float64 first, then timed in turns; figures are medians.
"""

import statistics
import time
from dataclasses import replace

import pytest
import torch

from benchmarks._cases import relation
from benchmarks._cpu import peak_multiply_adds
from benchmarks._relation import CHUNKED, OURS, SIZES, Size, chunked, draw, ours, results_of

_C = pytest.importorskip("cdistill._C", reason="cdistill._C was not built: nothing was measured")
pytestmark = pytest.mark.long

ROUNDS = 3
TARGET = 3.0  # times as fast as chunked
CPU = torch.device("cpu")
WAYS = {OURS: ours, CHUNKED: chunked}


def assert_exact(size: Size, dtype: torch.dtype, loss: str) -> None:
    """Ours against float64: at most twice as far from it as the chunked way."""
    case, x = relation(size, loss), draw(size, dtype, CPU)
    own = case.contenders(x, CPU)[0][0]
    ratio, name = case.error_of(x)(own)
    assert ratio <= 1, f"{name}: error {ratio:.2f} times what is allowed"


@pytest.fixture(params=[1, 2], ids=lambda n: f"{n}-threads")
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("size", SIZES, ids=lambda size: size.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("loss", ["cosine", "kl"])
def test_is_faster_than_chunked_torch(benchmark, cpu_environment, target, loss, dtype, size, threads):
    assert_exact(replace(size, rows=70), dtype, loss)
    x = draw(size, dtype, CPU)
    forward_ms: dict[str, list[float]] = {way: [] for way in WAYS}
    both_ms: dict[str, list[float]] = {way: [] for way in WAYS}

    def timed(way: str) -> None:
        start = time.perf_counter()
        with torch.no_grad():
            WAYS[way](loss, x)
        forward_ms[way].append(1e3 * (time.perf_counter() - start))
        start = time.perf_counter()
        results_of(WAYS[way], loss, x)
        both_ms[way].append(1e3 * (time.perf_counter() - start))

    benchmark.pedantic(timed, args=(OURS,), setup=lambda: timed(CHUNKED), rounds=ROUNDS)
    forward, both = ({way: statistics.median(x) for way, x in of.items()} for of in (forward_ms, both_ms))
    rate = peak_multiply_adds("avx512" if _C.isa().startswith("avx512") else "avx2", threads) / 1e3
    faster = both[CHUNKED] / both[OURS]
    benchmark.extra_info.update(
        cpu_environment,
        threads=threads,
        isa=_C.isa(),
        dtype=str(dtype).removeprefix("torch."),
        loss=loss,
        size=str(size),
        forward_ms=forward,
        both_ms=both,
        floor_of_fp32_ms=size.multiply_adds / rate,
        times_as_fast_as_chunked={"forward": forward[CHUNKED] / forward[OURS], "both": faster},
    )
    target("times as fast as chunked", faster, at_least=TARGET)
