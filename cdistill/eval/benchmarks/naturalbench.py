"""NaturalBench (Li et al., 2024): two questions about two images, whose answers change with the image.

By the authors' script: the first of the words yes and no (of A and B) counts; ``accuracy`` of all four, ``question`` where a
question is right about both images, ``image`` where both questions are right about an image, ``group`` where all four are.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import MappingProxyType

from cdistill.errors import InputError
from cdistill.eval.benchmarks.base import Base, by_facts, fact, find, groups, template, unit
from cdistill.eval.contract import Answer, Question
from cdistill.eval.files import parquet_records
from cdistill.eval.replies import first_word
from cdistill.eval.statistics import Tally

SUFFIXES = {
    "yes_no": "Please answer Yes or No.",
    "multiple_choice": "Please output the letter corresponding to the correct option.",
}
WORDS = {"yes_no": ("yes", "no"), "multiple_choice": ("a", "b")}


class NaturalBench(Base):
    """NaturalBench's questions, and ``accuracy``, ``question``, ``image``, ``group``."""

    name = "naturalbench"
    title = "NaturalBench (2024)"
    licence = "Apache-2.0"
    download = "huggingface.co/datasets/BaiqiL/NaturalBench: its parquet files into --data (with the images)"
    counts = MappingProxyType({"questions": 1900})
    known = MappingProxyType({"type": tuple(SUFFIXES), "label": ("yes", "no", "a", "b")})
    prompt = "{} {}"

    def load(self, data: Path) -> list[Question]:
        """Four questions for each row of the parquet files."""
        prompt, result = template(data, self.prompt), []
        for path in find(data, "*.parquet"):
            for record in parquet_records(path, without=("Image_0", "Image_1")):
                kind, item = record.choice("Question_Type", tuple(SUFFIXES)), record.name("Index")
                for q in (0, 1):
                    text = prompt.format(record.text(f"Question_{q}"), SUFFIXES[kind])
                    for i in (0, 1):
                        label = record.text(f"Image_{i}_Question_{q}").strip().lower()
                        if label not in WORDS[kind]:
                            raise InputError(f"{record.place}: Image_{i}_Question_{q} must be one of {WORDS[kind]}")
                        facts = {"item": item, "of": 4, "unit": item, "label": label, "type": kind, "question": q}
                        image = f"{path.name}#{record.key}.Image_{i}"
                        result.append(Question(f"{item}/q{q}_i{i}", text, (image,), facts={**facts, "image": i}))
        return result

    def read(self, answer: Answer) -> str | None:
        """Yes or no, or a letter, in lower case."""
        return first_word(answer.reply, WORDS[fact(answer, "type")])

    def tally(self, answers: Sequence[Answer]) -> Tally:
        """Units are the groups."""
        tally = Tally()
        for group in groups(answers).values():
            asked = by_facts(group, ["question", "image"], [(0, 0), (0, 1), (1, 0), (1, 1)])
            right = {key: bool(self.right(answer)) for key, answer in asked.items()}
            for value in right.values():
                tally.count(unit(group[0]), "accuracy", value)
            for k in (0, 1):
                tally.count(unit(group[0]), "question", right[k, 0] and right[k, 1])
                tally.count(unit(group[0]), "image", right[0, k] and right[1, k])
            tally.count(unit(group[0]), "group", all(right.values()))
        for name in ("accuracy", "question", "image", "group"):
            if name in tally:
                tally.share(name)
        return tally


BENCHMARK = NaturalBench()
