"""`cdistill eval compare`: paired tests against enumeration and resampled answers, result folders that do not fit, the page."""

import base64
import json
import random
import re
from dataclasses import replace
from fractions import Fraction
from html import escape
from io import BytesIO
from itertools import product

import numpy as np
import pytest
from PIL import Image

from cdistill.cli import main
from cdistill.eval import benchmarks, paired, paper
from cdistill.eval.comparison import compare, table
from cdistill.eval.contract import Answer, Question, write_answers
from cdistill.eval.page import EXAMPLES, page
from cdistill.eval.parting import cases, examples

OTHER = {"A": "B", "B": "A", "yes": "no", "no": "yes", "true": "false", "false": "true"}


def statements(n):
    """VSR: one question for each image."""
    facts = [
        {"subtype": label, "unit": f"{i}.jpg", "label": label, "relation": "on"} for i, label in enumerate(TRUE[:n])
    ]
    return [Question(str(i), f"cat {i} is on the mat", (f"{i}.jpg",), facts=of) for i, of in enumerate(facts)]


TRUE = ["true", "false"] * 200


def choices(n, captions=1):
    """SugarCrepe: both orders of so many captions of each image."""
    return [
        Question(
            f"swap_obj/{i}_{c}/{order}",
            f"Which caption? <A> & {i}",
            (f"{i}.jpg",),
            facts={
                "subtype": "swap_obj",
                "order": order,
                "item": f"swap_obj/{i}_{c}",
                "unit": f"{i}.jpg",
                "label": "AB"[order != "positive_first"],
            },
        )
        for i in range(n)
        for c in range(captions)
        for order in ("positive_first", "negative_first")
    ]


def presence(n):
    """R-Bench: two questions for each image, in some of the five lists."""
    return [
        Question(
            str(i),
            f"Is {i} there?",
            (f"{i // 2}.jpg",),
            facts={
                "unit": f"{i // 2}.jpg",
                "label": "yes" if i % 5 < 3 else "no",
                "lists": [k for k in range(1, 6) if (i + k) % 3],
            },
        )
        for i in range(n)
    ]


def crossed(n):
    """Winoground: four questions for each group."""
    return [
        Question(
            f"{i}_c{c}_i{m}",
            f"Does this figure show caption {c}?",
            (f"{i}_{m}.png",),
            kind="probability",
            continuation="Yes",
            facts={"item": str(i), "unit": str(i), "of": 4, "caption": c, "image": m},
        )
        for i in range(n)
        for c, m in product((0, 1), (0, 1))
    ]


def answer(questions, seed, accuracy):
    """Replies of which a share is right; scores that prefer what fits."""
    draw = random.Random(seed)

    def said(question):
        if question.kind == "probability":
            fits = question.facts["caption"] == question.facts["image"]
            return Answer(question, score=draw.random() * (1.0 if fits else 1.5 - accuracy), tokens=1)
        label = question.facts["label"]
        return Answer(question, label if draw.random() < accuracy else OTHER[label], tokens=1)

    return [said(question) for question in questions]


def write(folder, model, tasks, **facts):
    """A result folder as ``cdistill eval --output`` writes it."""
    folder.mkdir()
    for task, answers in tasks.items():
        write_answers(folder / f"{task}.jsonl", task, answers)
        about = {"model": model, "answers": len(answers), "images": [str(folder.parent / "images")], **facts}
        (folder / f"{task}.json").write_text(json.dumps(about))
    return folder


def test_mcnemar_is_what_enumerating_coins_gives():
    for first, second in [(0, 0), (0, 1), (5, 0), (2, 7), (6, 6), (1, 9), (9, 3)]:
        n = first + second
        falls = [sum(coins) for coins in product((0, 1), repeat=n)]
        at_least_as_far = sum(abs(2 * heads - n) >= abs(first - second) for heads in falls)
        assert paired.mcnemar(first, second) == float(Fraction(at_least_as_far, 2**n))
    assert 0 < paired.mcnemar(4000, 3000) < 1e-30  # also of whole benchmarks


def test_independent_questions_are_tested_exactly_and_dependent_ones_are_not(tmp_path):
    single, double = statements(90), choices(30)
    tasks = [{"vsr": answer(single, s, a), "sugarcrepe": answer(double, s, a)} for s, a in ((1, 0.9), (2, 0.6))]
    result = compare([write(tmp_path / name, name, of) for name, of in zip("ab", tasks, strict=True)])
    found = {each.task: each.differences[0] for each in result.tasks}
    right = [np.array([a.reply == a.question.facts["label"] for a in of["vsr"]]) for of in tasks]
    only = int((right[0] & ~right[1]).sum()), int((right[1] & ~right[0]).sum())
    whole = found["vsr"]["accuracy"]
    assert (whole.test, whole.only, whole.p) == (paired.MCNEMAR, only, paired.mcnemar(*only))
    assert whole.percent == pytest.approx(100 * (right[1].mean() - right[0].mean()))
    assert found["sugarcrepe"]["swap_obj"].test == paired.BOOTSTRAP  # two orders of one image
    assert found["sugarcrepe"]["swap_obj/positive_first"].test == paired.MCNEMAR


