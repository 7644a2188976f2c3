"""VizWiz-VQA (Gurari et al., 2018), validation: what blind people asked about their photographs, with ten answers each.

Asked as LLaVA 1.5's authors do, who let the model say "Unanswerable". The paper's figures are of a test split and come from a
server; validation is not comparable with them.
"""

from __future__ import annotations

from pathlib import Path
from types import MappingProxyType

from cdistill.eval.benchmarks.base import SHORT, find, template
from cdistill.eval.benchmarks.vqa import SoftAccuracy, people
from cdistill.eval.contract import Question
from cdistill.eval.files import json_records


class VizWiz(SoftAccuracy):
    """VizWiz's questions, and accuracy by type of answer and of all."""

    name = "vizwiz"
    title = "VizWiz-VQA (2018), validation"
    licence = "CC BY 4.0"
    download = "vizwiz.org: val.json of the VQA annotations into --data; the folder val of the images is --images"
    counts = MappingProxyType({"questions": 4319})
    prompt = "{}\nWhen the provided information is insufficient, respond with 'Unanswerable'." + SHORT

    def load(self, data: Path) -> list[Question]:
        """The records of ``val.json``."""
        prompt, result = template(data, self.prompt), []
        for record in json_records(find(data, "val.json", "*.json")[0]):
            image = record.text("image")
            kind = record.choice("answer_type", ("yes/no", "number", "other", "unanswerable"))
            facts = {"subtype": kind, "unit": image, "answers": people(record)}
            result.append(Question(image, prompt.format(record.text("question")), (image,), facts=facts))
        return result


BENCHMARK = VizWiz()
