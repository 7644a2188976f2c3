"""The built-in task: its questions are true of its pixels, its splits are apart, and text alone answers nothing."""

import hashlib
import itertools
import math
import os
import random
import re
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import torch

from cdistill.builtin import questions, scenes
from cdistill.builtin.dataset import ASSISTANT, EOS, NUM_VISUAL_TOKENS, USER, BuiltinDataset, Collator, build_tokenizer
from cdistill.builtin.render import patch_labels, render
from cdistill.builtin.task import SUBTYPES, BuiltinTask
from cdistill.data.samples import IGNORE_INDEX, IMAGE_TOKEN

TOKENIZER = build_tokenizer()
NUMBERS = ["zero", "one", "two", "three", "four", "five"]


def patches(image: np.ndarray) -> np.ndarray:
    """(3, 48, 48) pixels as (36, 192) patches in raster order."""
    n, p = scenes.GRID, scenes.PATCH
    return image.reshape(3, n, p, n, p).transpose(1, 3, 0, 2, 4).reshape(n * n, -1)


def templates() -> tuple[list[tuple[str, str] | None], np.ndarray]:
    """The 37 kinds of patches, None for background, and their pixels (37, 192) with the noise averaged away."""
    rng = np.random.default_rng(1)
    kinds: list[tuple[str, str] | None] = [None, *itertools.product(scenes.COLOURS, scenes.SHAPES)]
    drawn = [[render((scenes.Thing(0, 0, *k),) if k else (), rng) for _ in range(32)] for k in kinds]
    return kinds, np.stack([patches(np.mean(images, axis=0))[0] for images in drawn])


KINDS, TEMPLATES = templates()


