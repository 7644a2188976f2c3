"""Templates: token by token against layouts written by hand, and labels on conversations that hypothesis thinks of."""

import os
import unicodedata

import pytest
from conversation_cases import byte_level_processor, byte_level_tokenizer, conversation, picture, runs
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import processors
from transformers import LlavaProcessor, PreTrainedTokenizerFast

from cdistill.builtin.dataset import CHAT_TEMPLATE, build_tokenizer
from cdistill.data.conversations import Encoder
from cdistill.data.samples import BadSampleError, Mark, Message
from cdistill.data.templates import TEMPLATES, Template
from cdistill.models.chat_template import taking_parts

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
ASKED = conversation(((Mark.IMAGE, "\nWhat is in the picture?"), "A red ring."), (("How many?",), "One."))
SYSTEM_TOKENS = (
    "A Ġchat Ġbetween Ġa Ġcurious Ġuser Ġand Ġan Ġartificial Ġintelligence Ġassistant . ĠThe Ġassistant Ġgives Ġhelpful "
    ", Ġdetailed , Ġand Ġpolite Ġanswers Ġto Ġthe Ġuser 's Ġquestions ."
)
IMAGE = "<image> <image> <image> <image>"  # 8 x 8 pixels in patches of 4 x 4
QUESTION = "What Ġis Ġin Ġthe Ġpicture ?"
# Labels in brackets.
GOLDEN = {
    "plain": f"{IMAGE} [ A Ġred Ġring .Ċ One .Ċ ]",
    "qwen2_base": (
        f"{SYSTEM_TOKENS} ĠUSER : Ġ {IMAGE} Ċ {QUESTION} ĠASSISTANT : [ ĠA Ġred Ġring . <|endoftext|> ] "
        "USER : ĠHow Ġmany ? ĠASSISTANT : [ ĠOne . <|endoftext|> ]"
    ),
    "vicuna_v1": (
        f"{SYSTEM_TOKENS} ĠUSER : Ġ {IMAGE} Ċ {QUESTION} ĠASSISTANT : [ ĠA Ġred Ġring . </s> ] "
        "USER : ĠHow Ġmany ? ĠASSISTANT : [ ĠOne . </s> ]"
    ),
    "chatml": (
        "<|im_start|> system Ċ You Ġare Ġa Ġhelpful Ġassistant . <|im_end|> Ċ "
        f"<|im_start|> user Ċ {IMAGE} Ċ {QUESTION} <|im_end|> Ċ <|im_start|> assistant Ċ [ A Ġred Ġring . <|im_end|> ] Ċ "
        "<|im_start|> user Ċ How Ġmany ? <|im_end|> Ċ <|im_start|> assistant Ċ [ One . <|im_end|> ] Ċ"
    ),
}
# What the tokenizer of Qwen1.5 splits further.
SPLIT = {"ĠASSISTANT": "ĠASS IST ANT"}
# Qwen1.5's own, which takes plain text and marks nothing as generated.
QWEN_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# The real tokenizer beside the one trained here, where this names its tokenizer.json.
TOKENIZERS = ["trained", *(["qwen1.5"] if "CDISTILL_QWEN_TOKENIZER" in os.environ else [])]


def test_a_template_of_words_alone_learns_to_take_images_and_writes_the_same():
    tokenizer = byte_level_tokenizer(image_token="<image>")
    tokenizer.chat_template = QWEN_TEMPLATE
    written = Template(tokenizer)(ASKED)
    assert "<image>\nWhat is in the picture?" in written.text
    with pytest.raises(TypeError, match="can only concatenate"):
        chat(tokenizer)
    tokenizer.chat_template = taking_parts(tokenizer, "<image>")
    assert Template(tokenizer)(ASKED) == written
    assert chat(tokenizer) == written.text[: written.answers[0][0]]
    words = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "How many?"}]
    assert tokenizer.apply_chat_template(words, tokenize=False) == (
        "<|im_start|>system\nBe short.<|im_end|>\n<|im_start|>user\nHow many?<|im_end|>\n"
    )


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, "of nobody", "{{ messages[0].content | nothing }}", None])
def test_another_template_stays_as_it_is(template):
    tokenizer = build_tokenizer()
    tokenizer.chat_template = template
    assert taking_parts(tokenizer, "<image>") == template


