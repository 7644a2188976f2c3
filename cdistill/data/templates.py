"""Templates: how a conversation becomes the text that a model reads, and which of its characters are answers."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from jinja2 import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from cdistill.data.mixture import TEMPLATES
from cdistill.data.samples import Mark, Message

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")

# As LLaVA prepares its data: the only image of a message comes first, with a line break between it and the words.
# Several images stay where they stand.
_SAID = """\
{%- macro said(message) -%}
    {%- set parts = [{"type": "text", "text": message.content}] if message.content is string else message.content -%}
    {%- set images = parts | selectattr("type", "equalto", "image") | list -%}
    {%- if images | length == 1 -%}
        {%- set words = parts | selectattr("type", "equalto", "text") | map(attribute="text") | join -%}
        {{- (image ~ "\\n" ~ words | trim) | trim -}}
    {%- else -%}
        {%- for part in parts -%}{{- image if part.type == "image" else part.text -}}{%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
"""
_PLAIN = """\
{%- for message in messages -%}
    {%- if message.role == "assistant" -%}
        {%- generation -%}{{- said(message) ~ end -}}{%- endgeneration -%}
    {%- elif message.role == "user" and message.content is not string -%}
        {%- for part in message.content if part.type == "image" -%}{{- image -}}{%- endfor -%}
    {%- endif -%}
{%- endfor -%}
"""
_TURNS = """\
{{- (said(messages[0]) if messages[0].role == "system" else system) ~ " " -}}
{%- for message in messages -%}
    {%- if message.role == "user" -%}
        {{- "USER: " ~ said(message) ~ " " -}}
    {%- elif message.role == "assistant" -%}
        {{- "ASSISTANT: " -}}
        {%- generation -%}{{- said(message) ~ end -}}{%- endgeneration -%}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- "ASSISTANT:" -}}{%- endif -%}
"""
_CHATML = """\
{%- if messages[0].role != "system" -%}{{- "<|im_start|>system\\n" ~ system ~ "<|im_end|>\\n" -}}{%- endif -%}
{%- for message in messages -%}
    {{- "<|im_start|>" ~ message.role ~ "\\n" -}}
    {%- if message.role == "assistant" -%}
        {%- generation -%}{{- said(message) ~ end -}}{%- endgeneration -%}
    {%- else -%}
        {{- said(message) ~ end -}}
    {%- endif -%}
    {{- "\\n" -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- "<|im_start|>assistant\\n" -}}{%- endif -%}
