"""BiVLC (Miranda et al., 2024): SugarCrepe's captions with an image made for the wrong one.

Metrics by the authors' formulas; a model that generates is asked for the probability of "yes" to a question that quotes the
caption, as the authors do with CLIP-FlanT5. What CompoDistill's authors report under this name they do not define.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import MappingProxyType

from cdistill.errors import InputError
from cdistill.eval.benchmarks.base import find
from cdistill.eval.benchmarks.crossed import COMPARISONS, Crossed
from cdistill.eval.contract import Answer, Question
from cdistill.eval.files import Record, csv_records, parquet_records

SUBTYPES = ("add_att", "add_obj", "replace_att", "replace_obj", "replace_rel", "swap_att", "swap_obj")


class BiVLC(Crossed):
    """BiVLC's questions, and metrics ``i2t``, ``t2i``, ``group``, each also by sub-type."""

    name = "bivlc"
    title = "BiVLC (2024)"
    licence = "MIT"
    download = (
        "huggingface.co/datasets/imirandam/BiVLC: the parquet files of data/ into --data (537 MB, with the images)"
    )
    counts = MappingProxyType(dict(zip(SUBTYPES, (76, 399, 437, 1200, 462, 278, 81), strict=True)))
    known = MappingProxyType({"subtype": SUBTYPES})
    text_name, image_name = "i2t", "t2i"

    def load(self, data: Path) -> list[Question]:
        """Four questions for each row of the parquet files."""
        result: list[Question] = []
        for path in find(data, "*.parquet"):
            for record in parquet_records(path, without=("image", "negative_image")):
                captions = (record.text("caption"), record.text("negative_caption"))
                images = (f"{path.name}#{record.key}.image", f"{path.name}#{record.key}.negative_image")
                facts = {"unit": captions[0], "subtype": _subtype(record)}
                result += self.ask(str(len(result) // 4), captions, images, facts, data)
        return result

    def recorded(self, files: Sequence[Path]) -> list[Answer]:
        """The comparisons of a csv as the authors' evaluation writes it (True or False in seven columns)."""
        if len(files) > 1:
            raise InputError(f"{files[1]}: give one csv, it has all sub-types")
        answers: list[Answer] = []
        seen: dict[tuple[str, ...], str] = {}
        for record in csv_records(files[0]):
            if "correct" in record.fields and "text_score" not in record.fields:
                raise InputError(f"{files[0]}: is SugarCrepe's csv; score it as sugarcrepe")
            right = {name: record.flag(name) for name in COMPARISONS}
            same = tuple(value for name, value in record.fields.items() if "score" not in name)
            if same in seen:
                raise InputError(f"{record.place}: is {seen[same]} again")
            seen[same] = record.place
            for name, of in (("text_score", "text_score_i"), ("image_score", "image_score_c")):
                if record.flag(name) != (right[f"{of}0"] and right[f"{of}1"]):
                    raise InputError(f"{record.place}: {name} is not what {of}0 and {of}1 make")
            if record.flag("group_score") != all(right.values()):
                raise InputError(f"{record.place}: group_score is not what text_score and image_score make")
            item, subtype = str(len(answers) // len(right)), _subtype(record)
            facts = {"item": item, "of": len(right), "unit": record.text("caption"), "subtype": subtype}
            for name, value in right.items():
                question = Question(f"{item}/{name}", "", facts={**facts, "comparison": name})
                answers.append(Answer(question, str(value)))
        if not answers:
            raise InputError(f"{files[0]}: holds no rows")
        return answers


def _subtype(record: Record) -> str:
    subtype = f"{record.text('type')}_{record.text('subtype')}"
    if subtype not in SUBTYPES:
        raise InputError(f"{record.place}: type and subtype must make one of {', '.join(SUBTYPES)}, got {subtype!r}")
    return subtype


BENCHMARK = BiVLC()