def chat(tokenizer):
    content = [{"type": "image"}, {"type": "text", "text": "What is in the picture?"}]
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
    )


def processor_of(kind, template=None):
    """A LLaVA's processor with a tokenizer."""
    if kind == "trained":
        tokenizer = byte_level_tokenizer(image_token="<image>")
    else:
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_file=os.environ["CDISTILL_QWEN_TOKENIZER"],
            pad_token="<|endoftext|>",
            eos_token="<|im_end|>",
            extra_special_tokens={"image_token": "<image>"},
        )
        tokenizer.add_tokens(["</s>"], special_tokens=True)
    images = byte_level_processor("llava_qwen2").image_processor
    return LlavaProcessor(
        images, tokenizer, patch_size=4, vision_feature_select_strategy="full", chat_template=template
    )


def layout(processor, encoded):
    """Tokens with brackets around those that are labels."""
    words, labelled = [], False
    tokens = processor.tokenizer.convert_ids_to_tokens(encoded.input_ids.tolist())
    for token, label, id in zip(tokens, encoded.labels.tolist(), encoded.input_ids.tolist(), strict=True):
        assert label in (-100, id)
        if labelled != (label != -100):
            labelled = not labelled
            words.append("[" if labelled else "]")
        words.append(token)
    return " ".join([*words, "]"] if labelled else words)


def golden(name, kind):
    if kind == "trained":
        return GOLDEN[name]
    return " ".join(SPLIT.get(token, token) for token in GOLDEN[name].split(" "))


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("name", GOLDEN)
def test_tokens_and_labels_of_a_conversation(name, kind):
    processor = processor_of(kind)
    assert layout(processor, Encoder(processor, name)(ASKED, [picture(8, 8)])) == golden(name, kind)


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_template_for_plain_text_that_marks_no_answers(kind):
    processor = processor_of(kind, QWEN_TEMPLATE)
    expected = golden("chatml", kind).replace("assistant . <|im_end|>", "assistant <|im_end|>")
    assert layout(processor, Encoder(processor)(ASKED, [picture(8, 8)])) == expected


def test_a_beginning_that_the_tokenizer_adds():
    processor = processor_of("trained")
    tokenizer = processor.tokenizer
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    for name, text in GOLDEN.items():
        assert layout(processor, Encoder(processor, name)(ASKED, [picture(8, 8)])) == f"<s> {text}"
    processor.chat_template = "{{ bos_token }}" + CHAT_TEMPLATE  # once only
    ids = Encoder(processor)(ASKED, [picture(8, 8)]).input_ids.tolist()
    assert ids[0] == tokenizer.bos_token_id and ids.count(tokenizer.bos_token_id) == 1


def test_a_system_message_takes_the_place_of_the_usual_one():
    processor = byte_level_processor("llava_qwen2")
    messages = [Message("system", ("How many?",)), *conversation((("What?",), "One."))]
    texts = {name: Template(processor, name)(messages).text for name in GOLDEN}
    assert texts == {
        "plain": "One.\n",
        "qwen2_base": "How many? USER: What? ASSISTANT: One.<|endoftext|>",
        "vicuna_v1": "How many? USER: What? ASSISTANT: One.</s>",
        "chatml": "<|im_start|>system\nHow many?<|im_end|>\n<|im_start|>user\nWhat?<|im_end|>\n"
        "<|im_start|>assistant\nOne.<|im_end|>\n",
    }


