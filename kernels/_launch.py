"""How the kernels are launched: the tile table and the one place that calls Triton.

Tiles are a frozen table, never autotuned: the interpreter runs one configuration only, and on Hopper a configuration
may compile and still be wrong, so every entry has to be checked on its own before it may be chosen.
"""

import csv
import math
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from ._primitives import HEADROOM

INTERPRETER = 0
OPTIONS = ("num_warps", "num_stages")  # of a launch

# Compute capabilities, as two digits, for which every entry of the tile table has been compiled.
ARCHITECTURES = (80, 86, 89, 90, 100, 120)

# Architectures whose matrix instructions read both operands from shared memory.
SHARED_MEMORY_DOTS = (INTERPRETER, 90, 100)

# Head dimensions are multiples of 8 and strides usually too: passed in units of 8, they let every load be 16 bytes wide.
ALIGNMENT = 8

# Values that change from batch to batch, by which Triton must not specialise; alignment is stated by UNIT instead.
BATCH_DEPENDENT = [
    *("R", "V", "T"),
    *(f"stride_{x}{axis}" for x in ("q", "k", "v", "out", "dout", "dq", "dk", "dv") for axis in "bht"),
    *(f"stride_g{axis}" for axis in "bhr"),
]


@dataclass(frozen=True)
class Tile:
    """Rows and columns one step of a program covers, and the launch options they were chosen with."""

    BM: int
    BN: int
    num_warps: int
    num_stages: int


def _read_tiles() -> dict[tuple[str, int, int, int], Tile]:
    with (Path(__file__).parent / "tiles.csv").open(encoding="utf-8", newline="") as file:
        return {
            (
                row["kernel"],
                int(row["bytes"]),
                int(row["head_dim"]),
                0 if row["arch"] == "all" else int(row["arch"]),
            ): Tile(int(row["BM"]), int(row["BN"]), int(row["num_warps"]), int(row["num_stages"]))
            for row in csv.DictReader(file)
        }


# (kernel, bytes per element, padded head dimension, architecture) -> tile; architecture 0 is any that has no entry of its own,
# and those tiles fit the 99 KiB of shared memory of sm_86, sm_89 and sm_120. "_split" behind a name: where the tile differs
# with a split lse, whose second number takes registers. `python -m benchmarks.tiles` writes the file, with reasons.
TILES = _read_tiles()

# The row kernels of the losses only stream: one row at a time keeps all multiprocessors busy.
ROW_TILE = Tile(1, 1024, 4, 2)

# Of one row of logits: 8 elements, 16 bytes of bf16, per thread; 2 where a temperature makes for a second softmax, because
# 8 spill on sm_120.
VOCABULARY_TILE = Tile(1, 1024, 4, 1)
SCALED_VOCABULARY_TILE = Tile(1, 512, 8, 1)

# Unequal on purpose: a tile edge used on the wrong axis then shows in the tests.
INTERPRETER_TILE = Tile(16, 32, 1, 1)
INTERPRETER_ROW_TILE = Tile(16, 64, 1, 1)


def architecture(device: torch.device) -> int:
    """The last of ARCHITECTURES up to the device's compute capability (90 = Hopper), or INTERPRETER for CPU tensors."""
    if device.type != "cuda":
        return INTERPRETER
    major, minor = torch.cuda.get_device_capability(device)
    return max(known for known in ARCHITECTURES if known <= 10 * major + minor)


@cache
def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a GPU; 1 for CPU tensors."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def padded_head_dim(head_dim: int) -> int:
    """The next power of two, at least the 16 that a tensor-core dot needs."""
    return max(16, 1 << (head_dim - 1).bit_length())


def attention_tile(kernel: str, q: torch.Tensor) -> Tile:
    arch = architecture(q.device)
    if arch == INTERPRETER:
        return INTERPRETER_TILE
    base, size = kernel.removesuffix("_split"), (q.element_size(), padded_head_dim(q.shape[-1]))
    return TILES.get((kernel, *size, arch)) or TILES.get((base, *size, arch)) or TILES[base, *size, 0]


def row_tile(device: torch.device) -> Tile:
    return INTERPRETER_ROW_TILE if architecture(device) == INTERPRETER else ROW_TILE


