"""Charts of runs as Vega-Lite specifications, their numbers as columns, and the same in words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from cdistill.report.history import MEASURED, RunHistory
from cdistill.report.thinning import thinned
from cdistill.train.terms import TERMS

COLUMNS = 200  # of a picture of layers
HEIGHT = 220
SAMPLES = "samples seen"
# Titles and units of what a run logs beside its terms.
TITLES = {
    "loss": ("Loss, all terms weighted", "loss"),
    "grad_norm": ("Norm of the gradient", "norm, before clipping"),
    "learning_rate": ("Learning rate", "learning rate"),
    "samples_per_s": ("Samples a second", "samples/s"),
    "tokens_per_s": ("Tokens a second", "tokens/s, padding left out"),
    "memory_mb": ("Memory of the first process", "MB, the most so far"),
    "skipped": ("Steps skipped, not finite", "steps, since the stage began"),
}
NOT_SHOWN = {"stage", "step", "samples", "elapsed_s", "processes", *MEASURED}


@dataclass(frozen=True)
class Series:
    """One line of a chart; ``run`` is its place among the runs."""

    run: int
    x: Sequence[int]
    y: Sequence[float | None]


@dataclass(frozen=True)
class Chart:
    """A chart of the page.

    Attributes:
        key: what is shown, as it is logged.
        title: above it.
        unit: of its numbers.
        spec: Vega-Lite, its data left out.
        data: columns, which the page makes rows of.
        said: the same in words, a row of cells for each run, for those who cannot see it.
    """

    key: str
    title: str
    unit: str
    spec: dict[str, Any]
    data: dict[str, list[Any]]
    said: Sequence[Sequence[str]]


def charts(runs: Sequence[RunHistory], names: Sequence[str]) -> list[Chart]:
    """A chart of everything that any of the runs has logged: losses first, then what they cost."""
    keys = dict.fromkeys(key for run in runs for key in run.logged_keys())
    details = [name for term in TERMS.values() for name in term.details if name in keys]
    numbers = [key for key in keys if key not in NOT_SHOWN and key not in details]
    first = [key for key in ("loss", *TERMS) if key in numbers]
    measured = [key for key in numbers if key.partition(".")[0] in MEASURED]
    last = [key for key in numbers if key not in first and key not in measured]
    order = [
        *first,
        *measured,
        *sorted(last, key=lambda key: list(TITLES).index(key) if key in TITLES else len(TITLES)),
    ]
    found = [_lines(key, runs, names) for key in order]
    found += [_layers(name, i, run, names) for name in details for i, run in enumerate(runs) if run.layers(name)[0]]
    return [chart for chart in found if chart is not None]


def _title(key: str) -> tuple[str, str]:
    if key in TITLES:
        return TITLES[key]
    group, _, name = key.partition(".")
    if group == "validation":
        return f"Validation: {_title(name)[0]}", "on samples held out"
    if group == "eval":
        return f"Benchmark: {name}", "as the benchmark counts it"
    return (TERMS[key].title if key in TERMS else key), "mean since the last line"


def _lines(key: str, runs: Sequence[RunHistory], names: Sequence[str]) -> Chart | None:
    series = [Series(i, *run.series(key)) for i, run in enumerate(runs)]
    series = [each for each in series if any(value is not None for value in each.y)]
    if not series or (key == "skipped" and not any(map(any, (each.y for each in series)))):
        return None
    title, unit = _title(key)
    data: dict[str, list[Any]] = {"run": [], "x": [], "y": []}
    for each in series:
        places = thinned(each.y)
        data["run"] += [names[each.run]] * len(places)
        data["x"] += [each.x[i] for i in places]
        data["y"] += [None if (value := each.y[i]) is None else float(f"{value:.6g}") for i in places]
    said = [[names[each.run], *_summary(each)] for each in series]
    words = "; ".join(f"{name}: first {a}, last {b}, lowest {c}, highest {d}" for name, a, b, c, d in said)
    spec = _base(f"{title}. {words}.")
    y = {"field": "y", "type": "quantitative", "title": unit, "scale": {"zero": False}, "axis": {"format": ".3~g"}}
    few = min(len(each.y) for each in series) <= 60
    spec |= {
        "mark": {"type": "line", "interpolate": "linear", "strokeWidth": 1.6, "clip": True, "point": few},
        "encoding": {
            "x": _x(),
            "y": y,
            **({"color": _by_run(names), "strokeDash": _by_run(names)} if len(names) > 1 else {}),
            "tooltip": [
                *([{"field": "run", "title": "run"}] if len(names) > 1 else []),
                {"field": "x", "title": SAMPLES, "format": ","},
                {"field": "y", "title": unit, "format": ".5~g"},
            ],
        },
        "params": [{"name": "zoom", "select": {"type": "interval", "encodings": ["x"]}, "bind": "scales"}],
    }
    if len(names) > 1:
        spec["params"].append({"name": "shown", "select": {"type": "point", "fields": ["run"]}, "bind": "legend"})
        spec["encoding"]["opacity"] = {"condition": {"param": "shown", "value": 1}, "value": 0.12}
    return Chart(key, title, unit, spec, data, said)


def _layers(key: str, place: int, run: RunHistory, names: Sequence[str]) -> Chart:
    """How every layer goes, darker for more: one run's."""
    x, layers = run.layers(key)
    title = "Alignment of every layer" if key == "vat_layers" else key
    title += f": {names[place]}" if len(names) > 1 else ""
    edges = [round(i * len(x) / min(COLUMNS, len(x))) for i in range(min(COLUMNS, len(x)) + 1)]
    data: dict[str, list[Any]] = {"x": [], "x2": [], "layer": [], "y": []}
    width = max(1, (x[-1] - x[0]) // max(1, len(x) - 1))
    for begin, end in pairwise(edges):
        part = layers[begin:end]
        for layer in range(max(map(len, part))):
            values = [each[layer] for each in part if layer < len(each)]
            data["x"].append(x[begin - 1] if begin else x[0] - width)
            data["x2"].append(x[end - 1])
            data["layer"].append(layer)
            data["y"].append(float(f"{sum(values) / len(values):.4g}"))
    first, last = layers[0], layers[-1]
    said = [[f"layer {i}", f"{a:.4g}", f"{b:.4g}"] for i, (a, b) in enumerate(zip(first, last, strict=False))]
    spec = _base(f"{title}, from the first logged step to the last: " + "; ".join(" ".join(row) for row in said))
    spec |= {
        "mark": {"type": "rect"},
        "encoding": {
            "x": _x() | {"scale": {"nice": False, "zero": False}},
            "x2": {"field": "x2"},
            "y": {"field": "layer", "type": "ordinal", "title": "pair of layers", "sort": "descending"},
            "color": {
                "field": "y",
                "type": "quantitative",
                "title": "loss",
                "scale": {"scheme": "viridis", "reverse": True},
            },
            "tooltip": [
                {"field": "x2", "title": SAMPLES, "format": ","},
                {"field": "layer", "title": "pair of layers"},
                {"field": "y", "title": "loss", "format": ".4~g"},
            ],
        },
    }
    return Chart(key, title, "loss", spec, data, said)


def _base(description: str) -> dict[str, Any]:
    return {"description": description, "width": "container", "height": HEIGHT}


def _x() -> dict[str, Any]:
    return {
        "field": "x",
        "type": "quantitative",
        "title": SAMPLES,
        "axis": {"format": "~s", "tickCount": 6, "labelOverlap": True},
    }


def _by_run(names: Sequence[str]) -> dict[str, Any]:
    return {"field": "run", "type": "nominal", "title": None, "scale": {"domain": list(names)}}


def _summary(series: Series) -> list[str]:
    """First, last, lowest and highest value, with the samples of the latter two."""
    found = [(value, x) for x, value in zip(series.x, series.y, strict=True) if value is not None]
    extremes = [f"{value:.4g} at {x:,}" for value, x in (min(found), max(found))]
    return [f"{found[0][0]:.4g}", f"{found[-1][0]:.4g}", *extremes]
