"""What must hold before attention is timed, against float64: `python -m benchmarks._exactness_attention NAME` runs a check."""

import contextlib
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from unittest import mock

import torch
from cdistill.kernels import _launch
from cdistill.kernels._launch import Tile
from torch import Tensor

from benchmarks._by_definition import attention_by_definition, results_of
from benchmarks._contenders import DTYPES, SHAPES, Problem, Shape, contenders, draw
from benchmarks._exactness import Check, InexactError, Results, check_assertion, fault, gradients, main, worst
from benchmarks._measure import rehearsing
from cdistill.ops import (
    AttentionProblem,
    attention_alignment,
    attention_relation,
    attention_slice,
    attention_slice_accumulate,
    attention_with_alignment,
    flash_attention,
    reference,
)
from cdistill.ops._engines import ENGINES

MODULE = "benchmarks._exactness_attention"


@dataclass(frozen=True)
class Config:
    """One launch configuration of all kernels: what they are compiled for, at odd sizes."""

    dtype: str
    width: int
    q_heads: int = 4
    kv_heads: int = 2
    masks: tuple[str, ...] = ("left", "right")  # "" for none
    causal: bool = True
    tokens: int = 389
    rows: int = 70
    cols: int = 133

    def __str__(self) -> str:
        heads = "mha" if self.q_heads == self.kv_heads else "gqa"
        words = [self.dtype, f"d{self.width}", heads, *("masked" for _ in self.masks[:1] if self.masks[0])]
        return "-".join(words if self.causal else [*words, "full"])


CONFIGS = [
    config
    for dtype in ("bf16", "fp16", "fp32")
    for width in (64, 128)
    for config in (Config(dtype, width), Config(dtype, width, 3, 3, ("",)))
]
CONFIGS += [Config(dtype, width, masks=("",)) for dtype in ("bf16", "fp32") for width in (16, 32)]
CONFIGS += [Config("bf16", 40, masks=("",)), Config("bf16", 128, masks=("",), causal=False)]
CONFIGS += [Config(dtype, 256, 2, 1, ("left",)) for dtype in ("bf16", "fp32")]