def see(image: np.ndarray) -> list[tuple[int, int, str, str]]:
    """Objects (row, column, colour, shape) of an image, counted from 1, by every patch's nearest template."""
    distance = ((patches(image)[:, None] - TEMPLATES[None]) ** 2).sum(-1)
    seen = [KINDS[i] for i in distance.argmin(1)]
    return [(i // scenes.GRID + 1, i % scenes.GRID + 1, *kind) for i, kind in enumerate(seen) if kind]


def read(description: str) -> list[tuple[int, int, str, str]]:
    """Objects of a scene written out as text."""
    found = re.findall(r"r(\d) c(\d) (\w+) (\w+)(?: ;|$)", description)
    return [(int(r), int(c), colour, shape) for r, c, colour, shape in found]


def holds(caption: str, objects: list[tuple[int, int, str, str]]) -> bool:
    """Whether two different objects make the caption true."""
    first, link, second = re.fullmatch(r"(.+) (and|left of|right of|above|below) (.+)", caption).groups()
    related = {
        "and": lambda a, b: True,
        "left of": lambda a, b: a[1] < b[1],
        "right of": lambda a, b: a[1] > b[1],
        "above": lambda a, b: a[0] < b[0],
        "below": lambda a, b: a[0] > b[0],
    }[link]
    named = [[o for o in objects if set(noun.split()) <= set(o[2:])] for noun in (first, second)]
    return any(a != b and related(a, b) for a, b in itertools.product(*named))


def solve(question: str, objects: list[tuple[int, int, str, str]]) -> str:
    """The one right answer, worked out from the words of the question and the objects alone."""
    if found := re.fullmatch(r"what colour is the (\w+) \?", question):
        (colour,) = [o[2] for o in objects if o[3] == found[1]]
        return colour
    if found := re.fullmatch(r"is there a (\w+) (\w+) \?", question):
        return "yes" if any(o[2:] == found.groups() for o in objects) else "no"
    if found := re.fullmatch(r"how many (\w+) \?", question):
        return NUMBERS[sum(found[1] in o[2:] for o in objects)]
    if found := re.fullmatch(r"where is the (\w+) (\w+) \?", question):
        ((row, column, *_),) = [o for o in objects if o[2:] == found.groups()]
        return f"r{row} c{column}"
    if found := re.fullmatch(r"is the (\w+ \w+) (left|above) or (right|below)( of)? the (\w+ \w+) \?", question):
        first, one, other, of, second = found.groups()
        (right,) = [word for word in (one, other) if holds(f"{first} {word}{of or ''} {second}", objects)]
        return right
    found = re.fullmatch(r"which caption fits \? A (.+) B (.+)", question)
    (right,) = [letter for letter, text in zip("AB", found.groups(), strict=True) if holds(text, objects)]
    return right


def ask(subtype: str, rng: random.Random) -> tuple[scenes.Scene, questions.Question]:
    while True:
        scene = scenes.sample_scene(rng)
        if (question := questions.ask(scene, subtype, rng)) is not None:
            return scene, question


def turns(item: dict[str, torch.Tensor]) -> list[tuple[str, str]]:
    """(prompt, reply) of every turn of an item, read off its tokens."""
    text = TOKENIZER.decode(item["input_ids"])
    parts = re.findall(rf"{USER} (.*?) {ASSISTANT} (.*?) {EOS}", text)
    rebuilt = " ".join(f"{USER} {prompt} {ASSISTANT} {reply} {EOS}" for prompt, reply in parts)
    assert rebuilt == text, "the conversation is not made of whole turns"
    return parts


@pytest.mark.parametrize("subtype", SUBTYPES)
def test_every_answer_is_right(subtype):
    rng = random.Random(f"right {subtype}")
    for _ in range(400):
        scene, question = ask(subtype, rng)
        objects = [(t.row + 1, t.column + 1, t.colour, t.shape) for t in scene]
        assert solve(question.text, objects) == question.answer
        assert question.answer in question.choices
        assert question.subtype == subtype
        if subtype in questions.COMPOSITIONAL:
            first, second = re.fullmatch(r"which caption fits \? A (.+) B (.+)", question.text).groups()
            assert len(first.split()) == len(second.split())
            assert holds(first, objects) != holds(second, objects)


def test_images_and_conversations_of_the_dataset_agree():
    data = BuiltinDataset(BuiltinTask(turns=6), size=150, seed=3, tokenizer=TOKENIZER)
    for item in (data[i] for i in range(len(data))):
        objects = see(item["pixel_values"].numpy())
        assert scenes.MIN_OBJECTS <= len(objects) <= scenes.MAX_OBJECTS
        asked = turns(item)
        assert len(asked) == 6
        image, question = asked[0][0].rsplit(f"{IMAGE_TOKEN} ", 1)
        assert image.split() == [IMAGE_TOKEN] * (NUM_VISUAL_TOKENS - 1)
        for prompt, reply in [(question, asked[0][1]), *asked[1:]]:
            assert solve(prompt, objects) == reply


def test_text_scenes_and_conversations_agree():
    data = BuiltinDataset(BuiltinTask(modality="text", turns=4), size=150, seed=4, tokenizer=TOKENIZER)
    starts = r"(.*?) (what|is|how|where|which) (.*)"
    for item in (data[i] for i in range(len(data))):
        assert "pixel_values" not in item
        asked = turns(item)
        description, start, question = re.fullmatch(starts, asked[0][0]).groups()
        objects = read(description)
        assert objects == sorted(objects), "objects are written in raster order"
        for prompt, reply in [(f"{start} {question}", asked[0][1]), *asked[1:]]:
            assert solve(prompt, objects) == reply


def test_captions_state_the_truth():
    data = BuiltinDataset(BuiltinTask(caption=1.0, turns=0, sentences=5), size=150, seed=5, tokenizer=TOKENIZER)
    forms = Counter()
    for item in (data[i] for i in range(len(data))):
        ((_, reply),) = turns(item)
        description, *sentences = reply.split(" . ")
        objects = see(item["pixel_values"].numpy())
        assert read(description) == objects
        assert len(sentences) == 5
        for sentence in sentences:
            if place := re.fullmatch(r"r(\d) c(\d) (\w+) (\w+)", sentence):
                assert (int(place[1]), int(place[2]), place[3], place[4]) in objects
            elif name := re.fullmatch(r"(\w+) (\w+) r(\d) c(\d)", sentence):
                assert (int(name[3]), int(name[4]), name[1], name[2]) in objects
            else:
                assert holds(sentence, objects)
            forms["place" if place else "name" if not place and name else "relation"] += 1
    assert min(forms.values()) > 200


def test_a_share_of_conversations_opens_with_a_caption():
    data = BuiltinDataset(BuiltinTask(caption=0.4, turns=2), size=300, seed=15, tokenizer=TOKENIZER)
    lengths = Counter(len(turns(data[i])) for i in range(len(data)))
    assert set(lengths) == {2, 3}
    assert 80 < lengths[3] < 160


def fits(words: list[str], row: int, column: int, colour: str, shape: str) -> bool:
    """Whether the phrase at the end of the words (its longest run of properties, none twice) is true of an object."""
    properties = {"colour": colour, "shape": shape, "r": f"r{row}", "c": f"c{column}"}
    names = {**dict.fromkeys(scenes.COLOURS, "colour"), **dict.fromkeys(scenes.SHAPES, "shape")}
    phrase: dict[str, str] = {}
    for word in reversed(words):
        kind = names.get(word) or (word[0] if re.fullmatch(r"[rc]\d", word) else None)
        if kind is None or kind in phrase:
            break
        phrase[kind] = word
    return bool(phrase) and all(properties[kind] == word for kind, word in phrase.items())


def test_grounding_points_at_what_the_words_speak_of():
    data = BuiltinDataset(BuiltinTask(caption=0.5, turns=4), size=60, seed=16, tokenizer=TOKENIZER, grounding=True)
    pointed = 0
    for item in (data[i] for i in range(len(data))):
        objects = see(item["pixel_values"].numpy())
        words = TOKENIZER.convert_ids_to_tokens(item["input_ids"].tolist())
        assert item["grounding"].shape == (len(words), NUM_VISUAL_TOKENS)
        for end, target in enumerate(item["grounding"], 1):
            cells = {(r - 1) * scenes.GRID + c - 1 for r, c, *kind in objects if fits(words[:end], r, c, *kind)}
            assert set(target.nonzero().flatten().tolist()) == cells
            assert target.sum().item() == pytest.approx(1.0 if cells else 0.0)
            pointed += bool(cells)
        assert [words[i] for i in item["places"].tolist()] == [IMAGE_TOKEN] * NUM_VISUAL_TOKENS
    assert pointed > 1000


def test_grounding_of_text_points_at_the_objects_as_they_are_written_out():
    task = BuiltinTask(modality="text", caption=0.5, turns=4)
    data = BuiltinDataset(task, size=60, seed=17, tokenizer=TOKENIZER, grounding=True)
    items = [data[i] for i in range(len(data))]
    for item in items:
        words = TOKENIZER.convert_ids_to_tokens(item["input_ids"].tolist())
        places = item["places"].tolist()
        written = [words[i - 3 : i + 1] for i in places]
        assert [words[0], *" ; ".join(map(" ".join, written)).split()] == words[: places[-1] + 1]
        assert words[places[-1] + 1] in ("what", "is", "how", "where", "which", "describe")
        for end, target in enumerate(item["grounding"], 1):
            meant = [fits(words[:end], int(r[1]), int(c[1]), *kind) for r, c, *kind in written]
            expected = [float(m) / max(1, sum(meant)) if end > places[-1] + 1 else 0.0 for m in meant]
            assert target.tolist() == pytest.approx(expected)
    batch = Collator(0)(items[:8])
    widest = max(len(item["places"]) for item in items[:8])
    assert batch["grounding"].shape == (*batch["input_ids"].shape, widest)
    for b, item in enumerate(items[:8]):
        tokens, count = item["grounding"].shape
        assert torch.equal(batch["grounding"][b, :tokens, :count], item["grounding"])
        assert not batch["grounding"][b, tokens:].any() and not batch["grounding"][b, :, count:].any()
        assert batch["places"][b].tolist() == item["places"].tolist() + [-1] * (widest - count)


def test_noise_hides_no_patch_class():
    rng = np.random.default_rng(6)
    assert len(KINDS) == 1 + len(scenes.COLOURS) * len(scenes.SHAPES) == 37
    for label, kind in enumerate(KINDS):
        scene = (scenes.Thing(2, 3, *kind),) if kind else ()
        expected = np.zeros(NUM_VISUAL_TOKENS)
        expected[2 * scenes.GRID + 3] = label
        kinds, rows, columns = patch_labels(scene).T
        assert (kinds == expected).all()
        assert (rows * scenes.GRID + columns == np.arange(NUM_VISUAL_TOKENS)).all()
        for _ in range(40):
            image = render(scene, rng)
            assert image.dtype == np.float32
            assert np.abs(image).max() <= 1.0
            assert see(image) == ([(3, 4, *kind)] if kind else [])


def test_splits_share_no_scene():
    rng = random.Random(7)
    train = {scenes.sample_scene(rng) for _ in range(4000)}
    held_out = {scenes.sample_scene(rng, held_out=True) for _ in range(1000)}
    assert not train & held_out
    assert len(train) > 3990
    assert len(held_out) > 990
    for scene in itertools.islice(train, 500):  # the split belongs to the scene, not to how it was drawn
        assert not scenes.is_held_out(tuple(scenes.Thing(t.row, t.column, t.colour, t.shape) for t in scene))
    data = BuiltinDataset(BuiltinTask(), size=60, seed=8, held_out=True)
    for item in (data[i] for i in range(len(data))):
        seen = see(item["pixel_values"].numpy())
        assert scenes.is_held_out(tuple(scenes.Thing(r - 1, c - 1, colour, shape) for r, c, colour, shape in seen))


def test_split_is_the_same_in_every_process():
    code = (
        "import random\nfrom cdistill.builtin import scenes\nrng = random.Random(9)\n"
        "print([scenes.sample_scene(rng, held_out=i % 2 == 0) for i in range(20)])"
    )
    root = os.path.dirname(os.path.dirname(scenes.__file__))
    results = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.path.dirname(root)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(results) == 1


def test_a_sample_depends_on_seed_and_index_only():
    def items(seed, order, *, held_out=False):
        data = BuiltinDataset(BuiltinTask(caption=0.3), size=12, seed=seed, tokenizer=TOKENIZER, held_out=held_out)
        return {i: data[i] for i in order}

    forward, backward = items(10, range(12)), items(10, reversed(range(12)))
    for i in range(12):
        assert forward[i].keys() == backward[i].keys()
        assert all(torch.equal(forward[i][key], backward[i][key]) for key in forward[i])
    for other in (items(11, range(12)), items(10, range(12), held_out=True)):
        assert not any(torch.equal(forward[i]["pixel_values"], other[i]["pixel_values"]) for i in range(12))
    assert not torch.equal(forward[0]["pixel_values"], forward[1]["pixel_values"])


def test_samples_are_those_of_the_results_that_are_kept():
    """One random number more or less makes other samples, and kept results those of another task."""
    tasks = (BuiltinTask(), BuiltinTask(caption=1.0, turns=0), BuiltinTask(caption=0.3, text=0.3, one_kind=True))
    digest = hashlib.sha256()
    for task, held_out in itertools.product(tasks, (False, True)):
        data = BuiltinDataset(task, size=12, seed=7, held_out=held_out, tokenizer=TOKENIZER)
        for i in range(12):
            digest.update(" ".join(TOKENIZER.convert_ids_to_tokens(data[i]["input_ids"])).encode())
    assert digest.hexdigest()[:16] == "0725bc05d0a6948d"


def test_index_outside_the_dataset_is_refused():
    data = BuiltinDataset(BuiltinTask(), size=2, seed=0, tokenizer=TOKENIZER)
    for index in (2, -1):
        with pytest.raises(IndexError):
            data[index]


@pytest.mark.parametrize("subtype", ["colour", "swap_att"])
def test_a_single_subtype_is_served_by_every_index(subtype):
    data = BuiltinDataset(BuiltinTask(turns=1, subtypes=(subtype,)), size=250, seed=12, tokenizer=TOKENIZER)
    for i in range(len(data)):  # some scenes allow no question of these sub-types
        assert turns(data[i])


@pytest.mark.parametrize("subtype", ["existence", "relation", *questions.COMPOSITIONAL])
def test_answers_are_balanced(subtype):
    rng = random.Random(f"balance {subtype}")
    n = 4000
    count = Counter(ask(subtype, rng)[1].answer for _ in range(n))
    answers = {"existence": {"yes", "no"}, "relation": {"left", "right", "above", "below"}}.get(subtype, {"A", "B"})
    share = 1 / len(answers)
    assert set(count) == answers
    for seen in count.values():
        assert abs(seen / n - share) < 5 * math.sqrt(share * (1 - share) / n)


def clues(caption: str, other: str) -> set[object]:
    """What a blind reader could go by: words, their places, pairs, repetitions, and how the captions differ."""
    words, others = caption.split(), other.split()
    found: set[object] = set(words) | set(enumerate(words)) | set(itertools.combinations(words, 2))
    found |= {("repeat", i, j) for i, a in enumerate(words) for j, b in enumerate(words[:i]) if a == b}
    return found | {("shared", i, j) for i, a in enumerate(words) for j, b in enumerate(others) if a == b}


def blind_accuracy(pairs: list[tuple[str, str]], train: int) -> float:
    """Accuracy of a naive Bayes reader that learns from the first ``train`` (right, wrong) pairs, on the rest."""
    right, wrong = Counter(), Counter()
    for a, b in pairs[:train]:
        right.update(clues(a, b))
        wrong.update(clues(b, a))

    def score(caption, other):
        return sum(math.log((right[clue] + 1) / (wrong[clue] + 1)) for clue in clues(caption, other))

    fresh = pairs[train:]
    return sum(score(a, b) > score(b, a) for a, b in fresh) / len(fresh)


def caption_pairs(subtype: str, n: int) -> list[tuple[str, str]]:
    """(right, wrong) captions of n questions."""
    rng = random.Random(f"blind {subtype}")
    pairs = []
    for _ in range(n):
        question = ask(subtype, rng)[1]
        first, second = re.fullmatch(r"which caption fits \? A (.+) B (.+)", question.text).groups()
        pairs.append((first, second) if question.answer == "A" else (second, first))
    return pairs


@pytest.mark.parametrize("subtype", questions.COMPOSITIONAL)
def test_captions_alone_do_not_give_the_answer_away(subtype):
    assert blind_accuracy(caption_pairs(subtype, 6000), train=4000) < 0.56


def test_the_blind_reader_finds_a_shortcut_where_there_is_one():
    pairs = caption_pairs("add_att", 1200)
    adjective_first = [(right, wrong) for right, wrong in pairs if right.split()[0] in scenes.COLOURS]
    assert 400 < len(adjective_first) < 800
    assert blind_accuracy(adjective_first, train=200) > 0.95


def test_labels_cover_the_answers_and_nothing_else():
    for caption in (0.0, 1.0):
        data = BuiltinDataset(BuiltinTask(caption=caption, turns=5), size=30, seed=13, tokenizer=TOKENIZER)
        for item in (data[i] for i in range(len(data))):
            ids, labels = item["input_ids"], item["labels"]
            assert ids.dtype == labels.dtype == torch.int64
            kept = labels != IGNORE_INDEX
            assert torch.equal(ids[kept], labels[kept])
            replies = " ".join(f"{reply} {EOS}" for _, reply in turns(item))
            assert TOKENIZER.decode(ids[kept]) == replies
            starts = kept & ~torch.cat((torch.tensor([False]), kept[:-1]))
            assert (ids[starts.nonzero()[:, 0] - 1] == TOKENIZER.convert_tokens_to_ids(ASSISTANT)).all()


def test_no_word_is_unknown():
    vocabulary = TOKENIZER.get_vocab()
    assert set(scenes.words()) | set(questions.WORDS) <= set(vocabulary)
    rng = random.Random(14)
    for subtype in SUBTYPES:
        for _ in range(50):
            _, question = ask(subtype, rng)
            assert TOKENIZER.unk_token_id not in TOKENIZER(f"{question.text} {question.answer}")["input_ids"]


def test_collator_pads_on_the_right_and_stacks_the_images_it_has():
    image = BuiltinDataset(BuiltinTask(turns=1, subtypes=("existence",)), size=2, seed=15, tokenizer=TOKENIZER)
    text = BuiltinDataset(BuiltinTask(modality="text", turns=6), size=1, seed=15, tokenizer=TOKENIZER)
    items = [image[0], text[0], image[1]]
    pad = TOKENIZER.pad_token_id
    batch = Collator(pad)(items)
    longest = max(len(item["input_ids"]) for item in items)
    assert len({len(item["input_ids"]) for item in items}) > 1
    for key in ("input_ids", "labels", "attention_mask"):
        assert batch[key].shape == (3, longest)
        assert batch[key].dtype == torch.int64
    for i, item in enumerate(items):
        n = len(item["input_ids"])
        assert torch.equal(batch["input_ids"][i, :n], item["input_ids"])
        assert torch.equal(batch["labels"][i, :n], item["labels"])
        assert (batch["input_ids"][i, n:] == pad).all()
        assert (batch["labels"][i, n:] == IGNORE_INDEX).all()
        assert batch["attention_mask"][i].tolist() == [1] * n + [0] * (longest - n)
    assert torch.equal(batch["pixel_values"], torch.stack([items[0]["pixel_values"], items[2]["pixel_values"]]))
    assert "pixel_values" not in Collator(pad)([text[0]])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"modality": "audio"}, "modality must be image or text"),
        ({"caption": 1.5}, "caption must lie between 0 and 1"),
        ({"turns": 0}, "turns must be at least 1"),
        ({"subtypes": ("colour", "smell")}, "smell"),
        ({"subtypes": ()}, "subtypes must be some of"),
        ({"text": 1.0}, "text must be at least 0 and below 1"),
        ({"text": 0.5, "modality": "text"}, "text must be 0 with modality text"),
        ({"text": 0.5, "caption": 1.0, "turns": 0}, "text must be 0 with modality text or without turns"),
    ],
)
def test_impossible_tasks_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        BuiltinTask(**wrong)


def test_unknown_subtype_is_refused():
    with pytest.raises(ValueError, match="subtype must be one of"):
        questions.ask(scenes.sample_scene(random.Random(0)), "smell", random.Random(0))
