"""The page of ``cdistill analyze``: all analyses that a folder holds, in one file that needs no network and no script."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from cdistill.analysis import figures
from cdistill.analysis.page import DARK, document
from cdistill.errors import InputError

Result = Mapping[str, Any]

STYLE = (
    figures.STYLE
    + DARK
    + """
h1, h2 { overflow-wrap: anywhere; } th:first-child { text-transform: none; }
section h3 { margin-top: 1.3rem; } .grid { margin-top: .8rem; } .grid > figure { min-width: 0; }
.facts td:first-child { white-space: nowrap; } .facts td { overflow-wrap: anywhere; }
.chart { max-width: 520px; margin-bottom: .6rem; }
.pictures { display: grid; grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); gap: 12px; margin: .4rem 0 .8rem; }
.pictures img { width: 100%; max-width: 300px; height: auto; display: block; border-radius: 6px; }
.pictures figcaption { margin-top: .2rem; overflow-wrap: anywhere; } h4 { margin: .6rem 0 0; font-size: .95rem; }
.case { border-top: 1px solid #d8dee4; padding-top: 1rem; margin-top: 1rem; } .case h3 { overflow-wrap: anywhere; }
td.words, th.words { text-align: left; white-space: normal; }
"""
)
_SHOWN = {
    "visual": ("Similarity on the image", "cosine", "cosine of the attention to the visual tokens"),
    "text": ("Similarity on the text", "cosine", "cosine of the attention to the text"),
    "mass": ("Share on the image", "share of attention", "share of attention on the visual tokens"),
    "entropy": ("Spread over the image", "entropy in nats", "entropy of the attention over the visual tokens"),
}


def page(results: Mapping[str, Result], folder: Path) -> str:
    """The whole document of the results by analysis; ``folder`` is where their pictures lie."""
    sections = {"similarity": _similarity, "confidence": _confidence, "intervene": _intervene}
    body = "".join(sections[name](result) for name, result in results.items() if name in sections)
    body += maps_section(results["maps"], folder) if "maps" in results else ""
    title = "What teacher and students look at"
    return document(title, f"<h1>{title}</h1>{body}{_facts(results)}", STYLE)


def short_names(result: Result) -> dict[str, str]:
    """Names that tell the models of a result apart, by those the user gave."""
    students = [student["name"] for student in result["students"]]
    short = [Path(name).name.removeprefix("builtin:") for name in students]
    if len({*short, "teacher"}) <= len(short):
        short = students
    return dict(zip(students, short, strict=True)) | {result["teacher"]["name"]: "teacher"}


def interval(entry: Mapping[str, Any], sign: str = "") -> str:
    """A mean and its interval as a cell; a dash for what is not a number."""
    if entry["mean"] is None:
        return "-"
    if entry["low"] is None or entry["high"] is None:
        return f"{entry['mean']:{sign}.3f}"
    return f"{entry['mean']:{sign}.3f} <small>[{entry['low']:{sign}.3f}, {entry['high']:{sign}.3f}]</small>"


def table(head: Sequence[str], rows: Sequence[Sequence[str]], words: int = 1) -> str:
    """Rows of cells (HTML) under their names; the first ``words`` columns hold text."""

    def row(cells: Sequence[str], tag: str) -> str:
        return (
            "<tr>"
            + "".join(f"<{tag}{' class=words' if i < words else ''}>{cell}</{tag}>" for i, cell in enumerate(cells))
            + "</tr>"
        )

    return f'<div class="scroll"><table>{row(list(map(escape, head)), "th")}{"".join(row(r, "td") for r in rows)}</table></div>'


def series_of(entry: Mapping[str, Any]) -> int:
    """The look of a model's curves: the teacher's, then the students' by their place."""
    return 0 if entry["role"] == "teacher" else 1 + int(entry["place"])


def _similarity(result: Result) -> str:
    names = short_names(result)
    parts = [f"<h3>{title}</h3>{by_depth(result, quantity)}" for quantity, (title, _, _) in _SHOWN.items()]
    return f"""
<section><h2>Do the students look where the teacher looks?</h2>
{_averages(result, names)}
{"".join(parts)}{_heads(result, names)}
<p class="note">All is taken at the positions that predict the tokens of the right answer, mean over them and over samples.
Similarity compares a student's layer with the teacher's at the same relative depth; the table compares each layer of the
student's middle 30-70 % with {_windows(result)}. Bands and brackets are 95 % intervals by bootstrap over images or groups.
Text is every token that is not visual, the question and what stands before the image.</p></section>"""


def by_depth(result: Result, quantity: str) -> str:
    """A chart of a quantity of similarity for each set, a curve for each model."""
    names, (_, y, what) = short_names(result), _SHOWN[quantity]
    found = [(of, [e for e in of["quantities"] if e["quantity"] == quantity]) for of in result["sets"]]
    top = max((max(e["high"]) for _, entries in found for e in entries), default=1.0)
    span = (0.0, 1.02 if quantity != "entropy" else 1.05 * top)
    panels = []
    for of, entries in found:
        curves = [
            figures.Line(names[e["model"]], series_of(e), _depths(result, e), e["mean"], e["low"], e["high"])
            for e in entries
        ]
        label = f"{of['name']}: {what} by depth, of {', '.join(curve.name for curve in curves)}"
        axis = "depth of the layer in %"
        panels.append(
            f"<figure>{figures.lines(curves, title=of['name'], x=axis, y=y, label=label, span=span)}</figure>"
        )
    return f'<div class="grid">{"".join(panels)}</div>'


def _depths(result: Result, entry: Mapping[str, Any]) -> list[float]:
    model = result["teacher"] if entry["role"] == "teacher" else result["students"][entry["place"]]
    return [100 * (model["layers"].index(layer) + 0.5) / len(model["layers"]) for layer in entry["layers"]]


def _windows(result: Result) -> str:
    if all(student["matches"]["grouped"] for student in result["students"]):
        return "the mean over its window of the teacher's (group matching)"
    return "its window of the teacher's (group matching) or, where the teacher has fewer, the layer at the same depth"


def _averages(result: Result, names: Mapping[str, str]) -> str:
    head = ["set", "student", "samples", "image", "text", "image, to the first", "text, to the first"]
    rows = []
    for of in result["sets"]:
        for place, student in enumerate(result["students"]):
            entries = [e for e in of["averages"] if e["place"] == place]
            differences = [interval(e["difference"], "+") if "difference" in e else "" for e in entries]
            cells = [escape(of["name"]), escape(names[student["name"]]), f"{of['samples']:,}"]
            rows.append(cells + [interval(e) for e in entries] + differences)
    if len(result["students"]) == 1:
        head, rows = head[:5], [row[:5] for row in rows]
    return table(head, rows, words=2)


def _heads(result: Result, names: Mapping[str, str]) -> str:
    panels = []
    for of in result["sets"]:
        for entry in of["quantities"]:
            if entry["quantity"] != "visual" or entry["heads"] is None:
                continue
            title = f"{names[entry['model']]}, {of['name']}"
            label = f"Similarity on the image of each head of {title}, by layer"
            shown = figures.cells(entry["heads"], title=title, x="head", y="layer", rows=entry["layers"], label=label)
            panels.append(f"<figure>{shown}</figure>")
    unlike = [
        names[student["name"]] for student in result["students"] if student["heads"] != result["teacher"]["heads"]
    ]
    note = f"{', '.join(unlike)}: means over heads only, for the teacher has another number of heads."
    note = f"<p>{escape(note)}</p>" if unlike else ""
    grid = f'<div class="grid">{"".join(panels)}</div>' if panels else ""
    return f"<h3>Head by head, on the image</h3>{grid}{note}"


def _confidence(result: Result) -> str:
    names = short_names(result)
    panels, rows = [], []
    for of in result["sets"]:
        curves = []
        for student in of["students"]:
            found = student["bins"]
            x, y, low, high = ([each[key] for each in found] for key in ("similarity", "mean", "low", "high"))
            curves.append(figures.Line(names[student["model"]], 1 + student["place"], x, y, low, high))
            c = student["rank_correlation"]
            shown = interval(c, "+")
            ends = (f"{each['mean']:.3f} <small>({each['tokens']:,} tokens)</small>" for each in (found[0], found[-1]))
            rows.append([escape(of["name"]), escape(names[student["model"]]), f"{student['tokens']:,}", shown, *ends])
        label = f"{of['name']}: mean probability of the right token by similarity to the teacher on the image"
        shown = figures.lines(
            curves, title=of["name"], x="similarity on the image", y="probability", label=label, span=(0, 1.02)
        )
        panels.append(f"<figure>{shown}</figure>")
    head = ["set", "student", "tokens", "rank correlation", "least similar", "most similar"]
    return f"""
<section><h2>Are students surer of the right answer where they look as the teacher does?</h2>
{table(head, rows, words=2)}<div class="grid">{"".join(panels)}</div>
<p class="note">Each token of the right answer counts once: its probability, and the cosine to the teacher's attention on the
image in the row that predicts it, mean over the layers of the student's middle. Bins hold about equally many tokens. Bands and
brackets are 95 % intervals by bootstrap over images or groups; the correlation is Spearman's.</p></section>"""


def _intervene(result: Result) -> str:
    names, parts = short_names(result), []
    for of in result["sets"]:
        rows = []
        for student in of["students"]:
            name = names[student["model"]]
            for each in student["metrics"]:
                d = each["difference"]
                change = f"{d['percent']:+.1f} <small>± {d['standard_error']:.1f}</small>"
                change = f"<b>{change}</b>" if d["p"] is not None and d["p"] < 0.05 else change
                cells = [f"{each[when]['percent']:.1f}" for when in ("before", "after")]
                p = "-" if d["p"] is None else f"{d['p']:.3f} <small>{d['test']}</small>"
                teacher = f"{of['teacher'][each['metric']]:.1f}"
                rows.append([escape(each["metric"]), escape(name), f"{each['n']:,}", *cells, change, p, teacher])
        head = ["metric", "student", "n", "before", "after", "change", "p", "teacher"]
        chart = figures.points(
            _changes(of, names),
            title="",
            x="change in points",
            label=f"{of['name']}: change of each metric with the teacher's attention, with 95 % intervals",
        )
        shown = f'<figure class="chart">{chart}</figure>{table(head, rows, words=2)}'
        parts.append(f"<h3>{escape(of['name'])}</h3>{shown}")
    return f"""
<section><h2>Do students answer better with the teacher's attention?</h2>
{"".join(parts)}
<p class="note">Accuracy in %. While it answers, the student's attention to the visual tokens is replaced by
{1 - result["share"]:g} of its own and {result["share"]:g} of the teacher's in the rows that predict the answer, its layers
{escape(str(result["layers"]))}, heads {escape(result["heads"])}; the whole row is divided by its new sum. ± one standard
error of the paired difference; bold changes have p &lt; 0.05.</p></section>"""


def _changes(of: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, list[figures.Point]]:
    """By metric the change of each student."""
    result: dict[str, list[figures.Point]] = {}
    for student in of["students"]:
        for each in student["metrics"]:
            d = each["difference"]
            point = figures.Point(names[student["model"]], 1 + student["place"], d["percent"], *d["interval"])
            result.setdefault(each["metric"], []).append(point)
    return result


def maps_section(result: Result, folder: Path) -> str:
    """Pictures of attention, case by case, for pages with `STYLE`."""
    names, parts = short_names(result), []
    rows = f"the words {result['words']!r}" if result["words"] else "the rows that predict the answer"
    for case in result["cases"]:
        models = [result["teacher"]["name"], *(student["name"] for student in result["students"])]
        said = "; ".join(
            f"{names[model]}: {answer or 'nothing'}" for model, answer in zip(models, case["answers"], strict=True)
        )
        said = case["answers"][0] if len(set(case["answers"])) == 1 else said
        place = "on the image" if len(case["images"]) == 1 else "on all images"
        images = "".join(_picture(folder, name, f"image {i + 1}", "the image") for i, name in enumerate(case["images"]))
        blocks = []
        for span in result["spans"]:
            cells = []
            for entry in (entry for entry in case["maps"] if entry["span"] == span):
                for of in entry["pictures"]:
                    name = names[entry["model"]]
                    alt = f"attention of {name} in its {span} layers over image {of['picture'] + 1} ({of['level']})"
                    caption = f"<b>{escape(name)}</b>, {of['level']}<br>{100 * entry['share']:.0f} % {place}"
                    cells.append(_picture(folder, of["file"], alt, caption))
            blocks.append(f"<h4>{escape(span)} layers</h4><div class='pictures'>{''.join(cells)}</div>")
        parts.append(
            f"<div class='case'><h3>{escape(case['question'])}</h3><p>answer: {escape(said)}</p>"
            f"<div class='pictures'>{images}</div>{''.join(blocks)}</div>"
        )
    return f"""
<section><h2>What the models look at</h2>{"".join(parts)}
<p class="note">The glow marks the attention from {escape(rows)} to the visual tokens, mean over heads and over the layers of
each range, by area and scaled to the strongest of each picture. Tiles of one image are put together; a frame is a picture of
its own.</p></section>"""


def _picture(folder: Path, name: str, alt: str, caption: str) -> str:
    try:
        data = base64.b64encode((folder / name).read_bytes()).decode()
    except OSError as error:
        raise InputError(f"{folder / name}: {error.strerror}; run `cdistill analyze maps` again") from None
    return f'<figure><img src="data:image/png;base64,{data}" alt="{escape(alt)}"><figcaption>{caption}</figcaption></figure>'


def _facts(results: Mapping[str, Result]) -> str:
    rows = []
    for name, result in results.items():
        models = [result["teacher"], *result["students"]]
        said = "; ".join(f"{m['name']} ({len(m['layers'])} layers, {m['heads']} heads, {m['dtype']})" for m in models)
        versions = ", ".join(f"{k} {v}" for k, v in result["made_by"].items())
        rows.append(f"<tr><td>{name}</td><td>{escape(said)}<br><small>{escape(versions)}</small></td></tr>")
    return f'<section><h2>How this was made</h2><table class="facts">{"".join(rows)}</table></section>'