def vocabulary_tile(device: torch.device, scaled: bool) -> Tile:
    if architecture(device) == INTERPRETER:
        return INTERPRETER_ROW_TILE
    return SCALED_VOCABULARY_TILE if scaled else VOCABULARY_TILE


def common_unit(strides: Iterable[int]) -> int:
    """The unit in elements in which these strides can be passed."""
    return 1 if any(stride % ALIGNMENT for stride in strides) else ALIGNMENT


def tensor_arguments(**tensors: torch.Tensor | None) -> dict:
    """Pointers and strides of tensors (B,heads,T,D) with unit stride on D, and the unit that strides are passed in.

    None stays None, with strides 0.
    """
    strides = {
        f"stride_{name}{axis}": 0 if x is None else x.stride(i)
        for name, x in tensors.items()
        for i, axis in enumerate("bht")
    }
    unit = common_unit(strides.values())
    (width,) = {x.shape[3] for x in tensors.values() if x is not None}
    return {
        **{f"p_{name}": x for name, x in tensors.items()},
        **{name: stride // unit for name, stride in strides.items()},
        "UNIT": unit,
        "D": width,
        "BD": padded_head_dim(width),
    }


def attention_arguments(kernel, problem, **gradients) -> dict:
    """Launch arguments that kernels of an `AttentionProblem` share; ``gradients`` are dq, dk with unit stride on D, or None."""
    q, k, rows = problem.q, problem.k, problem.rows
    tile = attention_tile(kernel, q)
    return {
        "device": q.device,
        **tensor_arguments(q=q, k=k, **gradients),
        "p_rows": rows,
        "p_mask": None if problem.key_mask is None else problem.key_mask.view(torch.uint8),
        "R": rows.shape[1],
        "T": q.shape[2],
        "Hq": q.shape[1],
        "scale": problem.scale,
        "GROUP": q.shape[1] // k.shape[1],
        "CAUSAL": problem.causal,
        "BM": tile.BM,
        "BN": tile.BN,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }


def lse_arguments(lse: torch.Tensor | None) -> dict:
    """The launch arguments of a log-sum-exp: natural (B,Hq,T), or split (2,B,Hq,T) into maxima in bits and shares."""
    if lse is None or lse.dim() == 3:
        return {"p_lse": lse, "p_share": None}
    return {"p_lse": lse[0], "p_share": lse[1]}


def fp16_gain(q: torch.Tensor, grad: torch.Tensor, bound: torch.Tensor | None = None) -> torch.Tensor | None:
    """(B,) factors that bring the largest gradient of a sample to HEADROOM; only fp16 operands need them.

    Vectors along the last dimension of grad that are not finite do not count. With ``bound`` (B,) that of the products of
    gradients and probabilities, as far as the gradients stay finite.
    """
    if q.dtype != torch.float16:
        return None
    peak = torch.linalg.vector_norm(grad, ord=float("inf"), dim=-1).nan_to_num(0.0, 0.0, 0.0).flatten(1).amax(1)
    if bound is None:
        return HEADROOM.value / peak.clamp(min=1e-30)
    return torch.minimum(HEADROOM.value / bound.clamp(min=1e-30), 2.0**120 / peak.clamp(min=1e-30))


def taken(kernel, arguments: dict) -> dict:
    """Of arguments that several kernels share, those that this one takes and those of its launch."""
    return {n: x for n, x in arguments.items() if n in kernel.arg_names or n in ("device", *OPTIONS)}


def launch(kernel, grid: tuple[int, ...], device: torch.device, **arguments) -> None:
    """Run ``kernel`` on the device its tensors live on, which need not be the current one.

    Raises TypeError for an argument that the kernel does not take: it would change nothing.
    """
    if strange := [name for name in arguments if name not in kernel.arg_names and name not in OPTIONS]:
        raise TypeError(f"{kernel.__name__} takes no {', '.join(strange)}")
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[grid](**arguments)


def launch_checked(kernel, grid: tuple[int, ...], device: torch.device, **arguments) -> None:
    """`launch`, and once more, with CAREFUL, for the programs that noted a result which is not finite."""
    again = torch.empty(math.prod(grid), dtype=torch.uint8, device=device)
    for careful in (False, True):
        launch(kernel, grid, device, p_again=again, CAREFUL=careful, **arguments)
