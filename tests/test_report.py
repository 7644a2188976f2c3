"""The demo and its report: attention against eager attention, statistics against numpy, and one run from end to end."""

import json
import math
import re
import statistics
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from builtin_models import llava

from cdistill import demo
from cdistill.analysis import charts
from cdistill.analysis.attention import (
    aligned_layers,
    answer_attention,
    attention_similarity,
    visual_understanding_layers,
)
from cdistill.analysis.comparison import DISTILLED, FAMILIES, NAMES, SFT, TEACHER, Comparison
from cdistill.analysis.report import Example, Report
from cdistill.builtin.dataset import Collator, build_tokenizer
from cdistill.builtin.questions import COMPOSITIONAL, RECOGNITION
from cdistill.builtin.scorer import held_out_questions, predict
from cdistill.train.terms import TERMS

TOKENIZER = build_tokenizer()
SUBTYPES = {"recognition": RECOGNITION, "compositional": COMPOSITIONAL}
TITLES = {term.name: term.heading for term in TERMS.values() if term.heading}


def shape(layers, width=64):
    return {
        "num_hidden_layers": layers,
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_attention_heads": width // 16,
        "num_key_value_heads": width // 32,
        "initializer_range": 0.3,
    }


@pytest.fixture(scope="module")
def models():
    torch.manual_seed(0)
    teacher = llava(**shape(6))
    return {TEACHER: teacher, SFT: llava(**shape(3)), DISTILLED: llava(**shape(3), teacher=teacher)}


def questions(n=4):
    """A ragged batch of single questions."""
    items = [held_out_questions(s, n=n)[i] for i, s in enumerate(("swap_att", "count", "location", "add_obj")[:n])]
    return Collator(TOKENIZER.pad_token_id)(items)


def eager_attention(model, batch):
    """(L, B, V) head means of the row before the first answer token, from transformers' own attention matrices."""
    model.set_attn_implementation({"text_config": "eager"})
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    matrices = model.model(**inputs, output_attentions=True).attentions
    model.set_attn_implementation({"text_config": "sdpa"})
    visual = batch["input_ids"] == model.config.image_token_id
    result = []
    for matrix in matrices:
        rows = [
            matrix[b].mean(0)[(batch["labels"][b] != -100).nonzero()[0, 0] - 1, visual[b]] for b in range(len(visual))
        ]
        result.append(torch.stack(rows))
    return torch.stack(result)


@torch.no_grad()
def test_answer_attention_is_the_eager_attention_of_the_predicting_row(models):
    batch = questions()
    for model in models.values():
        expected = eager_attention(model, batch)
        torch.testing.assert_close(answer_attention(model, batch), expected, rtol=1e-4, atol=1e-6)
        chosen = visual_understanding_layers(model)
        torch.testing.assert_close(answer_attention(model, batch, chosen), expected[list(chosen)], rtol=1e-4, atol=1e-6)
        assert expected.std() > 1e-3  # uniform attention would hide a mistake
        assert model.config.get_text_config()._attn_implementation == "sdpa"


@torch.no_grad()
def test_attention_similarity_is_the_mean_cosine_over_questions(models):
    teacher, students = models[TEACHER], [models[SFT], models[DISTILLED]]
    parts = [questions(4), questions(2)]
    found = attention_similarity(students, teacher, parts)
    for student, similarity in zip(students, found, strict=True):
        theirs = torch.cat([eager_attention(teacher, b) for b in parts], 1).double()
        ours = torch.cat([eager_attention(student, b) for b in parts], 1).double()
        for i in range(3):
            for j in range(6):
                cosine = F.cosine_similarity(ours[i], theirs[j], dim=-1).mean().item()
                assert similarity.layers[i][j] == pytest.approx(cosine, abs=1e-5)
        assert similarity.matches == aligned_layers(student, teacher)
        for match, value in zip(similarity.matches, similarity.aligned, strict=True):
            window = theirs[list(match.teachers)].mean(0)
            cosine = F.cosine_similarity(ours[match.student], window, dim=-1).mean().item()
            assert value == pytest.approx(cosine, abs=1e-5)
    (itself,) = attention_similarity([teacher], teacher, parts)
    assert [itself.layers[i][i] for i in range(6)] == pytest.approx([1.0] * 6)
    with pytest.raises(ValueError, match="no batch"):
        attention_similarity(students, teacher, [])


