"""Prompt and labels against transformers itself: for every tokenizer and template, what is learned follows the prompt.

`CDISTILL_TOKENIZERS` may name folders of real tokenizers, separated by colons, which then take part.
"""

import os
from functools import cache
from pathlib import Path

import pytest
from conversation_cases import byte_level_tokenizer, conversation
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from cdistill.data.contract import LabelContract
from cdistill.data.samples import BadSampleError, Message

SPECIAL = ["<unk>", "<s>", "</s>", "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
LLAMA_3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|im_start|>' + m.role + '<|endoftext|>\n\n' }}"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content | trim + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ m.content | trim + '<|im_end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant<|endoftext|>\n\n' }}{% endif %}"
)
TRAILING_SPACE = (
    "{% for m in messages %}{% if m.role == 'assistant' %}ASSISTANT: {% generation %}{{ m.content }}</s>{% endgeneration %}"
    "{% else %}USER: {{ m.content }} {% endif %}{% endfor %}{% if add_generation_prompt %}ASSISTANT: {% endif %}"
)
UNMARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# As LLaVA-OneVision's: another space than in the prompt, and what ends an answer is not marked.
ONEVISION = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + ' ' }}{% if m.role == 'assistant' %}{% generation %}{{ '\n' }}"
    "{{ m.content }}{% endgeneration %}{% else %}{{ '\n' + m.content }}{% endif %}{{ '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
OWN = {"llama3": LLAMA_3, "space": TRAILING_SPACE, "unmarked": UNMARKED, "onevision": ONEVISION}
END = {"qwen2_base": "<|endoftext|>", "vicuna_v1": "</s>", "space": "</s>"}
ANSWERS = [
    *(
        "Yes",
        "3",
        "2 dogs",
        "1998",
        "-1",
        "(A)",
        '"red"',
        "漢字です",
        "猫",
        "😀",
        "สวัสดี",
        "نعم",
        "é",
        "Ωmega",
        " x",
        "  3",
    ),
    *("\nx", "\n\n\n3", "\t1", "a\n", "say <|im_end|> or </s> twice", "<s>3</s>", "<|im_start|>assistant\nno"),
]


def sentencepiece_like(scheme):
    """A BPE over whole texts with byte fallback: Llama 2's (a space before every piece, or the first) or Gemma's (none)."""
    merges = [("e", "s"), ("Y", "es"), ("▁", "Yes"), ("▁", "x"), ("▁", "▁"), ("\n", "\n"), ("▁", "2"), ("▁", "(")]
    parts = [*SPECIAL, *(f"<0x{i:02X}>" for i in range(256)), *map(chr, range(33, 127)), "\n", "▁", "猫", "é"]
    vocab = {part: i for i, part in enumerate(dict.fromkeys([*parts, *("".join(pair) for pair in merges)]))}
    tokenizer = Tokenizer(models.BPE(vocab, merges, byte_fallback=True, unk_token="<unk>"))
    if scheme is None:
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            *([decoders.Strip(" ", 1, 0)] if scheme else []),
        ]
    )
    return wrapped(tokenizer)


def wrapped(tokenizer, bos=True):
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"}
    result = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named)
    result.add_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL], special_tokens=True)
    return result


@cache
def tokenizer_of(kind):
    if kind == "qwen":
        return byte_level_tokenizer()
    if kind in ("always", "first", "gemma"):
        return sentencepiece_like(None if kind == "gemma" else kind)
    tokenizer = AutoTokenizer.from_pretrained(kind)
    tokenizer.add_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL], special_tokens=True)
    tokenizer.pad_token = tokenizer.pad_token or "<unk>"
    return tokenizer


REAL = [folder for folder in os.environ.get("CDISTILL_TOKENIZERS", "").split(":") if folder]


def contract_of(kind, template, folder):
    if template not in OWN:
        return LabelContract(tokenizer_of(kind), template)
    path = Path(folder) / f"{template}.jinja"
    if template != "unmarked":
        path.write_text(OWN[template], encoding="utf-8")
        return LabelContract(tokenizer_of(kind), str(path))
    tokenizer, before = tokenizer_of(kind), tokenizer_of(kind).chat_template
    tokenizer.chat_template = UNMARKED
    try:
        return LabelContract(tokenizer)
    finally:
        tokenizer.chat_template = before


