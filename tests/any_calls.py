"""A call of a public op that hypothesis thinks of, beside its definition, and how the two are compared."""

import os
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from hypothesis import strategies as st
from op_cases import ISAS, device_of

from cdistill.ops import _pieces, _relation

FLOOR = 2.0**-20  # a few roundings of fp32, in which kernels sum
NEIGHBOURS = 8


@dataclass(frozen=True)
class Way:
    """How an op is run: what decides which code computes the same numbers."""

    isa: str = ISAS[0]
    threads: int = 1  # beside one, where the bits must not change
    rows: int = 0  # of an attention_relation at a time; 0: as many as usual
    uncounted: bool = False  # whether documents are cut as on a GPU, without a look at their rows


@dataclass(repr=False)
class Call:
    """An op and its definition, their arguments on the CPU, and what is differentiated.

    The gradient of each result is None, where nothing is differentiated through it, a number, a tensor, or a kind of tensor:
    "random", "transposed" (in memory), "expanded" (one number for all).
    """

    op: Callable[..., Any]
    oracle: Callable[..., Any]
    leaves: dict[str, torch.Tensor]  # of which gradients are asked for
    constants: dict[str, Any]
    settings: dict[str, Any]  # arguments of the op alone
    upstream: list[Any]
    sizes: dict[str, float]  # by what an error of a score's gradient is multiplied on its way to a leaf
    unit: float = 1.0  # what the results' terms are as large as
    untouched: dict[str, torch.Tensor] = field(default_factory=dict)  # leaves' numbers whose gradient is exactly zero
    slopes: bool = False  # whether gradients in the logarithm of a leaf are compared, too: its numbers are far apart
    same_bits: bool = False  # whether cpp's results are the same on any number of threads
    way: Way = Way()
    seed: int = 0
    definition: dict[str, Any] | None = None  # in place of "settings" where the definition takes them otherwise

    def __repr__(self) -> str:
        said = {name: _said(x) for name, x in {**self.leaves, **self.constants, **self.settings}.items()}
        return f"{self.op.__name__}({said}, gradients of {list(self.leaves)} for {self.upstream}, {self.way})"


def _said(x: Any) -> Any:
    if isinstance(x, torch.Tensor):
        return f"{str(x.dtype).removeprefix('torch.')}{list(x.shape)}{list(x.stride())}"
    return [_said(y) for y in x] if isinstance(x, list | tuple) and any(torch.is_tensor(y) for y in x) else x


def _like(x: Any, dtype: torch.dtype | None = None, device: str = "cpu") -> Any:
    """x with its floating tensors in a dtype, all on a device."""
    if isinstance(x, torch.Tensor):
        return x.to(device, dtype) if dtype is not None and x.is_floating_point() else x.to(device)
    return type(x)(_like(y, dtype, device) for y in x) if isinstance(x, list | tuple) else x


def _results(function: Callable[..., Any], leaves: dict[str, Any], rest: dict[str, Any], gradients: Callable[..., Any]):
    """Results of a function, gradients of its leaves for those of its results, and the latter."""
    leaves = {name: x.detach().requires_grad_() for name, x in leaves.items()}
    found = function(**leaves, **rest)
    found = [found] if isinstance(found, torch.Tensor) else [x for x in found if x is not None]
    upstream = gradients(found)
    made = []
    if leaves:
        used = [(x, g.to(x)) for x, g in zip(found, upstream, strict=True) if g is not None and x.requires_grad]
        made = [torch.zeros_like(x) for x in leaves.values()]
        if used:  # of a definition there may be nothing that depends on a leaf
            outputs, given = zip(*used, strict=True)
            made = torch.autograd.grad(outputs, list(leaves.values()), given, materialize_grads=True)
    return [x.detach() for x in found], list(made), upstream


