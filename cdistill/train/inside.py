"""Work inside a module's call: what wraps the call (DDP, FSDP2, DeepSpeed, autocast, peft) sees an ordinary forward pass.

Losses need a model's hidden states and the weight of its head, and no logits. Taken from parts of the model, they would go
around hooks on the whole of it: gradients would not be reduced, sharded weights not gathered. So the call is made as usual,
with a function as one more keyword that stands in for the forward pass::

    open_inside(model)
    model(**batch, **inside(function))  # returns function(**batch)
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from types import MethodType
from typing import Any

import torch
from torch import nn

KEYWORD = "cdistill_inside"


def inside(function: Callable[..., Any]) -> dict[str, Any]:
    """The keyword by which a module, or what wraps it, runs ``function`` in place of its forward pass.

    A compiler of the call leaves the function alone; layers in it that are compiled by themselves stay so.
    """
    return {KEYWORD: torch.compiler.disable(function)}


def open_inside(module: nn.Module) -> None:
    """Let `inside` work for a module, whose own forward pass stays what it is. May be called again."""
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
