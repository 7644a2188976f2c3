"""Recorders of self-attention relations: queries, keys and values of one layer among themselves, in student and teacher."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from cdistill.errors import InputError
from cdistill.ops import attention_relation
from cdistill.ops._contract import HEAD_DIMS
from cdistill.vat.recorders import AnyRegions, _key_mask, _sequence, _sequences, require_all
from cdistill.vat.regions import PackedRegions, require_same_counts


def relation_heads(student: int, teacher: int, most: int) -> int:
    """Into how many heads vectors of both widths are split, as many as can be but not more than ``most`` (MiniLMv2).

    Raises ValueError if no number gives both widths that the op takes.
    """
    for heads in range(most, 0, -1):
        if all(width % heads == 0 and width // heads in HEAD_DIMS for width in (student, teacher)):
            return heads
    raise InputError(
        f"relation: vectors of {student} (student) and {teacher} (teacher) numbers of a layer cannot be split into equally "
        "many heads of 16 to 256, multiples of 8: leave the term out"
    )


def _split(x: Tensor, heads: int) -> Tensor:
    """(B,H,T,D) as (B,heads,T,H * D / heads): a token's heads side by side, split anew."""
    return x.transpose(1, 2).flatten(2).unflatten(2, (heads, -1)).transpose(1, 2)


class TeacherRelations:
    """Teacher side: keeps queries, keys and values of one layer; of a layer recorded twice the first.

    ``regions`` are the tokens that are related, as rows and columns; ``key_mask`` as for `TeacherTargets`.
    """

    def __init__(self, layer: int, regions: AnyRegions, *, key_mask: Tensor | None):
        self.layers = frozenset((layer,))
        self.key_mask, self.sequence, self.regions = _key_mask(key_mask, regions), _sequence(regions), regions
        self._recorded: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def record(self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None, causal: bool) -> None:
        """Keep them."""
        self._recorded.setdefault(layer, (q.detach(), k.detach(), v.detach()))

    @property
    def states(self) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B,Hq,T,D), keys and values (B,Hkv,T,D); raises ValueError if no forward pass has recorded the layer."""
        require_all(self.layers, self._recorded)
        return next(iter(self._recorded.values()))


class StudentRelations:
    """Student side: the loss of every sample, made inside the layer's forward pass, (B,) or of packed samples (N,).

    The relation of queries is softmax(Q Q^T / sqrt(D)) in each head, over the tokens that causality and padding let a row see;
    likewise of keys and of values. The loss is the sum over the three of KL(teacher || student), mean over rows and heads.
    The vectors are those of the layer's attention: queries and keys with their positions encoded. No (T, T) matrix is stored.
    """

    def __init__(self, layer: int, regions: AnyRegions, teacher: TeacherRelations, *, key_mask: Tensor | None):
        self.layers = frozenset((layer,))
        self.key_mask, self.sequence = _key_mask(key_mask, regions), _sequence(regions)
        if teacher.regions is not regions:
            require_same_counts(teacher.regions, regions)
        self._regions, self._teacher, self._needs_grad = regions, teacher, torch.is_grad_enabled()
        self._losses: dict[int, Tensor] = {}

    def record(self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None, causal: bool) -> None:
        """Compute the losses; the first recording stays."""
        if self._needs_grad and not torch.is_grad_enabled():
            raise InputError(
                f"the relations of layer {layer} would lose their gradient: set gradient_checkpointing_kwargs="
                "{'use_reentrant': False} (in a recipe, gradient_checkpointing must not be reentrant)"
            )
        of_teacher = self._teacher.states
        total: Any = 0.0
        for ours, theirs in zip((q, k, v), of_teacher, strict=True):
            widths = [x.shape[1] * x.shape[3] for x in (ours, theirs)]
            heads = relation_heads(widths[0], widths[1], theirs.shape[1])
            total = total + self._compared(_split(ours, heads), _split(theirs, heads).to(ours.device))
        self._losses.setdefault(layer, total)

    def _compared(self, ours: Tensor, theirs: Tensor) -> Tensor:
        options: dict[str, Any] = {"loss": "kl", "heads": "each", "key_mask": self.key_mask}
        options |= {"student_relation": "qq", "teacher_relation": "qq"}  # of what is given in the place of queries
        found = []
        for x, y, samples in self._parts(ours, theirs):
            rows = self._regions.rows[samples]
            found.append(attention_relation(x, None, y, None, rows, rows, **options))
        return torch.cat(found)

    def _parts(self, ours: Tensor, theirs: Tensor) -> Iterator[tuple[Tensor, Tensor, slice]]:
        if not isinstance(self._regions, PackedRegions):
            yield ours, theirs, slice(None)
            return
        for (x, y), sample in _sequences(self._regions, ours, theirs):
            if sample is not None:
                yield x, y, sample

    def losses(self) -> Tensor:
        """(B,) or (N,) fp32, with gradient; raises ValueError if no forward pass has recorded the layer."""
        require_all(self.layers, self._losses)
        return next(iter(self._losses.values()))
