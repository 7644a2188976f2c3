"""Registers TAF students with the auto classes of transformers whenever both packages are imported, in either order.

`import cdistill` stays cheap: nothing is imported before transformers' auto classes are. An import of transformers is left to
finish first, the outermost one of a thread: in the middle of it LLaVA, which a TAF student is made from, may be half there.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

AUTO_CLASSES = "transformers.models.auto.configuration_auto"
MODELS = "cdistill.models"

_importing = threading.local()


def install() -> None:
    """Register now if transformers' auto classes are there, and after every later import of transformers."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
    _register()


def _register() -> None:
    if AUTO_CLASSES not in sys.modules:
        return
    if MODELS not in sys.modules:
        import_module(MODELS)  # registers as its last act
    elif hasattr(sys.modules[MODELS], "register"):  # else it is being imported, and will
        sys.modules[MODELS].register()


class _Finder(MetaPathFinder):
    """Finds what the other finders find, with a `_Loader` around the loader of an outermost module of transformers."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname.partition(".")[0] != "transformers" or getattr(_importing, "transformers", False):
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        found = (finder.find_spec(fullname, path, target) for finder in others)
        spec = next((spec for spec in found if spec is not None), None)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(Loader):
    """The loader it is given, which it puts back before the module runs; registers afterwards."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        _importing.transformers = True
        try:
            self._loader.exec_module(module)
            _register()
        finally:
            _importing.transformers = False
