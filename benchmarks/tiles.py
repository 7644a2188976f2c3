"""Search tiles that compile without a problem, and keep them with what was rejected: kernels/tiles.csv.

`python -m benchmarks.tiles search slice_rows 80 bf16 64` prints, from the largest tile down, what becomes of every launch that
takes its tile by this name, with the registers of the worst; the first without a problem ends the search. `--write` keeps it
for that architecture, the tiles before it and their problems as its reason. `python -m benchmarks.tiles explain` compiles, for
every entry of one architecture without a reason, the tile for all architectures whose place it takes. Nothing is timed.
"""

import argparse
import csv
import itertools
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import torch
from cdistill.kernels import _launch
from cdistill.kernels._launch import Tile

from benchmarks import aot

TABLE = Path(_launch.__file__).parent / "tiles.csv"
ALL = "all"  # architectures without an entry of their own
SIZES = ("BM", "BN", "BR", "BV", "num_warps", "num_stages")


def candidates(most: Tile) -> Iterator[Tile]:
    """Tiles from ``most`` down, large ones first; many warps and few stages where a tile is what does not fit."""
    sizes = [n for n in (128, 64, 32, 16) if n <= max(most.BM, most.BN)]
    columns = sizes if most.BN else [0]
    shapes = [(bm, bn) for bm, bn in itertools.product(sizes, columns) if bm * max(bn, 1) <= most.BM * max(most.BN, 1)]
    stages = range(most.num_stages, 0, -1)
    fit = [Tile(bm, bn, warps, n) for (bm, bn), warps, n in itertools.product(shapes, (4, 8), stages)]
    yield from sorted(
        fit,
        key=lambda t: (-t.BM * max(t.BN, 1), abs(t.BM - most.BM), t.num_warps != most.num_warps, -t.num_stages),
    )


def launches(name: str, arch: int, head_dim: int, dtype: torch.dtype, tile: Tile) -> list[tuple]:
    """The launches of a cell that take their tile by ``name``, with ``tile`` for it."""
    find = _launch.attention_tile

    def with_tile(other: Tile) -> list[tuple]:
        def attention_tile(kernel: str, q: torch.Tensor) -> Tile:
            return other if kernel == name else find(kernel, q)

        with mock.patch.object(_launch, "attention_tile", attention_tile):
            return aot.attention_launches(arch, head_dim, dtype)

    unlike = Tile(2 * tile.BM, 2 * tile.BN, 3 - tile.num_stages % 2, tile.num_stages + 1)
    pairs = zip(with_tile(tile), with_tile(unlike), strict=True)
    return [ours for ours, other in pairs if any(ours[1].get(size) != other[1].get(size) for size in SIZES)]


def trial(name: str, arch: int, head_dim: int, dtype: torch.dtype, tile: Tile) -> tuple[int, str]:
    """Registers of the worst launch, and what is wrong with the first that has a problem; empty if none has."""
    worst = 0
    for launch in launches(name, arch, head_dim, dtype, tile):
        if launch[1].get("CAREFUL"):
            continue
        row = aot.compile_one(launch, arch)
        worst = max(worst, row["registers"])
        if found := aot.problem(row):
            amounts = {
                "spills": f"spills {row['spill_bytes']} B",
                "shared memory": f"{row['shared']} B of shared memory",
            }
            return worst, ", ".join(amounts.get(part, part) for part in found.split(", "))
    return worst, ""


def written(tile: Tile) -> str:
    """A tile in the words of reasons."""
    return f"{tile.BM}x{tile.BN}, {tile.num_warps} warps, {tile.num_stages} stages"