@pytest.mark.parametrize(
    ("task", "questions", "metrics"),
    [("rbench", presence(60), ("f1", "precision")), ("winoground", crossed(40), ("text", "group"))],
)
def test_the_bootstrap_is_that_of_whole_units_answered_by_both(task, questions, metrics):
    benchmark, draw = benchmarks.get(task), np.random.default_rng(3)
    both = [answer(questions, seed, accuracy) for seed, accuracy in ((1, 0.9), (2, 0.6))]
    units = sorted({q.facts["unit"] for q in questions})
    members = [{unit: [a for a in of if a.question.facts["unit"] == unit] for unit in units} for of in both]

    def values(chosen, of):
        copies = [
            replace(a, question=replace(a.question, facts={**a.question.facts, "item": f"{i}", "unit": f"{i}"}))
            for i, unit in enumerate(chosen)
            for a in of[unit]
        ]
        tally = benchmark.tally(copies)
        return dict(zip(tally.names, 100 * tally.values(tally.sums().sum(0)), strict=True))

    drawn = {name: [] for name in metrics}
    for _ in range(150):
        chosen = draw.choice(units, len(units))
        first, second = (values(chosen, of) for of in members)
        for name in metrics:
            drawn[name].append(second[name] - first[name])
    tallies = [benchmark.tally(of) for of in both]
    found = paired.differences(*tallies, paired.draws(*tallies, task))
    for name in metrics:
        ours, low, high = found[name], *np.quantile(drawn[name], (0.025, 0.975))
        assert ours.standard_error == pytest.approx(np.std(drawn[name]), rel=0.2)
        assert ours.interval == pytest.approx((low, high), abs=0.4 * ours.standard_error)


def test_few_units_prove_no_more_than_so_many_coins():
    """Where all differ alike resampling sees no doubt, however few they are."""
    few = choices(4)
    tallies = [benchmarks.get("sugarcrepe").tally([Answer(q, said) for q in few]) for said in "A?"]
    found = paired.differences(*tallies, paired.draws(*tallies, "sugarcrepe"))["swap_obj"]
    assert (found.percent, found.standard_error, found.apart, found.p) == (-50, 0, 4, 2 / 2**4)


def test_an_image_asked_twice_is_not_tested_as_one_question():
    twice = [replace(q, facts={**q.facts, "unit": f"{int(q.id) // 2}"}) for q in statements(20)]
    tallies = [
        benchmarks.get("vsr").tally([Answer(q, q.facts["label"] if int(q.id) % 2 < good else "?") for q in twice])
        for good in (0, 1)
    ]
    found = paired.differences(*tallies, paired.draws(*tallies, "vsr"))
    assert found["accuracy"].test == paired.BOOTSTRAP
    assert found["true"].test == paired.MCNEMAR


def test_what_shares_an_image_counts_once(tmp_path):
    """Ten captions of an image that are all right or all wrong tell no more than one."""
    few, many = choices(40), choices(40, captions=10)
    accuracy, errors = {"a": 0.9, "b": 0.6}, []
    for questions in (few, many):
        draws = {name: random.Random(name) for name in accuracy}
        good = {n: {f"{i}.jpg": draws[n].random() < share for i in range(40)} for n, share in accuracy.items()}
        folders = [
            write(
                tmp_path / f"{name}{len(questions)}",
                name,
                {
                    "sugarcrepe": [
                        Answer(q, q.facts["label"] if good[name][q.facts["unit"]] else OTHER[q.facts["label"]])
                        for q in questions
                    ]
                },
            )
            for name in accuracy
        ]
        errors.append(compare(folders).tasks[0].differences[0]["mean"].standard_error)
    assert errors[0] == pytest.approx(errors[1])


def test_equal_models_do_not_differ_and_the_order_of_lines_means_nothing(tmp_path):
    answers = answer(presence(60), 5, 0.7)
    shuffled = random.Random(1).sample(answers, len(answers))
    same = compare([write(tmp_path / "a", "m", {"rbench": answers}), write(tmp_path / "b", "n", {"rbench": shuffled})])
    for of in same.tasks[0].differences[0].values():
        assert (of.percent, of.standard_error, of.p) == (0, 0, 1)
    assert not any(case.parts for case in cases("rbench", same.results))


