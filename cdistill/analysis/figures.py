"""Figures of matplotlib as inline SVG whose colours follow the page: light, dark, or printed."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Hex values that stand for a variable of the page's style. Lines also differ by dash and marker, for print without colour.
_INK, _MUTED, _GRID = "#1b1f24", "#57606a", "#d8dee4"
SERIES = ("#5b6470", "#c2570c", "#1d4ed8", "#15803d", "#9d174d", "#6d28d9", "#0e7490", "#a16207")
DARK_SERIES = ("#a3adb8", "#f59e5b", "#7aa7ff", "#5ecb85", "#f28cb8", "#b79cf7", "#5cc8df", "#e0b04c")
_DASHES = ("-", "--", "-.", ":")
_MARKERS = "sovD^P*X"
_WIDTH, _HEIGHT = 4.8, 3.1  # inches; 12 units of text in charts of 480

_VARIABLES = {_INK: "--ink", _MUTED: "--muted", _GRID: "--grid", **{c: f"--series{i}" for i, c in enumerate(SERIES)}}
STYLE = (
    ":root {"
    + "".join(f"{name}: {colour}; " for colour, name in _VARIABLES.items())
    + "}\n@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --muted: #9da7b1; --grid: #30363d; "
    + "".join(f"--series{i}: {colour}; " for i, colour in enumerate(DARK_SERIES))
    + "} }\n@media print { :root {"
    + "".join(f"{name}: {colour}; " for colour, name in _VARIABLES.items())
    + "} }\n"
)


@dataclass(frozen=True)
class Line:
    """A curve with its 95 % band; ``series`` chooses colour, dash and marker. Values that are not numbers leave gaps."""

    name: str
    series: int
    x: Sequence[float]
    y: Sequence[float | None]
    low: Sequence[float | None] | None = None
    high: Sequence[float | None] | None = None


def lines(
    curves: Sequence[Line],
    *,
    title: str,
    x: str,
    y: str,
    label: str,
    span: tuple[float, float] | None = None,
    logarithmic: bool = False,
) -> str:
    """Curves on one pair of axes.

    Args:
        title: and ``x`` and ``y``, what the axes are.
        label: what the picture shows, in words.
        span: ends of the y axis.
        logarithmic: x is shown by its logarithm, with a tick at every point of a curve.
    """
    figure, axes = _axes(title, x, y)
    for curve in curves:
        colour, values = SERIES[curve.series % len(SERIES)], np.array(curve.y, np.float64)
        axes.plot(
            curve.x,
            values,
            color=colour,
            linestyle=_DASHES[curve.series % len(_DASHES)],
            marker=_MARKERS[curve.series % len(_MARKERS)],
            markersize=4,
            linewidth=1.5,
            label=curve.name,
        )
        if curve.low is not None and curve.high is not None:
            ends = (np.array(end, np.float64) for end in (curve.low, curve.high))
            axes.fill_between(curve.x, *ends, color=colour, alpha=0.18, linewidth=0)
    if span is not None:
        axes.set_ylim(*span)
    if logarithmic:
        ticks = sorted({point for curve in curves for point in curve.x})
        axes.set_xscale("log")
        axes.set_xticks(ticks, [f"{tick:,g}" if tick < 1e6 else f"{tick:.0e}" for tick in ticks])
        axes.minorticks_off()
    else:
        axes.locator_params(axis="x", integer=True, nbins=12)
    _legend(axes, len(curves))
    return svg(figure, label)


def bars(
    groups: Mapping[str, Sequence[tuple[float, float]]], names: Sequence[str], *, title: str, x: str, label: str
) -> str:
    """Lying bars from 0 to 100, of every group one for each of ``names``: values and the lengths of their error bars."""
    figure, axes = _axes(title, x, "", height=0.9 + 0.42 * len(groups))
    thick = 0.8 / len(names)
    for i, name in enumerate(names):
        places = [place + thick * (i - (len(names) - 1) / 2) for place in range(len(groups))]
        values, errors = zip(*(pairs[i] for pairs in groups.values()), strict=True)
        colour = SERIES[1 + i % (len(SERIES) - 1)]
        axes.barh(places, values, 0.9 * thick, color=colour, label=name, hatch=("", "//")[i % 2], edgecolor=_GRID)
        axes.errorbar(values, places, xerr=errors, fmt="none", ecolor=_INK, elinewidth=1, capsize=2)
    axes.set_yticks(range(len(groups)), list(groups), color=_INK)
    axes.invert_yaxis()
    axes.set_xlim(0, 103)
    axes.grid(False, axis="y")
    figure.legend(fontsize=8, frameon=False, labelcolor=_INK, loc="outside lower center", ncols=len(names))
    return svg(figure, label)


@dataclass(frozen=True)
class Point:
    """A value with its 95 % interval; ``series`` chooses colour and marker. None is not drawn."""

    name: str
    series: int
    value: float | None
    low: float | None
    high: float | None


def points(groups: Mapping[str, Sequence[Point]], *, title: str, x: str, label: str) -> str:
    """Values beside zero, in rows of which the first is on top; ``label`` says what the picture shows."""
    most = max(map(len, groups.values()))
    figure, axes = _axes(title, x, "", 0.9 + len(groups) * (0.1 + 0.12 * most))
    axes.axvline(0, color=_MUTED, linewidth=1)
    axes.set_yticks(range(len(groups)), list(groups))
    axes.invert_yaxis()
    named: dict[str, Any] = {}
    for row, group in enumerate(groups.values()):
        for place, point in enumerate(group):
            if point.value is None or point.low is None or point.high is None:
                continue
            y = row + 0.6 * ((place + 0.5) / most - 0.5)
            colour = SERIES[point.series % len(SERIES)]
            axes.plot([point.low, point.high], [y, y], color=colour, linewidth=1.5)
            marker = _MARKERS[point.series % len(_MARKERS)]
            (named[point.name],) = axes.plot(
                [point.value], [y], color=colour, marker=marker, markersize=4, linestyle=""
            )
    if named:
        options = {"fontsize": 8, "frameon": False, "labelcolor": _INK, "ncols": 3}
        figure.legend(list(named.values()), list(named), loc="outside lower left", **options)
    return svg(figure, label)


def cells(values: Sequence[Sequence[float]], *, title: str, x: str, y: str, rows: Sequence[Any], label: str) -> str:
    """A matrix of numbers in 0..1 as shaded cells; ``rows`` name them from the bottom."""
    figure, axes = _axes(title, x, y)
    shown = np.array(values, np.float64)
    axes.grid(False)
    picture = axes.pcolormesh(shown, cmap="cividis", vmin=min(0.0, float(np.nanmin(shown))), vmax=1, edgecolors="none")
    axes.set_yticks(np.arange(len(rows)) + 0.5, [str(row) for row in rows])
    step = max(1, shown.shape[1] // 12)
    axes.set_xticks(np.arange(0, shown.shape[1], step) + 0.5, [str(i) for i in range(0, shown.shape[1], step)])
    if shown.size <= 96:
        for (i, j), value in np.ndenumerate(shown):
            axes.text(j + 0.5, i + 0.5, f"{value:.2f}", ha="center", va="center", fontsize=7, color=_on(value))
    bar = figure.colorbar(picture, ax=axes)
    bar.ax.tick_params(colors=_MUTED, labelsize=8)
    return svg(figure, label)


def _on(value: float) -> str:
    return "#000000" if value > 0.55 else "#ffffff"


def svg(figure: Figure, label: str) -> str:
    """A figure as an element of a page, with its description."""
    import matplotlib

    out = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "cdistill", "svg.image_inline": True}):
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    box = re.search(r'viewBox="([^"]+)"', text)
    assert box is not None, "matplotlib writes a viewBox"
    text = re.sub(r' id="[A-Za-z]+[\w.]*_\d+"', "", text[text.index(">") + 1 :])  # axes_1, of every figure
    for colour, name in _VARIABLES.items():
        text = text.replace(colour, f"var({name})")
    head = (
        f'<svg xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="{box[1]}" role="img" aria-label="{escape(label)}">'
    )
    return f"{head}<title>{escape(label)}</title>{text.strip()}"


def _axes(title: str, x: str, y: str, height: float = _HEIGHT) -> tuple[Any, Any]:
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    figure = Figure((_WIDTH, height), layout=ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.08))
    axes = figure.add_subplot()
    axes.set_title(title, fontsize=10, color=_INK, loc="left", fontweight="bold")
    axes.set_xlabel(x, fontsize=9, color=_MUTED)
    axes.set_ylabel(y, fontsize=9, color=_MUTED)
    axes.tick_params(colors=_MUTED, labelsize=8)
    axes.grid(True, color=_GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    for name, spine in axes.spines.items():
        spine.set_visible(name in ("left", "bottom"))
        spine.set_color(_MUTED)
    return figure, axes


def _legend(axes: Any, count: int) -> None:
    if count:
        axes.legend(fontsize=8, frameon=False, labelcolor=_INK, loc="best", handlelength=3)
