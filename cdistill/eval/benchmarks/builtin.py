"""The built-in task as a benchmark: questions about held-out scenes, drawn from a seed; nothing is read from files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import MappingProxyType

from PIL import Image

from cdistill.builtin.questions import COMPOSITIONAL, RECOGNITION
from cdistill.choices import MOST_DRAWN, require_count
from cdistill.eval.benchmarks.base import Base, fact, unit
from cdistill.eval.contract import Answer, Question
from cdistill.eval.statistics import Tally

FAMILIES = {"recognition": RECOGNITION, "compositional": COMPOSITIONAL}
PREFIX = "builtin:"


class Builtin(Base):
    """Accuracy by sub-type, and the means ``recognition`` and ``compositional``."""

    name = "builtin"
    title = "the built-in task, held-out scenes"
    licence = "Apache-2.0"
    download = "nothing: it is drawn from a seed"
    counts = MappingProxyType(dict.fromkeys((*RECOGNITION, *COMPOSITIONAL), 500))

    def load(self, data: Path) -> list[Question]:
        """What `draw` gives by default, whatever the folder."""
        return self.draw()

    def draw(self, *, n: int = 500, seed: int = 0, modality: str = "image") -> list[Question]:
        """``n`` questions of each sub-type, those of `cdistill.builtin.scorer.evaluate`; ``text`` writes the scene out."""
        from cdistill.builtin.scorer import held_out_questions

        require_count("n", n, MOST_DRAWN)
        result = []
        for subtype in (*RECOGNITION, *COMPOSITIONAL):
            data = held_out_questions(subtype, n=n, seed=seed, modality=modality)
            for index in range(n):
                question, answer = data.messages(index)
                texts = [part["text"] for part in question["content"] if part["type"] == "text"]
                name = f"{subtype}/{seed}/{index}"
                facts = {"subtype": subtype, "unit": name, "label": answer["content"][0]["text"]}
                images = (PREFIX + name,) if modality == "image" else ()
                result.append(Question(name, " ".join(texts), images, max_new_tokens=8, facts=facts))
        return result

    def read(self, answer: Answer) -> str | None:
        """The words of the reply."""
        return " ".join(answer.reply.split()) or None

    def right(self, answer: Answer) -> float:
        """Whether the reply begins with the words of the label."""
        label = str(fact(answer, "label")).split()
        return float(answer.reply.split()[: len(label)] == label)

    def tally(self, answers: Sequence[Answer]) -> Tally:
        """Every question is about a scene of its own."""
        tally = Tally()
        for answer in answers:
            tally.count(unit(answer), fact(answer, "subtype"), self.right(answer))
        for family, subtypes in FAMILIES.items():
            there = [subtype for subtype in subtypes if subtype in tally]
            for subtype in there:
                tally.share(subtype)
            if there:
                tally.mean(family, there)
        return tally

    def remarks(self, questions: Sequence[Question]) -> list[str]:
        """Nothing: there is no published version."""
        return []


def image(reference: str) -> Image.Image:
    """The picture that a question's ``builtin:SUBTYPE/SEED/INDEX`` names, 48 pixels square."""
    from cdistill.builtin.scorer import held_out_questions

    subtype, seed, index = reference.removeprefix(PREFIX).split("/")
    data = held_out_questions(subtype, n=int(index) + 1, seed=int(seed))
    return data.messages(int(index))[0]["content"][0]["image"]


BENCHMARK = Builtin()
