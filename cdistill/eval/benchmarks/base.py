"""What benchmarks have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from cdistill.errors import InputError
from cdistill.eval.contract import Answer, Question
from cdistill.eval.files import read_text
from cdistill.eval.statistics import Metric, Tally

SHORT = "\nAnswer the question using a single word or phrase."  # what LLaVA 1.5's authors add to short-answer questions


class Base(ABC):
    """A benchmark; see `cdistill.eval.contract.Benchmark`. One of questions that are right or wrong each by itself needs
    `load`, `read`, and `tally` only.
    """

    name = ""
    title = ""
    licence = ""
    download = ""
    counts: Mapping[str, int] = MappingProxyType({})
    known: Mapping[str, Sequence[str]] = MappingProxyType({})
    prompt = "{}"

    @abstractmethod
    def load(self, data: Path) -> list[Question]:
        """Read the published files."""

    def questions(self, data: Path) -> list[Question]:
        """What `load` reads; ValueError where it is nothing, or has an id twice."""
        questions = self.load(data)
        twice = [name for name, times in Counter(question.id for question in questions).items() if times > 1]
        if twice:
            raise InputError(f"{data}: question {twice[0]} of {self.name} is there twice")
        if not questions:
            raise InputError(f"{data}: holds no questions of {self.name}")
        return questions

    @abstractmethod
    def tally(self, answers: Sequence[Answer]) -> Tally:
        """Count what the answers are worth."""

    def metrics(self, answers: Sequence[Answer]) -> dict[str, Metric]:
        """Every metric and sub-metric by name; ValueError where there is no answer."""
        if not answers:
            raise InputError(f"{self.name}: there are no answers to score")
        tally = self.tally(answers)
        if not tally.names:
            raise InputError(f"{self.name}: none of the {len(answers)} answers belongs to a whole group")
        return tally.measure()

    def recorded(self, files: Sequence[Path]) -> list[Answer]:
        """Refuse: most benchmarks have no published form of replies."""
        raise InputError(
            f"{files[0]}: {self.name} has no published form of replies; give the lines that `cdistill eval` writes"
        )

    @abstractmethod
    def read(self, answer: Answer) -> str | None:
        """What a reply says."""

    def right(self, answer: Answer) -> float | None:
        """Whether a reply says the label."""
        return float(self.read(answer) == fact(answer, "label"))

    def published(self, subtypes: Collection[str]) -> Mapping[str, int] | None:
        """How many entries of each sub-type the published version has, where these ``subtypes`` are here; None if unknown."""
        return self.counts

    def remarks(self, questions: Sequence[Question]) -> list[str]:
        """One line if there are not as many of each sub-type as in the published version, one for broken groups."""
        whole = list(self.counts) == ["questions"]
        found: dict[str, set[str]] = {}
        items: Counter[str] = Counter()
        wanted: dict[str, int] = {}
        for question in questions:
            item = str(question.facts.get("item", question.id))
            subtype = "questions" if whole else str(question.facts.get("subtype", "questions"))
            found.setdefault(subtype, set()).add(item)
            items[item] += 1
            if "of" in question.facts:
                wanted[item] = int(question.facts["of"])
        published = self.published(found)
        counts = {} if published is None else dict(published) | {name: 0 for name in found if name not in published}
        here = {subtype: len(found.get(subtype, ())) for subtype in counts}
        differ = [f"{name} {here[name]} (not {count})" for name, count in counts.items() if here[name] != count]
        lines = [f"{self.name}: other counts than in the published version: {', '.join(differ)}"] if differ else []
        broken = sum(items[item] != count for item, count in wanted.items())
        if broken:
            lines.append(f"{self.name}: {broken} of {len(items)} groups lack a question, and are left out")
        return lines


class Accuracy(Base):
    """A benchmark whose metrics are accuracies: one of each sub-type, and one of all questions."""

    def tally(self, answers: Sequence[Answer]) -> Tally:
        """Units are the images."""
        tally = Tally()
        subtypes: dict[str, None] = {}
        for answer in answers:
            subtype, right = answer.question.facts.get("subtype"), self.right(answer)
            assert right is not None
            if subtype is not None:
                subtypes[subtype] = None
                tally.count(unit(answer), subtype, right)
            tally.count(unit(answer), "accuracy", right)
        for subtype in sorted(subtypes):
            tally.share(subtype)
        tally.share("accuracy")
        return tally


def groups(answers: Sequence[Answer]) -> dict[str, list[Answer]]:
    """Answers by ``item``, of items that have all of the questions that fact ``of`` says."""
    found: dict[str, list[Answer]] = {}
    for answer in answers:
        found.setdefault(str(fact(answer, "item")), []).append(answer)
    return {item: group for item, group in found.items() if len(group) == int(fact(group[0], "of"))}


def by_facts(group: Sequence[Answer], names: Sequence[str], wanted: Iterable[tuple[Any, ...]]) -> dict[Any, Answer]:
    """Answers of a group by these facts of theirs; ValueError where they are not one for each of those wanted."""
    found = {tuple(fact(answer, name) for name in names): answer for answer in group}
    if found.keys() != set(wanted):
        raise InputError(
            f"question {group[0].question.id!r} and the others of its item should differ in {' and '.join(names)}"
        )
    return found


def fact(answer: Answer, name: str) -> Any:
    """A fact of an answer's question; ValueError names the question that lacks it."""
    if name not in answer.question.facts:
        raise InputError(f"question {answer.question.id!r} lacks the fact {name!r}: is it of another benchmark?")
    return answer.question.facts[name]


def unit(answer: Answer) -> str:
    """The independent unit of an answer."""
    return str(fact(answer, "unit"))


def template(data: Path, prompt: str) -> str:
    """A prompt with ``{}`` for what is asked, or the one in ``prompt.txt`` among the data, for models that know no English."""
    path = data / "prompt.txt"
    if not path.is_file():
        return prompt
    text = read_text(path).strip("\n")
    if text.count("{}") != prompt.count("{}") or text.replace("{}", "").count("{"):
        raise InputError(f"{path}: must have {{}} {prompt.count('{}')} times, as in {prompt!r}")
    return text


def find(data: Path, *patterns: str) -> list[Path]:
    """Files among the data that fit the first of these patterns that any fits; ValueError names the patterns if none does."""
    for pattern in patterns:
        paths = sorted(data.glob(pattern))
        if paths:
            return paths
    if not data.is_dir():
        raise InputError(f"there is no folder {str(data)!r}")
    raise InputError(f"{data}: has no {' and no '.join(patterns)}")
