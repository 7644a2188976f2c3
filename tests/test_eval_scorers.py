"""``cdistill eval score`` on published answers: their published figures to the last digit, and files that are not right."""

import json
import math
import subprocess
import sys

import numpy as np
import pytest
from eval_files import (
    BIVLC,
    COMPARISONS,
    GPT4V,
    SUGARCREPE_VIT,
    bivlc_rows,
    gpt4v_records,
    sugarcrepe_rows,
    write_csv,
    write_gpt4v,
    write_winoground,
)

from cdistill.cli import main
from cdistill.eval.contract import Answer, Question, write_answers
from cdistill.eval.statistics import Tally


def score(tmp_path, task, *files):
    out = tmp_path / "out.json"
    assert main(["eval", "score", task, *map(str, files), "--json", str(out)]) == 0
    return json.loads(out.read_text())


def refusal(capsys, tmp_path, task, *files):
    """The one line of a refusal, which writes nothing."""
    capsys.readouterr()
    assert main(["eval", "score", task, *map(str, files), "--json", str(tmp_path / "none.json")]) == 2
    printed = capsys.readouterr()
    assert printed.err.count("\n") == 1 and printed.out == "" and not list(tmp_path.glob("*none.json*"))
    return printed.err


@pytest.fixture(scope="module")
def gpt4v(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpt4v")
    return {
        (order, subtype): write_gpt4v(folder, order, subtype, **({"accuracy": 0.8577} if subtype == "swap_obj" else {}))
        for order in ("positive", "negative")
        for subtype in GPT4V
    }


def test_gpt4v_on_sugarcrepe_as_published(tmp_path, gpt4v):
    result = score(tmp_path, "sugarcrepe", *gpt4v.values())
    for subtype, (positive, negative, n) in GPT4V.items():
        assert result["counts"][f"{subtype}/positive_first"] == {"right": positive, "n": n}
        assert result["counts"][f"{subtype}/negative_first"] == {"right": negative, "n": n}
        assert result["metrics"][subtype] == pytest.approx(100 * (positive + negative) / (2 * n), abs=1e-9)
    mean = sum((p + q) / (2 * n) for p, q, n in GPT4V.values()) / 7
    assert result["metrics"]["mean"] == pytest.approx(100 * mean, abs=1e-9)
    assert result["unparsed"] == 279 and any("279" in line for line in result["remarks"])
    assert result["remarks"][0] == "sugarcrepe: other counts than in the published version: swap_obj 246 (not 245)"


def test_one_order_alone_is_the_sub_type_and_is_said(tmp_path, gpt4v):
    result = score(tmp_path, "sugarcrepe", gpt4v["positive", "replace_obj"])
    assert result["counts"]["replace_obj"] == {"right": 1578, "n": 1652}
    assert result["metrics"]["mean"] == result["metrics"]["replace_obj"] == pytest.approx(100 * 1578 / 1652)
    assert any("replace_obj: negative_first is missing" in line for line in result["remarks"])
    assert any("add_att 0 (not 692)" in line for line in result["remarks"])


def test_clip_on_sugarcrepe_as_published(tmp_path):
    result = score(tmp_path, "sugarcrepe", write_csv(tmp_path / "a.csv", sugarcrepe_rows("ViT-B-32")))
    assert {name: round(value, 2) for name, value in result["metrics"].items()} == SUGARCREPE_VIT
    assert result["counts"]["swap_obj"] == {"right": 151, "n": 246}


@pytest.mark.parametrize("model", BIVLC)
def test_clip_on_bivlc_as_published(tmp_path, model):
    result = score(tmp_path, "bivlc", write_csv(tmp_path / "a.csv", bivlc_rows(model)))
    names = (*COMPARISONS, "i2t", "t2i", "group")
    assert tuple(round(result["metrics"][name], 2) for name in names) == BIVLC[model]
    assert result["counts"]["group"]["n"] == 2933 and result["remarks"] == []
    kinds = [name for name in result["counts"] if name.endswith("/group")]
    assert sum(result["counts"][name]["right"] for name in kinds) == result["counts"]["group"]["right"]


def test_winoground_by_its_formulas_with_ties_that_are_wrong(tmp_path):
    scores = np.random.default_rng(3).integers(0, 4, (400, 2, 2)).tolist()
    text = image = group = 0
    for (a, b), (c, d) in scores:  # caption 0 with image 0 and 1, caption 1 with image 0 and 1
        text += a > c and d > b
        image += a > b and d > c
        group += a > c and d > b and a > b and d > c
    result = score(tmp_path, "winoground", write_winoground(tmp_path / "s.jsonl", scores))
    for name, right in (("text", text), ("image", image), ("group", group)):
        assert result["counts"][name] == {"right": right, "n": 400} and result["metrics"][name] == right / 4
        share = right / 400
        assert result["standard_errors"][name] == pytest.approx(100 * math.sqrt(share * (1 - share) / 400))
        low, high = result["intervals"][name]
        assert low < result["metrics"][name] < high
        assert high - low == pytest.approx(2 * 1.96 * result["standard_errors"][name], rel=0.1)
    assert result["remarks"] == []


def test_scoring_imports_no_torch(tmp_path):
    path = write_winoground(tmp_path / "s.jsonl", [[[1, 0], [0, 1]]])
    code = (
        "import sys; from cdistill.cli import main; assert main(sys.argv[1:]) == 0;"
        "assert not {'torch', 'transformers', 'pyarrow', 'PIL'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, "eval", "score", "winoground", str(path)], check=True)


def changed(records, key, **fields):
    return records | {key: records[key] | fields}


SPOILED = {
    "a chosen text that is no caption": (
        lambda r: changed(r, "3", answer={"free_form_answer": "(1)", "multiple_choice_answer": "else"}),
        "line 32: multiple_choice_answer is neither caption",
    ),
    "a label against the answer": (lambda r: changed(r, "4", correct=not r["4"]["correct"]), "the opposite"),
    "no caption": (lambda r: changed(r, "5", caption=None), "line 52: the field caption is missing"),
    "no answer": (lambda r: changed(r, "5", answer=None), "the field answer is missing"),
    "a label that is no truth value": (lambda r: changed(r, "6", correct="maybe"), "correct must be true or false"),
    "a gap": (lambda r: {key: value for key, value in r.items() if key != "17"}, "'17' is not there"),
    "an id of another kind": (lambda r: {**r, "x": r["0"]}, "'x' is there"),
}


@pytest.mark.parametrize("spoiled", SPOILED)
def test_spoiled_replies_of_gpt4v_are_refused_in_one_line(tmp_path, capsys, spoiled):
    spoil, reason = SPOILED[spoiled]
    path = write_gpt4v(tmp_path, "negative", "swap_obj", spoil(gpt4v_records("negative", "swap_obj")))
    line = refusal(capsys, tmp_path, "sugarcrepe", path)
    assert reason in line and str(path) in line


def test_truth_values_may_be_texts(tmp_path):
    records = gpt4v_records("positive", "swap_obj")
    texts = {key: record | {"correct": str(record["correct"])} for key, record in records.items()}
    result = score(tmp_path, "sugarcrepe", write_gpt4v(tmp_path, "positive", "swap_obj", texts))
    assert result["counts"]["swap_obj"] == {"right": 211, "n": 246}


def test_files_that_do_not_belong_together_are_refused(tmp_path, capsys, gpt4v):
    records = gpt4v_records("negative", "swap_obj")
    first, second = gpt4v["positive", "swap_obj"], gpt4v["negative", "swap_obj"]
    short = write_gpt4v(tmp_path, "negative", "swap_obj", {k: v for k, v in records.items() if k != "245"})
    assert "swap_obj/245 has no negative_first answer" in refusal(capsys, tmp_path, "sugarcrepe", first, short)
    known = write_gpt4v(tmp_path, "negative", "swap_obj", {k: v for k, v in records.items() if k != "108"})
    assert "swap_obj/108 has no negative_first answer" in refusal(capsys, tmp_path, "sugarcrepe", first, known)
    assert score(tmp_path, "sugarcrepe", known)["counts"]["swap_obj"]["n"] == 245  # the published gap, by itself
    other = changed(records, "9", caption="another", answer={"multiple_choice_answer": "another"}, correct=True)
    other = write_gpt4v(tmp_path, "negative", "swap_obj", other)
    assert "other captions in each order" in refusal(capsys, tmp_path, "sugarcrepe", first, other)
    assert "is there twice" in refusal(capsys, tmp_path, "sugarcrepe", first, second, first)
    table = write_csv(tmp_path / "a.csv", sugarcrepe_rows("ViT-B-32"))
    assert "cannot be put together" in refusal(capsys, tmp_path, "sugarcrepe", first, table)
    assert "is SugarCrepe's csv" in refusal(capsys, tmp_path, "bivlc", table)
    swapped = write_gpt4v(tmp_path, "positive", "swap_obj", records)  # the other order under this name
    assert "the name says positive_first" in refusal(capsys, tmp_path, "sugarcrepe", swapped)


def test_an_id_that_a_json_object_has_twice_is_refused(tmp_path, capsys):
    path = write_gpt4v(tmp_path, "positive", "swap_obj")
    path.write_text(path.read_text().replace('"7": {', '"8": {'))
    assert "the id '8' is there twice" in refusal(capsys, tmp_path, "sugarcrepe", path)
    path = write_gpt4v(tmp_path, "positive", "swap_obj")
    path.write_text(path.read_text()[:-40])
    assert "is not JSON" in refusal(capsys, tmp_path, "sugarcrepe", path)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda lines: lines[:-1], "399_c1_i1 is missing"),
        (lambda lines: lines[1:], "0_c0_i0 is missing"),
        (lambda lines: [*lines, lines[5]], "1_c0_i1 is there twice"),
        (lambda lines: [*lines, '{"label": "1_c2_i1", "score": 1}'], "line 1601: label must be like"),
        (lambda lines: [*lines[:9], lines[9].replace("score", "value"), *lines[10:]], "line 10: the field score"),
        (lambda lines: [*lines[:9], '{"label": "2_c0_i1", "score": NaN}', *lines[10:]], "line 10: score must be a num"),
        (lambda lines: [*lines[:9], "{", *lines[10:]], "line 10: is not JSON"),
        (
            lambda lines: [*lines[:9], '{"label": "2_c0_i1", "score": 1, "score": 2}', *lines[10:]],
            "line 10: the key 'sc",
        ),
        (lambda lines: [], "0_c0_i0 is missing"),
    ],
)
def test_spoiled_scores_of_winoground_are_refused_in_one_line(tmp_path, capsys, spoil, reason):
    path = write_winoground(tmp_path / "s.jsonl", np.zeros((400, 2, 2)).tolist())
    path.write_text("\n".join(spoil(path.read_text().split("\n"))))
    assert reason in refusal(capsys, tmp_path, "winoground", path)


