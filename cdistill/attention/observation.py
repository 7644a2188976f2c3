"""What student and teacher look at in the rows that predict the answer: one slice of a layer at a time, compared at once.

A slice holds the R rows that predict answer tokens and all T keys, (B, H, R, T), of which the visual tokens and the text are
two sets of columns. No attention matrix (T, T) is made, and of a student no slice outlives its layer.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cdistill.attention.models import Models, Reading, heads_of
from cdistill.data.samples import BadSampleError
from cdistill.eval.inference import Inference
from cdistill.ops import attention_slice
from cdistill.vat import Regions, attention_layers, installed
from cdistill.vat.hook import KEYWORD
from cdistill.vat.recorders import require_all

TINY = 1e-30


class SliceReader:
    """Hands each layer's slice to a function and keeps nothing.

    Args:
        layers: 0-based indices.
        regions: rows and columns.
        key_mask: (B, T), non-zero = real.
        read: called with a layer and its slice (B, Hq, R, V) fp32.
    """

    def __init__(
        self, layers: Collection[int], regions: Regions, key_mask: Tensor, read: Callable[[int, Tensor], None]
    ) -> None:
        self.layers = frozenset(layers)
        self.key_mask: Tensor | None = key_mask.bool()
        self.recorded: set[int] = set()
        self._regions, self._read = regions, read

    @torch.no_grad()
    def record(self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None, causal: bool) -> None:
        """Make one layer's slice and hand it on."""
        rows, cols = self._regions
        made = attention_slice(q, k, rows, cols, causal=causal, scale=scale, key_mask=self.key_mask, heads="each")
        self._read(layer, made)
        self.recorded.add(layer)

    def require_all(self) -> None:
        """Raise ValueError naming the layers that no forward pass has shown."""
        require_all(self.layers, self.recorded)


@dataclass(frozen=True)
class Places:
    """Where things are in a batch: rows (B, R) int32, -1 = padding; the others bool, rows_real (B, R), of the keys (B, T)."""

    rows: Tensor
    rows_real: Tensor
    visual: Tensor
    text: Tensor

    def to(self, device: torch.device) -> Places:
        """The same on a device."""
        return Places(*(x.to(device) for x in vars(self).values()))


def places(readings: Sequence[Reading], visual_ids: Tensor) -> Places:
    """Rows that predict an answer's token, after the first visual token, and the two kinds of columns.

    Raises BadSampleError for a reading without such a row.
    """
    longest = max(len(reading.tokens) for reading in readings)
    visual = torch.zeros(len(readings), longest, dtype=torch.bool)
    real = torch.zeros_like(visual)
    chosen = []
    for i, reading in enumerate(readings):
        ids = torch.tensor(reading.tokens)
        visual[i, : len(ids)], real[i, : len(ids)] = torch.isin(ids, visual_ids), True
        chosen.append(answer_rows(reading, visual_ids))
    width = max(map(len, chosen))
    rows = torch.tensor([of + [-1] * (width - len(of)) for of in chosen], dtype=torch.int32)
    return Places(rows, rows >= 0, visual, real & ~visual)


def answer_rows(reading: Reading, visual_ids: Tensor) -> list[int]:
    """Positions that predict an answer's token and see a visual one."""
    seen = torch.isin(torch.tensor(reading.tokens), visual_ids).nonzero()
    first = int(seen[0]) if len(seen) else len(reading.tokens)
    rows = [place - 1 for place in reading.answers if place > first]
    if not rows:
        raise BadSampleError("no image before an answer", "no token of an answer follows a visual token")
    return rows


def with_head_mean(each: Tensor) -> Tensor:
    """(B, H, R, T) as (B, 1 + H, R, T), the mean over heads first."""
    return torch.cat((each.mean(1, keepdim=True), each), 1)


def mean_over_rows(values: Tensor, real: Tensor) -> Tensor:
    """(B, C, R) as (B, C)."""
    weights = real[:, None].to(values.dtype)
    return (values * weights).sum(-1) / weights.sum(-1)


