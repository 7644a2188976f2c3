"""Teacher, SFT student and distilled student side by side: means, spreads, the table, and results for machines."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

TEACHER, SFT, DISTILLED = "teacher", "sft", "compodistill"
NAMES = {TEACHER: "teacher", SFT: "SFT student", DISTILLED: "CompoDistill"}
FAMILIES = ("recognition", "compositional")


@dataclass(frozen=True)
class Comparison:
    """Evaluations of the three models of a demo.

    Attributes:
        teacher: what `cdistill.builtin.scorer.evaluate` returned.
        students: the same for ``sft`` and ``compodistill``, one evaluation per training seed, in their order.
        seeds: training seeds.
    """

    teacher: Mapping[str, Any]
    students: Mapping[str, Sequence[Mapping[str, Any]]]
    seeds: Sequence[int]

    def runs(self, model: str) -> Sequence[Mapping[str, Any]]:
        """The model's evaluations."""
        return [self.teacher] if model == TEACHER else self.students[model]

    def subtypes(self, family: str) -> list[str]:
        """Sub-types of a family, the average not among them."""
        return [name for name in self.teacher[family] if name != "avg"]

    def mean(self, model: str, family: str, subtype: str = "avg") -> float:
        """Accuracy, mean over the seeds."""
        return statistics.fmean(run[family][subtype] for run in self.runs(model))

    def spread(self, model: str, family: str, subtype: str = "avg") -> float | None:
        """Sample standard deviation over the seeds, None with one seed."""
        values = [run[family][subtype] for run in self.runs(model)]
        return statistics.stdev(values) if len(values) > 1 else None

    def standard_error(self, model: str, family: str, subtype: str = "avg") -> float:
        """Standard error of one evaluation for the finite number of questions, root mean square over the seeds."""
        errors = [run["standard_error"][family][subtype] for run in self.runs(model)]
        return math.sqrt(statistics.fmean(e * e for e in errors))

    def uncertainty(self, model: str, family: str, subtype: str = "avg") -> float:
        """The spread over seeds where there are several, else the standard error."""
        spread = self.spread(model, family, subtype)
        return self.standard_error(model, family, subtype) if spread is None else spread

    def margins(self, family: str) -> list[float]:
        """Average of the distilled student minus that of the SFT student, seed by seed."""
        pairs = zip(self.students[DISTILLED], self.students[SFT], strict=True)
        return [ours[family]["avg"] - theirs[family]["avg"] for ours, theirs in pairs]

    def margin_uncertainty(self, family: str) -> float:
        """Sample standard deviation of the margins over seeds; with one seed the standard error of the difference."""
        margins = self.margins(family)
        if len(margins) > 1:
            return statistics.stdev(margins)
        return math.hypot(self.standard_error(SFT, family), self.standard_error(DISTILLED, family))

    def what_uncertainty_is(self) -> str:
        """Words for the number after ±."""
        n = self.teacher["n"]
        if len(self.seeds) > 1:
            seeds = f"standard deviation over {len(self.seeds)} training seeds"
            return f"students: {seeds}; teacher: standard error for {n} questions per sub-type"
        return f"standard error for {n} questions per sub-type"

    def table(self) -> str:
        """The comparison as aligned text, in percent."""
        width = 21
        lines = [" " * 20 + "".join(name.rjust(width) for name in NAMES.values())]
        for family in FAMILIES:
            lines.append(family)
            for subtype in [*self.subtypes(family), "avg"]:
                cells = [
                    f"{100 * self.mean(m, family, subtype):5.1f} ± {100 * self.uncertainty(m, family, subtype):3.1f}"
                    for m in NAMES
                ]
                lines.append(f"  {subtype:<18}" + "".join(cell.rjust(width) for cell in cells))
        lines.append("")
        for family in FAMILIES:
            margins = self.margins(family)
            line = f"CompoDistill - SFT, {family} average: {100 * statistics.fmean(margins):+.1f} points"
            if len(margins) > 1:
                each = ", ".join(f"{100 * margin:+.1f}" for margin in margins)
                line += f" ({each}); spread of the margin {100 * self.margin_uncertainty(family):.1f}"
                for model in (SFT, DISTILLED):
                    line += f", of {NAMES[model]} {100 * self.uncertainty(model, family):.1f}"
            else:
                line += f" ± {100 * self.margin_uncertainty(family):.1f}"
            lines.append(line)
        lines.append(f"accuracy in %; ± {self.what_uncertainty_is()}")
        return "\n".join(lines)

    def results(self) -> dict[str, Any]:
        """Accuracies in 0..1, means over seeds, by model, family and sub-type; then errors, spreads, margins, seeds."""

        def cells(number: Any, model: str) -> dict[str, dict[str, float]]:
            return {f: {s: number(model, f, s) for s in [*self.subtypes(f), "avg"]} for f in FAMILIES}

        result: dict[str, Any] = {model: cells(self.mean, model) for model in NAMES}
        result["standard_error"] = {model: cells(self.standard_error, model) for model in NAMES}
        if len(self.seeds) > 1:
            result["spread"] = {model: cells(self.spread, model) for model in (SFT, DISTILLED)}
        result["margin"] = {
            f: {"mean": statistics.fmean(self.margins(f)), "uncertainty": self.margin_uncertainty(f)} for f in FAMILIES
        }
        result["constant_answer"] = {f: dict(self.teacher["constant_answer"][f]) for f in FAMILIES}
        result["seeds"] = [
            {"seed": seed, **{m: {f: dict(self.students[m][i][f]) for f in FAMILIES} for m in (SFT, DISTILLED)}}
            for i, seed in enumerate(self.seeds)
        ]
        return result
