"""MME (Fu et al., 2023): fourteen tasks of yes-or-no questions, two about each image.

By the authors' tool: a task's score is the accuracy of questions plus that of images both of whose questions are right, of 200;
``perception`` is the sum of ten, of 2,000, ``cognition`` of four, of 800. CompoDistill's column is perception / 20. Asked as
LLaVA 1.5's authors do, in whose words a short answer is asked for in place of "Please answer yes or no."
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from types import MappingProxyType

import numpy as np

from cdistill.errors import InputError
from cdistill.eval.benchmarks.base import SHORT, Base, fact, find, groups, template, unit
from cdistill.eval.contract import Answer, Question
from cdistill.eval.files import parquet_records, read_text
from cdistill.eval.replies import yes_or_no_at_start
from cdistill.eval.statistics import Formula, Tally

PERCEPTION = {
    "existence": 30,
    "count": 30,
    "position": 30,
    "color": 30,
    "posters": 147,
    "celebrity": 170,
    "scene": 200,
    "landmark": 200,
    "artwork": 200,
    "OCR": 20,
}
COGNITION = {"commonsense_reasoning": 70, "numerical_calculation": 20, "text_translation": 20, "code_reasoning": 20}
ASKED = "Please answer yes or no."


class MME(Base):
    """MME's questions, each task's ``acc``, ``acc_plus`` and score, ``cognition``, ``perception`` and ``perception/20``."""

    name = "mme"
    title = "MME (2023)"
    licence = "for research, given out by the authors"
    download = (
        "MME_Benchmark_release_version (github.com/BradyFU/Awesome-Multimodal-Large-Language-Models, branch Evaluation) "
        "is --data and --images; or the parquet files of huggingface.co/datasets/lmms-lab/MME into --data"
    )
    counts = MappingProxyType(PERCEPTION | COGNITION)
    known = MappingProxyType({"subtype": (*PERCEPTION, *COGNITION), "label": ("yes", "no")})
    prompt = "{}" + SHORT

    def load(self, data: Path) -> list[Question]:
        """The text files of each task's folder (``TASK/*.txt`` or ``TASK/questions_answers_YN/*.txt``), or parquet rows."""
        folders = [task for task in self.counts if (data / task).is_dir()]
        if folders:
            return [
                question
                for task in folders
                for path in find(data, f"{task}/questions_answers_YN/*.txt", f"{task}/*.txt")
                for question in self._of_file(path, task, data)
            ]
        prompt, result = template(data, self.prompt), []
        for path in find(data, "*.parquet"):
            for number, record in enumerate(parquet_records(path, without=("image",))):
                task, item = record.choice("category", tuple(self.counts)), record.name("question_id")
                image = f"{path.name}#{record.key}.image"
                text, label = record.text("question"), record.text("answer")
                result.append(
                    _question(f"{task}/{item}/{number}", task, item, image, prompt, text, label, record.place)
                )
        return result

    def _of_file(self, path: Path, task: str, data: Path) -> Iterator[Question]:
        prompt = template(data, self.prompt)
        folder = path.parent.with_name("images") if path.parent.name == "questions_answers_YN" else path.parent
        images = [each for each in (folder / f"{path.stem}{end}" for end in (".jpg", ".png")) if each.is_file()]
        image = str((images or [folder / f"{path.stem}.jpg"])[0].relative_to(data))
        for number, line in enumerate(filter(str.strip, read_text(path).splitlines()), 1):
            text, tab, label = line.strip().rpartition("\t")
            place = f"{path} line {number}"
            if not tab:
                raise InputError(f"{place}: must be a question, a tab, and Yes or No")
            yield _question(f"{task}/{path.stem}/{number}", task, path.stem, image, prompt, text, label, place)

    def recorded(self, files: Sequence[Path]) -> list[Answer]:
        """The authors' form: a file for each task, of lines ``image<TAB>question<TAB>label<TAB>reply``."""
        answers = []
        for path in files:
            if path.stem not in self.counts:
                raise InputError(f"{path}: the name must be a task's, one of {', '.join(self.counts)}")
            for number, line in enumerate(read_text(path).splitlines(), 1):
                parts = line.split("\t")
                if len(parts) != 4:
                    raise InputError(f"{path} line {number}: must have image, question, label and reply, split by tabs")
                image, text, label, reply = parts
                name, place = f"{path.stem}/{image}/{number}", f"{path} line {number}"
                answers.append(Answer(_question(name, path.stem, image, image, "{}", text, label, place), reply))
        return answers

    def read(self, answer: Answer) -> str | None:
        """Yes or no."""
        return yes_or_no_at_start(answer.reply)

    def tally(self, answers: Sequence[Answer]) -> Tally:
        """Units are images."""
        tally = Tally()
        there: dict[str, None] = {}
        for group in groups(answers).values():
            task, right = fact(group[0], "subtype"), [bool(self.right(answer)) for answer in group]
            there[task] = None
            for each in right:
                tally.count(unit(group[0]), f"{task}/acc", each)
            tally.count(unit(group[0]), f"{task}/acc_plus", all(right))
        for task in there:
            tally.share(f"{task}/acc")
            tally.share(f"{task}/acc_plus")
            tally.metric(task, _sum([task]), [f"{task}/acc"])
        for name, tasks, scale in (
            ("cognition", COGNITION, 1.0),
            ("perception", PERCEPTION, 1.0),
            ("perception/20", PERCEPTION, 1 / 20),
        ):
            summed = [task for task in tasks if task in there]
            if summed:
                tally.metric(name, _sum(summed, scale), [f"{task}/acc" for task in summed])
        return tally


def _sum(tasks: Sequence[str], scale: float = 1.0) -> Formula:
    return lambda totals: (
        scale * np.sum([totals.share(f"{task}/{kind}") for task in tasks for kind in ("acc", "acc_plus")], axis=0)
    )


def _question(name: str, task: str, item: str, image: str, prompt: str, text: str, label: str, place: str) -> Question:
    label = label.strip().lower().rstrip(".")
    if label not in ("yes", "no"):
        raise InputError(f"{place}: the label must be Yes or No, got {label!r:.60}")
    item = f"{task}/{item}"
    facts = {"subtype": task, "item": item, "of": 2, "unit": item, "label": label}
    return Question(name, prompt.format(text.replace(f" {ASKED}", "").strip()), (image,), facts=facts)


BENCHMARK = MME()
