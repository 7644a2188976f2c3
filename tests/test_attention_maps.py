"""Maps against eager attention in float64, and the small parts of `cdistill analyze` against plain definitions."""

import itertools
import json

import numpy as np
import pytest
import torch
from attention_cases import family_pair, float64_attention, questions, visual_places
from PIL import Image

from cdistill.attention.confidence import bins, rank_correlation
from cdistill.attention.data import right_text
from cdistill.attention.maps import Case, draw, maps, places_of
from cdistill.attention.models import by_depth, matches_of
from cdistill.builtin.dataset import build_tokenizer
from cdistill.eval.contract import Question
from cdistill.eval.statistics import bootstrapped_means
from cdistill.vat.layout import TILES, WHOLE, Piece


@pytest.mark.parametrize(("family", "words"), [("llava_next", None), ("internvl", "w3 w4"), ("qwen2_5_vl", None)])
def test_a_map_holds_the_mean_attention_of_its_rows_and_layers(family, words, tmp_path):
    models = family_pair(family)
    ((asked, images), *_) = questions(family)
    question = Question("q", "w9 w3 w4 w8", asked[0].images, "log_likelihood", "w5 w6")
    found = maps(models, [Case(question, images)], spans=["0-1", "later"], words=words, folder=tmp_path)
    (case,) = found["cases"]
    (reading,) = models.read([question], images)
    visual = visual_places(family, reading)
    names = {name: i for i, name in enumerate(reading.tokens)}
    rows = [place - 1 for place in reading.answers]
    if words:
        ids = models.teacher.prompts.tokenizer.convert_tokens_to_ids(words.split())
        rows = [names[token] for token in ids]
    for inference, name in ((models.teacher, "teacher"), (models.students[0], "student")):
        matrices, _ = float64_attention(inference, reading)
        for span, layers in (("0-1", [0, 1]), ("later", [len(matrices) - 1])):
            expected = torch.stack([matrices[i][:, rows][:, :, visual].mean((0, 1)) for i in layers]).mean(0)
            (entry,) = (e for e in case["maps"] if (e["model"], e["span"]) == (name, span))
            np.testing.assert_allclose(entry["weights"], expected, rtol=2e-4, atol=2e-6)
            assert entry["layers"] == layers and entry["share"] == pytest.approx(float(expected.sum()), rel=1e-4)
            for picture in entry["pictures"]:
                assert Image.open(tmp_path / picture["file"]).size[0] > 0
    levels = {picture["level"] for entry in case["maps"] for picture in entry["pictures"]}
    assert levels == ({WHOLE} if family.startswith("qwen") else {WHOLE, TILES})


def test_a_model_that_says_its_own_answer_is_shown_with_it(tmp_path):
    models = family_pair("llava_qwen2")
    ((asked, images), *_) = questions("llava_qwen2", "generate")
    found = maps(models, [Case(asked[0], images)], spans=["all"], words=None, folder=tmp_path)
    replies = [each.generate(models.read(asked[:1], images))[0].text for each in (models.teacher, models.students[0])]
    assert found["cases"][0]["answers"] == replies


def test_the_brightest_part_of_a_picture_is_where_most_attention_is_by_area():
    image = Image.new("RGB", (60, 30), "black")
    tiles = [
        Piece(0, TILES, (0, 0, 0.5, 1), np.arange(4).reshape(2, 2)),
        Piece(0, TILES, (0.5, 0, 1, 1), np.array([[4]])),
    ]
    whole = Piece(0, WHOLE, (-0.5, 0, 1.5, 1), np.array([[5, 6, 7, -1]]))
    weights = np.array([0.1, 0.2, 0.0, 0.0, 0.4, 0.3, 0.1, 0.0])
    (_, _, first), (_, _, second) = draw([image], [*tiles, whole], weights)
    cells = np.asarray(first.resize((4, 2), Image.Resampling.BOX)).sum(-1)
    assert cells[0, 1] == cells.max() and cells[0, 0] == pytest.approx(cells[0, 1] / 2, rel=0.05)
    # 0.4 on four times the area is as much as 0.1
    assert cells[0, 2] == cells[1, 3] == pytest.approx(cells[0, 0], rel=0.05) and cells[1, 0] == 0
    seen = np.asarray(second.resize((2, 1), Image.Resampling.BOX)).sum(-1)  # what lies beyond the picture is cut
    assert seen[0, 0] > 0 and seen[0, 1] == 0