def _upstream(call: Call, found: list[torch.Tensor]) -> list[torch.Tensor | None]:
    generator = torch.Generator().manual_seed(call.seed)

    def made(kind: Any, x: torch.Tensor) -> torch.Tensor | None:
        if kind is None or not isinstance(kind, str):
            return None if kind is None else torch.as_tensor(kind).to(x).expand(x.shape)
        if kind == "expanded":
            return torch.full((), 1.5).to(x).expand(x.shape)
        g = torch.randn(x.shape, generator=generator).to(x)
        return g.mT.contiguous().mT if kind == "transposed" and g.dim() > 1 else g

    kinds = [*call.upstream, *[None] * (len(found) - len(call.upstream))]
    return [made(kind, x) for kind, x in zip(kinds, found, strict=True)]


def _ours(call: Call):
    """What the op gives: the same bits again, and with any number of threads if it says so."""
    impl = call.settings.get("impl")
    device, way = device_of(impl if call.settings.get("engine") != "triton" else "triton"), call.way
    given = call.leaves, call.constants | call.settings
    leaves, rest = ({name: _like(x, device=device) for name, x in of.items()} for of in given)
    threads = torch.get_num_threads()
    with ExitStack() as stack:
        stack.enter_context(mock.patch.dict(os.environ, {"CDISTILL_CPU_ISA": way.isa}))
        if way.uncounted:
            stack.enter_context(mock.patch.object(_pieces, "counts_at_once", lambda positions: False))
        for name in ("CPU_ROWS", "CUDA_ROWS", "FEWEST_ROWS") if way.rows else ():
            stack.enter_context(mock.patch.object(_relation, name, way.rows))
        stack.callback(torch.set_num_threads, threads)
        found = []
        for count in (1, way.threads) if call.same_bits and impl in ("cpp", None) else (threads,):
            torch.set_num_threads(count)
            found.append(_results(call.op, leaves, rest, lambda x: _upstream(call, x)))
    for results, gradients, _ in found[1:]:
        for x, y in zip([*results, *gradients], [*found[0][0], *found[0][1]], strict=True):
            assert torch.equal(_bits(x), _bits(y)), "other bits with another number of threads"
    return found[0]


def _with_slopes(call: Call, results: list[torch.Tensor], gradients: list[torch.Tensor]) -> list[torch.Tensor]:
    """What is compared, in float64 on the CPU."""
    found = [x.cpu().double() for x in [*results, *gradients]]
    if not call.slopes:
        return found
    pairs = zip(call.leaves.values(), found[len(results) :], strict=True)
    return found + [torch.where(x == 0, 0.0, x * gradient) for x, gradient in pairs]


def _bits(x: torch.Tensor) -> torch.Tensor:
    return x.flatten().clone(memory_format=torch.contiguous_format).view(torch.uint8)


def _largest(x: torch.Tensor) -> float:
    return float(x.abs().max()) if x.numel() else 0.0


def _beside(x: Any, generator: torch.Generator) -> Any:
    """Floating numbers that are up to an ulp off."""
    if isinstance(x, list | tuple):
        return type(x)(_beside(y, generator) for y in x)
    if not isinstance(x, torch.Tensor) or not x.is_floating_point():
        return x
    step = 2 * torch.finfo(x.dtype).eps * (torch.rand(x.shape, generator=generator) - 0.5)
    return (x.double() * (1 + step)).to(x.dtype)


