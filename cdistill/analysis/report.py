"""The demo's report: one HTML file with everything inside, readable without network or scripts, and on a phone."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np

from cdistill.analysis import charts
from cdistill.analysis.attention import AttentionSimilarity
from cdistill.analysis.comparison import DISTILLED, FAMILIES, NAMES, SFT, TEACHER, Comparison
from cdistill.analysis.page import document

COLOURS = {TEACHER: "#5b6470", SFT: "#c2570c", DISTILLED: "#1d4ed8"}
_STYLE = "@media (max-width: 640px) { th:nth-child(5), td:nth-child(5) { display: none; } }"


@dataclass(frozen=True)
class Example:
    """A held-out question with what the models answered and where they looked.

    Attributes:
        subtype: kind of question.
        question: its text.
        answer: the right answer.
        answers: by model.
        image: (3, H, W) pixels in [-1, 1].
        attention: by model, (V,) weights in raster order from the answer-predicting position.
    """

    subtype: str
    question: str
    answer: str
    answers: Mapping[str, str]
    image: np.ndarray
    attention: Mapping[str, Sequence[float]]


@dataclass(frozen=True)
class Report:
    """Everything the report shows.

    Attributes:
        comparison: accuracies.
        metrics: by student, the lines of its run's ``metrics.jsonl``, of the first seed.
        losses: their keys that have a chart, with its title.
        similarity: by family of questions and student, attention similarity to the teacher, of the first seed.
        outcomes: by (SFT student right, distilled student right), the number of compositional questions looked through.
        examples: some of them.
        meta: facts about the run, shown at the end.
    """

    comparison: Comparison
    metrics: Mapping[str, Sequence[Mapping[str, Any]]]
    losses: Mapping[str, str]
    similarity: Mapping[str, Mapping[str, AttentionSimilarity]]
    outcomes: Mapping[tuple[bool, bool], int]
    examples: Sequence[Example]
    meta: Mapping[str, Any]

    def html(self) -> str:
        """The whole document."""
        body = "".join(
            (self._headline(), self._accuracies(), self._losses(), self._similarity(), self._examples(), self._facts())
        )
        return document("cdistill demo", body, _STYLE)

    def _headline(self) -> str:
        c = self.comparison
        margin, doubt = statistics.fmean(c.margins("compositional")), c.margin_uncertainty("compositional")
        several = len(c.seeds) > 1
        unit = "the standard deviation over seeds" if several else "the standard error of the difference"
        if abs(margin) > 2 * doubt:
            verdict = f"answers compositional questions {'better' if margin > 0 else 'worse'} than"
            reason = f"The difference of {100 * margin:+.1f} points is more than twice {unit} ({100 * doubt:.1f})"
        else:
            verdict = "answers compositional questions about as well as"
            reason = f"The difference of {100 * margin:+.1f} points is within twice {unit} ({100 * doubt:.1f})"
        cards = [
            _card(
                NAMES[m],
                COLOURS[m],
                f"{100 * c.mean(m, 'compositional'):.1f} %",
                f"± {100 * c.uncertainty(m, 'compositional'):.1f}",
                f"recognition {100 * c.mean(m, 'recognition'):.1f} %",
            )
            for m in NAMES
        ]
        other = f"recognition {100 * statistics.fmean(c.margins('recognition')):+.1f}"
        doubtful = f"± {100 * doubt:.1f} points"
        title = f"{NAMES[DISTILLED]} minus {NAMES[SFT]}"
        cards.append(_card(title, charts.INK, f"{100 * margin:+.1f}", doubtful, other))
        return f"""