def test_spoiled_tables_are_refused_in_one_line(tmp_path, capsys):
    rows = bivlc_rows("CLIP_COCO")[:20]
    for change, reason in (
        ({"text_score": not rows[6]["text_score"]}, "line 8: text_score is not what"),
        ({"group_score": not rows[6]["group_score"]}, "line 8: group_score is not what"),
        ({"text_score_i0": "yes"}, "line 8: text_score_i0 must be true or false"),
        ({"subtype": "colour"}, "line 8: type and subtype must make one of"),
        (rows[5], "line 8: is " + str(tmp_path / "a.csv") + " line 7 again"),
    ):
        path = write_csv(tmp_path / "a.csv", [*rows[:6], rows[6] | change, *rows[7:]])
        assert reason in refusal(capsys, tmp_path, "bivlc", path)
    path.write_text(write_csv(path, rows).read_text() + '"1","2"\n')
    assert "line 22: has 2 fields, the header has 13" in refusal(capsys, tmp_path, "bivlc", path)
    assert "no benchmark 'cifar'; there are sugarcrepe" in refusal(capsys, tmp_path, "cifar", path)
    assert "no such file" in refusal(capsys, tmp_path, "bivlc", tmp_path / "b.csv")


def test_our_own_lines_hold_all_that_scoring_needs(tmp_path, capsys):
    asked = [
        Question(f"{i}/{order}", "which?", (f"{i}.jpg",), facts={"subtype": "add_obj", "order": order, "item": str(i)})
        for i in range(4)
        for order in ("positive_first", "negative_first")
    ]
    label = {"positive_first": "A", "negative_first": "B"}
    asked = [
        Question(q.id, q.prompt, q.images, facts={**q.facts, "unit": q.images[0], "label": label[q.facts["order"]]})
        for q in asked
    ]
    replies = ("A", "(b) naïve", "a cat", "it is b.", "neither", "", "BA", "B")
    answers = [Answer(q, reply, tokens=2, cut=not reply) for q, reply in zip(asked, replies, strict=True)]
    path = tmp_path / "sugarcrepe.jsonl"
    write_answers(path, "sugarcrepe", answers)
    lines = path.read_text().splitlines()
    assert [Answer.from_json(json.loads(line), "") for line in lines] == answers
    result = score(tmp_path, "sugarcrepe", path)
    assert result["counts"]["add_obj/positive_first"] == {"right": 2, "n": 4}
    assert result["counts"]["add_obj/negative_first"] == {"right": 3, "n": 4}
    assert (result["unparsed"], result["cut"], result["answers"]) == (3, 1, 8)
    for spoil, reason in (
        ([*lines, lines[0]], "line 9: '0/positive_first' is there twice"),
        ([lines[0].replace('"sugarcrepe"', '"pope"')], "line 1: is of 'pope', not of sugarcrepe"),
        ([lines[0].replace('"cut"', '"cat"')], "line 1: the field cut is missing"),
        ([lines[0].replace('"tokens": 2', '"tokens": "2"')], "line 1: tokens has a value of the wrong kind"),
        ([lines[0].replace('"label"', '"table"')], "line 1: the fact label must be one of 'A', 'B', got None"),
        ([lines[0].replace('"label": "A"', '"label": "C"')], "line 1: the fact label must be one of 'A', 'B', got 'C'"),
        ([lines[0].replace('"unit": "0.jpg"', '"unit": [0]')], "line 1: the fact unit has a value of the wrong kind"),
        ([lines[0].replace('"generate"', '"probability"')], "line 1: score is not a number"),
    ):
        path.write_text("\n".join(spoil))
        assert reason in refusal(capsys, tmp_path, "sugarcrepe", path)


