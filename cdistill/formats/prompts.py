"""How the projects put a question to their models, as chat templates in Jinja: their conversation modes by their names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from cdistill.data.templates import SYSTEM, TURNS, template_source
from cdistill.errors import InputError
from cdistill.formats.source import KEY

_INSTRUCT = """\
{%- for message in messages -%}
    {%- if message.role == "user" -%}
        {{- "[INST] " -}}
        {%- if loop.index0 == 1 and messages[0].role == "system" -%}
            {{- "<<SYS>>\\n" ~ said(messages[0]) ~ "\\n<</SYS>>\\n\\n" -}}
        {%- endif -%}
        {{- said(message) ~ " [/INST]" -}}
    {%- elif message.role == "assistant" -%}
        {%- generation -%}{{- " " ~ said(message) ~ " " ~ end -}}{%- endgeneration -%}
    {%- endif -%}
{%- endfor -%}
"""
_DIRECT = """\
{%- if messages[0].role != "system" -%}{{- "<|im_start|>system\\n" ~ system ~ end -}}{%- endif -%}
{%- for message in messages -%}
    {{- "<|im_start|>" ~ message.role ~ "\\n" -}}
    {%- if message.role == "assistant" -%}
        {%- generation -%}{{- said(message) ~ end -}}{%- endgeneration -%}
    {%- else -%}
        {{- said(message) ~ end -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- "<|im_start|>assistant\\n" -}}{%- endif -%}
"""


class Mode(NamedTuple):
    """A conversation mode: the body of its template, what closes an answer, and what is said before everything."""

    body: str
    end: str
    system: str = SYSTEM


# LLaVA's vicuna_v1, mistral_instruct and chatml_direct; TinyLLaVA's qwen2_base (which is the authors', and Bunny's bunny and
# phi3) and qwen2_instruct; Bunny's llama.
MODES: Mapping[str, Mode] = {
    "vicuna_v1": Mode(TURNS, "</s>"),
    "qwen2_base": Mode(TURNS, "<|endoftext|>"),
    "qwen2_instruct": Mode(TURNS, "<|im_end|>"),
    "bunny_llama": Mode(TURNS, "<|end_of_text|>"),
    "mistral_instruct": Mode(_INSTRUCT, "</s>", ""),
    "chatml_direct": Mode(_DIRECT, "<|im_end|>", "Answer the questions."),
}


def chat_template(name: str, tokenizer: Any, image: str) -> tuple[str, int]:
    """A mode's template with this mark for an image, and the id of the token that closes an answer.

    Raises:
        ValueError: the tokenizer has no such token.
    """
    mode = MODES[name]
    found = tokenizer("a" + mode.end, add_special_tokens=False)["input_ids"][-1]
    if found != tokenizer.get_vocab().get(mode.end):
        raise InputError(
            f"{KEY}: the prompt {name} closes answers with {mode.end}, which is no token of the tokenizer: "
            f"choose another of {', '.join(MODES)}"
        )
    return template_source(*mode, image), int(found)
