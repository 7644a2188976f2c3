"""VSR (Liu et al., 2023): whether a caption about how two things lie to each other is true of an image.

The authors train classifiers; the prompt for models that generate is ours, in InstructBLIP's words.
"""

from __future__ import annotations

from pathlib import Path
from types import MappingProxyType

from cdistill.errors import InputError
from cdistill.eval.benchmarks.base import Accuracy, find, template
from cdistill.eval.contract import Answer, Question
from cdistill.eval.files import line_records
from cdistill.eval.replies import first_word

MEANINGS = {"true": "true", "yes": "true", "false": "false", "no": "false"}


class VSR(Accuracy):
    """VSR's zero-shot test split, and ``true``, ``false`` (accuracy on captions that are), ``accuracy``."""

    name = "vsr"
    title = "VSR (2023), zero-shot test"
    licence = "Apache-2.0; images: COCO 2017"
    download = (
        "github.com/cambridgeltl/visual-spatial-reasoning: data/splits/zeroshot/test.jsonl into --data; "
        "images: COCO train2017 and val2017, all in one folder, which is --images"
    )
    counts = MappingProxyType({"true": 629, "false": 593})
    known = MappingProxyType({"label": ("true", "false")})
    prompt = "Based on the image, is this statement true or false? {}\nAnswer with true or false directly."

    def load(self, data: Path) -> list[Question]:
        """The lines of ``test.jsonl``, or of the only ``*.jsonl`` there."""
        paths = find(data, "test.jsonl", "*.jsonl")
        if len(paths) > 1:
            raise InputError(f"{data}: has no test.jsonl and several others")
        prompt = template(data, self.prompt)
        result = []
        for number, record in enumerate(line_records(paths[0]), 1):
            label = "true" if record.flag("label") else "false"
            image = record.text("image")
            facts = {"subtype": label, "unit": image, "label": label, "relation": record.text("relation")}
            result.append(Question(str(number), prompt.format(record.text("caption")), (image,), facts=facts))
        return result

    def read(self, answer: Answer) -> str | None:
        """True or false, by the first of the words true, yes, false, no."""
        word = first_word(answer.reply, tuple(MEANINGS))
        return None if word is None else MEANINGS[word]


BENCHMARK = VSR()
