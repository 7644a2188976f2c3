"""Problems that kernels do not take as they are, cut into pieces that they take: packed documents, and queries fewer than keys.

A document is a problem of its own, on views. Queries that are fewer than the keys belong to the last keys: they become the
last queries of a problem whose other queries are zero and asked for nothing.

`InPieces` is a backend, and `EngineInPieces` an attention engine, that computes piece by piece with another.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from cdistill.ops._dispatch import Backend, backend
from cdistill.ops._engine import AttentionEngine
from cdistill.ops._problem import AttentionProblem, Base, Gradients
from cdistill.ops._rows import regions

ALL = slice(None)


class Piece(NamedTuple):
    """A piece and where it belongs in the whole."""

    problem: AttentionProblem  # of the piece alone: positions are counted from its first key
    queries: slice  # of the whole q
    keys: slice  # of the whole k
    before: int  # queries of the piece that are none of the whole
    rows: Tensor | slice  # which of the whole's R rows and V columns it has
    cols: Tensor | slice

    def take(self, x: Tensor) -> Tensor:
        """The part of x (...,Tq), zeros for queries that are none of the whole: their scores and gradients are zero, too."""
        return F.pad(x[..., self.queries], (self.before, 0)).contiguous()

    def take_vectors(self, x: Tensor) -> Tensor:
        """The part of x (B,Hq,Tq,D)."""
        part = x[:, :, self.queries]
        return F.pad(part, (0, 0, self.before, 0)) if self.before else part

    def of_slice(self, x: Tensor) -> Tensor:
        """The part of x (...,R,V)."""
        return x[..., self.rows, :][..., self.cols]

    def add_slice(self, x: Tensor, part: Tensor) -> None:
        """Add the piece's slice to x (...,R,V)."""
        if isinstance(self.rows, Tensor):
            x[..., self.rows[:, None], self.cols] = part  # of no other piece
        else:
            x += part

    def add_gradients(self, dq: Tensor, dk: Tensor, part_q: Tensor, part_k: Tensor) -> None:
        """Add the piece's gradients to those of q and k."""
        dq[:, :, self.queries] += part_q[:, :, self.before :]
        dk[:, :, self.keys] += part_k


def counts_at_once(positions: Tensor) -> bool:
    """Whether it costs no sync to know how many positions are somewhere, and all samples (one) have equally many."""
    return positions.device.type == "cpu" and len(positions) == 1


def _local(positions: Tensor | None, start: int, stop: int) -> tuple[Tensor | None, Tensor | slice]:
    """Positions (B,N) within [start, stop), counted from start, and which of the N they are.

    On the CPU the others are left out; elsewhere, where their number is not known without a sync, they become padding.
    """
    if positions is None:
        return None, ALL
    inside = (positions >= start) & (positions < stop)
    if counts_at_once(positions):
        index = inside[0].nonzero()[:, 0]
        return positions[:, index] - start, index
    return torch.where(inside, positions - start, -1), ALL


def pieces(problem: AttentionProblem) -> Iterator[Piece]:
    """The pieces of a problem."""
    q, k, v = problem.q, problem.k, problem.v
    if problem.documents is None:
        stops, before = [k.shape[2]], problem.offset
    else:
        stops, before = problem.documents[1:], 0
    start = 0
    for stop in stops:
        queries, keys = slice(start, stop - before), slice(start, stop)
        rows, cols = problem.rows, problem.cols
        row_index: Tensor | slice = ALL
        col_index: Tensor | slice = ALL
        if problem.documents is not None:
            rows, row_index = _local(rows, start, stop)
            cols, col_index = _local(cols, start, stop)
        part = Piece(problem, queries, keys, before, row_index, col_index)
        yield part._replace(
            problem=problem._replace(
                q=part.take_vectors(q),
                k=k[:, :, keys],
                v=None if v is None else v[:, :, keys],
                key_mask=None if problem.key_mask is None else problem.key_mask[:, keys].contiguous(),
                lse=None if problem.lse is None else part.take(problem.lse),
                documents=None,
                rows=rows,
                cols=cols,
            )
        )
        start = stop


