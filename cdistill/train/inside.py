"""Runs a function in place of a module's forward pass, inside the module's call.

Losses need a model's hidden states and the weight of its head, but no logits. A loss that called parts of the model would go
around the hooks on the whole: gradients would not be reduced, sharded weights not gathered. So the model is called as usual,
with a keyword that replaces its forward pass, and wrappers (DDP, FSDP2, DeepSpeed, autocast, peft) see an ordinary call::

    make_replaceable(model)
    model(**batch, **instead_of_forward(function))  # returns function(**batch)
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from types import MethodType
from typing import Any

import torch
from torch import nn

KEYWORD = "cdistill_inside"


def instead_of_forward(function: Callable[..., Any]) -> dict[str, Any]:
    """The keyword by which a module, or what wraps it, runs ``function`` in place of its forward pass.

    A compiler of the call leaves the function alone; layers in it that are compiled by themselves stay so.
    """
    return {KEYWORD: torch.compiler.disable(function)}


def make_replaceable(module: nn.Module) -> None:
    """Let `instead_of_forward` work for a module; without it the forward pass stays what it is. May be called again."""
    given = module.__dict__.get("forward")
    if hasattr(given, KEYWORD):
        return

    @wraps(type(module).forward if given is None else given)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        function = kwargs.pop(KEYWORD, None)
        if function is not None:
            return function(*args, **kwargs)
        # by the class, so that a copy of the module runs itself
        return type(self).forward(self, *args, **kwargs) if given is None else given(*args, **kwargs)

    setattr(forward, KEYWORD, True)
    module.forward = MethodType(forward, module)  # type: ignore[method-assign]
