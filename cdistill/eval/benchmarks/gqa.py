"""GQA (Hudson & Manning, 2019), balanced test-dev: questions made from scene graphs, with one answer each.

The authors' script compares strings; a reply is put into lower case without its last full stop before, as LLaVA's authors do.
(lmms-eval 0.7.3 takes all punctuation out.)
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from cdistill.errors import InputError
from cdistill.eval.benchmarks.base import SHORT, Accuracy, find, template
from cdistill.eval.contract import Answer, Question
from cdistill.eval.files import json_records, parquet_records


class GQA(Accuracy):
    """GQA's questions, and accuracy of ``binary`` and ``open`` questions and of all."""

    name = "gqa"
    title = "GQA (2019), balanced test-dev"
    licence = "CC BY 4.0"
    download = (
        "cs.stanford.edu/people/dorarad/gqa: testdev_balanced_questions.json into --data; "
        "the folder images of the images is --images"
    )
    counts = MappingProxyType({"questions": 12578})
    prompt = "{}" + SHORT

    def load(self, data: Path) -> list[Question]:
        """The questions of ``testdev_balanced_questions.json`` or of parquet files with the same fields."""
        path = find(data, "testdev_balanced_questions.json", "*questions.json", "*.parquet")[0]
        prompt, result = template(data, self.prompt), []
        for record in parquet_records(path) if path.suffix == ".parquet" else json_records(path):
            types = record.get("types")
            if not isinstance(types, Mapping) or not isinstance(types.get("structural"), str):
                raise InputError(f"{record.place}: the field types.structural is missing")
            item = record.name("id") if "id" in record.fields else record.key
            image = record.name("imageId")
            facts = {
                "subtype": "open" if types["structural"] == "query" else "binary",
                "unit": image,
                "label": record.text("answer"),
            }
            result.append(Question(item, prompt.format(record.text("question")), (f"{image}.jpg",), facts=facts))
        return result

    def read(self, answer: Answer) -> str | None:
        """The reply as it is compared."""
        return answer.reply.strip().rstrip(".").lower() or None


BENCHMARK = GQA()
