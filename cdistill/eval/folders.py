"""Result folders of ``cdistill eval --output``: ``TASK.jsonl`` with the answers and ``TASK.json`` with what was run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cdistill.errors import InputError
from cdistill.eval import benchmarks
from cdistill.eval.contract import Answer, Question
from cdistill.eval.score import read_answers


@dataclass(frozen=True)
class Result:
    """What one model answered.

    Attributes:
        folder: where it was written.
        model: the model as it was named to ``cdistill eval``.
        answers: by task, an answer for each question, in the order of the questions.
        images: by task, the folders that images were looked for in.
    """

    folder: Path
    model: str
    answers: Mapping[str, Sequence[Answer]]
    images: Mapping[str, Sequence[Path]]


def read_result(folder: Path) -> Result:
    """Read a result folder; ValueError where it is none, holds an unfinished task, or answers of several models."""
    if not folder.is_dir():
        raise InputError(f"{folder}: there is no such folder")
    tasks = [name for name in benchmarks.NAMES if (folder / f"{name}.jsonl").is_file()]
    if not tasks:
        raise InputError(f"{folder}: is no result folder (it has no TASK.jsonl that `cdistill eval --output` writes)")
    facts = {task: _facts(folder, task) for task in tasks}
    models = sorted({str(each["model"]) for each in facts.values()})
    if len(models) > 1:
        raise InputError(f"{folder}: holds answers of several models, {' and '.join(models)}")
    answers = {task: _answers(folder / f"{task}.jsonl", task, facts[task].get("answers")) for task in tasks}
    images = {task: [Path(root) for root in each.get("images", [])] for task, each in facts.items()}
    return Result(folder, models[0], answers, images)


def _facts(folder: Path, task: str) -> dict[str, Any]:
    """What ``TASK.json`` says; it is written when all answers are there."""
    path = folder / f"{task}.json"
    if not path.is_file():
        raise InputError(
            f"{folder}: {task} is unfinished ({path.name} is missing); go on with `cdistill eval --resume`"
        )
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{path}: is not JSON ({str(error).splitlines()[0]})") from None
    if not isinstance(facts, dict) or not isinstance(facts.get("model"), str):
        raise InputError(f"{path}: the field model is missing")
    return facts


def _answers(path: Path, task: str, expected: int | None) -> list[Answer]:
    answers = read_answers(benchmarks.get(task), [path])
    if expected is not None and len(answers) != expected:
        raise InputError(
            f"{path}: {task} is unfinished ({len(answers)} of {expected} answers); go on with `cdistill eval --resume`"
        )
    return answers


def labels(results: Sequence[Result]) -> list[str]:
    """A short name for each: the model's, with the folder's where two models are called the same."""
    models = [Path(result.model).name or result.model for result in results]
    twice = len(set(models)) < len(models)
    names = [f"{model} ({result.folder})" for model, result in zip(models, results, strict=True)] if twice else models
    return [name.removeprefix("builtin:") for name in names]


def common_tasks(results: Sequence[Result]) -> tuple[list[Result], dict[str, list[Path]]]:
    """The results of the tasks that all have, with answers in one order; and the folders that lack each of the others.

    Raises:
        ValueError: samples differ, or no task is common.
    """
    tasks = list(dict.fromkeys(task for result in results for task in result.answers))
    lacking = {task: [result.folder for result in results if task not in result.answers] for task in tasks}
    common = [task for task in tasks if not lacking[task]]
    if not common:
        each = "; ".join(f"{result.folder} has {', '.join(result.answers)}" for result in results)
        raise InputError(f"the result folders have no task in common: {each}")
    for task in common:
        for other in results[1:]:
            _check_samples(task, results[0], other)
    ordered = [
        replace(result, answers={task: _in_order(result.answers[task], results[0].answers[task]) for task in common})
        for result in results
    ]
    return ordered, {task: folders for task, folders in lacking.items() if folders}


def _in_order(answers: Sequence[Answer], order: Sequence[Answer]) -> list[Answer]:
    found = {answer.question.id: answer for answer in answers}
    return [found[answer.question.id] for answer in order]


def _check_samples(task: str, first: Result, other: Result) -> None:
    ours, theirs = ({answer.question.id: answer.question for answer in each.answers[task]} for each in (first, other))
    only = len(ours.keys() - theirs.keys()), len(theirs.keys() - ours.keys())
    changed = [name for name in ours if name in theirs and not _same(ours[name], theirs[name])]
    if any(only) or changed:
        parts = [f"{n} only in {result.folder}" for n, result in zip(only, (first, other), strict=True) if n]
        parts += [f"{len(changed)} that differ under one id, as {changed[0]!r}"] if changed else []
        raise InputError(
            f"{task}: {first.folder} and {other.folder} answer different questions ({', '.join(parts)}); "
            "run both with the same --data and --limit"
        )


def _same(one: Question, other: Question) -> bool:
    """Whether two questions are one, in files that may have been written by JSON and from memory."""
    return one == other or json.dumps(vars(one), sort_keys=True) == json.dumps(vars(other), sort_keys=True)
