"""attention_slice on the CPU: the C++ module against the torch implementation and against eager attention.

`python -m pytest benchmarks/bench_cpp_attention.py`, about 10 minutes on two cores. One layer of a model with 2,880 visual
tokens. All ways are compared with float64 first, then timed in turns, so that other load on the machine meets all; figures
are medians. `floor` is the time of the multiply-adds of the products alone at the rate that this processor reaches
with nothing else to do, measured in the same process: nobody can be faster than that.
"""

import statistics
import time
from typing import NamedTuple

import pytest
import torch

from benchmarks._cpu import peak_multiply_adds
from cdistill.ops import attention_slice

_C = pytest.importorskip("cdistill._C", reason="cdistill._C was not built: nothing was measured")
pytestmark = pytest.mark.long

ROUNDS = 5
MOST_TIMES_FLOOR = 1.6


class Size(NamedTuple):
    """One sample: an image of ``cols`` tokens near the start, the answer of ``rows`` tokens at the end."""

    q_heads: int
    k_heads: int
    rows: int
    cols: int
    tokens: int
    width: int

    def multiply_adds(self, own_lse: bool) -> tuple[int, int]:
        """Of the visible pairs of queries and keys, forward and backward: one product and three."""
        hidden = self.rows * (self.rows - 1) // 2 if own_lse else 0
        keys = self.tokens if own_lse else self.cols
        product = self.q_heads * self.width * (self.rows * keys - hidden)
        return product, 3 * product


SIZES = {
    "D128": Size(16, 16, 256, 2880, 4096, 128),
    "D128-GQA4": Size(16, 4, 256, 2880, 4096, 128),
    "D64": Size(16, 16, 256, 2880, 4096, 64),
}


class Kind(NamedTuple):
    """What is computed in, by which instructions; how many times as fast as torch, forward and with the backward pass.

    Processors that do one multiply-add of 512 bits at a time miss the target of AVX-512: the products alone may take more than
    that (``most_possible`` in the results).
    """

    dtype: torch.dtype
    isa: str
    target: tuple[float, float]


KINDS = {
    "fp32-avx512": Kind(torch.float32, "avx512", (4.0, 3.0)),
    "fp32-avx2": Kind(torch.float32, "avx2", (1.5, 1.3)),
    "bf16-avx512_bf16": Kind(torch.bfloat16, "avx512_bf16", (2.0, 1.5)),
    "bf16-avx2": Kind(torch.bfloat16, "avx2", (1.5, 1.3)),
    "fp16-avx512": Kind(torch.float16, "avx512", (1.5, 1.3)),
}


def supported(isa: str) -> bool:
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("CDISTILL_CPU_ISA", isa)
        try:
            return _C.isa() == isa
        except ValueError:
            return False


def draw(size: Size, dtype: torch.dtype, own_lse: bool):
    """q, k, rows, cols, an lse or None, and the gradient of the slice."""
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, h, size.tokens, size.width, generator=generator) for h in (size.q_heads, size.k_heads))
    rows = torch.arange(size.tokens - size.rows, size.tokens)[None]
    cols = torch.arange(size.cols)[None] + 16
    lse = None if own_lse else torch.full((1, size.q_heads, size.tokens), 9.0)
    return q.to(dtype), k.to(dtype), rows, cols, lse, torch.randn(1, size.rows, size.cols, generator=generator)


def eager(q, k, rows, cols, lse):
    """Whole scores of the rows, in the dtype of q; float32 or wider softmax."""
    group = q.shape[1] // k.shape[1]
    keys = k.repeat_interleave(group, 1)
    if lse is not None:
        keys = keys[:, :, cols[0]]
    scores = q[:, :, rows[0]] @ keys.mT * q.shape[3] ** -0.5
    if lse is not None:
        return (scores - lse[:, :, rows[0], None]).exp().mean(1)
    scores = scores.masked_fill(torch.arange(q.shape[2]) > rows[0][:, None], -torch.inf)
    wide = torch.promote_types(scores.dtype, torch.float32)
    return scores.softmax(-1, dtype=wide)[..., cols[0]].mean(1)


