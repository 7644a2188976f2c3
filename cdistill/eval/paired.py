"""Differences between two models that answered the same questions."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from zlib import crc32

import numpy as np

from cdistill.eval.statistics import REPLICATES, Tally

MCNEMAR, BOOTSTRAP = "McNemar", "bootstrap"
_CHUNK = 100  # replicates at once: a benchmark may have 100,000 units that all differ


@dataclass(frozen=True)
class Difference:
    """The second model minus the first, of one metric.

    Attributes:
        percent: difference in points.
        standard_error: of it, by paired bootstrap over the independent units.
        interval: 95 % interval, by the same bootstrap.
        p: two-sided; of the exact McNemar test where every unit is one question that is right or wrong, else the share of
            the bootstrap beyond zero, doubled: at least 1 in 1,000, and what a sign test gives of units that all point one way.
        test: which of the two.
        apart: units on which the models differ.
        only: how many of these the first alone, and the second alone, has right, where the test is McNemar's.
    """

    percent: float
    standard_error: float
    interval: tuple[float, float]
    p: float
    test: str
    apart: int
    only: tuple[int, int] | None = None


def mcnemar(only_first: int, only_second: int) -> float:
    """Two-sided p of the exact McNemar test: discordant pairs fall to either side like a coin."""
    n, few = only_first + only_second, min(only_first, only_second)
    ways = term = 1
    for k in range(few):
        term = term * (n - k) // (k + 1)
        ways += term
    return min(1.0, 2 * ways / 2**n)


def draws(first: Tally, second: Tally, task: str) -> np.ndarray:
    """(REPLICATES, metrics): differences, in points, of the second to the first when units are drawn anew.

    Both models get the same units. Tasks draw independently of each other, so that averages over tasks can be made.
    """
    pair = first.sums(), second.sums()
    rows, times = np.unique(np.hstack(pair), axis=0, return_counts=True)
    width, units = pair[0].shape[1], int(times.sum())
    generator = np.random.default_rng(crc32(task.encode()))
    result = []
    for begin in range(0, REPLICATES, _CHUNK):
        count = min(_CHUNK, REPLICATES - begin)
        totals = generator.multinomial(units, times / units, size=count) @ rows
        result.append(second.values(totals[:, width:]) - first.values(totals[:, :width]))
    return 100.0 * np.concatenate(result)


def summary(percent: float, drawn: np.ndarray, apart: int) -> Difference:
    """A difference with what its bootstrap (REPLICATES,) says; ``apart``: units on which the models differ."""
    drawn = drawn[np.isfinite(drawn)]
    if not len(drawn):
        return Difference(percent, math.nan, (math.nan, math.nan), math.nan, BOOTSTRAP, apart)
    beyond = min(int((drawn <= 0).sum()), int((drawn >= 0).sum()))
    low, high = np.quantile(drawn, (0.025, 0.975))
    p = min(1.0, max(2 * (beyond + 1) / (len(drawn) + 1), 2.0 ** (1 - apart)))
    return Difference(percent, float(drawn.std()), (float(low), float(high)), p, BOOTSTRAP, apart)


def differences(first: Tally, second: Tally, drawn: np.ndarray) -> dict[str, Difference]:
    """Every metric of both; ``drawn`` is what `draws` gave."""
    assert first.units == second.units, "units are those of the questions"
    sums = first.sums(), second.sums()
    before, after = 100.0 * first.values(sums[0].sum(0)), 100.0 * second.values(sums[1].sum(0))
    result = {}
    for i, name in enumerate(first.names):
        (right, counted), (other, _) = first.outcomes(name, sums[0]), second.outcomes(name, sums[1])
        apart = int((right != other).any(1).sum())
        of = summary(float(after[i] - before[i]), drawn[:, i], apart)
        whole = np.isin(right, (0, 1)).all() and np.isin(other, (0, 1)).all()
        if first.is_share(name) and whole and counted.max(initial=0) == 1:
            only = int((right > other).sum()), int((other > right).sum())
            of = replace(of, p=mcnemar(*only), test=MCNEMAR, only=only)
        result[name] = of
    return result