"""


class _Named(NamedTuple):
    body: str
    end: str  # what closes an answer, and is a label like its words
    system: str = SYSTEM
    tokens: tuple[str, ...] = ()  # marks that the tokenizer must know as one token each


_NAMED = {
    "plain": _Named(_PLAIN, "\n"),
    "qwen2_base": _Named(_TURNS, "<|endoftext|>", tokens=("<|endoftext|>",)),
    "vicuna_v1": _Named(_TURNS, "</s>", tokens=("</s>",)),
    "chatml": _Named(_CHATML, "<|im_end|>", "You are a helpful assistant.", ("<|im_start|>", "<|im_end|>")),
}


class Rendered(NamedTuple):
    """A conversation as text; ``answers`` are the [start, stop) characters of what the assistant has to write."""

    text: str
    answers: list[tuple[int, int]]


class Template:
    """Writes conversations as a named template or a model's own chat template does.

    ``plain`` (captions: the question is left out), ``qwen2_base``, ``vicuna_v1`` and ``chatml`` are those of LLaVA's training
    code; a BOS comes from tokenizers that put one before every text. ``auto`` is the chat template of the processor, or
    of the tokenizer: answers are what it marks as generated or, where it marks nothing, what is added by each of
    the assistant's turns.

    Args:
        processor: of a multimodal model, or a tokenizer.
        name: one of `cdistill.data.mixture.TEMPLATES`.

    Attributes:
        source: the template in Jinja, to be kept as chat template of models that were trained with it.

    Raises:
        ValueError: an unknown name, a tokenizer without the marks of the template, or for ``auto`` no chat template, or
            one that writes no mark for an image.
    """

    def __init__(self, processor: Any, name: str = "auto") -> None:
        if name not in TEMPLATES:
            raise ValueError(f"template must be one of {', '.join(TEMPLATES)}, got {name!r}")
        tokenizer = getattr(processor, "tokenizer", processor)
        self.name, self._special_tokens = name, dict(tokenizer.special_tokens_map)
        takes_images = getattr(processor, "image_processor", None) is not None
        self.image_token: str | None = getattr(processor, "image_token", None) if takes_images else None
        if takes_images and self.image_token is None:
            raise ValueError(f"{type(processor).__name__} has no image_token, by which its images are placed in a text")
        self._image = _image_mark(self.image_token or "<image>")
        self.source = _own_template(processor, tokenizer) if name == "auto" else _named_template(name, self._image)
        missing = [] if name == "auto" else [t for t in _NAMED[name].tokens if t not in tokenizer.get_vocab()]
        if missing:
            raise ValueError(
                f"template {name} needs the token {missing[0]}, which the tokenizer does not have; choose another template"
            )
        self._marks_answers = GENERATION.search(self.source) is not None
        self._takes_parts = name != "auto" or self._probe(parts=True)
        if not self._takes_parts and not self._probe(parts=False):
            raise ValueError(
                f"template auto: the model's chat template writes no {self.image_token or 'text'} for such a part of a "
                f"message; choose one of {', '.join(_NAMED)}"
            )

    def __call__(self, messages: Sequence[Message]) -> Rendered:
        """The text of a conversation that ends with an answer.

        Raises:
            ValueError: without generation blocks, a template that changes what it wrote when the conversation grows.
        """
        chat = [self._chat_message(message, self._takes_parts) for message in messages]
        if self._marks_answers:
            text, answers = self._render(chat)
            return Rendered(text, [(start, stop) for start, stop in answers if start < stop])
        text, _ = self._render(chat)
        answers = []
        for turn, message in enumerate(messages):
            if message.role == "assistant":
                before, _ = self._render(chat[:turn], add_generation_prompt=True)
                after = self._render(chat[: turn + 1])[0].rstrip()
                if not after.startswith(before) or not text.startswith(after):
                    raise ValueError(
                        "template auto: the model's chat template rewrites earlier turns, so answers cannot be found in "
                        f"its text; choose one of {', '.join(_NAMED)}"
                    )
                answers.append((len(before), len(after)))
        return Rendered(text, answers)

    def _render(self, chat: list[dict[str, Any]], **options: Any) -> tuple[str, list[tuple[int, int]]]:
        rendered: Any = render_jinja_template(
            conversations=[chat],
            chat_template=self.source,
            return_assistant_tokens_mask=self._marks_answers,
            **self._special_tokens,
            **options,
        )
        (text,), answers = rendered
        return text, answers[0] if answers else []

    def _chat_message(self, message: Message, parts: bool) -> dict[str, Any]:
        said = message.parts if self.name != "auto" else _without_breaks_at_images(message.parts)
        if parts:
            content: Any = [
                {"type": "image"} if isinstance(part, Mark) else {"type": "text", "text": part} for part in said
            ]
        else:
            content = "".join(f"{self._image}\n" if isinstance(part, Mark) else part for part in said)
        return {"role": message.role, "content": content}

    def _probe(self, parts: bool) -> bool:
        """Whether the template writes messages of parts (or of plain text), images included."""
        image = (Mark.IMAGE,) if self.image_token else ()
        messages = (Message("user", (*image, "see this")), Message("assistant", ("all right",)))
        try:
            text, _ = self._render([self._chat_message(message, parts) for message in messages])
        except (TemplateError, TypeError):
            return False
        images = text.count(self.image_token) if self.image_token else 0
        return "see this" in text and "all right" in text and "'type'" not in text and images == len(image)


def _image_mark(image_token: str) -> str:
    """What a template writes where an image stands; processors of Qwen's models expand the token between two marks."""
    return f"<|vision_start|>{image_token}<|vision_end|>" if image_token == "<|image_pad|>" else image_token


def _named_template(name: str, image: str) -> str:
    named = _NAMED[name]
    values = {"image": image, "end": named.end, "system": named.system}
    return "".join(f"{{%- set {k} = {json.dumps(v)} -%}}\n" for k, v in values.items()) + _SAID + named.body


def _own_template(processor: Any, tokenizer: Any) -> str:
    source = getattr(processor, "chat_template", None) or tokenizer.chat_template
    if isinstance(source, dict):
        source = source.get("default")
    if not source:
        raise ValueError(
            f"template auto: {type(processor).__name__} has no chat template; choose one of {', '.join(_NAMED)}"
        )
    return source


def _without_breaks_at_images(parts: Sequence[str | Mark]) -> list[str | Mark]:
    """The parts without line breaks beside images: a chat template has its own."""
    result: list[str | Mark] = []
    for i, part in enumerate(parts):
        if isinstance(part, str):
            part = part.lstrip("\n") if i and isinstance(parts[i - 1], Mark) else part
            part = part.rstrip("\n") if i + 1 < len(parts) and isinstance(parts[i + 1], Mark) else part
        if part != "":
            result.append(part)
    return result
