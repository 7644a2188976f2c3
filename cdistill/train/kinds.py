"""How much a sample learns of each of several teachers: by its kind, as recipes say it under ``teachers``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from cdistill.errors import InputError

WEIGHTS = "kind_weights"  # key of a batch: (B, teachers) fp32
DEFAULT = "default"  # the kind of all that are not named

Table = Mapping[str, tuple[float, ...]]  # weights of all teachers, by kind


@dataclass(frozen=True)
class WeighingCollator:
    """Adds `WEIGHTS` to batches whose items have a ``kind``.

    Args:
        collate: makes a batch of them.
        table: weights of all teachers for every kind.
    """

    collate: Callable[[Sequence[Any]], dict[str, Any]]
    table: Table

    def __call__(self, items: Sequence[Any]) -> dict[str, Any]:
        alone = [item[0] if isinstance(item, tuple) else item for item in items]
        kinds = [item["kind"] if isinstance(item, dict) else item.kind for item in alone]
        return self.collate(items) | {WEIGHTS: torch.tensor([self.table[kind] for kind in kinds])}


def weights_of_kinds(teachers: Mapping[str, Mapping[str, float]], kinds: Sequence[str], where: str) -> Table:
    """Weights of all teachers for each kind of a stage's samples.

    Args:
        teachers: weights by kind, by the names of the teachers.
        kinds: of the samples; one that two sources have stands there twice.
        where: key of the recipe that says what the samples are.

    Raises:
        ValueError: a kind without a weight of a teacher, or with no teacher at all, or a name of two sources.
    """
    table = {}
    for kind, count in Counter(kinds).items():
        for name, weights in teachers.items():
            if kind not in weights and DEFAULT not in weights:
                raise InputError(
                    f"teachers.{name}.weights has no weight for kind {kind!r} of {where}: name it, or default"
                )
            if kind in weights and count > 1:
                raise InputError(
                    f"teachers.{name}.weights names {kind!r}, and {count} sources of {where} are called so: give them names of "
                    "their own (name in the mix)"
                )
        found = tuple(float(weights.get(kind, weights.get(DEFAULT, 0.0))) for weights in teachers.values())
        if not any(found):
            raise InputError(
                f"teachers: none has a weight above 0 for kind {kind!r} of {where}: samples of it would learn of nobody"
            )
        table[kind] = found
    return table


def require_known_kinds(teachers: Mapping[str, Mapping[str, float]], kinds: Sequence[str]) -> None:
    """Raise ValueError for weights of a kind that no sample of a recipe has, and for a teacher of nobody.

    ``kinds`` are those of the stages that distil, none without such stages.
    """
    for name, weights in teachers.items():
        for kind in weights if kinds else ():
            if kind != DEFAULT and kind not in kinds:
                raise InputError(
                    f"teachers.{name}.weights names kind {kind!r}, and samples of stages that distil are of "
                    f"{', '.join(dict.fromkeys(kinds))}"
                )
        if kinds and not any(weights.get(kind, weights.get(DEFAULT, 0.0)) for kind in kinds):
            raise InputError(
                f"teachers.{name}.weights must be above 0 for a kind of the samples ({', '.join(dict.fromkeys(kinds))}): this "
                "teacher would teach nothing"
            )


def products(teachers: Mapping[str, Mapping[str, float]]) -> int:
    """In how many parts the labels of a batch go through the student's head at most, as `WeightedLosses` divides them."""
    kinds = dict.fromkeys([DEFAULT, *(kind for weights in teachers.values() for kind in weights)])
    left, count = set(kinds), 0
    for weights in teachers.values():
        of = {kind: weights.get(kind, weights.get(DEFAULT, 0.0)) for kind in kinds}
        together = {kind for kind in left if of[kind] == 1}
        count += bool(together) + any(of[kind] > 0 for kind in of.keys() - together)
        left -= together
    return count + bool(left) if teachers else 1
