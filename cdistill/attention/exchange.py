"""A student that answers with the average of its own and its teacher's attention to the image (paper figure 4).

In the rows that predict the answer's tokens, and in chosen layers and heads, the student's attention a over the visual tokens
becomes a' = (1 - share) a + share t, with t the teacher's. The rest of the row stays as it is, and the whole row is divided by
its new sum 1 + sum(a' - a), so that it sums to one again. Of the layer's output o in that row this makes

    o' = (o + (a' - a) v) / (1 + sum(a' - a))

with v the values of the visual tokens: slices (R, V) suffice. The teacher reads the same tokens in a pass of its own, and while
the student writes, token by token ahead of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cdistill.attention.models import Models, heads_of, matches_of
from cdistill.attention.observation import TINY, SliceReader, places
from cdistill.data.conversations import TOKEN_TYPES
from cdistill.errors import InputError
from cdistill.eval.inference import Inference
from cdistill.eval.prompts import Prompt
from cdistill.ops import attention_slice
from cdistill.vat import GenerationRecorder, LayerMatch, Regions, installed
from cdistill.vat.hook import KEYWORD
from cdistill.vat.recorders import RowChanges

MEAN, EACH = "mean", "each"
# What `generate` hands a model at every step that is the same for another one; its own past and its own look at images are not.
STEP = ("input_ids", "attention_mask", "position_ids", "cache_position", "logits_to_keep", *TOKEN_TYPES)


@dataclass(frozen=True)
class Exchange:
    """What is exchanged.

    Attributes:
        matches: student layers, and the teacher layers whose mean they get.
        share: of the teacher's attention, 0..1.
        heads: the student's heads that are changed; None for all.
        each: every head gets that of the teacher's head of the same number; else all get the mean over the teacher's.
    """

    matches: tuple[LayerMatch, ...]
    share: float
    heads: tuple[int, ...] | None = None
    each: bool = False


def exchange(models: Models, student: int, *, span: Any, share: float, heads: str) -> Exchange:
    """The exchange that options ask for.

    Args:
        span: student layers, as `layer_range` has them.
        heads: ``mean``, ``each``, or numbers of the student's heads with commas.

    Raises:
        ValueError: share, layers or heads that are none.
    """
    ours, theirs = models.students[student].model, models.teacher.model
    if not 0 < share <= 1:
        raise InputError(f"--share must be above 0 and at most 1, got {share:g}")
    try:
        matches, _ = matches_of(span, ours, theirs)
    except ValueError as error:
        raise InputError(f"--layers {span}: {models.names[student]}: {error}") from None
    if heads == EACH and heads_of(ours) != heads_of(theirs):
        raise InputError(
            f"--heads each needs equally many heads, and {models.names[student]} has {heads_of(ours)} for the teacher's "
            f"{heads_of(theirs)}; use mean"
        )
    if heads in (MEAN, EACH):
        return Exchange(matches, share, None, heads == EACH)
    chosen = [part.strip() for part in heads.split(",")]
    if not all(part.isdecimal() and int(part) < heads_of(ours) for part in chosen):
        raise InputError(
            f"--heads must be mean, each, or heads of 0 to {heads_of(ours) - 1} of {models.names[student]} with commas, got "
            f"{heads!r}"
        )
    return Exchange(matches, share, tuple(sorted({int(part) for part in chosen})))


def changes(
    own: Tensor, theirs: Tensor, values: Tensor, share: float, heads: Sequence[int] | None
) -> tuple[Tensor, Tensor]:
    """What to add to a layer's output, and what to multiply the sum with.

    Args:
        own: the student's slices (B, Hq, R, V).
        theirs: the teacher's, (B, 1, R, V) or (B, Hq, R, V).
        values: of the visual tokens (B, Hkv, V, D).
        heads: those to change; None for all.

    Returns:
        (B, Hq, R, D) and (B, Hq, R), fp32.
    """
    moved = share * (theirs - own)
    if heads is not None:
        chosen = torch.zeros(own.shape[1], 1, 1, device=own.device)
        chosen[list(heads)] = 1
        moved = moved * chosen
    grouped = moved.unflatten(1, (values.shape[1], -1))  # query heads of one key head are neighbours
    added = torch.einsum("bkgrv,bkvd->bkgrd", grouped, values.to(moved.dtype)).flatten(1, 2)
    return added, 1 / (1 + moved.sum(-1)).clamp(min=TINY)


def values_at(v: Tensor, cols: Tensor) -> Tensor:
    """(B, Hkv, V, D) of the values (B, Hkv, T, D) at columns (B, V), zero where these are padding."""
    real = (cols >= 0)[:, None, :, None]
    index = cols.clamp(min=0).long()[:, None, :, None].expand(-1, v.shape[1], -1, v.shape[3])
    return v.gather(2, index) * real


class RowsExchanged:
    """Recorder of a student that reads given answers: changes the rows of `Regions`.

    ``targets`` are the teacher's slices by student layer.
    """

    def __init__(self, what: Exchange, regions: Regions, key_mask: Tensor, targets: Mapping[int, Tensor]) -> None:
        self.layers = frozenset(match.student for match in what.matches)
        self.key_mask: Tensor | None = key_mask.bool()
        self._what, self._regions, self._targets = what, regions, targets

    @torch.no_grad()
    def record(self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None, causal: bool) -> RowChanges:
        """The changes of one layer."""
        rows, cols = self._regions
        own = attention_slice(q, k, rows, cols, causal=causal, scale=scale, key_mask=self.key_mask, heads="each")
        theirs = self._targets[layer].to(own.device)
        return RowChanges(rows, *changes(own, theirs, values_at(v, cols), self._what.share, self._what.heads))


class LastRow(GenerationRecorder):
    """Of tokens that are written, the slices (B, Hq, 1, V) of the row that predicts the next one, and no earlier ones."""

    def record(self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None, causal: bool) -> Any:
        """Keep one layer's slice in the place of the one before."""
        self._slices[layer].clear()
        super().record(layer, q[:, :, -1:], k, v, scale=scale, causal=causal)

    @property
    def latest(self) -> Mapping[int, Tensor]:
        """By layer."""
        return self.slices


