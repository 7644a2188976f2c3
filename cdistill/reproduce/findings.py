"""What the runs of a table say: means, spreads, differences paired by seed, and in words which orders hold.

The rule: the difference of two rows, seed by seed, has a 95 % interval by Student's t. An order holds beyond the spread if the
whole interval lies on its side of zero, is contradicted if it lies on the other side, and is open otherwise and with
fewer than three seeds.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cdistill.reproduce.runs import Record, Run
from cdistill.reproduce.tables import Claim, Column, Table

RULE = (
    "An order holds if the 95 % interval of the difference, paired by seed (Student's t), lies on its side of zero, is "
    "contradicted if it lies on the other side, and is open otherwise, and with fewer than three seeds."
)
HOLDS, CONTRADICTED, OPEN, MISSING = "holds", "contradicted", "open", "not run"
SEEDS = 3  # that tell a spread: two may differ by the same by chance
ENOUGH = 0.9  # accuracy whose price in samples is told
# 97.5 % quantiles of Student's t with 1 to 30 degrees of freedom; more take the last, which is wider than theirs.
T = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131),
    *(2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)
Values = dict[int, float]  # by seed, in 0..1


@dataclass(frozen=True)
class Difference:
    """Mean of differences by seed, in 0..1, and its 95 % interval; NaN with fewer than two seeds."""

    mean: float
    low: float
    high: float
    seeds: int
    positive: int  # seeds in which it is above zero

    def words(self) -> str:
        """In points."""
        if self.seeds == 0:
            return "no seed in common"
        if self.seeds == 1:
            return f"{100 * self.mean:+.1f}, one seed"
        interval = f"{100 * self.low:+.1f} to {100 * self.high:+.1f}"
        return f"{100 * self.mean:+.1f} ({interval}; {self.seeds} seeds, above zero in {self.positive})"


@dataclass(frozen=True)
class Verdict:
    """A claim and what became of it."""

    claim: Claim
    verdict: str
    difference: Difference
    papers: float | None  # the paper's difference in points

    @property
    def order(self) -> str:
        """The claim."""
        what = {"compositional": "", "recognition": ", recognition", "greedy": ", greedy", "area": ", area"}
        return f"{self.claim.better} > {self.claim.worse}{what[self.claim.column]}"

    @property
    def evidence(self) -> str:
        """The numbers it was judged by."""
        return self.difference.words() + ("" if self.papers is None else f"; paper {self.papers:+.1f}")

    def words(self) -> str:
        """A sentence."""
        said = {
            HOLDS: "holds beyond the spread",
            CONTRADICTED: "is contradicted beyond the spread",
            OPEN: "is open" if self.difference.seeds >= SEEDS else f"is open, with fewer than {SEEDS} seeds",
            MISSING: "is not run",
        }[self.verdict]
        return f"{self.order}: {said}: {self.evidence}"


class Findings:
    """The finished runs of a table.

    Args:
        table: its rows.
        runs: as planned.
        records: of the folder, by hash.
    """

    def __init__(self, table: Table, runs: Sequence[Run], records: Mapping[str, Record]) -> None:
        self.table, self.runs, self.records = table, runs, records
        self._values: dict[tuple[str, float, float, Column], Values] = {}
        for run in runs:
            record = records.get(run.hash)
            if record is None or record.accuracy is None:
                continue
            size = run.size / table.rows[run.row].samples
            for column, value in averages(record.accuracy).items():
                self._values.setdefault((run.row, size, self._rate(run), column), {})[run.recipe.seed] = value

    def _rate(self, run: Run) -> float:
        return run.rate if len(self.table.rates) > 1 else 0.0  # of tables without a grid it is no part of the place

    def values(self, row: str, column: Column, size: float | None = None, rate: float = 0.0) -> Values:
        """Of a row by seed, in 0..1: at a size, by default the largest; ``area`` is that below the whole curve."""
        if column == "area":
            return self._areas(row)
        return self._values.get((row, self.table.sizes[-1] if size is None else size, rate, column), {})

    def points(self, row: str, seed: int, column: Column = "compositional") -> list[tuple[int, float]]:
        """(samples, accuracy) of a row's curve with one seed, as far as it has been run."""
        found = {
            run.size / self.table.rows[row].samples: run.recipe
            for run in self.runs
            if run.row == row and run.recipe.seed == seed
        }
        result = []
        for size in self.table.sizes:
            value = self.values(row, column, size).get(seed)
            if value is not None:
                result.append((samples_of(found[size].stages, found[size].stage), value))
        return result

    @property
    def seeds(self) -> list[int]:
        """Those that any run has."""
        return sorted({run.recipe.seed for run in self.runs})

    def _areas(self, row: str) -> Values:
        curves = {seed: self.points(row, seed) for seed in self.seeds}
        return {seed: area(points) for seed, points in curves.items() if len(points) == len(self.table.sizes)}

    def enough(self, row: str) -> dict[int, float | None]:
        """By seed the samples at which a row's whole curve first reaches `ENOUGH`; None where it does not."""
        curves = {seed: self.points(row, seed) for seed in self.seeds}
        return {s: reaches(points, ENOUGH) for s, points in curves.items() if len(points) == len(self.table.sizes)}

    def difference(self, row: str, column: Column) -> Difference:
        """To the table's reference row."""
        return paired(self.values(row, column), self.values(self.table.reference, column))

    def verdicts(self) -> list[Verdict]:
        """What became of the table's claims."""
        result = []
        for claim in self.table.claims:
            better, worse = (self.values(row, claim.column) for row in (claim.better, claim.worse))
            difference = paired(better, worse)
            papers = [self.table.rows[row].paper for row in (claim.better, claim.worse)]
            place = {"recognition": 0, "compositional": 1}.get(claim.column)
            theirs = None
            if place is not None and papers[0] is not None and papers[1] is not None:
                theirs = papers[0][place] - papers[1][place]
            result.append(Verdict(claim, verdict(difference), difference, theirs))
        return result


