"""Winoground (Thrush et al., 2022): two captions of the same words, and two images.

Metrics by the paper's formulas. The paper scores pairs by models made for it; a model that generates is asked for the
probability of "yes" instead, so its figures are not comparable with the paper's table.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from types import MappingProxyType

from cdistill.errors import InputError
from cdistill.eval.benchmarks.base import find
from cdistill.eval.benchmarks.crossed import PAIRS, Crossed
from cdistill.eval.contract import Answer, Question
from cdistill.eval.files import Record, line_records, parquet_records


class Winoground(Crossed):
    """Winoground's questions, and metrics ``text``, ``image``, ``group``."""

    name = "winoground"
    title = "Winoground (2022)"
    licence = "non-commercial, of Meta and Getty; nothing of it may be passed on"
    download = (
        "huggingface.co/datasets/facebook/winoground (gated): data/examples.jsonl into --data, "
        "data/images.zip unpacked: its folder images is --images; or the parquet files into --data"
    )
    counts = MappingProxyType({"questions": 400})

    def load(self, data: Path) -> list[Question]:
        """Four questions for each line of ``examples.jsonl``, or row of the parquet files."""
        result: list[Question] = []
        seen: set[str] = set()
        for path in find(data, "examples.jsonl", "*.parquet"):
            in_parquet = path.suffix == ".parquet"
            records = parquet_records(path, without=("image_0", "image_1")) if in_parquet else line_records(path)
            for record in records:
                item = record.name("id")
                if item in seen:
                    raise InputError(f"{record.place}: the id {item} is there twice")
                seen.add(item)
                captions = (record.text("caption_0"), record.text("caption_1"))
                images = (_image(record, path, 0), _image(record, path, 1))
                facts = {"unit": item, "tag": str(record.fields.get("collapsed_tag") or record.fields.get("tag") or "")}
                result += self.ask(item, captions, images, facts, data)
        return result

    def recorded(self, files: Sequence[Path]) -> list[Answer]:
        """Scores as JSON lines ``{"label": "0_c0_i0", "score": 29.97}``; groups without all four are refused."""
        answers: dict[str, Answer] = {}
        for path in files:
            for record in line_records(path):
                found = re.fullmatch(r"(\d+)_c([01])_i([01])", record.text("label"))
                if found is None:
                    raise InputError(f"{record.place}: label must be like 0_c0_i1, got {record.fields['label']!r:.60}")
                if found[0] in answers:
                    raise InputError(f"{record.place}: {found[0]} is there twice; score one model's file at a time")
                item, caption, image = found.groups()
                facts = {"item": item, "unit": item, "of": len(PAIRS), "caption": int(caption), "image": int(image)}
                question = Question(found[0], "", kind="probability", facts=facts)
                answers[found[0]] = Answer(question, score=record.number("score"))
        last = max((int(label.split("_")[0]) for label in answers), default=-1)
        labels = (f"{item}_c{c}_i{i}" for item in range(last + 1) for c, i in PAIRS)
        missing = next((label for label in labels if label not in answers), None)
        if missing is not None or last < 0:
            raise InputError(f"{files[0]}: {missing or '0_c0_i0'} is missing")
        return list(answers.values())


def _image(record: Record, path: Path, number: int) -> str:
    if path.suffix == ".parquet":
        return f"{path.name}#{record.key}.image_{number}"
    name = record.text(f"image_{number}")
    return name if Path(name).suffix else f"{name}.png"


BENCHMARK = Winoground()
