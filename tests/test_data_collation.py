"""Encoding and batches in every family: against the processor called on all at once, and against samples by themselves."""

import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conversation_cases import byte_level_processor, conversation, drawn, picture, runs
from family_models import FAMILIES, build, build_pair, processor
from family_table import ID
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2 import UndefinedError

import cdistill
from cdistill.builtin.dataset import build_tokenizer
from cdistill.data.batches import PackingCollator, PaddingCollator, next_fit
from cdistill.data.conversations import Encoder
from cdistill.data.grouping import length_grouped, modality_grouped
from cdistill.data.samples import BadSampleError, Mark, Message
from cdistill.data.templates import Template
from cdistill.vat import VATConfig, check_packable, packed_position_ids

PACKABLE = [name for name, family in FAMILIES.items() if not family.layer_types]
# One of each processor: LLaVA's with several text models, and Qwen3.5 with Qwen3-VL's, make the same of a conversation.
READERS = [name for name in FAMILIES if name not in ("llava_llama", "llava_qwen3", "llava_lfm2", "qwen3_5")]


def encoded(name, template="vicuna_v1", read=processor, max_length=None):
    """The five conversations of `drawn`."""
    encoder = Encoder(read(name), template, max_length)
    return [encoder(messages, images) for messages, images in drawn(name)]


def at_once(name, template, given):
    """What the processor makes of all conversations in one call."""
    read = byte_level_processor(name)
    rows = name in ("idefics3", "smolvlm")  # these have a row of tiles per sample, of zeros where it has no image
    images = [pictures for _, pictures in given if pictures or rows]
    texts = [Template(read, template)(messages).text for messages, _ in given]
    batch = dict(read(text=texts, images=images, padding=True, padding_side="right", return_tensors="pt"))
    for key in ("pixel_values", "pixel_attention_mask") if rows else ():
        batch[key] = batch[key][[bool(pictures) for _, pictures in given]]
    return batch


@pytest.mark.parametrize("template", ["qwen2_base", "chatml"])
@pytest.mark.parametrize("name", READERS)
def test_a_batch_is_what_the_processor_makes_of_all_at_once(name, template):
    read = byte_level_processor(name)
    samples = encoded(name, template, byte_level_processor)
    batch = PaddingCollator(read.tokenizer.pad_token_id)(samples)
    labels = batch.pop("labels")
    expected = at_once(name, template, drawn(name))
    assert batch.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(batch[key], value, rtol=0, atol=0, check_dtype=key != "mm_token_type_ids", msg=key)
    end = {"qwen2_base": "<|endoftext|>", "chatml": "<|im_end|>"}[template]
    for row, ids, (messages, _) in zip(labels, batch["input_ids"], drawn(name), strict=True):
        answers = [m.parts[0] + end for m in messages if m.role == "assistant"]
        assert [read.tokenizer.decode(run).lstrip() for run in runs(row.tolist())] == answers
        assert torch.equal(row[row != -100], ids[row != -100])


@pytest.mark.parametrize("name", READERS)
def test_samples_without_images(name):
    """Alone they bring no tensor of images; with images they bring no dummy."""
    samples = encoded(name)
    with_images = set(samples[0].images)
    assert with_images and not samples[1].images
    batch = PaddingCollator(0)([samples[1], samples[1]])
    assert not with_images & batch.keys() and batch["attention_mask"].all()
    types = [key for key in PaddingCollator(0)(samples) if key.endswith("type_ids")]
    assert [key for key in batch if key.endswith("type_ids")] == types == list(samples[1].types)
    both, alone = PaddingCollator(0)(samples[:2]), PaddingCollator(0)(samples[:1])
    assert all(torch.equal(both[key], alone[key]) for key in with_images)