@dataclass
class Drawn:
    """Inputs of one configuration: ragged rows and columns in any order, padding in the last sample."""

    q: Tensor
    k: Tensor
    v: Tensor
    rows: Tensor
    cols: Tensor
    target: Tensor
    dout: Tensor
    dlse: Tensor
    da: Tensor
    dlosses: Tensor
    options: dict

    def leaves(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (x.detach().to(dtype).requires_grad_() for x in (self.q, self.k, self.v))
        return q, k, v


def draw_config(config: Config, mask: str, device: torch.device) -> Drawn:
    g, B, T = torch.Generator(device).manual_seed(config.width), 2, config.tokens

    def normal(heads: int) -> Tensor:
        x = torch.randn(B, T, heads, config.width, generator=g, device=device)
        return x.to(DTYPES[config.dtype]).transpose(1, 2)

    def positions(count: int) -> Tensor:
        drawn = torch.stack([torch.randperm(T, generator=g, device=device)[:count] for _ in range(B)])
        drawn[-1, torch.randperm(count, generator=g, device=device)[: count // 8]] = -1
        return drawn

    key_mask = None
    if mask:
        key_mask = torch.ones(B, T, dtype=torch.bool, device=device)
        key_mask[-1, slice(0, T // 3) if mask == "left" else slice(-(T // 3), None)] = False
    q, k, v, dout = (normal(n) for n in (config.q_heads, config.kv_heads, config.kv_heads, config.q_heads))
    rows, cols = positions(config.rows), positions(config.cols)
    target = torch.rand(B, config.rows, config.cols, generator=g, device=device) / T
    dlse = torch.randn(B, config.q_heads, T, generator=g, device=device)
    da = torch.randn(target.shape, generator=g, device=device)
    dlosses = torch.full((B,), 4.0 * config.rows * config.q_heads, device=device)
    options = {"causal": config.causal, "key_mask": key_mask}
    return Drawn(q, k, v, rows, cols, target, dout, dlse, da, dlosses, options)


def flash_results(x: Drawn, dtype: torch.dtype, own: bool) -> Results:
    leaves = x.leaves(dtype)
    if own:
        out, lse = flash_attention(*leaves, **x.options, impl="triton")
        lse = torch.where(lse == -torch.inf, 0.0, lse)
    else:
        out, lse = attention_by_definition(*leaves, **x.options)
    return gradients({"out": out, "lse": lse}, [x.dout, x.dlse], dict(zip("qkv", leaves, strict=True)))


def slice_results(x: Drawn, dtype: torch.dtype, own: bool, lse: Tensor | None = None, heads: str = "mean") -> Results:
    leaves = dict(zip("qk", x.leaves(dtype), strict=False))
    if lse is not None:
        leaves["lse"] = lse.detach().to(torch.float32 if own else torch.promote_types(dtype, torch.float32))
        leaves["lse"].requires_grad_()
    q, k = leaves["q"], leaves["k"]
    function, impl = (attention_slice, {"impl": "triton"}) if own else (reference.attention_slice, {})
    a = function(q, k, x.rows, x.cols, lse=leaves.get("lse"), **x.options, **impl, heads=heads)
    return gradients({"a": a}, [x.da if heads == "mean" else x.da[:, None].expand_as(a)], leaves)


def accumulated_results(x: Drawn, dtype: torch.dtype, own: bool) -> Results:
    """The slice, added to two of three windows."""
    q, k = x.leaves(dtype)[:2]
    if not own:
        return {"sums": reference.attention_slice(q, k, x.rows, x.cols, **x.options).detach()}
    sums = torch.zeros(3, *x.target.shape, device=q.device)
    attention_slice_accumulate(q, k, x.rows, x.cols, sums, [0, 2], **x.options, impl="triton")
    assert torch.equal(sums[0], sums[2]) and not sums[1].any()
    return {"sums": sums[2]}


def alignment_results(x: Drawn, dtype: torch.dtype, own: bool, heads: str = "mean", **loss) -> Results:
    leaves = dict(zip("qk", x.leaves(dtype), strict=False))
    target = x.target
    if heads == "each":
        target = torch.stack([target.roll(h, -1) for h in range(x.q.shape[1])], 1)
    function, impl = (attention_alignment, {"impl": "triton"}) if own else (reference.attention_alignment, {})
    losses = function(*leaves.values(), target, x.rows, x.cols, **x.options, **impl, **loss, heads=heads)
    return gradients({"losses": losses}, [x.dlosses], leaves)


def relation_results(x: Drawn, dtype: torch.dtype, own: bool) -> Results:
    """The loss between two models whose queries and keys are each other's."""
    leaves = dict(zip("qk", x.leaves(dtype), strict=False))
    teacher = [y.detach().roll(1, 2) for y in leaves.values()]
    function, impl = (attention_relation, {"impl": "triton"}) if own else (reference.attention_relation, {})
    losses = function(*leaves.values(), *teacher, x.rows, x.cols, **x.options, **impl)
    return gradients({"losses": losses}, [x.dlosses], leaves)


def both_results(x: Drawn, dtype: torch.dtype, engine: str | None) -> Results:
    """attention_with_alignment with this engine; its definition for None."""
    leaves = x.leaves(dtype)
    if engine is not None:
        out, losses = attention_with_alignment(
            *leaves, x.target, x.rows, x.cols, **x.options, engine=engine, impl="triton"
        )
    else:
        out, _ = attention_by_definition(*leaves, **x.options)
        losses = reference.attention_alignment(*leaves[:2], x.target, x.rows, x.cols, **x.options)
    return gradients({"out": out, "losses": losses}, [x.dout, x.dlosses], dict(zip("qkv", leaves, strict=True)))


def check_config(config: Config, device: torch.device) -> None:
    """Every op and every engine that can run, with each of the configuration's masks."""
    if rehearsing():  # Triton's interpreter has no bf16
        dtype = config.dtype.replace("bf", "fp")
        config = replace(config, dtype=dtype, width=16, tokens=24, rows=17, cols=18)
    dtype, inexact = DTYPES[config.dtype], {}

    def compare(part: str, mask: str, results: Callable[..., Results], **arguments) -> None:
        exact, same = (results(x, d, False, **arguments) for d in (torch.float64, dtype))
        judge(part, mask, partial(results, x, dtype, True, **arguments), same, exact)

    def judge(part: str, mask: str, ours: Callable[[], Results], same: Results, exact: Results) -> None:
        if found := fault(ours, same, exact):
            inexact[part] = f"{mask or 'no'} mask, {found}"

    for mask in config.masks:
        x = draw_config(config, mask, device)
        compare("flash", mask, flash_results)
        compare("slice", mask, slice_results)
        _, lse = attention_by_definition(*x.leaves(torch.float64), **x.options)
        compare("slice", mask, slice_results, lse=lse)
        if not mask:
            compare("slice", mask, slice_results, heads="each")
        compare("accumulate", mask, accumulated_results)
        compare("alignment", mask, alignment_results)
        if mask == config.masks[0]:
            compare("relation", mask, relation_results)
        compare("head cosine", mask, alignment_results, heads="each")
        exact, same = (both_results(x, d, None) for d in (torch.float64, dtype))
        problem = AttentionProblem(x.q, x.k, x.v, **x.options, scale=config.width**-0.5)
        for name, candidate in ENGINES.items():
            if not (candidate.missing() or candidate.refusal(problem)):
                judge(f"ours/{name}", mask, partial(both_results, x, dtype, name), same, exact)
    if inexact:
        raise InexactError(inexact)


def check_losses(device: torch.device, config: Config = Config("fp32", 64)) -> None:
    """The other losses and reductions; their kernels do not depend on the attention's configuration."""
    x, inexact = draw_config(config, "left", device), {}
    for loss, reduction, sink_filter in (("kl", "matrix", False), ("mse", "column", False), ("cosine", "column", True)):
        options = {"loss": loss, "reduction": reduction, "sink_filter": sink_filter}
        exact, same = (alignment_results(x, d, False, **options) for d in (torch.float64, torch.float32))
        if found := fault(partial(alignment_results, x, torch.float32, True, **options), same, exact):
            inexact[f"{loss} {reduction}"] = found
    if inexact:
        raise InexactError(inexact)


SMALL = Shape("small", 2, 16, 4, 1024, 128, 100, 600)


def check_repeats(device: torch.device, shape: Shape = SMALL, dtype: str = "bf16") -> None:
    """Engine triton: two backwards of one graph, and a second run, agree bit for bit."""
    p = draw(shape, DTYPES[dtype], device)
    runs = []
    for _ in range(2):
        outputs = attention_with_alignment(*p.inputs, engine="triton", impl="triton")
        for _ in range(2):
            grads = torch.autograd.grad(outputs, p.leaves, [p.dout, p.dlosses], retain_graph=True)
            runs.append([*(x.detach() for x in outputs), *grads])
    assert all(torch.equal(x, y) for run in runs[1:] for x, y in zip(runs[0], run, strict=True))


def check_graph(device: torch.device) -> None:
    """Forward and backward of every engine, captured once and replayed on other inputs, give what a plain run gives."""
    for name, candidate in ENGINES.items():
        p, other = (draw(SMALL, torch.bfloat16, device, seed) for seed in (0, 1))
        if candidate.missing() or candidate.refusal(AttentionProblem(*p.leaves)):
            continue

        def step(x: Problem, engine: str = name) -> list[Tensor]:
            outputs = attention_with_alignment(*x.inputs, engine=engine)
            grads = torch.autograd.grad(outputs, x.leaves, [x.dout, x.dlosses])
            return [*(y.detach() for y in outputs), *grads]

        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                step(p)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step(p)
        with torch.no_grad():
            for x, y in zip(p, other, strict=True):
                x.copy_(y)
        graph.replay()
        torch.cuda.synchronize()
        for got, want in zip(captured, step(other), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-2, atol=1e-2 * float(want.abs().max()), msg=f"engine {name}")


BAD_POSITION = """
import torch
from cdistill.ops import attention_slice
q = torch.randn(1, 2, 64, 64, dtype=torch.bfloat16, device="cuda")
for last in (63, 64):
    positions = torch.tensor([[1, last]], device="cuda")
    attention_slice(q, q, positions[:, :1], positions)
    torch.cuda.synchronize()
    print("accepted", last)
"""


def check_slice_offsets(device: torch.device, tokens: int = 600_000, heads: int = 32, dtype: str = "bf16") -> None:
    """q and k of more than 2^31 elements: the slice at given lse and its gradients, at the last rows."""
    width = 128
    q, k = (torch.randn(1, heads, tokens, width, device=device, dtype=DTYPES[dtype]) for _ in range(2))
    rows = torch.arange(tokens - 40, tokens, device=device)
    cols = torch.cat([torch.arange(16, 66, device=device), torch.arange(tokens - 60, tokens - 10, device=device)])
    da, lse = torch.randn(1, 40, 100, device=device), torch.full((1, heads, tokens), 10.0, device=device)

    def gathered(dtype: torch.dtype) -> Results:
        x, y = (z[:, :, i].to(dtype).requires_grad_() for z, i in ((q, rows), (k, cols)))
        a = ((x @ y.mT * width**-0.5 - 10.0).exp() * (rows[:, None] >= cols)).mean(1)
        return gradients({"a": a}, [da], {"q": x, "k": y})

    exact, same = gathered(torch.float64), gathered(DTYPES[dtype])
    q.requires_grad_(), k.requires_grad_()
    a = attention_slice(q, k, rows[None], cols[None], lse=lse, impl="triton")
    dq, dk = torch.autograd.grad(a, (q, k), da)
    got = {"a": a.detach(), "dq": dq[:, :, rows], "dk": dk[:, :, cols]}
    ratio, name = worst(got, same, exact)
    assert ratio <= 1, f"{name}: error {ratio:.2f} times what is allowed"
    for part, whole in (("dq", dq), ("dk", dk)):
        assert got[part].count_nonzero() == whole.count_nonzero(), f"{part} is not zero outside the slice"


MANY = Shape("many", 520, 32, 32, 1024, 128, 1, 1)


def check_flash_offsets(device: torch.device, shape: Shape = MANY, dtype: str = "bf16") -> None:
    """All tensors of more than 2^31 elements: own flash attention, at the first and the last sample."""
    p = draw(shape, DTYPES[dtype], device)
    out, lse = flash_attention(*p.leaves, impl="triton")
    dq, dk, dv = torch.autograd.grad(out, p.leaves, p.dout)
    for b in (0, shape.batch - 1):
        got = {"out": out[b].detach(), "lse": lse[b].detach(), "dq": dq[b], "dk": dk[b], "dv": dv[b]}

        def one(dtype: torch.dtype, b: int = b) -> Results:
            leaves = [x[b : b + 1].detach().to(dtype).requires_grad_() for x in p.leaves]
            out, lse = attention_by_definition(*leaves, True, None)
            zero = torch.zeros_like(lse)
            found = gradients(
                {"out": out, "lse": lse}, [p.dout[b : b + 1], zero], dict(zip("qkv", leaves, strict=True))
            )
            return {name: x[0] for name, x in found.items()}

        ratio, name = worst(got, one(DTYPES[dtype]), one(torch.float64))
        assert ratio <= 1, f"sample {b}, {name}: error {ratio:.2f} times what is allowed"


def compile_for(shape: Shape, device: torch.device) -> None:
    """Run once what compiles for this shape, so that the timing process finds it in the caches."""
    problem = draw(shape, torch.bfloat16, device)
    for contender in contenders(shape, problem)[0]:
        if contender.name != "eager":
            with contextlib.suppress(Exception):
                results_of(contender.run, problem)


# (kernel, bytes per element, padded head dimension) -> tiles worth timing beside the one in the table.
CANDIDATES: dict[tuple[str, int, int], list[Tile]] = {
    ("slice_forward", 2, 128): [Tile(64, 128, 8, 2), Tile(64, 128, 4, 3), Tile(64, 128, 4, 2)],
    ("slice_rows", 2, 128): [Tile(64, 64, 8, 2), Tile(64, 128, 8, 2), Tile(64, 64, 4, 2)],
    ("slice_cols", 2, 128): [Tile(64, 64, 8, 2), Tile(32, 128, 8, 2), Tile(64, 128, 8, 3)],
    ("flash_forward", 2, 128): [Tile(128, 128, 8, n) for n in (2, 3)] + [Tile(128, 64, 8, 3), Tile(64, 64, 4, 3)],
    ("flash_dkdv", 2, 128): [Tile(64, 64, 8, 2), Tile(64, 64, 8, 3), Tile(64, 128, 8, 2), Tile(32, 128, 8, 2)],
    ("flash_dq", 2, 128): [Tile(64, 64, 8, 2), Tile(128, 64, 8, 2), Tile(128, 64, 8, 3), Tile(128, 32, 8, 3)],
    ("slice_forward", 2, 64): [Tile(64, 128, 4, 3), Tile(64, 256, 8, 2)],
    ("slice_rows", 2, 64): [Tile(64, 64, 4, 3), Tile(64, 128, 8, 2)],
    ("slice_cols", 2, 64): [Tile(64, 64, 4, 3), Tile(128, 64, 8, 2)],
    ("flash_forward", 2, 64): [Tile(128, 128, 8, 3), Tile(128, 64, 8, 3)],
    ("flash_dkdv", 2, 64): [Tile(64, 128, 8, 2), Tile(128, 64, 8, 2)],
    ("flash_dq", 2, 64): [Tile(128, 64, 8, 2), Tile(64, 64, 4, 3)],
}


@contextlib.contextmanager
def tile_in_use(key: tuple[str, int, int], tile: Tile):
    """The tile table with this entry."""
    table = _launch.attention_tile

    def chosen(kernel: str, q: Tensor) -> Tile:
        asked = (kernel, q.element_size(), _launch.padded_head_dim(q.shape[-1]))
        return tile if asked == key else table(kernel, q)

    with mock.patch.object(_launch, "attention_tile", chosen):
        yield


def check_tile(device: torch.device, key: tuple[str, int, int], tile: Tile, dtype: str, config: Config | None) -> None:
    """A tile that is not in the table, on the ops it serves; 16 heads, so that what is compiled is what is timed."""
    x = draw_config(config or Config(dtype, key[2], 16, 16), "", device)
    kinds = (flash_results,) if key[0].startswith("flash") else (slice_results, alignment_results)
    for kind in kinds:
        exact, same = (kind(x, d, False) for d in (torch.float64, DTYPES[dtype]))
        with tile_in_use(key, tile):
            ratio, name = worst(kind(x, DTYPES[dtype], True), same, exact)
        assert ratio <= 1, f"{name}: error {ratio:.2f} times what is allowed"


def tile_name(key: tuple[str, int, int], tile: Tile) -> str:
    return f"tile-{key[0]}-d{key[2]}-{tile.BM}x{tile.BN}-{tile.num_warps}w-{tile.num_stages}s"


CHECKS: dict[str, Check] = {
    **{str(config): partial(check_config, config) for config in CONFIGS},
    "losses": check_losses,
    "repeats": check_repeats,
    "cuda-graph": check_graph,
    "bad-position": partial(check_assertion, script=BAD_POSITION),
}
ALONE: dict[str, Check] = {"slice-offsets": check_slice_offsets, "flash-offsets": check_flash_offsets}  # 20 to 40 GB
TILE_CHECKS: dict[str, Check] = {
    tile_name(key, tile): partial(check_tile, key=key, tile=tile, dtype="bf16", config=None)
    for key, tiles in CANDIDATES.items()
    for tile in tiles
}
PREPARATIONS: dict[str, Check] = {
    f"compile-{shape.name}".replace(" ", "-"): partial(compile_for, shape) for shape in SHAPES if shape.rivals
}
TOGETHER = {**PREPARATIONS, **CHECKS, **TILE_CHECKS}


if __name__ == "__main__":
    raise SystemExit(main((TOGETHER | ALONE)[sys.argv[1]]))
