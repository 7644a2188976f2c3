"""What VQAv2, VizWiz and TextVQA have in common: ten people's answers to each question, and soft accuracy among them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cdistill.errors import InputError
from cdistill.eval.benchmarks.base import Accuracy, fact
from cdistill.eval.contract import Answer
from cdistill.eval.files import Record
from cdistill.eval.replies import agreement, short_answer


class SoftAccuracy(Accuracy):
    """Accuracy as the VQA evaluation has it: min(n / 3, 1) of nine people who say the same, averaged over the ten left out.

    Reply and answers are normalised always. (The script of VQAv2 leaves both as they are where all ten answers are equal.)
    """

    words_first = True

    def normal(self, text: str) -> str:
        """A short answer as it is compared."""
        return short_answer(text, words_first=self.words_first)

    def read(self, answer: Answer) -> str | None:
        """The short answer."""
        return self.normal(answer.reply) or None

    def right(self, answer: Answer) -> float:
        """Accuracy among the ten."""
        return agreement(self.normal(answer.reply), [self.normal(each) for each in fact(answer, "answers")])


def people(record: Record, where: str = "answers") -> list[str]:
    """The ten answers of a record: texts, or objects with ``answer``; ValueError says that test splits have none."""
    value = record.fields.get(where)
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise InputError(
            f"{record.place}: {where} is missing; take the validation split, test's answers are not published"
        )
    return [_text(each, record, where) for each in value]


def _text(value: Any, record: Record, where: str) -> str:
    text = value.get("answer") if isinstance(value, dict) else value
    if not isinstance(text, str):
        raise InputError(f"{record.place}: {where} must hold texts, got {value!r:.60}")
    return text
