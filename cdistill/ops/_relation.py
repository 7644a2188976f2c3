"""Slices of two models side by side, block of rows by block of rows: what `attention_relation` compares and drops.

A block has a constant number of rows, so what exists at a time beside inputs and gradients does not grow with R*V. The last
block is kept for the backward pass, which saves short answers from being recomputed. Whoever needs numbers of the whole slices
first (`_relation_losses`) walks twice; the log-sum-exps are made in the first walk and kept for the others and for the
backward pass.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from cdistill.choices import SHARES
from cdistill.ops._dispatch import Backend
from cdistill.ops._pipeline import no_lse
from cdistill.ops._problem import AttentionProblem, Gradients

# Rows of a block: on a GPU as many as fill it, on a CPU the most that a part of cpp has; more gain nothing there.
CUDA_ROWS, CPU_ROWS = 512, 288
FEWEST_ROWS = 16  # where a block holds slices of many heads


class Relation(NamedTuple):
    """A student's layer and the teacher's layers whose mean slice it is compared with."""

    student: AttentionProblem
    teacher: list[AttentionProblem]  # of one shape; with or without lse, all alike
    groups: int  # slices of a sample: 1, or for heads="each" the heads of the model that has fewer

    @property
    def samples(self) -> int:
        """N, the number of slices that are compared."""
        return self.student.q.shape[0] * self.groups

    @property
    def empty(self) -> bool:
        """Whether the slices have no entry."""
        return self.student.empty

    @property
    def block_rows(self) -> int:
        """Rows of a block but the last one."""
        student, most = self.student, CUDA_ROWS if self.student.q.is_cuda else CPU_ROWS
        if not student.each:
            return most
        return max(FEWEST_ROWS, most // max(student.q.shape[1], self.teacher[0].q.shape[1]))

    @property
    def last_shape(self) -> tuple[int, int, int]:
        """Of a slice of the last block, (N,r,V)."""
        rows, cols = (x.shape[1] for x in self.student.positions)
        return self.samples, 0 if self.empty else rows - (rows - 1) // self.block_rows * self.block_rows, cols


class Block(NamedTuple):
    """Slices of some of the rows."""

    rows: slice
    a: Tensor  # (N,r,V) fp32, the student's
    target: Tensor  # (N,r,V) fp32, the teacher's


def needs_lse(problem: AttentionProblem) -> bool:
    """Whether a log-sum-exp is to be made for the problem."""
    return problem.lse is None and not problem.empty


class Walk:
    """The blocks of both models' slices, as often as they are wanted."""

    def __init__(
        self,
        impl: Backend,
        relation: Relation,
        own_lse: Tensor | None = None,
        teacher_lse: Tensor | None = None,
        last: tuple[Tensor, Tensor] | None = None,
    ):
        """With the log-sum-exps and the last block's slices that another walk made, or None to make them."""
        self._impl, self.relation, self.last = impl, relation, last
        self._known = own_lse is not None
        self.own_lse = self._made([relation.student], own_lse)
        self.teacher_lse = self._made(relation.teacher, teacher_lse)

    def _made(self, layers: list[AttentionProblem], known: Tensor | None) -> Tensor:
        """Log-sum-exps of the layers, (L,[2,]B,Hq,T), empty where none are needed; zeros to be added to with cpp."""
        if known is not None or not needs_lse(layers[0]):
            return no_lse(layers[0].q) if known is None else known
        if self._impl.FUSES_DENOMINATOR:
            return torch.zeros((len(layers), *layers[0].q.shape[:3]), dtype=torch.float32, device=layers[0].q.device)
        return torch.stack([self._impl.row_lse(layer) for layer in layers])

    def blocks(self) -> list[slice]:
        """Where the rows are cut."""
        rows, most = self.relation.student.positions[0].shape[1], self.relation.block_rows
        return [slice(start, min(start + most, rows)) for start in range(0, rows, most)]

    def each(self, see: Callable[[Block], None]) -> None:
        """Call ``see`` with block after block; none but the last is there any more when the next one is made.

        A later walk needs no product with keys outside the slice.
        """
        *blocks, last = self.blocks()
        for rows in blocks:
            see(Block(rows, *self._slices(rows)))
        self.last = self.last or self._slices(last)
        see(Block(last, *self.last))
        self._known = True

    def _slices(self, rows: slice) -> tuple[Tensor, Tensor]:
        a, target = self._slice(self.relation.student, self.own_lse, 0, rows), self._target(rows)
        return self._grouped(a).flatten(0, -3), self._grouped(target).flatten(0, -3)

    def problem(self, layer: AttentionProblem, lse: Tensor, index: int, rows: slice) -> AttentionProblem:
        """A layer's problem of a block, with its lse as far as that is known."""
        if needs_lse(layer) and (self._known or not self._impl.FUSES_DENOMINATOR):
            layer = layer._replace(lse=lse[index])
        return layer._replace(rows=layer.positions[0][:, rows].contiguous())

    def _slice(self, layer: AttentionProblem, lse: Tensor, index: int, rows: slice) -> Tensor:
        """(B,r,V), or (B,Hq,r,V)."""
        problem = self.problem(layer, lse, index, rows)
        if problem.lse is not None:
            return self._impl.slice_forward(problem)
        a, made = self._impl.slice_forward_with_lse(problem)
        lse[index] += made  # zero outside the block's rows
        return a

    def _target(self, rows: slice) -> Tensor:
        """Mean of the teacher's slices."""
        layers = self.relation.teacher
        if self._impl.FUSES_ACCUMULATION and len(layers) > 1:
            problems = [self.problem(layer, self.teacher_lse, i, rows) for i, layer in enumerate(layers)]
            sums = torch.zeros((1, *problems[0].slice_shape), dtype=torch.float32, device=layers[0].q.device)
            for problem in problems:
                self._impl.slice_accumulate(problem, sums, [0])
            return sums[0].div_(len(layers))
        total = self._slice(layers[0], self.teacher_lse, 0, rows)
        for i, layer in enumerate(layers[1:], 1):
            total += self._slice(layer, self.teacher_lse, i, rows)
        return total.div_(len(layers)) if len(layers) > 1 else total

    def _grouped(self, a: Tensor) -> Tensor:
        """Slices of each head (B,H,r,V) as means of groups of consecutive heads, (B,G,r,V); head means as they are."""
        groups = self.relation.groups
        return a if a.dim() == 3 or a.shape[1] == groups else a.unflatten(1, (groups, -1)).mean(2)