def test_standard_errors_and_intervals_take_dependent_questions_as_one_unit():
    """Against ten thousand draws of whole units by hand: a share, a mean of shares, a quotient of sums."""
    rng = np.random.default_rng(1)
    chance = rng.random(60)
    counted = [[rng.random(rng.integers(1, 6)) < p for p in chance] for _ in range(2)]
    tally = Tally()
    for name, units in zip("ab", counted, strict=True):
        for i, unit in enumerate(units):
            for right in unit:
                tally.count(f"image {i}", name, right)
    tally.share("a")
    tally.share("b")
    tally.mean("mean", ["a", "b"])
    tally.metric("product", lambda totals: totals.share("a") * totals.share("b"), ["a", "b"])
    found = tally.measure()
    draws = rng.integers(0, 60, (10_000, 60))
    shares = [
        np.array([unit.sum() for unit in units])[draws].sum(1) / np.array([len(unit) for unit in units])[draws].sum(1)
        for units in counted
    ]
    expected = {"a": shares[0], "b": shares[1], "mean": sum(shares) / 2, "product": shares[0] * shares[1]}
    for name, values in expected.items():
        assert found[name].standard_error == pytest.approx(100 * values.std(), rel=0.06)
        assert found[name].interval == pytest.approx(100 * np.quantile(values, (0.025, 0.975)), abs=0.8)
    single = math.sqrt(found["a"].percent * (100 - found["a"].percent) / found["a"].n)
    assert found["a"].standard_error > 1.2 * single  # as if the questions were independent
    assert (found["a"].units, found["a"].n) == (60, sum(map(len, counted[0])))
    assert tally.measure() == found
