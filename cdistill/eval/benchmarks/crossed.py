"""Two captions and two images, each caption with each image: the metrics of Winoground and BiVLC."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cdistill.errors import InputError
from cdistill.eval.benchmarks.base import Base, by_facts, groups, template, unit
from cdistill.eval.contract import Answer, Question
from cdistill.eval.statistics import Tally

PAIRS = ((0, 0), (0, 1), (1, 0), (1, 1))  # caption and image

# A comparison: the pair of caption and image that must score more, and the one that must score less
COMPARISONS = {
    "text_score_i0": ((0, 0), (1, 0)),
    "text_score_i1": ((1, 1), (0, 1)),
    "image_score_c0": ((0, 0), (0, 1)),
    "image_score_c1": ((1, 1), (1, 0)),
}


class Crossed(Base):
    """Four scores for each group: caption 0 belongs to image 0, caption 1 to image 1.

    The text score asks each image for its caption, the image score each caption for its image, the group score both; each is
    right if both of its comparisons are, strictly. A model that generates is asked for the probability of "yes" (VQAScore, Lin
    et al., 2024), as BiVLC's authors do.
    """

    prompt = 'Does this figure show "{}"? Please answer yes or no.'
    text_name, image_name = "text", "image"

    def ask(
        self, item: str, captions: tuple[str, str], images: tuple[str, str], facts: Mapping[str, Any], data: Path
    ) -> list[Question]:
        """The four questions of a group."""
        prompt = template(data, self.prompt)
        continuation = "Yes" if prompt == self.prompt else "yes"
        return [
            Question(
                f"{item}_c{c}_i{i}",
                prompt.format(captions[c]),
                (images[i],),
                kind="probability",
                continuation=continuation,
                facts={"item": item, "of": len(PAIRS), "caption": c, "image": i, **facts},
            )
            for c, i in PAIRS
        ]

    def right(self, answer: Answer) -> float | None:
        """Nothing: a score means something beside the three others only."""
        return None

    def read(self, answer: Answer) -> str | None:
        """A recorded comparison."""
        return answer.reply or None

    def tally(self, answers: Sequence[Answer]) -> Tally:
        """Metrics of each sub-type, then of all."""
        tally = Tally()
        subtypes: dict[str, None] = {}
        for group in groups(answers).values():
            right = _comparisons(group)
            text = right["text_score_i0"] and right["text_score_i1"]
            image = right["image_score_c0"] and right["image_score_c1"]
            right |= {self.text_name: text, self.image_name: image, "group": text and image}
            subtype = group[0].question.facts.get("subtype")
            for name, value in right.items():
                tally.count(unit(group[0]), name, value)
                if subtype is not None and name not in COMPARISONS:
                    subtypes[subtype] = None
                    tally.count(unit(group[0]), f"{subtype}/{name}", value)
        names = (self.text_name, self.image_name, "group")
        for name in [f"{subtype}/{name}" for subtype in sorted(subtypes) for name in names] + [*COMPARISONS, *names]:
            if name in tally:
                tally.share(name)
        return tally


def _comparisons(group: Sequence[Answer]) -> dict[str, bool]:
    if "comparison" in group[0].question.facts:
        said = by_facts(group, ["comparison"], [(name,) for name in COMPARISONS])
        return {name: said[name,].reply == "True" for name in COMPARISONS}
    scores = {}
    for pair, answer in by_facts(group, ["caption", "image"], PAIRS).items():
        if answer.score is None:
            raise InputError(f"question {answer.question.id!r} has no score")
        scores[pair] = answer.score
    return {name: scores[more] > scores[less] for name, (more, less) in COMPARISONS.items()}
