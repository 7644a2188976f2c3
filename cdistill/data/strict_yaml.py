"""YAML as recipes and mixes are written in it: every key once, every value its own, scalars of YAML 1.2.

YAML 1.1, PyYAML's, reads ``1e-3`` as a string, ``010`` as 8, ``1:30`` as 90, and ``no`` as false even where a word is meant.
Here ``1e-3`` is a number; ``010``, ``1:30`` and dates are strings, which whoever wants a number refuses; ``yes``, ``no``,
``on`` and ``off`` are strings that `switch` makes truth values of where those are wanted. Keys are strings, as written.
"""

import difflib
import re
from collections.abc import Iterable
from typing import Any

import yaml

from cdistill.errors import InputError

MOST_VALUES = 100_000  # aliases of aliases grow without end
SWITCHES = {"yes": True, "on": True, "no": False, "off": False}
_TEXT, _MERGE, *_COLLECTIONS = (f"tag:yaml.org,2002:{name}" for name in ("str", "merge", "map", "seq"))
_EXPONENT = r"[eE][-+]?[0-9]+"
_SCALARS = (  # YAML 1.2's core schema, with the _ of 1.1; what they are, and what they begin with
    ("null", r"~|null|Null|NULL|", "~nN"),
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?(0|[1-9][0-9]*(_[0-9]+)*)", "-+0123456789"),
    (
        "float",
        rf"[-+]?([0-9][0-9_]*\.[0-9_]*|\.[0-9]+)({_EXPONENT})?|[-+]?[0-9][0-9_]*{_EXPONENT}|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
    ("merge", r"<<", "<"),
)


class Word(str):
    """A yes, no, on or off without quotes."""

    __slots__ = ()


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = {}  # noqa: RUF012


class _Dumper(yaml.SafeDumper):
    """Quotes what either YAML would not read as a string."""


for _name, _pattern, _first in _SCALARS:
    for _class in (_Loader, _Dumper):
        _characters = [*_first, ""] if _name == "null" else [*_first]
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(f"(?:{_pattern})$"), _characters)


def load(text: str, source: str, *, under: str = "", invalid: str = "is not valid YAML") -> Any:
    """The plain values of a document; an alias gives values of its own, so that none is shared. Empty text is None.

    Args:
        text: one document.
        source: what it is called in messages.
        under: dotted key that its keys stand under.
        invalid: what messages say of a text that is no YAML.

    Raises:
        ValueError: one line naming the source: it is no YAML, holds a key twice in one mapping (both lines are named),
            contains itself or grows beyond `MOST_VALUES` by its aliases, or has a tag of its own.
    """
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        return None if node is None else _Values(loader, source, lines="\n" in text.strip()).of(node, under)
    except (yaml.YAMLError, RecursionError) as error:
        raise InputError(f"{source} {invalid}: {_reason(error)}") from None


def dump(values: Any) -> str:
    """Plain values as a document that `load` and any reader of YAML 1.1 give back."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False)


def switch(value: Any) -> Any:
    """True or false for yes, on, no and off that stood without quotes; everything else as it is."""
    return SWITCHES[value.lower()] if isinstance(value, Word) else value


def _reason(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "it nests too deeply"
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None:
        return " ".join(str(error).split())
    what = " ".join(part for part in (error.context, error.problem) if part)
    return f"{what}, line {error.problem_mark.line + 1}, column {error.problem_mark.column + 1}"


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of a message on an unknown key: what may have been meant, or nothing."""
    found = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {found[0]}?" if found else ""


class _Values:
    """Makes plain values of the nodes of one document."""

    def __init__(self, loader: _Loader, source: str, *, lines: bool) -> None:
        self.loader, self.source, self.lines = loader, source, lines
        self.count = 0
        self.around: list[yaml.Node] = []

    def of(self, node: yaml.Node, key: str) -> Any:
        self.count += 1
        if self.count > MOST_VALUES:
            raise self._error(node, f"its aliases make more than {MOST_VALUES:,} values of it")
        plain = _COLLECTIONS
        if isinstance(node, yaml.ScalarNode):
            plain = [_TEXT, self.loader.resolve(yaml.ScalarNode, node.value, (True, False))]
        if node.tag not in plain:
            problem = f"the tag {node.tag} makes no plain value: leave it out"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
        if isinstance(node, yaml.ScalarNode):
            if node.style is None and node.value.lower() in SWITCHES:
                return Word(node.value)
            return self.loader.construct_object(node)
        if node in self.around:
            raise self._error(node, f"{key} is an alias of what it stands in")
        self.around.append(node)
        try:
            if isinstance(node, yaml.SequenceNode):
                return [self.of(item, f"{key}[{i}]") for i, item in enumerate(node.value)]
            return self._mapping(node, key)
        finally:
            self.around.pop()

    def _mapping(self, node: yaml.Node, key: str) -> dict[str, Any]:
        """What is merged in by ``<<``, of several the first, below what is written here."""
        first: dict[str, yaml.Node] = {}
        own: dict[str, Any] = {}
        merged: list[dict[str, Any]] = []
        for name_node, value_node in node.value:
            if not isinstance(name_node, yaml.ScalarNode):
                raise self._error(name_node, f"a key of {key or 'the document'} is a list or a mapping: keys are words")
            name = name_node.value
            path = f"{key}.{name}" if key else name
            if name in first:
                also = f" (first in line {first[name].start_mark.line + 1})" if self.lines else ""
                raise self._error(name_node, f"{path} is given twice{also}: leave one of them out")
            first[name] = name_node
            if name_node.tag == _MERGE:
                parts = value_node.value if isinstance(value_node, yaml.SequenceNode) else [value_node]
                if not all(isinstance(part, yaml.MappingNode) for part in parts):
                    raise self._error(name_node, f"{path} must be an alias of a mapping, or a list of such")
                merged = [self.of(part, key) for part in parts]
            else:
                own[name] = self.of(value_node, path)
        return {name: value for part in [*reversed(merged), own] for name, value in part.items()}

    def _error(self, node: yaml.Node, reason: str) -> ValueError:
        line = f", line {node.start_mark.line + 1}" if self.lines else ""
        return InputError(f"{self.source}{line}: {reason}")
