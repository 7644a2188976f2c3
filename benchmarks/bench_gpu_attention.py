"""Attention with its alignment loss on a GPU: checked against float64, then timed against what a user has without us.

`pytest benchmarks/bench_gpu_attention.py`, about 6 minutes. Every launch configuration is checked first, in processes of
their own; what fails is not timed. Then, in this process, every contender of every shape is compared with float64 at that
shape and timed: forward, backward (each after a fresh forward: compiled functions free what they saved), both, and peak
memory. Results go to benchmarks/results/<gpu>/attention.json, or to the folder CDISTILL_RESULTS; `python -m
benchmarks.report` reads them.
"""

import time
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from cdistill.kernels import _launch
from cdistill.kernels._launch import Tile

from benchmarks import _exactness_attention
from benchmarks._by_definition import results_of, rows_alone
from benchmarks._contenders import DTYPES, PLAIN, SHAPES, Contender, Problem, Shape, contenders, draw, own_flash
from benchmarks._exactness import worst
from benchmarks._exactness_attention import ALONE, CANDIDATES, CHECKS, tile_in_use, tile_name
from benchmarks._measure import (
    NO_FAILURES,
    Backward,
    Forward,
    ResultsFile,
    Row,
    add_times,
    judged,
    medians,
    rates,
    results_folder,
    samples,
)
from cdistill.ops import AttentionProblem, attention_alignment, attention_slice
from cdistill.ops._engine import attention_forward
from cdistill.ops._engines import engine

pytestmark = pytest.mark.gpu

SECONDS = 500.0  # of the whole suite; what has not begun by then is left out
SHAPE_SECONDS = 90.0
PASS_SECONDS = 0.25  # of one contender; there are two passes, the second in reverse order
TILE_SECONDS = 0.15
TILE_SHAPES = {128: "T4096", 64: "T4096 D64"}


def steps(run, p: Problem) -> tuple[Forward, Backward]:
    """One forward pass of a contender, and the gradients of q, k and v from its results."""

    def backward(results: Any) -> Any:
        out, losses = results
        outputs, grads = ([out], [p.dout]) if losses is None else ([out, losses], [p.dout, p.dlosses])
        return torch.autograd.grad(outputs, p.leaves, grads)

    return lambda: run(*p.inputs), backward


def compared(
    found: list[Contender], p: Problem, failed: Mapping[str, str], deadline: float
) -> tuple[dict[str, Row], list[str]]:
    """`judged` by float64 at this shape."""
    exact, same = (rows_alone(p, dtype) for dtype in (torch.float64, p.q.dtype))

    def error_of(c: Contender) -> tuple[float, str]:
        aligned = 0 if c.plain else 1
        return worst(results_of(c.run, p), same[aligned], exact[aligned])

    return judged(found, error_of, failed, deadline)


def measured(
    shape: Shape,
    dtype: str,
    device: torch.device,
    *,
    failed: Mapping[str, str] = NO_FAILURES,
    seconds: float = SHAPE_SECONDS,
    pass_seconds: float = PASS_SECONDS,
) -> tuple[list[dict[str, Any]], list[str]]:
    """One row per contender, and what must fail the test."""
    deadline = time.monotonic() + seconds
    torch._dynamo.reset()
    p = draw(shape, DTYPES[dtype], device)
    found, left_out = contenders(shape, p)
    rows, problems = compared(found, p, failed, deadline)
    add_times(rows, lambda c: steps(c.run, p), found, device, deadline, pass_seconds)
    peaks = {name: row["peak_mb"] for name, row in rows.items() if row.get("peak_mb") is not None}
    plain_peaks = [peak for name, peak in peaks.items() if name.startswith("sdpa/")]
    for c in found:
        row, peak = rows[c.name], peaks.get(c.name)
        if "skipped" in row:
            continue
        row["tflops"] = shape.attention_flops / row["both_ms"] / 1e9
        row["extra_mb"] = None if peak is None or not plain_peaks else peak - min(plain_peaks)
        if c.drops_gradient:
            row["wrong_gradients"] = True
    floor = min((row["both_ms"] for name, row in rows.items() if name in PLAIN and "both_ms" in row), default=None)
    for row in rows.values():
        if floor is not None and "both_ms" in row:
            row["overhead_percent_over_best_plain"] = 100 * (row["both_ms"] / floor - 1)
    rows |= {name: {"skipped": reason} for name, reason in left_out.items()}
    return [{"shape": shape.name, "contender": name, "dtype": dtype, **row} for name, row in rows.items()], problems


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
        tflops = products * shape.product_flops / ms / 1e9
        rows.append({"shape": shape.name, "pass": name, "dtype": dtype, "ms": ms, "floor_ms": floor, "tflops": tflops})
    return rows


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
        forward, backward = steps(own_flash, p)
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


