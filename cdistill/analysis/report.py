"""The demo's report: one HTML file with everything inside, readable without a network, without scripts and on a phone."""

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

COLOURS = {TEACHER: "#5b6470", SFT: "#c2570c", DISTILLED: "#1d4ed8"}
OBJECTIVES = {"ar": "AR: cross-entropy on answers", "kd": "KD: KL to the teacher's answers", "vat": "VAT: attention"}

_STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0; background: #f4f6f8; color: #1b1f24; font: 16px/1.55 system-ui, "Segoe UI", Roboto, Helvetica, Arial, sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 28px 20px 56px; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .4rem; }
h2 { font-size: 1.3rem; margin: 0 0 .5rem; }
h3 { font-size: 1rem; margin: 0 0 .4rem; }
p { margin: 0 0 .8rem; max-width: 78ch; }
section { background: #fff; border: 1px solid #d8dee4; border-radius: 12px; padding: 22px 24px; margin: 18px 0; }
svg { display: block; width: 100%; height: auto; font-family: inherit; }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 400px), 1fr)); gap: 22px 30px; align-items: start; }
.cards { display: grid; grid-template-columns: repeat(4, 1fr); gap: 14px; margin: 18px 0 0; }
.card { border: 1px solid #d8dee4; border-top: 5px solid; border-radius: 10px; padding: 12px 16px; background: #fff; }
.card b { display: block; font-size: 1.9rem; line-height: 1.2; font-variant-numeric: tabular-nums; }
.card b small { font-size: 1rem; font-weight: 400; color: #57606a; }
.card span { color: #57606a; font-size: .9rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: 5px 10px; border-bottom: 1px solid #e6eaee; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
td small { color: #57606a; }
tr.family th { padding-top: 14px; text-transform: capitalize; border-bottom: 2px solid #afb8c1; }
tr.avg td { font-weight: 700; }
tr.avg td small { font-weight: 400; }
figure { margin: 0; }
figcaption, .note { color: #424a53; font-size: .9rem; margin-top: .5rem; max-width: 90ch; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 18px; margin: 4px 0 10px; font-size: .92rem; }
.legend i { display: inline-block; width: 13px; height: 13px; border-radius: 3px; margin-right: 6px; vertical-align: -1px; }
.example { border-top: 1px solid #e6eaee; padding: 18px 0 6px; }
.example .question { font-size: 1.02rem; }
.maps { display: grid; grid-template-columns: repeat(4, 1fr); gap: 12px; }
.maps svg { border-radius: 6px; }
.maps p { margin: 4px 0 0; font-size: .88rem; line-height: 1.35; }
.right { color: #116329; font-weight: 600; } .wrong { color: #b3161b; font-weight: 600; }
code { background: #eff2f5; border-radius: 4px; padding: 1px 5px; font-size: .9em; }
@media (max-width: 640px) {
  main { padding: 18px 10px 40px; } section { padding: 16px 14px; }
  .cards { grid-template-columns: 1fr 1fr; } .maps { grid-template-columns: 1fr 1fr; }
  h1 { font-size: 1.5rem; } th, td { padding: 4px 6px; font-size: .86rem; }
}
"""


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
        similarity: by family of questions and student, attention similarity to the teacher, of the first seed.
        outcomes: by (SFT student right, distilled student right), the number of compositional questions looked through.
        examples: some of them.
        meta: facts about the run, shown at the end.
    """

    comparison: Comparison
    metrics: Mapping[str, Sequence[Mapping[str, Any]]]
    similarity: Mapping[str, Mapping[str, AttentionSimilarity]]
    outcomes: Mapping[tuple[bool, bool], int]
    examples: Sequence[Example]
    meta: Mapping[str, Any]

    def html(self) -> str:
        """The whole document."""
        body = "".join(
            (self._headline(), self._accuracies(), self._losses(), self._similarity(), self._examples(), self._facts())
        )
        return (
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>cdistill demo</title><style>{_STYLE}</style></head><body><main>{body}</main></body></html>\n"
        )

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
        cards = "".join(
            f'<div class="card" style="border-top-color:{COLOURS[m]}"><span>{escape(NAMES[m])}</span>'
            f"<b>{100 * c.mean(m, 'compositional'):.1f} % <small>± {100 * c.uncertainty(m, 'compositional'):.1f}</small></b>"
            f"<span>recognition {100 * c.mean(m, 'recognition'):.1f} %</span></div>"
            for m in NAMES
        )
        cards += (
            '<div class="card" style="border-top-color:#1b1f24"><span>CompoDistill − SFT</span>'
            f"<b>{100 * margin:+.1f} <small>± {100 * doubt:.1f} points</small></b>"
            f"<span>recognition {100 * statistics.fmean(c.margins('recognition')):+.1f}</span></div>"
        )
        return (
            f"<h1>The distilled student {verdict} the same student fine-tuned without a teacher</h1>"
            "<p>Two small multimodal students grew from one base model, on the same images and questions, for the same number of "
            "steps. <b>SFT</b> learned from the right answers alone. <b>CompoDistill</b> also learned from a larger teacher: from "
            "its answers (KD), through its adapter (TAF), and from where it looks in the image (visual attention alignment, "
            f"VAT). {reason}.</p>"
            f'<div class="cards">{cards}</div>'
            f'<p class="note">Large numbers: mean accuracy over the {len(c.subtypes("compositional"))} compositional sub-types on '
            f"held-out scenes. ± {escape(c.what_uncertainty_is())}.</p>"
        )

    def _accuracies(self) -> str:
        c = self.comparison
        rows, panels = [], []
        for family in FAMILIES:
            head = "".join(f'<th scope="col">{escape(NAMES[m])}</th>' for m in NAMES)
            rows.append(
                f'<tr class="family"><th scope="col">{family}</th>{head}<th scope="col">one answer always</th></tr>'
            )
            groups = {}
            for subtype in [*c.subtypes(family), "avg"]:
                name = "average" if subtype == "avg" else subtype.replace("_", " ")
                numbers = {m: (c.mean(m, family, subtype), c.uncertainty(m, family, subtype)) for m in NAMES}
                groups[name] = [charts.Bar(NAMES[m], COLOURS[m], *numbers[m]) for m in NAMES]
                cells = "".join(f"<td>{100 * v:.1f} <small>± {100 * e:.1f}</small></td>" for v, e in numbers.values())
                constant = f"<td>{100 * c.teacher['constant_answer'][family][subtype]:.1f}</td>"
                rows.append(f'<tr class="{"avg" if subtype == "avg" else ""}"><td>{name}</td>{cells}{constant}</tr>')
            baselines = {
                "average" if s == "avg" else s.replace("_", " "): v
                for s, v in c.teacher["constant_answer"][family].items()
            }
            chart = charts.bar_chart(groups, baselines, label=f"Accuracy by {family} sub-type of the three models")
            panels.append(f"<figure><h3>{family.capitalize()}</h3>{chart}</figure>")
        return (
            "<section><h2>Accuracy by kind of question</h2>"
            + charts.legend({NAMES[m]: COLOURS[m] for m in NAMES})
            + f'<div class="grid">{panels[1]}{panels[0]}</div>'
            + '<p class="note">Recognition asks for a colour, an existence or a number. Compositional questions offer two captions '
            "that share their words or differ in one of them, after SugarCrepe: an object, an attribute (a colour) or a relation is replaced, "
            "swapped or added; only one caption fits. A whisker is one ± of the table; the dotted mark is what giving the "
            "most frequent answer every time would score. An answer counts only if it is what greedy decoding over the whole vocabulary says.</p>"
            f'<div class="scroll"><table>{"".join(rows)}</table></div>'
            f'<p class="note">Accuracy in %. ± {escape(c.what_uncertainty_is())}. An average weighs all its sub-types alike.</p></section>'
        )

    def _losses(self) -> str:
        stages = {m: _stages(self.metrics[m]) for m in (SFT, DISTILLED)}
        longest = max(stages.values(), key=len)
        names = [
            " / ".join(dict.fromkeys(s[i][1].upper() for s in stages.values() if i < len(s)))
            for i in range(len(longest))
        ]
        spans = [(end, name) for (end, _, _), name in zip(longest, names, strict=True)]
        panels = []
        for key, title in OBJECTIVES.items():
            curves = [
                charts.Curve(NAMES[m], COLOURS[m], [_points(begin, rows, key) for begin, rows in _offsets(stages[m])])
                for m in (SFT, DISTILLED)
            ]
            chart = charts.line_chart(
                curves,
                spans,
                title=title,
                x_label="training samples",
                label=f"{title}, over the training of both students",
            )
            panels.append(f"<figure>{chart}</figure>")
        return (
            "<section><h2>Training losses</h2>"
            + charts.legend({NAMES[m]: COLOURS[m] for m in (SFT, DISTILLED)})
            + f'<div class="grid">{"".join(panels)}</div>'
            '<p class="note">Dashed lines part the stages (SFT student / CompoDistill where their names differ). The SFT student has no '
            "teacher, so only AR is drawn for it; KD acts in distilled pre-training (DPT) and distilled fine-tuning (DFT), VAT in "
            "DFT alone. Logarithmic scales; the first training seed.</p></section>"
        )

    def _similarity(self) -> str:
        shown = self.similarity["compositional"]
        cells = [v for s in shown.values() for row in s.layers for v in row]
        low, high = min(cells), max(cells)
        panels, sentences = [], []
        for model, similarity in shown.items():
            outlined = {(m.student, t) for m in similarity.matches for t in m.teachers}
            chart = charts.heatmap(
                similarity.layers,
                outlined,
                title=NAMES[model],
                row_label="student layer",
                column_label="teacher layer",
                low=low,
                high=high,
                label=f"Attention similarity between the layers of {NAMES[model]} and the teacher",
            )
            panels.append(f"<figure>{chart}</figure>")
            both = " and ".join(
                f"{statistics.fmean(self.similarity[family][model].aligned):.3f} on {family} questions"
                for family in self.similarity
            )
            sentences.append(f"{NAMES[model]} reaches {both}")
        return (
            "<section><h2>Does the student look where the teacher looks?</h2>"
            f"<p>Cosine similarity to the teacher in the visual understanding layers: {'; '.join(sentences)}.</p>"
            f'<div class="grid">{"".join(panels)}</div>'
            '<p class="note">Each cell compares one student layer with one teacher layer: the cosine similarity of their attention '
            "(mean over heads) from the position that predicts the answer to the visual tokens, averaged over held-out compositional questions; both panels "
            "share one colour scale. Orange frames mark the visual understanding layers (the middle 30-70 %) that group matching brings "
            "together: every student layer with a window of teacher layers. The numbers in the text compare a student layer with the mean over its "
            "window, as the VAT loss does, averaged over the framed student layers.</p></section>"
        )

    def _examples(self) -> str:
        items = []
        for example in self.examples:
            image = charts.png(example.image)
            cells = [f"<div>{charts.attention_map(image, None, label='the image')}<p>the image</p></div>"]
            for model in NAMES:
                weights, said = example.attention[model], example.answers[model]
                right = said == example.answer
                mark = f'<span class="{"right" if right else "wrong"}">{"✓" if right else "✗"} {escape(said)}</span>'
                picture = charts.attention_map(image, weights, label=f"Attention of {NAMES[model]} over the image")
                cells.append(
                    f"<div>{picture}<p>{escape(NAMES[model])}: {mark}<br>{100 * sum(weights):.0f} % of attention on the image</p></div>"
                )
            items.append(
                f'<div class="example"><p class="question"><b>{escape(example.subtype.replace("_", " "))}</b>: '
                f"{_question(example.question)} <span class='right'>{escape(example.answer)}</span></p>"
                f'<div class="maps">{"".join(cells)}</div></div>'
            )
        o, total = self.outcomes, sum(self.outcomes.values())
        return (
            "<section><h2>Where the models look</h2>"
            f"<p>Of {total} held-out compositional questions, both students answered {o.get((True, True), 0)} right and "
            f"{o.get((False, False), 0)} wrong; only CompoDistill was right on {o.get((False, True), 0)}, only the SFT student on "
            f"{o.get((True, False), 0)}. Examples of every outcome that occurred, the first ones in order, not picked by hand:</p>"
            + "".join(items)
            + '<p class="note">Yellow marks the attention over the 36 patches from the position that predicts the answer, mean over '
            "heads and over the model's visual understanding layers, each map scaled to its own maximum; the rest of the attention stays "
            "on the text.</p></section>"
        )

    def _facts(self) -> str:
        rows = "".join(f"<tr><td>{escape(str(k))}</td><td>{escape(str(v))}</td></tr>" for k, v in self.meta.items())
        return f'<section><h2>How this was made</h2><div class="scroll"><table>{rows}</table></div></section>'


def _question(text: str) -> str:
    """The question as HTML, captions on lines of their own."""
    start, choice, captions = text.partition(" A ")
    if not choice:
        return escape(text)
    first, _, second = captions.partition(" B ")
    return f"{escape(start)}<br><b>A</b> {escape(first)}<br><b>B</b> {escape(second)}<br>right answer:"


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


def _offsets(
    stages: Sequence[tuple[float, str, list[Mapping[str, Any]]]],
) -> list[tuple[float, list[Mapping[str, Any]]]]:
    """(samples before it, log lines) of every stage."""
    return [(end - rows[-1]["samples"], rows) for end, _, rows in stages]


def _points(begin: float, rows: Sequence[Mapping[str, Any]], key: str) -> list[tuple[float, float]]:
    """(samples, loss) of the lines that have this loss, at most 200 of them."""
    points = [(begin + row["samples"], row[key]) for row in rows if row.get(key) is not None]
    return points[:: max(1, len(points) // 200)]
