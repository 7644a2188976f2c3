"""The page of a table: what holds, the numbers beside the paper's, curves, and every run that was started."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from cdistill.analysis import figures
from cdistill.analysis.page import DARK, document
from cdistill.builtin.scorer import FAMILIES
from cdistill.reproduce.findings import CONTRADICTED, HOLDS, RULE, Findings, averages, spread
from cdistill.reproduce.tables import Column
from cdistill.reproduce.text import COLUMNS, curve_lines, places, value

SHOWN: tuple[Column, ...] = ("recognition", "compositional")
_STYLE = """
th:first-child { text-transform: none; } th { white-space: normal; vertical-align: bottom; }
.chart { max-width: 760px; } td.words { text-align: left; white-space: normal; }
.open { color: var(--muted); font-weight: 600; } .paper { color: var(--muted); }
"""


def page(findings: Findings, name: str, facts: Mapping[str, Any]) -> str:
    """The whole document."""
    table = findings.table
    body = f"<h1>{escape(table.title)}</h1><p>{escape(table.source[:1].upper() + table.source[1:])}.</p>"
    body += _verdicts(findings) + _numbers(findings, facts)
    body += _curves(findings) if table.curves else ""
    body += _subtypes(findings) + _tuning(facts) + _runs(name, facts)
    return document(f"{name}: {table.title}", body, figures.STYLE + _STYLE + DARK)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], kind: str = "") -> str:
    """Cells are HTML."""
    first = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="scroll"><table class="{kind}"><tr>{first}</tr>{body}</table></div>'


def _verdicts(findings: Findings) -> str:
    items = []
    for each in findings.verdicts():
        kind = {HOLDS: "right", CONTRADICTED: "wrong"}.get(each.verdict, "open")
        said = f"{escape(each.order)}: <span class='{kind}'>{escape(each.verdict)}</span>"
        items.append(f"<li>{said}, {escape(each.evidence)}</li>")
    if not items:
        return ""
    return f"""
<section><h2>Which orders hold</h2><ul>{"".join(items)}</ul>
<p class="note">{escape(RULE)} Differences in points of accuracy, then their interval.</p></section>"""


def _numbers(findings: Findings, facts: Mapping[str, Any]) -> str:
    table = findings.table
    single = len(table.sizes) == len(table.rates) == 1
    rows, groups = [], {}
    for label, row, size, rate in places(findings):
        found = {column: findings.values(row, column, size, rate) for column in COLUMNS}
        paper = table.rows[row].paper
        cells = [escape(label), str(len(found["compositional"])), *(escape(value(v)) for v in found.values())]
        if single:
            apart = "" if row == table.reference else escape(findings.difference(row, "compositional").words())
            papers = [""] * 2 if paper is None else [f'<span class="paper">{each:.1f}</span>' for each in paper]
            cells += [apart, *papers]
        rows.append(cells)
        if found["compositional"]:
            groups[label] = [_percent(findings.values(row, column, size, rate)) for column in SHOWN]
    if facts["teacher"] is not None:
        cells = [f"{100 * each:.1f}" for each in averages(facts["teacher"]).values()]
        rows.append(["teacher", "", *cells, *([""] * 3 if single else [])])
    head = ["row", "seeds", *COLUMNS.values()]
    head += [f"compositional minus {table.reference}", "paper: VQA", "paper: CR"] if single else []
    notes = "".join(f'<p class="note">{escape(note)}</p>' for note in table.notes)
    questions = facts["questions"]
    about = (
        "held-out scenes" if questions.get("pairs", "all") == "all" else "held-out scenes and pairs that no sample had"
    )
    said = f"Accuracy of the rows of {table.title}, recognition and compositional; the numbers are in the table below"
    chart = figures.bars(groups, SHOWN, title="", x="accuracy, %", label=said) if groups and not table.curves else ""
    return f"""
<section><h2>Numbers</h2><figure class="chart">{chart}</figure>
{_table(head, rows)}
<p class="note">Accuracy in %, mean ± standard deviation over training seeds, on {questions["n"]} questions per sub-type
about {about} (seed {questions["seed"]}). Recognition: what greedy decoding says, mean over colour, existence and
count. Compositional: which of two captions has the higher log-likelihood (A against B, 50 % by chance), mean over seven
sub-types; greedy: what decoding says. Differences are paired by seed, with 95 % intervals. The paper's figures are
those of its models and benchmarks, and stand here for the order, not for the size.</p>{notes}</section>"""


def _curves(findings: Findings) -> str:
    table = _table(
        ["row", "area below the curve", "samples to 90 %"], [[*map(escape, line)] for line in curve_lines(findings)]
    )
    charts_of = "".join(f"<figure>{curve_chart(findings, column)}</figure>" for column in SHOWN)
    return f"""
