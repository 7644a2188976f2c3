"""Modules that documents and scripts knew by another name; an import by that name gives the module itself."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

MOVED = {
    "cdistill.train.config": "cdistill.train.recipes",
    "cdistill.data.builtin": "cdistill.builtin.dataset",
    "cdistill.data.render": "cdistill.builtin.render",
    "cdistill.data.scenes": "cdistill.builtin.scenes",
}


def install() -> None:
    """Let the names of `MOVED` be imported; what they stand for is imported no earlier than they are."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())


class _Finder(MetaPathFinder, Loader):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(fullname, self) if fullname in MOVED else None

    def exec_module(self, module: ModuleType) -> None:
        """Put the module that has moved into the place of the one that the import machinery has made."""
        sys.modules[module.__name__] = import_module(MOVED[module.__name__])
