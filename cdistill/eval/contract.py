"""What a benchmark is made of: questions, a model's answers, and metrics of them.

A benchmark reads its published files into `Question`s, the runner puts them to a model and keeps an `Answer` for each as a line
of JSON that holds all that is needed to score it again, and the benchmark's metrics are a pure function of answers.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from cdistill.errors import InputError

if TYPE_CHECKING:
    from cdistill.eval.statistics import Metric, Tally


KINDS = ("generate", "log_likelihood", "probability")


@dataclass(frozen=True)
class Question:
    """One thing to ask a model.

    Attributes:
        id: unique within its benchmark, the same in every run.
        prompt: the user's text, without image tokens or a template.
        images: where the images are, in order: paths relative to the folder of images (``A|B`` is A or, where A is not, B),
            ``FILE.parquet#ROW.COLUMN`` relative to the data, or ``builtin:SUBTYPE/SEED/INDEX`` (see `benchmarks.builtin`).
        kind: ``generate`` (greedy, a text comes back), ``log_likelihood`` (of ``continuation`` as the model's turn: sum and
            number of tokens come back) or ``probability`` (of ``continuation``, a word such as "Yes", as the first word).
        continuation: the text that is scored.
        max_new_tokens: where a reply is cut.
        facts: what scoring needs (JSON values): ``subtype``, ``label``, ``item`` (the entry of the published list, where
            several questions are made of one), ``unit`` (the image or group that dependent questions share), ...
    """

    id: str
    prompt: str
    images: tuple[str, ...] = ()
    kind: str = "generate"
    continuation: str = ""
    max_new_tokens: int = 32
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Answer:
    """What a model answered, or what a published file says that it did.

    Attributes:
        question: what was asked.
        reply: generated text without special tokens; empty where a number was asked for.
        score: log-likelihood in nats (the sum over ``tokens`` tokens) or probability in 0..1; None where text was asked for.
        tokens: tokens generated or scored.
        cut: the reply was ended by ``max_new_tokens`` instead of the model.
    """

    question: Question
    reply: str = ""
    score: float | None = None
    tokens: int = 0
    cut: bool = False

    def to_json(self, task: str) -> dict[str, Any]:
        """One line of a file of replies: the question's fields, the answer's, and the benchmark's name."""
        answer = {name: value for name, value in vars(self).items() if name != "question"}
        return {"task": task, **vars(self.question), "facts": dict(self.question.facts), **answer}

    @classmethod
    def from_json(cls, record: Mapping[str, Any], place: str) -> Answer:
        """The answer of such a line; ValueError names ``place`` and the field that is missing or of the wrong kind."""
        said: dict[str, Any] = {}
        for name, kinds in _KINDS.items():
            if name not in record:
                raise InputError(f"{place}: the field {name} is missing")
            said[name] = record[name]
            if not isinstance(said[name], kinds) or (isinstance(said[name], bool) and name != "cut"):
                raise InputError(f"{place}: {name} has a value of the wrong kind, {said[name]!r:.60}")
        if said["kind"] not in KINDS:
            raise InputError(f"{place}: kind must be one of {', '.join(KINDS)}, got {said['kind']!r}")
        if (said["kind"] != "generate" and said["score"] is None) or math.isnan(said["score"] or 0.0):
            raise InputError(f"{place}: score is not a number")
        for name, value in said["facts"].items():
            if name in _FACTS and not _FACTS[name](value):
                raise InputError(f"{place}: the fact {name} has a value of the wrong kind, {value!r:.60}")
        said["images"] = tuple(said["images"])
        own = {each.name: said.pop(each.name) for each in fields(cls) if each.name != "question"}
        return cls(Question(**said), **own)


_KINDS: dict[str, Any] = {
    **dict.fromkeys(("id", "prompt", "kind", "continuation", "reply"), str),
    **dict.fromkeys(("max_new_tokens", "tokens"), int),
    "images": list,
    "facts": dict,
    "score": (float, int, type(None)),
    "cut": bool,
}


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 31


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


_FACTS: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("subtype", "label", "item", "unit", "order", "part", "type", "comparison"), _is_text),
    **dict.fromkeys(("of", "caption", "image", "question"), _is_count),
    "answers": lambda value: isinstance(value, list) and value != [] and all(map(_is_text, value)),
    "lists": lambda value: isinstance(value, list) and all(map(_is_count, value)),
}


def write_answers(path: Path, task: str, answers: Iterable[Answer]) -> None:
    """Write answers as JSON lines."""
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(answer.to_json(task), ensure_ascii=False) + "\n" for answer in answers)


class Benchmark(Protocol):
    """A benchmark: one module of ``cdistill.eval.benchmarks`` with an instance, listed in its registry."""

    name: str
    title: str  # with the year, as a reader would cite it
    licence: str
    download: str  # what to fetch and where it goes, for `cdistill eval presets`
    counts: Mapping[str, int]  # questions of the published version by sub-type
    known: Mapping[str, Sequence[str]]  # the values that facts may have

    def questions(self, data: Path) -> list[Question]:
        """Read the published files in folder ``data``; ValueError names file, line and field of a record that is not right."""

    def tally(self, answers: Sequence[Answer]) -> Tally:
        """Sums over the independent units and the metrics made of them, from answers alone."""

    def metrics(self, answers: Sequence[Answer]) -> dict[str, Metric]:
        """Every metric and sub-metric by name: those of `tally`; the last one is the benchmark's headline number."""

    def read(self, answer: Answer) -> str | None:
        """What a reply says in the benchmark's terms ("A", "yes", a short answer); None if it says none of them."""

    def right(self, answer: Answer) -> float | None:
        """How right a reply is, 0..1; None for a score that means something beside others only."""

    def remarks(self, questions: Sequence[Question]) -> list[str]:
        """What there is to say of questions that are not as many as in the published version."""

    def recorded(self, files: Sequence[Path]) -> list[Answer]:
        """Answers or scores in the published forms (a benchmark without one raises ValueError)."""
