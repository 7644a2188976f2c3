"""Whether students answer better when they look where the teacher looks: accuracy before and after an `exchange`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from tqdm import tqdm

from cdistill.attention.data import Set
from cdistill.attention.exchange import AsStudent, Exchanged, both_installed, exchange
from cdistill.attention.models import Models
from cdistill.data.samples import BadSampleError
from cdistill.errors import InputError
from cdistill.eval.contract import Answer
from cdistill.eval.inference import Inference
from cdistill.eval.paired import Difference, differences, draws
from cdistill.eval.runner import Runner


def intervene(
    models: Models, sets: Sequence[Set], batch_size: int | None, *, span: Any, share: float, heads: str
) -> dict[str, Any]:
    """What the file holds: the exchange, and under ``sets`` the teacher's metrics and each student's before and after.

    Raises:
        ValueError: `exchange`'s, before anything is asked.
    """
    exchanges = [exchange(models, i, span=span, share=share, heads=heads) for i in range(len(models.students))]
    said = [
        {"model": name, "matches": [[match.student, list(match.teachers)] for match in what.matches]}
        for name, what in zip(models.names, exchanges, strict=True)
    ]
    found = []
    for of in sets:
        teacher = answers(models, of, models.teacher, f"{of.name}, teacher", batch_size)
        students = []
        for i, what in enumerate(exchanges):
            before = answers(models, of, AsStudent(models, i), f"{of.name}, {models.names[i]}", batch_size)
            with both_installed(models):
                changed = Exchanged(models, i, what)
                after = answers(models, of, changed, f"{of.name}, {models.names[i]}, exchanged", batch_size)
            students.append({"model": models.names[i], "place": i, "metrics": _compared(of, before, after)})
        tally = _tally(of, teacher)
        metrics = {name: metric.percent for name, metric in tally.measure().items()}
        entry = {"name": of.name, "group": of.group, "questions": len(teacher), "left_out": dict(of.left_out)}
        found.append(entry | {"teacher": metrics, "students": students})
    return {"share": share, "layers": span, "heads": heads, "exchanges": said, "sets": found}


def answers(models: Models, of: Set, inference: Inference, title: str, batch_size: int | None) -> list[Answer]:
    """A model's answers to a set's questions, in their order."""

    def source(questions: Sequence[Any]) -> list[Any]:
        readings = of.read(models, questions)
        for reading in readings:
            if not any(token in models.visual_ids for token in reading.ids):
                raise BadSampleError("no image", "no visual token stands before the answer")
        return readings

    runner = Runner(inference, source, batch_size, say=tqdm.write)
    runner.plan(of.questions)
    said: dict[str, Answer] = {}
    with tqdm(total=len(of.questions), desc=title, unit=" questions") as bar:
        for some in runner.answers(of.questions, bar):
            said |= {answer.question.id: answer for answer in some}
    if runner.unread:
        name, why = next(iter(runner.unread.items()))
        raise InputError(f"{of.name}: question {name!r} cannot be asked: {why}")
    return [said[question.id] for question in of.questions]


def _tally(of: Set, said: Sequence[Answer]) -> Any:
    assert of.benchmark is not None, "sets of data that cannot be scored are not taken"
    return of.benchmark.tally(said)


def _compared(of: Set, before: Sequence[Answer], after: Sequence[Answer]) -> list[dict[str, Any]]:
    """Every metric before and after, and their difference with a paired test."""
    first, second = _tally(of, before), _tally(of, after)
    drawn = draws(first, second, of.name)
    apart: dict[str, Difference] = differences(first, second, drawn)
    ours, theirs = first.measure(), second.measure()
    return [
        {
            "metric": name,
            "n": ours[name].n,
            "before": {"percent": ours[name].percent, "interval": ours[name].interval},
            "after": {"percent": theirs[name].percent, "interval": theirs[name].interval},
            "difference": asdict(difference),
        }
        for name, difference in apart.items()
    ]


def table(result: dict[str, Any]) -> list[str]:
    """Accuracies as lines of text."""
    lines = []
    for of in result["sets"]:
        for student in of["students"]:
            lines.append(f"{of['name']}: {student['model']}, {of['questions']:,} questions")
            for each in student["metrics"]:
                d, teacher = each["difference"], of["teacher"][each["metric"]]
                change = f"{d['percent']:+5.1f} ± {d['standard_error']:.1f}, p = {d['p']:.3f} by {d['test']}"
                lines.append(
                    f"  {each['metric']:<16}{each['before']['percent']:6.1f} -> {each['after']['percent']:5.1f}  ({change}; "
                    f"teacher {teacher:.1f})"
                )
    lines.append(
        f"in %, the student's attention to the image replaced by {1 - result['share']:g} of its own and {result['share']:g} "
        f"of the teacher's in layers {result['layers']}, heads {result['heads']}"
    )
    return lines