@pytest.mark.parametrize("name", READERS)
def test_samples_are_cut_where_an_answer_is(name):
    """At every length: what is left is a beginning with whole images, and a model takes it."""
    model = build(name, 0) if name in ("llava_qwen2", "llava_onevision", "idefics3", "qwen2_5_vl") else None
    read = processor(name)
    for messages, images in (drawn(name)[2], drawn(name)[3]):
        encoder = Encoder(read, "vicuna_v1")
        whole = encoder(messages, images)
        labelled = (whole.labels != -100).tolist()
        lengths = set()
        for max_length in range(1, len(labelled) + 3):
            encoder.max_length = max_length
            try:
                cut = encoder(messages, images)
            except BadSampleError as error:
                assert error.reason == "too long"
                assert not any(labelled[:max_length]) or name == "llava_onevision"
                continue
            length = len(cut.input_ids)
            assert length <= max_length and cut.labels[-1] != -100
            if name != "llava_onevision" or length == len(labelled):
                expected = max(i for i, label in enumerate(labelled[:max_length]) if label) + 1
                assert length == expected
                assert torch.equal(cut.input_ids, whole.input_ids[:length])
                assert torch.equal(cut.labels, whole.labels[:length])
                assert all(torch.equal(of, whole.types[key][:length]) for key, of in cut.types.items())
            if model is not None and length not in lengths:  # it raises unless tokens and features are equally many
                batch = PaddingCollator(0)([cut])
                assert torch.isfinite(model(**{k: v for k, v in batch.items() if k != "labels"}).logits).all()
            lengths.add(length)
        assert len(lengths) > 3


def test_an_image_that_becomes_more_when_another_goes():
    """LLaVA-OneVision cuts an image into tiles only where it is the only one: it is measured anew."""
    first, second = (picture(*size) for size in FAMILIES["llava_onevision"].images)
    messages = conversation(((Mark.IMAGE, "w1"), "w2 w3 w4 w5 w6 w7 w8 w9"), ((Mark.IMAGE, "w2"), "w3"))
    read = processor("llava_onevision")
    both, alone = (
        Encoder(read, "vicuna_v1")(messages, [first, second]),
        Encoder(read, "vicuna_v1")(messages[:2], [first]),
    )
    image = ID["<image>"]
    assert [(e.input_ids == image).sum() for e in (both, alone)] == [5 + 5, 14]
    limit = len(both.input_ids) - 1 - 3  # within the second question
    cut = Encoder(read, "vicuna_v1", limit)(messages, [first, second])
    assert (cut.input_ids == image).sum() == 14 and len(cut.input_ids) <= limit
    assert torch.equal(cut.input_ids, alone.input_ids[: len(cut.input_ids)])
    assert torch.equal(cut.images["pixel_values"], alone.images["pixel_values"])


IMAGE = Mark.IMAGE


@pytest.mark.parametrize(
    ("messages", "images", "message"),
    [
        (conversation(((IMAGE, "w1"), "w2")), 0, "image count: 1 marks in the text, 0 images"),
        (conversation(((IMAGE, "w1"), "w2")), 2, "image count: 1 marks in the text, 2 images"),
        (conversation(((IMAGE, "w1 <image>"), "w2")), 1, "mark in the text: <image> stands for an image"),
        (conversation((("w1",), "w2 <video>")), 0, "mark in the text: <video> stands for"),
        ([Message("user", ("w1",))], 0, "empty answer: "),
    ],
)
def test_bad_samples(messages, images, message):
    encoder = Encoder(processor("llava_onevision"), "vicuna_v1")
    with pytest.raises(BadSampleError, match=re.escape(message)) as error:
        encoder(messages, [picture(8, 8)] * images)
    assert "\n" not in str(error.value)


def raising(error):
    def raises(*given, **options):
        raise error

    return raises


FAULTS = [
    ValueError("absolute aspect ratio must be smaller than 200"),
    TypeError("an odd one"),
    RuntimeError(""),
    KeyError("x"),
]


