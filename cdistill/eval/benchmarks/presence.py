"""Yes-or-no questions about what is there: accuracy, precision, recall and F1 of "yes", and how often it is said."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cdistill.eval.statistics import Tally, Totals

MEASURES = ("accuracy", "precision", "recall", "yes_ratio", "f1")


def count(tally: Tally, unit: str, name: str, label: str, said: str) -> None:
    """Count an answer under a name."""
    tally.count(unit, f"{name}/accuracy", label == said)
    tally.count(unit, f"{name}/yes_ratio", said == "yes")
    for kind in ("true yes", "false yes", "missed yes"):
        hit = {"true yes": ("yes", "yes"), "false yes": ("no", "yes"), "missed yes": ("yes", "no")}[kind]
        tally.add(unit, f"{name}/{kind}", float((label, said) == hit))


def measure(tally: Tally, names: Sequence[str], epsilon: float = 0.0) -> None:
    """The five metrics of each name, then their plain means over the names; ``epsilon`` is added to every denominator."""
    for name in names:
        tally.share(f"{name}/accuracy")
        for kind in ("precision", "recall", "f1"):
            tally.metric(f"{name}/{kind}", _formula(name, kind, epsilon), [f"{name}/accuracy"])
        tally.share(f"{name}/yes_ratio")
    for kind in MEASURES:
        tally.mean(kind, [f"{name}/{kind}" for name in names])


def _formula(name: str, kind: str, epsilon: float):
    def formula(totals: Totals) -> np.ndarray:
        right = totals[f"{name}/true yes"]
        precision = _ratio(right, right + totals[f"{name}/false yes"] + epsilon)
        recall = _ratio(right, right + totals[f"{name}/missed yes"] + epsilon)
        f1 = _ratio(2.0 * precision * recall, precision + recall + epsilon)
        return {"precision": precision, "recall": recall, "f1": f1}[kind]

    return formula


def _ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """A quotient, 0 where nothing stands below."""
    return np.where(below == 0, 0.0, above / np.where(below == 0, 1.0, below))
