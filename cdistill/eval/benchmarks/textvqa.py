"""TextVQA (Singh et al., 2019), validation: questions about text in images, with ten answers each.

Asked as LLaVA's and CompoDistill's authors do, with the tokens that Rosetta's OCR found in the image behind the question
(lmms-eval 0.7.3 leaves them out unless it is told).
"""

from __future__ import annotations

from pathlib import Path
from types import MappingProxyType
from typing import Any

from cdistill.errors import InputError
from cdistill.eval.benchmarks.base import SHORT, find, template
from cdistill.eval.benchmarks.vqa import SoftAccuracy, people
from cdistill.eval.contract import Question
from cdistill.eval.files import Record, json_records, line_records, parquet_records

MARK = "Reference OCR token:"


class TextVQA(SoftAccuracy):
    """TextVQA's questions, and ``accuracy``."""

    name = "textvqa"
    title = "TextVQA (2019), validation"
    licence = "CC BY 4.0"
    download = (
        "textvqa.org: TextVQA_0.5.1_val.json and TextVQA_Rosetta_OCR_v0.2_val.json into --data; "
        "the folder train_images of the images is --images"
    )
    counts = MappingProxyType({"questions": 5000})
    prompt = "{}\nReference OCR token: {}" + SHORT

    def load(self, data: Path) -> list[Question]:
        """Entries of ``TextVQA*_val.json`` with the tokens of ``*OCR*_val.json`` or of LLaVA's ``*_ocr.jsonl``, or rows of
        parquet files with ``ocr_tokens``.
        """
        paths = [path for path in find(data, "TextVQA*val.json", "*.parquet") if "OCR" not in path.name]
        if not paths:
            raise InputError(f"{data}: has no TextVQA*val.json")
        prompt, result = template(data, self.prompt), []
        in_parquet = paths[0].suffix == ".parquet"
        tokens = {} if in_parquet else _tokens(find(data, "*_ocr.jsonl", "*OCR*val.json")[0])
        for path in paths:
            for record in parquet_records(path, without=("image",)) if in_parquet else json_records(path, "data"):
                image_id, question = record.name("image_id"), record.text("question")
                if in_parquet:
                    image, found = f"{path.name}#{record.key}.image", _listed(record)
                else:
                    key = next((key for key in (f"{image_id} {question.lower()}", image_id) if key in tokens), None)
                    if key is None:
                        raise InputError(f"{record.place}: image_id {image_id} has no OCR tokens")
                    image, found = f"{image_id}.jpg", tokens[key]
                facts = {"unit": image_id, "answers": people(record)}
                text = prompt.format(question.capitalize(), found)
                result.append(Question(record.name("question_id"), text, (image,), facts=facts))
        return result


def _tokens(path: Path) -> dict[str, str]:
    """Tokens by image, or by image and question."""
    if path.suffix != ".jsonl":
        return {record.name("image_id"): _listed(record) for record in json_records(path, "data")}
    found = {}
    for record in line_records(path):
        question, *lines = record.text("text").split("\n")
        named = [line.removeprefix(MARK).strip() for line in lines if line.startswith(MARK)]
        if not named:
            raise InputError(f"{record.place}: text has no line that starts with {MARK!r}")
        found[f"{record.name('question_id')} {question.lower()}"] = named[0]
    return found


def _listed(record: Record) -> str:
    value: Any = record.fields.get("ocr_tokens")
    if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
        raise InputError(f"{record.place}: ocr_tokens must be a list of texts")
    return ", ".join(value)


BENCHMARK = TextVQA()
