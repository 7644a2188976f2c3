"""Search tiles that compile without a problem: `python -m benchmarks.tiles slice_rows 80 bf16 64`.

Prints, from the largest tile down, what becomes of every launch that takes its tile by this name in
`kernels/_launch.py`, with the registers of the worst; the first without a problem is the one to write there. Nothing is timed.
"""

import argparse
import itertools
import os
import sys
import tempfile
from collections.abc import Iterator
from unittest import mock

import torch
from cdistill.kernels import _launch
from cdistill.kernels._launch import Tile

from benchmarks import aot


def candidates(most: Tile) -> Iterator[Tile]:
    """Tiles up to ``most``, large ones first; many warps and few stages where a tile is what does not fit."""
    sizes = [n for n in (128, 64, 32, 16) if n <= max(most.BM, most.BN)]
    tiles = [Tile(bm, bn, w, s) for bm, bn in itertools.product(sizes, repeat=2) for w in (4, 8) for s in (3, 2, 1)]
    fit = [t for t in tiles if t.BM * t.BN <= most.BM * most.BN and t.num_stages <= most.num_stages]
    yield from sorted(
        fit, key=lambda t: (-t.BM * t.BN, abs(t.BM - most.BM), t.num_warps != most.num_warps, -t.num_stages)
    )


def launches(name: str, arch: int, head_dim: int, dtype: torch.dtype, tile: Tile) -> list[tuple]:
    """The launches of a cell that take their tile by ``name``, with ``tile`` for it."""
    taken = []
    find = _launch.attention_tile

    def attention_tile(kernel: str, q: torch.Tensor) -> Tile:
        return tile if kernel == name else find(kernel, q)

    with mock.patch.object(_launch, "attention_tile", attention_tile):
        ours = aot.attention_launches(arch, head_dim, dtype)
    for launch, before in zip(ours, aot.attention_launches(arch, head_dim, dtype), strict=True):
        if any(
            launch[1].get(size) != before[1].get(size) for size in ("BM", "BN", "BR", "BV", "num_warps", "num_stages")
        ):
            taken.append(launch)
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", help="of the kernel in TILES, with _split behind it for launches with a split lse")
    parser.add_argument("arch", type=int)
    parser.add_argument("dtype", choices=aot.DTYPES)
    parser.add_argument("head_dim", type=int)
    options = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET"):
        parser.error("unset TRITON_INTERPRET: the interpreter's kernels cannot be compiled")
    dtype = aot.DTYPES[options.dtype]
    q = torch.empty(1, 1, 1, options.head_dim, dtype=dtype, device="meta")
    with mock.patch.object(_launch, "architecture", lambda device: options.arch):
        now = _launch.attention_tile(options.name, q)
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        for tile in candidates(now):
            if tile == now:
                continue
            worst, problem = 0, ""
            for launch in launches(options.name, options.arch, options.head_dim, dtype, tile):
                if not launch[1].get("CAREFUL"):
                    row = aot.compile_one(launch, options.arch)
                    worst, problem = max(worst, row["registers"]), aot.problem(row)
                if problem:
                    break
            print(f"{tile}: {problem or f'{worst} registers'}", flush=True)
            if not problem:
                return
    sys.exit(f"no tile up to {now} compiles without a problem")


if __name__ == "__main__":
    main()
