"""What is timed of single passes on a GPU: those over the slice, beside their floors, and kernels with other tiles."""

from collections.abc import Mapping
from typing import Any

import torch
from cdistill.kernels import _launch
from cdistill.kernels._launch import Tile
from torch.profiler import ProfilerActivity, profile

from benchmarks._cases import attention_steps
from benchmarks._contenders import DTYPES, Contender, Problem, Shape, draw, own_flash
from benchmarks._exactness_attention import tile_in_use, tile_name
from benchmarks._measure import NO_FAILURES, Backward, Forward, medians, samples, synchronize
from cdistill.ops import AttentionProblem, attention_alignment, attention_slice
from cdistill.ops._engine import attention_forward
from cdistill.ops._engines import engine

PASS_SECONDS = 0.25
TILE_SECONDS = 0.15
PROFILED, MOST_KERNELS = 3, 20  # passes; rows that are kept
TILE_SHAPES = {128: "T4096", 64: "T4096 D64"}


def lse_of(p: Problem) -> torch.Tensor:
    x = AttentionProblem(*(y.detach() for y in p.leaves), scale=p.q.shape[3] ** -0.5)
    return attention_forward(engine(None, x), x)[1]


def given_lse(p: Problem, impl: str) -> tuple[Forward, Backward]:
    """The alignment alone, from an LSE that attention has already made."""
    leaves = (*p.leaves[:2], lse_of(p).requires_grad_())

    def forward() -> torch.Tensor:
        return attention_alignment(*leaves[:2], p.target, p.rows, p.cols, lse=leaves[2], impl=impl)

    return forward, lambda losses: torch.autograd.grad(losses, leaves, p.dlosses)


def slice_given_lse(p: Problem, impl: str) -> tuple[Forward, Backward]:
    """The slice alone, without gradients."""
    q, k, lse = (x.detach() for x in (*p.leaves[:2], lse_of(p)))
    return lambda: attention_slice(q, k, p.rows, p.cols, lse=lse, impl=impl), lambda _: None


def slice_passes(
    shape: Shape, dtype: str, device: torch.device, ceilings: Mapping[str, float], seconds: float = PASS_SECONDS
) -> list[dict[str, Any]]:
    """Time of each pass over the slice beside its floor: the larger of its products and its bytes, at measured rates.

    Products: one forward; backward S and dq, then S and dk. Bytes: every input once, every result once.
    """
    p = draw(shape, DTYPES[dtype], device)
    one = medians(samples(*slice_given_lse(p, "triton"), device, seconds))
    both = medians(samples(*given_lse(p, "triton"), device, seconds))
    size = p.q.element_size() * shape.batch * shape.width
    vectors = size * (shape.q_heads * shape.rows + shape.kv_heads * shape.cols)
    gradients = size * (shape.q_heads + shape.kv_heads) * shape.tokens
    passes = {
        "slice forward": (one.forward, 1, vectors + shape.slice_bytes),
        "alignment forward": (both.forward, 1, vectors + 2 * shape.slice_bytes),
        "alignment backward": (both.backward, 4, vectors + 2 * shape.slice_bytes + gradients),
    }
    rows = []
    for name, (ms, products, moved) in passes.items():
        arithmetic = products * shape.product_flops / ceilings["matmul_tflops"] / 1e9
        floor = max(arithmetic, moved / ceilings["copy_tb_per_s"] / 1e9)
        flops = products * shape.product_flops
        row = {"shape": shape.name, "pass": name, "dtype": dtype, "ms": ms, "floor_ms": floor}
        rows.append(row | {"flops": flops, "bytes": moved, "tflops": flops / ms / 1e9})
    return rows


def kernel_times(shape: Shape, dtype: str, device: torch.device, contender: Contender) -> list[dict[str, Any]]:
    """Time of each kernel in a forward and backward pass, by torch's profiler; of each operator where a CPU rehearses."""
    forward, backward = attention_steps(contender, draw(shape, DTYPES[dtype], device))
    backward(forward())
    cuda = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as found:
        for _ in range(PROFILED):
            backward(forward())
        synchronize(device)
    same = {"shape": shape.name, "contender": contender.name, "dtype": dtype}
    rows = []
    for event in found.key_averages():
        ms = (event.self_device_time_total if cuda else event.self_cpu_time_total) / 1e3 / PROFILED
        rows.append({**same, "kernel": event.key[:70], "ms": ms, "calls": event.count / PROFILED})
    return sorted((row for row in rows if row["ms"]), key=lambda row: -row["ms"])[:MOST_KERNELS]


def timed_tiles(
    key: tuple[str, int, int],
    tiles: list[Tile],
    shape: Shape,
    dtype: str,
    device: torch.device,
    *,
    failed: Mapping[str, str] = NO_FAILURES,
    seconds: float = TILE_SECONDS,
) -> list[dict[str, Any]]:
    """Time of one kernel's pass with the tile of the table and with others that passed their check."""
    kernel, p = key[0], draw(shape, DTYPES[dtype], device)
    if kernel.startswith("flash"):
        forward, backward = attention_steps(Contender("", own_flash), p)
    else:
        forward, backward = (slice_given_lse if kernel == "slice_forward" else given_lse)(p, "triton")
    rows, current = [], _launch.attention_tile(kernel, p.q)
    for tile in [current, *(t for t in tiles if t != current)]:
        row = {"kernel": kernel, "width": key[2], "shape": shape.name, "dtype": dtype}
        row |= {"tile": f"{tile.BM}x{tile.BN}", "num_warps": tile.num_warps, "num_stages": tile.num_stages}
        row["in_table"] = tile == current
        if reason := failed.get(tile_name(key, tile)):
            row["skipped"] = f"its check failed: {reason}"
        else:
            with tile_in_use(key, tile):
                found = medians(samples(forward, backward, device, seconds))
            row["ms"] = found.forward if kernel.endswith("forward") else found.backward
        rows.append(row)
    return rows
