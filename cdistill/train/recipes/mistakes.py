"""Makes the sections of a recipe from plain values, by pydantic; every mistake is one line with its dotted key."""

import inspect
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from pydantic import TypeAdapter, ValidationError

from cdistill.choices import MOST, NOT_EXTREME, begins_at_home, in_short, range_in_words, too_extreme
from cdistill.data import strict_yaml
from cdistill.errors import InputError
from cdistill.runtime.errors import Mistakes

T = TypeVar("T")
Node = dict[str, Any]  # of a JSON schema
_WORDS = {"integer": "a whole number", "number": "a number", "string": "a string"}
_LEAST, _MOST = ("minimum", "exclusiveMinimum"), ("maximum", "exclusiveMaximum")
_OUT_OF_RANGE = ("greater_than", "greater_than_equal", "less_than", "less_than_equal", "finite_number")


def build(cls: type[T], content: Any) -> T:
    """An instance of a dataclass with pydantic's checks from plain values, as YAML gives them.

    Raises:
        Mistakes: a ValueError with a line for all that is wrong: the dotted key, what it may be, and the nearest key where one
            is not known. Keys that contradict each other are told, too, as far as they are right each by itself.
    """
    of: Any = cls
    root = schema(of)
    try:
        values = _switched(content, root, root)
        text = json.dumps(values)
    except TypeError as error:
        raise InputError(f"a recipe holds plain values, as YAML does: {error}") from None
    lines = list(_unusable(values))
    try:
        built: T = _adapter(of).validate_json(text)
    except ValidationError as error:
        told = {line.split(" ")[0] for line in lines}
        lines += [line for line in _lines(error.errors(include_url=False), root) if line.split(" ")[0] not in told]
    else:
        if not lines:
            return built
    if isinstance(values, Mapping):
        _section(of, values, "", lines)
    raise Mistakes("\n".join(dict.fromkeys(lines)))


def _unusable(value: Any, key: str = "") -> Iterator[str]:
    """A line for each value that no key may have, whatever its type says."""
    if isinstance(value, Mapping):
        for name, item in value.items():
            yield from _unusable(item, f"{key}.{name}".lstrip("."))
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            yield from _unusable(item, f"{key}[{i}]")
    elif isinstance(value, int) and abs(value) > MOST:
        yield f"{key} must be at most {MOST:,}, got {in_short(value)}"
    elif isinstance(value, float) and too_extreme(value):
        yield f"{key} must be {NOT_EXTREME}, got {value}"
    elif isinstance(value, str) and begins_at_home(value):
        yield f"{key} must be written out, got {value!r}: shells alone know what ~ is"
    elif isinstance(value, str) and "\0" in value:
        yield f"{key} must hold no null character, got {value!r:.80}"


@cache
def _adapter(cls: Any) -> TypeAdapter[Any]:
    return TypeAdapter(cls)


@cache
def schema(cls: Any) -> Node:
    """The JSON schema of a dataclass, as pydantic makes it."""
    return _adapter(cls).json_schema()


def kinds(node: Node, root: Node) -> list[Node]:
    """The kinds of value that a node of a schema allows, references resolved."""
    if "$ref" in node:
        node = root["$defs"][node["$ref"].rpartition("/")[2]]
    return [kind for option in node.get("anyOf", ()) for kind in kinds(option, root)] or [node]


def _below(node: Node, key: Any, root: Node) -> Node | None:
    """The node under a key or an index, None if nothing can stand there."""
    for kind in kinds(node, root):
        if isinstance(key, int) and kind.get("type") == "array":
            places = kind.get("prefixItems", [])
            return places[key] if key < len(places) else kind.get("items", {})
        if isinstance(key, str) and kind.get("type") == "object":
            more = kind.get("additionalProperties", {})
            found = kind.get("properties", {}).get(key, None if more is False else more)
            if found is not None:
                return found if isinstance(found, dict) else {}
    return None


def _switched(value: Any, node: Node, root: Node) -> Any:
    """``value`` with yes, no, on and off, where they stood without quotes, as truth values, unless a word is wanted."""
    if isinstance(value, Mapping):
        return {key: _switched(item, _below(node, str(key), root) or {}, root) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_switched(item, _below(node, i, root) or {}, root) for i, item in enumerate(value)]
    anything = not node.keys() - {"title", "description", "default"}
    if anything or any(kind.get("type") == "boolean" for kind in kinds(node, root)):
        return strict_yaml.switch(value)
    return value


def may_be(node: Node, root: Node) -> str:
    """What a value may be, in words."""
    names: list[str] = []
    words: list[str] = []
    nothing: list[str] = []
    for kind in kinds(node, root):
        if "enum" in kind or "const" in kind:
            names += map(str, kind.get("enum", [kind.get("const")]))
        elif "pattern" in kind:
            names.append(f"a path that ends in {kind['pattern'].replace(chr(92), '').rstrip('$')}")
        elif kind.get("type") == "array":
            words.append(f"a list of {kind['maxItems']}" if "maxItems" in kind else "a list")
        elif kind.get("type") == "boolean":
            words += ["true", "false"]
        elif kind.get("type") == "null":
            nothing = ["null"]
        else:
            words.append(_WORDS.get(kind.get("type", ""), "a mapping"))
    words += [("one of " if len(names) > 1 else "") + ", ".join(names)] if names else []
    *some, last = words + nothing
    return f"{', '.join(some)} or {last}" if some else last


