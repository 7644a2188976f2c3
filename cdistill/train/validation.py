"""A stage's losses on samples that it is not trained on, and the best student so far.

Measuring changes nothing of the training: no gradient is made, no random number drawn, no sample taken from the training's
order, so that a run with it has the bits of one without, and one that is resumed those of one that was not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import TrainerCallback, TrainingArguments

from cdistill.data.dataset import BAD
from cdistill.data.samples import IGNORE_INDEX
from cdistill.runtime import checkpoints

METRIC, VALUE = "metric", "best"  # keys of a folder's manifest


class Validation(TrainerCallback):
    """Measures the losses of a stage on held-out samples as it goes, in all processes together.

    Args:
        trainer: the `DistillTrainer`.
        data: the held-out samples, and ``collate`` what makes batches of them.
        every: steps between two measurements; there is one after the last step, too.
        batch: samples that a process looks at together.
        report: given the step and the means by their names, on the first process.
        keep: given the step and the means in all processes, to keep the student if it is the best so far.
    """

    def __init__(
        self,
        trainer: Any,
        data: Dataset,
        collate: Any,
        *,
        every: int,
        batch: int,
        report: Callable[[int, dict[str, float]], None],
        keep: Callable[[int, dict[str, float]], None] | None,
    ) -> None:
        self.trainer, self.data, self.collate, self.every, self.batch = trainer, data, collate, every, batch
        self.report, self.keep = report, keep

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure, if it is time."""
        step = state.global_step
        if step % self.every and step != state.max_steps:
            return
        means = self.measure()
        if state.is_world_process_zero:
            self.report(step, means)
        if self.keep is not None:
            self.keep(step, means)

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        """Means over the held-out labels or samples of the losses by their names, and of their weighted sum as ``loss``."""
        trainer, terms = self.trainer, self.trainer.distillation.terms
        model, device = trainer.model_wrapped, trainer.args.device
        names = [term.name for term in terms]
        sums = torch.zeros(len(names) + 2, dtype=torch.float64, device=device)  # of labels and samples, too
        model.eval()
        try:
            with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
                for batch, counts in self._batches():
                    inputs = trainer._prepare_inputs(batch)
                    with trainer.compute_loss_context_manager():
                        losses = model(**inputs)
                    labels = (inputs["labels"] != IGNORE_INDEX).sum()
                    found = [*(losses[name] for name in names), labels, losses.get("samples", len(inputs["labels"]))]
                    if counts:
                        sums += torch.stack([torch.as_tensor(x, dtype=torch.float64, device=device) for x in found])
        finally:
            model.train()
        if trainer.args.world_size > 1:
            sums = trainer.accelerator.reduce(sums, "sum")
        return _means(terms, sums)

    def _batches(self) -> Iterator[tuple[dict[str, Any], bool]]:
        """This process's batches, and whether they count: each process looks at equally many, as partitioned models need."""
        args, size = self.trainer.args, len(self.data)  # type: ignore[arg-type]
        whole = [list(range(start, min(start + self.batch, size))) for start in range(0, size, self.batch)]
        mine, most = whole[args.process_index :: args.world_size], -(-len(whole) // args.world_size)
        counts = [True] * len(mine) + [False] * (most - len(mine))
        mine += [whole[0]] * (most - len(mine))
        generator = torch.Generator().manual_seed(0)  # else the loader draws a seed from the training's
        for batch, counted in zip(
            DataLoader(self.data, batch_sampler=mine, collate_fn=self.collate, generator=generator), counts, strict=True
        ):
            batch.pop(BAD, None)
            yield batch, counted


def _means(terms: Any, sums: Tensor) -> dict[str, float]:
    *losses, labels, samples = sums.tolist()
    means = {}
    total = 0.0
    for term, value in zip(terms, losses, strict=True):
        mean = value / max(labels if term.per == "label" else samples, 1.0)
        means[term.name] = mean
        total += term.weight * mean
    return {"loss": total, **means}


def is_best(folder: Path, metric: str, value: float) -> bool:
    """Whether a value of a metric is lower than that of the student in a folder, if there is one, and by this metric."""
    if not math.isfinite(value):
        return False
    if not (folder / checkpoints.COMPLETE).is_file() or checkpoints.damage(folder) is not None:
        return True
    kept = checkpoints.read_manifest(folder)
    return kept.get(METRIC) != metric or value < kept[VALUE]