<h1>The distilled student {verdict} the same student fine-tuned without a teacher</h1>
<p>Two small multimodal students grew from one base model, on the same images and questions, for the same number of
steps. <b>SFT</b> learned from the right answers alone. <b>CompoDistill</b> also learned from a larger teacher: from
its answers (KD), through its adapter (TAF), and from where it looks in the image (visual attention alignment, VAT).
{reason}.</p>
<div class="cards">{"".join(cards)}</div>
<p class="note">Large numbers: mean accuracy over the {len(c.subtypes("compositional"))} compositional sub-types on
held-out scenes. ± {escape(c.what_uncertainty_is())}.</p>"""

    def _accuracies(self) -> str:
        c = self.comparison
        rows, panels = [], []
        for family in reversed(FAMILIES):
            head = "".join(f'<th scope="col">{escape(name)}</th>' for name in [*NAMES.values(), "one answer always"])
            rows.append(f'<tr class="family"><th scope="col">{family}</th>{head}</tr>')
            groups, baselines = {}, {}
            for subtype in [*c.subtypes(family), "avg"]:
                name = "average" if subtype == "avg" else subtype.replace("_", " ")
                numbers = {m: (c.mean(m, family, subtype), c.uncertainty(m, family, subtype)) for m in NAMES}
                baselines[name] = c.teacher["constant_answer"][family][subtype]
                groups[name] = [charts.Bar(NAMES[m], COLOURS[m], *numbers[m]) for m in NAMES]
                cells = "".join(f"<td>{100 * v:.1f} <small>± {100 * e:.1f}</small></td>" for v, e in numbers.values())
                kind = ' class="avg"' if subtype == "avg" else ""
                rows.append(f"<tr{kind}><td>{name}</td>{cells}<td>{100 * baselines[name]:.1f}</td></tr>")
            chart = charts.bar_chart(groups, baselines, label=f"Accuracy by {family} sub-type of the three models")
            panels.append(f"<figure><h3>{family.capitalize()}</h3>{chart}</figure>")
        compositional, recognition = panels
        return f"""
<section><h2>Accuracy by kind of question</h2>
{charts.legend({NAMES[m]: COLOURS[m] for m in NAMES})}
<div class="grid">{compositional}<div>{recognition}
<p class="note"><b>Recognition</b> asks for a colour, an existence or a number. <b>Compositional</b> questions offer
two captions of which one fits, after SugarCrepe: in the other one an object, an attribute (a colour) or a relation is
replaced, swapped or added, and nothing but the image tells them apart. Whiskers: one ± of the table. Dotted marks:
the score of giving the most frequent answer every time. An answer counts only if it is what greedy decoding over the
whole vocabulary says.</p></div></div>
<div class="scroll"><table>{"".join(rows)}</table></div>
<p class="note">Accuracy in %. ± {escape(c.what_uncertainty_is())}. An average weighs all its sub-types
alike.</p></section>"""

    def _losses(self) -> str:
        stages = {m: _stages(self.metrics[m]) for m in (SFT, DISTILLED)}
        spans = []
        for place in range(max(map(len, stages.values()))):
            here = [s[place] for s in stages.values() if place < len(s)]
            spans.append((here[0][0], " / ".join(dict.fromkeys(name.upper() for _, name, _ in here))))
        panels = []
        for key, title in self.losses.items():
            curves = [
                charts.Curve(
                    NAMES[m], COLOURS[m], [_points(end - rows[-1]["samples"], rows, key) for end, _, rows in done]
                )
                for m, done in stages.items()
            ]
            label = f"{title}, over the training of both students"
            chart = charts.line_chart(curves, spans, title=title, x_label="training samples", label=label)
            panels.append(f"<figure>{chart}</figure>")
        return f"""
<section><h2>Training losses</h2>
{charts.legend({NAMES[m]: COLOURS[m] for m in (SFT, DISTILLED)})}
<div class="grid">{"".join(panels)}
<p class="note"><b>AR</b>: cross-entropy of the right answers, which both students learn from. <b>KD</b>: divergence
of the student's predictions from the teacher's, in distilled pre-training (DPT) and distilled fine-tuning (DFT).
<b>VAT</b>: one minus the similarity of the attention, in DFT alone. The SFT student has no teacher, so it has
neither. Dashed lines part the stages, named SFT student / CompoDistill where they differ; vertical scales are
logarithmic; training seed {self.comparison.seeds[0]}.</p>
</div></section>"""

    def _similarity(self) -> str:
        shown = self.similarity["compositional"]
        cells = [v for s in shown.values() for row in s.layers for v in row]
        panels, sentences = [], []
        for model, similarity in shown.items():
            chart = charts.heatmap(
                similarity.layers,
                {(match.student, t) for match in similarity.matches for t in match.teachers},
                title=NAMES[model],
                row_label="student layer",
                column_label="teacher layer",
                low=min(cells),
                high=max(cells),
                label=f"Attention similarity between the layers of {NAMES[model]} and the teacher",
            )
            panels.append(f"<figure>{chart}</figure>")
            means = {family: statistics.fmean(of[model].aligned) for family, of in self.similarity.items()}
            both = " and ".join(f"<b>{mean:.3f}</b> on {family}" for family, mean in means.items())
            sentences.append(f"{NAMES[model]} reaches {both} questions")
        return f"""
