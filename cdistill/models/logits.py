"""What a model does to its logits after the head: Gemma caps them, Cohere multiplies and Granite divides them.

Losses that are taken from hidden states and the head's weight must do the same.
"""

from __future__ import annotations

from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from cdistill.errors import InputError
from cdistill.families import family_of
from cdistill.models.parts import head_of

FARTHEST = 100.0  # of the logits a model is tried with: any cap shows there
NEAR = 0.02  # relative to the largest, for logits that are rounded to bf16

# What was found, by model and the values of its fields: the partitioned weights of a run could not be tried later.
_found: WeakKeyDictionary[Any, tuple[dict[str, float], AfterHead]] = WeakKeyDictionary()


class AfterHead(NamedTuple):
    """softcap * tanh(factor * logits / softcap), or factor * logits without a softcap."""

    factor: float = 1.0
    softcap: float | None = None

    def __call__(self, logits: Tensor) -> Tensor:
        """A new tensor of the same shape and dtype, or ``logits`` where nothing changes."""
        if self.factor != 1.0:
            logits = logits * self.factor
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


def after_head(model: Any, side: str = "model") -> AfterHead:
    """What a model does to its logits, by the fields of its configuration that its family's row names.

    Whether a model heeds a field is its code's choice (LLaVA ignores a Granite's divisor), so one with such a field is tried:
    four tokens are run through it, without gradient. Raises ValueError if neither doing what the field says nor doing nothing
    gives its logits, and for a family whose row says that it does something else; ``side`` says whose model it is.
    """
    config, family = model.config.get_text_config(), family_of(model)
    if family.own_head:
        raise InputError(
            f"the {side} {family.own_head} ({type(model).__name__}): its losses cannot be taken from hidden states and the head"
        )
    if head_of(model) is None:
        raise InputError(f"the {side} has no head that get_output_embeddings() names ({type(model).__name__})")
    every = {name: getattr(config, name, None) for name in family.logit_fields}
    set_fields = {name: float(value) for name, value in every.items() if value not in (None, 1, 1.0)}
    if not set_fields:
        return AfterHead()
    known = _found.get(model)
    if known is not None and known[0] == set_fields:
        return known[1]
    said = AfterHead()
    for name, value in set_fields.items():
        kind = family.logit_fields[name]
        if kind == "softcap":
            said = said._replace(softcap=value)
        else:
            said = said._replace(factor=said.factor * (value if kind == "factor" else 1 / value))
    given, found = _tried(model)
    for change in (said, AfterHead()):
        expected = change(given)
        if found.shape == given.shape and (found - expected).abs().max() <= NEAR * expected.abs().max():
            _found[model] = set_fields, change
            return change
    listed = ", ".join(f"{name} {value}" for name, value in set_fields.items())
    raise InputError(
        f"the {side} changes its logits after the head by another formula than its configuration's {listed} stands for: its "
        "losses cannot be taken from the head; say what the field does in a row of its family (cdistill.register_family)"
    )


@torch.no_grad()
def _tried(model: Any) -> tuple[Tensor, Tensor]:
    """Logits (1,4,V) fp32 put in the place of the head's, and what the model makes of them."""
    head, given = head_of(model), []

    def replace(_module: Any, _inputs: Any, logits: Tensor) -> Tensor:
        given.append(
            torch.linspace(-FARTHEST, FARTHEST, logits.numel(), device=logits.device).view_as(logits).to(logits)
        )
        return given[-1]

    device = model.get_input_embeddings().weight.device
    training, hook = {m: m.training for m in model.modules()}, head.register_forward_hook(replace)
    try:
        logits = model.eval()(input_ids=torch.arange(4, device=device)[None], use_cache=False).logits
    finally:
        hook.remove()
        for module, mode in training.items():  # each has its own: a frozen encoder may stay in evaluation
            module.training = mode
    return given[-1].float(), logits.float()
