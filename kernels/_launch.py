"""How the kernels are launched: the tile table and the one place that calls Triton.

Tiles are a frozen table, never autotuned: the interpreter runs one configuration only, and on Hopper a configuration
may compile and still be wrong, so every entry has to be checked on its own before it may be chosen.
"""

from contextlib import nullcontext
from dataclasses import dataclass

import torch

INTERPRETER = 0


@dataclass(frozen=True)
class Tile:
    """Rows and columns one step of a program covers, and the launch options they were chosen with."""

    BM: int
    BN: int
    num_warps: int
    num_stages: int


# (kernel, bytes per element) -> padded head dimension -> tile. Every entry fits the 99 KiB of shared memory of sm_86,
# sm_89 and sm_120.
TILES = {
    ("row_lse", 2): {
        16: Tile(64, 128, 4, 3),
        32: Tile(64, 128, 4, 3),
        64: Tile(64, 128, 4, 3),
        128: Tile(64, 64, 4, 2),
        256: Tile(64, 32, 4, 2),
    },
    ("row_lse", 4): {
        16: Tile(32, 32, 4, 2),
        32: Tile(32, 32, 4, 2),
        64: Tile(32, 32, 4, 2),
        128: Tile(16, 16, 4, 2),
        256: Tile(16, 16, 4, 1),
    },
    ("slice_forward", 2): {
        16: Tile(64, 128, 8, 3),
        32: Tile(64, 128, 8, 3),
        64: Tile(64, 128, 8, 3),
        128: Tile(64, 128, 8, 2),
        256: Tile(64, 64, 8, 1),
    },
    ("slice_forward", 4): {
        16: Tile(32, 32, 4, 2),
        32: Tile(32, 32, 4, 2),
        64: Tile(32, 32, 4, 2),
        128: Tile(16, 32, 4, 2),
        256: Tile(16, 16, 4, 1),
    },
    ("backward", 2): {
        16: Tile(64, 64, 8, 2),
        32: Tile(64, 64, 8, 2),
        64: Tile(64, 64, 8, 2),
        128: Tile(32, 64, 8, 2),
        256: Tile(32, 32, 8, 1),
    },
    ("backward", 4): {
        16: Tile(32, 32, 4, 2),
        32: Tile(32, 32, 4, 2),
        64: Tile(32, 32, 4, 2),
        128: Tile(16, 16, 4, 1),
        256: Tile(16, 16, 8, 1),
    },
}

# The row kernels of the losses only stream: one row at a time keeps all multiprocessors busy.
ROW_TILE = Tile(1, 1024, 4, 2)

# Architecture -> (kernel, bytes per element, padded head dimension) -> tile, where it differs from TILES.
ARCHITECTURE_TILES: dict[int, dict[tuple[str, int, int], Tile]] = {
    90: {
        ("slice_forward", 2, 64): Tile(64, 128, 4, 3),
        ("slice_forward", 2, 128): Tile(64, 128, 4, 2),
        ("backward", 2, 128): Tile(64, 64, 8, 2),
    },
    100: {("backward", 2, 128): Tile(64, 64, 8, 2)},
}

# Unequal on purpose: a tile edge used on the wrong axis then shows in the tests.
INTERPRETER_TILE = Tile(16, 32, 1, 1)
INTERPRETER_ROW_TILE = Tile(16, 64, 1, 1)


def architecture(device: torch.device) -> int:
    """Compute capability as two digits (90 = Hopper), or INTERPRETER for CPU tensors."""
    if device.type != "cuda":
        return INTERPRETER
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def padded_head_dim(head_dim: int) -> int:
    """The next power of two, at least the 16 that a tensor-core dot needs."""
    return max(16, 1 << (head_dim - 1).bit_length())


def attention_tile(kernel: str, q: torch.Tensor) -> Tile:
    arch = architecture(q.device)
    if arch == INTERPRETER:
        return INTERPRETER_TILE
    key = (kernel, q.element_size(), padded_head_dim(q.shape[-1]))
    return ARCHITECTURE_TILES.get(arch, {}).get(key) or TILES[key[:2]][key[2]]


def row_tile(device: torch.device) -> Tile:
    return INTERPRETER_ROW_TILE if architecture(device) == INTERPRETER else ROW_TILE


def launch(kernel, grid: tuple[int, ...], device: torch.device, **arguments) -> None:
    """Run ``kernel`` on the device its tensors live on, which need not be the current one."""
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[grid](**arguments)