def _lines(errors: Sequence[Any], root: Node) -> list[str]:
    """A line for each mistake; where a value could have been of several kinds, pydantic tells why it is none of them."""
    found: dict[str, str] = {}
    for error in errors:
        path, node, above = _place(error["loc"], root, unknown=error["type"] == "unexpected_keyword_argument")
        key = _dotted(path)
        for line in _messages(error, key, node, above, root):
            found.setdefault(line if error["type"] == "value_error" else key, line)
    return [line for key, line in found.items() if not any(other.startswith((f"{key}.", f"{key}[")) for other in found)]


def _place(loc: Sequence[Any], root: Node, *, unknown: bool) -> tuple[list[Any], Node, Node]:
    """The keys to a value, without pydantic's names of its kinds, the node of the value and the one that it stands in."""
    path: list[Any] = []
    node = above = root
    several = False  # kinds at this place: then pydantic names the one that it speaks of
    for step, name in enumerate(loc):
        if several:
            several = False
            continue
        below = _below(node, name, root)
        if below is None and not (unknown and step == len(loc) - 1):
            continue
        path.append(name)
        node, above = below or {}, node
        several = sum(kind.get("type") != "null" for kind in kinds(node, root)) > 1
    return path, node, above


def _dotted(path: Sequence[Any]) -> str:
    return "".join(f"[{name}]" if isinstance(name, int) else f".{name}" for name in path).lstrip(".")


def _messages(error: Any, key: str, node: Node, above: Node, root: Node) -> list[str]:
    kind, value = error["type"], error["input"]
    if kind == "value_error":
        return [_below_key(key, message) for message in str(error["ctx"]["error"]).split("\n")]
    if kind == "unexpected_keyword_argument":
        known = [name for option in kinds(above, root) for name in option.get("properties", {})]
        near = strict_yaml.nearest(key.rpartition(".")[2], known)
        return [f"{key} is not a known key{near or '; allowed: ' + ', '.join(known)}"]
    if kind == "missing" and key.endswith("]"):  # a list that is too short
        return [f"{key.rpartition('[')[0]} must be {may_be(above, root)}, got {value!r}"]
    if kind == "missing":
        return [f"{key} is missing"]
    if kind in _OUT_OF_RANGE:
        return [f"{key} must be {range_in_words(_broken(node, value, root))}, got {value!r}"]
    return [f"{key or 'a recipe'} must be {may_be(node, root)}, got {value!r}"]


def _below_key(key: str, message: str) -> str:
    """A message that begins with a key of a section, with the section's own key before it."""
    prefix = f"{key}." if key else ""
    return message if message.startswith(prefix) else f"{prefix}{message}"


class _UnknownError(LookupError):
    """A value was asked for that is wrong or missing."""


class _Known:
    """A section of which the right keys alone are known, to be asked for contradictions among them."""

    def __init__(self, of: Any, values: dict[str, Any]) -> None:
        self.__dict__ |= values
        self.of = of

    def __getattr__(self, name: str) -> Any:
        if name in {f.name for f in fields(self.of)}:
            raise _UnknownError(name)
        return inspect.getattr_static(self.of, name).__get__(self, self.of)


def _section(of: Any, values: Mapping[str, Any], key: str, lines: list[str]) -> _Known:
    """A section with what is right of it. What ``problems`` tell of that, and of the sections in it, joins ``lines``."""
    hints = get_type_hints(of, include_extras=True)
    known: dict[str, Any] = {}
    for f in fields(of):
        if f.name in values:
            found = _right(hints[f.name], values[f.name], f"{key}.{f.name}".lstrip("."), lines)
            known |= {} if found is _WRONG else {f.name: found}
        elif f.default is not MISSING:
            known[f.name] = f.default
        elif f.default_factory is not MISSING:
            known[f.name] = f.default_factory()
    section = _Known(of, known)
    problems = getattr(of, "problems", lambda section: ())
    with suppress(LookupError, ValueError):  # what is wrong is told already, and what depends on it cannot be
        lines += (_below_key(key, message) for message in problems(section))
    return section


_WRONG: Any = object()


def _right(hint: Any, value: Any, key: str, lines: list[str]) -> Any:
    """A value as its key takes it, a section that is wrong as `_section` has it, or `_WRONG`."""
    try:
        return TypeAdapter(hint).validate_json(json.dumps(value), strict=True)
    except ValidationError:
        pass
    sections = [kind for kind in (hint, *get_args(hint)) if isinstance(kind, type) and is_dataclass(kind)]
    if not sections or not isinstance(value, Mapping):
        return _WRONG
    if get_origin(hint) is not dict:
        return _section(sections[0], value, key, lines)
    if not all(isinstance(section, Mapping) for section in value.values()):
        return _WRONG
    return {name: _section(sections[0], section, f"{key}.{name}", lines) for name, section in value.items()}


def bounds(kind: Node) -> dict[str, float]:
    """The bounds of a number, as `range_in_words` takes them; a JSON schema cannot say that one is finite."""
    found: dict[str, float] = {name: kind[name] for name in (*_LEAST, *_MOST) if name in kind}
    if kind.get("type") == "number" and not kind.get("infinite") and any(name in found for name in _LEAST):
        found.setdefault("exclusiveMaximum", math.inf)
    return found


def _broken(node: Node, value: float, root: Node) -> dict[str, float]:
    """The bounds of a number; of two that it may reach, the one that it does not keep."""
    (limits,) = (bounds(kind) for kind in kinds(node, root) if kind.get("type") in ("integer", "number"))
    if "minimum" in limits and "maximum" in limits:
        return {name: limits[name] for name in (["minimum"] if value < limits["minimum"] else ["maximum"])}
    return limits
