"""Models that answered the same questions side by side: numbers, differences with paired tests, averages, text and JSON."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cdistill.errors import InputError
from cdistill.eval import benchmarks, paired, paper
from cdistill.eval.contract import Answer, Benchmark
from cdistill.eval.folders import Result, common_tasks, labels, read_result
from cdistill.eval.paired import Difference
from cdistill.eval.statistics import Metric


@dataclass(frozen=True)
class TaskComparison:
    """One benchmark.

    Attributes:
        task: its name.
        title: with the year.
        questions: how many each model was asked.
        metrics: by model.
        differences: by model from the second on, to the first.
        headline: the metric that stands for the benchmark in averages.
        drawn: by model from the second on, the bootstrap (replicates,) of the headline's difference in points.
    """

    task: str
    title: str
    questions: int
    metrics: Sequence[Mapping[str, Metric]]
    differences: Sequence[Mapping[str, Difference]]
    headline: str
    drawn: Sequence[np.ndarray]


@dataclass(frozen=True)
class Average:
    """The plain mean of the headline numbers of several benchmarks, as the paper has it.

    Attributes:
        title: what it is called.
        columns: benchmarks that are in it.
        missing: benchmarks of the paper's average that were not compared.
        percent: by model.
        standard_error: by model.
        differences: by model from the second on, to the first.
        paper: by model, the plain mean of the paper's figures for the same columns; None where the model is not the paper's.
    """

    title: str
    columns: Sequence[str]
    missing: Sequence[str]
    percent: Sequence[float]
    standard_error: Sequence[float]
    differences: Sequence[Difference]
    paper: Sequence[float | None]


@dataclass(frozen=True)
class Comparison:
    """Several models on the benchmarks that all of them were asked.

    Attributes:
        results: what they answered.
        labels: a short name for each.
        tasks: the benchmarks that all have.
        lacking: by task that is left out, the result folders without it.
        averages: of the paper's groups, where two or more columns are there.
    """

    results: Sequence[Result]
    labels: Sequence[str]
    tasks: Sequence[TaskComparison]
    lacking: Mapping[str, Sequence[Path]]
    averages: Sequence[Average]

    def paper(self, task: str) -> list[float | None]:
        """By model, the paper's figure of a benchmark; None where the model is not the paper's."""
        return [(paper.figures(result.model) or {}).get(task) for result in self.results]

    @property
    def has_paper(self) -> bool:
        """Whether any of the models is the paper's."""
        return any(paper.figures(result.model) for result in self.results)

    def as_json(self) -> dict[str, Any]:
        """Everything for machines; values that are not a number are null."""
        tasks = {
            each.task: {
                "questions": each.questions,
                "headline": each.headline,
                "metrics": {
                    name: {
                        "models": [asdict(metrics[name]) for metrics in each.metrics],
                        "differences": [asdict(differences[name]) for differences in each.differences],
                    }
                    for name in each.metrics[0]
                },
                "paper": self.paper(each.task),
            }
            for each in self.tasks
        }
        models = [
            {"name": label, "model": result.model, "folder": str(result.folder)}
            for label, result in zip(self.labels, self.results, strict=True)
        ]
        lacking = {task: [str(folder) for folder in folders] for task, folders in self.lacking.items()}
        averages = [asdict(average) for average in self.averages]
        return _finite({"models": models, "tasks": tasks, "averages": averages, "lacking": lacking})


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def compare(folders: Sequence[Path]) -> Comparison:
    """Compare the models of two or more result folders.

    Raises:
        ValueError: a folder is given twice or is no finished result folder, samples differ, or no task is common.
    """
    if len(folders) < 2:
        raise InputError("give two or more result folders to compare")
    seen: set[Path] = set()
    for folder in folders:
        if folder.resolve() in seen:
            raise InputError(f"{folder}: is given twice")
        seen.add(folder.resolve())
    results, lacking = common_tasks([read_result(folder) for folder in folders])
    tasks = [_compare_task(task, results) for task in results[0].answers]
    return Comparison(results, labels(results), tasks, lacking, _averages(tasks, results))


def _compare_task(task: str, results: Sequence[Result]) -> TaskComparison:
    benchmark = benchmarks.get(task)
    tallies = [benchmark.tally(result.answers[task]) for result in results]
    first, others = tallies[0], tallies[1:]
    assert all(other.names == first.names for other in others), "metrics are those of the questions"
    drawn = [paired.draws(first, other, task) for other in others]
    return TaskComparison(
        task=task,
        title=benchmark.title,
        questions=len(results[0].answers[task]),
        metrics=[tally.measure() for tally in tallies],
        differences=[paired.differences(first, *pair) for pair in zip(others, drawn, strict=True)],
        headline=first.names[-1],
        drawn=[each[:, -1] for each in drawn],
    )


