"""What a benchmark is made of: questions, a model's answers, and metrics of them.

A benchmark reads its published files into `Question`s, the runner puts them to a model and keeps an `Answer` for each as a line
of JSON that holds all that is needed to score it again, and the benchmark's metrics are a pure function of answers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

KINDS = ("generate", "log_likelihood", "probability")


@dataclass(frozen=True)
class Question:
    """One thing to ask a model.

    Attributes:
        id: unique within its benchmark, the same in every run.
        prompt: the user's text, without image tokens or a template.
        images: where the images are, in order: paths relative to the folder of images, or ``FILE.parquet#ROW.COLUMN``.
        kind: ``generate`` (greedy, a text comes back), ``log_likelihood`` (of ``continuation`` as the model's turn: sum and
            number of tokens come back) or ``probability`` (of ``continuation``, a word such as "Yes", as the first word).
        continuation: the text that is scored.
        max_new_tokens: where a reply is cut.
        facts: what scoring needs: label, sub-type, the group that dependent questions share, ... (JSON values).
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


@dataclass(frozen=True)
class Metric:
    """One number of a benchmark.

    Attributes:
        percent: the value; 0..100 for shares.
        n: independent units behind it (images or groups where questions depend on each other, else questions).
        right: units that are right, where the value is their share.
        standard_error: of ``percent``.
        interval: 95 % interval of ``percent``, by bootstrap over the independent units.
    """

    percent: float
    n: int
    right: int | None = None
    standard_error: float = 0.0
    interval: tuple[float, float] = (0.0, 0.0)


class Benchmark(Protocol):
    """A benchmark: one module of ``cdistill.eval.benchmarks`` with an instance, listed in its registry."""

    name: str
    title: str  # with the year, as a reader would cite it
    licence: str
    download: str  # what to fetch and where it goes, for `cdistill eval presets`
    counts: Mapping[str, int]  # questions of the published version by sub-type

    def questions(self, data: Path) -> list[Question]:
        """Read the published files in folder ``data``; ValueError names file, line and field of a record that is not right."""

    def metrics(self, answers: Sequence[Answer]) -> dict[str, Metric]:
        """Every metric and sub-metric by name, from answers alone; the last one is the benchmark's headline number."""

    def recorded(self, files: Sequence[Path]) -> list[Answer]:
        """Answers or scores in the published forms (a benchmark without one raises ValueError)."""
