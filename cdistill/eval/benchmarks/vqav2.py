"""VQAv2 (Goyal et al., 2017), validation: open questions about COCO's images, with ten answers each.

The paper's figures are of test-dev and come from a server; validation is not comparable with them.
"""

from __future__ import annotations

from pathlib import Path
from types import MappingProxyType

from cdistill.errors import InputError
from cdistill.eval.benchmarks.base import SHORT, find, template
from cdistill.eval.benchmarks.vqa import SoftAccuracy, people
from cdistill.eval.contract import Question
from cdistill.eval.files import json_records


class VQAv2(SoftAccuracy):
    """VQAv2's questions, and accuracy of ``yes/no``, ``number``, ``other`` answers and of all."""

    name = "vqav2"
    title = "VQAv2 (2017), validation"
    licence = "CC BY 4.0; images: COCO val2014"
    download = (
        "visualqa.org: v2_OpenEnded_mscoco_val2014_questions.json and v2_mscoco_val2014_annotations.json into --data; "
        "images.cocodataset.org/zips/val2014.zip: its folder val2014 is --images"
    )
    counts = MappingProxyType({"questions": 214354})
    prompt = "{}" + SHORT
    words_first = False

    def load(self, data: Path) -> list[Question]:
        """The questions of ``*questions.json`` with the answers of ``*annotations.json``."""
        said = {}
        annotations = find(data, "*annotations.json")[0]
        for record in json_records(annotations, "annotations"):
            item = record.name("question_id")
            if item in said:
                raise InputError(f"{record.place}: question_id {item} is there twice")
            said[item] = (record.choice("answer_type", ("yes/no", "number", "other")), people(record))
        prompt, result = template(data, self.prompt), []
        for record in json_records(find(data, "*questions.json")[0], "questions"):
            item = record.name("question_id")
            if item not in said:
                raise InputError(f"{record.place}: question_id {item} has no answers in {annotations.name}")
            kind, answers = said.pop(item)
            image = str(record.fields.get("image") or f"COCO_val2014_{round(record.number('image_id')):012d}.jpg")
            facts = {"subtype": kind, "unit": image, "answers": answers}
            result.append(Question(item, prompt.format(record.text("question")), (image,), facts=facts))
        if said:
            raise InputError(f"{annotations}: question_id {next(iter(said))} is no question's")
        return result


BENCHMARK = VQAv2()