def test_columns_are_averaged_plainly_beside_the_papers_figures(tmp_path):
    """The paper's models are known by the names of their checkpoints."""
    names = ("hub/CompoDistill-Teacher-4B", "runs/mine", "CompoDistill-2B")
    folders = [
        write(
            tmp_path / str(i),
            name,
            {
                "sugarcrepe": answer(choices(30), i, 0.8),
                "winoground": answer(crossed(20), i, 0.8),
                "vsr": answer(statements(20), i, 0.8),
            },
        )
        for i, name in enumerate(names)
    ]
    result = compare(folders)
    (average,) = result.averages
    headline = {each.task: [of[each.headline].percent for of in each.metrics] for each in result.tasks}
    expected = np.mean([headline["sugarcrepe"], headline["winoground"]], axis=0)
    assert average.percent == pytest.approx(expected)
    assert average.differences[1].percent == pytest.approx(expected[2] - expected[0])
    assert average.paper == [pytest.approx((83.0 + 57.8) / 2), None, pytest.approx((82.9 + 51.2) / 2)]
    assert result.paper("sugarcrepe") == [83.0, None, 82.9]
    assert result.paper("vsr") == [None, None, None]
    text = table(result)
    assert "sade, bivlc missing: not the paper's average" in text
    assert "not comparable" in text
    # the averages that the paper prints are the plain means of its columns
    for model, means in {"CompoDistill-Teacher-4B": (62.6, 70.3), "CompoDistill-2B": (61.9, 66.7)}.items():
        of = paper.figures(model)
        for group, mean in zip(("vqa", "compositional"), means, strict=True):
            assert np.mean([of[column] for column in paper.AVERAGES[group]]) == pytest.approx(mean, abs=0.11)


@pytest.fixture
def two(tmp_path):
    """Two results of the same questions, and images of all but the first."""
    (tmp_path / "images").mkdir()
    for i in range(1, 60):
        Image.new("RGB", (900, 600), (4 * i, 99, 0)).save(tmp_path / "images" / f"{i}.jpg")
    replies = [answer(choices(60), seed, accuracy) for seed, accuracy in ((1, 0.9), (2, 0.5))]
    replies[1][0] = replace(replies[1][0], reply="<script>alert(1)</script> neither", cut=True)
    replies[0][0] = replace(replies[0][0], reply="A")
    return [
        write(
            tmp_path / name,
            f"runs/{model}",
            {"sugarcrepe": of, "winoground": answer(crossed(30), name, 0.7), **more},
        )
        for (name, model, more), of in zip(
            (("a", "<b>teacher</b>", {"vsr": answer(statements(9), 1, 0.5)}), ("b", "student", {})),
            replies,
            strict=True,
        )
    ]


def test_the_command_writes_what_it_prints(two, tmp_path, capsys):
    out, html = tmp_path / "out.json", tmp_path / "page.html"
    assert main(["eval", "compare", *map(str, two), "--json", str(out), "--html", str(html)]) == 0
    printed, said = capsys.readouterr().out, json.loads(out.read_text())
    assert [model["model"] for model in said["models"]] == ["runs/<b>teacher</b>", "runs/student"]
    assert said["lacking"] == {"vsr": [str(two[1])]}
    assert f"vsr is left out: {two[1]} has no answers" in printed
    assert "student, sugarcrepe: of 120 replies 1 say nothing that counts, and are wrong, 1 were cut" in printed
    for task, of in said["tasks"].items():
        for folder, place in zip(two, (0, 1), strict=True):
            scored = tmp_path / "scored.json"
            main(["eval", "score", task, str(folder / f"{task}.jsonl"), "--json", str(scored)])
            capsys.readouterr()
            percent = {name: each["models"][place]["percent"] for name, each in of["metrics"].items()}
            assert percent == json.loads(scored.read_text())["metrics"]
        for name, each in of["metrics"].items():
            difference = each["differences"][0]
            first, second = each["models"]
            assert difference["percent"] == pytest.approx(second["percent"] - first["percent"])
            assert f"{name} " in printed
            assert f"{first['percent']:.1f} ± " in printed
            assert f"{difference['percent']:+.1f} ± " in printed


