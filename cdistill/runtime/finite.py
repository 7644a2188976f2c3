"""Steps whose loss or gradients are not finite: skipped, counted, and after too many in a row the end of the run."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainingArguments

from cdistill.runtime.errors import NonFiniteError


class FiniteAdamW(torch.optim.AdamW):
    """AdamW whose step does nothing where a gradient is not finite, for DeepSpeed without ZeRO, which does not look.

    DeepSpeed reads ``overflow`` after a step: it then leaves the schedule where it was.
    """

    overflow = False

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One step; gradients are those of all processes already, so that all decide alike."""
        grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        self.overflow = not bool(torch.isfinite(torch.stack(torch._foreach_norm(grads))).all())
        return None if self.overflow else super().step(closure)


def poisoned(loss: Tensor) -> Tensor:
    """The same number, but where it is not finite, no gradient of it is: gradients then carry the news to all processes."""
    return loss * (1 + 0 * loss.detach())


@dataclass
class _Verdict:
    """What is known of the last step: ``skipped`` is on its way from the device until ``event`` has happened."""

    step: int
    skipped: Tensor
    event: Any
    scheduled: int
    losses: dict[str, Tensor]


class FiniteSteps(TrainerCallback):
    """Skips optimizer steps of a non-finite loss or gradient, counts them, and sums the losses of the others.

    A skipped step takes its samples and its number. Weights, optimizer state and learning-rate schedule stay as they
    were, as under fp16's dynamic loss scaling (whose overflows are skipped steps, too): training goes on as if the
    batch had not been there, and the schedule ends one step earlier. With accumulated gradients or several processes
    one bad part skips the whole step. Nothing waits for the device: its own verdict stops the fused optimizer, and the
    host reads it a step later.

    Args:
        limit: skipped steps in a row that end the run.
        label: the stage in messages, such as ``2-dft``.
    """

    def __init__(self, limit: int, label: str) -> None:
        self.limit, self.label = limit, label
        self.trainer: Trainer | None = None
        self.skipped = self.in_a_row = self._unlogged = 0
        self._running: dict[str, Tensor] = {}
        self._sums: dict[str, Tensor] = {}
        self._norm: Any = None
        self._verdict: _Verdict | None = None

    def watch(self, trainer: Trainer) -> None:
        """Follow a trainer: its gradient norms, and its steps as a callback."""
        self.trainer = trainer
        clip = trainer.accelerator.clip_grad_norm_

        def clip_and_remember(*args: Any, **kwargs: Any) -> Any:
            self._norm = clip(*args, **kwargs)
            return self._norm

        trainer.accelerator.clip_grad_norm_ = clip_and_remember
        trainer.add_callback(self)

    def add(self, name: str, value: Tensor) -> None:
        """Add a loss of a micro-batch to the running step."""
        value = value.detach()
        self._running[name] = self._running[name] + value if name in self._running else value

    def on_pre_optimizer_step(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """Decide about the running step; DeepSpeed has made its decision and its step by now."""
        assert self.trainer is not None
        self.settle()
        engine = self.trainer.deepspeed
        optimizer: Any = self.trainer.optimizer
        device = self.trainer.args.device
        if engine is not None:
            skipped = torch.tensor(bool(getattr(engine.optimizer, "overflow", False)), device=device)
        else:
            skipped = ~torch.isfinite(torch.as_tensor(self._norm, device=device))
            optimizer.optimizer.found_inf = skipped.float()
        running, self._running = self._running, {}
        for name, value in running.items():
            kept = torch.where(skipped, torch.zeros_like(value), value)
            self._sums[name] = self._sums[name] + kept if name in self._sums else kept
        event = None
        if device.type == "cuda":
            host = torch.empty((), dtype=torch.bool, pin_memory=True)
            skipped = host.copy_(skipped, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        scheduled = getattr(self.trainer.lr_scheduler, "last_epoch", 0)
        self._verdict = _Verdict(state.global_step + 1, skipped, event, scheduled, running)
        if engine is not None:
            self.settle()

    def settle(self) -> None:
        """Count the last step if it was skipped. Raises NonFiniteError after too many in a row."""
        verdict, self._verdict = self._verdict, None
        if verdict is None:
            return
        if verdict.event is not None:
            verdict.event.synchronize()
        if not verdict.skipped.item():
            self.in_a_row = 0
            return
        self.skipped, self.in_a_row, self._unlogged = self.skipped + 1, self.in_a_row + 1, self._unlogged + 1
        assert self.trainer is not None
        schedule: Any = self.trainer.lr_scheduler
        if self.trainer.deepspeed is None and schedule.last_epoch > verdict.scheduled:
            schedule.last_epoch = verdict.scheduled - 1
            schedule.step()
        if self.in_a_row >= self.limit:
            raise NonFiniteError(
                f"{self.label}, step {verdict.step}: {self._culprits(verdict.losses)} not finite, and {self.in_a_row} "
                "steps in a row had to be skipped (max_nonfinite_steps); checkpoints stay as they are"
            )

    def means(self, steps: int) -> dict[str, Any]:
        """Means of the losses over the steps since the last call that were not skipped, over all processes, and resets.

        None for every loss if none of the ``steps`` is left.
        """
        assert self.trainer is not None
        self.settle()
        steps -= self._unlogged
        result: dict[str, Any] = {}
        for name, value in self._sums.items():
            if self.trainer.args.world_size > 1:
                value = self.trainer.accelerator.reduce(value, "mean")
            result[name] = (value / steps).tolist() if steps else None
        self._sums, self._unlogged = {}, 0
        return result

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs of this process."""
        self.settle()
        counters = {"skipped": self.skipped, "in_a_row": self.in_a_row, "unlogged": self._unlogged}
        return counters | {"sums": {name: value.cpu() for name, value in self._sums.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        assert self.trainer is not None
        self.skipped, self.in_a_row, self._unlogged = state["skipped"], state["in_a_row"], state["unlogged"]
        self._sums = {name: value.to(self.trainer.args.device) for name, value in state["sums"].items()}

    def _culprits(self, losses: dict[str, Tensor]) -> str:
        assert self.trainer is not None
        names = [name for name, value in losses.items() if name != "loss" and not value.ndim] or list(losses)
        bad = torch.stack([(~torch.isfinite(losses[name])).any() for name in names]).long()
        if self.trainer.args.world_size > 1:
            bad = self.trainer.accelerator.reduce(bad, "sum")
        found = [name for name, count in zip(names, bad.tolist(), strict=True) if count]
        if not found:
            return "its gradients are"
        return f"loss {found[0]} is" if len(found) == 1 else f"losses {', '.join(found)} are"
