"""Charts as inline SVG: plain strings, no script, no font or file from elsewhere, legible from a phone to a desktop."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from PIL import Image

INK, MUTED, GRID = "#1b1f24", "#57606a", "#d8dee4"
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


def _text(
    x: float, y: float, content: str, *, anchor: str = "start", size: float = 12, colour: str = INK, more: str = ""
) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}" fill="{colour}" {more}>'
        f"{escape(content)}</text>"
    )


def _line(x1: float, y1: float, x2: float, y2: float, colour: str, width: float = 1) -> str:
    ends = f'x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"'
    return f'<line {ends} stroke="{colour}" stroke-width="{width}"/>'


def _rect(x: float, y: float, width: float, height: float, *, fill: str, more: str = "", tip: str = "") -> str:
    place = f'x="{x:.2f}" y="{y:.2f}" width="{width:.2f}" height="{height:.2f}"'
    inside = f"<title>{escape(tip)}</title>" if tip else ""
    return f'<rect {place} fill="{fill}" {more}>{inside}</rect>'


def _svg(height: float, label: str, parts: Sequence[str]) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{escape(label)}">'
        f"<title>{escape(label)}</title>{''.join(parts)}</svg>"
    )


def legend(entries: Mapping[str, str]) -> str:
    """Names with a swatch of their colour, as HTML."""
    items = "".join(
        f'<span><i style="background:{colour}"></i>{escape(name)}</span>' for name, colour in entries.items()
    )
    return f'<p class="legend">{items}</p>'


def bar_chart(groups: Mapping[str, Sequence[Bar]], *, label: str, strong: str = "") -> str:
    """Horizontal bars in groups from 0 to 100 %, with whiskers; one name is in bold."""
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
        for bar in bars:
            centre, x = y + thick / 2, left + scale * bar.value
            low, high = bar.interval or (bar.value - bar.error, bar.value + bar.error)
            begin, end = (left + scale * min(max(at, 0.0), 1.0) for at in (low, high))
            tip = f"{bar.name}, {name}: {100 * bar.value:.1f} % (± {100 * bar.error:.1f})"
            parts.append(_rect(left, y + 1, max(x - left, 0.5), thick - 2, fill=bar.colour, more='rx="2"', tip=tip))
            parts.append(_line(begin, centre, end, centre, INK, 1.5))
            parts.append(_text(end + 5, centre + 3.5, f"{100 * bar.value:.1f}", size=10.5, colour=MUTED))
            y += thick
        y += gap
    return _svg(height, label, parts)


def thumbnail(image: Image.Image, size: int = 256) -> str:
    """Data URL of an image of at most ``size`` pixels to either side; one of few pixels is enlarged, pixel by pixel."""
    small, buffer = image.convert("RGB"), io.BytesIO()
    small.thumbnail((size, size))
    times = max(1, size // 2 // max(small.size))
    small = small.resize((times * small.width, times * small.height), Image.Resampling.NEAREST)
    small.save(buffer, format="JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
