"""What callers put around whole models, which losses taken from hidden states and heads would leave out in silence."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from functools import partial
from typing import Any

from torch import nn

from cdistill.errors import InputError

# Whose hooks and forward passes move weights and inputs, or watch, and leave a model's results alone.
LIBRARIES = frozenset(
    {
        "accelerate",
        "bitsandbytes",
        "cdistill",
        "deepspeed",
        "liger_kernel",
        "lightning",
        "lightning_fabric",
        "peft",
        "pytorch_lightning",
        "torch",
        "transformers",
        "trl",
        "wandb",
    }
)


def refuse_left_out(module: nn.Module, side: str, what: str, *, called: bool) -> None:
    """Raise ValueError for what somebody has put around a module whose own forward pass is not run.

    ``side`` and ``what`` name it. Where it is ``called`` with losses in place of its results, hooks before it do their work,
    and nothing is said of a replaced forward pass: Liger's kernels and TRL's trainers give students one that computes the
    same. A class's own forward pass is not looked at.
    """
    hooks = list(module._forward_hooks.values())
    found = None if called else _forward_of_others(module)
    if found is None:
        found = hook_of_others(hooks if called else (*module._forward_pre_hooks.values(), *hooks), LIBRARIES)
    if found is not None:
        raise InputError(
            f"the {side} has {found} on {what}, which the losses, taken from hidden states and the head, would leave out: "
            "remove it (what only watches may be a hook on what distill() returned, or on a layer)"
        )


def hook_of_others(hooks: Iterable[Callable[..., Any]], libraries: Collection[str]) -> str | None:
    """The first hook that is not from one of the libraries; None if there is none."""
    for hook in hooks:
        home = _home(hook)
        if home.partition(".")[0] not in libraries:
            return f"a forward hook of {home}"
    return None


def _forward_of_others(module: nn.Module) -> str | None:
    """A forward pass that has been put in place of the class's, other than by a library, also beneath a library's."""
    of_class = [kind.__dict__["forward"] for kind in type(module).__mro__ if "forward" in kind.__dict__]
    forward = vars(module).get("forward")
    while forward is not None and getattr(forward, "__func__", forward) not in of_class:
        home = _home(forward)
        if home.partition(".")[0] not in LIBRARIES:
            return f"a forward pass of {home}"
        forward = getattr(forward, "__wrapped__", None)
    return None


def _home(function: Any) -> str:
    """The module whose code a function is; ``__module__`` may be that of another one, which it wraps."""
    while isinstance(function, partial) or hasattr(function, "__func__"):
        function = function.func if isinstance(function, partial) else function.__func__
    if hasattr(function, "__globals__"):
        return str(function.__globals__.get("__name__"))
    return str(type(function).__module__)
