"""How hard the terms of a loss pull at the student: norms of their gradients, and the weight that balances alignment."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cdistill.data.dataset import BAD
from cdistill.data.samples import IGNORE_INDEX
from cdistill.errors import InputError
from cdistill.models.load import DTYPES
from cdistill.runtime.collectives import on_first_process
from cdistill.runtime.errors import RunError
from cdistill.train.model import DistillationModel
from cdistill.train.terms.alignment import Alignment

Batches = Iterable[Mapping[str, Any]]


def gradient_norms(
    model: DistillationModel, weights: Mapping[str, float], batches: Batches, *, precision: str = "fp32", seed: int = 0
) -> dict[str, float]:
    """L2 norms of the gradient of a weighted sum of terms, by name of a trained parameter.

    Terms count as in training: means over all labels, or all samples, of ``batches`` together, so that the sizes of the
    batches do not matter. No gradient and no state of random numbers is left behind. Processes that share sequences must all
    call it, with the same batches.

    Args:
        model: the losses of a stage.
        weights: of terms, by their names; those that are not named do not count.
        batches: as the stage's collator makes them; gone through twice.
        precision: bf16 runs the models under autocast, as training does.
        seed: of dropout.

    Raises:
        ValueError: a name that no term of the model has, or no batches.
    """
    terms = {term.name: term for term in model.terms}
    for name in weights:
        if name not in terms:
            raise InputError(f"weights must name terms of the loss ({', '.join(terms)}), got {name!r}")
    device = model.student.device
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    model.train()
    model.zero_grad(set_to_none=True)
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):  # a DataLoader, too, draws a number when it begins
        counts = _counted(model, batches)
        torch.manual_seed(seed)
        for batch in batches:
            given = {name: value.to(device) for name, value in batch.items() if name != BAD}
            with torch.autocast(device.type, DTYPES["bf16"], enabled=precision == "bf16"):
                losses = model(**given)
            total = sum(losses[name] * (weight / counts[terms[name].per]) for name, weight in weights.items())
            if isinstance(total, Tensor) and total.requires_grad:
                total.backward()
    if model.shards is not None:
        for p in trained.values():
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            dist.all_reduce(p.grad, group=model.shards.group)
    norms = {
        name.removeprefix("student."): 0.0 if p.grad is None else float(p.grad.float().norm())
        for name, p in trained.items()
    }
    model.zero_grad(set_to_none=True)
    return norms


def balanced_weight(
    model: DistillationModel,
    batches: Batches,
    *,
    label: str,
    term: str = Alignment.name,
    key: str = "vat.weight",
    precision: str = "fp32",
    seed: int = 0,
) -> float:
    """The weight at which the gradient of the alignment, or of a baseline by its name, is as long as that of all other terms
    together (those that may be balanced so do not count); ``key`` is where a recipe says it.

    This is VQGAN's rule for its adversarial loss (Esser et al. 2021, equation 7) over all trained parameters, applied once,
    to the student that a stage begins with. All processes take the first one's.

    Raises:
        RunError: one of the two has no gradient, or one that is not finite, on these batches.
    """
    others = {t.name: t.weight for t in model.terms if not (t.baseline or isinstance(t, Alignment))}
    measured = [
        math.hypot(*gradient_norms(model, weights, batches, precision=precision, seed=seed).values())
        for weights in (others, {term: 1.0})
    ]
    rest, own = on_first_process(lambda: measured)
    if not (own > 0 and rest > 0 and math.isfinite(rest / own)):
        raise RunError(
            f"{label}: {key} auto needs gradients of both sides on the first samples, got norms {own:g} of {term} and "
            f"{rest:g} of {' + '.join(others)} (are there samples with images?): give {key} a number"
        )
    return float(rest / own)


def _counted(model: DistillationModel, batches: Batches) -> dict[str, int]:
    """What terms are divided by. Raises ValueError for no samples."""
    labels = samples = 0
    for batch in batches:
        labels += int((batch["labels"][:, 1:] != IGNORE_INDEX).sum())
        samples += int(model.count_samples(**{name: value for name, value in batch.items() if name != BAD}))
    if not samples:
        raise InputError("batches must hold at least one sample")
    return {"label": max(1, labels), "sample": samples}
