"""Attention to a teacher's visual tokens as attention to a student's, by the area of the image that they share.

Every visual token covers a rectangle of a picture (`cdistill.vat.layout`). W (V_s, V_t) holds the share of each teacher
token's area that lies in each student token, so that its columns sum to 1 and attention mass is conserved: a slice A (R, V_t)
becomes A W^T (R, V_s). W has a few entries in a row and is kept as these alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from cdistill.errors import InputError
from cdistill.vat.layout import Piece

LEAST_OVERLAP = 1e-6  # of the smaller cell's side: less is rounding


class Resampling(NamedTuple):
    """W of every sample of a batch by the rows of student tokens.

    ``places`` (B, V_s, K), integers, count among the teacher's visual tokens of the sample, -1 = padding; ``shares``
    (B, V_s, K) fp32 are 0 there. A student token without any place lies where the teacher has no token.
    """

    places: Tensor
    shares: Tensor

    def __call__(self, attention: Tensor) -> Tensor:
        """Attention (B, [H,] R, V_t) to the teacher's visual tokens as such to the student's, (B, [H,] R, V_s), in fp32.

        One entry of all rows of W at a time: beside the result as much memory once more, sums in a fixed order. Raises
        ValueError for another number of samples.
        """
        if len(attention) != len(self.places):
            raise InputError(f"attention must be of {len(self.places)} samples, got {len(attention)}")
        shape = (len(attention), *[1] * (attention.ndim - 2), self.places.shape[1])
        result = attention.new_zeros(*attention.shape[:-1], shape[-1], dtype=torch.float32)
        if not attention.shape[-1]:
            return result
        for places, shares in zip(self.places.unbind(-1), self.shares.unbind(-1), strict=True):
            index = places.clamp(min=0).long().view(shape).expand(result.shape)
            result.addcmul_(attention.gather(-1, index).float(), shares.view(shape))
        return result

    @property
    def compared(self) -> Tensor:
        """(B, V_s) bool: student tokens that lie where the teacher has a token, too."""
        return (self.places >= 0).any(-1)


def resampling(teacher: Sequence[Piece], student: Sequence[Piece], tokens: int) -> tuple[Tensor, Tensor]:
    """``places`` and ``shares`` (V_s, K) of one sample, as `Resampling` holds them; ``tokens`` is V_s.

    A picture that is covered twice, by a thumbnail and by tiles, is compared with its like: a token meets those of the other
    model of its own level; where the other model has none of that level, all that it has of the picture, and what a teacher
    token gives is divided between the student's covers by area. Image newlines meet image newlines by the rows that they
    end. What a student has and the teacher has not is compared with nothing (`Resampling.compared`); the mass of teacher
    tokens that lie where the student has no token is left out.

    Raises:
        ValueError: the two do not see equally many pictures or frames.
    """
    ours, theirs = ({piece.picture for piece in pieces} for pieces in (student, teacher))
    if ours != theirs:
        raise InputError(f"the student sees {len(ours)} pictures or frames, the teacher {len(theirs)}")
    found = [np.concatenate(part) for part in zip(*_overlaps(teacher, student), strict=True)]
    if not found:
        return torch.full((tokens, 0), -1), torch.zeros(tokens, 0)
    rows, columns, areas = found
    of_column = np.bincount(columns, areas)
    order = np.lexsort((columns, rows))
    rows, columns, shares = rows[order], columns[order], (areas / of_column[columns])[order]
    counts = np.bincount(rows, minlength=tokens)
    place = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
    places, weights = np.full((tokens, counts.max()), -1), np.zeros((tokens, counts.max()), np.float32)
    places[rows, place], weights[rows, place] = columns, shares
    return torch.from_numpy(places), torch.from_numpy(weights)


def _overlaps(
    teacher: Sequence[Piece], student: Sequence[Piece]
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Student tokens, teacher tokens and the area that they share, of all pieces that meet."""
    levels = [{(piece.picture, piece.level) for piece in pieces} for pieces in (student, teacher)]
    for ours in student:
        for theirs in teacher:
            if ours.picture != theirs.picture:
                continue
            both = [(ours.picture, level) in of for of, level in zip(levels, (theirs.level, ours.level), strict=True)]
            if ours.level != theirs.level and all(both):
                continue
            yield from _overlap(theirs, ours)


def _overlap(teacher: Piece, student: Piece) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """As `_overlaps`, of two pieces: of their grids, and of what ends their rows."""
    both = (student, teacher)
    sides = [(piece.box[1], piece.box[3]) for piece in both]
    high = _shared(sides, [piece.places.shape[0] for piece in both])
    wide = _shared([(piece.box[0], piece.box[2]) for piece in both], [piece.places.shape[1] for piece in both])
    (i, j), (k, m) = np.nonzero(high), np.nonzero(wide)
    rows = student.places[i[:, None], k].ravel()
    columns = teacher.places[j[:, None], m].ravel()
    areas = (high[i, j][:, None] * wide[k, m]).ravel()
    there = (rows >= 0) & (columns >= 0)
    yield rows[there], columns[there], areas[there]
    if student.ends and teacher.ends:
        strips = _shared(sides, [len(piece.ends) for piece in both])
        i, j = np.nonzero(strips)
        yield np.asarray(student.ends)[i], np.asarray(teacher.ends)[j], strips[i, j]


def _shared(sides: Sequence[tuple[float, float]], counts: Sequence[int]) -> np.ndarray:
    """(n, m) lengths that the n equal parts of one interval share with the m of another."""
    ours, theirs = (np.linspace(*side, count + 1) for side, count in zip(sides, counts, strict=True))
    lengths = np.minimum(ours[1:, None], theirs[1:]) - np.maximum(ours[:-1, None], theirs[:-1])
    least = LEAST_OVERLAP * min(ours[1] - ours[0], theirs[1] - theirs[0])
    return np.where(lengths > least, lengths, 0.0)
