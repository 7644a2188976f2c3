"""Tables and plots of the GPU benchmarks' results: `python -m benchmarks.report [FOLDER]`.

FOLDER holds <gpu>/attention.json and <gpu>/distillation.json; by default benchmarks/results, or what CDISTILL_RESULTS says.
Markdown goes to standard output, a picture of attention per GPU beside its JSON. Nothing is computed that was not measured.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import _report_distillation
from benchmarks._contenders import COMPILED_STACK, SHAPES, Shape
from benchmarks._measure import results_folder
from benchmarks._tables import Rows, both, by_shape, mark, number, opening, shape_table, table, verdict

NOTHING = "no GPU results yet: run pytest benchmarks/ -m gpu on a machine with one"

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


def markdown(data: dict[str, Any]) -> str:
    """The report of attention on one GPU."""
    sizes = {shape.name: shape for shape in SHAPES}
    shapes = by_shape(data)
    parts = opening(data, data["gpu"])
    parts.append("## Targets")
    parts.append(table(["", "shape", "measured", "limit", ""], targets(shapes, sizes)))
    for name, rows in shapes.items():
        first = next(iter(rows.values()))
        parts += [f"## {name}: {first.get('size', '')}, {first['dtype']}", shape_table(rows, COLUMNS)]
    parts.append(
        "± is by how much two passes over all contenders differed; 'over plain' is the time beyond the fastest plain "
        "attention; 'extra' is peak memory beyond the thriftiest SDPA's; 'host' is the time to issue the work, which the "
        "device did not wait for. A star: further from float64 than twice eager attention."
    )
    if data.get("slices"):
        parts += ["## Passes over the slice, from a given LSE", slices_table(data)]
    if data.get("tiles"):
        parts += ["## Tiles", tiles_table(data)]
    return "\n\n".join(parts)


def colour(contender: str) -> str:
    if contender.startswith("ours"):
        return "tab:blue"
    return "tab:gray" if "einsum" not in contender and contender != "eager" else "tab:orange"


def plot(data: dict[str, Any], path: Path) -> None:
    """One bar chart per shape, of forward and backward; darker is the forward part."""
    from matplotlib.figure import Figure

    shapes = {
        name: sorted((r for r in rows.values() if "both_ms" in r), key=lambda r: -r["both_ms"])
        for name, rows in by_shape(data).items()
    }
    shapes = {name: rows for name, rows in shapes.items() if rows}
    if not shapes:
        return
    lines = -(-len(shapes) // 2)
    figure = Figure(figsize=(15, 0.5 + 3.2 * lines), layout="constrained")
    axes = iter(figure.subplots(lines, 2, squeeze=False).flat)
    for axis, (name, rows) in zip(axes, shapes.items(), strict=False):
        colours = [colour(row["contender"]) for row in rows]
        names = [mark(row).replace(" (gradient", "\n(gradient") for row in rows]
        positions = range(len(rows))
        forward, total = [row["forward_ms"] for row in rows], [row["both_ms"] for row in rows]
        axis.barh(positions, total, color=colours, alpha=0.5)
        axis.barh(positions, forward, color=colours)
        axis.set_yticks(positions, names, fontsize=8)
        axis.bar_label(axis.containers[0], labels=[f" {number(x)}" for x in total], fontsize=8)
        axis.set_title(f"{name}: {rows[0].get('size', '')} {rows[0]['dtype']}", fontsize=9, loc="left")
        axis.margins(x=0.1)
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_xlabel("ms, forward (dark) and backward", fontsize=8)
    for axis in axes:
        axis.remove()
    figure.suptitle(f"Attention with its alignment loss (gray: without), {data['gpu']}", fontsize=11)
    figure.savefig(path, dpi=130)


def report(folder: Path, say: Callable[[str], None] = print) -> None:
    files = sorted(file for name in ("attention", "distillation") for file in folder.glob(f"*/{name}.json"))
    if not files:
        say(NOTHING)
    for file in files:
        data = json.loads(file.read_text())
        if file.stem == "distillation":
            say(_report_distillation.markdown(data) + "\n")
        else:
            say(markdown(data) + "\n")
            plot(data, file.with_suffix(".png"))


def main() -> None:
    parser = argparse.ArgumentParser(description="Tables and plots of the GPU benchmarks' results.")
    parser.add_argument("folder", nargs="?", type=Path, default=results_folder(), help="where <gpu>/*.json lie")
    report(parser.parse_args().folder)


if __name__ == "__main__":
    main()
