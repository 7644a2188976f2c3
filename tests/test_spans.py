"""Spans of two tokenizers: everything is covered, and both sides say the same, for tokenizers and templates that differ."""

from functools import cache

import numpy as np
import pytest
from conversation_cases import byte_level_tokenizer, conversation
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from cdistill.data.conversations import Encoder
from cdistill.data.samples import BadSampleError
from cdistill.data.spans import aligned

WORDS = ["How many rings are there in the picture of 12 red and 345 blue ones? A ring, two; three."]
ALPHABET = sorted({*"".join(WORDS), *"abcdefghijklmnopqrstuvwxyz0123456789.,;!?-'()😀👩‍🚀漢字é猫ß ", "\u0301"})
TRIMS = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' }}{% if m.role == 'assistant' %}{% generation %}{{ m.content | trim }}"
    "{{ '</s>' }}{% endgeneration %}{% else %}{{ m.content | trim + '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)


def _wordpiece():
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    trainer = trainers.WordPieceTrainer(
        vocab_size=200, special_tokens=["[UNK]", "[PAD]", "</s>"], initial_alphabet=ALPHABET, show_progress=False
    )
    return tokenizer, trainer


def _unigram():
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=150,
        unk_token="[UNK]",
        special_tokens=["[UNK]", "[PAD]", "</s>"],
        initial_alphabet=[*ALPHABET, "▁"],
        show_progress=False,
    )
    return tokenizer, trainer