@pytest.mark.parametrize("template", ["qwen2_base", "vicuna_v1", "chatml", *OWN])
@pytest.mark.parametrize("kind", ["qwen", "always", "first", "gemma", *REAL])
def test_prompt_and_labels_are_what_generation_gives_and_has_to_give(kind, template, tmp_path):
    contract = contract_of(kind, template, tmp_path)
    tokenizer, end = contract.tokenizer, END.get(template, "<|im_end|>")
    assert contract.end_ids == (tokenizer.convert_tokens_to_ids(end),)
    for answer in ANSWERS:
        ids, labelled = contract(conversation((("How many?",), answer)))
        chat = [{"role": "user", "content": "How many?"}]
        options = {"chat_template": contract.template.source, "add_generation_prompt": True, "return_dict": False}
        prompt = tokenizer.apply_chat_template(chat, **options)
        assert ids[: len(prompt)] == prompt == contract.prompt_ids([Message("user", ("How many?",))]), answer
        stop = len(ids) - labelled[::-1].argmax()
        assert not labelled[: len(prompt)].any() and labelled[len(prompt) : stop].all(), answer
        learned = ids[len(prompt) : stop]
        assert learned[-1] in contract.end_ids and not set(learned[:-1]) & set(contract.end_ids)
        space = " " if template in ("qwen2_base", "vicuna_v1") else ""
        said = answer.strip() if template == "llama3" else answer
        found = tokenizer.decode(ids[:stop], clean_up_tokenization_spaces=False)
        assert found.endswith(tokenizer.decode(prompt, clean_up_tokenization_spaces=False) + space + said + end), answer
        if answer.isascii() and "<" not in answer and template not in ("onevision", "plain"):
            text = contract.template(conversation((("How many?",), answer))).text
            whole = contract.text_ids(text)
            if whole[: len(prompt)] == prompt:  # else a token reaches over the border
                assert ids == whole


def test_every_turn_is_learned(tmp_path):
    for template in ("qwen2_base", "chatml", *OWN):
        contract = contract_of("qwen", template, tmp_path)
        ids, labelled = contract(conversation((("How many?",), "3"), (("Sure </s>?",), "\nYes"), (("See?",), "One.")))
        ends = [i for i, token in enumerate(ids) if token in contract.end_ids and labelled[i]]
        assert len(ends) == 3
        assert contract.prompt_ids([Message("user", ("How many?",))]) == ids[: labelled.argmax()]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (None, "the file cannot be read"),
        ("{% for m in messages %}{% generation %}", "line "),
        (
            "{% for m in messages %}{{ m.content }}</s>{% endfor %}",
            "put {% generation %} and {% endgeneration %} around",
        ),
        ("{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}\n{% endfor %}", "no special token"),
        (
            "{{ raise_exception('no ' ~ messages[0].role) }}{% generation %}{% endgeneration %}",
            "refuses messages of user",
        ),
        (
            "{% for m in messages %}{% generation %}{{ m.content }}</s>{% endgeneration %}{% endfor %}"
            "{% if add_generation_prompt %}<think>{% endif %}",
            "ends its generation prompt in '<think>'",
        ),
    ],
)
def test_files_that_cannot_be_learned_from(source, message, tmp_path):
    path = tmp_path / "own.jinja"
    if source is not None:
        path.write_text(source, encoding="utf-8")
    with pytest.raises(ValueError, match=f"^template {path}: .*{message}") as error:
        LabelContract(tokenizer_of("qwen"), str(path))
    assert "\n" not in str(error.value)


def test_a_role_that_a_template_refuses_makes_a_bad_sample(tmp_path):
    path = tmp_path / "own.jinja"
    refusal = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}{% endfor %}"
    )
    path.write_text(refusal + TRAILING_SPACE, encoding="utf-8")
    with pytest.raises(BadSampleError, match=r"refuses messages of system, user, assistant: no system$"):
        LabelContract(tokenizer_of("qwen"), str(path))([Message("system", ("x",)), *conversation((("a",), "b"))])


def test_a_token_of_the_vocabulary_that_no_text_has_ends_no_answers():
    """As of Qwen 3, whose vocabulary has "</s>" for another purpose, and which reads three tokens in it."""
    vocab = {"<unk>": 0, "</s>": 1, "<": 2, "/": 3, "s": 4, ">": 5, "a": 6}
    plain = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(vocab, [])), pad_token="<unk>")
    with pytest.raises(
        ValueError, match="needs the token </s>, which the tokenizer does not have as a token of its own"
    ):
        LabelContract(plain, "vicuna_v1")
    plain.add_special_tokens({"eos_token": "</s>"})
    assert LabelContract(plain, "vicuna_v1").end_ids == (1,)


def test_a_tokenizer_that_ends_every_text_is_refused():
    class Processor:
        def __init__(self, tokenizer):
            self.tokenizer = tokenizer

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(tokenizer_of("first").backend_tokenizer.to_str())
    )
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    with pytest.raises(ValueError, match="adds </s> after every text"):
        LabelContract(Processor(tokenizer), "vicuna_v1")
