"""R-Bench (Wu et al., 2024): yes-or-no questions about relations, asked of the whole image.

By the authors' script, which gives what their paper calls Image(All): replies by POPE's rule, a label is "no" if it holds "no",
questions without an answer are passed over, 1e-5 in every denominator, and the mean of five lists of question ids (the script
then rounds to two digits). There is another R-Bench, of corrupted images.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from types import MappingProxyType

from cdistill.errors import InputError
from cdistill.eval.benchmarks import presence
from cdistill.eval.benchmarks.base import Base, fact, find, template, unit
from cdistill.eval.contract import Answer, Question
from cdistill.eval.files import json_records, line_records, read_text
from cdistill.eval.replies import yes_unless_no
from cdistill.eval.statistics import Tally

EPSILON = 1e-5


class RBench(Base):
    """R-Bench's image-level questions, and the means ``accuracy``, ``precision``, ``recall``, ``yes_ratio``, ``f1``."""

    name = "rbench"
    title = "R-Bench (2024)"
    licence = "Apache-2.0; images: Open Images v4"
    download = (
        "github.com/mrwu-mac/R-Bench links a Google Drive folder: image-level_filterd.json and "
        "nocaps_image-level_rel_ids_[1-5].json into --data; its images are --images"
    )
    counts = MappingProxyType({})
    known = MappingProxyType({"label": ("yes", "no")})

    def load(self, data: Path) -> list[Question]:
        """Questions of ``image-level*.json``, each with the lists of ids (``*_ids_[1-5].json``) that name it."""
        lists = find(data, "*image-level*_ids_[1-5].json", "*_ids_[1-5].json")
        paths = [path for path in find(data, "*image-level*.json", "*.json") if "_ids_" not in path.name]
        if len(paths) != 1:
            raise InputError(f"{data}: must hold one file of image-level questions, has {len(paths)}")
        return _questions(paths[0], lists, template(data, self.prompt))

    def recorded(self, files: Sequence[Path]) -> list[Answer]:
        """What the authors' script takes: questions, lists of ids, and lines ``{"question_id": 0, "text": "No"}``."""
        lists = [path for path in files if "_ids_" in path.name]
        others = {path: next(_records(path), None) for path in files if path not in lists}
        asked = [path for path, first in others.items() if first is not None and "label" in first.fields]
        if not lists or len(asked) != 1 or len(others) != 2:
            raise InputError(
                f"{files[0]}: give the questions with their labels, the lists of ids, and one file of replies"
            )
        replies: dict[str, str] = {}
        for path in others.keys() - set(asked):
            for record in _records(path):
                item, text = record.name("question_id"), record.get("text")
                if item in replies or not isinstance(text, str):
                    raise InputError(f"{record.place}: question_id {item} is there twice, or its text is no text")
                replies[item] = text
        questions = _questions(asked[0], lists, self.prompt)
        unknown = next(iter(replies.keys() - {question.id for question in questions}), None)
        if unknown is not None:
            raise InputError(f"{asked[0]}: has no question {unknown}, which a reply names")
        return [Answer(question, replies[question.id]) for question in questions if question.id in replies]

    def read(self, answer: Answer) -> str:
        """Yes or no."""
        return yes_unless_no(answer.reply)

    def tally(self, answers: Sequence[Answer]) -> Tally:
        """Units are images, which the lists share."""
        tally = Tally()
        there: set[str] = set()
        for answer in answers:
            for number in fact(answer, "lists"):
                there.add(f"ids_{number}")
                presence.count(tally, unit(answer), f"ids_{number}", fact(answer, "label"), self.read(answer))
        if there:
            presence.measure(tally, sorted(there), EPSILON)
        return tally

    def remarks(self, questions: Sequence[Question]) -> list[str]:
        """Lists of ids that are missing; the number of questions is not published."""
        there = {number for question in questions for number in question.facts["lists"]}
        missing = [str(number) for number in range(1, 6) if number not in there]
        return (
            [f"rbench: no question of id list {', '.join(missing)}, the published version has five"] if missing else []
        )


def _questions(path: Path, lists: Sequence[Path], prompt: str) -> list[Question]:
    numbers, result, seen = _lists(lists), [], set()
    for record in _records(path):
        item, image = record.name("question_id"), record.text("image")
        if item in seen:
            raise InputError(f"{record.place}: question_id {item} is there twice")
        seen.add(item)
        if not isinstance(record.get("label"), str):
            raise InputError(f"{record.place}: label must be a text, got {record.fields['label']!r:.60}")
        label = "no" if "no" in record.fields["label"].lower() else "yes"
        facts = {"unit": image, "label": label, "lists": numbers.get(item, [])}
        result.append(Question(item, prompt.format(record.text("text")), (image,), facts=facts))
    if not any(question.facts["lists"] for question in result):
        raise InputError(f"{path}: has none of the question ids in {', '.join(each.name for each in lists)}")
    return result


def _lists(paths: Sequence[Path]) -> dict[str, list[int]]:
    """Numbers of the lists by question id; one that a list names twice counts twice, as in the script."""
    found: dict[str, list[int]] = defaultdict(list)
    for path in paths:
        try:
            ids = json.loads(read_text(path))
        except json.JSONDecodeError as error:
            raise InputError(f"{path} line {error.lineno}: is not JSON ({error.msg})") from None
        if not isinstance(ids, list) or not all(isinstance(each, (int, str)) for each in ids):
            raise InputError(f"{path}: must be a list of question ids")
        for each in ids:
            found[str(each)].append(int(path.stem[-1]))
    return found


def _records(path: Path):
    return json_records(path) if read_text(path).lstrip().startswith("[") else line_records(path)


BENCHMARK = RBench()
