"""Measuring the student as a stage goes on, and the best student so far.

Measuring changes nothing of the training: no gradient is made, no random number drawn, no sample taken from the training's
order, so that a run with it has the bits of one without, and one that is resumed those of one that was not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainingArguments

from cdistill.manifest import COMPLETE, damage, read_manifest
from cdistill.runtime import pulse

METRIC, VALUE = "metric", "best"  # keys of a folder's manifest

Measure = Callable[[], Mapping[str, float]]


class Measuring(TrainerCallback):
    """Measures the student every so many steps and after the last one, in all processes together.

    Args:
        trainer: the `DistillTrainer`.
        measure: makes the values by their names.
        every: steps between two measurements.
        report: given the step and the values, on the first process.
        keep: given the step and the values in all processes, to keep the student if it is the best so far.
    """

    def __init__(
        self,
        trainer: Any,
        measure: Measure,
        every: int,
        report: Callable[[int, Mapping[str, float]], None],
        keep: Callable[[int, Mapping[str, float]], None] | None,
    ) -> None:
        self.trainer, self.measure, self.every, self.report, self.keep = trainer, measure, every, report, keep

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure, if it is time."""
        step = state.global_step
        if step % self.every and step != state.max_steps:
            return
        model, device = self.trainer.model_wrapped, self.trainer.args.device
        model.eval()
        try:
            with (
                torch.no_grad(),
                torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
                self.trainer.compute_loss_context_manager(),
                pulse.paused(),
            ):
                values = self.measure()
        finally:
            model.train()
        if state.is_world_process_zero:
            self.report(step, values)
        if self.keep is not None:
            self.keep(step, values)


def is_best(folder: Path, metric: str, value: float) -> bool:
    """Whether a value of a metric is better than that of the student in a folder, if there is one, and by this metric.

    Losses (``validation.``) are better lower, what benchmarks give (``eval.``) higher.
    """
    if not math.isfinite(value):
        return False
    if not (folder / COMPLETE).is_file() or damage(folder) is not None:
        return True
    kept = read_manifest(folder)
    if kept.get(METRIC) != metric:
        return True
    return bool(value > kept[VALUE] if metric.startswith("eval.") else value < kept[VALUE])
