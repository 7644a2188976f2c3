"""CompoDistill for multimodal language models: fused attention-alignment ops, models, stages and evaluation.

Importing this package is cheap: torch, triton, deepspeed and transformers are imported by the submodules that use them. With
transformers in the same process TAF students load by its auto classes (`cdistill._register`).
"""

import sys
from importlib import import_module
from importlib.machinery import ModuleSpec
from importlib.util import module_from_spec
from pathlib import Path
from typing import TYPE_CHECKING

from cdistill import _moved, _register

if TYPE_CHECKING:
    from cdistill.families import Family as Family
    from cdistill.families import register_family as register_family
    from cdistill.train.compodistill import CompoDistillConfig as CompoDistillConfig
    from cdistill.train.compodistill import CompoDistillTrainer as CompoDistillTrainer
    from cdistill.train.distillation import Distillation as Distillation
    from cdistill.train.distillation import distill as distill
    from cdistill.train.objectives import register_objective as register_objective
    from cdistill.train.terms import Term as Term
    from cdistill.train.terms import register_term as register_term

__version__ = "0.1.0"


def _mount_kernels() -> None:
    """In a source checkout ``kernels/`` lies beside this package; make it importable as ``cdistill.kernels``.

    The folder has no ``__init__.py`` on purpose: a package called ``kernels`` exists on PyPI and transformers imports it.
    """
    name = f"{__name__}.kernels"
    folder = Path(__file__).parent.parent / "kernels"
    if name in sys.modules or not (folder / "attention_slice.py").is_file():
        return
    spec = ModuleSpec(name, None, is_package=True)
    spec.submodule_search_locations = [str(folder)]
    sys.modules[name] = module_from_spec(spec)


_mount_kernels()
_register.install()
_moved.install()


_LAZY = {
    "distill": "cdistill.train.distillation",
    "Distillation": "cdistill.train.distillation",
    "CompoDistillTrainer": "cdistill.train.compodistill",
    "CompoDistillConfig": "cdistill.train.compodistill",
    "Family": "cdistill.families",
    "register_family": "cdistill.families",
    "Term": "cdistill.train.terms",
    "register_term": "cdistill.train.terms",
    "register_objective": "cdistill.train.objectives",
}


def __getattr__(name: str) -> object:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *_LAZY]