def test_examples_are_the_first_questions_of_every_outcome(models):
    outcomes, examples = demo.find_examples(models, per_subtype=3)
    assert sum(outcomes.values()) == 3 * len(COMPOSITIONAL)
    expected = {}
    for i in range(3):
        for subtype in COMPOSITIONAL:
            batch = Collator(TOKENIZER.pad_token_id)([held_out_questions(subtype, n=3, seed=demo.EVALUATION_SEED)[i]])
            said = [predict(models[m], batch, eos_token_id=TOKENIZER.eos_token_id)[0] for m in (SFT, DISTILLED)]
            expected.setdefault(tuple(predicted == right for predicted, right in said), []).append((i, subtype))
    assert outcomes == {kind: len(places) for kind, places in expected.items()}
    assert len(examples) == sum(min(count, outcomes[kind]) for kind, count in demo.EXAMPLES.items()) > 0
    example = examples[0]
    place = next(expected[kind][0] for kind in demo.EXAMPLES if kind in expected)
    assert place[1] == example.subtype
    item = held_out_questions(example.subtype, n=3, seed=demo.EVALUATION_SEED)[place[0]]
    assert np.array_equal(example.image, item["pixel_values"].numpy())
    assert example.question.startswith("which caption fits ? A ")
    assert example.answer == TOKENIZER.decode(item["input_ids"][-2])
    for name, model in models.items():
        batch = Collator(TOKENIZER.pad_token_id)([item])
        expected = answer_attention(model, batch, visual_understanding_layers(model)).mean(0)[0]
        torch.testing.assert_close(torch.tensor(example.attention[name]), expected)


def evaluation(value, n=200):
    """What `evaluate` returns, every sub-type at the accuracy that `value` draws."""
    result = {"n": n, "seed": 0, "standard_error": {}, "constant_answer": {}}
    for family, subtypes in SUBTYPES.items():
        scores = {s: value() for s in subtypes}
        errors = {s: math.sqrt(p * (1 - p) / n) for s, p in scores.items()}
        result[family] = scores | {"avg": statistics.fmean(scores.values())}
        result["standard_error"][family] = errors | {"avg": math.hypot(*errors.values()) / len(errors)}
        result["constant_answer"][family] = dict.fromkeys((*subtypes, "avg"), 0.5)
    return result


def comparison(seeds, sft=0.6, distilled=0.7, noise=0.05):
    rng = np.random.default_rng(seeds)

    def around(centre):
        return lambda: float(np.clip(centre + noise * rng.standard_normal(), 0, 1))

    students = {m: [evaluation(around(c)) for _ in range(seeds)] for m, c in ((SFT, sft), (DISTILLED, distilled))}
    return Comparison(evaluation(around(0.9)), students, list(range(7, 7 + seeds)))


def test_results_hold_the_means_the_spreads_and_every_seed():
    c = comparison(3)
    results = json.loads(json.dumps(c.results()))
    assert list(results)[:3] == [TEACHER, SFT, DISTILLED]
    for model in NAMES:
        assert set(results[model]) == set(FAMILIES)
        for family, subtypes in SUBTYPES.items():
            assert set(results[model][family]) == {*subtypes, "avg"}
    for family in FAMILIES:
        sft, distilled = ([run[family]["avg"] for run in c.students[m]] for m in (SFT, DISTILLED))
        margins = [b - a for a, b in zip(sft, distilled, strict=True)]
        assert results[SFT][family]["avg"] == pytest.approx(sum(sft) / 3)
        assert results["spread"][DISTILLED][family]["avg"] == pytest.approx(np.std(distilled, ddof=1))
        assert results["margin"][family]["mean"] == pytest.approx(np.mean(margins))
        assert results["margin"][family]["uncertainty"] == pytest.approx(np.std(margins, ddof=1))
        assert results[TEACHER][family] == c.teacher[family]
        assert [entry["seed"] for entry in results["seeds"]] == [7, 8, 9]
        assert [entry[SFT][family]["avg"] for entry in results["seeds"]] == sft


def test_one_seed_has_standard_errors_and_no_spread():
    c = comparison(1)
    results = c.results()
    assert "spread" not in results
    errors = [c.students[m][0]["standard_error"]["compositional"]["avg"] for m in (SFT, DISTILLED)]
    assert c.margin_uncertainty("compositional") == pytest.approx(math.hypot(*errors))
    assert results["standard_error"][SFT] == c.students[SFT][0]["standard_error"]


@pytest.mark.parametrize("seeds", [1, 3])
def test_table_shows_every_number(seeds):
    c = comparison(seeds)
    lines = c.table().splitlines()
    for family, subtypes in SUBTYPES.items():
        begin = lines.index(family)
        for line, subtype in zip(lines[begin + 1 :], (*subtypes, "avg"), strict=False):
            found = [float(x) for x in re.findall(r"\d+\.\d", line)]
            assert line.split()[0] == subtype
            expected = [f(m, family, subtype) for m in NAMES for f in (c.mean, c.uncertainty)]
            assert found == pytest.approx([100 * x for x in expected], abs=0.0501)
    margin = 100 * statistics.fmean(c.margins("compositional"))
    assert any(line.startswith(f"CompoDistill - SFT, compositional average: {margin:+.1f} points") for line in lines)
    assert "200 questions per sub-type" in lines[-1]
    assert ("over 3 training seeds" in lines[-1]) == (seeds == 3)