@pytest.mark.parametrize("name", ["qwen2_base", "chatml"])
@pytest.mark.parametrize(
    ("parts", "written"),
    [
        ((Mark.IMAGE, "\nWhat?"), "<image>\nWhat?"),
        (("What?\n", Mark.IMAGE), "<image>\nWhat?"),
        (("Is ", Mark.IMAGE, " red?"), "<image>\nIs  red?"),
        ((Mark.IMAGE,), "<image>"),
        (("Is ", Mark.IMAGE, " like ", Mark.IMAGE, "?\n"), "Is <image> like <image>?\n"),
        ((" What?\n",), " What?\n"),
    ],
)
def test_the_only_image_of_a_message_comes_first(name, parts, written):
    """As in LLaVA's ``preprocess_multimodal``; several stay where they stand."""
    text = Template(byte_level_processor("llava_qwen2"), name)(conversation((parts, "One."))).text
    before, after = {
        "qwen2_base": ("USER: ", " ASSISTANT:"),
        "chatml": ("<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant"),
    }[name]
    assert f"{before}{written}{after}" in text


def test_marks_of_the_families():
    messages = conversation(((Mark.IMAGE, "What?"), "One."))
    marks = {"llava_next": "<image>", "internvl": "<IMG_CONTEXT>"}
    marks |= {"idefics3": "<image>", "qwen2_5_vl": "<|vision_start|><|image_pad|><|vision_end|>"}
    for name, mark in marks.items():
        assert Template(byte_level_processor(name), "plain")(messages) == (
            f"{mark}One.\n",
            [(len(mark), len(mark) + 5)],
        )


def test_breaks_beside_images_are_left_to_a_models_own_template():
    source = "{% for m in messages %}{% for p in m.content %}({{ p.text or '<image>' }}){% endfor %}</s>{% endfor %}"
    processor = processor_of("trained", source)
    parts = ("\nA\n", Mark.IMAGE, "\n B\n\nC ", Mark.IMAGE, "\n", Mark.IMAGE)
    text, answers = Template(processor)(conversation((parts, "\nOne\n")))
    assert text == "(\nA)(<image>)( B\n\nC )(<image>)(<image>)</s>(\nOne\n)</s>"
    assert [text[a:b] for a, b in answers] == ["(\nOne\n)</s>"]


# Words, spaces and breaks, letters of several bytes, marks that belong together, and template syntax.
PIECES = [*"abc ring.,'\n\t {}%<|>", "é", "e\u0301", "界", "🧭", " ring", "'s", "\u00a0"]
TEXT = st.lists(st.sampled_from(PIECES), max_size=12).map("".join)
ANSWER = TEXT.filter(lambda text: text.strip())
END = {"plain": "\n", "qwen2_base": "<|endoftext|>", "vicuna_v1": "</s>", "chatml": "<|im_end|>"}


def written(name, turns):
    """The text of a conversation with one image in its first question."""
    end = END[name]
    asked = [
        (f"<image><image><image><image>\n{q.strip()}".strip() if not i else q, a) for i, (q, a) in enumerate(turns)
    ]
    if name == "plain":
        return "<image>" * 4 + "".join(f"{a}\n" for _, a in turns)
    if name == "chatml":
        said = "".join(f"<|im_start|>user\n{q}{end}\n<|im_start|>assistant\n{a}{end}\n" for q, a in asked)
        return f"<|im_start|>system\nYou are a helpful assistant.{end}\n{said}"
    return f"{SYSTEM} " + "".join(f"USER: {q} ASSISTANT: {a}{end}" for q, a in asked)


@pytest.mark.parametrize("name", GOLDEN)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(turns=st.lists(st.tuples(TEXT, ANSWER), min_size=1, max_size=3))
@example(turns=[("", "\n\n a")])
@example(turns=[(" ", "e\u0301"), ("\n", " 🧭 \n")])
def test_labels_cover_exactly_the_answers(name, turns):
    processor = byte_level_processor("llava_qwen2")
    messages = conversation(*(((Mark.IMAGE, q) if not i else (q,), a) for i, (q, a) in enumerate(turns)))
    encoded = encoder(name)(messages, [picture(8, 8)])
    nfc = lambda text: unicodedata.normalize("NFC", text)  # noqa: E731
    assert processor.tokenizer.decode(encoded.input_ids) == nfc(written(name, turns))
    found = [processor.tokenizer.decode(run) for run in runs(encoded.labels.tolist())]
    expected = [nfc(answer + END[name]) for _, answer in turns]
    if name == "plain":  # nothing stands between two captions
        found, expected = ["".join(found)], ["".join(expected)]
    assert len(found) == len(expected)
    for run, answer in zip(
        found, expected, strict=True
    ):  # a tokenizer may put spaces before an answer to its first word
        assert run.endswith(answer) and not run.removesuffix(answer).strip()


