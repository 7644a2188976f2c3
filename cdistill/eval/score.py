"""``cdistill eval score``: metrics of recorded replies or scores, without a model."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cdistill.errors import InputError
from cdistill.eval import benchmarks
from cdistill.eval.contract import Answer, Benchmark
from cdistill.eval.files import line_records
from cdistill.files import write_text

if TYPE_CHECKING:
    from cdistill.eval.statistics import Metric


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the command takes."""
    parser.add_argument("task", metavar="TASK", help=f"one of {', '.join(benchmarks.NAMES)}")
    parser.add_argument(
        "files", nargs="+", type=Path, metavar="FILE", help="what `cdistill eval` wrote, or a published form of replies"
    )
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the result as JSON, too")


def main(options: argparse.Namespace) -> int:
    """Print the metrics of the files, and write them."""
    if options.json is not None and (options.json.is_dir() or not options.json.absolute().parent.is_dir()):
        raise InputError(f"--json: {str(options.json)!r} is a folder, or in none")
    benchmark = benchmarks.get(options.task)
    answers = read_answers(benchmark, options.files)
    metrics = benchmark.metrics(answers)
    result = score(benchmark, answers, metrics)
    if options.json is not None:
        write_text(options.json, json.dumps(result, indent=2) + "\n")
    for line in table(metrics):
        print(line)
    for remark in result["remarks"]:
        print(remark)
    return 0


def read_answers(benchmark: Benchmark, files: Sequence[Path]) -> list[Answer]:
    """The answers in files of our lines, or in the benchmark's published forms.

    Raises:
        ValueError: a file cannot be read, is of another benchmark, an answer is there twice, or both kinds are mixed.
    """
    ours = [_is_ours(path) for path in files]
    if not any(ours):
        return benchmark.recorded(files)
    if not all(ours):
        raise InputError(f"{files[ours.index(False)]}: holds no lines of `cdistill eval`, other files given do")
    answers: dict[str, Answer] = {}
    for path in files:
        for record in line_records(path):
            if record.fields.get("task") != benchmark.name:
                raise InputError(f"{record.place}: is of {record.fields.get('task')!r}, not of {benchmark.name}")
            answer = Answer.from_json(record.fields, record.place)
            for name, values in benchmark.known.items():
                if (value := answer.question.facts.get(name)) not in values:
                    named = ", ".join(map(repr, values))
                    raise InputError(f"{record.place}: the fact {name} must be one of {named}, got {value!r:.60}")
            if answer.question.id in answers:
                raise InputError(f"{record.place}: {answer.question.id!r} is there twice")
            answers[answer.question.id] = answer
    return list(answers.values())


def _is_ours(path: Path) -> bool:
    if not path.is_file():
        raise InputError(f"{path}: is a folder, name the files in it" if path.is_dir() else f"no such file: {path}")
    with path.open("rb") as file:
        first = file.readline(1 << 24)
    try:
        record = json.loads(first)
    except ValueError:  # of a published form
        return False
    return isinstance(record, dict) and {"task", "prompt"} <= record.keys()


def score(
    benchmark: Benchmark, answers: Sequence[Answer], metrics: Mapping[str, Metric] | None = None
) -> dict[str, Any]:
    """Metrics of answers as JSON: values, counts, standard errors and intervals by name, and what there is to say."""
    metrics = benchmark.metrics(answers) if metrics is None else metrics
    unparsed = sum(answer.score is None and benchmark.read(answer) is None for answer in answers)
    cut = sum(answer.cut for answer in answers)
    remarks = benchmark.remarks([answer.question for answer in answers])
    if unparsed:
        remarks.append(f"{benchmark.name}: {unparsed} of {len(answers)} replies say nothing that counts, and are wrong")
    empty = sum(answer.score is None and not answer.reply.strip() for answer in answers) if not unparsed else 0
    if empty:
        remarks.append(f"{benchmark.name}: {empty} of {len(answers)} replies are empty, and are read by its rule")
    if cut:
        remarks.append(f"{benchmark.name}: {cut} of {len(answers)} replies were cut")
    return {
        "task": benchmark.name,
        "metrics": {name: metric.percent for name, metric in metrics.items()},
        "counts": {name: {"right": m.right, "n": m.n} for name, m in metrics.items() if m.right is not None},
        "standard_errors": {name: metric.standard_error for name, metric in metrics.items()},
        "intervals": {name: list(metric.interval) for name, metric in metrics.items()},
        "units": {name: metric.units for name, metric in metrics.items()},
        "answers": len(answers),
        "unparsed": unparsed,
        "cut": cut,
        "remarks": remarks,
    }


def table(metrics: Mapping[str, Metric]) -> list[str]:
    """One line for each metric: name, value, standard error, 95 % interval, counts."""
    width = max(map(len, metrics))
    lines = []
    for name, metric in metrics.items():
        low, high = metric.interval
        counts = f"{metric.right} of {metric.n}" if metric.right is not None else f"n = {metric.n}"
        lines.append(
            f"{name:<{width}}{metric.percent:8.2f} ± {metric.standard_error:4.2f}  [{low:6.2f}, {high:6.2f}]  {counts}"
        )
    return [*lines, "in %, ± standard error, 95 % interval (bootstrap over images or groups)"]
