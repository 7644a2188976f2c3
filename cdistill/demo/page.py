"""The demo's page: one HTML file with everything inside, readable without network or scripts, dark or light."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from cdistill.analysis import figures
from cdistill.analysis.page import document
from cdistill.attention.page import STYLE, by_depth, maps_section, table
from cdistill.builtin.scorer import FAMILIES
from cdistill.demo.result import DISTILLED, SFT, SHOWN, STUDENTS, UNALIGNED, Demo
from cdistill.demo.text import interval_words
from cdistill.reproduce.findings import CONTRADICTED, HOLDS, OPEN, paired, verdict
from cdistill.reproduce.text import enough

_STYLE = """
.card { border-top-color: var(--muted); }
.chart { max-width: 760px; }
"""
SAME = "the same student fine-tuned without a teacher"
# The verdict of `paired` on CompoDistill against SFT, in words.
_HEADLINES = {
    HOLDS: f"answers compositional questions better than {SAME}",
    CONTRADICTED: f"answers compositional questions worse than {SAME}",
    OPEN: f"answers compositional questions better than {SAME} in {{positive}} of {{seeds}} seeds, not beyond the spread",
}


def page(found: Demo, pictures: Path) -> str:
    """The whole document; ``pictures`` is the folder of the pictures of attention."""
    body = _headline(found) + _accuracy(found) + _curves(found.seeds) + _attention(found, pictures) + _facts(found)
    return document("cdistill demo", body, STYLE + _STYLE)


def _headline(found: Demo) -> str:
    rows = {model: found.seeds["rows"][model]["compositional"] for model in STUDENTS}
    apart = {model: paired(rows[DISTILLED], rows[model]) for model in (SFT, UNALIGNED)}
    said = _HEADLINES[verdict(apart[SFT])].format(positive=apart[SFT].positive, seeds=apart[SFT].seeds)
    cards = []
    for model in SHOWN:
        value = 100 * found.accuracy[model]["compositional"]["avg"]
        error = 100 * found.error(model, "compositional", "avg")
        below = f"{len(rows[model])} seeds: {interval_words(rows[model])}" if model in rows else "the teacher"
        cards.append(
            f'<div class="card"><span>{escape(model)}</span><b>{value:.1f} % <small>± {error:.1f}</small></b>'
            f"<span>{escape(below)}</span></div>"
        )
    return f"""
<h1>The distilled student {said}</h1>
<p>Three small multimodal students grew from one base model, in the same steps on the same samples: pictures with captions
and with questions that ask for colours, existence, numbers and places, and scenes written out with questions of every kind.
<b>SFT</b> learned from the right answers alone, <b>KD + TAF</b> also from a larger teacher's answers and through its adapter,
<b>CompoDistill</b> also from where the teacher looks (visual attention alignment). They are examined on what none of them was
shown about a picture: which of two captions fits it.</p>
<div class="cards">{"".join(cards)}</div>
<p class="note">Large numbers: this run, mean accuracy over the compositional sub-types on held-out scenes (50 % by chance), ±
standard error for {found.n} questions per sub-type. Below: mean and 95 % interval of runs made before. {DISTILLED} minus
{SFT}: {escape(apart[SFT].words())}; minus {UNALIGNED}: {escape(apart[UNALIGNED].words())}.</p>"""


def _accuracy(found: Demo) -> str:
    rows, groups = [], {}
    for family, subtypes in FAMILIES.items():
        for name in (*subtypes, "avg"):
            numbers = [
                (100 * found.accuracy[model][family][name], 100 * found.error(model, family, name)) for model in SHOWN
            ]
            label = f"{family}, average" if name == "avg" else name.replace("_", " ")
            groups[label] = numbers[1:]
            cells = [f"{value:.1f} <small>± {error:.1f}</small>" for value, error in numbers]
            rows.append([f"<b>{escape(label)}</b>" if name == "avg" else escape(label), *cells])
    label = f"Accuracy of {', '.join(STUDENTS)} by kind of question; the numbers are in the table below"
    chart = figures.bars(groups, STUDENTS, title="", x="accuracy, %", label=label)
    return f"""
<section><h2>Accuracy by kind of question</h2><figure class="chart">{chart}</figure>
{table(["", *SHOWN], rows)}
<p class="note">Accuracy in % of this run, ± standard error. Recognition counts an answer if greedy decoding over the whole
vocabulary says it. Compositional questions offer two captions, after SugarCrepe: in one of them an object, an attribute (a
colour) or a relation is replaced, swapped or added; the one with the higher log-likelihood counts.</p></section>"""


def _curves(seeds: Mapping[str, Any]) -> str:
    curves = []
    for i, model in enumerate(STUDENTS):
        points = {int(samples): of for samples, of in seeds["curves"][model].items()}
        x = sorted(points)
        means = [100 * statistics.fmean(points[samples].values()) for samples in x]
        low, high = ([100 * end(points[samples].values()) for samples in x] for end in (min, max))
        curves.append(figures.Line(model, i + 1, x, means, low, high))
    label = f"Compositional accuracy against training samples, a line for each of {', '.join(STUDENTS)}"
    chart = figures.lines(
        curves, title="", x="training samples", y="compositional, %", label=label, span=(0, 103), logarithmic=True
    )
    rows = [[escape(model), escape(enough(seeds["enough"][model]))] for model in STUDENTS]
    of = {int(samples): len(values) for samples, values in seeds["curves"][DISTILLED].items()}
    counts = ", ".join(f"{samples:,} samples: {n} {'seed' if n == 1 else 'seeds'}" for samples, n in sorted(of.items()))
    return f"""
<section><h2>What it costs in samples</h2><figure class="chart">{chart}</figure>
{table(["", "samples to 90 %"], rows)}
<p class="note">Runs made before, by <code>{escape(seeds["commands"]["curves"])}</code>: means over seeds, bands from the lowest
to the highest; {escape(counts)}. Every point is a run of its own.</p></section>"""


def _attention(found: Demo, pictures: Path) -> str:
    return f"""
<section><h2>Where the students look</h2>{by_depth(found.looks["similarity"], "visual")}
<p class="note">Cosine of a student's attention to the picture with the teacher's, at the positions that predict the right
answer, in layers of the same depth; bands are 95 % intervals over questions. Visual attention alignment trains it in the
middle layers.</p></section>{maps_section(found.looks["maps"], pictures)}"""


def _facts(found: Demo) -> str:
    rows = []
    for key, value in found.facts.items():
        shown = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, Mapping) else value
        rows.append(f"<tr><td>{escape(key.replace('_', ' '))}</td><td>{escape(str(shown))}</td></tr>")
    return f'<section><h2>This run</h2><table class="facts">{"".join(rows)}</table></section>'
