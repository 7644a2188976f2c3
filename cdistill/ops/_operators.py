"""How an op is registered with torch: one operator for the forward pass, one for the backward, and autograd between them.

torch.compile then sees one node for each, and opcheck can test them.
"""

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
_LIBRARY = torch.library.Library("cdistill", "FRAGMENT")


def without_autocast(op: Callable[..., T]) -> Callable[..., T]:
    """The implementation of an op, computing in the dtypes of its arguments also where torch.autocast is on."""

    @wraps(op)
    def implementation(*arguments: Any) -> T:
        device = next(x.device for x in arguments if isinstance(x, Tensor))
        with torch.autocast(device.type, enabled=False):
            return op(*arguments)

    return implementation


class Operator:
    """torch.ops.cdistill.NAME, which has a function that computes it, and shall have one that makes its results' shapes."""

    def __init__(self, name: str):
        self.name = name

    def register_fake(self, function: Callable[..., Any]) -> None:
        """Register what makes empty tensors of the shapes and dtypes of the results."""
        torch.library.register_fake(f"cdistill::{self.name}", function, lib=_LIBRARY)


def operator(
    name: str, takes: str, gives: int, *, tags: Sequence[torch.Tag] = ()
) -> Callable[[Callable[..., Any]], Operator]:
    """Register a function as torch.ops.cdistill.NAME.

    ``takes`` are its arguments as a schema has them, ``gives`` the number of tensors it returns. A function that changes an
    argument in place also counts its version. torch.library.custom_op does the same and imports sympy and torch._dynamo at the
    first call: 2.8 s of CPU time and 150 MB in a process that compiles nothing.
    """

    def register(function: Callable[..., Any]) -> Operator:
        schema = f"{name}({takes}) -> ({', '.join(['Tensor'] * gives)})"
        _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag, *tags))
        _LIBRARY.impl(name, without_autocast(function), "CompositeExplicitAutograd")
        return Operator(name)

    return register


def save_for_backward(ctx: Any, *values: Any) -> None:
    """Save values for `saved_for_backward`: tensors, also those made in inference mode, which autograd refuses, lists, others.

    Tensors made in inference mode cannot have a gradient or be changed in place, so they may wait on ``ctx``.
    """
    ctx.lists = [len(x) if isinstance(x, list) else None for x in values]
    flat = [y for x in values for y in (x if isinstance(x, list) else [x])]
    ctx.apart = [None if isinstance(x, Tensor) and not x.is_inference() else x for x in flat]
    ctx.save_for_backward(*[x if y is None else None for x, y in zip(flat, ctx.apart, strict=True)])


def saved_for_backward(ctx: Any) -> list[Any]:
    """What `save_for_backward` was given; to be called once, as gradient checkpointing allows no second time."""
    flat = (x if y is None else y for x, y in zip(ctx.saved_tensors, ctx.apart, strict=True))
    return [next(flat) if count is None else [next(flat) for _ in range(count)] for count in ctx.lists]


def register_gradient(name: str, save: Callable[..., None], differentiate: Callable[..., Any]) -> None:
    """Make ``differentiate`` the gradient of the operator NAME, from what ``save`` kept; NAME_backward has none."""

    def refuse(ctx: Any, *grads: Tensor | None) -> None:
        raise RuntimeError(f"no autograd formula for cdistill::{name}_backward: {name} cannot be differentiated twice")

    torch.library.register_autograd(f"cdistill::{name}", differentiate, setup_context=save, lib=_LIBRARY)
    torch.library.register_autograd(f"cdistill::{name}_backward", refuse, lib=_LIBRARY)


def differentiable(name: str, *, leaves: Sequence[str], results: int, keeps: Sequence[int]) -> None:
    """Make NAME_backward the gradient of the operator NAME.

    The first ``results`` results have a gradient. NAME_backward takes these gradients (None for a result that was not used),
    all arguments of NAME, and those of its results whose indices are ``keeps``; it returns the gradients of the arguments
    ``leaves``, in this order: anything for one that is None.
    """
    backward = getattr(torch.ops.cdistill, f"{name}_backward")
    taken = getattr(torch.ops.cdistill, name).default._schema.arguments
    names, of_tensors = [x.name for x in taken], [isinstance(x.type, torch.ListType) for x in taken]
    of_leaves = [names.index(leaf) for leaf in leaves]

    def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output[results:])
        ctx.set_materialize_grads(False)
        save_for_backward(ctx, *inputs, *[output[i] for i in keeps])

    def differentiate(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        # torch wants a list for a list of tensors, which a list of numbers that may be None is not
        counts = zip(ctx.lists, of_tensors, strict=False)
        found: list[Any] = [[None] * count if listed and count is not None else None for count, listed in counts]
        upstream = grads[:results]
        if any(x is not None for x in upstream):
            saved = saved_for_backward(ctx)
            for i, grad in zip(of_leaves, backward(*upstream, *saved), strict=True):
                found[i] = None if saved[i] is None else grad
        return tuple(found)

    register_gradient(name, save, differentiate)
