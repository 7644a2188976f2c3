"""Questions on which models part: what one has right and another has not."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from cdistill.eval import benchmarks
from cdistill.eval.contract import Answer, Benchmark, Question
from cdistill.eval.folders import Result


@dataclass(frozen=True)
class Case:
    """Something that is right or wrong: a question, or where scores are compared all questions of an entry.

    Attributes:
        name: the question's id, or the entry's.
        questions: what was asked.
        answers: by model, an answer for each of the questions.
        right: by model, 0..1.
    """

    name: str
    questions: Sequence[Question]
    answers: Sequence[Sequence[Answer]]
    right: tuple[float, ...]

    @property
    def parts(self) -> bool:
        """Whether the models differ."""
        return len(set(self.right)) > 1


def cases(task: str, results: Sequence[Result]) -> list[Case]:
    """All cases of a task, in the order of its questions."""
    benchmark = benchmarks.get(task)
    answers = [result.answers[task] for result in results]
    if all(benchmark.right(answer) is None for answer in answers[0]):
        return _items(benchmark, answers)
    return [
        Case(of[0].question.id, [of[0].question], [[a] for a in of], tuple(benchmark.right(a) or 0.0 for a in of))
        for of in zip(*answers, strict=True)
    ]


def _items(benchmark: Benchmark, answers: Sequence[Sequence[Answer]]) -> list[Case]:
    """Entries of the published list of which each makes several questions; right by the headline number of that entry."""
    members: dict[str, list[int]] = {}
    for i, answer in enumerate(answers[0]):
        members.setdefault(str(answer.question.facts.get("item", answer.question.id)), []).append(i)
    result = []
    for item, places in members.items():
        said = [[of[i] for i in places] for of in answers]
        right = [_headline(benchmark, of) for of in said]
        if all(map(math.isfinite, right)):
            result.append(Case(item, [answer.question for answer in said[0]], said, tuple(right)))
    return result


def _headline(benchmark: Benchmark, answers: Sequence[Answer]) -> float:
    tally = benchmark.tally(answers)
    return float(tally.values(tally.sums().sum(0))[-1]) if tally.names else math.nan


def patterns(found: Sequence[Case]) -> Counter[tuple[float, ...]]:
    """How many cases there are of each way to be right or wrong."""
    return Counter(case.right for case in found)


def examples(found: Sequence[Case], most: int) -> list[Case]:
    """Up to ``most`` cases that part the models, each pattern in turn, by their order."""
    waiting: dict[tuple[float, ...], list[Case]] = {}
    for case in found:
        if case.parts:
            waiting.setdefault(case.right, []).append(case)
    chosen: list[Case] = []
    while waiting and len(chosen) < most:
        for pattern in list(waiting)[: most - len(chosen)]:
            chosen.append(waiting[pattern].pop(0))
            if not waiting[pattern]:
                del waiting[pattern]
    return chosen