class Page(HTMLParser):
    """Checks that tags nest, and collects text and what the page refers to."""

    VOID = ("meta", "br", "i")

    def __init__(self, html):
        super().__init__()
        self.open, self.text, self.references, self.tags = [], [], [], []
        self.feed(html)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.references += [value for name, value in attributes if name in ("href", "src", "xlink:href")]
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        self.open.pop()

    def handle_data(self, data):
        self.text.append(data)


def log(stages, losses):
    return [
        {
            "stage": stage,
            "step": i,
            "samples": 64 * i,
            **{k: 2.0 / (i + 1) if k in losses else None for k in TITLES},
        }
        for stage in stages
        for i in (10, 20, 30)
    ]


def report(models, c, **changes):
    similar = attention_similarity([models[SFT], models[DISTILLED]], models[TEACHER], [questions()])
    rng = np.random.default_rng(0)
    example = Example(
        subtype="swap_obj",
        question="which caption fits ? A red ring above <b> B <b> above red ring",
        answer="A",
        answers={TEACHER: "A", SFT: "<script>", DISTILLED: "A"},
        image=rng.uniform(-1, 1, (3, 48, 48)).astype(np.float32),
        attention={m: rng.dirichlet(np.ones(36)).tolist() for m in NAMES},
    )
    fields = {
        "comparison": c,
        "metrics": {SFT: log(("pt", "sft", "sft"), {"ar"}), DISTILLED: log(("dpt", "dft", "sft"), set(TITLES))},
        "losses": TITLES,
        "similarity": {f: dict(zip((SFT, DISTILLED), similar, strict=True)) for f in FAMILIES},
        "outcomes": {(False, True): 5, (True, True): 4},
        "examples": [example],
        "meta": {"commit": "abc"},
    }
    return Report(**(fields | changes))


@pytest.mark.parametrize("seeds", [1, 3])
def test_report_stands_alone_and_shows_the_numbers(models, seeds):
    c = comparison(seeds)
    page = Page(report(models, c).html())
    assert "script" not in page.tags
    assert page.references
    assert all(reference.startswith("data:image/png;base64,") for reference in page.references)
    text = " ".join(page.text)
    for family, subtypes in SUBTYPES.items():
        for model in NAMES:
            for subtype in (*subtypes, "avg"):
                assert f"{100 * c.mean(model, family, subtype):.1f}" in text
    assert "<script>" in text  # a strange answer is shown, not run
    assert "only CompoDistill was right on 5" in " ".join(text.split())
    assert page.tags.count("figure") == 2 + 3 + 2


@pytest.mark.parametrize(
    ("distilled", "words"), [(0.8, "questions better than"), (0.4, "questions worse than"), (0.6, "about as well as")]
)
def test_headline_says_what_the_numbers_say(models, distilled, words):
    c = comparison(1, sft=0.6, distilled=distilled, noise=0.0)
    text = " ".join(Page(report(models, c).html()).text)
    assert words in text.split("Two small")[0]


def test_bars_are_as_long_as_their_values():
    bars = [
        charts.Bar("a", "#111111", 0.25, 0.0),
        charts.Bar("b", "#222222", 1.0, 0.1),
        charts.Bar("c", "#333333", 0.5, 0.1),
    ]
    chart = charts.bar_chart({"x": bars}, {"x": 0.5}, label="bars")
    a, b, c = (float(re.search(rf'width="([\d.]+)"[^>]*fill="{bar.colour}"', chart)[1]) for bar in bars)
    assert (a / b, c / b) == pytest.approx((0.25, 0.5), abs=1e-3)


def test_curves_fall_where_the_loss_falls_and_stay_inside():
    points = [(float(x), 10.0 ** (1 - x / 50)) for x in range(0, 101, 10)]
    chart = charts.line_chart(
        [charts.Curve("a", "#111111", [points])], [(50, "ONE"), (100, "TWO")], title="t", x_label="x", label="l"
    )
    drawn = [tuple(map(float, p.split(","))) for p in re.search(r'polyline points="([^"]+)"', chart)[1].split()]
    xs, ys = zip(*drawn, strict=True)
    assert len(set(np.diff(xs).round(0))) == 1  # linear in samples
    assert np.ptp(np.diff(ys)) < 0.3  # a power law is straight on the logarithmic axis
    assert all(d > 0 for d in np.diff(ys))
    height = float(re.search(r'viewBox="0 0 \d+ (\d+)"', chart)[1])
    assert all(0 <= x <= charts.WIDTH and 0 <= y <= height for x, y in drawn)
    assert "nothing was logged" in charts.line_chart([], [], title="t", x_label="x", label="l")


def test_attention_map_needs_a_square():
    image = charts.png(np.zeros((3, 8, 8), dtype=np.float32))
    weights = [0.0, 0.1, 0.2, 0.4]
    opacity = [
        float(x)
        for x in re.findall(r'fill="#22d3ee" opacity="([\d.]+)"', charts.attention_map(image, weights, label="m"))
    ]
    assert opacity == pytest.approx([0.8 * w / 0.4 for w in weights])
    with pytest.raises(ValueError, match="square grid"):
        charts.attention_map(image, [0.1] * 5, label="m")
