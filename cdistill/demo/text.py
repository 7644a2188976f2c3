"""The demo's table, as text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cdistill.builtin.scorer import FAMILIES
from cdistill.demo.result import DISTILLED, SFT, SHOWN, STUDENTS, UNALIGNED, Demo
from cdistill.reproduce.findings import interval, paired
from cdistill.reproduce.text import aligned, enough


def text(found: Demo) -> str:
    """This run by sub-type, and below it what several seeds have given."""
    lines = [["", *SHOWN]]
    for family, subtypes in FAMILIES.items():
        lines.append([family, *[""] * len(SHOWN)])
        for name in (*subtypes, "avg"):
            lines.append([f"  {name}", *(_cell(found, model, family, name) for model in SHOWN)])
    said = (
        f"accuracy in %, one training seed ({found.facts['seed']}), ± standard error for {found.n} questions per sub-type; "
        "compositional: which of two captions fits, 50 by chance"
    )
    return "\n".join([aligned(lines), said, "", *of_seeds(found.seeds)])


def of_seeds(seeds: Mapping[str, Any]) -> list[str]:
    """What the runs that the package ships say."""
    rows = seeds["rows"]
    numbers = sorted(map(int, rows[DISTILLED]["compositional"]))
    lines = [["", *STUDENTS]]
    for family in FAMILIES:
        lines.append([family, *(interval_words(rows[model][family]) for model in STUDENTS)])
    lines.append(["samples to 90 %", *(enough(seeds["enough"][model]) for model in STUDENTS)])
    ours = rows[DISTILLED]["compositional"]
    apart = [
        f"{DISTILLED} - {model}, compositional: {paired(ours, rows[model]['compositional']).words()}"
        for model in (SFT, UNALIGNED)
    ]
    said = f"seeds {numbers[0]} to {numbers[-1]}, trained before (`cdistill reproduce`): mean and 95 % interval"
    return [said, aligned(lines), *apart]


def interval_words(values: Mapping[Any, float]) -> str:
    """Mean over seeds and its 95 % interval by Student's t, in percent."""
    mean, low, high = (100 * each for each in interval(values))
    return f"{mean:.1f} [{low:.1f}, {high:.1f}]"


def _cell(found: Demo, model: str, family: str, subtype: str) -> str:
    value, error = found.accuracy[model][family][subtype], found.error(model, family, subtype)
    return f"{100 * value:.1f} ± {100 * error:.1f}"
