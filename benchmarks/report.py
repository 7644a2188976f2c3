"""Tables and a picture of results: `python -m benchmarks.report [FOLDER]`.

FOLDER holds <device>/results.json of GPUs and CPUs; by default benchmarks/results, or what CDISTILL_RESULTS says. Markdown goes
to standard output, a picture beside each JSON. Nothing is computed that was not measured.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks._cases import ATTENTION, RELATION
from benchmarks._contenders import COMPILED_STACK, SHAPES, Shape
from benchmarks._distillation import UNCOMPILED
from benchmarks._plots import plot
from benchmarks._report_distillation import vocabulary
from benchmarks._results import results_folder
from benchmarks._tables import (
    Rows,
    both,
    by_shape,
    number,
    opening,
    outcome,
    overview,
    shape_table,
    table,
    verdict,
)

NOTHING = "no results yet: run pytest benchmarks/, or python -m benchmarks.gpu on a machine with a GPU"

COLUMNS = {
    "forward ms": "forward_ms",
    "backward ms": "backward_ms",
    "both ms": "both_ms",
    "± %": "spread_percent",
    "over plain %": "overhead_percent_over_best_plain",
    "TFLOP/s": "tflops",
    "peak MB": "peak_mb",
    "extra MB": "extra_mb",
    "host ms": "host_ms",
}


def overhead(rows: Rows, contender: str) -> float | None:
    return rows.get(contender, {}).get("overhead_percent_over_best_plain")


def targets(shapes: dict[str, Rows], sizes: dict[str, Shape]) -> list[list[str]]:
    """(claim, shape, measured, limit, pass or miss); a claim without figures is not measured."""
    lines: list[list[str]] = []

    def add(claim: str, shape: str, value: float | None, limit: float | None) -> None:
        lines.append([claim, shape, number(value), number(limit), verdict(value, limit)])

    for shape, most in (("T4096", 10.0), ("T32768", 4.0)):
        add("overhead over the best plain attention, %", shape, overhead(shapes.get(shape, {}), "ours"), most)
    comparable = [name for name, rows in shapes.items() if both(rows, COMPILED_STACK) or name in ("T4096", "T32768")]
    for shape in comparable:
        theirs = overhead(shapes[shape], COMPILED_STACK)
        half = None if theirs is None else theirs / 2
        add("overhead, % (limit: half of the compiled stack's)", shape, overhead(shapes[shape], "ours"), half)
    for shape, rows in shapes.items():
        values = both(rows, "flash_attention (own)"), both(rows, "flex (plain)")
        add("own flash_attention, ms (limit: FlexAttention)", shape, *values)
    for shape, rows in shapes.items():
        limit = 3 * sizes[shape].slice_bytes / 1e6 if shape in sizes else None
        add("extra peak memory, MB (limit: 3 B*R*V*4 bytes)", shape, rows.get("ours", {}).get("extra_mb"), limit)
    time = both(shapes.get("T131072", {}), "ours")
    lines.append(["forward and backward run, ms", "T131072", number(time), "-", "pass" if time else "not measured"])
    return lines


def slices_table(data: dict[str, Any]) -> str:
    lines = [
        [
            f"{row['shape']}, {row['pass']}",
            number(row["ms"]),
            number(row["floor_ms"]),
            number(row["ms"] / row["floor_ms"]),
            number(row["tflops"]),
        ]
        for row in data["slices"]
    ]
    return table(["", "ms", "floor ms", "times floor", "TFLOP/s"], lines)


def tiles_table(data: dict[str, Any]) -> str:
    lines = []
    for row in data["tiles"]:
        tile = f"{row['tile']}, {row['num_warps']} warps, {row['num_stages']} stages"
        in_table = "in the table" if row["in_table"] else ""
        measured = number(row["ms"]) if "ms" in row else row["skipped"].splitlines()[0]
        lines.append([f"{row['kernel']}, D{row['width']}", tile, in_table, measured])
    return table(["kernel", "tile", "", "ms"], lines)


def kernels_table(data: dict[str, Any]) -> str:
    lines = [
        [f"{row['shape']}, {row['contender']}", f"`{row['kernel']}`", number(row["calls"]), number(row["ms"])]
        for row in data["kernels"]
    ]
    return table(["", "kernel", "calls", "ms"], lines)


def attention(data: dict[str, Any]) -> list[str]:
    """What was measured of attention."""
    sizes = {shape.name: shape for shape in SHAPES}
    shapes = by_shape(data, ATTENTION)
    parts = ["## Targets of attention", table(["", "shape", "measured", "limit", ""], targets(shapes, sizes))]
    parts = parts if data.get("planned") else []
    for name, rows in shapes.items():
        first = next(iter(rows.values()))
        parts += [f"## {name}: {first['size']}, {first['dtype']}", shape_table(rows, COLUMNS)]
    parts.append(
        "± is by how much two passes over all contenders differed; 'over plain' is the time beyond the fastest plain "
        "attention; 'extra' is peak memory beyond the thriftiest SDPA's; 'host' is the time to issue the work, which the "
        "device did not wait for. A star: further from float64 than twice eager attention."
    )
    if data.get("slices"):
        parts += ["## Passes over the slice, from a given LSE", slices_table(data)]
    if data.get("kernels"):
        parts += ["## Kernels of a forward and backward pass", kernels_table(data)]
    if data.get("tiles"):
        parts += ["## Tiles", tiles_table(data)]
    return parts


def markdown(data: dict[str, Any]) -> str:
    """The report of one device."""
    parts = [*opening(data, data["device"]), *outcome(data), "```\n" + overview(data) + "\n```"]
    parts += [*attention(data), *vocabulary(data)]
    for name, rows in by_shape(data, RELATION).items():
        first = next(iter(rows.values()))
        parts += [f"## {RELATION}, {name}: {first['size']}, {first['dtype']}", shape_table(rows, COLUMNS)]
    return "\n\n".join(parts)


def closing(path: Path) -> list[str]:
    """Lines that end a run: one table, the picture, all figures."""
    data = json.loads(path.read_text())
    picture = plot(data, path.with_suffix(".png"))
    where = f"{data['device']}, {data['threads']} threads on {data['cores']} cores, load {data['load_average']:.1f}"
    about = [
        where + "; a forward and backward pass",
        "times ours: a median over turns; peak MB: beside the inputs; (no loss): attention alone",
        "eager: whole matrices, as output_attentions=True makes them; a star: further from float64 than twice eager",
    ]
    if any(row["contender"] == UNCOMPILED for row in data.get("rows", [])):
        about.append("liger compiled, which takes most of a minute: pytest benchmarks/bench_linear_distillation.py")
    if not data["compiled"]:
        about.append("cdistill._C was not built: on the CPU ours is the torch implementation")
    files = [f"picture: {picture}", f"all figures: {path}"] if picture else [f"all figures: {path}"]
    return [*about, "", *overview(data).splitlines(), *outcome(data), "", *files]


def report(folder: Path, say: Callable[[str], None] = print) -> None:
    files = sorted(folder.glob("*/results.json"))
    if not files:
        say(NOTHING)
    for file in files:
        data = json.loads(file.read_text())
        picture = plot(data, file.with_suffix(".png"))
        say(markdown(data) + (f"\n\npicture: {picture}\n" if picture else "\n"))


def main() -> None:
    parser = argparse.ArgumentParser(description="Tables and a picture of the benchmarks' results.")
    parser.add_argument(
        "folder", nargs="?", type=Path, default=results_folder(), help="where <device>/results.json lie"
    )
    report(parser.parse_args().folder)


if __name__ == "__main__":
    main()