@pytest.mark.parametrize(
    "error", [*FAULTS, UndefinedError("no such key"), OSError(5, "read"), ZeroDivisionError("by zero")]
)
@pytest.mark.parametrize("part", ["chat template", "tokenizer", "image processor"])
def test_what_others_code_raises_at_a_sample_makes_it_a_bad_one(monkeypatch, error, part):
    encoder = Encoder(processor("llava_qwen2"), "vicuna_v1")
    where = {
        "chat template": (Template, "_render"),
        "tokenizer": (type(encoder.tokenizer), "backend_tokenizer"),
        "image processor": (encoder, "processor"),
    }
    broken = raising(error)
    if part == "tokenizer":
        broken = SimpleNamespace(no_truncation=lambda: None, no_padding=lambda: None, encode=broken)
    monkeypatch.setattr(*where[part], broken)
    messages = conversation(((Mark.IMAGE, "what?"), "this"))
    with pytest.raises(BadSampleError) as raised:
        encoder(messages, [picture(20, 30)])
    assert raised.value.reason == part and raised.value.detail
    assert isinstance(error, ValueError) or type(error).__name__ in raised.value.detail


@pytest.mark.parametrize("error", [MemoryError(), NameError("nobody"), ImportError("torchvision"), KeyboardInterrupt()])
def test_faults_of_the_machine_and_of_programs_are_no_bad_samples(monkeypatch, error):
    encoder = Encoder(processor("llava_qwen2"), "vicuna_v1")
    messages = conversation(((Mark.IMAGE, "what?"), "this"))
    with pytest.MonkeyPatch.context() as patch, pytest.raises(type(error)):
        patch.setattr(encoder, "processor", raising(error))
        encoder(messages, [picture(20, 30)])
    monkeypatch.setattr(encoder, "_expand", raising(TypeError("ours")))
    with pytest.raises(TypeError, match="ours"):
        encoder(messages, [picture(20, 30)])


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("size", [(1, 2000), (2000, 1), (1, 1), (3, 700)])
def test_images_of_odd_shapes_are_read_or_bad_in_every_family(name, size):
    encoder = Encoder(processor(name), "vicuna_v1")
    messages = conversation(((Mark.IMAGE, "what?"), "this"))
    try:
        found = encoder(messages, [picture(*size)])
    except BadSampleError as error:
        assert error.reason in ("image processor", "image too large")
        assert max(size) / min(size) > 200
    else:
        assert (found.labels >= 0).any()


@pytest.mark.parametrize("template", ["vicuna_v1", "qwen2_base"])
def test_an_answer_of_weight_0_is_no_label(template):
    encoder = Encoder(byte_level_processor("llava_qwen2"), template)
    asked, answers = [f"question {i}" for i in range(3)], [f"reply {i}" for i in range(3)]
    messages = conversation(*(((q,), a) for q, a in zip(asked, answers, strict=True)))
    whole = encoder(messages, [])
    for left_out in range(3):
        messages_here = list(messages)
        messages_here[2 * left_out + 1] = Message("assistant", (answers[left_out],), learned=False)
        found = encoder(messages_here, [])
        assert torch.equal(found.input_ids, whole.input_ids)
        labels = encoder.tokenizer.decode(found.labels[found.labels >= 0])
        assert [answer in labels for answer in answers] == [i != left_out for i in range(3)]
        assert torch.equal(found.labels[found.labels >= 0], found.input_ids[found.labels >= 0])


def test_a_tokenizer_by_itself():
    tokenizer = build_tokenizer()
    encoder = Encoder(tokenizer, "vicuna_v1", 40)
    messages = conversation((("how many ring ?",), "two"))
    batch = PaddingCollator(encoder.pad_token_id)([encoder(messages, [])])
    assert batch.keys() == {"input_ids", "labels", "attention_mask"}
    assert tokenizer.decode(batch["labels"][batch["labels"] != -100]) == "two </s>"
    with pytest.raises(BadSampleError, match="image count: 1 images for a model that takes none"):
        encoder(messages, [picture(8, 8)])


