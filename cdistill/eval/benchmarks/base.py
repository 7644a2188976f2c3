"""What benchmarks have in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from cdistill.eval.contract import Answer, Question
from cdistill.eval.statistics import Metric, Tally


class Base:
    """A benchmark of questions that are right or wrong each by itself; see `cdistill.eval.contract.Benchmark`."""

    name = ""
    title = ""
    licence = ""
    download = ""
    counts: Mapping[str, int] = MappingProxyType({})

    def questions(self, data: Path) -> list[Question]:
        """Read the published files."""
        raise NotImplementedError

    def tally(self, answers: Sequence[Answer]) -> Tally:
        """Count what the answers are worth."""
        raise NotImplementedError

    def metrics(self, answers: Sequence[Answer]) -> dict[str, Metric]:
        """Every metric and sub-metric by name; ValueError where there is no answer."""
        if not answers:
            raise ValueError(f"{self.name}: there are no answers to score")
        return self.tally(answers).measure()

    def recorded(self, files: Sequence[Path]) -> list[Answer]:
        """Refuse: most benchmarks have no published form of replies."""
        raise ValueError(
            f"{files[0]}: {self.name} has no published form of replies; give the lines that `cdistill eval` writes"
        )

    def read(self, answer: Answer) -> str | None:
        """What a reply says."""
        raise NotImplementedError

    def right(self, answer: Answer) -> float:
        """Whether a reply says the label."""
        return float(self.read(answer) == fact(answer, "label"))

    def remarks(self, questions: Sequence[Question]) -> list[str]:
        """One line for each sub-type of which there are not as many as in the published version."""
        found: dict[str, set[str]] = {subtype: set() for subtype in self.counts}
        for question in questions:
            subtype = str(question.facts.get("subtype", "questions"))
            found.setdefault(subtype, set()).add(str(question.facts.get("item", question.id)))
        return [
            f"{self.name} {subtype}: {len(items)} here, {self.counts.get(subtype, 0)} in the published version"
            for subtype, items in found.items()
            if len(items) != self.counts.get(subtype, 0)
        ]


def fact(answer: Answer, name: str) -> Any:
    """A fact of an answer's question; ValueError names the question that lacks it."""
    if name not in answer.question.facts:
        raise ValueError(f"question {answer.question.id!r} lacks the fact {name!r}: is it of another benchmark?")
    return answer.question.facts[name]
