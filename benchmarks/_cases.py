"""Problems that several implementations compute, each checked against float64 before it is timed: `measured`."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from benchmarks import _by_definition, _contenders, _distillation, _exactness_distillation, _relation
from benchmarks._contenders import DTYPES, Problem, Shape
from benchmarks._exactness import worst
from benchmarks._measure import (
    NO_FAILURES,
    Backward,
    Forward,
    Implementation,
    Row,
    Sample,
    judged,
    passes,
    peak_mb,
    times_ours,
    timings,
)
from benchmarks._tables import PLAIN

ATTENTION = "attention with alignment"
VOCABULARY = "vocabulary layer"
RELATION = "attention relation"

Taken = dict[str, list[list[Sample]]]  # by contender: two halves
Timer = Callable[[Mapping[str, tuple[Forward, Backward]], torch.device, float], Taken]


@dataclass(frozen=True)
class Case:
    """One problem of an op: how its inputs are drawn, who can compute it, how exact a result is, what one step does."""

    op: str
    name: str
    size: str
    draw: Callable[[torch.dtype, torch.device], Any]
    contenders: Callable[[Any, torch.device], tuple[list[Any], dict[str, str]]]
    error_of: Callable[[Any], Callable[[Any], tuple[float, str]]]
    steps: Callable[[Any, Any], tuple[Forward, Backward]]
    flops: float  # of a forward and backward pass
    values: float  # that must be moved, each input and each result once
    tokens: int | None = None


def attention_steps(c: Implementation, p: Problem) -> tuple[Forward, Backward]:
    """One forward pass of a contender, and the gradients of q, k and v from its results."""

    def backward(results: Any) -> Any:
        out, losses = results
        outputs, grads = ([out], [p.dout]) if losses is None else ([out, losses], [p.dout, p.dlosses])
        return torch.autograd.grad(outputs, p.leaves, grads)

    return lambda: c.run(*p.inputs), backward


def _attention_errors(p: Problem) -> Callable[[_contenders.Contender], tuple[float, str]]:
    exact, same = (_by_definition.rows_alone(p, dtype) for dtype in (torch.float64, p.q.dtype))

    def error_of(c: _contenders.Contender) -> tuple[float, str]:
        aligned = 0 if c.plain else 1
        return worst(_by_definition.results_of(c.run, p), same[aligned], exact[aligned])

    return error_of


def attention(shape: Shape) -> Case:
    return Case(
        ATTENTION,
        shape.name,
        str(shape),
        partial(_contenders.draw, shape),
        lambda p, device: _contenders.contenders(shape, p),
        _attention_errors,
        attention_steps,
        shape.attention_flops,
        shape.least_values,
        shape.tokens,
    )


def vocabulary(size: _distillation.Size, divergence: str, compiling: bool = True) -> Case:
    """Not compiling: liger-kernel's chunked loss without torch.compile, which it uses by itself."""
    return Case(
        VOCABULARY,
        _distillation.shape_name(size, divergence),
        str(size),
        partial(_distillation.draw, size),
        lambda p, device: _distillation.contenders(size, divergence, device, compiling),
        lambda p: _exactness_distillation.errors(p, divergence),
        lambda c, p: (lambda: c.run(*p), lambda loss: torch.autograd.grad(loss, p.leaves)),
        size.flops,
        size.least_values,
    )


def _relation_errors(loss: str, x: _relation.Inputs) -> Callable[[_relation.Contender], tuple[float, str]]:
    same, exact = (_relation.results_of(_relation.chunked, loss, x.to(dtype)) for dtype in (x.q.dtype, torch.float64))
    return lambda c: worst(_relation.results_of(c.run, loss, x), same, exact)


def relation(size: _relation.Size, loss: str = "cosine") -> Case:
    return Case(
        RELATION,
        f"{size.name}, {loss}",
        str(size),
        partial(_relation.draw, size),
        lambda x, device: (list(_relation.CONTENDERS), {}),
        partial(_relation_errors, loss),
        lambda c, x: (lambda: c.run(loss, x), lambda found: torch.autograd.grad(found.sum(), x[:2])),
        2.0 * size.multiply_adds,
        size.least_values,
        size.tokens,
    )


def _plain_figures(rows: dict[str, Row]) -> None:
    """What attention takes beyond the fastest, and the thriftiest, that makes no loss."""
    floor = min((row["both_ms"] for name, row in rows.items() if name in PLAIN and "both_ms" in row), default=None)
    peaks = [row.get("peak_mb") for name, row in rows.items() if name.startswith("sdpa/") and "both_ms" in row]
    for row in rows.values():
        if floor is not None and "both_ms" in row:
            row["overhead_percent_over_best_plain"] = 100 * (row["both_ms"] / floor - 1)
            measured = row.get("peak_mb") is not None and peaks and None not in peaks
            row["extra_mb"] = row["peak_mb"] - min(peaks) if measured else None


def measured(
    case: Case,
    dtype: str,
    device: torch.device,
    *,
    failed: Mapping[str, str] = NO_FAILURES,
    seconds: float = 90.0,
    timer: Timer = passes,
    peaks: Mapping[str, float] | None = None,
) -> tuple[list[Row], list[str]]:
    """One row per contender, ours first, and what must fail the test.

    ``peaks``: MB by contender that were measured elsewhere, as on a CPU they must be.
    """
    deadline = time.monotonic() + seconds
    torch._dynamo.reset()
    problem = case.draw(DTYPES[dtype], device)
    found, left_out = case.contenders(problem, device)
    rows, problems = judged(found, case.error_of(problem), failed, deadline)
    ready = {c.name: case.steps(c, problem) for c in found if "skipped" not in rows[c.name]}
    own_peaks = peaks or {name: peak_mb(*steps, device) for name, steps in ready.items()}
    taken = timer(ready, device, deadline)
    own = [sample for half in taken.get(found[0].name, []) for sample in half]
    for c in found:
        row = rows[c.name]
        if "skipped" in row:
            continue
        if not any(taken[c.name]):
            row["skipped"] = "out of time"
            continue
        halves = [half for half in taken[c.name] if half]
        row |= timings(halves)
        row["times_ours"] = times_ours([sample for half in halves for sample in half], own) if own else None
        row["peak_mb"] = own_peaks.get(c.name)
        row["tflops"] = case.flops / row["both_ms"] / 1e9
        if getattr(c, "drops_gradient", False):
            row["wrong_gradients"] = True
    if case.op == ATTENTION:
        _plain_figures(rows)
    rows |= {name: {"skipped": reason} for name, reason in left_out.items()}
    same = {"op": case.op, "shape": case.name, "size": case.size, "tokens": case.tokens, "dtype": dtype}
    same |= {"flops": case.flops, "bytes": case.values * DTYPES[dtype].itemsize}
    return [{**same, "contender": name, **row} for name, row in rows.items()], problems
