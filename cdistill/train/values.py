"""Plain values, changed by overrides and made into configuration dataclasses by their annotations."""

import copy
import dataclasses
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from cdistill.data import strict_yaml

T = TypeVar("T")
MISSING: Any = object()  # the value of a key that only the other mapping has


def override(content: dict[str, Any], overrides: Sequence[str]) -> None:
    """Apply ``a.b=value`` overrides in their order. Raises ValueError where one undoes what an earlier one says."""
    applied: list[tuple[str, list[str], Any]] = []
    for text in overrides:
        key, equals, written = text.partition("=")
        if not equals or not key:
            raise ValueError(f"override {text!r} must have the form key=value")
        names, value = key.split("."), strict_yaml.load(written, f"override {text!r}", under=key)
        _put(content, names, copy.deepcopy(value), text)
        for earlier, path, wanted in applied:
            found: Any = content
            for name in path:
                found = found.get(name) if isinstance(found, dict) else None
            if not _holds(found, wanted):
                raise ValueError(f"override {text!r} undoes {earlier!r}: leave one of them out")
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
            raise ValueError(f"override {text!r}: {'.'.join(parents[: depth + 1])} has no keys below it")
    node[last] = value


def differences(a: Any, b: Any, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Dotted keys in which plain values differ, each with both values; `MISSING` where there is none."""
    if isinstance(a, dict) and isinstance(b, dict):
        for name in [*a, *(name for name in b if name not in a)]:
            yield from differences(a.get(name, MISSING), b.get(name, MISSING), f"{key}.{name}" if key else str(name))
    elif a != b:
        yield key, a, b


def build(cls: type[T], content: Any, path: str = "") -> T:
    """An instance of a configuration dataclass; every error names the dotted key."""
    prefix = f"{path}." if path else ""
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} must be a mapping of keys to values, got {content!r}")
    known = {f.name: f for f in fields(cls)}  # type: ignore[arg-type]
    for name in content:
        if name not in known:
            near = strict_yaml.nearest(str(name), known)
            raise ValueError(f"{prefix}{name} is not a known key; allowed: {', '.join(known)}{near}")
    hints = get_type_hints(cls)
    values = {}
    for name, f in known.items():
        if name in content:
            values[name] = _convert(hints[name], content[name], prefix + name)
        elif f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            raise ValueError(f"{prefix}{name} is missing")
    try:
        return cls(**values)
    except ValueError as error:
        raise ValueError(str(error) if str(error).startswith(prefix) else f"{prefix}{error}") from None


_WORDS = {int: "a whole number", float: "a number", str: "a string", bool: "true or false", types.NoneType: "null"}


def _convert(hint: Any, value: Any, path: str) -> Any:
    """``value`` as the annotated type, or ValueError naming the key and what it may be."""
    hint, origin, args = _parts(hint)
    if dataclasses.is_dataclass(hint):
        return build(hint, value, path)  # type: ignore[arg-type]
    if origin in (Union, types.UnionType):
        for option in args:
            if _matches(option, value):
                return _convert(option, value, path)
        raise ValueError(f"{path} must be {' or '.join(_describe(a) for a in args)}, got {value!r}")
    if not _matches(hint, value):
        raise ValueError(f"{path} must be {_describe(hint)}, got {value!r}")
    if hint is float:
        return float(value)
    if hint is bool:
        return strict_yaml.switch(value)
    if hint is str:
        return str(value)
    if origin is tuple:
        items = [args[0]] * len(value) if args[-1] is Ellipsis else args
        return tuple(_convert(item, v, f"{path}[{i}]") for i, (item, v) in enumerate(zip(items, value, strict=True)))
    if origin is dict:
        return {str(k): _plain(v) if args[1] is Any else _convert(args[1], v, f"{path}.{k}") for k, v in value.items()}
    return value


def _plain(value: Any) -> Any:
    """A copy of a value of no particular type, with yes, no, on and off as truth values."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else strict_yaml.switch(value)


def _parts(hint: Any) -> tuple[Any, Any, tuple[Any, ...]]:
    """A type, its origin and arguments; names to choose from are strings here, and checked where they are listed."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        return str, None, ()
    if origin is Sequence:
        return tuple, tuple, (args[0], Ellipsis)
    return hint, origin, args


def _matches(hint: Any, value: Any) -> bool:
    hint, origin, args = _parts(hint)
    if origin is tuple:
        return isinstance(value, list | tuple) and (args[-1] is Ellipsis or len(value) == len(args))
    if origin is dict or dataclasses.is_dataclass(hint):
        return isinstance(value, Mapping)
    if hint is bool:
        return isinstance(strict_yaml.switch(value), bool)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def _describe(hint: Any) -> str:
    hint, origin, args = _parts(hint)
    if origin is tuple:
        return "a list" if args[-1] is Ellipsis else f"a list of {len(args)}"
    return "a mapping" if origin is dict or dataclasses.is_dataclass(hint) else _WORDS[hint]
