"""attention_relation on the CPU: the C++ module against torch, chunked by rows as far as torch alone can.

`python -m pytest benchmarks/bench_attention_relation.py`, about 15 minutes on two cores. One layer of the paper's student
against a layer, or a window of five, of its teacher, with 2,880 visual tokens. `chunked` is what one would write with torch:
whole rows of scores of all heads, a chunk of rows at a time, each recomputed in the backward pass (torch.utils.checkpoint),
so that it stores no slice either. Both are compared with float64 first, then timed in turns; figures are medians.
"""

import statistics
import time
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from benchmarks._cpu import peak_multiply_adds
from cdistill.ops import attention_relation

_C = pytest.importorskip("cdistill._C", reason="cdistill._C was not built: nothing was measured")

ROUNDS = 3
CHUNK = 64  # rows
TARGET = 3.0  # times as fast as chunked


class Size(NamedTuple):
    """One sample: an image of ``cols`` tokens near the start, the answer of ``rows`` tokens at the end."""

    student_heads: int
    teacher_heads: int
    window: int
    rows: int
    cols: int
    tokens: int
    width: int

    def multiply_adds(self) -> int:
        """Of the visible pairs that any way must multiply: one product forward, three backward, one for each layer."""
        pairs = self.rows * self.tokens - self.rows * (self.rows - 1) // 2
        return self.width * pairs * (4 * self.student_heads + self.window * self.teacher_heads)


SIZES = {
    "one-layer": Size(16, 20, 1, 256, 2880, 4096, 128),
    "window-of-5": Size(16, 20, 5, 256, 2880, 4096, 128),
    "long-answer": Size(16, 20, 1, 1024, 2880, 4096, 128),
}


class Inputs(NamedTuple):
    """Of attention_relation; both sides see what stands before them."""

    q: Tensor
    k: Tensor
    teacher_q: list[Tensor]
    teacher_k: list[Tensor]
    rows: Tensor
    cols: Tensor

    def to(self, dtype: torch.dtype) -> "Inputs":
        layers = ([x.to(dtype) for x in layers] for layers in (self.teacher_q, self.teacher_k))
        return Inputs(self.q.to(dtype), self.k.to(dtype), *layers, self.rows, self.cols)


def draw(size: Size, dtype: torch.dtype) -> Inputs:
    generator = torch.Generator().manual_seed(0)

    def normal(heads: int) -> Tensor:
        return torch.randn(1, heads, size.tokens, size.width, generator=generator).to(dtype)

    q, k = normal(size.student_heads), normal(size.student_heads)
    layers = [[normal(size.teacher_heads) for _ in range(size.window)] for _ in range(2)]
    rows = torch.arange(size.tokens - size.rows, size.tokens)[None]
    return Inputs(q, k, *layers, rows, torch.arange(size.cols)[None] + 16)


def ours(loss: str, x: Inputs) -> Tensor:
    return attention_relation(x.q, x.k, x.teacher_q, x.teacher_k, x.rows, x.cols, loss=loss, impl="cpp")


def head_mean(q: Tensor, k: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
    """Slice (r,V) of some rows: whole rows of scores in the dtype of q, softmax in float32 or wider."""
    scores = (q[:, :, rows] @ k.mT * q.shape[3] ** -0.5).masked_fill(
        torch.arange(q.shape[2]) > rows[:, None], -torch.inf
    )
    return scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32))[0, :, :, cols].mean(0)


def row_distances(a: Tensor, t: Tensor, loss: str) -> Tensor:
    """Sum over rows."""
    if loss == "cosine":
        return (1 - torch.cosine_similarity(a, t, dim=1)).sum()
    a, t = a / a.sum(1, keepdim=True), t / t.sum(1, keepdim=True)
    return (t * (t.log() - a.log())).sum()


def chunked(loss: str, x: Inputs) -> Tensor:
    """The same with torch alone."""

    def chunk(q: Tensor, k: Tensor, rows: Tensor) -> Tensor:
        with torch.no_grad():
            layers = zip(x.teacher_q, x.teacher_k, strict=True)
            target = sum(head_mean(*layer, rows, x.cols[0]) for layer in layers) / len(x.teacher_q)
        return row_distances(head_mean(q, k, rows, x.cols[0]), target, loss)

    parts = [checkpoint(chunk, x.q, x.k, rows, use_reentrant=False) for rows in x.rows[0].split(CHUNK)]
    return torch.stack(parts).sum(0, keepdim=True) / x.rows.shape[1]


WAYS = {"cpp": ours, "chunked": chunked}


def forward_and_backward(way: str, loss: str, x: Inputs) -> list[Tensor]:
    """Loss and the gradients of q and k."""
    x = x._replace(q=x.q.detach().requires_grad_(), k=x.k.detach().requires_grad_())
    found = WAYS[way](loss, x)
    return [found.detach(), *torch.autograd.grad(found.sum(), (x.q, x.k))]


def assert_exact(size: Size, dtype: torch.dtype, loss: str) -> None:
    """Ours against float64: at most twice as far from it as the chunked way."""
    x = draw(size, dtype)
    exact = forward_and_backward("chunked", loss, x.to(torch.float64))
    found, other = (forward_and_backward(way, loss, x) for way in WAYS)
    for a, b, z in zip(found, other, exact, strict=True):
        assert (a - z).abs().max() <= 2 * (b - z).abs().max() + 1e-5 * z.abs().max()


@pytest.fixture(params=[1, 2], ids=lambda n: f"{n}-threads")
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("loss", ["cosine", "kl"])
def test_is_faster_than_chunked_torch(benchmark, cpu_environment, target, loss, dtype, size, threads):
    assert_exact(size._replace(rows=70), dtype, loss)
    x = draw(size, dtype)
    forward_ms: dict[str, list[float]] = {way: [] for way in WAYS}
    both_ms: dict[str, list[float]] = {way: [] for way in WAYS}

    def timed(way: str) -> None:
        start = time.perf_counter()
        with torch.no_grad():
            WAYS[way](loss, x)
        forward_ms[way].append(1e3 * (time.perf_counter() - start))
        start = time.perf_counter()
        forward_and_backward(way, loss, x)
        both_ms[way].append(1e3 * (time.perf_counter() - start))

    benchmark.pedantic(timed, args=("cpp",), setup=lambda: timed("chunked"), rounds=ROUNDS)
    forward, both = ({way: statistics.median(x) for way, x in of.items()} for of in (forward_ms, both_ms))
    rate = peak_multiply_adds("avx512" if _C.isa().startswith("avx512") else "avx2", threads) / 1e3
    faster = both["chunked"] / both["cpp"]
    benchmark.extra_info.update(
        cpu_environment,
        threads=threads,
        isa=_C.isa(),
        dtype=str(dtype).removeprefix("torch."),
        loss=loss,
        size=size._asdict(),
        forward_ms=forward,
        both_ms=both,
        floor_of_fp32_ms=size.multiply_adds() / rate,
        times_as_fast_as_chunked={"forward": forward["chunked"] / forward["cpp"], "both": faster},
    )
    target("times as fast as chunked", faster, at_least=TARGET)
