"""Fewer points of a long series, its extremes kept."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

POINTS = 600  # of a series in a page, at most


def thinned(y: Sequence[float | None], points: int = POINTS) -> list[int]:
    """Places of at most ``points`` values of a series that look like all of it: the first and the last, and of each of equal
    parts the lowest, the highest and one that is no number, where there is one."""
    if len(y) <= points:
        return list(range(len(y)))
    values = np.array([np.nan if value is None else value for value in y], dtype=np.float64)
    kept = {0, len(y) - 1}
    for part in np.array_split(np.arange(len(y)), max(1, (points - 2) // 3)):
        broken = np.isnan(values[part])
        if broken.any():
            kept.add(int(part[broken.argmax()]))
        if not broken.all():
            kept |= {int(part[np.nanargmin(values[part])]), int(part[np.nanargmax(values[part])])}
    return sorted(kept)