class LastRowExchanged(LastRow):
    """Recorder of a student that writes: changes the row that predicts the next token.

    ``target`` gives the teacher's slice of a student layer, at every step.
    """

    def __init__(self, what: Exchange, cols: Tensor, key_mask: Tensor, target: Callable[[int], Tensor]) -> None:
        layers = [match.student for match in what.matches]
        super().__init__(layers, cols, prompt=key_mask.shape[1], key_mask=key_mask, heads="each")
        self._what, self._target = what, target

    @torch.no_grad()
    def record(self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None, causal: bool) -> Any:
        """The `RowChanges` of one layer."""
        super().record(layer, q, k, v, scale=scale, causal=causal)
        (own,) = self._slices[layer]
        theirs = self._target(layer).to(own.device)
        values = values_at(v[:, :, : k.shape[2]], self._cols)
        rows = torch.full((len(q), 1), q.shape[2] - 1, dtype=torch.int32, device=q.device)
        return RowChanges(rows, *changes(own, theirs, values, self._what.share, self._what.heads))


class AsStudent(Inference):
    """A student that answers what the teacher was made a `Reading` of."""

    def __init__(self, models: Models, student: int) -> None:
        own = models.students[student]
        super().__init__(own.model, own.prompts, "equal" if models.equal_lengths else own.way)
        self._student = student

    def inputs(self, prompts: list[Any], rows: list[list[int]], *, left: bool = False) -> dict[str, Tensor]:
        """Token rows with the images as the student sees them."""
        return super().inputs([reading.for_student(self._student) for reading in prompts], rows, left=left)


