"""MMVP (Tong et al., 2024): pairs of images that CLIP takes for alike, with the same question about both.

A pair is right if both of its questions are. The letter is read off the reply; the authors let GPT-4 grade free text, and
lmms-eval corrects the labels of 99, 100, 279 and 280, which here are as published: none of the three is comparable.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import MappingProxyType

from cdistill.errors import InputError
from cdistill.eval.benchmarks.base import Base, find, groups, template, unit
from cdistill.eval.contract import Answer, Question
from cdistill.eval.files import csv_records
from cdistill.eval.replies import letter
from cdistill.eval.statistics import Tally


class MMVP(Base):
    """MMVP's questions, and ``accuracy`` of questions and ``pairs``."""

    name = "mmvp"
    title = "MMVP (2024)"
    licence = "MIT"
    download = 'huggingface.co/datasets/MMVP/MMVP: Questions.csv into --data; its folder "MMVP Images" is --images'
    counts = MappingProxyType({"questions": 150})
    known = MappingProxyType({"label": ("A", "B")})
    prompt = "{} {}\nAnswer with the option's letter from the given choices directly."

    def load(self, data: Path) -> list[Question]:
        """The rows of ``Questions.csv``."""
        prompt, result, seen = template(data, self.prompt), [], set()
        for record in csv_records(find(data, "Questions.csv")[0]):
            index = round(record.number("Index"))
            label = letter(record.text("Correct Answer"), "AB")
            if label is None:
                raise InputError(f"{record.place}: Correct Answer must be (a) or (b)")
            if index in seen:
                raise InputError(f"{record.place}: the index {index} is there twice")
            seen.add(index)
            pair = str((index + 1) // 2)
            facts = {"item": pair, "of": 2, "unit": pair, "label": label}
            text = prompt.format(record.text("Question"), record.text("Options"))
            result.append(Question(str(index), text, (f"{index}.jpg",), facts=facts))
        return result

    def read(self, answer: Answer) -> str | None:
        """A or B."""
        return letter(answer.reply, "AB")

    def tally(self, answers: Sequence[Answer]) -> Tally:
        """Units are the pairs."""
        tally = Tally()
        for group in groups(answers).values():
            right = [bool(self.right(answer)) for answer in group]
            for each in right:
                tally.count(unit(group[0]), "accuracy", each)
            tally.count(unit(group[0]), "pairs", all(right))
        for name in ("accuracy", "pairs"):
            if name in tally:
                tally.share(name)
        return tally


BENCHMARK = MMVP()
