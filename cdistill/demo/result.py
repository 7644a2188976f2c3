"""What the demo has found, and what the package ships of runs with several seeds."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from cdistill.builtin.scorer import FAMILIES, standard_error, standard_error_of_mean
from cdistill.reproduce.findings import Findings
from cdistill.reproduce.runs import TEACHER

DISTILLED, UNALIGNED, SFT = "CompoDistill", "KD + TAF", "SFT"  # rows of the table
STUDENTS = (SFT, UNALIGNED, DISTILLED)
SHOWN = (TEACHER, *STUDENTS)
SEEDS = Path(__file__).with_name("seeds.json")  # by benchmarks/demo_seeds.py


@dataclass(frozen=True)
class Demo:
    """What the demo has found.

    Attributes:
        findings: of the runs made here.
        accuracy: by model, family and sub-type, in 0..1: recognition by greedy decoding, compositional by choice.
        n: questions per sub-type.
        looks: what ``cdistill analyze`` finds of these models, by analysis.
        facts: about this run, by name.
    """

    findings: Findings
    accuracy: Mapping[str, Mapping[str, Mapping[str, float]]]
    n: int
    looks: Mapping[str, Mapping[str, Any]]
    facts: Mapping[str, Any]

    @cached_property
    def seeds(self) -> dict[str, Any]:
        """The runs of several seeds that the package ships: by model accuracies by seed, and curves."""
        result: dict[str, Any] = json.loads(SEEDS.read_text(encoding="utf-8"))
        return result

    def error(self, model: str, family: str, subtype: str) -> float:
        """Standard error for the finite number of questions."""
        of = self.accuracy[model][family]
        each = {name: standard_error(of[name], self.n) for name in FAMILIES[family]}
        return standard_error_of_mean(list(each.values())) if subtype == "avg" else each[subtype]
