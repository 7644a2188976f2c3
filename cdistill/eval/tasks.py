"""A run of a model over benchmarks: what is asked and what is missing, replies into a folder, metrics and tables."""

from __future__ import annotations

import argparse
import math
import os
import signal
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import Any

from tqdm import tqdm

from cdistill import __version__
from cdistill.errors import InputError
from cdistill.eval import benchmarks
from cdistill.eval.contract import Answer, Benchmark, Question
from cdistill.eval.inference import Inference
from cdistill.eval.loading import Loaded, load
from cdistill.eval.pictures import Pictures
from cdistill.eval.prompts import Prompt, Prompts
from cdistill.eval.results import Results, hash_of, nothing
from cdistill.eval.runner import Runner, Source, by_images
from cdistill.eval.score import score, table
from cdistill.runtime import launch
from cdistill.runtime.collectives import gathered_objects, naming_lost_peers, on_first_process
from cdistill.runtime.errors import Stopped
from cdistill.runtime.signals import StopRequest, stop_on_signals

NAMED = 3  # missing images that a line names


@dataclass
class Task:
    """What a benchmark asks of a model.

    Attributes:
        data: what tells all its questions from others.
        asked: the questions, but for those whose images are not there.
        missing: of those that are left out or wrong, why.
    """

    benchmark: Benchmark
    pictures: Pictures
    data: str
    asked: list[Question]
    missing: dict[str, str] = field(default_factory=dict)
    wrong: list[Question] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The benchmark's."""
        return self.benchmark.name

    def leave_out(self, lacking: Mapping[str, str], *, wrong: bool) -> None:
        """Take out questions that lack an image, and all that are asked about the same entries, or count them as wrong."""
        entries = {_entry(question): lacking[question.id] for question in self.asked if question.id in lacking}
        gone = [question for question in self.asked if _entry(question) in entries]
        self.missing |= {question.id: entries[_entry(question)] for question in gone}
        self.wrong += gone if wrong else []
        self.asked = [question for question in self.asked if _entry(question) not in entries]


def run(names: Sequence[str], options: argparse.Namespace) -> dict[str, Any] | None:
    """Put all tasks to the model; results by task on the first process, None on others.

    Raises:
        ValueError: data, model or folder do not fit, in one line, before anything is written.
        Stopped: a signal came; replies are kept.
    """
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if world > 1 and options.output is None:
        raise InputError("--output must name a folder where the processes put their replies together")
    tasks = [
        prepare(
            name,
            options.data,
            options.images,
            limit=options.limit,
            wrong=options.missing == "wrong",
            several=len(names) > 1,
            drawn={key: getattr(options, key) for key in ("n", "seed") if getattr(options, key) is not None},
        )
        for name in names
    ]
    with ExitStack() as at_end, launch.quiet(), naming_lost_peers():
        if world > 1:
            launch.init_process_group()
        loaded = load(options.model, dtype=options.dtype, load_in=options.load_in, device_map=options.device_map)
        for task in tasks:
            if not loaded.sees and any(question.images for question in task.asked):
                raise InputError(f"model: {options.model} sees no images, and {task.name} shows some")
        results = None if options.output is None else Results(options.output, _facts(loaded))
        if results is not None:
            on_first_process(lambda: _begin(results, tasks, options, at_end))
        inference = Inference(loaded.model, Prompts(loaded.processor))
        inference.find_way()
        found: dict[str, Any] = {}
        for task in tasks:
            with stop_on_signals() as request:
                answers = _ask(task, inference, loaded, results, options, request, rank, world)
            if rank == 0:
                found[task.name] = _publish(task, answers, results, options)
    return found if rank == 0 else None


def prepare(
    name: str,
    data: Path | None = None,
    images: Path | None = None,
    *,
    limit: int | None = None,
    wrong: bool = False,
    several: bool = False,
    drawn: Mapping[str, int] = MappingProxyType({}),
    quiet: bool = False,
) -> Task:
    """Read a benchmark's questions and see which images are there.

    Args:
        data: folder of the benchmark's files, or one with a folder ``name`` of them; of ``several`` it must be such a one.
        images: where the images are, other than ``data``.
        limit: about how many questions are asked, spread over the benchmark (`spread`).
        wrong: questions without their images are wrong; otherwise they are left out.
        drawn: of the built-in task ``n`` questions of each sub-type, and the ``seed``.
        quiet: say nothing of other versions and missing images.

    Raises:
        ValueError: the files are not there or not right.
    """
    benchmark = benchmarks.get(name)
    data = Path() if data is None else data
    if (data / name).is_dir():
        data = data / name
    elif several and name != "builtin":
        raise InputError(f"--data: {data} has no folder {name}; each of several tasks has one of its own there")
    if name == "builtin":
        own: Any = benchmark
        each = {} if limit is None else {"n": min(500, math.ceil(limit / len(own.counts)))}
        questions = own.draw(**(each | dict(drawn)))
    else:
        questions = benchmark.questions(data)
    if not questions:
        raise InputError(f"--data: {data} holds no questions of {name}")
    roots = [data, data / "images"]
    if images is not None:
        folder = images / name
        roots = [folder if several and folder.is_dir() else images, *roots]
    if limit is not None:
        questions = spread(questions, limit)
    remarks = [] if limit is not None else benchmark.remarks(questions)
    task, missing = _sorted_out(benchmark, Pictures(roots), questions, wrong=wrong)
    _print([] if quiet else [*remarks, *missing])
    return task


