"""A stage's student put to benchmarks: the answers are those that ``cdistill eval`` would get of it."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from cdistill.errors import InputError
from cdistill.eval import tasks
from cdistill.eval.contract import Answer, Question
from cdistill.eval.inference import Inference
from cdistill.eval.loading import load_questioner
from cdistill.eval.prompts import Prompts
from cdistill.eval.results import nothing
from cdistill.eval.runner import Runner, by_images
from cdistill.models.load import Model
from cdistill.runtime.collectives import first_process, gathered_objects
from cdistill.train.recipes import StageConfig

Save = Callable[[Path], Any]


def open_tasks(config: StageConfig, *, quiet: bool) -> list[tasks.Task]:
    """The benchmarks of a stage; what is odd about them is said unless ``quiet``.

    Raises:
        ValueError: one cannot be read, or has not the metric that ``keep_best`` names.
    """
    wanted = config.eval
    assert wanted is not None
    names, found = wanted.names, []
    for name in names:
        data, images = (None if path is None else Path(path) for path in (wanted.data, wanted.images))
        try:
            task = tasks.prepare(name, data, images, limit=wanted.limit, several=len(names) > 1, quiet=quiet)
        except ValueError as error:
            said = (
                str(error).replace("--data", "data").replace("--images", "images")
            )  # keys here, options of the command
            raise InputError(f"eval.{said}" if said.startswith("data: ") else f"eval: {said}") from None
        prefix = f"eval.{name}."
        if config.keep_best is not None and config.keep_best.startswith(prefix):
            metrics = task.benchmark.metrics([nothing(question) for question in task.asked])
            if config.keep_best.removeprefix(prefix) not in metrics:
                known = ", ".join(prefix + metric for metric in metrics)
                raise InputError(f"keep_best must be a metric of the benchmark ({known}), got {config.keep_best!r}")
        found.append(task)
    return found


def questioner(student: Model, save_processor: Save) -> Any:
    """The processor or tokenizer that would be read beside the published student.

    Args:
        save_processor: writes it to a folder.

    Raises:
        ValueError: the student sees images, and no image processor goes with it.
    """
    with tempfile.TemporaryDirectory() as folder:
        save_processor(Path(folder))
        try:
            return load_questioner([Path(folder)], student.config, usual=False)
        except ValueError as error:
            raise InputError(f"eval: {str(error).replace(folder, 'the student')}") from None


def check_questions(found: Iterable[tasks.Task], student: Model) -> None:
    """Raise ValueError for questions about images to a student that sees none."""
    for task in found:
        if not hasattr(student.config, "vision_config") and any(question.images for question in task.asked):
            raise InputError(f"eval.tasks must show no images to a student that sees none, and {task.name} shows some")


class Evaluation:
    """Puts a student to benchmarks.

    Args:
        student: the model that is trained.
        processor: `questioner`.
        found: `open_tasks`.
        label: of the stage, for the bars.
        rank: of this process.
        world: processes, which share the questions.
        together: whether all processes ask all questions at the same time, as partitioned parameters need.
    """

    def __init__(
        self,
        student: Model,
        processor: Any,
        found: list[tasks.Task],
        label: str,
        rank: int,
        world: int,
        *,
        together: bool,
    ) -> None:
        self.student, self.prompts, self.tasks, self.label = student, Prompts(processor), found, label
        self.together, self.first, self.shares = together, *((0, 1) if together else (rank, world))
        self.inference: Inference | None = None

    def __call__(self) -> dict[str, float]:
        """Percent by benchmark and metric, as ``sugarcrepe.mean``; a benchmark that a failure keeps from an end has none."""
        with torch.compiler.set_stance("force_eager"):  # other lengths would use up what the layers may be compiled for
            values: dict[str, float] = {}
            for task in self.tasks:
                values |= {f"{task.name}.{name}": percent for name, percent in self._evaluate(task).items()}
            return values

    def _evaluate(self, task: tasks.Task) -> dict[str, float]:
        answers: dict[str, Answer] = {}
        unread: dict[str, str] = {}
        failure = None
        try:
            answers, unread = self._ask(task)
        except ValueError as error:  # such as numbers that are none; the training goes on
            failure = str(error)
        parts = gathered_objects((answers, unread, failure))
        for _, some, _ in parts:
            unread |= some
        failures = [each for _, _, each in parts if each is not None]
        if unread:
            task.leave_out(unread, wrong=False)
            failures += [] if task.asked else ["none of its images can be read"]
        if failures:
            self._say(f"{task.name} could not be evaluated: {failures[0]}")
            return {}
        if unread:
            self._say(f"{task.name}: images of {len(unread):,} questions cannot be read: {next(iter(unread.values()))}")
        answers = {name: answer for some, _, _ in parts for name, answer in some.items()}
        metrics = task.benchmark.metrics([answers[question.id] for question in task.asked])
        return {name: metric.percent for name, metric in metrics.items()}

    def _ask(self, task: tasks.Task) -> tuple[dict[str, Answer], dict[str, str]]:
        """This process's share of the answers by question, and why images could not be read."""
        inference = self._inference()
        share: list[Question] = [q for group in by_images(task.asked)[self.first :: self.shares] for q in group]
        runner = Runner(inference, tasks.source(task.pictures, self.prompts), say=tqdm.write)
        if not share:
            return {}, {}
        runner.plan(share)
        if self.together:  # or processes with other free memory would run other batches, and wait for each other
            runner.batch_size = min(gathered_objects(runner.batch_size))
        said: dict[str, Answer] = {}
        shown = first_process()
        with tqdm(total=len(share), desc=task.name, unit=" questions", leave=False, disable=not shown) as bar:
            for answers in runner.answers(share, bar):
                said |= {answer.question.id: answer for answer in answers}
        return said, runner.unread

    def _inference(self) -> Inference:
        """What asks the student, in the way that was found when it was first asked."""
        if self.inference is None:
            inference = Inference(self.student, self.prompts)
            inference.find_way()
            self.inference = inference
        return self.inference

    def _say(self, line: str) -> None:
        if first_process():
            tqdm.write(f"{self.label}: {line}")