class Gradient:
    """Gradients of the student's q, k and lse, to which block after block is added."""

    def __init__(self, impl: Backend, walk: Walk):
        problem = walk.relation.student
        q, k = problem.q, problem.k
        self._impl, self._walk, self._problem = impl, walk, problem
        self._fused = impl.FUSES_DENOMINATOR and problem.lse is None  # through the denominator, too, with every block
        # A row is in one block, a key in all: its sums are rounded once.
        exact = torch.float32
        narrow = q.dtype if impl.FUSES_DENOMINATOR else exact
        self._dq = torch.zeros_like(q, dtype=narrow)
        self._dk = torch.zeros_like(k, dtype=narrow if len(walk.blocks()) == 1 else exact)
        self._dlse = torch.zeros(q.shape[:3], dtype=exact, device=q.device)

    def add(self, block: Block, da: Tensor, loss: str) -> None:
        """What the gradient ``da`` (N,r,V) of a block's slices gives."""
        walk, relation, heads = self._walk, self._walk.relation, self._problem.q.shape[1]
        bound = None
        if (
            loss in SHARES and self._problem.q.dtype == torch.float16
        ):  # whose range a gradient as large as 1/a would use up
            bound = (1 if self._problem.each else heads) * (da * block.a).abs().unflatten(
                0, (-1, relation.groups)
            ).flatten(1).amax(1)
        grad = da
        if self._problem.each:
            grad, share = da.unflatten(0, (-1, relation.groups)), heads // relation.groups
            grad = grad if share == 1 else (grad / share).repeat_interleave(share, 1)
        problem, into = walk.problem(self._problem, walk.own_lse, 0, block.rows), (self._dq, self._dk)
        if self._fused:
            self._impl.slice_backward_with_denominator(problem, grad, into)
        else:
            self._dlse += self._impl.slice_backward(problem, grad, None, bound, into)[2]

    def result(self) -> Gradients:
        """dq, dk and dlse; with what the rows' own log-sum-exps pass on to all keys."""
        if self._problem.lse is None and not self._fused:
            problem = self._problem._replace(lse=self._walk.own_lse[0])
            self._impl.row_lse_backward(problem, self._dlse, (self._dq, self._dk))
        return self._dq, self._dk, self._dlse