def samples_of(stages: Sequence[str], sections: Mapping[str, object]) -> int:
    """Samples of all stages of a recipe together, in whole batches."""
    return sum(sections[name].steps * sections[name].global_batch_size for name in stages)  # type: ignore[attr-defined]


def averages(accuracy: Mapping[str, Any]) -> dict[Column, float]:
    """Averages of a record's accuracies by column."""
    greedy, choice = accuracy["greedy"], accuracy["choice"]
    return {
        "recognition": greedy["recognition"]["avg"],
        "compositional": choice["compositional"]["avg"],
        "greedy": greedy["compositional"]["avg"],
    }


def spread(values: Mapping[Any, float]) -> tuple[float, float]:
    """Mean and sample standard deviation; NaN where there are too few."""
    numbers = list(values.values())
    mean = statistics.fmean(numbers) if numbers else math.nan
    return mean, statistics.stdev(numbers) if len(numbers) > 1 else math.nan


def paired(first: Values, second: Values) -> Difference:
    """The first minus the second over the seeds that both have."""
    apart = {seed: first[seed] - second[seed] for seed in sorted(first.keys() & second.keys())}
    return Difference(*interval(apart), len(apart), sum(each > 0 for each in apart.values()))


def interval(values: Mapping[Any, float]) -> tuple[float, float, float]:
    """Mean over seeds, and the ends of its 95 % interval by Student's t; NaN where there are too few."""
    mean, deviation = spread(values)
    reach = math.nan
    if len(values) > 1:
        reach = T[min(len(values) - 1, len(T)) - 1] * deviation / math.sqrt(len(values))
    return mean, mean - reach, mean + reach


def verdict(difference: Difference) -> str:
    """By the rule at the head of this file."""
    if difference.seeds == 0:
        return MISSING
    if difference.seeds < SEEDS:
        return OPEN
    if difference.low > 0:
        return HOLDS
    return CONTRADICTED if difference.high < 0 else OPEN


def area(points: Sequence[tuple[int, float]]) -> float:
    """Mean height of a curve over the logarithm of its samples, by trapezia."""
    x, y = [math.log(samples) for samples, _ in points], [value for _, value in points]
    whole = sum((x[i + 1] - x[i]) * (y[i] + y[i + 1]) / 2 for i in range(len(x) - 1))
    return whole / (x[-1] - x[0])


def reaches(points: Sequence[tuple[int, float]], height: float) -> float | None:
    """Samples at which a curve first reaches a height, by lines over the logarithm of samples; None if it does not."""
    before: tuple[int, float] | None = None
    for samples, value in points:
        if value >= height:
            if before is None:
                return float(samples)
            share = (height - before[1]) / (value - before[1])
            return math.exp(math.log(before[0]) + share * (math.log(samples) - math.log(before[0])))
        before = samples, value
    return None
