"""CompoDistill for multimodal language models: attention distilled by fused ops, models, stages and evaluation.

    distill               one module of a teacher and a student, for a training loop of your own
    Distillation          what it returns: call it with a batch, get the losses
    CompoDistillTrainer   transformers' Trainer that distils
    CompoDistillConfig    its arguments
    Rollouts, OnPolicyConfig, CountingCollator   answers of the student's own, for on-policy distillation
    load_recipe           a recipe by name or from a file, keys changed by name=value
    run                   the stages of a recipe, as `cdistill train` runs them
    ops                   the fused ops: attention slices, their alignment, distillation through the vocabulary
    nn                    losses over them that stand in for Liger's and TRL's
    Term, register_term, register_objective   losses and stages of your own
    Family, register_family                   model families of your own
    CdistillError         base of all errors raised here; a mistake in what is given is a ValueError, too

Importing this package is cheap: torch, triton, deepspeed and transformers are imported by what uses them. With transformers in
the same process TAF students load by its auto classes (`cdistill._register`).
"""

import sys
from importlib import import_module
from importlib.machinery import ModuleSpec
from importlib.util import module_from_spec
from pathlib import Path
from typing import TYPE_CHECKING

from cdistill import _moved, _register

if TYPE_CHECKING:
    from cdistill import nn as nn
    from cdistill import ops as ops
    from cdistill.choices import OnPolicyConfig as OnPolicyConfig
    from cdistill.errors import CdistillError as CdistillError
    from cdistill.errors import InputError as InputError
    from cdistill.families import Family as Family
    from cdistill.families import register_family as register_family
    from cdistill.train import load_recipe as load_recipe
    from cdistill.train import run as run
    from cdistill.train.compodistill import CompoDistillConfig as CompoDistillConfig
    from cdistill.train.compodistill import CompoDistillTrainer as CompoDistillTrainer
    from cdistill.train.distillation import Distillation as Distillation
    from cdistill.train.distillation import distill as distill
    from cdistill.train.objectives import register_objective as register_objective
    from cdistill.train.rollout import CountingCollator as CountingCollator
    from cdistill.train.rollout import Rollouts as Rollouts
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
    "CdistillError": "cdistill.errors",
    "InputError": "cdistill.errors",
    "CompoDistillTrainer": "cdistill.train.compodistill",
    "CompoDistillConfig": "cdistill.train.compodistill",
    "CountingCollator": "cdistill.train.rollout",
    "OnPolicyConfig": "cdistill.choices",
    "Rollouts": "cdistill.train.rollout",
    "load_recipe": "cdistill.train",
    "run": "cdistill.train",
    "Family": "cdistill.families",
    "register_family": "cdistill.families",
    "Term": "cdistill.train.terms",
    "register_term": "cdistill.train.terms",
    "register_objective": "cdistill.train.objectives",
}


_ROOMS = ("nn", "ops")

__all__ = [
    "CdistillError",
    "CompoDistillConfig",
    "CompoDistillTrainer",
    "CountingCollator",
    "Distillation",
    "Family",
    "InputError",
    "OnPolicyConfig",
    "Rollouts",
    "Term",
    "distill",
    "load_recipe",
    "nn",
    "ops",
    "register_family",
    "register_objective",
    "register_term",
    "run",
]


def __getattr__(name: str) -> object:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    if name in _ROOMS:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]
