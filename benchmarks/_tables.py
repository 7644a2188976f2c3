"""What the reports of all GPU benchmarks are made of: markdown tables of rows, verdicts, and how a page opens."""

from collections.abc import Iterable
from typing import Any

Rows = dict[str, dict[str, Any]]  # of one shape, by contender


def table(header: list[str], lines: Iterable[list[str]]) -> str:
    """A markdown table, numbers to the right."""
    rule = ["---"] + ["---:"] * (len(header) - 1)
    return "\n".join("| " + " | ".join(line) + " |" for line in (header, rule, *lines))


def number(value: float | None, digits: int = 3) -> str:
    """Three significant digits, no exponent; a dash for what was not measured."""
    if value is None:
        return "-"
    return f"{value:.0f}" if abs(value) >= 10 ** (digits - 1) else f"{value:.{digits}g}"


def by_shape(data: dict[str, Any]) -> dict[str, Rows]:
    found: dict[str, Rows] = {}
    for row in data.get("rows", []):
        found.setdefault(row["shape"], {})[row["contender"]] = row
    return found


def mark(row: dict[str, Any]) -> str:
    """The contender's name; with a star if it is further from float64 than eager allows."""
    return row["contender"] + (" *" if row.get("error_over_allowed", 0.0) > 1 else "")


def both(rows: Rows, contender: str) -> float | None:
    return rows.get(contender, {}).get("both_ms")


def shape_table(rows: Rows, columns: dict[str, str]) -> str:
    """What each contender takes at one shape, fastest first; then who was left out, and why. Columns: title to key."""
    timed = sorted((row for row in rows.values() if "both_ms" in row), key=lambda row: row["both_ms"])
    lines = [[mark(row), *(number(row.get(key)) for key in columns.values())] for row in timed]
    left_out = [f"- {name}: {row['skipped']}" for name, row in rows.items() if "skipped" in row]
    return "\n\n".join([table(["", *columns], lines), *(["Not timed:\n\n" + "\n".join(left_out)] if left_out else [])])


def verdict(value: float | None, limit: float | None) -> str:
    if value is None or limit is None:
        return "not measured"
    return "pass" if value <= limit else "MISS"


def opening(data: dict[str, Any], title: str) -> list[str]:
    """Title, when and with what it was measured, the ceilings, and the checks."""
    versions = ", ".join(f"{name} {value}" for name, value in data["versions"].items() if value)
    changed = " with uncommitted changes" if data.get("uncommitted_changes") else ""
    parts = [f"# {title}", f"{data['date']}, commit {data['commit'] or 'unknown'}{changed}; {versions}."]
    if "rates" in data:
        rates = data["rates"]
        parts.append(
            f"Measured in the same process: {number(rates['matmul_tflops'])} TFLOP/s in a bf16 product of 8192 x 8192 "
            f"matrices, {number(rates['copy_tb_per_s'])} TB/s in a copy."
        )
    if "checks" in data:
        checks = data["checks"]
        parts.append(f"Checks against float64: {checks['passed']} passed, {len(checks['failed'])} failed.")
        failed = [f"- {name}: {part} {found}" for name, p in checks["failed"].items() for part, found in p.items()]
        parts += ["\n".join(failed)] if failed else []
    return parts
