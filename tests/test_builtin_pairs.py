"""Pairs of colour and shape that samples leave out: nowhere in them, and asked about so that words give nothing away."""

import math
import random
import re
from collections import Counter

import pytest
from test_builtin import TOKENIZER, blind_accuracy, read, see, solve, turns

from cdistill.builtin import questions, scenes
from cdistill.builtin.dataset import BuiltinDataset
from cdistill.builtin.task import SUBTYPES, BuiltinTask

PAIRS = [tuple(name.split()) for name in scenes.UNSEEN]


def drawn(subtype, n, pairs="unseen"):
    """Questions with their scenes, as `BuiltinDataset` draws them."""
    rng = random.Random(f"pairs {subtype}")
    while n:
        scene = scenes.sample_scene(rng, seen=pairs == "seen")
        fits = pairs == "seen" or any(t.name in scenes.UNSEEN for t in scene)
        if fits and (question := questions.ask_any(scene, (subtype,), rng, pairs)) is not None:
            n -= 1
            yield scene, question


def test_every_colour_and_shape_is_in_one_of_the_pairs():
    assert sorted(c for c, _ in PAIRS) == sorted(scenes.COLOURS) and sorted(s for _, s in PAIRS) == sorted(
        scenes.SHAPES
    )


@pytest.mark.parametrize("text", [0.0, 0.4])
def test_what_is_left_out_is_nowhere(text):
    task = BuiltinTask(pairs="seen", caption=0.5, turns=4, text=text)
    data = BuiltinDataset(task, size=150, seed=5, tokenizer=TOKENIZER)
    plain = BuiltinDataset(BuiltinTask(caption=0.5, turns=4), size=150, seed=5, tokenizer=TOKENIZER)
    for i in range(len(data)):
        item = data[i]
        assert not any(name in TOKENIZER.decode(item["input_ids"]) for name in scenes.UNSEEN)
        if "pixel_values" in item:
            objects = see(item["pixel_values"].numpy())
            assert not any(o[2:] in PAIRS for o in objects)
        else:
            objects = read(
                re.search(
                    rf"USER: (.*?) (?:{'|'.join(('what', 'is', 'how', 'where', 'which', 'describe'))}) ",
                    TOKENIZER.decode(item["input_ids"]),
                )[1]
            )
        for prompt, answer in turns(item):
            question = re.search(r"(what|is|how|where|which) .*", prompt)
            if question and "describe" not in prompt:
                assert solve(question[0], objects) == answer
    assert any(name in TOKENIZER.decode(plain[i]["input_ids"]) for i in range(20) for name in scenes.UNSEEN)


@pytest.mark.parametrize("subtype", SUBTYPES)
def test_questions_are_about_the_pairs_and_right(subtype):
    count = Counter()
    for scene, question in drawn(subtype, 300):
        objects = [(t.row + 1, t.column + 1, t.colour, t.shape) for t in scene]
        assert solve(question.text, objects) == question.answer
        names = any(name in question.text for name in scenes.UNSEEN)
        assert names or subtype in ("colour", "count")
        if subtype == "colour":
            (asked,) = [o for o in objects if o[3] in question.text.split()]
            assert asked[2:] in PAIRS
        count[question.answer] += 1
    if set(count) <= {"yes", "no", "A", "B"}:
        assert all(abs(seen / 300 - 0.5) < 5 * math.sqrt(0.25 / 300) for seen in count.values())


@pytest.mark.parametrize("subtype", questions.COMPOSITIONAL)
def test_words_do_not_give_the_answer_away(subtype):
    pairs = []
    for _, question in drawn(subtype, 4500):
        first, second = re.fullmatch(r"which caption fits \? A (.+) B (.+)", question.text).groups()
        pairs.append((first, second) if question.answer == "A" else (second, first))
    assert blind_accuracy(pairs, train=3000) < 0.57


def test_other_pairs_are_refused():
    with pytest.raises(ValueError, match="pairs must be one of all, seen, unseen, got 'some'"):
        BuiltinTask(pairs="some")