def test_words_are_found_whole_whatever_their_case():
    tokenizer = build_tokenizer()
    tokens = tokenizer("red square left of red ring", add_special_tokens=False)["input_ids"]
    assert places_of("Red", tokens, tokenizer) == [0, 4]
    assert places_of("left of", tokens, tokenizer) == [2, 3]
    assert places_of("re", tokens, tokenizer) == [] and places_of(" ", tokens, tokenizer) == []


def test_layers_meet_by_depth_and_named_ranges_by_windows():
    assert [m.teachers for m in by_depth(range(4), range(8))] == [(1,), (3,), (5,), (7,)]
    assert [m.teachers for m in by_depth([0, 2, 5], [1, 3])] == [(1,), (3,), (3,)]
    assert [m.teachers[0] for m in by_depth(range(24), range(24))] == list(range(24))
    models = family_pair("llava_qwen2")
    student, teacher = models.students[0].model, models.teacher.model
    assert matches_of("all", student, teacher) == (by_depth(range(2), range(3)), False)
    matches, grouped = matches_of("intermediate", student, teacher)
    assert grouped and [(m.student, m.teachers) for m in matches] == [(0, (1,))]
    matches, grouped = matches_of("0-2", teacher, student)  # a teacher of fewer layers
    assert not grouped and [m.teachers for m in matches] == [(0,), (1,), (1,)]


def test_means_and_their_intervals_are_over_units():
    random = np.random.default_rng(0)
    units = [f"u{i // 3}" for i in range(60)]
    values = np.repeat(random.normal(size=20), 3)[:, None] + np.array([0.0, 5.0])
    mean, low, high = bootstrapped_means(values, units)
    np.testing.assert_allclose(mean, values.mean(0))
    spread_of_means = np.std([values[::3, 0][random.integers(20, size=20)].mean() for _ in range(4000)])
    np.testing.assert_allclose((high - low) / 3.92, spread_of_means, rtol=0.1)
    alone = bootstrapped_means(values, [str(i) for i in range(60)])
    assert (alone[2] - alone[1] < 0.7 * (high - low)).all()


def test_rank_correlation_is_that_of_ranks():
    x, y = np.array([1.0, 2, 2, 4, 5]), np.array([3.0, 1, 2, 9, 8])
    ranks = [[sum(b < a for b in of) + (1 + sum(b == a for b in of)) / 2 for a in of] for of in (x, y)]
    value, low, high = rank_correlation(x, y, list("abcde"))
    assert value == pytest.approx(np.corrcoef(*ranks)[0, 1]) and low <= value <= high
    assert np.isnan(rank_correlation(x, np.ones(5), list("abcde"))[0])


def test_bins_part_tokens_by_similarity_and_count_each_once():
    similarity = np.array([0.1, 0.2, 0.3, 0.4, 0.5, 0.5, 0.5, 0.5])
    probability = np.arange(8.0)
    found = bins(similarity, probability, [f"u{i // 2}" for i in range(8)], 4)
    assert sum(each["tokens"] for each in found) == 8
    assert [each["tokens"] for each in found] == [2, 2, 4] and [each["units"] for each in found] == [1, 1, 2]
    assert [each["mean"] for each in found] == [0.5, 2.5, 5.5]
    assert all(a["to"] < b["from"] for a, b in itertools.pairwise(found))
    assert len(bins(np.ones(3), probability[:3], ["a", "b", "c"])) == 1
    json.dumps(found)


def test_the_right_answer_is_the_benchmark_s():
    def question(kind="generate", continuation="", **facts):
        return Question("q", "p", ("i",), kind, continuation, facts=facts)

    assert right_text(question(label="B")) == "B"
    assert right_text(question(answers=["two", "2", "two"])) == "two"
    assert right_text(question("log_likelihood", "a dog", caption=0)) == "a dog"
    assert right_text(question("log_likelihood", "a cat", caption=1)) is None
    assert right_text(question("probability", "Yes", caption=1, image=1)) == "Yes"
    assert right_text(question("probability", "yes", caption=1, image=0)) == "no"
    assert right_text(question()) is None
