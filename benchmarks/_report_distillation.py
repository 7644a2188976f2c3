"""What the report says of `linear_distillation`."""

from typing import Any

from benchmarks._cases import VOCABULARY
from benchmarks._distillation import DIVERGENCES, OURS, SIZES, Size, shape_name
from benchmarks._tables import Rows, both, by_shape, number, shape_table, table, verdict

SHARE_OF_FLOOR = 0.85
MEMORY_ALLOWANCE = 1.1  # for the gradient of hidden states and the rows of a chunk
COLUMNS = {
    "forward ms": "forward_ms",
    "backward ms": "backward_ms",
    "both ms": "both_ms",
    "± %": "spread_percent",
    "% of floor": "floor_percent",
    "times ours": "times_ours",
    "peak MB": "peak_mb",
    "host ms": "host_ms",
}


def targets(shapes: dict[str, Rows]) -> list[list[str]]:
    """(claim, shape, measured, limit, pass or miss); a claim without figures is not measured."""
    lines: list[list[str]] = []

    def add(claim: str, shape: str, value: float | None, limit: float | None) -> None:
        lines.append([claim, shape, number(value), number(limit), verdict(value, limit)])

    def own(size: Size, divergence: str, key: str) -> float | None:
        return shapes.get(shape_name(size, divergence), {}).get(OURS, {}).get(key)

    for size in SIZES:
        for divergence in DIVERGENCES:
            floor, shape = own(size, divergence, "floor_ms"), shape_name(size, divergence)
            limit = None if floor is None else floor / SHARE_OF_FLOOR
            add("forward and backward, ms (limit: floor / 0.85)", shape, both(shapes.get(shape, {}), OURS), limit)
    for size in SIZES:
        for divergence in DIVERGENCES:
            limit = MEMORY_ALLOWANCE * size.promised_bytes / 1e6
            claim = "peak memory, MB (limit: 1.1 of head's gradient and two buffers)"
            add(claim, shape_name(size, divergence), own(size, divergence, "peak_mb"), limit)
    short, long = (next(size for size in SIZES if size.name == name) for name in ("trained", "long"))
    for divergence in DIVERGENCES:
        peaks = [own(size, divergence, "peak_mb") for size in (short, long)]
        growth = None if None in peaks else peaks[1] - peaks[0]
        limit = (long.hidden_bytes - short.hidden_bytes) / 1e6
        claim = f"peak memory of {long.rows} rows beyond {short.rows}, MB (limit: their gradients)"
        add(claim, shape_name(long, divergence), growth, limit)
    return lines


def vocabulary(data: dict[str, Any]) -> list[str]:
    """What was measured of the vocabulary layer."""
    shapes = by_shape(data, VOCABULARY)
    for row in (row for rows in shapes.values() for row in rows.values() if "both_ms" in row and "rates" in data):
        row["floor_ms"] = row["flops"] / data["rates"]["matmul_tflops"] / 1e9
        row["floor_percent"] = 100 * row["floor_ms"] / row["both_ms"]
    parts = ["## Targets of the vocabulary layer", table(["", "shape", "measured", "limit", ""], targets(shapes))]
    parts = parts if data.get("planned") else []
    for name, rows in shapes.items():
        first = next(iter(rows.values()))
        parts += [f"## {name}: {first['size']}, {first['dtype']}", shape_table(rows, COLUMNS)]
    parts.append(
        "The floor is the time of the products alone, 6 M V Hs + 2 M V Ht operations (4 M V Hs with a frozen head) of the M "
        "rows that count, at the measured rate."
    )
    return parts if shapes else []
