"""Who calls a `Distillation`: what wraps its student, and the `transformers.Trainer` whose step it is.

A call that goes around DistributedDataParallel, or leaves out the number of items that Trainer has counted, gives losses that
look right and gradients that are not. A model learns of neither, so this module looks for both.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cdistill.errors import InputError

LOOKS = 3  # calls with gradients before which wrappers are looked for: the first may be a trial before one wraps


class WrapperCheck:
    """Refuses calls of the student that go around its wrapper; ``check`` is for every call with gradients."""

    def __init__(self, student: nn.Module) -> None:
        self.student, self._calls = student, 0
        self._wrappers: list[Any] = []

    @torch.compiler.disable
    def check(self) -> None:
        """Raise ValueError for a call that goes around a wrapper."""
        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
            return
        if self._calls < LOOKS:
            self._calls += 1
            _refuse_fsdp1(self.student)
            self._wrappers = _wrappers(next((p for p in self.student.parameters() if p.requires_grad), None))
        for wrapper in self._wrappers:
            if not any(frame.f_locals.get("self") is wrapper for frame in _frames()):
                kind = type(wrapper).__name__
                raise InputError(
                    f"the student's gradients belong to a {kind}, and this call goes around it, so that processes would train "
                    f"students of their own: call the {kind} of what distill() returned, or use cdistill.CompoDistillTrainer"
                )


def _wrappers(parameter: nn.Parameter | None) -> list[Any]:
    """Every DistributedDataParallel and engine of DeepSpeed that holds a parameter."""
    if parameter is None:
        return []
    kinds: tuple[type, ...] = (nn.parallel.DistributedDataParallel,)
    if "deepspeed" in sys.modules:
        kinds += (sys.modules["deepspeed"].DeepSpeedEngine,)
    found = [o for o in gc.get_objects() if issubclass(type(o), kinds)]
    return [wrapper for wrapper in found if any(p is parameter for p in wrapper.parameters())]


def _refuse_fsdp1(student: nn.Module) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel

    around = (frame.f_locals.get("self") for frame in _frames())
    wrapped = any(isinstance(m, FullyShardedDataParallel) for m in (*student.modules(), *around))
    parameters = list(student.parameters())
    if wrapped or not parameters or any(getattr(p, "_fsdp_flattened", False) for p in parameters):
        raise InputError(
            "FullyShardedDataParallel (FSDP 1) flattens the weights that the losses read: shard with "
            "torch.distributed.fsdp.fully_shard, or set accelerate's fsdp_version (fsdp_config's version) to 2"
        )


def _frames() -> Iterator[FrameType]:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back


def _calls_of_trainer() -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """Methods of transformers' own Trainer that are running, from the innermost: name, trainer and local variables."""
    module = sys.modules.get("transformers.trainer")
    if module is None:
        return
    names = ("compute_loss", "training_step", "prediction_step", "_run_epoch", "_inner_training_loop", "save_model")
    codes = {getattr(module.Trainer, n).__code__: n for n in names if hasattr(module.Trainer, n)}
    for frame in _frames():
        if (name := codes.get(frame.f_code)) is not None:
            found = frame.f_locals
            yield name, found["self"], found


@torch.compiler.disable
def items_of_trainer() -> tuple[Tensor | int, int] | None:
    """The number of items that a Trainer has counted and its ``compute_loss`` has not handed on, and over how many processes
    it counted; None where a mean over the batch is what it expects.

    Trainer does not divide by the accumulated batches where it leaves that to the loss: without the number its gradient would
    be so many times too large.
    """
    for name, trainer, found in _calls_of_trainer():
        if name != "training_step":
            continue
        items = found.get("num_items_in_batch")
        scaled = getattr(trainer, "loss_is_scaled_for_ga", None)
        undivided = trainer.model_accepts_loss_kwargs if scaled is None else scaled
        if not undivided or items is None:
            return None
        args = trainer.args
        return items, args.world_size if args.average_tokens_across_devices else 1
    return None


@torch.compiler.disable
def folder_of_trainer() -> str | None:
    """Where a Trainer is saving its model, on the process that writes."""
    for name, trainer, found in _calls_of_trainer():
        if name == "save_model":
            return str(found["output_dir"]) if trainer.args.should_save else None
    return None


@dataclass
class Window:
    """The batches whose gradients a Trainer adds up."""

    batches: list[Mapping[str, Tensor]]
    samples: Tensor | None = None  # of all of them and, where Trainer counts so, of all processes
    trainer: Any = None

    def reduce(self, count: Tensor) -> Tensor:
        """A count over the processes that `transformers.Trainer` counts items over."""
        args = self.trainer.args
        if args.world_size == 1 or not args.average_tokens_across_devices:
            return count
        return self.trainer.accelerator.reduce(count.to(args.device), "sum")


def window_of_trainer(batch: Mapping[str, Tensor]) -> Window | None:
    """The window of the Trainer that has asked for the loss of a batch; None where no Trainer has."""
    for name, trainer, found in _calls_of_trainer():
        if name == "prediction_step":
            return Window([batch], trainer=trainer)
        if "batch_samples" in found:
            return Window(found["batch_samples"], trainer=trainer)
    return None
