"""What is learned is what generation must produce: one template with one tokenizer, token by token."""

from __future__ import annotations

import unicodedata
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal

import numpy as np

from cdistill.data.samples import BadSampleError, Message, blamed_on_sample
from cdistill.data.templates import Template
from cdistill.errors import InputError

_FORMS: tuple[Literal["NFC", "NFKC"], ...] = ("NFC", "NFKC")  # what tokenizers may do to a text
_GLUE = ("", "\ue000", "\u3001", "a")


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

    Attributes:
        template: the `Template`.
        end_ids: tokens that end an answer, at which generation has to stop; empty for ``plain``.

    Raises:
        ValueError: the template does not fit, or the tokenizer adds a token after every text, so that a prompt is over before
            an answer begins.
    """

    def __init__(self, processor: Any, template: str = "auto") -> None:
        self.tokenizer = getattr(processor, "tokenizer", processor)
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
        with blamed_on_sample("chat template"):
            (text, answers), cuts = self.template.rendered(messages)
        joined = _joined(answers)
        learned = set(learned_ranges(messages, joined))
        ids = self._beginning(text)
        labels = [False] * len(ids)
        place = 0
        for start, stop in joined:
            prompt = self._ids(text, place, start, cuts)
            both = self._ids(text, place, stop, cuts)
            if both[: len(prompt)] != prompt:
                both = self._ids(text, place, stop, sorted({*cuts, start}))
            self._check_end(both[len(prompt) :], text[start:stop])
            ids += both
            labels += [False] * len(prompt) + [(start, stop) in learned] * (len(both) - len(prompt))
            place = stop
        rest = self._ids(text, place, len(text), cuts)
        return ids + rest, np.array(labels + [False] * len(rest), bool)

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """Tokens that ask for an answer to messages of which the last is the user's: those of transformers'
        ``apply_chat_template(messages, add_generation_prompt=True)`` for ``template.source``, one mark for an image."""
        text, cuts = self.template.prompt(messages)
        return self._beginning(text) + self._ids(text, 0, len(text), cuts)

    def text_ids(self, text: str) -> list[int]:
        """Tokens of a text that a template has written, as transformers makes them."""
        return self._beginning(text) + self._tokenize(text)

    def _beginning(self, text: str) -> list[int]:
        bos = self.tokenizer.bos_token
        return [] if bos is not None and text.startswith(bos) else list(self._before)

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

    def _tokenize(self, text: str) -> list[int]:
        backend = self.tokenizer.backend_tokenizer
        backend.no_truncation()
        backend.no_padding()
        with blamed_on_sample("tokenizer"):
            return backend.encode(text, add_special_tokens=False).ids

    def _ids(self, text: str, start: int, stop: int, cuts: Sequence[int]) -> list[int]:
        """Tokens of a stretch of a text whose beginning is the text's or follows a special token, cut where it has to be."""
        inside = [start, *cuts[bisect_right(cuts, start) : bisect_left(cuts, stop)], stop]
        first = text[start : inside[1]]
        ids = self._tokenize(self._anchor + first)[1:] if start else self._tokenize(first)
        for a, b in pairwise(inside[1:]):
            ids = ids + self._continued(ids, text[a:b])
        return ids

    def _continued(self, ids: list[int], text: str) -> list[int]:
        """Tokens of a text that goes on where others have ended: as behind something that it shares no token with, where
        that reads as the text does."""
        before = self._decode(ids)
        wanted = {before + text, *(before + unicodedata.normalize(form, text) for form in _FORMS)}
        for glue in _GLUE:
            head, whole = self._tokenize(self._anchor + glue), self._tokenize(self._anchor + glue + text)
            if whole[: len(head)] == head and self._decode(ids + whole[len(head) :]) in wanted:
                return whole[len(head) :]
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