def encoder(name, kept={}):  # noqa: B006 (what was made stays)
    if name not in kept:
        kept[name] = Encoder(byte_level_processor("llava_qwen2"), name)
    return kept[name]


REWRITES = (
    "{% for m in messages %}{{ m.role }}:{% for p in m.content %}{{ p.text or '<image>' }}{% endfor %}"
    "{{ '(end)' if loop.last else ' ' }}{% endfor %}"
)


@pytest.mark.parametrize(
    ("name", "source", "message"),
    [
        (
            "llava",
            None,
            r"^template must be one of auto, plain, qwen2_base, vicuna_v1, chatml, or a path that ends in .jinja, got 'llava'$",
        ),
        ("auto", None, r"^template auto: LlavaProcessor has no chat template; choose one of plain, "),
        (
            "auto",
            "{{ messages[0].content[1].text }} and all right",
            "^template auto: the model's chat template writes no <image>",
        ),
        ("auto", "{{ raise_exception('never') }}", "^template auto: the model's chat template writes no <image>"),
        ("auto", REWRITES, "^template auto: the model's chat template rewrites earlier turns"),
    ],
)
def test_templates_that_do_not_fit(name, source, message):
    processor = processor_of("trained", source)
    with pytest.raises(ValueError, match=message) as error:
        Encoder(processor, name)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("way", ["tojson", "string", "tojson | e", "tojson | replace('type', 'kind')"])
def test_parts_that_a_template_would_write_out_are_given_as_plain_text(way):
    tokenizer = byte_level_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.content is string %}{{ m.content }}"
        "{% else %}{{ m.content | " + way + " }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    found = Template(tokenizer)(conversation((("How many?",), "One.")))
    assert [found.text[start:stop] for start, stop in found.answers] == ["One.<|im_end|>"]
    assert "\nHow many?<|im_end|>" in found.text


@pytest.mark.parametrize(("name", "mark"), [("qwen2_base", r"<\|endoftext\|>"), ("chatml", r"<\|im_start\|>")])
def test_a_tokenizer_without_the_marks_of_a_template(name, mark):
    with pytest.raises(ValueError, match=f"^template {name} needs the token {mark}, which the tokenizer does not have"):
        Template(build_tokenizer(), name)
    assert Template(build_tokenizer(), "vicuna_v1").source and set(GOLDEN) | {"auto"} == set(TEMPLATES)


def test_a_template_is_what_a_trained_model_is_asked_with():
    """Its source does as chat template: the prompt is what stood before the answer in training."""
    processor = byte_level_processor("llava_qwen2")
    for name in GOLDEN:
        template = Template(processor, name)
        text, answers = template(ASKED)
        chat = [
            {
                "role": m.role,
                "content": [{"type": "image"} if p is Mark.IMAGE else {"type": "text", "text": p} for p in m.parts],
            }
            for m in ASKED[:3]
        ]
        prompt = processor.apply_chat_template(chat, chat_template=template.source, add_generation_prompt=True)
        assert prompt == text[: answers[1][0]]


def test_answers_that_run_into_the_question_are_refused():
    source = CHAT_TEMPLATE.replace('{{- " " -}}\n        {%- generation', "{%- generation")
    assert source != CHAT_TEMPLATE
    tokenizer = build_tokenizer()
    tokenizer.chat_template = source
    with pytest.raises(BadSampleError, match=r"the tokenizer has no tokens for 'Yes\. </s>' after '.* ASSISTANT:'"):
        Encoder(tokenizer)