class Exchanged(AsStudent):
    """The same student with the teacher's attention exchanged for a part of its own; both models must be installed."""

    def __init__(self, models: Models, student: int, what: Exchange) -> None:
        super().__init__(models, student)
        self._models, self._what = models, what
        self._windows = {match.student: match.teachers for match in what.matches}
        self._layers = sorted({layer for window in self._windows.values() for layer in window})

    def _target(self, layer: int, slices: Mapping[int, Tensor]) -> Tensor:
        """Of a student layer the mean over its teacher layers, (B, Hq, R, V), or over heads, too, (B, 1, R, V)."""
        mean = torch.stack([slices[i] for i in self._windows[layer]]).mean(0)
        return mean if self._what.each else mean.mean(1, keepdim=True)

    def answer_logits(self, prompts: Sequence[Prompt], inputs: Mapping[str, Any], kept: Tensor) -> Tensor:
        """Logits of answers whose rows are changed."""
        readings: list[Any] = list(prompts)
        at = places(readings, self._models.visual_ids)
        cols = columns(at.visual)
        rows = [reading.tokens for reading in readings]
        teacher, slices = self._models.teacher, dict[int, Tensor]()
        shown = teacher.inputs(readings, rows)
        mask = shown["attention_mask"]
        regions = Regions(at.rows.to(mask.device), cols.to(mask.device))
        recorder = SliceReader(self._layers, regions, mask, slices.__setitem__)
        teacher.logits(shown | {"use_cache": False, KEYWORD: recorder}, torch.tensor([mask.shape[1] - 1]))
        recorder.require_all()
        mask = inputs["attention_mask"]
        regions = Regions(at.rows.to(mask.device), cols.to(mask.device))
        targets = {layer: self._target(layer, slices) for layer in self._windows}
        changed = RowsExchanged(self._what, regions, mask, targets)
        return self.logits({**inputs, KEYWORD: changed}, kept)

    def write(self, prompts: Sequence[Prompt], inputs: Mapping[str, Any], config: Any) -> Any:
        """Replies whose rows are changed, the teacher one step ahead."""
        readings: list[Any] = list(prompts)
        teacher = self._models.teacher
        shown_first = teacher.inputs(readings, [reading.ids for reading in readings], left=True)
        images = {name: value for name, value in shown_first.items() if name not in STEP}
        mask = inputs["attention_mask"]
        cols = columns(torch.isin(inputs["input_ids"].cpu(), self._models.visual_ids)).to(mask.device)
        there = {"cols": cols.to(teacher.device), "prompt": mask.shape[1], "key_mask": mask.to(teacher.device)}
        seen = LastRow(self._layers, heads="each", **there)
        past: dict[str, Any] = {}

        def step_ahead(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            shown = {name: value for name, value in kwargs.items() if name in STEP}
            shown = {name: x.to(teacher.device) if isinstance(x, Tensor) else x for name, x in shown.items()}
            shown |= {} if past else images
            shown |= {teacher.cache_name: past.get("cache"), "use_cache": True, KEYWORD: seen}
            past["cache"] = getattr(teacher.model(*args, **shown), teacher.cache_name)

        recorder = LastRowExchanged(self._what, cols, mask, lambda layer: self._target(layer, seen.latest))
        handle = self.model.register_forward_pre_hook(step_ahead, with_kwargs=True, prepend=True)
        try:
            return self.model.generate(**inputs, generation_config=config, **{KEYWORD: recorder})
        finally:
            handle.remove()


def columns(chosen: Tensor) -> Tensor:
    """Positions of chosen tokens (B, T) as columns (B, V) int32, increasing, -1 = padding at the end."""
    width = int(chosen.sum(1).max())
    order = torch.argsort((~chosen).int(), dim=1, stable=True)[:, :width]
    return torch.where(chosen.gather(1, order), order, -1).int()


def both_installed(models: Models) -> ExitStack:
    """Recorders see all models, for a ``with`` block."""
    stack = ExitStack()
    for inference in (models.teacher, *models.students):
        stack.enter_context(installed(inference.model))
    return stack
