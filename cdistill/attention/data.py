"""What is asked: questions of benchmarks with their right answers, and conversations of data sets."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from cdistill.attention.models import Models, Reading
from cdistill.choices import MOST_DRAWN, require_count
from cdistill.data.images import open_image
from cdistill.data.mix import open_source
from cdistill.data.samples import BadSampleError, ImageFile, Sample
from cdistill.errors import InputError
from cdistill.eval import benchmarks, tasks
from cdistill.eval.benchmarks.builtin import FAMILIES
from cdistill.eval.contract import Benchmark, Question
from cdistill.eval.pictures import Pictures

BUILTIN = "builtin"
_OPPOSITE = {"Yes": "No", "yes": "no"}


@dataclass
class Set:
    """Questions that are shown beside those of other sets.

    Attributes:
        name: of a benchmark, of a family of the built-in task, or of a file.
        group: ``vqa``, ``compositional``, ``hallucination``, or empty where that is not known.
        questions: with the answer as ``continuation``, of a file's samples without words.
        read: makes tokens of questions about the same images.
        pictures: opens the images of questions; None for a data set.
        benchmark: that scores answers; None for a data set.
        left_out: why questions are not asked, with their number.
    """

    name: str
    group: str
    questions: list[Question]
    read: Callable[[Models, Sequence[Question]], list[Reading]]
    pictures: Pictures | None = None
    benchmark: Benchmark | None = None
    left_out: Counter[str] = field(default_factory=Counter)


def sets_of(options: argparse.Namespace, *, answered: bool = True) -> list[Set]:
    """The sets that the options name; the built-in task where they name none.

    Args:
        answered: the right answer is the ``continuation`` of every question; else questions are as their benchmark has them.

    Raises:
        ValueError: an option or file is not right, or a set has no question about an image.
    """
    require_count("--limit", options.limit, MOST_DRAWN)
    for name in ("data", "images"):
        folder = getattr(options, name)
        if folder is not None and not folder.is_dir():
            raise InputError(f"--{name}: there is no folder {str(folder)!r}")
    samples = getattr(options, "samples", [])
    names = list(dict.fromkeys(name for task in options.task for name in benchmarks.names(task)))
    names = names or ([] if samples else [BUILTIN])
    if options.data is None and (others := [name for name in names if name != BUILTIN]):
        raise InputError(
            f"--data must name the folder of {others[0]}'s files; `cdistill eval presets` says what to fetch"
        )
    found = []
    for name in names:
        several = len(names) > 1
        found += _builtin(options, answered) if name == BUILTIN else [_benchmark(name, options, several, answered)]
    found += [_samples(path, options) for path in samples]
    for each in found:
        blind = [question for question in each.questions if not question.images]
        each.questions = [question for question in each.questions if question.images]
        if not each.questions:
            raise InputError(
                f"{each.name}: holds no question about an image that could be asked, so there is no attention to one"
            )
        if blind:
            each.left_out["without an image"] += len(blind)
    return found


def right_text(question: Question) -> str | None:
    """The right answer as its benchmark's files give it; None where a question is about an image that does not fit it."""
    fits = question.facts.get("caption", 0) == question.facts.get("image", 0)
    if question.kind == "log_likelihood":
        return question.continuation if fits else None
    if question.kind == "probability":
        return question.continuation if fits else _OPPOSITE.get(question.continuation)
    if "answers" in question.facts:
        return Counter(map(str, question.facts["answers"])).most_common(1)[0][0] or None
    said = question.facts.get("label", question.facts.get("answer"))
    return None if said is None or not str(said).strip() else str(said)


def _benchmark(name: str, options: argparse.Namespace, several: bool, answered: bool) -> Set:
    task = tasks.prepare(name, options.data, options.images, limit=options.limit, several=several)
    questions, left_out = task.asked, Counter[str]()
    if task.missing:
        left_out["without their images"] = len(task.missing)
    if answered:
        questions, lacking = _answered(questions)
        if lacking:
            left_out["without a right answer"] = lacking
    group = next((group for group, names in benchmarks.GROUPS.items() if name in names), "")
    return Set(name, group, questions, _reader(task.pictures), task.pictures, task.benchmark, left_out)


def _builtin(options: argparse.Namespace, answered: bool) -> list[Set]:
    """The built-in task as two sets, its families, of which every sub-type has as many questions."""
    benchmark: Any = benchmarks.get(BUILTIN)
    result = []
    for family, subtypes in FAMILIES.items():
        drawn = benchmark.draw(n=-(-options.limit // len(subtypes)), seed=options.seed)
        asked = tasks.spread([q for q in drawn if q.facts["subtype"] in subtypes], options.limit)
        questions = _answered(asked)[0] if answered else asked
        group = "compositional" if family == "compositional" else "vqa"
        pictures = Pictures([Path()])
        result.append(Set(f"built-in {family}", group, questions, _reader(pictures), pictures, benchmark))
    return result


def _answered(questions: Sequence[Question]) -> tuple[list[Question], int]:
    result = []
    for question in questions:
        text = right_text(question)
        if text is not None:
            result.append(replace(question, kind="log_likelihood", continuation=text))
    return result, len(questions) - len(result)


def _reader(pictures: Pictures) -> Callable[[Models, Sequence[Question]], list[Reading]]:
    def read(models: Models, questions: Sequence[Question]) -> list[Reading]:
        return models.read(questions, [pictures.open(name) for name in questions[0].images])

    return read


def _samples(path: str, options: argparse.Namespace) -> Set:
    """Conversations of a data set; what cannot be read of it is left out when it is opened."""
    source = open_source(path, images=None if options.images is None else str(options.images))
    number = min(len(source), options.limit)
    indices = dict.fromkeys(int(i) for i in np.linspace(0, len(source) - 1, number).round()) if number else {}
    samples: dict[str, Sample] = {}
    questions, left_out = [], Counter[str]()
    for index in indices:
        try:
            sample = source[index]
        except BadSampleError as error:
            left_out[error.reason] += 1
            continue
        images = tuple(str(image.path) if isinstance(image, ImageFile) else image.name for image in sample.images)
        samples[sample.place] = sample
        facts = {"unit": "|".join(images) or sample.place}
        questions.append(Question(sample.place, "", images and (sample.place,), "log_likelihood", facts=facts))

    def read(models: Models, asked: Sequence[Question]) -> list[Reading]:
        found = []
        for question in asked:
            sample = samples[question.id]
            found.append(models.read_sample(sample, [open_image(image) for image in sample.images]))
        return found

    return Set(source.name, "", questions, read, left_out=left_out)
