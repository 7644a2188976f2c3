"""SADE (Ma et al., 2023): which of several captions fits an image, without captions that syntax gives away.

Not comparable with the paper: its repository has neither data nor scorer, so the reader is made after its description, and
recall@1 is by the mean log-likelihood of a caption's tokens.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from types import MappingProxyType

from cdistill.errors import InputError
from cdistill.eval.benchmarks.base import Base, by_facts, fact, find, groups, template, unit
from cdistill.eval.contract import Answer, Question
from cdistill.eval.files import Record, json_records, line_records
from cdistill.eval.statistics import Tally


class SADE(Base):
    """SADE's captions, and recall@1 of each file, and ``mean``."""

    name = "sade"
    title = "SADE (2023), by its description: not comparable"
    licence = "MIT; images: Visual Genome, VL-CheckList, COCO 2014, Flickr30k, Winoground"
    download = (
        "github.com/TeleeMa/SADE links a Google Drive folder: its references as TASK.json or TASK.jsonl into --data, each "
        "entry with image, positive (a text) and negatives (a list); --images has the images"
    )
    counts = MappingProxyType({})
    prompt = "Describe the image."

    def load(self, data: Path) -> list[Question]:
        """A question for each caption of each entry of ``*.json`` and ``*.jsonl``."""
        prompt, result = template(data, self.prompt), []
        for path in sorted([*data.glob("*.json"), *data.glob("*.jsonl")]) or find(data, "*.json", "*.jsonl"):
            records = line_records(path) if path.suffix == ".jsonl" else json_records(path)
            for number, record in enumerate(records):
                item, captions = f"{path.stem}/{number}", _captions(record)
                image = record.name("image")
                facts = {"subtype": path.stem, "item": item, "of": len(captions), "unit": image}
                for i, caption in enumerate(captions):
                    name = f"{item}/{i}"
                    facts = {**facts, "caption": i}
                    result.append(Question(name, prompt, (image,), "log_likelihood", caption, facts=facts))
        return result

    def read(self, answer: Answer) -> str | None:
        """Nothing: scores are compared."""
        return None

    def right(self, answer: Answer) -> float | None:
        """Nothing: a score means something beside others only."""
        return None

    def published(self, subtypes: Collection[str]) -> None:
        """No counts are."""

    def remarks(self, questions: Sequence[Question]) -> list[str]:
        """Also that this is not comparable."""
        return [
            *super().remarks(questions),
            "sade: read and scored by its paper's description, not comparable with published figures",
        ]

    def tally(self, answers: Sequence[Answer]) -> Tally:
        """Units are images."""
        tally = Tally()
        subtypes: dict[str, None] = {}
        for group in groups(answers).values():
            captions = by_facts(group, ["caption"], [(i,) for i in range(len(group))])
            first, *others = (_mean(captions[i,]) for i in range(len(group)))
            right = all(first > mean for mean in others)
            subtypes[fact(group[0], "subtype")] = None
            tally.count(unit(group[0]), fact(group[0], "subtype"), right)
        for subtype in subtypes:
            tally.share(subtype)
        if subtypes:
            tally.mean("mean", list(subtypes))
        return tally


def _mean(answer: Answer) -> float:
    if answer.score is None or answer.tokens < 1:
        raise InputError(f"question {answer.question.id!r} has no log-likelihood of at least one token")
    return answer.score / answer.tokens


def _captions(record: Record) -> list[str]:
    negatives = record.get("negatives", "negative")
    negatives = [negatives] if isinstance(negatives, str) else negatives
    if not isinstance(negatives, list) or not negatives or not all(isinstance(each, str) for each in negatives):
        raise InputError(f"{record.place}: negatives must be a list of texts")
    return [record.text("positive"), *negatives]


BENCHMARK = SADE()
