"""Every key of a recipe with what it may be, its default and its meaning: as a JSON schema for editors, and as a page."""

import ast
import inspect
import json
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import fields, is_dataclass
from typing import Any, get_args, get_type_hints

from cdistill.choices import VAT_ENGINES, range_in_words
from cdistill.train.objectives import OBJECTIVES
from cdistill.train.recipes.keys import Recipe
from cdistill.train.recipes.mistakes import Node, bounds, kinds, may_be, schema

_INTRODUCTION = """# The keys of a recipe

Made by `cdistill recipes keys` from the classes that check recipes. A recipe is a YAML file; `extends: NAME` (a shipped recipe,
or a path) begins from another, of which mappings are changed key by key. On the command line `key.of.it=value` changes a key.
`cdistill recipes schema` prints a JSON schema; an editor with YAML support reads it from a first line such as
`# yaml-language-server: $schema=recipe.schema.json`.
"""


def json_schema() -> Node:
    """The JSON schema of a recipe's file, with the meaning of each key, which may leave to others what it ``extends``."""
    root = deepcopy(schema(Recipe))
    classes = dict(_classes(Recipe))
    for node in (root, *root["$defs"].values()):
        of = classes[node.pop("title")]
        node["description"] = _paragraphs(of)[0]
        docs = field_docs(of)
        for name, key in node["properties"].items():
            key.pop("title", None)
            if name in docs:
                key["description"] = docs[name]
            for kind in (key, *key.get("anyOf", ())):
                kind.pop("infinite", None)
    root["$defs"]["StageConfig"].pop("required")  # a section that changes another's keys repeats none of them
    root["$defs"]["StageConfig"]["properties"]["objective"]["enum"] = list(OBJECTIVES)
    root["$defs"]["VATOptions"]["properties"]["engine"]["examples"] = list(VAT_ENGINES)
    root["properties"] = {
        "extends": {"type": "string", "description": "Name or path of the recipe that this one begins from."},
        **root["properties"],
    }
    root["anyOf"] = [{"required": ["extends"]}, {"required": root.pop("required")}]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "Recipe of cdistill"} | root


def page() -> str:
    """The page of all keys, in Markdown."""
    root = schema(Recipe)
    classes = dict(_classes(Recipe))
    sections = [_INTRODUCTION]
    for path, node in _sections(root, root, ""):
        of = classes[node["title"]]
        docs = field_docs(of)
        prefix = f"{path}." if path else ""
        rows = ["| key | may be | default | meaning |", "| --- | --- | --- | --- |"]
        for name, key in node["properties"].items():
            if any("properties" in kind for kind in _within(key, root)):
                where = f"{prefix}{name}" + (".NAME" if "additionalProperties" in key else "")
                docs[name] = " ".join(filter(None, (docs.get(name), f"See `{where}` below.")))
            default = (
                f"`{json.dumps(key['default'])}`"
                if "default" in key
                else "required"
                if name in node.get("required", ())
                else ""
            )
            rows.append(f"| `{name}` | {_allowed(key, root)} | {default} | {docs[name]} |".replace("\n", " "))
        title = f"## `{path}`" if path else "## Keys of the whole run"
        sections.append("\n\n".join([title, *_paragraphs(of), "\n".join(rows)]) + "\n")
    return "\n".join(sections)


def _sections(node: Node, root: Node, path: str) -> Iterator[tuple[str, Node]]:
    """Mappings with keys of their own, each with its dotted key, the outer ones first."""
    yield path, node
    for name, key in node["properties"].items():
        for kind in _within(key, root):
            if "properties" in kind:
                below = f"{name}.NAME" if "additionalProperties" in key else name
                yield from _sections(kind, root, f"{path}.{below}" if path else below)


def _within(key: Node, root: Node) -> list[Node]:
    """The kinds of a key's value or, of sections by names of one's own, of each section."""
    more = key.get("additionalProperties")
    return kinds(more if isinstance(more, dict) else key, root)


def _allowed(key: Node, root: Node) -> str:
    words = may_be(key, root)
    ranges = [range_in_words(bounds(kind)) for kind in kinds(key, root) if bounds(kind)]
    return f"{words}, {ranges[0]}" if ranges else words


def _paragraphs(cls: type) -> list[str]:
    parts = [" ".join(part.split()) for part in inspect.cleandoc(cls.__doc__ or "").split("\n\n")]
    return [part for part in parts if not part.startswith("Raises ")]


def _classes(cls: type) -> Iterator[tuple[str, type]]:
    """A dataclass and those that its fields hold, by name."""
    yield cls.__name__, cls
    pending: list[Any] = list(get_type_hints(cls).values())
    while pending:
        hint = pending.pop()
        pending += get_args(hint)
        if is_dataclass(hint):
            yield from _classes(hint)  # type: ignore[arg-type]


def field_docs(cls: type) -> dict[str, str]:
    """The string below each field of a dataclass, those of its bases included, in one line."""
    docs: dict[str, str] = {}
    for of in reversed([c for c in cls.__mro__ if is_dataclass(c)]):
        (definition,) = ast.parse(inspect.getsource(of)).body
        assert isinstance(definition, ast.ClassDef)
        for field, text in zip(definition.body, definition.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(text, ast.Expr):
                docs[field.target.id] = " ".join(ast.literal_eval(text.value).split())
    return {f.name: docs[f.name] for f in fields(cls) if f.name in docs}  # type: ignore[arg-type]