def test_pictures_of_any_mode():
    encoder = Encoder(processor("llava_qwen2"), "plain")
    grey = picture(8, 8).convert("L")
    messages = conversation(((IMAGE,), "w1"))
    values = [encoder(messages, [image]).images["pixel_values"] for image in (grey, grey.convert("RGB"))]
    assert torch.equal(*values)


@pytest.mark.parametrize("name", PACKABLE)
def test_packed_samples_lose_what_padded_ones_do(name):
    student, teacher = build_pair(name)
    check_packable(student)
    samples = encoded(name)
    padded = PaddingCollator(0)(samples)
    packed = PackingCollator(0, 2 * max(len(s.input_ids) for s in samples) - 1)(samples)
    assert 1 < len(packed["input_ids"]) < len(samples)
    packed["position_ids"] = packed_position_ids(student, packed)
    distillation = cdistill.distill(teacher, student, vat=VATConfig(layers="all"))
    expected, found = distillation(padded), distillation(packed)
    for key in ("ar", "kd", "vat"):
        assert expected[key] > 0
        torch.testing.assert_close(found[key], expected[key], rtol=5e-5, atol=1e-6)


@pytest.mark.parametrize("name", PACKABLE)
def test_every_packed_sample_is_read_by_itself(name):
    """Its losses are those it has in a batch of its own, and it does not see the words of its neighbours."""
    model = build(name, 0)
    samples = encoded(name)
    batch = PackingCollator(0, 10_000)(samples)
    batch["position_ids"] = packed_position_ids(model, batch)

    def logits(batch):
        return model(**{k: v for k, v in batch.items() if k != "labels"}, use_cache=False).logits

    with torch.no_grad():
        together = logits(batch)
        changed = dict(batch, input_ids=batch["input_ids"].clone())
        first = len(samples[0].input_ids)
        words = changed["input_ids"][0, :first] >= ID["w0"]
        changed["input_ids"][0, :first][words] = ID["w20"]
        others = logits(changed)
    assert not torch.allclose(others[0, first - 5 : first], together[0, first - 5 : first])
    torch.testing.assert_close(others[0, first:], together[0, first:], rtol=1e-5, atol=1e-5)
    start = 0
    for sample in samples:
        alone = PaddingCollator(0)([sample])
        length = len(sample.input_ids)
        with torch.no_grad():
            expected = F.cross_entropy(logits(alone)[0, :-1], alone["labels"][0, 1:], ignore_index=-100)
        ours = together[0, start : start + length], batch["labels"][0, start : start + length]
        torch.testing.assert_close(F.cross_entropy(ours[0][:-1], ours[1][1:]), expected, rtol=1e-4, atol=1e-5)
        start += length


@pytest.mark.parametrize("name", ["llava_qwen2", "qwen2_5_vl", "qwen3_vl"])
def test_positions_of_packed_words(name):
    words = encoded(name)[1]
    batch = PackingCollator(0, 2 * len(words.input_ids) + 3)([words, words, words])
    text = torch.arange(len(words.input_ids)).repeat(2)
    assert batch["position_ids"][0].tolist() == text.tolist()
    positions = packed_position_ids(build(name, 0), batch)
    if name == "llava_qwen2":
        assert positions is batch["position_ids"]
    else:
        assert torch.equal(positions, batch["position_ids"].expand(4, 2, -1))


@pytest.mark.parametrize("name", sorted(set(FAMILIES) - set(PACKABLE)))
def test_models_that_carry_a_state_are_not_packed(name):
    with pytest.raises(
        ValueError, match=r"^packing: \w+ has layers of type (conv|linear_attention), whose state passes"
    ):
        check_packable(build(name, 0))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(lengths=st.lists(st.integers(1, 20), min_size=1, max_size=12), room=st.integers(20, 50))
