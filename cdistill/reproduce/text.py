"""A table as aligned text, and as JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from cdistill.reproduce.findings import RULE, Findings, Values, spread
from cdistill.reproduce.tables import Column

COLUMNS: dict[Column, str] = {
    "recognition": "recognition",
    "compositional": "compositional",
    "greedy": "compositional, greedy",
}


def value(values: Values) -> str:
    """Mean ± standard deviation in percent, with the number of seeds where it is one."""
    mean, deviation = spread(values)
    if not values:
        return "-"
    return f"{100 * mean:.1f} ± {100 * deviation:.1f}" if len(values) > 1 else f"{100 * mean:.1f} (1 seed)"


def places(findings: Findings) -> list[tuple[str, str, float, float]]:
    """(label, row, size, rate) of every line: rows, at each size of curves, at each rate of tuning."""
    table = findings.table
    result = []
    for row in table.rows:
        for size in table.sizes:
            for rate in table.rates:
                label = row + (f", samples x {size:g}" if len(table.sizes) > 1 else "")
                label += f", rates x {rate:g}" if len(table.rates) > 1 else ""
                result.append((label, row, size, rate if len(table.rates) > 1 else 0.0))
    return result


def table_text(findings: Findings) -> str:
    """The table, what became of its claims, and the rule."""
    table = findings.table
    lines = [["row", "seeds", *COLUMNS.values(), f"minus {table.reference}", "paper"]]
    for label, row, size, rate in places(findings):
        found = {column: findings.values(row, column, size, rate) for column in COLUMNS}
        apart = findings.difference(row, "compositional").words() if row != table.reference else ""
        paper = table.rows[row].paper
        lines.append(
            [
                label,
                str(len(found["compositional"])),
                *map(value, found.values()),
                apart if len(table.sizes) == len(table.rates) == 1 else "",
                "" if paper is None else " / ".join(f"{each:.1f}" for each in paper),
            ]
        )
    text = aligned(lines)
    if table.curves:
        text += "\n\n" + aligned([["row", "area", "samples to 90 %"], *curve_lines(findings)])
    verdicts = [f"- {each.words()}" for each in findings.verdicts()]
    return "\n".join([f"{table.title} ({table.source})", text, "", *verdicts, *([RULE] if verdicts else [])])


def curve_lines(findings: Findings) -> list[list[str]]:
    """Of every row the area below its curve, and the samples to 90 %."""
    return [[row, value(findings.values(row, "area")), enough(findings.enough(row))] for row in findings.table.rows]


def enough(found: Mapping[Any, float | None]) -> str:
    """Samples to 90 % by seed in words: the range, and how many get there."""
    there = [each for each in found.values() if each is not None]
    if not found:
        return "-"
    if not there:
        return f"not reached ({len(found)} seeds)"
    middle = math.exp(sum(map(math.log, there)) / len(there))
    return f"{middle:,.0f} ({min(there):,.0f} to {max(there):,.0f}; {len(there)} of {len(found)} seeds)"


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Columns as wide as they must be."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def as_json(findings: Findings, name: str, facts: dict[str, Any]) -> dict[str, Any]:
    """All numbers of the page: values by row, size and seed in 0..1, verdicts, facts."""
    rows = []
    for label, row, size, rate in places(findings):
        found = {column: findings.values(row, column, size, rate) for column in COLUMNS}
        rows.append(
            {
                "row": row,
                "label": label,
                "samples": size,
                "by_seed": {column: {str(seed): v for seed, v in values.items()} for column, values in found.items()},
                "mean": {column: _number(spread(values)[0]) for column, values in found.items()},
                "standard_deviation": {column: _number(spread(values)[1]) for column, values in found.items()},
                "paper": findings.table.rows[row].paper,
            }
        )
    verdicts = [
        {
            **asdict(each.claim),
            "verdict": each.verdict,
            "difference": {key: _number(v) for key, v in asdict(each.difference).items()},
            "paper": each.papers,
            "words": each.words(),
        }
        for each in findings.verdicts()
    ]
    return {"table": name, "title": findings.table.title, "rows": rows, "claims": verdicts, "rule": RULE, **facts}


def _number(x: float) -> float | None:
    return x if math.isfinite(x) else None
