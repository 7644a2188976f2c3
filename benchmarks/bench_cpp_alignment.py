"""attention_alignment on the CPU: the C++ module against the torch implementation, forward and backward.

`python -m pytest benchmarks/bench_cpp_alignment.py`. The size is one layer of a student with 1440 visual tokens. Both are
checked against float64 first, then timed in turns, so that other load on the machine meets both; on a busy machine read
the processor seconds. FLOPs are those of the visible pairs: one product forward and three backward over the slice, and
as many over all keys where the op computes the LSE itself.
"""

import statistics
import time

import pytest
import torch

from cdistill.ops import attention_alignment

_C = pytest.importorskip("cdistill._C", reason="cdistill._C was not built: nothing was measured")

HEADS, ROWS, COLS, TOKENS, WIDTH = 16, 256, 1440, 2048, 64
ROUNDS = 5


def draw():
    """One sample: an image of COLS tokens near the start, the answer at the end."""
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, HEADS, TOKENS, WIDTH, generator=generator) for _ in range(2))
    rows = torch.arange(TOKENS - ROWS, TOKENS)[None]
    cols = torch.arange(COLS)[None] + 16
    target = torch.rand(1, ROWS, COLS, generator=generator) / TOKENS
    return q, k, target, rows, cols


def masked_scores(q, k, rows):
    """Scores of the rows with all keys (1,H,R,T), -inf where causality hides the key."""
    scores = q[:, :, rows[0]] @ k.mT * WIDTH**-0.5
    return scores.masked_fill(torch.arange(TOKENS) > rows[0][:, None], -torch.inf)


def oracle(q, k, target, rows, cols, lse):
    """Row-cosine alignment and its gradients by eager attention, in the dtype of its inputs."""
    leaves = [x.detach().requires_grad_() for x in (q, k)]
    scores = masked_scores(*leaves, rows)
    own = scores.logsumexp(-1) if lse is None else lse[:, :, rows[0]].to(q.dtype)
    a = (scores - own[..., None]).exp().mean(1)[:, :, cols[0]]
    loss = (1 - torch.nn.functional.cosine_similarity(a, target.to(q.dtype), dim=-1)).mean(-1)
    return [loss.detach(), *torch.autograd.grad(loss.sum(), leaves)]


def run(impl, q, k, target, rows, cols, lse):
    leaves = [x.detach().requires_grad_() for x in (q, k)]
    loss = attention_alignment(*leaves, target, rows, cols, lse=lse, impl=impl)
    return [loss.detach(), *torch.autograd.grad(loss.sum(), leaves)]


@pytest.fixture(params=[1, 2], ids=lambda n: f"{n}-threads")
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("given_lse", [True, False], ids=["given-lse", "own-lse"])
def test_alignment_is_at_least_as_fast_as_torch(benchmark, cpu_environment, given_lse, threads):
    q, k, target, rows, cols = draw()
    lse = None
    if given_lse:
        lse = torch.zeros(1, HEADS, TOKENS)
        lse[:, :, rows[0]] = masked_scores(q, k, rows).logsumexp(-1)
    arguments = (q, k, target, rows, cols, lse)
    exact = oracle(q.double(), k.double(), target, rows, cols, None if lse is None else lse.double())
    eager = oracle(*arguments)
    for impl in ("cpp", "torch"):
        for x, y, z in zip(run(impl, *arguments), eager, exact, strict=True):
            assert (x - z).abs().max() <= 2 * (y - z).abs().max() + 1e-5 * z.abs().max(), impl

    wall = {"cpp": [], "torch": []}
    processor = {"cpp": [], "torch": []}

    def timed(impl):
        start, start_processor = time.perf_counter(), time.process_time()
        run(impl, *arguments)
        wall[impl].append(time.perf_counter() - start)
        processor[impl].append(time.process_time() - start_processor)

    benchmark.pedantic(timed, args=("cpp",), setup=lambda: timed("torch"), rounds=ROUNDS)
    ours, theirs = (statistics.median(wall[impl]) for impl in ("cpp", "torch"))
    pairs = int((cols[0] <= rows[0][:, None]).sum())
    if not given_lse:
        pairs += int((rows[0] + 1).sum())
    gflop = 4 * 2 * HEADS * pairs * WIDTH / 1e9
    benchmark.extra_info.update(
        cpu_environment,
        threads=threads,
        isa=_C.isa(),
        size=f"B1 H{HEADS} R{ROWS} V{COLS} T{TOKENS} D{WIDTH} fp32",
        cpp_gflops=gflop / ours,
        torch_gflops=gflop / theirs,
        torch_median_s=theirs,
        speedup=theirs / ours,
        cpp_processor_s=statistics.median(processor["cpp"]),
        torch_processor_s=statistics.median(processor["torch"]),
    )
    assert ours <= theirs