def ways():
    """Functions of (q, k, rows, cols, lse)."""

    def op(impl):
        return lambda q, k, rows, cols, lse: attention_slice(q, k, rows, cols, lse=lse, impl=impl)

    return {"cpp": op("cpp"), "torch": op("torch"), "eager": eager}


def forward_and_backward(way, q, k, rows, cols, lse, grad):
    leaves = [x.detach().requires_grad_() for x in (q, k)]
    a = way(*leaves, rows, cols, lse)
    return [a.detach(), *torch.autograd.grad(a, leaves, grad.to(a.dtype))]


def assert_exact(size: Size, dtype: torch.dtype, own_lse: bool) -> None:
    """Ours and torch's results against float64: at most twice as far from it as eager attention."""
    q, k, rows, cols, lse, grad = draw(size, dtype, own_lse)
    wide = None if lse is None else lse.double()
    exact = forward_and_backward(eager, q.double(), k.double(), rows, cols, wide, grad)
    found = {name: forward_and_backward(way, q, k, rows, cols, lse, grad) for name, way in ways().items()}
    for name in ("cpp", "torch"):
        for x, y, z in zip(found[name], found["eager"], exact, strict=True):
            assert (x - z).abs().max() <= 2 * (y - z).abs().max() + 1e-5 * z.abs().max(), name


@pytest.fixture(params=[1, 2], ids=lambda n: f"{n}-threads")
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("own_lse", [False, True], ids=["given-lse", "own-lse"])
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("kind", [pytest.param(kind, id=name) for name, kind in KINDS.items() if supported(kind.isa)])
def test_is_faster_than_torch(benchmark, cpu_environment, target, monkeypatch, kind, size, own_lse, threads):
    monkeypatch.setenv("CDISTILL_CPU_ISA", kind.isa)
    assert_exact(size, kind.dtype, own_lse)
    *arguments, grad = draw(size, kind.dtype, own_lse)
    forward: dict[str, list[float]] = {name: [] for name in ways()}
    both: dict[str, list[float]] = {name: [] for name in ways()}

    def timed(name):
        way = ways()[name]
        with torch.no_grad():
            start = time.perf_counter()
            way(*arguments)
            forward[name].append(1e3 * (time.perf_counter() - start))
        start = time.perf_counter()
        forward_and_backward(way, *arguments, grad)
        both[name].append(1e3 * (time.perf_counter() - start))

    def others():
        timed("torch")
        timed("eager")

    benchmark.pedantic(timed, args=("cpp",), setup=others, rounds=ROUNDS)
    forward_ms, both_ms = ({name: statistics.median(x) for name, x in of.items()} for of in (forward, both))
    rate = peak_multiply_adds(kind.isa, threads) / 1e3
    work = size.multiply_adds(own_lse)
    floor_forward, floor_both = work[0] / rate, sum(work) / rate
    faster = forward_ms["torch"] / forward_ms["cpp"], both_ms["torch"] / both_ms["cpp"]
    benchmark.extra_info.update(
        cpu_environment,
        threads=threads,
        isa=kind.isa,
        dtype=str(kind.dtype).removeprefix("torch."),
        size=size._asdict(),
        own_lse=own_lse,
        peak_multiply_adds=rate * 1e3,
        forward_ms=forward_ms,
        both_ms=both_ms,
        floor_forward_ms=floor_forward,
        floor_both_ms=floor_both,
        times_as_fast_as_torch={"forward": faster[0], "both": faster[1]},
        most_possible={"forward": forward_ms["torch"] / floor_forward, "both": both_ms["torch"] / floor_both},
    )
    for name, found, least in zip(("forward", "both"), faster, kind.target, strict=True):
        target(f"times as fast as torch, {name}", found, at_least=least)
    if size == SIZES["D128"] and not own_lse and kind.isa == "avx512" and kind.dtype == torch.float32:
        target("forward over its floor", forward_ms["cpp"] / floor_forward, at_most=MOST_TIMES_FLOOR)