def search(name: str, arch: int, dtype: str, head_dim: int, most: Tile | None = None) -> tuple[Tile, str]:
    """The largest tile without a problem up to ``most`` (None: the one for all architectures), and why no larger one."""
    q = torch.empty(1, 1, 1, head_dim, dtype=aot.DTYPES[dtype], device="meta")
    size = (q.element_size(), _launch.padded_head_dim(head_dim))
    most = most or _launch.TILES.get((name, *size, 0)) or _launch.TILES[name.removesuffix("_split"), *size, 0]
    rejected = []
    for tile in candidates(most):
        worst, problem = trial(name, arch, head_dim, q.dtype, tile)
        print(f"{written(tile)}: {problem or f'{worst} registers'}", flush=True)
        if not problem:
            return tile, "; ".join(rejected)
        rejected.append(f"{written(tile)}: {problem}")
    sys.exit(f"no tile up to {written(most)} compiles without a problem")


def read_table() -> list[dict[str, str]]:
    with TABLE.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def write_table(rows: list[dict[str, str]]) -> None:
    order = list(dict.fromkeys(row["kernel"].removesuffix("_split") for row in rows))

    def place(row: dict[str, str]) -> tuple:
        kernel = row["kernel"]
        arch = 0 if row["arch"] == ALL else int(row["arch"])
        return order.index(kernel.removesuffix("_split")), int(row["bytes"]), int(row["head_dim"]), kernel, arch

    with TABLE.open("w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        table.writeheader()
        table.writerows(sorted(rows, key=place))


def keep(name: str, arch: int, dtype: str, head_dim: int, tile: Tile, reason: str) -> None:
    """Write an entry of one architecture, in the place of the one that it has."""
    entry = {
        "kernel": name,
        "bytes": str(aot.DTYPES[dtype].itemsize),
        "head_dim": str(_launch.padded_head_dim(head_dim)),
        "arch": str(arch),
    }
    others = [row for row in read_table() if any(row[key] != value for key, value in entry.items())]
    sizes = {size: str(getattr(tile, size)) for size in ("BM", "BN", "num_warps", "num_stages")}
    write_table([*others, {**entry, **sizes, "reason": reason}])


def explain() -> None:
    """Give the entries of one architecture their reasons: what becomes there of the tile for all."""
    for row in read_table():
        if row["arch"] == ALL or row["reason"]:
            continue
        name, arch, head_dim = row["kernel"], int(row["arch"]), int(row["head_dim"])
        general = _launch.TILES[name.removesuffix("_split"), int(row["bytes"]), head_dim, 0]
        reason = ""
        for dtype in ("bf16", "fp16") if row["bytes"] == "2" else ("fp32",):
            worst, problem = trial(name, arch, head_dim, aot.DTYPES[dtype], general)
            reason = reason or (f"{written(general)}: {problem} ({dtype})" if problem else "")
        reason = reason or f"{written(general)} has no problem ({worst} registers): nothing was rejected"
        rows = read_table()
        (same,) = (r for r in rows if all(r[key] == row[key] for key in ("kernel", "bytes", "head_dim", "arch")))
        same["reason"] = reason
        write_table(rows)
        print(f"{name} {row['bytes']} B, D={head_dim}, sm_{arch}: {reason}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    searching = commands.add_parser("search", help="from the largest tile down, until one has no problem")
    searching.add_argument("name", help="of the kernel, with _split behind it for launches with a split lse")
    searching.add_argument("arch", type=int)
    searching.add_argument("dtype", choices=aot.DTYPES)
    searching.add_argument("head_dim", type=int)
    searching.add_argument(
        "--most", type=int, nargs=4, metavar=("BM", "BN", "WARPS", "STAGES"), help="start here, not at the tile for all"
    )
    searching.add_argument("--write", action="store_true", help="keep what is found")
    commands.add_parser("explain", help="give entries of one architecture their reasons")
    options = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET"):
        parser.error("unset TRITON_INTERPRET: the interpreter's kernels cannot be compiled")
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        if options.command == "explain":
            explain()
            return
        of = (options.name, options.arch, options.dtype, options.head_dim)
        tile, reason = search(*of, options.most and Tile(*options.most))
        if options.write and (reason or options.most):  # else the tile for all architectures serves
            keep(*of, tile, reason)


if __name__ == "__main__":
    main()
