"""Plain values, as YAML has them: changed by overrides, and compared."""

import copy
from collections.abc import Iterator, Sequence
from typing import Any

from cdistill.data import strict_yaml
from cdistill.errors import InputError

MISSING: Any = object()  # the value of a key that only the other mapping has


def override(content: dict[str, Any], overrides: Sequence[str]) -> None:
    """Apply ``a.b=value`` overrides in their order. Raises ValueError where one undoes what an earlier one says."""
    applied: list[tuple[str, list[str], Any]] = []
    for text in overrides:
        key, equals, written = text.partition("=")
        if not equals or not key:
            raise InputError(f"override {text!r} must have the form key=value")
        names, value = key.split("."), strict_yaml.load(written, f"override {text!r}", under=key)
        _put(content, names, copy.deepcopy(value), text)
        for earlier, path, wanted in applied:
            found: Any = content
            for name in path:
                found = found.get(name) if isinstance(found, dict) else None
            if not _holds(found, wanted):
                raise InputError(f"override {text!r} undoes {earlier!r}: leave one of them out")
        applied.append((text, names, value))


def _holds(found: Any, wanted: Any) -> bool:
    """Whether all that one value says still stands in another; mappings may have gained keys."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        return all(key in found and _holds(found[key], value) for key, value in wanted.items())
    return repr(found) == repr(wanted)  # not ==: 1 is no true, and .nan is itself


def _put(content: dict[str, Any], names: Sequence[str], value: Any, text: str) -> None:
    *parents, last = names
    node = content
    for depth, name in enumerate(parents):
        if node.get(name) is None:
            node[name] = {}
        node = node[name]
        if not isinstance(node, dict):
            raise InputError(f"override {text!r}: {'.'.join(parents[: depth + 1])} has no keys below it")
    node[last] = value


def differences(a: Any, b: Any, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Dotted keys in which plain values differ, each with both values; `MISSING` where there is none."""
    if isinstance(a, dict) and isinstance(b, dict):
        for name in [*a, *(name for name in b if name not in a)]:
            yield from differences(a.get(name, MISSING), b.get(name, MISSING), f"{key}.{name}" if key else str(name))
    elif a != b:
        yield key, a, b


def first_difference(a: Any, b: Any) -> str | None:
    """Dotted key of the first value in which two mappings differ, or None."""
    return next((key for key, _, _ in differences(a, b)), None)
