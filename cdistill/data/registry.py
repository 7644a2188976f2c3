"""Readers from outside this package, by name: a path ``NAME:REST`` is opened by the reader called NAME."""

import inspect
import os
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from cdistill._plugins import import_plugins
from cdistill.errors import InputError

if TYPE_CHECKING:
    from cdistill.data.samples import Source

MEMBERS = ("name", "in_order", "__len__", "__getitem__", "record", "place", "unread", "sizes")  # of a `Source`
TAKEN = ("hf", "file", "http", "https")
_PATH = re.compile(r"([A-Za-z][\w.+-]+):(?!//)(.*)", re.DOTALL)
_openers: dict[str, Callable[..., "Source"]] = {}


def register_reader(name: str, opener: Callable[..., "Source"]) -> None:
    """Let paths that begin with ``name:`` be opened by ``opener``, in recipes, mixes and `cdistill data`.

    It is known in this process. A package whose reader should be known wherever it is installed, as in a run of several
    processes, calls this in a plugin (`cdistill._plugins`).

    Args:
        name: letters, digits and ``_ . + -``, of two or more characters.
        opener: called with the rest of the path and, as keywords, with those of ``images``, ``columns``, ``config``, ``split``,
            ``allow_urls``, ``streaming`` and ``size`` that are given (`cdistill.data.mix.open_source`). It returns a
            `cdistill.data.samples.Source`, or raises ValueError for what it cannot open.

    Raises:
        ValueError: the name is none, or taken; the opener cannot be called.
    """
    if not _PATH.fullmatch(f"{name}:"):
        raise InputError(f"reader {name!r} must be named by two or more letters, digits and _ . + -")
    if name in TAKEN or name in _openers:
        raise InputError(f"reader {name!r} is taken: choose another name")
    if not callable(opener):
        raise InputError(f"reader {name!r} must be a function that opens a set, got {type(opener).__name__}")
    _openers[name] = opener


def names_reader(path: str) -> bool:
    """Whether a path begins with the name of a reader of others."""
    match = _PATH.fullmatch(path)
    return match is not None and _opener(match[1]) is not None


def _opener(name: str) -> Callable[..., "Source"] | None:
    if name not in _openers:
        import_plugins()
    return _openers.get(name)


def open_registered(path: str, **options: Any) -> "Source | None":
    """The set at a path that names a reader of others; None for any other path. Options that are None or False are not given.

    Raises ValueError: there is no such reader, it does not take an option, or what it gives is no `Source`.
    """
    match = _PATH.fullmatch(path)
    if match is None or match[1] in TAKEN or os.path.exists(path):
        return None
    name, rest = match.groups()
    opener = _opener(name)
    if opener is None and any(c in rest for c in "*?[{"):  # a pattern of files whose names have a colon
        return None
    if opener is None:
        known = ", ".join(sorted(_openers)) or "none"
        raise InputError(
            f"{path}: there is no such file, and no reader called {name!r} (registered: {known}): install its package, or "
            "call cdistill.data.register_reader in each process"
        )
    given = {key: value for key, value in options.items() if value not in (None, False)}
    parameters = inspect.signature(opener).parameters.values()
    if not any(p.kind is p.VAR_KEYWORD for p in parameters):
        refused = [key for key in given if key not in {p.name for p in parameters}]
        if refused:
            raise InputError(f"reader {name!r} does not take {refused[0]}: leave it out with {path}")
    source = opener(rest, **given)
    lacking = [member for member in MEMBERS if not hasattr(source, member)]
    if lacking:
        kind = type(source).__name__
        raise InputError(f"reader {name!r} gave a {kind} without {lacking[0]}: see docs/walks/add-a-reader.md")
    return source