@pytest.fixture(scope="module")
def checked(device, deadline) -> dict[str, dict[str, str]]:
    """Every check's result, by its name: what failed."""
    return _exactness_attention.run_checks()


@pytest.fixture(scope="module")
def results(device, checked) -> ResultsFile:
    file = ResultsFile(results_folder(), device)
    file.add("rates", rates(device))
    names = [*CHECKS, *ALONE]
    failed = {name: checked[name] for name in names if checked[name]}
    file.add("checks", {"passed": len(names) - len(failed), "failed": failed})
    return file


def failed_parts(checked: dict[str, dict[str, str]], width: int) -> dict[str, str]:
    """What failed in the configurations that the timed problems of this head dimension use."""
    names = [name for name in checked if name.startswith(f"bf16-d{width}-")]
    return {part: found for name in names for part, found in checked[name].items()}


@pytest.mark.parametrize("name", [*CHECKS, *ALONE])
def test_matches_float64(name, checked):
    assert not checked[name], "\n".join(f"{part} {found}" for part, found in checked[name].items())


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: s.name.replace(" ", "-"))
def test_time_of_attention_with_alignment(shape, device, checked, results, deadline, benchmark):
    seconds = min(SHAPE_SECONDS, deadline - time.monotonic())
    failed = failed_parts(checked, shape.width)
    rows, problems = measured(shape, "bf16", device, failed=failed, seconds=seconds)
    results.add("rows", [{**row, "size": str(shape)} for row in rows])
    benchmark.extra_info.update(size=str(shape), rows=rows)
    ours = rows[0]
    if "both_ms" in ours:
        p = draw(shape, torch.bfloat16, device)
        found = contenders(shape, p)[0][0]
        forward, backward = steps(found.run, p)
        benchmark.pedantic(lambda: (backward(forward()), torch.cuda.synchronize()), rounds=3, warmup_rounds=1)
    assert not problems, "\n".join(problems)
    assert "both_ms" in ours, ours.get("skipped")


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: s.name.replace(" ", "-"))
def test_time_of_the_slice_passes(shape, device, checked, results, benchmark):
    broken = failed_parts(checked, shape.width).keys() & {"", "slice", "alignment"}
    assert not broken, "their checks failed"
    rows = slice_passes(shape, "bf16", device, results.data["rates"])
    results.add("slices", rows)
    benchmark.extra_info.update(size=str(shape), rows=rows)
    forward, _ = slice_given_lse(draw(shape, torch.bfloat16, device), "triton")
    benchmark.pedantic(lambda: (forward(), torch.cuda.synchronize()), rounds=3, warmup_rounds=1)


@pytest.mark.parametrize("key", CANDIDATES, ids=lambda k: f"{k[0]}-d{k[2]}")
def test_time_of_other_tiles(key, device, checked, results, deadline):
    assert time.monotonic() < deadline, "out of time: not measured"
    shape = next(s for s in SHAPES if s.name == TILE_SHAPES[key[2]])
    failed = {name: "; ".join(parts.values()) for name, parts in checked.items() if parts}
    rows = timed_tiles(key, CANDIDATES[key], shape, "bf16", device, failed=failed)
    results.add("tiles", rows)
    assert rows[0]["in_table"] and rows[0]["ms"] > 0
