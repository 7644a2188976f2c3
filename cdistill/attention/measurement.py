"""Observations of a whole set: batch by batch with the runner of `cdistill eval`, numbers by sample."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tqdm import tqdm

from cdistill.attention.data import Set
from cdistill.attention.models import Models
from cdistill.attention.observation import answer_rows, equal_parts, observe
from cdistill.errors import InputError
from cdistill.eval.contract import Answer, Question
from cdistill.eval.runner import Asked, Runner


@dataclass
class Measured:
    """What a set gave.

    Attributes:
        questions: those that were asked, in order.
        units: the image or group of each; questions of one unit depend on each other.
        samples: by model, the teacher first: of each question what `observe` says.
        left_out: why others were not asked, with their number.
    """

    questions: list[Question]
    units: list[str]
    samples: list[list[dict[str, Any]]]
    left_out: dict[str, int]

    def stacked(self, model: int, name: str) -> np.ndarray:
        """(N, L, C) of a quantity."""
        return np.stack([sample[name] for sample in self.samples[model]])


def measure(models: Models, of: Set, batch_size: int | None, *, probabilities: bool = False) -> Measured:
    """Observe all models on a set's questions.

    Raises:
        ValueError: no question could be asked, or the models read other tokens.
    """
    found: dict[str, list[dict[str, Any]]] = {}

    def source(questions: Sequence[Question]) -> list[Any]:
        readings: list[Any] = of.read(models, questions)
        for reading in readings:
            answer_rows(reading, models.visual_ids)  # raises before it is in a batch
        return readings

    def ask(batch: list[Asked]) -> list[Answer]:
        readings: list[Any] = [prompt for _, prompt in batch]
        parts = equal_parts(readings) if models.equal_lengths else [list(range(len(batch)))]
        for part in parts:
            by_model = observe(models, [readings[i] for i in part], probabilities=probabilities)
            for place, i in enumerate(part):
                found[batch[i][0].id] = [samples[place] for samples in by_model]
        return [Answer(question) for question, _ in batch]

    runner = Runner(models.teacher, source, batch_size, ask, say=tqdm.write)
    asked = of.questions
    runner.plan(asked)
    with tqdm(total=len(asked), desc=of.name, unit=" samples") as bar:
        for _ in runner.answers(asked, bar):
            pass
    for why in runner.unread.values():
        of.left_out[why.split(": ")[0]] += 1
    there = [question for question in asked if question.id in found]
    if not there:
        raise InputError(
            f"{of.name}: none of its {len(asked):,} questions can be asked: {next(iter(runner.unread.values()))}"
        )
    samples = [[found[question.id][model] for question in there] for model in range(1 + len(models.students))]
    units = [str(question.facts.get("unit", question.id)) for question in there]
    return Measured(there, units, samples, dict(of.left_out))
