"""How an op is registered with torch: one operator for the forward pass, one for the backward, and autograd between them.

torch.compile then sees one node for each, and opcheck can test them.
"""

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


def without_autocast(op: Callable[..., T]) -> Callable[..., T]:
    """The implementation of an op, computing in the dtypes of its arguments also where torch.autocast is on."""

    @wraps(op)
    def implementation(*arguments: Any) -> T:
        device = next(x.device for x in arguments if isinstance(x, Tensor))
        with torch.autocast(device.type, enabled=False):
            return op(*arguments)

    return implementation


def operator(name: str, takes: str, gives: int, *, changes: Sequence[str] = (), **options: Any) -> Any:
    """Register a function as torch.ops.cdistill.NAME.

    ``takes`` are its arguments as a schema has them, ``gives`` the number of tensors it returns, ``changes`` the arguments
    that it changes in place.
    """
    schema = f"({takes}) -> ({', '.join(['Tensor'] * gives)})"

    def register(function: Callable[..., Any]) -> Any:
        made = torch.library.custom_op(f"cdistill::{name}", mutates_args=changes, schema=schema, **options)
        return made(without_autocast(function))

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


def differentiable(name: str, *, leaves: Sequence[str], results: int, keeps: Sequence[int]) -> None:
    """Make NAME_backward the gradient of the operator NAME.

    The first ``results`` results have a gradient. NAME_backward takes these gradients (None for a result that was not used),
    all arguments of NAME, and those of its results whose indices are ``keeps``; it returns the gradients of the arguments
    ``leaves``, in this order: anything for one that is None.
    """
    backward = getattr(torch.ops.cdistill, f"{name}_backward")
    names = [argument.name for argument in getattr(torch.ops.cdistill, name).default._schema.arguments]
    of_leaves = [names.index(leaf) for leaf in leaves]

    def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output[results:])
        ctx.set_materialize_grads(False)
        save_for_backward(ctx, *inputs, *[output[i] for i in keeps])

    def differentiate(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        # torch wants a list for a list of tensors
        found: list[Any] = [None if count is None else [None] * count for count in ctx.lists[: len(names)]]
        upstream = grads[:results]
        if any(x is not None for x in upstream):
            saved = saved_for_backward(ctx)
            for i, grad in zip(of_leaves, backward(*upstream, *saved), strict=True):
                found[i] = None if saved[i] is None else grad
        return tuple(found)

    torch.library.register_autograd(f"cdistill::{name}", differentiate, setup_context=save)