def similarity(a: Tensor, b: Tensor, columns: Tensor) -> Tensor:
    """Cosine (B, C, R) of slices (B, C, R, T) over some columns (B, T)."""
    kept = columns[:, None, None]
    a, b = a * kept, b * kept
    norms = (a.square().sum(-1) * b.square().sum(-1)).sqrt()
    return (a * b).sum(-1) / norms.clamp(min=TINY)


def looks(of: Tensor, at: Places) -> dict[str, Tensor]:
    """Share of attention on the visual tokens, and entropy in nats of how that is spread over them, each (B, C)."""
    visual = of * at.visual[:, None, None]
    mass = visual.sum(-1)
    spread = visual / mass.clamp(min=TINY)[..., None]
    entropy = -torch.special.xlogy(spread, spread).sum(-1)
    return {"mass": mean_over_rows(mass, at.rows_real), "entropy": mean_over_rows(entropy, at.rows_real)}


class Seen:
    """What is gathered of one model in one batch: by quantity and layer (B, C), C the head mean and the heads, if any."""

    def __init__(self) -> None:
        self.values: dict[str, dict[int, Tensor]] = {}
        self.rows: dict[str, Tensor] = {}  # (B, R)

    def add(self, layer: int, values: Mapping[str, Tensor]) -> None:
        """Note a layer's values."""
        for name, value in values.items():
            self.values.setdefault(name, {})[layer] = value.cpu()

    def samples(self, places: Places) -> list[dict[str, np.ndarray]]:
        """By sample: each quantity (L, C), rows' quantities (R,) without padding."""
        stacked = {name: torch.stack([of[i] for i in sorted(of)], 1).numpy() for name, of in self.values.items()}
        result = []
        for b, real in enumerate(places.rows_real.cpu()):
            of = {name: values[b].astype(np.float64) for name, values in stacked.items()}
            result.append(of | {name: values[b][real].double().numpy() for name, values in self.rows.items()})
        return result


@torch.no_grad()
def observe(models: Models, readings: Sequence[Reading], *, probabilities: bool = False) -> list[list[dict[str, Any]]]:
    """Run teacher and students on a batch; by model, the teacher first, what `Seen.samples` gives.

    Of all models ``mass`` and ``entropy`` (L, C), see `looks`. Of students ``visual`` and ``text`` (L, C), cosine to the
    teacher's layer at the same depth; ``visual_understanding`` and ``text_understanding`` (n, 1), cosine of head means in the
    layers of the middle to the mean over their windows; ``row_similarity`` (R,), the former of each row, mean over those
    layers. With ``probabilities`` of all models ``probability`` (R,) of the right token at each row.
    """
    at = places(readings, models.visual_ids)
    rows = [reading.tokens for reading in readings]
    kept = torch.tensor(sorted(set(at.rows[at.rows_real].tolist()))) if probabilities else None
    with ExitStack() as stack:
        for inference in (models.teacher, *models.students):
            stack.enter_context(installed(inference.model))
        each = any(heads_of(models.teacher.model) == heads_of(student.model) for student in models.students)
        slices: dict[int, Tensor] = {}
        seen = [Seen() for _ in (models.teacher, *models.students)]

        def of_teacher(layer: int, made: Tensor) -> None:
            of = with_head_mean(made)
            seen[0].add(layer, looks(of, at.to(of.device)))
            slices[layer] = of if each else of[:, :1]

        layers = attention_layers(models.teacher.model)
        logits = run(models.teacher, readings, rows, at, layers, of_teacher, kept)
        _note_probability(seen[0], logits, kept, readings, at)
        for i, student in enumerate(models.students):
            read = Comparison(models, i, slices, seen[i + 1], at)
            as_seen = [reading.for_student(i) for reading in readings]
            logits = run(student, as_seen, rows, at, attention_layers(student.model), read, kept)
            seen[i + 1].rows["row_similarity"] = read.row_similarity()
            _note_probability(seen[i + 1], logits, kept, readings, at)
    return [each.samples(at) for each in seen]


