"""Inputs for the attention op tests, and the rule by which results are compared with float64."""

from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile


@dataclass(frozen=True)
class Case:
    """Sizes and options of one attention op call; padding is the number of -1 rows and columns of the last sample."""

    batch: int = 2
    q_heads: int = 4
    k_heads: int = 2
    tokens: int = 37
    width: int = 16
    rows: int = 7
    cols: int = 11
    padding: int = 2
    causal: bool = True
    scale: float | None = None
    masked: str = ""  # "left" or "right": the side of the padding keys
    transposed: bool = False  # q and k are views of (B,T,H,D) tensors
    dtype: torch.dtype = torch.float32

    def options(self, inputs):
        """Keyword arguments of the ops for this case."""
        return {"causal": self.causal, "scale": self.scale, "key_mask": inputs["key_mask"]}


CASES = {
    "gqa": Case(),
    "full-left": Case(causal=False, masked="left", k_heads=1, width=40, scale=0.4, rows=5, tokens=19),
    "transposed-right": Case(masked="right", q_heads=2, k_heads=2, width=24, transposed=True),
    "causal-left": Case(masked="left", q_heads=2, k_heads=1, rows=20, cols=20, tokens=21, padding=3),
    "many-tiles": Case(batch=1, q_heads=1, k_heads=1, tokens=140, rows=66, cols=133, padding=5),
    "wide": Case(batch=1, q_heads=1, k_heads=1, tokens=9, rows=3, cols=5, width=256, padding=1),
}


NEEDED_CPU_FLAGS = {
    "avx512_bf16": {"avx512f", "avx512dq", "avx512vl", "avx512bw", "avx512_bf16"},
    "avx512": {"avx512f", "avx512dq", "avx512vl", "avx512bw"},
    "avx2": {"avx2", "fma"},
    "portable": set(),
}


def runs_on_this_processor(isa):
    """Whether this processor runs the kernels of an instruction set, by the system's own list of its flags."""
    flags = set(Path("/proc/cpuinfo").read_text().split("flags", 1)[-1].split("\n", 1)[0].split())
    return NEEDED_CPU_FLAGS[isa] <= flags


ISAS = [isa for isa in NEEDED_CPU_FLAGS if runs_on_this_processor(isa)]


def device_of(impl):
    """Where this implementation is tested."""
    return "cuda" if impl == "triton" and torch.cuda.is_available() else "cpu"


def positions(case, count, generator):
    """Distinct positions (B,count) in random order, the last sample with -1 at random places."""
    drawn = torch.stack([torch.randperm(case.tokens, generator=generator)[:count] for _ in range(case.batch)])
    if case.padding:
        drawn[-1, torch.randperm(count, generator=generator)[: case.padding]] = -1
    return drawn


def draw(case, seed=0):
    """q, k, rows, cols, key_mask and a target slice per head (B,Hq,R,V) of a case, on the CPU."""
    generator = torch.Generator().manual_seed(seed)

    def normal(heads):
        if case.transposed:
            return torch.randn(case.batch, case.tokens, heads, case.width, generator=generator).transpose(1, 2)
        return torch.randn(case.batch, heads, case.tokens, case.width, generator=generator)

    key_mask = None
    if case.masked:
        key_mask = torch.ones(case.batch, case.tokens, dtype=torch.bool)
        hidden = case.tokens // 3
        key_mask[-1, slice(0, hidden) if case.masked == "left" else slice(-hidden, None)] = False
    q, k = (normal(heads).to(case.dtype) for heads in (case.q_heads, case.k_heads))
    return {
        "q": q,
        "k": k,
        "rows": positions(case, case.rows, generator),
        "cols": positions(case, case.cols, generator),
        "key_mask": key_mask,
        "target": torch.rand(case.batch, case.q_heads, case.rows, case.cols, generator=generator) / case.tokens,
    }


def moved(inputs, device):
    """The same inputs on a device, strides kept."""
    return {name: None if x is None else x.to(device) for name, x in inputs.items()}


def with_gradients(function, leaves, grad=None):
    """Result of function(*leaves) and the gradients of its leaves for the upstream gradient grad (ones by default)."""
    leaves = [x.detach().requires_grad_() for x in leaves]
    result = function(*leaves)
    result.backward(torch.ones_like(result) if grad is None else grad.to(result))
    return [result.detach(), *(x.grad for x in leaves)]


def assert_as_exact_as_eager(ours, eager, exact):
    """|ours - exact| <= 2 * |eager - exact| + 1e-5 * |exact|, in the maximum norm, for each pair of results."""
    for index, (x, y, z) in enumerate(zip(ours, eager, exact, strict=True)):
        x, y = x.cpu().double(), y.double()
        assert x.shape == z.shape
        error, allowed = (x - z).abs(), 2 * (y - z).abs().max() + 1e-5 * z.abs().max()
        assert error.max() <= allowed, f"result {index}: error {error.max():.3e}, allowed {allowed:.3e}"


def _memory_events(step):
    """Bytes that torch's CPU allocator hands out (or, below 0, takes back) during a step, in order."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    return [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]


def allocations(step):
    """Sizes in bytes of the tensors that are made on the CPU during a step, also inside registered ops."""
    return [n for n in _memory_events(step) if n > 0]


def peak_memory(step):
    """Bytes that torch's CPU allocator holds at most at one time during a step."""
    return max(accumulate(_memory_events(step)))