def test_rows_hold_samples_in_order(lengths, room):
    rows = next_fit(lengths, room)
    assert [i for row in rows for i in row] == list(range(len(lengths)))
    sizes = [sum(lengths[i] for i in row) for row in rows]
    assert max(sizes) <= room
    for size, row in zip(sizes, rows[1:], strict=False):  # the next sample did not fit
        assert size + lengths[row[0]] > room


def test_a_packed_batch():
    samples = encoded("llava_qwen2")
    lengths = [len(sample.input_ids) for sample in samples]
    room = lengths[0] + lengths[1] + 2
    batch = PackingCollator(0, room)(samples)
    assert batch.keys() == {"input_ids", "labels", "position_ids", "pixel_values"}
    rows = next_fit(lengths, room)
    width = max(sum(lengths[i] for i in row) for row in rows)
    for r, row in enumerate(rows):
        filled = [*(lengths[i] for i in row), width - sum(lengths[i] for i in row)]
        assert batch["position_ids"][r].tolist() == [p for size in filled for p in range(size)]
        assert (
            batch["input_ids"][r].tolist() == [t for i in row for t in samples[i].input_ids.tolist()] + [0] * filled[-1]
        )
        assert batch["labels"][r].tolist() == [t for i in row for t in samples[i].labels.tolist()] + [-100] * filled[-1]
    assert torch.equal(batch["pixel_values"], PaddingCollator(0)(samples)["pixel_values"])
    with pytest.raises(ValueError, match=r"^max_length of packed rows is 5, a sample has \d+ tokens; encode with that"):
        PackingCollator(0, 5)(samples)


def test_the_first_token_of_a_sample_is_never_predicted_from_the_sample_before():
    encoder = Encoder(processor("llava_qwen2"), "plain")
    samples = [encoder(conversation((("w1",), answer)), []) for answer in ("w2 w3", "w4 w5 w6")]
    assert all(sample.input_ids[0] == ID[word] for sample, word in zip(samples, ("w2", "w4"), strict=True))
    labels = PackingCollator(0, 10)(samples)["labels"].tolist()
    assert labels == [[-100, ID["w3"], -100, ID["w5"], ID["w6"]]]


def test_length_grouped_order():
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(10, 1000, (64 * 16,), generator=generator).tolist()
    order = length_grouped(lengths, 16, seed=3)
    assert sorted(order) == list(range(64 * 16))
    assert order == length_grouped(np.array(lengths), 16, seed=3) != length_grouped(lengths, 16, seed=4)
    batches = [[lengths[i] for i in order[k : k + 16]] for k in range(0, len(order), 16)]
    spreads = [max(batch) - min(batch) for batch in batches]
    assert sum(spreads) / len(spreads) < 0.2 * 990  # drawn at random it is about 870
    means = [sum(batch) / 16 for batch in batches]
    assert means != sorted(means) and means != sorted(means, reverse=True)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(images=st.lists(st.integers(0, 2), max_size=80), batch_size=st.integers(1, 7), seed=st.integers(0, 3))
def test_modality_grouped_order(images, batch_size, seed):
    lengths = np.random.default_rng(len(images)).integers(1, 100, len(images))
    order = modality_grouped(lengths, images, batch_size, seed)
    assert order == modality_grouped(lengths, np.array(images, dtype=np.int16), batch_size, seed)
    assert sorted(order) == list(range(len(images)))
    kinds = [{images[i] > 0 for i in order[k : k + batch_size]} for k in range(0, len(order), batch_size)]
    mixed = [k for k, kind in enumerate(kinds) if len(kind) > 1]
    assert len(mixed) <= 1 and all(k >= len(kinds) - 2 for k in mixed)


def test_modalities_take_turns():
    images = [1] * 512 + [0] * 256
    order = modality_grouped([10] * 768, images, 8, seed=1)
    kinds = [images[order[k]] for k in range(0, 768, 8)]
    assert sum(kinds) == 64 and kinds != sorted(kinds) and kinds != sorted(kinds, reverse=True)
    assert order != modality_grouped([10] * 768, images, 8, seed=2)