<section><h2>Accuracy against samples</h2><div class="grid">{charts_of}</div>{table}
<p class="note">Curves: mean over seeds, bands one standard deviation. Area: mean height of the compositional curve over the
logarithm of samples. Samples to 90 % compositional accuracy: geometric mean and range over the seeds that get there, by
lines between the points.</p></section>"""


def curve_chart(findings: Findings, column: Column) -> str:
    """Accuracy of every row against samples, as inline SVG."""
    curves = []
    for i, row in enumerate(findings.table.rows):
        found: dict[int, dict[int, float]] = {}
        for seed in findings.seeds:
            for samples, height in findings.points(row, seed, column):
                found.setdefault(samples, {})[seed] = height
        x = sorted(found)
        pairs = [_percent(found[samples]) for samples in x]
        low, high = ([mean + sign * deviation for mean, deviation in pairs] for sign in (-1, 1))
        curves.append(figures.Line(row, i, x, [mean for mean, _ in pairs], low, high))
    return figures.lines(
        curves,
        title=column,
        x="training samples",
        y="accuracy, %",
        label=f"{column} accuracy against training samples, a line for each of {', '.join(findings.table.rows)}",
        span=(0, 103),
        logarithmic=True,
    )


def _percent(values: dict[int, float]) -> tuple[float, float]:
    """Mean and standard deviation over seeds in percent, the deviation of one alone 0."""
    mean, deviation = spread(values)
    return 100 * mean, 0.0 if deviation != deviation else 100 * deviation


def _subtypes(findings: Findings) -> str:
    """Accuracy by sub-type of every row, at the largest size."""
    sections = []
    for way, title in (("choice", "by log-likelihood"), ("greedy", "greedy")):
        names = [(family, name) for family, of in FAMILIES.items() for name in of]
        rows = []
        for row in findings.table.rows:
            runs = [
                run
                for run in findings.runs
                if run.row == row and run.size / findings.table.rows[row].samples == findings.table.sizes[-1]
            ]
            records = [
                r for run in runs if (r := findings.records.get(run.hash)) is not None and r.accuracy is not None
            ]
            cells = [escape(row)]
            for family, name in names:
                values = {i: r.accuracy[way][family][name] for i, r in enumerate(records) if r.accuracy is not None}
                mean, deviation = spread(values)
                small = f" <small>± {100 * deviation:.0f}</small>" if len(values) > 1 else ""
                cells.append(f"{100 * mean:.0f}{small}" if values else "-")
            rows.append(cells)
        head = ["row", *(name.replace("_", " ") for _, name in names)]
        sections.append(f"<h3>{title.capitalize()}</h3>{_table(head, rows)}")
    return f"<section><h2>By kind of question</h2>{''.join(sections)}</section>"


def _tuning(facts: Mapping[str, Any]) -> str:
    rates = facts["tuned_rates"]
    if not rates:
        text = "Learning rates are the recipe's: `cdistill reproduce tune` has not been run in this folder."
    else:
        each = ", ".join(f"{method} x {rate:g}" for method, rate in rates.items())
        text = f"Learning rates tuned by `cdistill reproduce tune`, as factors of the recipe's: {each}; other methods keep it."
    return f"<section><h2>Learning rates</h2><p>{escape(text)}</p></section>"


def _runs(name: str, facts: Mapping[str, Any]) -> str:
    """Every run that was started for the table, also those that failed, and those of other recipes or rates."""
    rows = []
    for run in facts["runs"]:
        kind = {"finished": "right", "failed": "wrong"}.get(run["status"], "open")
        status = f'<span class="{kind}">{escape(run["status"])}</span>'
        status += f" {escape(run['reason'])}" if run["reason"] else ""
        asked = ", ".join(row.partition(": ")[2] for row in run["rows"] if row.startswith(f"{name}: "))
        rows.append(
            [
                escape(asked) + ("" if run["in_table"] else " (not in this table)"),
                str(run["seed"]),
                f"{run['samples']:,}",
                status,
                f"{run['seconds']:,.0f}",
                f"<code>{escape(run['hash'])}</code>",
                f"<code>{escape(str(run['commit'])[:9])}</code>",
            ]
        )
    commits = ", ".join(commit[:9] for commit in facts["commits"])
    head = ["row", "seed", "samples", "status", "seconds", "record", "commit"]
    return f"""
<section><h2>Every run that was started</h2>{_table(head, rows)}
<p class="note">Pair: {escape(facts["pair"])}. Commits: {escape(commits)}. Made by
<code>{escape(facts["command"])}</code>; a
record is a file of that name with <code>.json</code> beside this page.</p></section>"""
