"""The page of ``cdistill eval compare --html``: charts with intervals, tables, and the questions on which models part."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from cdistill.analysis import charts
from cdistill.analysis.page import document
from cdistill.data.samples import BadSampleError
from cdistill.eval import benchmarks
from cdistill.eval.comparison import (
    Comparison,
    TaskComparison,
    difference_text,
    missing_text,
    remarks,
    value,
)
from cdistill.eval.contract import Answer, Question
from cdistill.eval.paired import Difference
from cdistill.eval.parting import Case, cases, examples, patterns
from cdistill.eval.pictures import Pictures
from cdistill.eval.statistics import Metric

EXAMPLES = 12  # of each benchmark
COLOURS = ("#5b6470", "#c2570c", "#1d4ed8", "#15803d", "#9d174d", "#6d28d9", "#0e7490", "#a16207")
LABEL_FACTS = ("label", "answer", "answers")

_STYLE = """
.examples { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 330px), 1fr)); gap: 16px; }
.case { border: 1px solid #d8dee4; border-radius: 10px; padding: 12px 14px; min-width: 0; }
.case p { margin: 0 0 .5rem; overflow-wrap: anywhere; white-space: pre-line; font-size: .92rem; }
.case.wide { grid-column: 1 / -1; }
.pictures { display: flex; flex-wrap: wrap; gap: 10px; margin-bottom: .5rem; }
.pictures img { max-width: 100%; height: auto; max-height: 220px; border-radius: 6px; display: block; }
.pictures figcaption { margin: 2px 0 0; font-size: .8rem; }
.gone { border: 1px dashed #afb8c1; border-radius: 6px; padding: 26px 12px; color: #57606a; font-size: .85rem;
  overflow-wrap: anywhere; }
.said { list-style: none; margin: 0; padding: 0; font-size: .92rem; }
.said li { border-top: 1px solid #e6eaee; padding: 4px 0; overflow-wrap: anywhere; }
.said i { display: inline-block; width: 11px; height: 11px; border-radius: 3px; margin-right: 6px; }
h1, h2 { overflow-wrap: anywhere; }
th:first-child { text-transform: none; } th { font-weight: 600; }
.chart { max-width: 660px; }
.compared th { white-space: normal; vertical-align: bottom; } .compared .avg .difference { font-weight: 400; }
.compared small { white-space: nowrap; } .compared .difference small { display: block; }
h3 { margin-top: 1.6rem; font-size: 1.1rem; }
.compared th:first-child, .compared td:first-child { position: sticky; left: 0; background: #fff; }
.paper td { color: #57606a; }
details { margin-top: .8rem; } summary { cursor: pointer; color: #424a53; }
.scores td:first-child, .scores th:first-child { white-space: normal; min-width: 12em; }
"""


def page(comparison: Comparison, images: Path | None = None) -> str:
    """The whole document; ``images`` is where the pictures are, if not where the runs found them."""
    labels = comparison.labels
    number = len(comparison.tasks)
    title = f"{', '.join(labels[:-1])} and {labels[-1]} on {number} benchmark{'s' if number > 1 else ''}"
    sections = "".join(_section(comparison, each, images) for each in comparison.tasks)
    body = f"<h1>{escape(title)}</h1>{_summary(comparison)}{sections}{_facts(comparison)}"
    return document(title, body, _STYLE)


def _colours(comparison: Comparison) -> dict[str, str]:
    return {label: COLOURS[i % len(COLOURS)] for i, label in enumerate(comparison.labels)}


def _row(name: str, n: int | str, cells: Sequence[str], kind: str = "") -> str:
    return f'<tr class="{kind}"><td>{escape(name)}</td><td>{n}</td>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>'


def _head(comparison: Comparison, first: str) -> str:
    labels = comparison.labels
    names = [first, "n", *labels, *(f"{label} - {labels[0]}" for label in labels[1:])]
    return "<tr>" + "".join(f'<th scope="col">{escape(name)}</th>' for name in names) + "</tr>"


def _table(rows: Sequence[str]) -> str:
    return f'<div class="scroll"><table class="compared">{"".join(rows)}</table></div>'


def _cells(metrics: Sequence[Metric], differences: Sequence[Difference]) -> list[str]:
    return [_value(m.percent, m.standard_error) for m in metrics] + list(map(_difference, differences))


def _value(percent: float, error: float) -> str:
    return value(percent, error).replace("±", "<small>±") + "</small>" if math.isfinite(percent) else "-"


def _difference(of: Difference) -> str:
    if not math.isfinite(of.percent):
        return "-"
    low, high = of.interval
    tip = f"95 % interval {low:+.1f} to {high:+.1f}, {of.test}"
    tip += f": right alone {of.only[0]} the first, {of.only[1]} the second" if of.only else ""
    shown, _, p = difference_text(of).partition(", ")
    number, _, error = shown.partition(" ")
    number = f"<b>{number}</b>" if of.p < 0.05 else number
    return f'<span class="difference" title="{escape(tip)}">{number} <small>{error}, {escape(p)}</small></span>'


def _paper_row(figures: Sequence[float | None], differences: int) -> str:
    if not any(figures):
        return ""
    cells = ["" if figure is None else f"{figure:.1f}" for figure in figures] + [""] * differences
    return _row("the paper's", "", cells, "paper")


def _summary(comparison: Comparison) -> str:
    """The headline numbers of all benchmarks, and the averages."""
    others = len(comparison.labels) - 1
    rows, groups = [_head(comparison, "benchmark")], {}
    for each in comparison.tasks:
        metrics = [of[each.headline] for of in each.metrics]
        groups[each.task] = _bars(comparison, metrics)
        rows.append(_row(each.task, metrics[0].n, _cells(metrics, [of[each.headline] for of in each.differences])))
        rows.append(_paper_row(comparison.paper(each.task), others))
    notes = []
    for average in comparison.averages:
        values = list(map(_value, average.percent, average.standard_error))
        rows.append(
            _row(average.title, len(average.columns), values + list(map(_difference, average.differences)), "avg")
        )
        rows.append(_paper_row(average.paper, others))
        notes.append(f"{average.title}: plain mean of {', '.join(average.columns)}{missing_text(average)}")
    note = "".join(f'<p class="note">{escape(note)}.</p>' for note in notes)
    chart = charts.bar_chart(groups, label="Headline number of each benchmark")
    return f"""
<section><h2>Headline numbers</h2>{charts.legend(_colours(comparison))}
<figure class="chart">{chart}</figure>
{_table(rows)}{note}
<p class="note">In %, ± one standard error; whiskers are 95 % intervals. Bold differences have p &lt; 0.05.</p></section>"""


def _bars(comparison: Comparison, metrics: Sequence[Metric]) -> list[charts.Bar]:
    return [
        charts.Bar(label, colour, m.percent / 100, m.standard_error / 100, (m.interval[0] / 100, m.interval[1] / 100))
        for (label, colour), m in zip(_colours(comparison).items(), metrics, strict=True)
        if math.isfinite(m.percent)
    ]


def _section(comparison: Comparison, each: TaskComparison, images: Path | None) -> str:
    rows: dict[bool, list[str]] = {detail: [_head(comparison, "metric")] for detail in (False, True)}
    groups: dict[str, list[Metric]] = {}
    for name in each.metrics[0]:
        metrics = [of[name] for of in each.metrics]
        kind = "avg" if name == each.headline else ""
        row = _row(name, metrics[0].n, _cells(metrics, [of[name] for of in each.differences]), kind)
        detail = "/" in name and name != each.headline
        rows[detail].append(row)
        if not detail:
            groups[name] = metrics
    if any(metric.percent > 100 for metrics in groups.values() for metric in metrics):  # MME's points
        groups = {each.headline: groups[each.headline]}
    rows[False].append(_paper_row(comparison.paper(each.task), len(comparison.labels) - 1))
    details = f"<details><summary>More metrics</summary>{_table(rows[True])}</details>" if len(rows[True]) > 1 else ""
    bars = {name: _bars(comparison, metrics) for name, metrics in groups.items()}
    chart = charts.bar_chart(bars, label=f"{each.title}, all models", strong=each.headline)
    return f"""
<section><h2>{escape(each.title)}</h2>{charts.legend(_colours(comparison))}
<figure class="chart">{chart}</figure>
{_table(rows[False])}{details}
{_parting(comparison, each.task, images)}</section>"""


def _parting(comparison: Comparison, task: str, images: Path | None) -> str:
    """How often the models part, and examples."""
    found = cases(task, comparison.results)
    apart = sum(case.parts for case in found)
    if not found:
        return ""
    what = "questions" if len(found[0].questions) == 1 else "entries"
    shown = examples(found, EXAMPLES)
    more = f"; {apart - len(shown)} more are not shown" if apart > len(shown) else ""
    cards = "".join(_card(comparison, task, case, images) for case in shown)
    return f"""
<h3>Where they part</h3>
<p>The models part on {apart} of {len(found)} {what}: {escape(_counts(comparison, found))}. Below: {len(shown)}, of each
kind in turn, by their order and not by hand{more}.</p>
<div class="examples">{cards}</div>"""


def _counts(comparison: Comparison, found: Sequence[Case]) -> str:
    """Who is right alone, together, never; partly right counts as wrong here."""
    numbers: dict[tuple[bool, ...], int] = {}
    for right, count in patterns(found).items():
        whole = tuple(share == 1 for share in right)
        numbers[whole] = numbers.get(whole, 0) + count
    words = []
    for whole, count in sorted(numbers.items(), key=lambda item: -item[1]):
        who = [label for label, good in zip(comparison.labels, whole, strict=True) if good]
        name = "all right" if all(whole) else f"only {' and '.join(who)} right" if who else "none right"
        words.append(f"{name} {count}")
    return ", ".join(words)


def _card(comparison: Comparison, task: str, case: Case, images: Path | None) -> str:
    questions = case.questions
    pictures = list(dict.fromkeys(name for question in questions for name in question.images))
    roots = [] if images is None else [images]
    roots += [root for result in comparison.results for root in result.images[task]]
    opener = Pictures(list(dict.fromkeys(roots)) or [Path()])
    figures = "".join(_picture(name, i, len(pictures), opener) for i, name in enumerate(pictures, 1))
    if len(questions) > 1:
        text, body = "", _scores(comparison, case, pictures)
    else:
        label = _label(questions[0])
        text = f"<p>{escape(questions[0].prompt)}</p>"
        text += f'<p>right: <span class="right">{escape(label)}</span></p>' if label else ""
        body = _replies(comparison, task, case)
    wide = " wide" if len(questions) > 1 else ""
    subtype = questions[0].facts.get("subtype")
    title = f"<b>{escape(case.name)}</b>" + (f" ({escape(str(subtype))})" if subtype else "")
    return f'<div class="case{wide}"><p>{title}</p><div class="pictures">{figures}</div>{text}{body}</div>'


def _label(question: Question) -> str:
    """What is right, as far as the question's facts tell."""
    for name in LABEL_FACTS:
        if name in question.facts:
            label = question.facts[name]
            return ", ".join(dict.fromkeys(map(str, label))) if isinstance(label, (list, tuple)) else str(label)
    return ""


def _replies(comparison: Comparison, task: str, case: Case) -> str:
    items = []
    for (label, colour), (answer,), right in zip(_colours(comparison).items(), case.answers, case.right, strict=True):
        kind, mark = ("right", "✓") if right == 1 else ("wrong", "✗")
        share = f" ({100 * right:.0f} %)" if 0 < right < 1 else ""
        items.append(
            f'<li><i style="background:{colour}"></i>{escape(label)}: '
            f'<span class="{kind}">{mark}{share} {escape(_said(task, answer))}</span></li>'
        )
    return f'<ul class="said">{"".join(items)}</ul>'


def _said(task: str, answer: Answer) -> str:
    if answer.score is not None:
        return _number(answer)
    read = benchmarks.get(task).read(answer)
    said = answer.reply if len(answer.reply) <= 300 else answer.reply[:300] + " ..."
    return said + (" (says nothing that counts)" if read is None else "") + (" (cut)" if answer.cut else "")


def _number(answer: Answer) -> str:
    score = answer.score or 0.0
    if answer.question.kind == "log_likelihood" and answer.tokens:
        return f"{score / answer.tokens:.3f} nats a token"
    return f"{score:.3g}"


def _scores(comparison: Comparison, case: Case, pictures: Sequence[str]) -> str:
    """The numbers of all questions of a unit, and who is right."""
    marks = ["✓" if right == 1 else "✗" for right in case.right]
    head = "".join(f"<th>{mark} {escape(label)}</th>" for mark, label in zip(marks, comparison.labels, strict=True))
    rows = [f"<tr><th>asked</th><th>image</th><th>fits</th>{head}</tr>"]
    for i, question in enumerate(case.questions):
        where = ", ".join(str(pictures.index(name) + 1) for name in question.images)
        fits = question.facts.get("caption") == question.facts.get("image", 0)
        text = question.continuation if question.kind == "log_likelihood" else question.prompt
        cells = "".join(
            f"<td>{escape(_number(of[i]) if of[i].score is not None else of[i].reply)}</td>" for of in case.answers
        )
        rows.append(f"<tr><td>{escape(text)}</td><td>{where}</td><td>{'yes' if fits else 'no'}</td>{cells}</tr>")
    return f'<div class="scroll"><table class="scores">{"".join(rows)}</table></div>'


def _picture(name: str, number: int, of: int, opener: Pictures) -> str:
    caption = f"<figcaption>image {number}</figcaption>" if of > 1 else ""
    try:
        small = charts.thumbnail(opener.open(name))
    except BadSampleError:
        return f'<figure><div class="gone">no image {escape(name)}</div>{caption}</figure>'
    return f'<figure><img src="{small}" alt="{escape(name)}">{caption}</figure>'


def _facts(comparison: Comparison) -> str:
    rows: Mapping[str, Any] = {
        label: f"{result.model}, {result.folder}"
        for label, result in zip(comparison.labels, comparison.results, strict=True)
    }
    cells = "".join(f"<tr><td>{escape(k)}</td><td>{escape(v)}</td></tr>" for k, v in rows.items())
    notes = "".join(f'<p class="note">{escape(line)}.</p>' for line in remarks(comparison))
    return f'<section><h2>How to read this</h2>{notes}<table class="facts">{cells}</table></section>'
