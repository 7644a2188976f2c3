"""Templates: how a conversation becomes the text that a model reads, and which of its characters are answers."""

from __future__ import annotations

import json
import re
from bisect import bisect_left
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import TemplateError
from transformers.utils.chat_template_utils import _compile_jinja_template, render_jinja_template

from cdistill.choices import TEMPLATE_FILE, TEMPLATES
from cdistill.data.samples import IMAGE_TOKEN, BadSampleError, Mark, Message
from cdistill.errors import InputError

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
# Special tokens of models that belong to what is said: places in an image, and thoughts.
_CONTENT = re.compile(r"[<\[][|/]?(object_ref|ref|box|quad|point|loc|seg|think)", re.IGNORECASE)
_PRIVATE_USE = range(0xE000, 0xF900)
_WRITTEN_OUT = "cdistill"  # a key of parts, which a template shows that writes them as they are (by tojson, for one)

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
TURNS = """\
{{- (said(messages[0]) if messages[0].role == "system" else system) ~ " " -}}
{%- for message in messages -%}
    {%- if message.role == "user" -%}
        {{- "USER: " ~ said(message) ~ " " -}}
    {%- elif message.role == "assistant" -%}
        {{- "ASSISTANT:" -}}
        {%- generation -%}{{- " " ~ said(message) ~ end -}}{%- endgeneration -%}
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
    "qwen2_base": _Named(TURNS, "<|endoftext|>", tokens=("<|endoftext|>",)),
    "vicuna_v1": _Named(TURNS, "</s>", tokens=("</s>",)),
    "chatml": _Named(_CHATML, "<|im_end|>", "You are a helpful assistant.", ("<|im_start|>", "<|im_end|>")),
}


_CHOOSE = f"choose one of {', '.join(_NAMED)}, or give a {TEMPLATE_FILE} file of your own"


class Rendered(NamedTuple):
    """A conversation as text; ``answers`` are the [start, stop) characters of what the assistant has to write."""

    text: str
    answers: list[tuple[int, int]]


class Template:
    """Writes conversations as a named template, a file or a model's own chat template does.

    ``plain`` (captions: the question is left out), ``qwen2_base``, ``vicuna_v1`` and ``chatml`` are those of LLaVA's training
    code. ``auto`` is the chat template of the processor, or of the tokenizer. A path that ends in ``.jinja`` is a chat
    template of one's own, with ``{% generation %}`` blocks around answers.

    An answer begins where the generation prompt ends, and stops after the token that closes it. Where a template marks
    answers as generated, the mark says where one stops, else what the assistant's turn adds does. A closing token that
    the template writes right behind its mark belongs to the answer, and a generation prompt that ends in other white space
    than the template writes before an answer takes its place, because a model is asked with the generation prompt.

    Args:
        processor: of a multimodal model, or a tokenizer.
        name: one of `cdistill.choices.TEMPLATES`, or the path of a file.

    Attributes:
        source: the template in Jinja, to be kept as chat template of models that were trained with it. For a tokenizer by
            itself a named one writes the BOS that the tokenizer puts before every text: transformers' tokenizers add none
            to a chat, while its processors do.
        end: the token that closes every answer; None for ``plain``, whose line break is often part of another token.
        remarks: lines on what was chosen because the template leaves it open.

    Raises:
        ValueError: an unknown name, a file that is missing, wrong or without marks, a tokenizer without the tokens of the
            template, or a chat template that cannot be learned from: it writes no mark for an image, closes an answer with no
            special token, rewrites earlier turns, or has another generation prompt than it writes before an answer.
    """

    def __init__(self, processor: Any, name: str = "auto") -> None:
        if name not in TEMPLATES and not name.endswith(TEMPLATE_FILE):
            raise InputError(
                f"template must be one of {', '.join(TEMPLATES)}, or a path that ends in {TEMPLATE_FILE}, got {name!r}"
            )
        tokenizer = getattr(processor, "tokenizer", processor)
        self.name, self._special_tokens = name, dict(tokenizer.special_tokens_map)
        takes_images = getattr(processor, "image_processor", None) is not None
        self.image_token: str | None = getattr(processor, "image_token", None) if takes_images else None
        if takes_images and self.image_token is None:
            raise InputError(f"{type(processor).__name__} has no image_token, by which its images are placed in a text")
        self._image = _image_mark(self.image_token or IMAGE_TOKEN)
        added = getattr(tokenizer, "added_tokens_decoder", {}).values()
        self._special = sorted({str(t) for t in added if t.special}, key=len, reverse=True)
        control = [re.escape(t) for t in self._special if len(t) > 1 and not _CONTENT.match(t)]
        self._control = re.compile("|".join(control)) if control else None
        named = _NAMED.get(name)
        self._named = named is not None
        if named is not None:
            self.source = _named_template(named, self._image, bos=processor is tokenizer and _puts_bos(tokenizer))
        else:
            self.source = _own_template(processor, tokenizer) if name == "auto" else _template_file(name)
        missing = [t for t in named.tokens if not _reads(tokenizer, t)] if named is not None else []
        if missing:
            raise InputError(
                f"template {name} needs the token {missing[0]}, which the tokenizer does not have as a token of its own; "
                "choose another template"
            )
        self._about = "template auto: the model's chat template" if name == "auto" else f"template {name}: the file"
        self._marks_answers = GENERATION.search(self.source) is not None
        self._takes_parts = named is not None or self._probe(parts=True)
        if not self._takes_parts and not self._probe(parts=False):
            raise InputError(self._unwritten())
        self.remarks: tuple[str, ...] = ()
        self.end: str | None = named.end if named is not None and named.end in named.tokens else None
        if named is None and self._special:
            self._find_end()

    @property
    def replaces_own(self) -> bool:
        """Whether chats are written by another template than the processor's, which has to go with what is trained."""
        return self.name not in ("auto", "plain")

    def __call__(self, messages: Sequence[Message]) -> Rendered:
        """The text of a conversation that ends with an answer.

        Raises:
            BadSampleError: the template refuses the messages, writes them otherwise when the conversation grows, or does not
                close an answer as it closes others.
        """
        return self.rendered(messages)[0]

    def rendered(self, messages: Sequence[Message]) -> tuple[Rendered, list[int]]:
        """As a call, and the places where the text has to be cut to keep words of a message from being read as a special
        token: each lies inside of one that was written out in a message."""
        filler, chat = self._chat(messages)
        found = self._spans(chat)
        if filler is None:
            return found, []
        removed = [i for i, character in enumerate(found.text) if character == filler]
        moved = [(a - bisect_left(removed, a), b - bisect_left(removed, b)) for a, b in found.answers]
        return Rendered(found.text.replace(filler, ""), moved), [at - i for i, at in enumerate(removed)]

    def prompt(self, messages: Sequence[Message]) -> tuple[str, list[int]]:
        """The text that asks for an answer to messages of which the last is the user's, and where it has to be cut."""
        filler, chat = self._chat(messages)
        text, _ = self._render(chat, add_generation_prompt=True)
        if filler is None:
            return text, []
        removed = [i for i, character in enumerate(text) if character == filler]
        return text.replace(filler, ""), [at - i for i, at in enumerate(removed)]

    def _chat(self, messages: Sequence[Message]) -> tuple[str | None, list[dict[str, Any]]]:
        """Messages for the template, and the character that stands inside of special tokens written out in them."""
        words = [part for message in messages for part in message.parts if isinstance(part, str)]
        filler = None
        if self._control is not None and any(self._control.search(part) for part in words):
            filler = next(c for c in map(chr, _PRIVATE_USE) if not any(c in part for part in words))
        return filler, [self._chat_message(message, self._takes_parts, filler) for message in messages]

    def _spans(self, chat: list[dict[str, Any]]) -> Rendered:
        """The text of messages, and its answers: for templates of others by writing the prompt of every turn, too."""
        text, all_marks = self._render(chat)
        if self._named:
            return Rendered(text, [(start, stop) for start, stop in all_marks if start < stop])
        written, answers, done = "", [], 0
        for turn, message in enumerate(chat):
            if message["role"] != "assistant":
                continue
            last = turn + 1 == len(chat)
            after, marks = (text, all_marks) if last else self._render(chat[: turn + 1])
            stop = marks[-1][1] if marks else len(after.rstrip())
            if text[:stop] != after[:stop]:
                raise BadSampleError(
                    "labels",
                    f"{self._about} rewrites earlier turns, so answers cannot be found in its text; {_CHOOSE}",
                )
            prompt, _ = self._render(chat[:turn], add_generation_prompt=True)
            kept, start = self._meet(prompt, text, done, message)
            if stop <= start or (self._marks_answers and not marks):
                raise BadSampleError("labels", f"{self._about} marks nothing of an answer as generated; {_CHOOSE}")
            stop = self._closed(text, start, stop)
            written += text[done:kept] + prompt[kept:]
            answers.append((len(written), len(written) + stop - start))
            written += text[start:stop]
            done = stop
        return Rendered(written + text[done:], answers)

    def _meet(self, prompt: str, text: str, done: int, answer: dict[str, Any]) -> tuple[int, int]:
        """Where text and generation prompt part, and where the answer begins in the text after the same white space."""
        if text.startswith(prompt):
            return len(prompt), len(prompt)
        kept = _common_prefix(prompt, text)
        spaces = len(text[kept:]) - len(text[kept:].lstrip())
        if kept < done or prompt[kept:].strip():
            raise BadSampleError(
                "labels",
                f"{self._about} ends its generation prompt in {prompt[kept:][-40:]!r}, but writes {text[kept:][:40]!r} there; "
                f"{_CHOOSE}",
            )
        content = answer["content"]
        words = content if isinstance(content, str) else "".join(part.get("text", "") for part in content)
        own = words[: len(words) - len(words.lstrip())]
        return kept, kept + spaces - (len(own) if text[kept : kept + spaces].endswith(own) else 0)

    def _closed(self, text: str, start: int, stop: int) -> int:
        """The place behind the token that closes an answer."""
        if not self._special:
            return stop
        said = text[start:stop].rstrip()
        end = next((t for t in self._special if said.endswith(t)), None)
        if end is not None:
            stop = start + len(said)
        elif self._marks_answers:
            behind = text[stop:].lstrip()
            end = next((t for t in self._special if behind.startswith(t)), None)
            stop = len(text) - len(behind) + len(end or "")
        if end is None or end != (self.end or end):
            raise BadSampleError(
                "labels",
                f"{self._about} closes an answer with {end or 'no special token'}"
                f"{'' if self.end is None else f', others with {self.end}'}, so a model would not learn to stop; {_CHOOSE}",
            )
        return stop

    def _find_end(self) -> None:
        """Write a conversation of two turns, and see which token closes an answer."""
        said = ("all right", "not quite")
        messages = [m for words in said for m in (Message("user", ("see this",)), Message("assistant", (words,)))]
        try:
            text, answers = self(messages)
            self.end = next(t for t in self._special if text[slice(*answers[0])].endswith(t))
            self(messages)
        except BadSampleError as error:
            raise InputError(error.detail) from None
        chat = self._chat(messages)[1]
        full, marks = self._render(chat)
        prompt, _ = self._render(chat[:1], add_generation_prompt=True)
        remarks = []
        if self._marks_answers and not full[: marks[-1][1]].rstrip().endswith(self.end):
            remarks.append(f"{self._about} does not mark {self.end}, which closes an answer; it is learned, too")
        if not full.startswith(prompt):
            kept = _common_prefix(prompt, full)
            before = full[kept : full.index(said[0])]
            remarks.append(
                f"{self._about} writes {before!r} before an answer, and {prompt[kept:]!r} to ask for one; the latter is used"
            )
        self.remarks = tuple(remarks)

    def _render(self, chat: list[dict[str, Any]], **options: Any) -> tuple[str, list[tuple[int, int]]]:
        try:
            rendered: Any = render_jinja_template(
                conversations=[chat],
                chat_template=self.source,
                return_assistant_tokens_mask=self._marks_answers,
                **self._special_tokens,
                **options,
            )
        except (TemplateError, TypeError) as error:
            roles = ", ".join(message["role"] for message in chat)
            raise BadSampleError(
                "chat template", f"{self._about} refuses messages of {roles}: {_line(error)}"
            ) from None
        (text,), answers = rendered
        return text, answers[0] if answers else []

    def _chat_message(self, message: Message, parts: bool, filler: str | None = None) -> dict[str, Any]:
        said: Sequence[str | Mark] = message.parts if self._named else _without_breaks_at_images(message.parts)
        if filler is not None and self._control is not None:
            said = [
                part if isinstance(part, Mark) else self._control.sub(lambda m: m[0][0] + filler + m[0][1:], part)
                for part in said
            ]
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
        chat = [self._chat_message(message, parts) for message in messages]
        for part in (part for message in chat for part in (message["content"] if parts else ())):
            part[_WRITTEN_OUT] = ""
        try:
            text, _ = self._render(chat)
        except BadSampleError as error:
            self._refusal = error.detail
            return False
        images = text.count(self.image_token) if self.image_token else 0
        return "see this" in text and "all right" in text and _WRITTEN_OUT not in text and images == len(image)

    def _unwritten(self) -> str:
        refusal = getattr(self, "_refusal", None)
        if refusal is not None and self.name != "auto":
            return refusal
        return f"{self._about} writes no {self.image_token or 'text'} for such a part of a message; {_CHOOSE}"


