"""Metrics with standard errors and intervals, over units that do not depend on each other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

REPLICATES = 2000


@dataclass(frozen=True)
class Metric:
    """One number of a benchmark.

    Attributes:
        percent: the value; 0..100 for shares.
        n: what the value is a share of: questions, pairs or groups.
        right: how many of them are right, where the value is their share.
        units: independent units behind it: images or groups where questions depend on each other, else questions.
        standard_error: of ``percent``, over the independent units.
        interval: 95 % interval of ``percent``, by bootstrap over the independent units.
    """

    percent: float
    n: int
    right: int | None = None
    units: int = 0
    standard_error: float = 0.0
    interval: tuple[float, float] = (0.0, 0.0)


class Totals:
    """Sums by name; each an array, because a bootstrap has as many as it has replicates."""

    def __init__(self, values: np.ndarray, columns: dict[str, int]) -> None:
        self._values, self._columns = values, columns

    def __getitem__(self, name: str) -> np.ndarray:
        return self._values[..., self._columns[name]]

    def share(self, name: str) -> np.ndarray:
        """What `Tally.count` has counted under a name: right over all."""
        return self[name] / self[f"{name} n"]


Formula = Callable[[Totals], np.ndarray]


class Tally:
    """Sums per independent unit, and metrics that are smooth functions of their totals.

    Units that share an image or a group are one unit, so that dependent questions are not taken for independent ones.
    """

    def __init__(self) -> None:
        self._units: dict[str, dict[str, float]] = {}
        self._columns: dict[str, int] = {}
        self._soft: set[str] = set()  # names under which something was counted that is neither right nor wrong
        self._formulas: dict[str, tuple[Formula, tuple[str, ...], bool]] = {}  # what it counts, and whether right of n

    def add(self, unit: str, name: str, value: float = 1.0) -> None:
        """Add to a sum of a unit."""
        self._columns.setdefault(name, len(self._columns))
        sums = self._units.setdefault(unit, {})
        sums[name] = sums.get(name, 0.0) + value

    def count(self, unit: str, name: str, right: float) -> None:
        """Count something that is right (1), wrong (0) or in between."""
        self.add(unit, name, float(right))
        self.add(unit, f"{name} n")
        if right not in (0, 1):
            self._soft.add(name)

    def share(self, name: str, counted: str | None = None) -> None:
        """A metric: the share of what was counted under a name."""
        counted = counted or name
        self._formulas[name] = (lambda totals: totals.share(counted), (counted,), True)

    def metric(self, name: str, formula: Formula, of: Sequence[str]) -> None:
        """A metric: a function of totals, in 0..1, of what was counted under the names ``of``."""
        self._formulas[name] = (formula, tuple(of), False)

    def __contains__(self, name: str) -> bool:
        return name in self._columns

    def mean(self, name: str, of: Sequence[str]) -> None:
        """A metric: the plain mean of other metrics."""
        formulas = [self._formulas[each][0] for each in of]
        counted = tuple(dict.fromkeys(each for metric in of for each in self._formulas[metric][1]))
        self._formulas[name] = (
            lambda totals: np.mean([formula(totals) for formula in formulas], axis=0),
            counted,
            True,
        )

    @property
    def names(self) -> list[str]:
        """Names of the metrics."""
        return list(self._formulas)

    @property
    def units(self) -> list[str]:
        """Names of the units, sorted."""
        return sorted(self._units)

    def sums(self) -> np.ndarray:
        """(units, sums) float64, in the order of `units`."""
        result = np.zeros((len(self._units), len(self._columns)))
        for row, unit in zip(result, self.units, strict=True):
            for name, value in self._units[unit].items():
                row[self._columns[name]] = value
        return result

    def outcomes(self, name: str, sums: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """How many are right, and how many there are, of what a metric counts: (units, counts) each, of `sums`."""
        _, counted, _ = self._formulas[name]
        right, there = ([self._columns[f"{each}{end}"] for each in counted] for end in ("", " n"))
        return sums[:, right], sums[:, there]

    def is_share(self, name: str) -> bool:
        """Whether a metric is the share of right ones among all that are counted under one name."""
        _, counted, counts = self._formulas[name]
        return counts and len(counted) == 1

    def values(self, totals: np.ndarray) -> np.ndarray:
        """Metrics (..., metrics) in 0..1 of totals (..., sums); NaN where nothing was counted."""
        named = Totals(totals, self._columns)
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.stack([formula(named) for formula, _, _ in self._formulas.values()], axis=-1)

    def measure(self) -> dict[str, Metric]:
        """Every metric: the standard error by the delta method, the interval by bootstrap with a fixed seed."""
        sums = self.sums()
        values, errors = self.values(sums.sum(0)), self._standard_errors(sums)
        low, high = self._intervals(sums)
        result = {}
        for i, (name, (_, counted, counts)) in enumerate(self._formulas.items()):
            there = [self._columns[f"{each} n"] for each in counted]
            n, right = (sums[:, at].sum() for at in (there, [self._columns[each] for each in counted]))
            is_share = counts and self._soft.isdisjoint(counted) and abs(right - n * values[i]) < 1e-6
            result[name] = Metric(
                percent=100.0 * round(right) / round(n) if is_share else 100.0 * float(values[i]),
                n=round(n),
                right=round(right) if is_share else None,
                units=int((sums[:, there] > 0).any(1).sum()),
                standard_error=100.0 * float(errors[i]),
                interval=(100.0 * float(low[i]), 100.0 * float(high[i])),
            )
        return result

    def _standard_errors(self, sums: np.ndarray) -> np.ndarray:
        """(metrics,): what each unit adds to a metric, to first order; for a share of single questions sqrt(p (1 - p) / n)."""
        step = 1e-30  # of a complex number, whose imaginary part is then the derivative to the last bit
        steps = sums.sum(0) + 1j * step * np.eye(sums.shape[1])
        gradient = self.values(steps).imag / step
        influence = (sums - sums.mean(0)) @ gradient
        return np.sqrt((influence**2).sum(0))

    def _intervals(self, sums: np.ndarray) -> np.ndarray:
        """(2, metrics): 2.5 and 97.5 % of the bootstrap. Units with the same sums are drawn together."""
        rows, times = np.unique(np.round(sums, 9), axis=0, return_counts=True)
        draws = np.random.default_rng(0).multinomial(len(sums), times / len(sums), size=REPLICATES)
        values = self.values(draws @ rows)
        return np.stack([_quantiles(column) for column in values.T], axis=1)


def _quantiles(values: np.ndarray) -> np.ndarray:
    values = values[np.isfinite(values)]
    return np.quantile(values, (0.025, 0.975)) if len(values) else np.full(2, np.nan)


def bootstrapped_means(values: np.ndarray, units: Sequence[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Means of (N, ...) values over samples and their 95 % intervals, by bootstrap over the independent ``units`` (N,).

    The draws are the same for all values of one call, so that means of differences may be asked for beside them.

    Returns:
        mean, low, high: each (...) float64.
    """
    flat = np.asarray(values, np.float64).reshape(len(values), -1)
    _, place = np.unique(np.asarray(units), return_inverse=True)
    count = np.bincount(place).astype(np.float64)
    sums = np.zeros((len(count), flat.shape[1]))
    np.add.at(sums, place, flat)
    draws = np.random.default_rng(0).multinomial(len(count), np.full(len(count), 1 / len(count)), size=REPLICATES)
    means = (draws @ sums) / (draws @ count)[:, None]
    low, high = np.quantile(means, (0.025, 0.975), axis=0)
    shape = np.shape(values)[1:]
    return flat.mean(0).reshape(shape), low.reshape(shape), high.reshape(shape)
