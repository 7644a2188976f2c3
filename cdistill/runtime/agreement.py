"""A check of a stage's first steps: all processes reduce the same gradients in one order and hold the same weights."""

import zlib
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainingArguments

from cdistill.runtime.collectives import gathered, gathered_objects
from cdistill.runtime.errors import AgreedError
from cdistill.runtime.zero import is_partitioned

CHECKED_STEPS = 2
CHUNK = 2**20  # bytes summed at a time: torch widens them to int64 before it adds


class RanksAgree(TrainerCallback):
    """Ends a run whose processes disagree; does nothing after `CHECKED_STEPS`, nor in a single process.

    Args:
        model: its trained parameters are watched.
        label: the stage in messages, such as ``2-dft``.
        ordered: gradients are reduced in the order in which they become ready (ZeRO-2 and 3): then the order must be the same,
            otherwise only which gradients there are.
    """

    def __init__(self, model: nn.Module, label: str, *, ordered: bool) -> None:
        self.model, self.label, self.ordered = model, label, ordered
        self.names: list[str] = []
        self.ready: list[int] = []  # places in ``names``, in the order of this step's gradients
        self._hooks: list[Any] = []
        self._last = 0

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """Watch the gradients."""
        if args.world_size == 1:
            return
        self._last = state.global_step + CHECKED_STEPS
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                note = partial(self._note, len(self.names))
                self._hooks.append(parameter.register_post_accumulate_grad_hook(note))
                self.names.append(name)

    def _note(self, index: int, parameter: torch.Tensor) -> None:
        self.ready.append(index)

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """Raises AgreedError on all processes, naming the first parameter of which they disagree."""
        if not self._hooks:
            return
        ready = self.ready if self.ordered else sorted(self.ready)
        self.ready = []
        self._compare(ready, state.global_step, "gradients that become ready")
        if not is_partitioned(self.model):
            parameters = dict(self.model.named_parameters())
            sums = torch.stack([_sum_of_bytes(parameters[name]) for name in self.names])
            self._compare(sums.tolist(), state.global_step, "weights after the step")
        if state.global_step >= self._last:
            for hook in self._hooks:
                hook.remove()
            self._hooks = []

    def _compare(self, values: list[int], step: int, what: str) -> None:
        if len(set(gathered(zlib.crc32(str(values).encode())))) == 1:
            return
        first, *others = gathered_objects(values)
        rank, other = next((i, other) for i, other in enumerate(others, 1) if other != first)
        place = next(i for i in range(len(first) + 1) if first[i : i + 1] != other[i : i + 1])
        is_order = what.startswith("gradients")
        index = (first[place : place + 1] or other[place : place + 1])[0] if is_order else place
        raise AgreedError(
            f"{self.label}, step {step}: process 0 and process {rank} differ in their {what}, first at {self.names[index]}: "
            "the sums over processes would be wrong; every process must run the same modules on every micro-batch"
        )


def _sum_of_bytes(parameter: torch.Tensor) -> torch.Tensor:
    """A scalar that differs if two tensors do, but for rare cases; it takes 8 * CHUNK bytes of memory."""
    octets = parameter.detach().reshape(-1).view(torch.uint8)
    return torch.stack([chunk.sum() for chunk in octets.split(CHUNK)]).sum()
