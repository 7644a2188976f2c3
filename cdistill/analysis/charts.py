"""Charts as inline SVG: plain strings, no script, no font or file from elsewhere, legible from a phone to a desktop."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
from PIL import Image

from cdistill.builtin.render import to_image

INK, MUTED, GRID, PAPER = "#1b1f24", "#57606a", "#d8dee4", "#ffffff"
FRAME, GLOW = "#d97706", "#22d3ee"  # cyan: no object of the built-in task has it
CRISP = 'shape-rendering="crispEdges"'  # else seams show between neighbouring cells
WIDTH = (
    480  # of every chart, in user units: text of 12 units stays legible when a phone shows the chart 340 pixels wide
)


@dataclass(frozen=True)
class Bar:
    """A value in 0..1 with its uncertainty, and the name and colour of whom it belongs to.

    Whiskers reach one error to either side, or over ``interval`` where it is given.
    """

    name: str
    colour: str
    value: float
    error: float
    interval: tuple[float, float] | None = None


@dataclass(frozen=True)
class Curve:
    """A line through (x, y) points; the line is broken where a new piece starts."""

    name: str
    colour: str
    pieces: Sequence[Sequence[tuple[float, float]]]


def _text(
    x: float, y: float, content: str, *, anchor: str = "start", size: float = 12, colour: str = INK, more: str = ""
) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}" fill="{colour}" {more}>'
        f"{escape(content)}</text>"
    )


def _line(x1: float, y1: float, x2: float, y2: float, colour: str, width: float = 1, more: str = "") -> str:
    ends = f'x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"'
    return f'<line {ends} stroke="{colour}" stroke-width="{width}" {more}/>'


def _rect(x: float, y: float, width: float, height: float, *, fill: str, more: str = "", tip: str = "") -> str:
    place = f'x="{x:.2f}" y="{y:.2f}" width="{width:.2f}" height="{height:.2f}"'
    inside = f"<title>{escape(tip)}</title>" if tip else ""
    return f'<rect {place} fill="{fill}" {more}>{inside}</rect>'


def _svg(height: float, label: str, parts: Sequence[str], width: float = WIDTH) -> str:
    return (
        f'<svg viewBox="0 0 {width:g} {height:.0f}" role="img" aria-label="{escape(label)}">'
        f"<title>{escape(label)}</title>{''.join(parts)}</svg>"
    )


def legend(entries: Mapping[str, str]) -> str:
    """Names with a swatch of their colour, as HTML."""
    items = "".join(
        f'<span><i style="background:{colour}"></i>{escape(name)}</span>' for name, colour in entries.items()
    )
    return f'<p class="legend">{items}</p>'


def bar_chart(
    groups: Mapping[str, Sequence[Bar]], baselines: Mapping[str, float], *, label: str, strong: str = "average"
) -> str:
    """Horizontal bars in groups from 0 to 100 %, with whiskers, a dotted mark at the baseline; one name is in bold."""
    left, right, thick, gap, top = max(92, 20 + 7 * max(map(len, groups), default=0)), 44, 13, 12, 8
    scale = WIDTH - left - right
    parts: list[str] = []
    height = top + sum(len(bars) * thick + gap for bars in groups.values()) + 22
    for tick in range(0, 101, 25):
        x = left + scale * tick / 100
        parts.append(_line(x, top - 4, x, height - 22, GRID))
        parts.append(_text(x, height - 7, f"{tick} %", anchor="middle", size=11, colour=MUTED))
    y: float = top
    for name, bars in groups.items():
        middle = y + len(bars) * thick / 2
        weight = 'font-weight="700"' if name == strong else ""
        parts.append(_text(left - 8, middle + 4, name, anchor="end", more=weight))
        start = y
        for bar in bars:
            centre, x = y + thick / 2, left + scale * bar.value
            low, high = bar.interval or (bar.value - bar.error, bar.value + bar.error)
            begin, end = (left + scale * min(max(at, 0.0), 1.0) for at in (low, high))
            tip = f"{bar.name}, {name}: {100 * bar.value:.1f} % (± {100 * bar.error:.1f})"
            parts.append(_rect(left, y + 1, max(x - left, 0.5), thick - 2, fill=bar.colour, more='rx="2"', tip=tip))
            parts.append(_line(begin, centre, end, centre, INK, 1.5))
            parts.append(_text(end + 5, centre + 3.5, f"{100 * bar.value:.1f}", size=10.5, colour=MUTED))
            y += thick
        if name in baselines:
            x = left + scale * baselines[name]
            parts.append(_line(x, start - 2, x, y + 2, PAPER, 3.5))
            parts.append(_line(x, start - 2, x, y + 2, INK, 1.5, 'stroke-dasharray="2 2"'))
        y += gap
    return _svg(height, label, parts)


def _log_ticks(low: float, high: float) -> list[float]:
    powers = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1)
    several = math.log10(high / low) < 2
    return [m * 10.0**p for p in powers for m in ((1, 2, 5) if several else (1,)) if low <= m * 10.0**p <= high]


def line_chart(
    curves: Sequence[Curve], stages: Sequence[tuple[float, str]], *, title: str, x_label: str, label: str
) -> str:
    """Curves on a logarithmic y axis; ``stages`` are the (end, name) of the spans that the x axis is divided into."""
    left, right, top, bottom, height = 46, 12, 40, 40, 260
    points = [p for curve in curves for piece in curve.pieces for p in piece if p[1] > 0]
    if not points:
        return _svg(60, label, [_text(WIDTH / 2, 34, f"{title}: nothing was logged", anchor="middle", colour=MUTED)])
    x_max = max([end for end, _ in stages] + [x for x, _ in points])
    low, high = min(y for _, y in points) / 1.15, max(y for _, y in points) * 1.15

    def place(x: float, y: float) -> tuple[float, float]:
        depth = math.log(high / max(y, low)) / math.log(high / low)
        return left + (WIDTH - left - right) * x / x_max, top + (height - top - bottom) * depth

    parts = [_text(left, 14, title, size=13, more='font-weight="600"')]
    for tick in _log_ticks(low, high):
        _, y = place(0, tick)
        parts += [
            _line(left, y, WIDTH - right, y, GRID),
            _text(left - 6, y + 4, f"{tick:g}", anchor="end", size=11, colour=MUTED),
        ]
    begin = 0.0
    for end, name in stages:
        x, x_begin = place(end, high)[0], place(begin, high)[0]
        if end < x_max:
            parts.append(_line(x, top - 4, x, height - bottom, MUTED, 1, 'stroke-dasharray="3 3"'))
        parts.append(_text((x + x_begin) / 2, top - 9, name, anchor="middle", size=11, colour=MUTED))
        begin = end
    parts.append(_line(left, height - bottom, WIDTH - right, height - bottom, MUTED))
    for share in (0, 0.5, 1):
        x = left + (WIDTH - left - right) * share
        anchor = ("start", "middle", "end")[round(2 * share)]
        parts.append(_text(x, height - bottom + 16, f"{x_max * share:,.0f}", anchor=anchor, size=11, colour=MUTED))
    parts.append(_text((left + WIDTH - right) / 2, height - 6, x_label, anchor="middle", size=11, colour=MUTED))
    for curve in curves:
        for piece in curve.pieces:
            path = " ".join("{:.1f},{:.1f}".format(*place(x, y)) for x, y in piece)
            if len(piece) == 1:
                x, y = place(*piece[0])
                parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5" fill="{curve.colour}"/>')
            elif piece:
                look = f'fill="none" stroke="{curve.colour}" stroke-width="1.8" stroke-linejoin="round"'
                parts.append(f'<polyline points="{path}" {look}><title>{escape(curve.name)}</title></polyline>')
    return _svg(height, label, parts)


def _mix(share: float) -> str:
    """White to dark blue."""
    ends = ((247, 251, 255), (107, 174, 214), (8, 48, 107))
    low, high, t = (*ends[:2], 2 * share) if share < 0.5 else (*ends[1:], 2 * share - 1)
    return "#" + "".join(f"{round(a + (b - a) * t):02x}" for a, b in zip(low, high, strict=True))


def heatmap(
    values: Sequence[Sequence[float]],
    outlined: Collection[tuple[int, int]],
    *,
    title: str,
    row_label: str,
    column_label: str,
    low: float,
    high: float,
    label: str,
) -> str:
    """A matrix of values as shaded cells and numbers, rows from 1 at the bottom; some cells outlined."""
    left, top, right, bottom = 54, 30, 8, 42
    rows, columns = len(values), len(values[0])
    width = (WIDTH - left - right) / columns
    cell = min(36.0, max(width, 18.0))
    height = top + rows * cell + bottom
    parts = [_text(left, 16, title, size=13, more='font-weight="600"')]
    frames = []
    for i, row in enumerate(values):
        y = top + (rows - 1 - i) * cell
        parts.append(_text(left - 7, y + cell / 2 + 4, str(i + 1), anchor="end", size=11, colour=MUTED))
        for j, value in enumerate(row):
            x = left + j * width
            share = min(max((value - low) / max(high - low, 1e-9), 0.0), 1.0)
            parts.append(
                f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{cell:.1f}" fill="{_mix(share)}"/>'
            )
            if width >= 26:
                colour = "#ffffff" if share > 0.5 else INK
                parts.append(
                    _text(x + width / 2, y + cell / 2 + 4, f"{value:.2f}", anchor="middle", size=11, colour=colour)
                )
            if (i, j) in outlined:
                frame = f'stroke="{FRAME}" stroke-width="3"'
                frames.append(_rect(x + 1.5, y + 1.5, width - 3, cell - 3, fill="none", more=frame))
    parts += frames
    for j in range(columns):
        if width >= 14 or j % 4 == 3:
            x = left + (j + 0.5) * width
            parts.append(_text(x, height - bottom + 16, str(j + 1), anchor="middle", size=11, colour=MUTED))
    parts.append(_text((left + WIDTH - right) / 2, height - 8, column_label, anchor="middle", size=11, colour=MUTED))
    middle = top + rows * cell / 2
    parts.append(
        _text(
            14,
            middle,
            row_label,
            anchor="middle",
            size=11,
            colour=MUTED,
            more=f'transform="rotate(-90 14 {middle:.1f})"',
        )
    )
    return _svg(height, label, parts)


def png(image: np.ndarray) -> str:
    """Data URL of an image (3, H, W) in [-1, 1]."""
    buffer = io.BytesIO()
    to_image(image).save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def thumbnail(image: Image.Image, size: int = 256) -> str:
    """Data URL of an image of at most ``size`` pixels to either side; one of few pixels is enlarged, pixel by pixel."""
    small, buffer = image.convert("RGB"), io.BytesIO()
    small.thumbnail((size, size))
    times = max(1, size // 2 // max(small.size))
    small = small.resize((times * small.width, times * small.height), Image.Resampling.NEAREST)
    small.save(buffer, format="JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def attention_map(image: str, weights: Sequence[float] | None, *, label: str) -> str:
    """An image (data URL) under a square grid of attention weights in raster order, the largest at full strength."""
    size = 96
    parts = [f'<image href="{image}" width="{size}" height="{size}" style="image-rendering:pixelated"/>']
    if weights is not None:
        side = math.isqrt(len(weights))
        if side * side != len(weights):
            raise ValueError(f"weights must fill a square grid, got {len(weights)}")
        peak, step = max(max(weights), 1e-12), size / side
        parts.append(_rect(0, 0, size, size, fill="#000000", more='opacity="0.35"'))
        for i, weight in enumerate(weights):
            share, x, y = weight / peak, i % side * step, i // side * step
            look = f'opacity="{0.8 * share:.3f}" {CRISP}'
            parts.append(_rect(x, y, step, step, fill=GLOW, more=look, tip=f"{100 * weight:.1f} %"))
    return _svg(size, label, parts, width=size)
