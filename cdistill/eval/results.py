"""A folder of results: one model's replies to any number of tasks, as they come, and the metrics made of them.

``run.json`` says which model answers and how, and what each task asks. ``TASK.jsonl`` has a line for each answer, ``TASK.json``
the metrics, once all is answered.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Container, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cdistill.errors import InputError
from cdistill.eval.contract import Answer, Question
from cdistill.eval.files import read_text
from cdistill.files import owned, remove_unfinished, write_text

RUN = "run.json"
LOST = {"log_likelihood": -1e30, "probability": 0.0}  # scores that lose to any other


class Results:
    """The folder, for one process of those that share the work.

    Args:
        folder: made if it is not there.
        model: facts that make a model's replies what they are; all are the same whenever the folder is written to.

    Raises:
        ValueError: another model wrote the folder, or it cannot be written.
    """

    def __init__(self, folder: Path, model: Mapping[str, Any]) -> None:
        self.folder, self.model = folder, dict(model)
        self.tasks: dict[str, dict[str, Any]] = {}
        if (folder / RUN).exists():
            self._read()
        elif folder.is_dir() and any(folder.glob("*.jsonl")):
            raise InputError(f"--output: {folder} holds files of something else; name another folder")

    def _read(self) -> None:
        path = self.folder / RUN
        try:
            known = json.loads(read_text(path))
            theirs, self.tasks = dict(known["model"]), dict(known["tasks"])
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path}: is not what an evaluation writes ({error!r:.80})") from None
        for name, value in self.model.items():
            if theirs.get(name) != value:
                other = theirs.get("name")
                what = f"the model {other!r} wrote it" if other != self.model["name"] else f"its {name} was another one"
                raise InputError(
                    f"--output: {self.folder} is of another run: {what} ({theirs.get(name)}, now {value}); name another folder"
                )

    def check(self, task: str, asks: Mapping[str, Any], *, resume: bool) -> None:
        """See that replies to a task can be put here.

        Raises:
            ValueError: there are some and ``resume`` is not said, or they are to something else than ``asks`` says.
        """
        if (self.folder / f"{task}.jsonl").exists() and not resume:
            raise InputError(
                f"--output: {self.folder} holds replies to {task}; go on with --resume, or name another folder"
            )
        known = self.tasks.get(task, asks)
        for name, value in asks.items():
            if known.get(name) != value:
                raise InputError(
                    f"--output: the replies to {task} in {self.folder} are to other questions: {name} was {known.get(name)}, "
                    f"now {value}; name another folder"
                )

    def own(self, at_end: ExitStack) -> None:
        """Make the folder, keep other runs out of it until ``at_end``, and read again what it holds."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"--output: {self.folder} cannot be made ({error.strerror})") from None
        at_end.enter_context(owned(self.folder, "--output"))
        remove_unfinished(self.folder)
        if (self.folder / RUN).exists():
            self._read()

    def begin(self, task: str, asks: Mapping[str, Any]) -> None:
        """Note what a task asks, before it does."""
        self.tasks[task] = dict(asks)
        self.folder.mkdir(parents=True, exist_ok=True)
        whole = {"model": self.model, "tasks": self.tasks}
        write_text(self.folder / RUN, json.dumps(whole, indent=2, ensure_ascii=False) + "\n")

    def answers(self, task: str, questions: Sequence[Question], left_out: Container[str] = ()) -> dict[str, Answer]:
        """The answers to these questions that are there, by id.

        Lines that a kill has torn, those to questions ``left_out``, and those that only say that nothing was asked are none.

        Raises:
            ValueError: a whole line is not an answer to one of the questions.
        """
        path = self.folder / f"{task}.jsonl"
        if not path.exists():
            return {}
        asked = {question.id: _written(question) for question in questions}
        found: dict[str, Answer] = {}
        for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
            try:
                record = json.loads(line)
            except ValueError:
                continue
            place = f"{path} line {number}"
            answer = Answer.from_json(record, place)
            if answer.question.id in left_out or answer == nothing(answer.question):
                continue
            if record.get("task") != task or asked.get(answer.question.id) != _written(answer.question):
                raise InputError(f"{place}: is no answer to a question of {task} as it is asked now")
            found[answer.question.id] = answer
        return found

    def rewrite(self, task: str, answers: Sequence[Answer]) -> None:
        """Put these answers in place of all that are there, at once."""
        lines = (json.dumps(answer.to_json(task), ensure_ascii=False) + "\n" for answer in answers)
        write_text(self.folder / f"{task}.jsonl", "".join(lines))

    def append(self, task: str, answers: Sequence[Answer]) -> None:
        """Add answers: each a line written at once, whole in the face of other processes that add theirs."""
        try:
            descriptor = os.open(self.folder / f"{task}.jsonl", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            try:
                for answer in answers:
                    write_line(descriptor, json.dumps(answer.to_json(task), ensure_ascii=False) + "\n")
            finally:
                os.close(descriptor)
        except OSError as error:
            raise InputError(
                f"--output: {self.folder} cannot be written ({error.strerror}); go on with --resume"
            ) from None

    def publish(self, task: str, result: Mapping[str, Any]) -> None:
        """Write a task's metrics, with what the run says of model and questions."""
        whole = {**result, "run": self.model, "asks": self.tasks[task]}
        write_text(self.folder / f"{task}.json", json.dumps(whole, indent=2, ensure_ascii=False) + "\n")


def write_line(descriptor: int, line: str) -> None:
    """Write a line at once; OSError where it is not whole."""
    data = line.encode()
    if os.write(descriptor, data) != len(data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def nothing(question: Question) -> Answer:
    """What stands for the answer to a question that could not be asked, and is wrong."""
    return Answer(question, score=LOST.get(question.kind))


def hash_of(questions: Sequence[Question]) -> str:
    """What tells a list of questions from others."""
    digest = hashlib.sha256()
    for question in questions:
        digest.update(_written(question).encode())
    return digest.hexdigest()[:16]


def _written(question: Question) -> str:
    return json.dumps(asdict(question), sort_keys=True)