class InPieces:
    """A `Backend` for problems in pieces."""

    FUSES_HEAD_COSINE = FUSES_ACCUMULATION = False

    def __init__(self, impl: Any):
        self._impl = impl

    def __getattr__(self, name: str) -> Any:
        """What has nothing to do with tokens is the other backend's."""
        return getattr(self._impl, name)

    def _asked(self, problem: AttentionProblem) -> Iterator[Piece]:
        """Pieces with rows and columns, or with rows where columns play no part."""
        for piece in _with_queries(problem):
            rows, cols = piece.problem.positions
            if rows.shape[1] and (cols.shape[1] or not problem.positions[1].shape[1]):
                yield piece

    def regions(self, problem: AttentionProblem) -> tuple[Tensor, Tensor, Tensor]:
        """As of every `Backend`."""
        row_valid, col_valid, allowed = regions(problem)
        if problem.documents is not None:
            row_valid = torch.zeros_like(row_valid)
            for piece in self._asked(problem):
                row_valid[:, piece.rows] |= regions(piece.problem)[0]
        return row_valid, col_valid, allowed

    def row_lse(self, problem: AttentionProblem) -> Tensor:
        """As of every `Backend`."""
        shape = (*(2,) * self._impl.SPLITS_LSE, *problem.q.shape[:3])
        lse = torch.zeros(shape, dtype=torch.float32, device=problem.q.device)
        # The denominators of rows that have no column in their document are not needed.
        for piece in self._asked(problem):
            lse[..., piece.queries] = self._impl.row_lse(piece.problem)[..., piece.before :]
        return lse

    def row_lse_backward(
        self, problem: AttentionProblem, dlse: Tensor, into: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """As of every `Backend`."""
        dq, dk = _gradients(problem) if into is None else into
        for piece in self._asked(problem):
            piece.add_gradients(dq, dk, *self._impl.row_lse_backward(piece.problem, piece.take(dlse)))
        return dq, dk

    def slice_forward(self, problem: AttentionProblem) -> Tensor:
        """As of every `Backend`."""
        a = problem.q.new_zeros(problem.slice_shape, dtype=torch.float32)
        for piece in self._asked(problem):
            piece.add_slice(a, self._impl.slice_forward(piece.problem))
        return a

    def slice_forward_with_lse(self, problem: AttentionProblem) -> tuple[Tensor, Tensor]:
        """As of every `Backend`."""
        a = problem.q.new_zeros(problem.slice_shape, dtype=torch.float32)
        lse = a.new_zeros(problem.q.shape[:3])
        for piece in self._asked(problem):
            part, part_lse = self._impl.slice_forward_with_lse(piece.problem)
            piece.add_slice(a, part)
            lse[..., piece.queries] = part_lse[..., piece.before :]
        return a, lse

    def slice_backward(
        self,
        problem: AttentionProblem,
        grad: Tensor,
        base: Base | None,
        bound: Tensor | None = None,
        into: tuple[Tensor, Tensor] | None = None,
    ) -> Gradients:
        """As of every `Backend`."""
        dq, dk = _gradients(problem) if into is None else into
        dlse = problem.q.new_zeros(problem.q.shape[:3], dtype=torch.float32)
        for piece in self._asked(problem):
            *parts, part_lse = self._impl.slice_backward(piece.problem, piece.of_slice(grad), None, bound)
            piece.add_gradients(dq, dk, *parts)
            dlse[..., piece.queries] += part_lse[..., piece.before :]
        if base is None:
            return dq, dk, dlse
        base_q, base_k = base(dlse)
        return base_q.add_(dq), base_k.add_(dk), dlse

    def slice_backward_with_denominator(
        self, problem: AttentionProblem, grad: Tensor, into: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """As of every `Backend`."""
        dq, dk = _gradients(problem) if into is None else into
        for piece in self._asked(problem):
            parts = self._impl.slice_backward_with_denominator(piece.problem, piece.of_slice(grad))
            piece.add_gradients(dq, dk, *parts)
        return dq, dk


def _gradients(problem: AttentionProblem) -> tuple[Tensor, Tensor]:
    """Zeros, to which those of pieces are added."""
    dq, dk = (torch.zeros(x.shape, dtype=torch.float32, device=x.device) for x in (problem.q, problem.k))
    return dq, dk


class EngineInPieces(AttentionEngine):
    """An attention engine for problems in pieces."""

    def __init__(self, engine: AttentionEngine):
        self._engine = engine
        self.takes_dlse, self.deterministic, self.SPLITS_LSE = (
            engine.takes_dlse,
            engine.deterministic,
            engine.SPLITS_LSE,
        )

    def missing(self) -> str | None:
        """As of every engine."""
        return self._engine.missing()

    def refusal(self, problem: AttentionProblem) -> str | None:
        """Why one of the pieces cannot be computed."""
        problem = problem._replace(rows=None, cols=None)  # whose values are not to be looked at
        return next(filter(None, (self._engine.refusal(piece.problem) for piece in _with_queries(problem))), None)

    def forward(self, problem: AttentionProblem) -> tuple[Tensor, Tensor]:
        """As of every engine."""
        return self.forward_split(problem)[:2]

    def forward_split(self, problem: AttentionProblem) -> tuple[Tensor, Tensor, Tensor | None]:
        """As of every engine."""
        out = torch.empty_like(problem.q)
        lse = out.new_empty(out.shape[:3], dtype=torch.float32)
        split = lse.new_empty((2, *lse.shape)) if self.SPLITS_LSE else None
        for piece in _with_queries(problem):
            part, part_lse, part_split = self._engine.forward_split(piece.problem)
            out[:, :, piece.queries] = part[:, :, piece.before :]
            lse[..., piece.queries] = part_lse[..., piece.before :]
            if split is not None:
                split[..., piece.queries] = cast(Tensor, part_split)[..., piece.before :]
        return out, lse, split

    def backward(self, problem: AttentionProblem, out: Tensor, dout: Tensor | None, dlse: Tensor | None) -> Gradients:
        """As of every engine."""
        dq, dk, dv = map(torch.zeros_like, problem.qkv)
        for piece in _with_queries(problem):
            part_out, part_dout = (None if x is None else piece.take_vectors(x) for x in (out, dout))
            part_dlse = None if dlse is None else piece.take(dlse)
            part_q, part_k, part_v = self._engine.backward(piece.problem, cast(Tensor, part_out), part_dout, part_dlse)
            dq[:, :, piece.queries] = part_q[:, :, piece.before :]
            dk[:, :, piece.keys], dv[:, :, piece.keys] = part_k, part_v
        return dq, dk, dv


def _with_queries(problem: AttentionProblem) -> Iterator[Piece]:
    """The pieces but empty documents."""
    return (piece for piece in pieces(problem) if piece.problem.q.shape[2])


def backend_of(impl: str | None, problem: AttentionProblem, name: str = "q") -> Backend:
    """The backend for a problem, by ``impl`` or by its device; raises ValueError as `backend`, with ``name`` for q."""
    chosen = backend(impl, problem.q, name)
    if problem.documents is None and (problem.offset == 0 or chosen.TAKES_FEWER_QUERIES):
        return chosen
    return cast(Backend, InPieces(chosen))


def for_pieces(engine: AttentionEngine, problem: AttentionProblem) -> AttentionEngine:
    """The engine for a problem, which it gets in pieces if need be."""
    return engine if problem.documents is None and problem.offset == 0 else EngineInPieces(engine)
