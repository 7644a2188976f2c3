"""The built-in task's English in another tokenizer: pieces of words, with another chat template than the task's own."""

from __future__ import annotations

from functools import cache

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from cdistill.builtin import questions, scenes
from cdistill.data.samples import IMAGE_TOKEN

SIZE = 400  # all bytes, the special tokens, and 140 pieces: a third of the words are of two, some of three
SPECIAL = ("<pad>", "<|im_start|>", "<|im_end|>", IMAGE_TOKEN)

# As ChatML, which writes no system message here.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
    {{- "<|im_start|>" ~ message.role ~ "\\n" -}}
    {%- set parts = [{"type": "text", "text": message.content}] if message.content is string else message.content -%}
    {%- if message.role == "assistant" -%}
        {%- generation -%}
            {%- for part in parts -%}{{- part.text -}}{%- endfor -%}{{- "<|im_end|>" -}}
        {%- endgeneration -%}
    {%- else -%}
        {%- for part in parts -%}
            {{- "<image>\\n" if part.type == "image" else part.text ~ ("" if loop.last else " ") -}}
        {%- endfor -%}
        {{- "<|im_end|>" -}}
    {%- endif -%}
    {{- "\\n" -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- "<|im_start|>assistant\\n" -}}{%- endif -%}
"""


@cache
def _trained() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=SIZE,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    words = sorted({*scenes.words(), *questions.WORDS})
    tokenizer.train_from_iterator([f"{word} {word}" for word in words], trainer)
    return tokenizer.to_str()


def build_subword_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of `SIZE` tokens over the task's words, with its chat template; a fixed function of the words."""
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_trained()),
        pad_token="<pad>",
        eos_token="<|im_end|>",
        extra_special_tokens={"image_token": IMAGE_TOKEN},
        padding_side="right",
        chat_template=CHAT_TEMPLATE,
    )