def _puts_bos(tokenizer: Any) -> bool:
    """Whether a tokenizer begins every text with its BOS."""
    return callable(tokenizer) and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]


def _reads(tokenizer: Any, token: str) -> bool:
    """Whether a tokenizer finds a token in a text; one that its vocabulary has may be a part that it never makes of it."""
    found = tokenizer("a" + token, add_special_tokens=False)["input_ids"]
    return found[-1:] == [tokenizer.get_vocab().get(token)]


def _image_mark(image_token: str) -> str:
    """What a template writes where an image stands; processors of Qwen's models expand the token between two marks."""
    return f"<|vision_start|>{image_token}<|vision_end|>" if image_token == "<|image_pad|>" else image_token


def _named_template(named: _Named, image: str, *, bos: bool) -> str:
    values = {"image": image, "end": named.end, "system": named.system}
    head = "".join(f"{{%- set {k} = {json.dumps(v)} -%}}\n" for k, v in values.items())
    return head + _SAID + ("{{- bos_token -}}\n" if bos else "") + named.body


def template_source(body: str, end: str, system: str = SYSTEM, image: str = IMAGE_TOKEN) -> str:
    """A chat template in Jinja for a processor, which puts a BOS before texts itself.

    Args:
        body: writes ``messages``, each by ``said(message)``, and a prompt where ``add_generation_prompt`` is true.
        end: what closes an answer, ``end`` in the body.
        system: ``system`` in the body.
        image: mark of an image.
    """
    return _named_template(_Named(body, end, system), image, bos=False)


def _common_prefix(one: str, other: str) -> int:
    """How many characters two texts begin with in common."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


def _template_file(name: str) -> str:
    try:
        source = Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"template {name}: the file cannot be read ({_line(error)})") from None
    try:
        _compile_jinja_template(source)
    except TemplateError as error:
        raise InputError(f"template {name}: line {getattr(error, 'lineno', '?')}: {_line(error)}") from None
    if GENERATION.search(source) is None:
        raise InputError(
            f"template {name}: put {{% generation %}} and {{% endgeneration %}} around what the assistant writes: it marks no "
            "answer"
        )
    return source


def _own_template(processor: Any, tokenizer: Any) -> str:
    source = getattr(processor, "chat_template", None) or tokenizer.chat_template
    if isinstance(source, dict):
        source = source.get("default")
    if not source:
        raise InputError(f"template auto: {type(processor).__name__} has no chat template; {_CHOOSE}")
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
