"""Writes what the demo ships of runs with several seeds: ``python -m benchmarks.demo_seeds``, after ``cdistill reproduce``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from cdistill.demo.demo import TABLE
from cdistill.demo.result import DISTILLED, SEEDS, SFT, UNALIGNED
from cdistill.files import write_text
from cdistill.reproduce.command import PAIR
from cdistill.reproduce.findings import Findings
from cdistill.reproduce.reproduce import Reproduction
from cdistill.reproduce.runs import QUESTIONS

RESULTS = Path(__file__).parent / "results" / "reproduce"
CURVES = {SFT: "SFT", UNALIGNED: "KD + TAF", DISTILLED: "all"}  # rows of the table of curves
NUMBERS = {TABLE: 5, "curves": 5}  # of seeds


def seeds() -> dict[str, Any]:
    """What `cdistill.demo.demo.Demo.seeds` reads: accuracies by model, column and seed; curves; samples to 90 %."""
    table, curves = (_findings(name) for name in (TABLE, "curves"))
    rows = {
        model: {column: table.values(model, column) for column in ("recognition", "compositional")} for model in CURVES
    }
    points: dict[str, dict[int, dict[int, float]]] = {model: {} for model in CURVES}
    for model, row in CURVES.items():
        for seed in curves.seeds:
            for samples, value in curves.points(row, seed):
                points[model].setdefault(samples, {})[seed] = value
    commands = {name: f"cdistill reproduce {name} --seeds {n}" for name, n in NUMBERS.items()}
    enough = {model: curves.enough(row) for model, row in CURVES.items()}
    whole = {"commands": commands, "rows": rows, "curves": points, "enough": enough}
    result: dict[str, Any] = json.loads(json.dumps(whole))
    return result


def _findings(name: str) -> Findings:
    work = Reproduction(name, PAIR, RESULTS, NUMBERS[name], QUESTIONS)
    return Findings(work.table, work.rows(), work.records)


def main() -> int:
    """Write the file."""
    write_text(SEEDS, json.dumps(seeds(), indent=1) + "\n")
    print(f"written: {SEEDS}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