def run(
    inference: Inference,
    readings: Sequence[Reading],
    rows: list[list[int]],
    at: Places,
    layers: Collection[int],
    read: Callable[[int, Tensor], None],
    kept: Tensor | None = None,
) -> Tensor:
    """One forward pass whose slices, rows by all keys, go to ``read``; logits (B, K, V) of the positions ``kept``."""
    inputs = inference.inputs(list(readings), rows)
    mask = inputs["attention_mask"]
    cols = torch.arange(mask.shape[1], dtype=torch.int32, device=mask.device).where(mask.bool(), -1)
    recorder = SliceReader(layers, Regions(at.rows.to(mask.device), cols), mask, read)
    last = torch.tensor([mask.shape[1] - 1])
    logits = inference.logits(inputs | {"use_cache": False, KEYWORD: recorder}, last if kept is None else kept)
    recorder.require_all()
    return logits


class Comparison:
    """Compares a student's slices with the teacher's, which were made before."""

    def __init__(self, models: Models, student: int, slices: Mapping[int, Tensor], seen: Seen, at: Places) -> None:
        self._slices, self._seen, self._at = slices, seen, at
        alignment = models.alignments[student]
        self._depth = {match.student: match.teachers[0] for match in alignment.depth}
        self._windows = {match.student: match.teachers for match in alignment.understanding}
        self._each = heads_of(models.teacher.model) == heads_of(models.students[student].model)
        self._rows: list[Tensor] = []

    def __call__(self, layer: int, made: Tensor) -> None:
        """Note what one layer's slice (B, H, R, T) says."""
        of, at = with_head_mean(made), self._at.to(made.device)
        theirs = self._slices[self._depth[layer]].to(made.device)
        ours = of if self._each else of[:, :1]
        theirs = theirs if self._each else theirs[:, :1]
        values = looks(of, at)
        for name, columns in (("visual", at.visual), ("text", at.text)):
            values[name] = mean_over_rows(similarity(ours, theirs, columns), at.rows_real)
        self._seen.add(layer, values)
        if layer not in self._windows:
            return
        windows = [self._slices[i][:, :1].to(made.device) for i in self._windows[layer]]
        target = torch.stack(windows).mean(0)
        by_row = {
            f"{name}_understanding": similarity(of[:, :1], target, columns)
            for name, columns in (("visual", at.visual), ("text", at.text))
        }
        self._rows.append(by_row["visual_understanding"][:, 0].cpu())
        self._seen.add(layer, {name: mean_over_rows(value, at.rows_real) for name, value in by_row.items()})

    def row_similarity(self) -> Tensor:
        """(B, R): mean over the layers of the middle."""
        return torch.stack(self._rows).mean(0)


def _note_probability(seen: Seen, logits: Tensor, kept: Tensor | None, readings: Sequence[Reading], at: Places) -> None:
    if kept is None:
        return
    found = torch.zeros(at.rows.shape)
    for b, reading in enumerate(readings):
        rows = at.rows[b][at.rows_real[b]].long()
        wide = logits[b][torch.searchsorted(kept, rows).to(logits.device)]
        chances = F.softmax(wide if wide.dtype == torch.float64 else wide.float(), -1)
        said = torch.tensor(reading.tokens)[rows + 1].to(chances.device)
        found[b, : len(rows)] = chances.gather(1, said[:, None])[:, 0].float().cpu()
    seen.rows["probability"] = found


def equal_parts(readings: Sequence[Reading]) -> list[list[int]]:
    """Places of readings of one length together."""
    order = sorted(range(len(readings)), key=lambda i: len(readings[i].tokens))
    return [list(group) for _, group in groupby(order, key=lambda i: len(readings[i].tokens))]
