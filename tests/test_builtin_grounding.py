"""Places of words by any tokenizer: what the built-in one gives, pieces beside an oracle, and what is refused."""

import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from builtin_models import VISION, llava, make_recipe, save_base, save_teacher
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from cdistill.builtin import grounding, render, scenes
from cdistill.builtin.dataset import (
    ASSISTANT,
    EOS,
    USER,
    BuiltinDataset,
    Collator,
    ConversationDataset,
    build_tokenizer,
)
from cdistill.builtin.grounding import GroundedCollator, grounded
from cdistill.builtin.subwords import CHAT_TEMPLATE, build_subword_tokenizer
from cdistill.builtin.task import BuiltinTask
from cdistill.data.batches import PaddingCollator
from cdistill.data.conversations import Encoded, Encoder
from cdistill.data.samples import BadSampleError
from cdistill.data.spans import Places
from cdistill.models.processor import build_processor
from cdistill.train import run
from cdistill.train.build import build_models
from cdistill.train.data import stage_dataset
from cdistill.train.objectives import OBJECTIVES, register_objective

WORDS = build_tokenizer()


def characters() -> PreTrainedTokenizerFast:
    """A token for each character, blanks among them."""
    known = ["<pad>", "<|im_start|>", "<|im_end|>", "<image>", "\n", *map(chr, range(32, 127))]
    backend = Tokenizer(models.WordLevel({token: i for i, token in enumerate(known)}, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    special = {"pad_token": "<pad>", "eos_token": "<|im_end|>", "extra_special_tokens": {"image_token": "<image>"}}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **special, chat_template=CHAT_TEMPLATE)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    return tokenizer


TOKENIZERS = {"words": build_tokenizer, "pieces": build_subword_tokenizer, "characters": characters}


def reader(tokenizer):
    """A processor of one grid of visual tokens."""
    config = llava(vocab_size=len(tokenizer)).config
    config.image_token_id = tokenizer.convert_tokens_to_ids("<image>")
    return build_processor(config, tokenizer, "student")


def samples(tokenizer, task, seed, size=12):
    """The same samples in the built-in tokens and in those of a tokenizer."""
    data = BuiltinDataset(task, size=size, seed=seed, grounding=True)
    return data, ConversationDataset(
        data, Encoder(reader(tokenizer) if task.modality == "image" else tokenizer, places=True)
    )


@pytest.mark.parametrize("modality", ["text", "image"])
def test_tokens_that_are_words_have_what_the_builtin_vocabulary_has(modality):
    task = BuiltinTask(modality=modality, caption=0.5, turns=3, **({"text": 0.3} if modality == "image" else {}))
    plain, ours = samples(build_tokenizer(), task, 41)
    expected = Collator(WORDS.pad_token_id)([plain[i] for i in range(12)])
    found = GroundedCollator(PaddingCollator(WORDS.pad_token_id))([ours[i] for i in range(12)])
    assert found.keys() == expected.keys()
    for name in found.keys() - {"pixel_values"}:
        assert found[name].dtype == expected[name].dtype and torch.equal(found[name], expected[name]), name


def by_characters(item, pieces, tokenizer):
    """For each token of pieces the index of the built-in token that it is a part of, -1 of none: by consuming the words."""
    words = WORDS.convert_ids_to_tokens(item["input_ids"].tolist())
    queue = [[i, word] for i, word in enumerate(words) if word not in (USER, ASSISTANT, EOS, "<image>")]
    found, role = [], False
    for token in pieces.tolist():
        text = tokenizer.decode([token])
        if text in ("<|im_start|>", "<|im_end|>") or role or text == "<image>":
            role = text == "<|im_start|>" or (role and text != "\n")
            found.append(-1)
            continue
        part = text.strip()
        found.append(queue[0][0] if part else -1)
        if part:
            assert queue[0][1].startswith(part)
            queue[0][1] = queue[0][1][len(part) :]
            queue = queue if queue[0][1] else queue[1:]
    assert not queue
    return np.array(found)


@pytest.mark.parametrize("name", ["pieces", "characters"])
@pytest.mark.parametrize("modality", ["text", "image"])
def test_every_token_of_a_word_has_the_row_of_that_word(name, modality):
    tokenizer = TOKENIZERS[name]()
    spoken = 0
    plain, ours = samples(tokenizer, BuiltinTask(modality=modality, caption=0.5, turns=3), 42)
    for i in range(12):
        item, encoded = plain[i], ours[i]
        of = by_characters(item, encoded.input_ids, tokenizer)
        rows = torch.cat([item["grounding"], torch.zeros(1, item["grounding"].shape[1])])
        assert torch.equal(encoded.given["grounding"], rows[of])
        spoken += int((encoded.given["grounding"].sum(1) > 0).sum())
        if modality == "text":
            last = [int(np.flatnonzero(of == word)[-1]) for word in item["places"].tolist()]
            assert encoded.given["places"].tolist() == last
        else:
            image = tokenizer.convert_tokens_to_ids("<image>")
            assert encoded.given["places"].tolist() == (encoded.input_ids == image).nonzero().flatten().tolist()
            assert len(encoded.given["places"]) == 36
    assert spoken > 300


def cut(rng, parts):
    """Tokens that begin and stop anywhere in texts, one behind the other, some of nothing; each has a part, start and stop."""
    tokens = [(-1, 0, 0)]
    for number, text in enumerate(parts):
        borders = [0, *sorted(rng.choice(np.arange(1, len(text)), len(text) // 3)), len(text)]
        tokens += [(number, a, b) for a, b in itertools.pairwise(borders)]
        tokens += [(number, len(text) + 1, len(text) + 1), (-1, 0, 0)]
    return np.array(tokens).T


@pytest.mark.parametrize("seed", range(6))
def test_tokens_that_are_cut_anywhere(seed):
    """A token of several words has the row of the last that speaks of something."""
    rng = np.random.default_rng(seed)
    data = BuiltinDataset(BuiltinTask(modality="text", turns=4), size=1, seed=seed)
    scene = data._draw(0)[2]
    texts = [part["text"] for message in data.messages(0) for part in message["content"]]
    numbers, starts, stops = cut(rng, texts)
    found = Places(numbers, starts, stops, tuple(texts), (False,) * len(texts))
    encoded = Encoded(torch.zeros(len(numbers)), torch.zeros(len(numbers)), {}, {}, places=found)
    at, words, shape = {}, [], []
    for part, text in enumerate(texts):
        place = 0
        for word in text.split():
            place = text.index(word, place)
            at |= {(part, c): len(words) for c in range(place, place + len(word))}
            place += len(word)
            words.append(word)
            shape.append((part, place))
        words.append("")
        shape.append((part, -1))
    rows = render.grounding(scene, words)
    speaks = [bool(row.any()) and shape[i][0] > 0 for i, row in enumerate(rows)]
    expected = np.zeros((len(numbers), 36), np.float32)
    for token, (part, a, b) in enumerate(zip(numbers, starts, stops, strict=True)):
        inside = range(a, b) if a < b else [a] if at.get((part, a - 1), -1) == at.get((part, a)) else []
        meant = [at[part, c] for c in inside if part >= 0 and (part, c) in at and speaks[at[part, c]]]
        if meant:
            expected[token] = rows[meant[-1]]
    ends = [shape[i][1] for i, word in enumerate(words) if shape[i][0] == 0 and word in scenes.SHAPES]
    last = [max(t for t in range(len(numbers)) if numbers[t] == 0 and starts[t] < end <= stops[t]) for end in ends]
    if len({*last}) < len(last):
        with pytest.raises(BadSampleError, match=r"not every object of .* has a last token of its own"):
            grounded(encoded, scene, written=True, visual_tokens=36)
        return
    result, places = grounded(encoded, scene, written=True, visual_tokens=36)
    assert np.array_equal(result, expected) and result.any() and places == last


def test_an_image_of_other_tokens_is_refused():
    tokenizer = build_subword_tokenizer()
    _, ours = samples(tokenizer, BuiltinTask(turns=1), 43)
    encoded = ours[0]
    with pytest.raises(BadSampleError, match="an image has 36 tokens, and places are known of 144"):
        grounded(encoded, ours.data._draw(0)[2], written=False, visual_tokens=144)
    with pytest.raises(BadSampleError, match="an image has 0 tokens"):
        grounded(replace(encoded, spans=()), ours.data._draw(0)[2], written=False, visual_tokens=36)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    save_teacher(folder / "teacher")
    save_base(folder / "words")
    pieces = build_subword_tokenizer()
    ids = {"eos_token_id": pieces.eos_token_id, "pad_token_id": pieces.pad_token_id}
    save_base(folder / "base", tokenizer=pieces, vocab_size=len(pieces), **ids)
    return folder


SECTION = {"learning_rate": 1e-2, "samples": 16, "global_batch_size": 8, "micro_batch_size": 4, "warmup_ratio": 0.0}


def recipe_of(folder, output, *, modality="text", **changes):
    data = {"modality": modality, "turns": 1, **({"text": 0.5} if modality == "image" else {})}
    stage = {"stages": ["ground"], "stage__ground": SECTION | {"objective": "ground", "data": data}}
    student = {"base": str(folder / "base"), "taf": False}
    if modality == "image":
        student["vision_config"] = VISION | {"model_type": "siglip_vision_model"}
    values = {"teacher": None, "student": student, "report_to": [], "vat__enabled": False}
    return make_recipe(output, folder, **(values | stage | changes))


@pytest.mark.parametrize("modality", ["text", "image"])
def test_a_student_of_pieces_learns_the_places(folder, tmp_path, modality):
    """Also with scenes of both kinds in a batch, and gradients that are summed over micro-batches."""
    run(recipe_of(folder, tmp_path / "run", modality=modality))
    logged = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(logged) == 2 and all(line["ground"] > 0 for line in logged)


def lost_words(folder):
    tokenizer = build_subword_tokenizer()
    changed = tokenizer.backend_tokenizer
    changed.normalizer = normalizers.Replace(Regex("ring|cross|circle|square|triangle|diamond"), "")
    tokenizer.save_pretrained(folder)


def other_template(folder):
    tokenizer = build_subword_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE.replace("part.text ~", "(part.text | replace(' ;', ',')) ~")
    tokenizer.save_pretrained(folder)


def no_template(folder):
    tokenizer = build_subword_tokenizer()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(folder)
    (folder / "chat_template.jinja").unlink(missing_ok=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lost_words, r"^stage\.ground\.data: places: not every object of '.*' has a last token of its own$"),
        (other_template, r"^stage\.ground\.data: places: not every object of '.*' has a last token of its own$"),
        (no_template, r"^stage\.ground\.data: path must be given, or the tokenizer be the built-in one"),
    ],
)
def test_a_tokenizer_whose_places_cannot_be_known_is_refused_before_anything_is_written(
    folder, tmp_path, change, message
):
    pieces = build_subword_tokenizer()
    ids = {"eos_token_id": pieces.eos_token_id, "pad_token_id": pieces.pad_token_id}
    save_base(tmp_path / "base", tokenizer=pieces, vocab_size=len(pieces), **ids)
    change(tmp_path / "base")
    with pytest.raises(ValueError, match=message):
        run(recipe_of(tmp_path, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_word_of_a_question_that_no_token_has_is_refused():
    _, ours = samples(build_subword_tokenizer(), BuiltinTask(modality="text", turns=2), 44)
    encoded = ours[0]
    asks = encoded.given["grounding"].any(1).numpy()
    lost = encoded.places._replace(parts=np.where(asks, -1, encoded.places.parts))
    with pytest.raises(BadSampleError, match=r"no token lies in the word '\w+': the chat template changes it"):
        grounded(replace(encoded, places=lost), ours.data._draw(0)[2], written=True, visual_tokens=36)


def test_what_has_no_places_is_refused_in_one_line(folder, tmp_path, monkeypatch):
    recipe = recipe_of(folder, tmp_path / "run", modality="image")
    found = build_models(recipe)
    found.reader = found.processor
    with pytest.raises(
        ValueError, match=r"^stage\.ground\.data: modality must be text with objective ground: the visual"
    ):
        stage_dataset(recipe, 0, found)
    with pytest.raises(ValueError, match=r"data\.path must be null for objective ground"):
        recipe_of(folder, tmp_path / "run", stage__ground__data__path="x.json")
    with pytest.raises(ValueError, match=r"packing needs data\.path in every stage"):
        recipe_of(folder, tmp_path / "run", packing=True)
    monkeypatch.setitem(OBJECTIVES, "both", None)
    del OBJECTIVES["both"]
    register_objective("both", ("ar", "kd", "ground"), ("language", "adapter"))
    changes = {"teacher": str(folder / "teacher"), "student": {"base": str(folder / "base"), "taf": True}}
    section = SECTION | {"objective": "both", "data": {"turns": 1}}
    both = recipe_of(folder, tmp_path / "run", **changes, stage__ground=section, kd__alignment="merged")
    with pytest.raises(ValueError, match=r"^stage\.ground\.data: objective both must not distil here: places of words"):
        stage_dataset(both, 0, build_models(both))


def test_padding_asks_for_nothing():
    items = [
        {"grounding": torch.rand(tokens, width), "places": torch.arange(width)}
        for tokens, width in ((3, 2), (5, 4), (1, 1))
    ]
    batch = grounding.padded(items, 6)
    for i, item in enumerate(items):
        tokens, width = item["grounding"].shape
        assert torch.equal(batch["grounding"][i, :tokens, :width], item["grounding"])
        assert batch["grounding"][i].sum() == pytest.approx(float(item["grounding"].sum()))
        assert batch["places"][i].tolist() == [*range(width), *[-1] * (4 - width)]
