"""How sure a student is of the right answer where it looks as its teacher does (paper figure 3)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from cdistill.attention.data import Set
from cdistill.attention.measurement import Measured, measure
from cdistill.attention.models import Models
from cdistill.attention.similarity import describe
from cdistill.eval.statistics import REPLICATES, bootstrapped_means

BINS = 8


def confidence(models: Models, sets: Sequence[Set], batch_size: int | None) -> dict[str, Any]:
    """What the file holds under ``sets``: of every set and student the bins and the rank correlation."""
    return {"sets": [_of_set(models, each, measure(models, each, batch_size, probabilities=True)) for each in sets]}


def _of_set(models: Models, of: Set, measured: Measured) -> dict[str, Any]:
    students = []
    for i, name in enumerate(models.names):
        samples = measured.samples[i + 1]
        similarity = np.concatenate([sample["row_similarity"] for sample in samples])
        probability = np.concatenate([sample["probability"] for sample in samples])
        units = [unit for unit, sample in zip(measured.units, samples, strict=True) for _ in sample["probability"]]
        correlation, low, high = rank_correlation(similarity, probability, units)
        students.append(
            {
                "model": name,
                "place": i,
                "tokens": len(units),
                "bins": bins(similarity, probability, units),
                "rank_correlation": {"mean": correlation, "low": low, "high": high},
            }
        )
    return describe(of, measured) | {"students": students}


def bins(
    similarity: np.ndarray, probability: np.ndarray, units: Sequence[str], most: int = BINS
) -> list[dict[str, Any]]:
    """Answer tokens in bins of about equally many, from the least similar: edges, counts, means and 95 % intervals.

    ``similarity``, ``probability`` and ``units`` are (N,). Tokens of one similarity stay together, which may make fewer bins.
    """
    edges = np.unique(np.quantile(similarity, np.linspace(0, 1, most + 1)))
    inner = edges[1:-1]
    place = np.searchsorted(inner, similarity, side="right")
    result = []
    for i in range(len(inner) + 1):
        chosen = np.flatnonzero(place == i)
        if not len(chosen):
            continue
        there = [units[int(j)] for j in chosen]
        mean, low, high = bootstrapped_means(probability[chosen], there)
        ends = similarity[chosen]
        entry = {"from": float(ends.min()), "to": float(ends.max()), "similarity": float(ends.mean())}
        entry |= {"tokens": len(chosen), "units": len(set(there))}
        result.append(entry | {"mean": float(mean), "low": float(low), "high": float(high)})
    return result


def rank_correlation(x: np.ndarray, y: np.ndarray, units: Sequence[str]) -> tuple[float, float, float]:
    """Spearman's rank correlation of (N,) values and its 95 % interval, by bootstrap over units; NaN where one is constant."""
    names, place = np.unique(np.asarray(units), return_inverse=True)
    members = np.split(np.argsort(place, kind="stable"), np.cumsum(np.bincount(place))[:-1])
    random = np.random.default_rng(0)
    drawn = []
    for _ in range(REPLICATES // 4 if len(names) > 1 else 0):
        chosen = np.concatenate([members[i] for i in random.integers(len(names), size=len(names))])
        drawn.append(_spearman(x[chosen], y[chosen]))
    finite = np.array(drawn)[np.isfinite(drawn)] if drawn else np.empty(0)
    low, high = np.quantile(finite, (0.025, 0.975)) if len(finite) else (np.nan, np.nan)
    return _spearman(x, y), float(low), float(high)


def _spearman(x: np.ndarray, y: np.ndarray) -> float:
    a, b = (_ranks(of) for of in (x, y))
    a, b = a - a.mean(), b - b.mean()
    norm = np.sqrt((a**2).sum() * (b**2).sum())
    return float((a * b).sum() / norm) if norm else float("nan")


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks; equal values share the mean of theirs."""
    _, place, times = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(times) - (times - 1) / 2)[place]


def table(result: dict[str, Any]) -> list[str]:
    """The correlations as lines of text."""
    lines = []
    for of in result["sets"]:
        lines.append(f"{of['name']}: {of['samples']:,} samples")
        for entry in of["students"]:
            c = entry["rank_correlation"]
            first, last = entry["bins"][0], entry["bins"][-1]
            lines.append(
                f"  rank correlation {c['mean']:+.3f} [{c['low']:+.3f}, {c['high']:+.3f}] of {entry['tokens']:,} tokens; mean "
                f"probability {first['mean']:.3f} where least, {last['mean']:.3f} where most similar  {entry['model']}"
            )
    lines.append("probability of the right token against the cosine to the teacher's attention on the image in its row")
    return lines
