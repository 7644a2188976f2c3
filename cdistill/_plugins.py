"""Modules of other packages that register readers, terms, objectives, engines and families, imported once in every process.

A package names such a module in its pyproject.toml::

    [project.entry-points."cdistill.plugins"]
    mine = "my_package.for_cdistill"
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.metadata import EntryPoint, entry_points

from cdistill.errors import InputError

GROUP = "cdistill.plugins"
_imported: set[EntryPoint] = set()
_importing = 0


def import_plugins() -> None:
    """Import the modules of installed packages that register something; those that have been are left alone.

    Raises ValueError, in one line, for a module that cannot be imported.
    """
    for point in _installed(tuple(sys.path)):
        if point in _imported:
            continue
        try:
            with _import():
                point.load()
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            message = f"plugin {point.name} ({point.value}) cannot be imported: {reason}; mend or uninstall it"
            raise InputError(message) from error
        _imported.add(point)


@cache
def _installed(path: tuple[str, ...]) -> tuple[EntryPoint, ...]:
    return tuple(entry_points(group=GROUP))


def registers_everywhere() -> bool:
    """Whether what is registered now is so in every process, because a plugin does it."""
    return _importing > 0


@contextmanager
def _import() -> Iterator[None]:
    global _importing
    _importing += 1
    try:
        yield
    finally:
        _importing -= 1
