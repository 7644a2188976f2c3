"""What is learned is what generation must produce: one template with one tokenizer, token by token."""

from __future__ import annotations

import unicodedata
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import numpy as np

from cdistill.data.samples import BadSampleError, Message, blamed_on_sample
from cdistill.data.templates import Rendered, Template
from cdistill.errors import InputError

_FORMS: tuple[Literal["NFC", "NFKC"], ...] = ("NFC", "NFKC")  # what tokenizers may do to a text
_GLUE = ("", "\ue000", "\u3001", "a")


class Tokens(NamedTuple):
    """Tokens of a text, and the [start, stop) characters of it that each stands for; none where nobody asks for them."""

    ids: list[int]
    offsets: list[tuple[int, int]]

    def after(self, count: int) -> Tokens:
        """Without the first ones."""
        return Tokens(self.ids[count:], self.offsets[count:])

    def then(self, others: Tokens) -> Tokens:
        """With others behind."""
        return Tokens(self.ids + others.ids, self.offsets + others.offsets)


class Written(NamedTuple):
    """A conversation in tokens, which of them are labels, (T,) bool, and the text that they are tokens of."""

    tokens: Tokens
    labels: np.ndarray
    rendered: Rendered


class LabelContract:
    """Tokens of conversations, of their generation prompts, and of what ends an answer, which always fit together.

    The tokens of a conversation are those of the generation prompt of a turn, followed by those of the answer, all of which
    are labels, the last of them being the one that ends generation. They are the tokens of the whole text wherever its
    tokens begin with those of the prompt. Where a token would reach over that border (a prompt that ends in a space
    and an answer that begins with a letter, two line breaks), the text is cut there, as it is in generation.

    A special token that a message spells out is read as the words it is written in.

    Args:
        processor: of a multimodal model, or a tokenizer; the tokenizer must be a fast one with a pad token.
        template: as for `cdistill.data.templates.Template`.
        offsets: find the characters of every token, too.

    Attributes:
        template: the `Template`.
        end_ids: tokens that end an answer, at which generation has to stop; empty for ``plain``.

    Raises:
        ValueError: the template does not fit, or the tokenizer adds a token after every text, so that a prompt is over before
            an answer begins.
    """

    def __init__(self, processor: Any, template: str = "auto", *, offsets: bool = False) -> None:
        self.tokenizer = getattr(processor, "tokenizer", processor)
        self._offsets = offsets
        self.template = Template(processor, template)
        end = self.template.end
        self.end_ids: tuple[int, ...] = () if end is None else (self.tokenizer.convert_tokens_to_ids(end),)
        # transformers' tokenizers add nothing to a chat, its processors do unless the template has written a BOS.
        self._before = [] if processor is self.tokenizer else self._added_before()
        # Between special tokens texts are tokenised each by itself; with one before it a piece is no beginning of a text.
        self._anchor: str = end or self.tokenizer.pad_token

    def __call__(self, messages: Sequence[Message]) -> tuple[list[int], np.ndarray]:
        """Tokens of a conversation that ends with an answer, and which of them are labels, (T,) bool.

        Raises:
            BadSampleError: the template refuses the messages, or no tokens of an answer fit the prompt.
        """
        written = self.written(messages)
        return written.tokens.ids, written.labels

    def written(self, messages: Sequence[Message]) -> Written:
        """As a call, with the characters of the template's text that the tokens stand for, where they are asked for."""
        with blamed_on_sample("chat template"):
            rendered, cuts = self.template.rendered(messages)
        text, answers = rendered
        joined = _joined(answers)
        learned = set(learned_ranges(messages, joined))
        tokens = self._beginning(text)
        labels = [False] * len(tokens.ids)
        place = 0
        for start, stop in joined:
            before = self._tokens(text, place, start, cuts).ids
            both, prompt = self._tokens(text, place, stop, cuts), len(before)
            if both.ids[:prompt] != before:
                both = self._tokens(text, place, stop, sorted({*cuts, start}))
            self._check_end(both.ids[prompt:], text[start:stop])
            tokens = tokens.then(both)
            labels += [False] * prompt + [(start, stop) in learned] * (len(both.ids) - prompt)
            place = stop
        rest = self._tokens(text, place, len(text), cuts)
        return Written(tokens.then(rest), np.array(labels + [False] * len(rest.ids), bool), rendered)

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """Tokens that ask for an answer to messages of which the last is the user's: those of transformers'
        ``apply_chat_template(messages, add_generation_prompt=True)`` for ``template.source``, one mark for an image."""
        text, cuts = self.template.prompt(messages)
        return self._beginning(text).ids + self._tokens(text, 0, len(text), cuts).ids

    def text_ids(self, text: str) -> list[int]:
        """Tokens of a text that a template has written, as transformers makes them."""
        return self._beginning(text).ids + self._tokenize(text).ids

    def _beginning(self, text: str) -> Tokens:
        bos = self.tokenizer.bos_token
        ids = [] if bos is not None and text.startswith(bos) else list(self._before)
        return Tokens(ids, [(0, 0)] * len(ids) if self._offsets else [])

    def _added_before(self) -> list[int]:
        """Special tokens that the tokenizer puts before every text."""
        own = self.tokenizer("a", add_special_tokens=False)["input_ids"]
        whole = self.tokenizer("a")["input_ids"]
        count = len(whole) - len(own)
        if whole[count:] != own:
            raise InputError(
                f"{type(self.tokenizer).__name__} adds {self.tokenizer.convert_ids_to_tokens(whole[-1])} after every text, "
                "also after a prompt, where an answer has to follow; set add_eos_token to false in tokenizer_config.json"
            )
        return whole[:count]

    def _tokenize(self, text: str, at: int = 0) -> Tokens:
        """Tokens of a text that begins at a character of another, by whose characters they are told."""
        backend = self.tokenizer.backend_tokenizer
        backend.no_truncation()
        backend.no_padding()
        with blamed_on_sample("tokenizer"):
            made = backend.encode(text, add_special_tokens=False)
            return Tokens(made.ids, [(at + a, at + b) for a, b in made.offsets] if self._offsets else [])

    def _tokens(self, text: str, start: int, stop: int, cuts: Sequence[int]) -> Tokens:
        """Tokens of a stretch of a text whose beginning is the text's or follows a special token, cut where it has to be."""
        inside = [start, *cuts[bisect_right(cuts, start) : bisect_left(cuts, stop)], stop]
        first = text[start : inside[1]]
        anchor = self._anchor
        tokens = self._tokenize(anchor + first, start - len(anchor)).after(1) if start else self._tokenize(first)
        for a, b in pairwise(inside[1:]):
            tokens = tokens.then(self._continued(tokens.ids, text[a:b], a))
        return tokens

    def _continued(self, ids: list[int], text: str, at: int) -> Tokens:
        """Tokens of a text that goes on where others have ended: as behind something that it shares no token with, where
        that reads as the text does."""
        before = self._decode(ids)
        wanted = {before + text, *(before + unicodedata.normalize(form, text) for form in _FORMS)}
        for glue in _GLUE:
            head = self._tokenize(self._anchor + glue).ids
            whole = self._tokenize(self._anchor + glue + text, at - len(self._anchor + glue))
            new = whole.after(len(head))
            if whole.ids[: len(head)] == head and self._decode(ids + new.ids) in wanted:
                return new
        raise BadSampleError("labels", f"the tokenizer has no tokens for {text[:40]!r} after {before[-20:]!r}")

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)

    def _check_end(self, labels: list[int], answer: str) -> None:
        ends = [i for i, label in enumerate(labels) if label in self.end_ids]
        if self.end_ids and ends != [len(labels) - 1]:
            raise BadSampleError(
                "labels", f"the answer {answer[:40]!r} would be learned as {self._decode(labels)[:40]!r}"
            )


def _joined(answers: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Stretches of answers, those that follow each other directly as one."""
    result: list[tuple[int, int]] = []
    for start, stop in answers:
        if result and result[-1][1] == start:
            start = result.pop()[0]
        result.append((start, stop))
    return result


def learned_ranges(messages: Sequence[Message], answers: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The ranges of the answers that are learned: all, unless a message says it is not."""
    turns = [message for message in messages if message.role == "assistant"]
    if all(turn.learned for turn in turns):
        return answers
    if len(answers) != len(turns):
        raise BadSampleError("weight of a turn", f"the template writes {len(answers)} of {len(turns)} answers")
    return [answer for answer, turn in zip(answers, turns, strict=True) if turn.learned]
