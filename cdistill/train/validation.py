"""A stage's losses on samples that it is not trained on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from cdistill.data.dataset import BAD
from cdistill.data.samples import IGNORE_INDEX


class Validation:
    """Measures the losses of a stage on held-out samples.

    Args:
        trainer: the `DistillTrainer`.
        data: the held-out samples, and ``collate`` what makes batches of them.
        batch: samples that a process looks at together.
    """

    def __init__(self, trainer: Any, data: Dataset, collate: Any, *, batch: int) -> None:
        self.trainer, self.data, self.collate, self.batch = trainer, data, collate, batch

    def __call__(self) -> dict[str, float]:
        """Means over the held-out labels or samples of the losses by their names, and of their weighted sum as ``loss``."""
        trainer, terms = self.trainer, self.trainer.distillation.terms
        model, device = trainer.model_wrapped, trainer.args.device
        names = [term.name for term in terms]
        sums = torch.zeros(len(names) + 2, dtype=torch.float64, device=device)  # of labels and samples, too
        for batch, counts in self._batches():
            inputs = trainer._prepare_inputs(batch)
            losses = model(**inputs)
            labels = (inputs["labels"] != IGNORE_INDEX).sum()
            found = [*(losses[name] for name in names), labels, losses.get("samples", len(inputs["labels"]))]
            if counts:
                sums += torch.stack([torch.as_tensor(x, dtype=torch.float64, device=device) for x in found])
        if trainer.args.world_size > 1:
            sums = trainer.accelerator.reduce(sums, "sum")
            sums[-2:] /= trainer.sharers  # of a sequence that several processes share each has a part of the losses
        return _means(terms, sums)

    def _batches(self) -> Iterator[tuple[dict[str, Any], bool]]:
        """This process's batches, and whether they count: each process looks at equally many, as partitioned models need."""
        args, sharers, size = self.trainer.args, self.trainer.sharers, len(self.data)  # type: ignore[arg-type]
        rank, world = args.process_index // sharers, args.world_size // sharers
        whole = [list(range(start, min(start + self.batch, size))) for start in range(0, size, self.batch)]
        mine, most = whole[rank::world], -(-len(whole) // world)
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
