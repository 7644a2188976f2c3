"""What the benchmarks of `attention_relation` time: problem sizes, their inputs, and the ways to have its losses."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from benchmarks._measure import Implementation
from cdistill.ops import attention_relation

OURS, CHUNKED = "ours", "torch, chunked"
CHUNK = 64  # rows


@dataclass(frozen=True)
class Size:
    """One sample: an image of ``cols`` tokens near the start, the answer of ``rows`` tokens at the end."""

    name: str
    student_heads: int
    teacher_heads: int
    window: int
    rows: int
    cols: int
    tokens: int
    width: int

    def __str__(self) -> str:
        layers = f" window {self.window}" if self.window > 1 else ""
        heads = f"H{self.student_heads}/{self.teacher_heads}"
        return f"B1 {heads} R{self.rows} V{self.cols} T{self.tokens} D{self.width}{layers}"

    @property
    def multiply_adds(self) -> int:
        """Of the visible pairs that any way must multiply: one product forward, three backward, one for each layer."""
        pairs = self.rows * self.tokens - self.rows * (self.rows - 1) // 2
        return self.width * pairs * (4 * self.student_heads + self.window * self.teacher_heads)

    @property
    def least_values(self) -> int:
        """Numbers that must be moved: q of the rows and all k of both models, gradients of the student's."""
        positions = self.rows + self.tokens
        return self.width * positions * (2 * self.student_heads + self.window * self.teacher_heads)


SIZES = (
    Size("one-layer", 16, 20, 1, 256, 2880, 4096, 128),
    Size("window-of-5", 16, 20, 5, 256, 2880, 4096, 128),
    Size("long-answer", 16, 20, 1, 1024, 2880, 4096, 128),
)


class Inputs(NamedTuple):
    """Of attention_relation; both sides see what stands before them. q and k are leaves."""

    q: Tensor
    k: Tensor
    teacher_q: list[Tensor]
    teacher_k: list[Tensor]
    rows: Tensor
    cols: Tensor

    def to(self, dtype: torch.dtype) -> "Inputs":
        layers = ([x.to(dtype) for x in layers] for layers in (self.teacher_q, self.teacher_k))
        q, k = (x.detach().to(dtype).requires_grad_() for x in self[:2])
        return Inputs(q, k, *layers, self.rows, self.cols)


def draw(size: Size, dtype: torch.dtype, device: torch.device) -> Inputs:
    generator = torch.Generator(device).manual_seed(0)

    def normal(heads: int) -> Tensor:
        return torch.randn(1, heads, size.tokens, size.width, generator=generator, device=device).to(dtype)

    q, k = (normal(size.student_heads).requires_grad_() for _ in range(2))
    layers = [[normal(size.teacher_heads) for _ in range(size.window)] for _ in range(2)]
    rows = torch.arange(size.tokens - size.rows, size.tokens, device=device)[None]
    return Inputs(q, k, *layers, rows, torch.arange(size.cols, device=device)[None] + 16)


@dataclass(frozen=True)
class Contender(Implementation):
    """A way to compute the loss (1,), ``run(loss, inputs)``, under autograd."""


def ours(loss: str, x: Inputs) -> Tensor:
    return attention_relation(x.q, x.k, x.teacher_q, x.teacher_k, x.rows, x.cols, loss=loss)


def head_mean(q: Tensor, k: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
    """Slice (r,V) of some rows: whole rows of scores in the dtype of q, softmax in float32 or wider."""
    hidden = torch.arange(q.shape[2], device=q.device) > rows[:, None]
    scores = (q[:, :, rows] @ k.mT * q.shape[3] ** -0.5).masked_fill(hidden, -torch.inf)
    return scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32))[0, :, :, cols].mean(0)


def row_distances(a: Tensor, t: Tensor, loss: str) -> Tensor:
    """Sum over rows."""
    if loss == "cosine":
        return (1 - torch.cosine_similarity(a, t, dim=1)).sum()
    a, t = a / a.sum(1, keepdim=True), t / t.sum(1, keepdim=True)
    return (t * (t.log() - a.log())).sum()


def chunked(loss: str, x: Inputs) -> Tensor:
    """With torch alone: whole rows of scores of all heads, a chunk of rows at a time, recomputed in the backward pass."""

    def chunk(q: Tensor, k: Tensor, rows: Tensor) -> Tensor:
        with torch.no_grad():
            layers = zip(x.teacher_q, x.teacher_k, strict=True)
            target = sum(head_mean(*layer, rows, x.cols[0]) for layer in layers) / len(x.teacher_q)
        return row_distances(head_mean(q, k, rows, x.cols[0]), target, loss)

    parts = [checkpoint(chunk, x.q, x.k, rows, use_reentrant=False) for rows in x.rows[0].split(CHUNK)]
    return torch.stack(parts).sum(0, keepdim=True) / x.rows.shape[1]


CONTENDERS = (Contender(OURS, ours, frozenset({"relation"})), Contender(CHUNKED, chunked))


def results_of(run, loss: str, x: Inputs) -> dict[str, Tensor]:
    """Loss and the gradients of q and k."""
    found = run(loss, x)
    return dict(zip(("loss", "dq", "dk"), (found.detach(), *torch.autograd.grad(found.sum(), x[:2])), strict=True))
