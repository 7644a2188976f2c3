"""What reports are made of: tables of rows, verdicts, and how a page opens."""

from collections.abc import Iterable
from typing import Any

PLAIN = ("sdpa/cudnn", "sdpa/flash", "flex (plain)", "flash_attention (own)")  # attention without a loss
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


def by_shape(data: dict[str, Any], op: str) -> dict[str, Rows]:
    """Rows of an op, by shape and contender."""
    found: dict[str, Rows] = {}
    for row in data.get("rows", []):
        if row["op"] != op:
            continue
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


def _contenders_of(rows: Rows) -> list[list[str]]:
    """Name, ms, times ours, MB, times ours; ours first, then the fastest; what makes no loss is not compared."""
    own = next(iter(rows.values()))
    timed = sorted((row for row in rows.values() if "both_ms" in row), key=lambda r: (r is not own, r["both_ms"]))

    def times(row: dict[str, Any], key: str) -> str:
        known = row.get(key) is not None and own.get(key)
        return number(row[key] / own[key]) if known else "-"

    return [
        [
            f"  {mark(row)}" + (" (no loss)" if row["contender"] in PLAIN else ""),
            number(row["both_ms"]),
            number(row.get("times_ours")),
            number(row.get("peak_mb")),
            times(row, "peak_mb"),
        ]
        for row in timed
    ]


def overview(data: dict[str, Any]) -> str:
    """Ours beside every rival, plain text: forward and backward pass, and peak memory beside the inputs."""
    if not data.get("rows"):
        return "nothing was timed"
    lines = [["", "ms", "times ours", "peak MB", "times ours"]]
    notes: dict[str, dict[str, None]] = {}
    for op in dict.fromkeys(row["op"] for row in data.get("rows", [])):
        for name, rows in by_shape(data, op).items():
            first = next(iter(rows.values()))
            lines += [[f"{op}, {name}: {first['size']}, {first['dtype']}"], *_contenders_of(rows)]
            for x, row in rows.items():
                if "skipped" in row and not x.startswith("ours/"):
                    who = f"ours of {name}" if x == "ours" else x
                    notes.setdefault(row["skipped"].splitlines()[0], {})[who] = None
    widths = [max(len(line[i]) for line in lines if len(line) > 1) for i in range(5)]
    text = [
        line[0]
        if len(line) == 1
        else line[0].ljust(widths[0])
        + "".join(cell.rjust(width + 2) for cell, width in zip(line[1:], widths[1:], strict=True))
        for line in lines
    ]
    return "\n".join([*text, *(f"not timed: {', '.join(names)}: {reason}" for reason, names in notes.items())])


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
            f"Measured in the same process: {number(rates['matmul_tflops'])} TFLOP/s in a product of large square matrices, "
            f"{number(rates['copy_tb_per_s'])} TB/s in a copy."
        )
    return parts


def outcome(data: dict[str, Any]) -> list[str]:
    """Of a run that had a plan: checks, what failed, and what was not reached."""
    planned, done = data.get("planned", []), data.get("done", {})
    if not planned:
        return []
    checks = [name for name in planned if name.startswith("check ")]
    failed = {name: done[name] for name in planned if done.get(name)}
    passed = sum(name in done and not done[name] for name in checks)
    broken = sum(name in failed for name in checks)
    parts = [
        f"Checks against float64: {passed} of {len(checks)} passed, {broken} failed."
        if checks
        else "Nothing was checked."
    ]
    if failed:
        parts.append("Failed:\n\n" + "\n".join(f"- {name}: {one}" for name, found in failed.items() for one in found))
    missing = [name for name in planned if name not in done]
    if missing:
        parts.append("Not reached:\n\n" + "\n".join(f"- {name}" for name in missing))
    return parts
