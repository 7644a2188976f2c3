"""Reefknot (Zheng et al., 2025): relations in images of Visual Genome; the paper's columns come from the multiple-choice part.

No scorer is published. A letter is right or wrong; ``total`` is the share of all 6,950, which reproduces the totals of
CompoDistill's Table 13 but one (67.9 for CompoDistill is 66.75 by its own columns). The yes-or-no and free-answer parts, which
that paper does not use, are asked where their files are there; a free answer is right where it says the published sentence,
normalised as in VQA, a rule of ours.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from cdistill.errors import InputError
from cdistill.eval.benchmarks.base import Base, fact, find, template, unit
from cdistill.eval.contract import Answer, Question
from cdistill.eval.files import Record, line_records
from cdistill.eval.replies import first_word, letter, short_answer
from cdistill.eval.statistics import Tally

PARTS = {"Multichoice": "", "YESNO": "yes_no/", "VQA": "free/"}
KINDS = ("perception", "cognitive")
IMAGES = "VG_100K/{0}.jpg|VG_100K_2/{0}.jpg"


class Reefknot(Base):
    """Reefknot's questions, and metrics ``perception``, ``cognitive``, ``total``; the other parts' with a prefix."""

    name = "reefknot"
    title = "Reefknot (2025)"
    licence = "none given; images: Visual Genome"
    download = (
        "github.com/JackChen-seu/Reefknot: Dataset/Multichoice.jsonl into --data (YESNO.jsonl and VQA.jsonl beside it are "
        "asked, too); Visual Genome's folders VG_100K and VG_100K_2 lie in --images"
    )
    counts = MappingProxyType({"perception": 2150, "cognitive": 4800})
    known = MappingProxyType(
        {"part": tuple(PARTS), "subtype": tuple(prefix + kind for prefix in PARTS.values() for kind in KINDS)}
    )
    _others = MappingProxyType(
        {"yes_no/perception": 4300, "yes_no/cognitive": 5440, "free/perception": 2150, "free/cognitive": 2720}
    )

    def load(self, data: Path) -> list[Question]:
        """The lines of ``Multichoice.jsonl``, and of ``YESNO.jsonl`` and ``VQA.jsonl`` where they are there."""
        prompt, result = template(data, self.prompt), []
        for path in find(data, "*.jsonl"):
            part = next((part for part in PARTS if path.name.startswith(part)), None)
            if part is None:
                continue
            for number, record in enumerate(line_records(path), 1):
                result.append(_question(record, part, number, prompt))
        if not result:
            raise InputError(f"{data}: has no Multichoice.jsonl, YESNO.jsonl or VQA.jsonl")
        return result

    def read(self, answer: Answer) -> str | None:
        """A letter, yes or no, or a sentence."""
        part = fact(answer, "part")
        if part == "Multichoice":
            return letter(answer.reply, "ABCD")
        return first_word(answer.reply, ("yes", "no")) if part == "YESNO" else short_answer(answer.reply) or None

    def tally(self, answers: Sequence[Answer]) -> Tally:
        """Units are images."""
        tally = Tally()
        for answer in answers:
            subtype, right = fact(answer, "subtype"), self.read(answer) == fact(answer, "label")
            tally.count(unit(answer), subtype, right)
            tally.count(unit(answer), PARTS[fact(answer, "part")] + "total", right)
        for prefix in ("yes_no/", "free/", ""):
            for kind in (*KINDS, "total"):
                if f"{prefix}{kind}" in tally:
                    tally.share(f"{prefix}{kind}")
        return tally

    def published(self, subtypes: Collection[str]) -> Mapping[str, int]:
        """Of the other parts only where they are there."""
        return {**self.counts, **{name: count for name, count in self._others.items() if name in subtypes}}


def _question(record: Record, part: str, number: int, prompt: str) -> Question:
    label, kind = record.text("label"), record.choice("relation_type", KINDS)
    known = {"Multichoice": ("A", "B", "C", "D"), "YESNO": ("yes", "no"), "VQA": ()}[part]
    if known and label not in known:
        raise InputError(f"{record.place}: label must be one of {', '.join(known)}, got {label!r:.60}")
    image = record.name("image_id")
    facts = {
        "part": part,
        "subtype": PARTS[part] + kind,
        "unit": image,
        "label": label if known else short_answer(label),
    }
    return Question(
        f"{part}/{number}", prompt.format(record.text("query_prompt")), (IMAGES.format(image),), facts=facts
    )


BENCHMARK = Reefknot()
