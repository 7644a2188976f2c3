"""The built-in task in plain English: a table written by hand, and samples beside the task's own words."""

import json

import pytest

from cdistill.builtin import english
from cdistill.builtin.writer import write


@pytest.mark.parametrize(
    ("said", "plain"),
    [
        ("describe the scene", "Describe the image."),
        ("what colour is the ring ?", "What colour is the ring?"),
        ("is there a red cross ?", "Is there a red cross?"),
        ("how many white ?", "How many shapes are white?"),
        ("how many cross ?", "How many crosses are there?"),
        ("how many ring ?", "How many rings are there?"),
        ("where is the blue square ?", "Where is the blue square?"),
        ("is the red ring left or right of the blue cross ?", "Is the red ring left or right of the blue cross?"),
        ("is the red ring above or below the blue cross ?", "Is the red ring above or below the blue cross?"),
        (
            "which caption fits ? A ring and red cross B cross and red ring",
            "Which caption fits the image?\n(A) a ring and a red cross\n(B) a cross and a red ring",
        ),
    ],
)
def test_questions_in_plain_english(said, plain):
    assert english.question(said) == plain


@pytest.mark.parametrize(
    ("said", "plain"),
    [
        ("yes", "Yes"),
        ("B", "B"),
        ("above", "Above"),
        ("r2 c6", "Row 2, column 6"),
        (
            "r1 c2 red ring ; r3 c1 blue cross . blue cross r3 c1 . red ring above blue cross . red ring right of blue cross",
            "Row 1, column 2: a red ring. Row 3, column 1: a blue cross. A blue cross in row 3, column 1. "
            "A red ring is above a blue cross. A red ring is right of a blue cross.",
        ),
    ],
)
def test_answers_in_plain_english(said, plain):
    assert english.answer(said) == plain


def test_samples_in_plain_english_say_of_their_pictures_what_the_task_says(tmp_path):
    """Every question has an English form, and no other text has one."""
    write("conversations", tmp_path / "said", n=30, seed=3, plain_english=True)
    write("conversations", tmp_path / "task", n=30, seed=3)
    said, task = (json.loads((tmp_path / name / "samples.json").read_text()) for name in ("said", "task"))
    for one, other in zip(said, task, strict=True):
        assert (tmp_path / "said" / one["image"]).read_bytes() == (tmp_path / "task" / other["image"]).read_bytes()
        turns = [(a["value"], b["value"]) for a, b in zip(one["conversations"], other["conversations"], strict=True)]
        assert turns[0][0].startswith("<image>\n") and turns[0][1].startswith("<image>\n")
        for (asked, old), (answer, was) in zip(turns[::2], turns[1::2], strict=True):
            assert asked.removeprefix("<image>\n") == english.question(old.removeprefix("<image>\n"))
            assert answer == english.answer(was)
    with pytest.raises(ValueError, match=r"no question of the built-in task: 'who is it \?'"):
        english.question("who is it ?")
