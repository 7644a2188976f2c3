"""Averages of the paper, and its figures for the models that it made: its tables 1 and 13."""

from __future__ import annotations

from cdistill.eval.benchmarks import GROUPS

AVERAGES = {name: GROUPS[name] for name in ("vqa", "compositional", "hallucination")}
TITLES = {"vqa": "VQA average", "compositional": "compositional average", "hallucination": "hallucination average"}

_COLUMNS = (
    "vqav2",
    "vizwiz",
    "gqa",
    "textvqa",
    "mme",
    "sugarcrepe",
    "sade",
    "bivlc",
    "winoground",
    "rbench",
    "reefknot",
)
# The names of the authors' checkpoints. CompoDistill's Reefknot is misprinted as 67.9 in table 13; table 4 has 66.7.
_FIGURES = {
    "CompoDistill-Teacher-4B": (79.1, 48.0, 62.1, 56.7, 67.2, 83.0, 75.5, 64.8, 57.8, 79.1, 67.9),
    "CompoDistill-SFT-2B": (73.6, 31.2, 57.9, 50.6, 61.2, 73.3, 63.9, 58.5, 47.2, 74.3, 61.3),
    "CompoDistill-2B": (78.8, 42.5, 62.2, 56.4, 70.1, 82.9, 69.4, 63.3, 51.2, 78.6, 66.7),
}
# Why figures beside each other need not mean the same.
REASONS = {
    "the paper does not say how it scored {}: not comparable": ("sade", "bivlc", "winoground"),
    "the paper's {} are of test splits, scored by a server: not comparable": ("vqav2", "vizwiz"),
}


def figures(model: str) -> dict[str, float] | None:
    """The paper's figures in percent by benchmark, for a hub id or a folder that ends in the name of such a checkpoint."""
    row = _FIGURES.get(model.rstrip("/").rsplit("/", 1)[-1])
    return None if row is None else dict(zip(_COLUMNS, row, strict=True))