def _averages(tasks: Sequence[TaskComparison], results: Sequence[Result]) -> list[Average]:
    found = {each.task: each for each in tasks}
    averages = []
    for group, columns in paper.AVERAGES.items():
        there = [found[column] for column in columns if column in found]
        if len(there) < 2:
            continue
        headlines = [[each.metrics[m][each.headline] for each in there] for m in range(len(results))]
        percent = [statistics.fmean(metric.percent for metric in of) for of in headlines]
        figures = [paper.figures(result.model) for result in results]
        averages.append(
            Average(
                title=paper.TITLES[group],
                columns=[each.task for each in there],
                missing=[column for column in columns if column not in found],
                percent=percent,
                standard_error=[math.hypot(*(m.standard_error for m in of)) / len(of) for of in headlines],
                differences=[
                    paired.summary(
                        percent[m + 1] - percent[0],
                        np.mean([each.drawn[m] for each in there], axis=0),
                        sum(each.differences[m][each.headline].apart for each in there),
                    )
                    for m in range(len(results) - 1)
                ],
                paper=[None if of is None else statistics.fmean(of[each.task] for each in there) for of in figures],
            )
        )
    return averages


def table(comparison: Comparison) -> str:
    """The comparison as aligned text, in percent."""
    labels, lines = comparison.labels, []
    names = [name for each in comparison.tasks for name in each.metrics[0]]
    names += [title for average in comparison.averages for title in (average.title, "the paper's")]
    left = max(map(len, names)) + 2
    widths = [max(len(label), 12) + 2 for label in labels]
    heads = [f"{label} - {labels[0]}" for label in labels[1:]]
    wide = [max(len(head), 34) + 2 for head in heads]

    def line(name: str, n: str, cells: Sequence[str], differences: Sequence[str]) -> str:
        row = f"  {name:<{left}}{n:>7}" + "".join(map(str.rjust, cells, widths))
        return (row + "".join(map(str.rjust, differences, wide))).rstrip()

    head = line("", "n", labels, heads)
    for each in comparison.tasks:
        lines += [f"{each.title}, {each.task}: {each.questions} questions", head]
        for name in each.metrics[0]:
            values = [value(metrics[name].percent, metrics[name].standard_error) for metrics in each.metrics]
            differences = [difference_text(of[name]) for of in each.differences]
            lines.append(line(name, str(each.metrics[0][name].n), values, differences))
        lines += [*_paper_lines(comparison.paper(each.task), line), ""]
    if comparison.averages:
        lines += ["Plain means of the benchmarks' last lines", head]
    for average in comparison.averages:
        values = [value(*pair) for pair in zip(average.percent, average.standard_error, strict=True)]
        lines.append(
            line(average.title, str(len(average.columns)), values, list(map(difference_text, average.differences)))
        )
        lines += _paper_lines(average.paper, line)
        lines.append(f"    of {', '.join(average.columns)}{missing_text(average)}")
    return "\n".join([*lines, *remarks(comparison)])


def _paper_lines(figures: Sequence[float | None], line: Any) -> list[str]:
    """The paper's figures, where there are any."""
    if not any(figures):
        return []
    return [line("the paper's", "", ["" if figure is None else f"{figure:.1f}      " for figure in figures], [])]


def value(percent: float, error: float) -> str:
    """A value with its standard error, in percent."""
    return f"{percent:.1f} ± {error:3.1f}" if math.isfinite(percent) else "-"


def p_text(p: float) -> str:
    """A p value in words of a few characters."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def difference_text(of: Difference) -> str:
    """A difference with its standard error and p value."""
    return f"{of.percent:+.1f} ± {of.standard_error:3.1f}, {p_text(of.p)}" if math.isfinite(of.percent) else "-"


def missing_text(average: Average) -> str:
    """What an average lacks of the paper's columns."""
    return f"; {', '.join(average.missing)} missing: not the paper's average" if average.missing else ""


def remarks(comparison: Comparison) -> list[str]:
    """What a reader must know, a sentence or two for each line."""
    tests = {of.test for each in comparison.tasks for differences in each.differences for of in differences.values()}
    single = "p: exact McNemar test where each question stands by itself" if paired.MCNEMAR in tests else "p:"
    joined = ", else " if paired.MCNEMAR in tests else " "
    lines = [
        "in %, ± standard error; differences are paired, by question or by the image or group that questions share",
        f"{single}{joined}bootstrap over images or groups; each p is of one test: of 20 true zeros one is below 0.05",
    ]
    if comparison.has_paper:
        for reason, tasks in paper.REASONS.items():
            there = [each.task for each in comparison.tasks if each.task in tasks]
            lines += [reason.format(", ".join(there))] if there else []
    for each in comparison.tasks:
        for label, result in zip(comparison.labels, comparison.results, strict=True):
            lines += _about_replies(label, benchmarks.get(each.task), result.answers[each.task])
    for task, folders in comparison.lacking.items():
        lines.append(f"{task} is left out: {' and '.join(map(str, folders))} has no answers")
    return lines


def _about_replies(label: str, benchmark: Benchmark, answers: Sequence[Answer]) -> list[str]:
    """How many replies say nothing, or were cut."""
    silent = sum(answer.score is None and benchmark.read(answer) is None for answer in answers)
    cut = sum(answer.cut for answer in answers)
    parts = [f"{silent} say nothing that counts, and are wrong"] if silent else []
    parts += [f"{cut} were cut"] if cut else []
    return [f"{label}, {benchmark.name}: of {len(answers)} replies {', '.join(parts)}"] if parts else []
