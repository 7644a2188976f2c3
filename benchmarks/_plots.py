"""One picture of a device's results: bars of time and memory, both against the length, and the roofline with our points."""

import itertools
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks._cases import ATTENTION
from benchmarks._tables import PLAIN, by_shape, mark, number

Panel = Callable[[Any], None]
LENGTHS = (
    ("overhead_percent_over_best_plain", "Attention: time over the fastest without a loss", "%"),
    ("peak_mb", "Attention: peak memory beside the inputs", "MB"),
)


def colour(contender: str) -> str:
    if contender.startswith("ours"):
        return "tab:blue"
    return "tab:gray" if contender in PLAIN else "tab:orange"


def _finish(axis: Any, title: str, x: str, y: str = "") -> None:
    axis.set_title(title, fontsize=9, loc="left")
    axis.set_xlabel(x, fontsize=8)
    axis.set_ylabel(y, fontsize=8)
    axis.tick_params(labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)


def bars(axis: Any, name: str, rows: list[dict[str, Any]]) -> None:
    """Time of each contender, darker its forward part; its memory stands behind its time."""
    rows = sorted(rows, key=lambda r: -r["both_ms"])
    positions, total = range(len(rows)), [row["both_ms"] for row in rows]
    colours = [colour(row["contender"]) for row in rows]
    axis.barh(positions, total, color=colours, alpha=0.5)
    axis.barh(positions, [row["forward_ms"] for row in rows], color=colours)
    axis.set_yticks(positions, [mark(row).replace(" (gradient", "\n(gradient") for row in rows], fontsize=8)
    memory = [f", {number(row['peak_mb'])} MB" if row.get("peak_mb") is not None else "" for row in rows]
    labels = [f" {number(ms)} ms{mb}" for ms, mb in zip(total, memory, strict=True)]
    axis.bar_label(axis.containers[0], labels=labels, fontsize=8)
    axis.margins(x=0.3)
    _finish(
        axis, f"{name}: {rows[0].get('size', '')} {rows[0]['dtype']}", "ms, forward (dark) and backward; peak memory"
    )


def against_length(axis: Any, series: dict[str, list[tuple[int, float]]], title: str, y: str) -> None:
    """A line for each contender that was measured at two lengths or more."""
    markers = itertools.cycle("os^vDPX*")
    for contender, points in series.items():
        x, values = zip(*sorted(points), strict=True)
        axis.plot(x, values, marker=next(markers), label=contender, linewidth=1.2, markersize=4)
    axis.set_xscale("log", base=2)
    lengths = sorted({x for points in series.values() for x, _ in points})
    axis.set_xticks(lengths, [f"{x}" for x in lengths])
    axis.minorticks_off()
    if y == "MB":
        axis.set_yscale("log")
    axis.legend(fontsize=7, frameon=False)
    _finish(axis, title, "tokens (batch and heads: see above)", y)


def lengths(data: dict[str, Any], key: str) -> dict[str, list[tuple[int, float]]]:
    """Of attention, by contender: (tokens, figure), for one head dimension, heads as they come."""
    found: dict[str, list[tuple[int, float]]] = {}
    for name, rows in by_shape(data, ATTENTION).items():
        if " " in name or not name.startswith("T"):  # shapes that vary something else
            continue
        for contender, row in rows.items():
            if row.get(key) is not None:
                found.setdefault(contender, []).append((row["tokens"], row[key]))
    return {contender: points for contender, points in found.items() if len(points) > 1}


def roofline_points(data: dict[str, Any]) -> list[tuple[str, float, float]]:
    """(what, operations per byte, TFLOP/s) of ours: every op, and the passes over the slice."""
    rows = [r for r in data.get("rows", []) if r["contender"] in ("ours", "flash_attention (own)") and "tflops" in r]
    named = [(f"{r['op']}, {r['shape']}" if r["contender"] == "ours" else f"own flash, {r['shape']}", r) for r in rows]
    named += [(f"{r['pass']}, {r['shape']}", r) for r in data.get("slices", [])]
    return [(name, row["flops"] / row["bytes"], row["tflops"]) for name, row in named]


def roofline(axis: Any, rates: dict[str, float], points: list[tuple[str, float, float]]) -> None:
    """Measured ceilings; a point's operations are those that must be done, its bytes every input and result once."""
    flops, copy = rates["matmul_tflops"], rates["copy_tb_per_s"]
    ridge, most = flops / copy, max(x for _, x, _ in points)
    x = [min(ridge / 8, min(x for _, x, _ in points) / 2), ridge, max(most, ridge) * 2]
    axis.plot(x, [min(flops, copy * value) for value in x], color="black", linewidth=1)
    markers = itertools.cycle("os^vDPX*<>hp")
    for name, intensity, tflops in points:
        axis.plot([intensity], [tflops], linestyle="", marker=next(markers), markersize=5, label=name)
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.legend(fontsize=6, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    title = f"Roofline: {number(flops)} TFLOP/s in a product, {number(copy)} TB/s in a copy"
    _finish(axis, title, "operations per byte that must be moved", "TFLOP/s")


def panels(data: dict[str, Any]) -> list[Panel]:
    found: list[Panel] = []
    for op in dict.fromkeys(row["op"] for row in data.get("rows", [])):
        for name, rows in by_shape(data, op).items():
            timed = [row for row in rows.values() if "both_ms" in row]
            if timed:
                found.append(partial(bars, name=f"{op}, {name}", rows=timed))
    if "rates" in data and (points := roofline_points(data)):
        found.append(partial(roofline, rates=data["rates"], points=points))
    for key, title, y in LENGTHS:
        if series := lengths(data, key):
            found.append(partial(against_length, series=series, title=title, y=y))
    return found


def plot(data: dict[str, Any], path: Path) -> Path | None:
    """The picture's path; none where nothing was timed."""
    from matplotlib.figure import Figure

    drawn = panels(data)
    if not drawn:
        return None
    lines = -(-len(drawn) // 2)
    figure = Figure(figsize=(15, 0.5 + 3.4 * lines), layout="constrained")
    axes = iter(figure.subplots(lines, 2, squeeze=False).flat)
    for panel, axis in zip(drawn, axes, strict=False):
        panel(axis)
    for axis in axes:
        axis.remove()
    figure.suptitle(
        f"cdistill (blue) beside its rivals (gray: attention without a loss), {data['device']}", fontsize=11
    )
    figure.savefig(path, dpi=110)
    return path
