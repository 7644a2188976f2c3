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

    def questions(self, data: Path) -> list[Question]:
        """Questions of ``image-level*.json``, each with the lists of ids (``*_ids_[1-5].json``) that name it."""
        lists = _lists(find(data, "*image-level*_ids_[1-5].json", "*_ids_[1-5].json"))
        paths = [path for path in find(data, "*image-level*.json", "*.json") if "_ids_" not in path.name]
        if len(paths) != 1:
            raise ValueError(f"{data}: must hold one file of image-level questions, has {len(paths)}")
        prompt, result, seen = template(data, self.prompt), [], set()
        for record in _records(paths[0]):
            item, image = record.name("question_id"), record.text("image")
            if item in seen:
                raise ValueError(f"{record.place}: question_id {item} is there twice")
            seen.add(item)
            label = "no" if "no" in str(record.fields.get("label") or "").lower() else "yes"
            if not isinstance(record.get("label"), str):
                raise ValueError(f"{record.place}: label must be a text, got {record.fields['label']!r:.60}")
            facts = {"unit": image, "label": label, "lists": lists.get(item, [])}
            result.append(Question(item, prompt.format(record.text("text")), (image,), facts=facts))
        missing = next((item for item in lists if item not in seen), None)
        if missing is not None:
            raise ValueError(f"{paths[0]}: has no question {missing}, which a list of ids names")
        return result

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


def _lists(paths: Sequence[Path]) -> dict[str, list[int]]:
    """Numbers of the lists by question id; one that a list names twice counts twice, as in the script."""
    found: dict[str, list[int]] = defaultdict(list)
    for path in paths:
        try:
            ids = json.loads(read_text(path))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} line {error.lineno}: is not JSON ({error.msg})") from None
        if not isinstance(ids, list) or not all(isinstance(each, (int, str)) for each in ids):
            raise ValueError(f"{path}: must be a list of question ids")
        for each in ids:
            found[str(each)].append(int(path.stem[-1]))
    return found


def _records(path: Path):
    return json_records(path) if read_text(path).lstrip().startswith("[") else line_records(path)


BENCHMARK = RBench()
