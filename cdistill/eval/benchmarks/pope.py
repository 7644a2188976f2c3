"""POPE (Li et al., 2023): whether an object is in the image; the objects asked for in vain are random, popular or adversarial.

Replies are read by the authors' rule, to which every reply is yes or no. The yes-ratio is that of the replies (lmms-eval 0.7.3
reports that of the labels, and takes whole replies only).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import MappingProxyType

from cdistill.errors import InputError
from cdistill.eval.benchmarks import presence
from cdistill.eval.benchmarks.base import SHORT, Base, fact, find, template, unit
from cdistill.eval.contract import Answer, Question
from cdistill.eval.files import line_records
from cdistill.eval.replies import yes_unless_no
from cdistill.eval.statistics import Tally

SPLITS = ("random", "popular", "adversarial")


class POPE(Base):
    """POPE's questions, and ``accuracy``, ``precision``, ``recall``, ``yes_ratio``, ``f1`` of each split and their means."""

    name = "pope"
    title = "POPE (2023)"
    licence = "MIT; images: COCO val2014"
    download = (
        "github.com/AoiDragon/POPE: the three files of output/coco/ into --data; "
        "images.cocodataset.org/zips/val2014.zip: its folder val2014 is --images"
    )
    counts = MappingProxyType(dict.fromkeys(SPLITS, 3000))
    known = MappingProxyType({"subtype": SPLITS, "label": ("yes", "no")})
    prompt = "{}" + SHORT

    def load(self, data: Path) -> list[Question]:
        """The lines of ``coco_pope_random.json`` and the two others, those that are there."""
        prompt = template(data, self.prompt)
        result = []
        for path in find(data, "*pope_*.json"):
            split = next((each for each in SPLITS if path.stem.endswith(each)), None)
            if split is None:
                raise InputError(f"{path}: the name must end with one of {', '.join(SPLITS)}")
            for number, record in enumerate(line_records(path), 1):
                image = record.text("image")
                facts = {"subtype": split, "unit": image, "label": record.choice("label", ("yes", "no"))}
                item = record.name("question_id") if "question_id" in record.fields else str(number)
                result.append(Question(f"{split}/{item}", prompt.format(record.text("text")), (image,), facts=facts))
        return result

    def read(self, answer: Answer) -> str:
        """Yes or no."""
        return yes_unless_no(answer.reply)

    def tally(self, answers: Sequence[Answer]) -> Tally:
        """Units are images, which the splits share."""
        tally = Tally()
        there = {fact(answer, "subtype") for answer in answers}
        for answer in answers:
            presence.count(tally, unit(answer), fact(answer, "subtype"), fact(answer, "label"), self.read(answer))
        presence.measure(tally, [split for split in SPLITS if split in there])
        return tally


BENCHMARK = POPE()
