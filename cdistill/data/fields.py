"""JSON objects that record which of their values were read, so that the rest can be reported."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


class Fields:
    """The values of an object, each given once.

    Args:
        record: the object; it is not changed.
    """

    def __init__(self, record: Mapping[str, Any]) -> None:
        self._left = dict(record)

    def take(self, *names: str) -> Any:
        """The value of the first of these keys that says something, else of the first that is not null, else None."""
        name = next((n for n in names if not is_blank(self._left.get(n))), None)
        name = name or next((n for n in names if self._left.get(n) is not None), None)
        return None if name is None else self._left.pop(name)

    def has(self, *names: str) -> bool:
        """Whether a key that was not taken has a value, however empty."""
        return any(self._left.get(name) is not None for name in names)

    def left(self) -> list[str]:
        """Keys that nobody took though they say something."""
        return [name for name, value in self._left.items() if not is_blank(value)]


def is_blank(value: Any) -> bool:
    """Whether a value says nothing: null, NaN, white space, and lists and objects of such values alone."""
    if isinstance(value, str):
        return not value or value.isspace()
    if isinstance(value, float):
        return math.isnan(value)
    if isinstance(value, (list, tuple)):
        return all(map(is_blank, value))
    if isinstance(value, Mapping):
        return all(map(is_blank, value.values()))
    return value is None