def _trimmed():
    """As RoBERTa's: offsets without the white space of a token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["[UNK]", "[PAD]", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    return tokenizer, trainer


@cache
def encoder(kind):
    if kind == "bytes":
        return Encoder(byte_level_tokenizer(), "chatml", places=True)
    tokenizer, trainer = {"wordpiece": _wordpiece, "unigram": _unigram, "trimmed": _trimmed}[kind]()
    tokenizer.train_from_iterator(WORDS, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]", eos_token="</s>")
    if kind == "trimmed":
        fast.chat_template = TRIMS
    return Encoder(fast, "auto" if kind == "trimmed" else "vicuna_v1", places=True)


def text_of(which, ids):
    """What tokens say, as letters alone: tokenizers change case, white space and the form of characters."""
    text = which.tokenizer.decode(ids, clean_up_tokenization_spaces=False).replace("##", "")
    normal = normalizers.Sequence([normalizers.NFKD(), normalizers.StripAccents(), normalizers.Lowercase()])
    return "".join(c for c in normal.normalize_str(text) if not c.isspace() and c not in "\u200d\ufe0f")


KINDS = ("bytes", "wordpiece", "unigram", "trimmed")
PAIRS = [(a, b) for i, a in enumerate(KINDS) for b in KINDS[i + 1 :]]
TEXTS = st.lists(st.sampled_from(ALPHABET), min_size=1, max_size=30).map("".join).map(lambda text: f"a{text}b")


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
@settings(max_examples=8, deadline=None, derandomize=True)
@given(question=TEXTS, answer=TEXTS)
@example(question="How many rings?", answer="12 red ones, two blue.")
@example(question="user", answer="assistant")
@example(question="漢字", answer=" e\u0301 👩\u200d🚀  12345 ")
def test_spans_cover_all_words_and_both_sides_say_the_same(pair, question, answer):
    one, other = map(encoder, pair)
    messages = conversation(((question,), answer), ((answer,), question))
    ours, theirs = one(messages, []), other(messages, [])
    numbers = aligned(ours.places, theirs.places)
    assert set(numbers[0]) == set(numbers[1])
    for side, number in zip((ours, theirs), numbers, strict=True):
        said = side.places.parts >= 0
        words = np.array([len(side.places.words[p]) if p >= 0 else 0 for p in side.places.parts])
        assert (number[said & (side.places.stops <= words)] > 0).all()  # all words, and nothing of the template
        assert (number[~said] == 0).all()
        assert (np.diff(number[number > 0]) >= 0).all()
        assert (number[(side.labels != -100).numpy()] > 0).all()
    for span in range(1, numbers[0].max() + 1):
        ids = [side.input_ids[number == span].tolist() for side, number in zip((ours, theirs), numbers, strict=True)]
        ends = [x[-1] in e.contract.end_ids for x, e in zip(ids, (one, other), strict=True)]
        assert ends[0] == ends[1]
        if not any(
            "�" in e.tokenizer.decode(x) or e.tokenizer.unk_token_id in x
            for e, x in zip((one, other), ids, strict=True)
        ):
            texts = [text_of(e, x[:-1] if ends[0] else x) for e, x in zip((one, other), ids, strict=True)]
            assert texts[0] == texts[1]


def test_spans_are_cut_wherever_both_tokenizers_have_a_border():
    one, other = encoder("bytes"), encoder("wordpiece")
    messages = conversation((("How many?",), "One ring"))
    ours, theirs = one(messages, []), other(messages, [])
    number, numbers = aligned(ours.places, theirs.places)
    spans = [
        (
            "".join(one.tokenizer.batch_decode(ours.input_ids[number == n, None])),
            theirs.input_ids[numbers == n].tolist(),
        )
        for n in range(1, number.max() + 1)
    ]
    assert [text for text, _ in spans] == ["How", " many", "?", "One", " ring", "<|im_end|>"]
    assert [other.tokenizer.decode(ids).replace(" ", "") for _, ids in spans] == [
        "how",
        "many",
        "?",
        "one",
        "ring",
        "</s>",
    ]


def test_one_tokenizer_gives_spans_of_one_token():
    found = encoder("bytes")(conversation((("How many?",), "A ring 😀"), (("x",), "漢")), [])
    ours, theirs = aligned(found.places, found.places)
    assert (ours == theirs).all()
    for span in range(1, ours.max() + 1):  # tokens of one character stay together
        assert (ours == span).sum() == 1 or "�" in encoder("bytes").tokenizer.decode(found.input_ids[ours == span][:1])


def test_what_one_side_has_cut_off_is_in_no_span():
    short = Encoder(byte_level_tokenizer(), "chatml", max_length=26, places=True)
    messages = conversation((("How many?",), "One ring in the picture"), (("And?",), "A ring"))
    ours, theirs = short(messages, []), encoder("wordpiece")(messages, [])
    number, numbers = aligned(ours.places, theirs.places)
    assert set(number) == set(numbers) and number.max() > 3
    assert len(ours.input_ids) <= 26 and (numbers[-8:] == 0).all()


def test_a_caption_template_leaves_questions_out_of_spans():
    plain = Encoder(byte_level_tokenizer(), "plain", places=True)
    messages = conversation((("How many?",), "One ring."))
    ours, theirs = plain(messages, []), encoder("wordpiece")(messages, [])
    number, numbers = aligned(ours.places, theirs.places)
    assert set(number) - {0} == set(numbers) - {0}
    questions = theirs.places.parts == 0
    assert questions.any() and (numbers[questions] == 0).all()


@pytest.mark.parametrize("change", ["lower", "replace('ring', 'disc')"])
def test_a_template_that_changes_answers_is_refused(tmp_path, change):
    path = tmp_path / "own.jinja"
    path.write_text(
        TRIMS.replace("m.content | trim }}", f"m.content.{change if '(' in change else change + '()'} }}}}")
    )
    with pytest.raises(BadSampleError, match=r"changed answer: template .* does not write the answer"):
        Encoder(byte_level_tokenizer(), str(path), places=True)(conversation((("x",), "Ring ring")), [])


def test_words_that_a_tokenizer_does_not_read_are_a_bad_sample():
    tokenizer, trainer = _unigram()
    tokenizer.normalizer = normalizers.Replace("z", "")
    tokenizer.train_from_iterator(WORDS, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]", eos_token="</s>")
    deaf = Encoder(fast, "vicuna_v1", places=True)
    messages = conversation((("How?",), "a zz ring"))
    with pytest.raises(BadSampleError, match="alignment: a tokenizer makes no token of 'zz' in 'a zz ring'"):
        aligned(encoder("bytes")(messages, []).places, deaf(messages, []).places)