def spread(questions: Sequence[Question], limit: int) -> list[Question]:
    """Questions of entries at equal distances over a benchmark, whole entries, until there are ``limit`` or some more."""
    entries = list(dict.fromkeys(map(_entry, questions)))
    count = math.ceil(limit * len(entries) / len(questions))
    if count >= len(entries):
        return list(questions)
    chosen = {entries[i * len(entries) // count] for i in range(count)}
    return [question for question in questions if _entry(question) in chosen]


def _entry(question: Question) -> str:
    return str(question.facts.get("item", question.id))


def _sorted_out(
    benchmark: Benchmark, pictures: Pictures, questions: Sequence[Question], *, wrong: bool
) -> tuple[Task, list[str]]:
    """Questions whose images are there, and what to say of the others; of an entry that lacks one all questions go."""
    why = {name: pictures.missing(name) for name in dict.fromkeys(n for q in questions for n in q.images)}
    task = Task(benchmark, pictures, hash_of(questions), list(questions))
    lacking = {q.id: said for q in questions for name in q.images if (said := why[name]) is not None}
    task.leave_out(lacking, wrong=wrong)
    gone = [name for name, said in why.items() if said is not None]
    if not gone:
        return task, []
    if not task.asked:
        raise InputError(
            f"{benchmark.name}: none of its images is there ({next(iter(lacking.values()))}); see --images"
        )
    named = ", ".join(gone[:NAMED]) + (", ..." if len(gone) > NAMED else "")
    what = "count as wrong" if wrong else "are left out"
    return task, [
        f"{benchmark.name}: {len(gone):,} of {len(why):,} images are missing below {pictures.roots[0]} ({named}): "
        f"{len(task.missing):,} of {len(questions):,} questions {what}"
    ]


def _facts(loaded: Loaded) -> dict[str, Any]:
    return {"name": loaded.name, "fingerprint": loaded.fingerprint, "form": loaded.form}


def _begin(results: Results, tasks: Iterable[Task], options: argparse.Namespace, at_end: ExitStack) -> None:
    """Check all before anything is written, then leave out torn lines; the folder is this run's until the end."""
    asks = {
        task.name: {
            "limit": options.limit,
            "missing": options.missing,
            "data": task.data,
            "questions": len(task.asked) + len(task.missing),
        }
        for task in tasks
    }
    for name, asked in asks.items():
        results.check(name, asked, resume=options.resume)
    results.own(at_end)
    for name, asked in asks.items():
        results.check(name, asked, resume=options.resume)  # another run may have written there meanwhile
    for task in tasks:
        results.begin(task.name, asks[task.name])
        results.rewrite(task.name, list(results.answers(task.name, task.asked, task.missing).values()))


def _ask(
    task: Task,
    inference: Inference,
    loaded: Loaded,
    results: Results | None,
    options: argparse.Namespace,
    request: StopRequest,
    rank: int,
    world: int,
) -> dict[str, Answer]:
    """This process's share of the answers; on the first process, once all are done, those of all."""
    done = {} if results is None else results.answers(task.name, task.asked, task.missing)
    share = [question for group in by_images(task.asked)[rank::world] for question in group]
    left = [question for question in share if question.id not in done]
    runner = Runner(inference, source(task.pictures, inference.prompts), options.batch_size, say=tqdm.write)
    if left:
        work = runner.plan(left)
        if rank == 0:
            _print([work.line(task.name, loaded.bytes, world)])
        with tqdm(
            total=len(share), initial=len(share) - len(left), desc=task.name, unit=" questions", disable=rank > 0
        ) as bar:
            for answers in runner.answers(left, bar):
                done |= {answer.question.id: answer for answer in answers}
                if results is not None:
                    results.append(task.name, answers)
                if request.received:
                    break
    if request.received:
        kept = f"replies are in {options.output}; go on with --resume" if results is not None else "nothing was kept"
        print(f"cdistill: stopped by {signal.Signals(request.received).name}: {kept}", file=sys.stderr)
        raise Stopped(request.received)
    unread = {name: why for part in gathered_objects(runner.unread) for name, why in part.items()}
    if unread and rank == 0:
        first = next(iter(unread.values()))
        _print([f"{task.name}: the images of {len(unread):,} questions cannot be read, the first: {first}"])
    task.leave_out(unread, wrong=options.missing == "wrong")
    return results.answers(task.name, task.asked, task.missing) if results is not None and rank == 0 else done


def source(pictures: Pictures, prompts: Prompts) -> Source:
    """What makes prompts of questions about the same images."""

    def about(questions: Sequence[Question]) -> list[Prompt]:
        return prompts.about(questions, [pictures.open(name) for name in questions[0].images])

    return about


def _publish(
    task: Task, answers: Mapping[str, Answer], results: Results | None, options: argparse.Namespace
) -> dict[str, Any]:
    """Put the answers in the order of the questions, score them, print the table."""
    lost = [question.id for question in task.asked if question.id not in answers]
    if lost:
        raise InputError(f"{task.name}: {len(lost):,} replies were lost, as that to {lost[0]!r}; go on with --resume")
    ordered = [answers[question.id] for question in task.asked]
    ordered += [nothing(question) for question in task.wrong]
    result = score(task.benchmark, ordered)
    if task.missing:
        what = "count as wrong" if task.wrong else "are left out"
        result["remarks"].append(f"{task.name}: {len(task.missing):,} questions without their images {what}")
    result |= {
        "missing": len(task.missing),
        "model": options.model,
        "images": [str(root.absolute()) for root in task.pictures.roots],
        "versions": {"cdistill": __version__} | {name: version(name) for name in ("torch", "transformers")},
    }
    if results is not None:
        results.rewrite(task.name, ordered)
        results.publish(task.name, result)
    _print([f"{task.benchmark.title}: {options.model}", *table(task.benchmark.metrics(ordered)), *result["remarks"]])
    return result


def _print(lines: Iterable[str]) -> None:
    if os.environ.get("RANK", "0") == "0":
        for line in lines:
            tqdm.write(line)