def test_the_page_stands_alone_and_shows_what_the_models_part_on(two):
    result = compare(two)
    html = page(result)
    assert not re.findall(r"<(?:script|link|iframe)|@import|url\(", html)
    references = re.findall(r'(?:src|href)="([^"]*)"', html)
    assert references
    assert all(of.startswith("data:image/jpeg;base64,") for of in references)
    pictures = [Image.open(BytesIO(base64.b64decode(of.partition(",")[2]))) for of in set(references)]
    assert {picture.size for picture in pictures} == {(256, 171)}  # of 900 x 600
    assert "&lt;script&gt;alert(1)&lt;/script&gt; neither (says nothing that counts) (cut)" in html
    assert "no image 0.jpg" in html  # which both would be wrong to leave out
    apart = {task: sum(case.parts for case in cases(task, result.results)) for task in ("sugarcrepe", "winoground")}
    assert apart["sugarcrepe"] > EXAMPLES
    shown = examples(cases("sugarcrepe", result.results), EXAMPLES)
    assert [case.right for case in shown[:4]].count((1.0, 0.0)) == 2  # either kind in turn
    assert all(case.parts and escape(case.name) in html for case in shown)
    assert f"part on {apart['sugarcrepe']} of 120 questions" in html
    assert f"{apart['sugarcrepe'] - EXAMPLES} more are not shown" in html
    assert f"part on {apart['winoground']} of 30 entries" in html
    assert html.count('class="case"') == EXAMPLES
    assert html.count('class="case wide"') == min(EXAMPLES, apart["winoground"])
    for each in result.tasks:
        for of in each.metrics:
            assert f"{of[each.headline].percent:.1f} <small>± " in html
            low, high = of[each.headline].interval
            assert low < of[each.headline].percent < high


@pytest.mark.parametrize(
    ("task", "questions"), [("sugarcrepe", choices(20)), ("vsr", statements(20)), ("winoground", crossed(20))]
)
def test_a_case_is_right_as_often_as_the_headline_says(tmp_path, task, questions):
    folders = [write(tmp_path / name, name, {task: answer(questions, name, 0.7)}) for name in "ab"]
    result = compare(folders)
    for place, of in enumerate(result.tasks[0].metrics):
        right = [case.right[place] for case in cases(task, result.results)]
        assert 100 * np.mean(right) == pytest.approx(of[result.tasks[0].headline].percent)


def broken(tmp_path, how):
    """Two folders of which the second does not fit."""
    questions = statements(20)
    good = write(tmp_path / "a", "one", {"vsr": answer(questions, 1, 0.8)})
    bad, answers = tmp_path / "b", answer(questions, 2, 0.8)
    if how == "missing":
        return good, bad
    if how == "empty":
        bad.mkdir()
    elif how == "same":
        return good, tmp_path / "." / "a"
    elif how == "fewer":
        write(bad, "two", {"vsr": answers[:15]})
    elif how == "changed":
        facts = {**questions[3].facts, "label": OTHER[questions[3].facts["label"]]}
        answers[3] = replace(answers[3], question=replace(questions[3], facts=facts))
        write(bad, "two", {"vsr": answers})
    elif how == "other task":
        write(bad, "two", {"rbench": answer(presence(4), 1, 0.8)})
    elif how == "unfinished":
        write(bad, "two", {"vsr": answers}, answers=30)
    elif how == "stopped":
        write(bad, "two", {"vsr": answers})
        (bad / "vsr.json").unlink()
    elif how == "two models":
        write(bad, "two", {"vsr": answers, "rbench": answer(presence(4), 1, 0.8)})
        (bad / "rbench.json").write_text(json.dumps({"model": "three", "answers": 4}))
    elif how == "torn":
        write(bad, "two", {"vsr": answers})
        (bad / "vsr.json").write_text('{"model": ')
    return good, bad


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("missing", "there is no such folder"),
        ("empty", "is no result folder"),
        ("same", "is given twice"),
        ("fewer", r"vsr: .*a and .*b answer different questions \(5 only in .*a\); run both"),
        ("changed", r"vsr: .*\(1 that differ under one id, as '3'\)"),
        ("other task", "no task in common: .*a has vsr; .*b has rbench"),
        ("unfinished", r"vsr is unfinished \(20 of 30 answers\)"),
        ("stopped", r"vsr is unfinished \(vsr.json is missing\)"),
        ("two models", "answers of several models, three and two"),
        ("torn", "vsr.json: is not JSON"),
    ],
)
def test_folders_that_do_not_fit_are_refused_in_one_line(tmp_path, capsys, how, words):
    good, bad = broken(tmp_path, how)
    out, html = tmp_path / "out.json", tmp_path / "page.html"
    assert main(["eval", "compare", str(good), str(bad), "--json", str(out), "--html", str(html)]) == 2
    said = capsys.readouterr()
    assert re.search(words, said.err)
    assert len(said.err.strip().splitlines()) == 1
    assert not said.out
    assert not out.exists()
    assert not html.exists()


def test_one_folder_is_nothing_to_compare(two):
    with pytest.raises(ValueError, match="two or more result folders"):
        compare(two[:1])