<section><h2>Does the student look where the teacher looks?</h2>
<p>Cosine similarity to the teacher in the visual understanding layers: {"; ".join(sentences)}.</p>
<div class="grid">{"".join(panels)}</div>
<p class="note">Each cell compares one student layer with one teacher layer: the cosine similarity of their attention
(mean over heads) from the position that predicts the answer to the visual tokens, mean over held-out compositional
questions; both panels share one colour scale. Orange frames mark the visual understanding layers (the middle 30-70 %
of a model) that group matching brings together, every student layer with a window of teacher layers. The numbers in
the text compare a student layer with the mean over its window, averaged over the framed student layers. Training seed
{self.comparison.seeds[0]}.</p></section>"""

    def _examples(self) -> str:
        o = self.outcomes
        return f"""
<section><h2>Where the models look</h2>
<p>Of {sum(o.values())} held-out compositional questions, both students answered {o.get((True, True), 0)} right and
{o.get((False, False), 0)} wrong; only CompoDistill was right on {o.get((False, True), 0)}, only the SFT student on
{o.get((True, False), 0)}. Examples of every outcome that occurred, chosen by their order and not by hand:</p>
{"".join(map(_example, self.examples))}
<p class="note">The glow marks attention over the visual tokens from the position that predicts the answer, mean over
heads and over the model's visual understanding layers, each map scaled to its own maximum. The rest of the attention
stays on the text. Training seed {self.comparison.seeds[0]}.</p></section>"""

    def _facts(self) -> str:
        rows = "".join(f"<tr><td>{escape(str(k))}</td><td>{escape(str(v))}</td></tr>" for k, v in self.meta.items())
        return f'<section><h2>How this was made</h2><table class="facts">{rows}</table></section>'


def _card(title: str, colour: str, number: str, doubt: str, more: str) -> str:
    return (
        f'<div class="card" style="border-top-color:{colour}"><span>{escape(title)}</span>'
        f"<b>{number} <small>{doubt}</small></b><span>{more}</span></div>"
    )


def _example(example: Example) -> str:
    """A question, the image, and the three models' answers under their attention maps."""
    image = charts.png(example.image)
    cells = [f"<div>{charts.attention_map(image, None, label='the image')}<p>the image</p></div>"]
    for model, name in NAMES.items():
        weights, said = example.attention[model], example.answers[model]
        kind, mark = ("right", "✓") if said == example.answer else ("wrong", "✗")
        picture = charts.attention_map(image, weights, label=f"Attention of {name} over the image")
        share = f"{100 * sum(weights):.0f} % of attention on the image"
        cells.append(
            f'<div>{picture}<p>{escape(name)}: <span class="{kind}">{mark} {escape(said)}</span><br>{share}</p></div>'
        )
    question = escape(example.question)
    start, choice, captions = question.partition(" A ")
    if choice:
        first, _, second = captions.partition(" B ")
        question = f"{start}<br><b>A</b> {first}<br><b>B</b> {second}"
    return f"""
<div class="example"><p><b>{escape(example.subtype.replace("_", " "))}</b>: {question}<br>
right answer: <span class="right">{escape(example.answer)}</span></p>
<div class="maps">{"".join(cells)}</div></div>"""


def _stages(metrics: Sequence[Mapping[str, Any]]) -> list[tuple[float, str, list[Mapping[str, Any]]]]:
    """(samples at its end, name, log lines) of every stage in order."""
    result: list[tuple[float, str, list[Mapping[str, Any]]]] = []
    begin, rows = 0.0, []
    for row, following in zip(metrics, [*metrics[1:], None], strict=True):
        rows.append(row)
        if following is None or following["stage"] != row["stage"] or following["samples"] <= row["samples"]:
            begin += row["samples"]
            result.append((begin, row["stage"], rows))
            rows = []
    return result


def _points(begin: float, rows: Sequence[Mapping[str, Any]], key: str) -> list[tuple[float, float]]:
    """(samples, loss) of the lines that have this loss, at most 200 of them."""
    points = [(begin + row["samples"], row[key]) for row in rows if row.get(key) is not None]
    return points[:: max(1, len(points) // 200)]