def check(call: Call) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Results and gradients against the definition in float64: |ours - exact| <= 2 |eager - exact| + 1e-5 |exact| + floor.

    Norms are maxima. Eager is the definition in the call's own dtypes. Where it happens to be nearer to the exact result than
    its arithmetic is, because roundings cancel, its error is the largest of a few calls that are an ulp off. Where fp16 has no
    number for what eager makes (the least share, a score beyond 65504) eager is fp32, and 1e-5 becomes 2^-9, the roundings of
    an fp16 result and of a factor. The floor is that of terms that cancel exactly in eager: 2^-20 of their size for results,
    and for gradients what 2^-20 of the gradient of a score becomes. What is given in half precision may be an ulp of the
    largest number further off: heads of a group, documents and chunks are rounded before they are added.
    """
    results, gradients, upstream = _ours(call)
    upstream = [None if g is None else g.cpu() for g in upstream]
    most = max((_largest(g) for g in upstream if g is not None), default=0.0)
    half = [x.dtype for x in call.leaves.values() if x.dtype == torch.float16]
    ours = _with_slopes(call, results, gradients)

    def by_definition(leaves: dict[str, Any], constants: dict[str, Any], dtype: torch.dtype | None):
        given = [{name: _like(x, dtype) for name, x in of.items()} for of in (leaves, constants)]
        given[1] |= {} if call.definition is None else {"settings": call.definition}
        made = _results(call.oracle, *given, lambda found: upstream)
        return _with_slopes(call, made[0], made[1])

    exact = by_definition(call.leaves, call.constants, torch.float64)
    floors = [FLOOR * call.unit * (x.is_floating_point()) for x in results]
    floors += [FLOOR * most * call.sizes[name] for name in call.leaves]
    floors = [x + 2.0**-24 * (y.dtype == torch.float16) for x, y in zip(floors, [*results, *gradients], strict=True)]
    floors += [FLOOR * most] * (len(ours) - len(floors))
    ulps = [torch.finfo(x.dtype).eps if x.dtype.itemsize == 2 else 0.0 for x in [*results, *gradients]]
    ulps += [0.0] * (len(ours) - len(ulps))
    for name, x in zip(call.leaves, gradients, strict=True):
        assert x.dtype == call.leaves[name].dtype
        if name in call.untouched:
            assert not x.cpu()[call.untouched[name]].any(), f"{name} has a gradient where it is not asked"
    generator, eager, coarse = torch.Generator().manual_seed(call.seed), [0.0] * len(exact), False
    for neighbour in range(NEIGHBOURS):
        near = [
            {name: _beside(x, generator) if neighbour else x for name, x in of.items()}
            for of in (call.leaves, call.constants)
        ]
        there = by_definition(*near, torch.float64) if neighbour else exact
        rough = by_definition(*near, torch.float32 if coarse else None)
        if (
            half
            and not coarse
            and not all(y.isfinite().eq(z.isfinite()).all() for y, z in zip(rough, there, strict=True))
        ):
            coarse, rough = True, by_definition(*near, torch.float32)
        eager = [max(e, _difference(y, z)) for e, y, z in zip(eager, rough, there, strict=True)]
        errors = [_difference(x, z) for x, z in zip(ours, exact, strict=True)]
        allowed = [
            2 * e + (2.0**-9 if coarse else ulp + 1e-5) * _largest(z.masked_fill(z.isinf(), 0.0)) + floor
            for e, z, ulp, floor in zip(eager, exact, ulps, floors, strict=True)
        ]
        if all(error <= most for error, most in zip(errors, allowed, strict=True)):
            return results, gradients
    raise AssertionError(f"{call}\nerrors {errors}\nallowed {allowed}")


def _difference(x: torch.Tensor, exact: torch.Tensor) -> float:
    """The largest one, infinite where one of both is not finite and not the other."""
    assert x.shape == exact.shape, (x.shape, exact.shape)
    same = x.double() == exact
    return _largest((x.double() - exact).masked_fill(same, 0.0).nan_to_num(nan=torch.inf))


class Drawing:
    """What calls are made of: choices are hypothesis's, numbers those of a generator that it seeds."""

    def __init__(self, draw: Any, impls: list[str | None]):
        self.draw, self.seed = draw, draw(st.integers(0, 2**32))
        self.generator = torch.Generator().manual_seed(self.seed)
        self.impl = draw(st.sampled_from(impls))
        self.small = self.impl == "triton"
        self.dtypes = [torch.float32, torch.float16, torch.bfloat16]
        if self.small and not torch.cuda.is_available():
            self.dtypes.pop()
        self.dtype = self.one_of(*self.dtypes)

    def one_of(self, *values: Any) -> Any:
        return self.draw(st.sampled_from(values))

    def number(self, low: int, high: int) -> int:
        return self.draw(st.integers(low, high))

    def chance(self, one_in: int) -> bool:
        return self.number(1, one_in) == one_in

    def some(self, *names: str) -> list[str]:
        """At least one of them."""
        return [name for name in names if self.chance(2)] or list(names)

    def way(self) -> Way:
        return Way(self.one_of(*ISAS), self.number(2, 7), self.one_of(0, 1, 2, 5), self.chance(4))

    def laid_out(self, x: torch.Tensor, inner: int = 0, alike: int = 9) -> torch.Tensor:
        """x in memory that it shares with NaN, its axes but the ``inner`` last in any order; or one of the ``alike`` first
        expanded.
        """
        outer = x.dim() - inner
        if outer * alike > 0 and x.numel() and self.chance(12):
            return x.narrow(self.number(0, min(outer, alike) - 1), 0, 1).expand_as(x)
        order = [*self.draw(st.permutations(range(outer))), *range(outer, x.dim())]
        gap, step = self.one_of(0, 0, 3, 8), self.one_of(1, 1, 2) if inner == 0 else 1
        y = x.permute(order)
        made = torch.full((*y.shape[:-1], y.shape[-1] * step + gap), torch.nan if x.is_floating_point() else 1).to(
            x.dtype
        )
        made[..., gap::step] = y
        return made[..., gap::step].permute([order.index(axis) for axis in range(x.dim())])

    def normal(self, *shape: int, dtype: torch.dtype | None = None, inner: int = 1) -> torch.Tensor:
        factor = self.one_of(1.0, 1.0, 1.0, 0.1, 4.0)
        x = factor * torch.randn(*shape, generator=self.generator)
        return self.laid_out(x.to(dtype or self.dtype), inner)

    def positions(self, batch: int, first: int, tokens: int, most: int, count: int | None = None) -> torch.Tensor:
        """Distinct positions (B,N) from ``first`` below ``tokens`` in any order, any number of them -1."""
        count = self.number(0 if self.chance(8) else 1, most) if count is None else count
        found = torch.full((batch, count), -1)
        for b in range(batch):
            kept = self.number(0, min(count, tokens - first))
            kept = min(count, tokens - first) if self.chance(2) else kept
            places = torch.randperm(count, generator=self.generator)[:kept]
            found[b, places] = first + torch.randperm(tokens - first, generator=self.generator)[:kept]
        return self.laid_out(found.to(self.one_of(torch.int32, torch.int64, torch.int16)), alike=1)

    def cut(self, tokens: int) -> list[int]:
        """cu_seqlens with documents that may be empty."""
        return [0, *sorted(self.number(0, tokens) for _ in range(self.number(0, 4))), tokens]

    def as_given(self, documents: list[int]) -> Any:
        kind = self.one_of(list, torch.int32, torch.int64)
        return documents if kind is list else torch.tensor(documents, dtype=kind)

    def mask(self, batch: int, tokens: int) -> torch.Tensor:
        kept = torch.rand(batch, tokens, generator=self.generator) < self.one_of(0.1, 0.5, 0.9)
        return self.laid_out(kept)

    def comparison(self, losses: tuple[str, ...]) -> dict[str, Any]:
        reduction, sink_filter = self.one_of(("row", False), ("matrix", False), ("column", False), ("column", True))
        return {"loss": self.one_of(*losses), "reduction": reduction, "sink_filter": sink_filter}

    def kinds(self, count: int) -> list[Any]:
        """Gradients of results, at least of one."""
        found = [self.one_of("random", "random", "transposed", "expanded", None) for _ in range(count)]
        return found if any(found) else ["random"] * count
