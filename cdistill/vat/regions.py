"""Which query rows and visual key columns of the attention matrix are aligned, read off a batch of tokens."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cdistill.choices import ROWS, Rows
from cdistill.errors import InputError

IGNORE_INDEX = -100
VISUAL_TOKEN_TYPES = (1, 2)  # image and video in the mm_token_type_ids of transformers' processors


class Regions(NamedTuple):
    """Compared query positions and visual-token key positions of a batch; -1 at the end of a sample is padding."""

    rows: Tensor  # (B, R) int32
    cols: Tensor  # (B, V) int32


class PackedSample(NamedTuple):
    """Where one of several samples in a row of tokens lies: ``tokens[row, start:stop]``."""

    row: int
    start: int
    stop: int


class PackedRegions(NamedTuple):
    """`Regions` of N samples that share rows of tokens, none of which sees another; positions count from its start."""

    rows: Tensor  # (N, R) int32
    cols: Tensor  # (N, V) int32
    samples: tuple[PackedSample, ...]
    sequence: Tensor  # (B, T) int64, which sequence of its row a token belongs to; the hook compares the model's mask


def token_regions(
    input_ids: Tensor | None,
    labels: Tensor | None,
    attention_mask: Tensor | None,
    *,
    visual_token_ids: int | Sequence[int] | None = None,
    rows: Rows = "answer",
    mm_token_type_ids: Tensor | None = None,
) -> Regions:
    """Positions of the rows and visual columns to align in every sample of a batch (paper section 4.1).

    ``input_ids``, ``labels`` (-100 = ignored), ``attention_mask`` (non-zero = real token; None = all real) and
    ``mm_token_type_ids`` are (B, T). Visual tokens (the columns) are the real tokens whose type is image or video where
    ``mm_token_type_ids`` is given (Qwen's processors; those of InternVL and Idefics3 mark the tokens around an image, too),
    otherwise those whose id is in ``visual_token_ids`` (`cdistill.vat.visual_token_ids`). ``rows`` chooses the queries:

    - ``answer``: positions whose label is not ignored, the paper's answer tokens read literally (needs ``labels``);
    - ``predicting``: positions whose next token is real and labelled, those that decide the answers: the prompt's last is
      one, that of what ends the answer is not (needs ``labels``);
    - ``text``: every real token after the first visual token that is not visual itself;
    - ``visual``: the visual tokens (the authors' code);
    - ``all``: every real token from the first visual token on (section 4.1 takes all rows).

    Positions before a sample's first visual token see no visual key and are never rows; a sample without visual tokens
    has neither rows nor columns.

    Returns `Regions`: rows (B, R) and cols (B, V), int32, increasing, padded with -1 at the end to the batch maximum,
    which may be 0. Sizing the two results costs one device synchronisation. Raises ValueError for an unknown ``rows``,
    a missing argument, or shapes that differ.
    """
    if rows not in ROWS:
        raise InputError(f"rows must be one of {', '.join(ROWS)}, got {rows!r}")
    tokens, visual = _visual_tokens(input_ids, mm_token_type_ids, visual_token_ids)
    _require_shape_of(tokens, input_ids=input_ids, labels=labels, attention_mask=attention_mask)
    real = torch.ones_like(visual) if attention_mask is None else attention_mask != 0
    visual = visual & real
    after_first = real & (visual.cumsum(1) > 0)

    if rows == "visual":
        chosen = visual
    elif rows == "all":
        chosen = after_first
    elif rows == "text":
        chosen = after_first & ~visual
    elif labels is None:
        raise InputError(f"labels are needed for rows={rows!r}")
    else:
        learned = real & (labels != IGNORE_INDEX)
        chosen = after_first & (learned if rows == "answer" else F.pad(learned[:, 1:], (0, 1)))

    both = torch.stack((chosen, visual))  # (2, B, T)
    position = torch.arange(tokens.shape[1], dtype=torch.int32, device=tokens.device)
    hidden = tokens.shape[1]  # sorts behind every position
    packed = torch.where(both, position, hidden).sort(dim=-1).values.to(torch.int32)
    packed = packed.masked_fill(packed == hidden, -1)
    widths = both.sum(-1).amax(-1).tolist() if tokens.shape[0] else [0, 0]
    return Regions(packed[0, :, : widths[0]].contiguous(), packed[1, :, : widths[1]].contiguous())


def _visual_tokens(
    input_ids: Tensor | None, types: Tensor | None, ids: int | Sequence[int] | None
) -> tuple[Tensor, Tensor]:
    """What tells the tokens apart (B, T), their types or ids, and which of them are visual."""
    tokens = input_ids if types is None else types
    if tokens is None:
        raise InputError("input_ids are needed to find the visual tokens where mm_token_type_ids is not given")
    if tokens.ndim != 2:
        raise InputError(f"input_ids and mm_token_type_ids must be (B, T), got {tuple(tokens.shape)}")
    if types is not None:
        return tokens, _is_in(types, VISUAL_TOKEN_TYPES)
    if ids is None or (isinstance(ids, Sequence) and not ids):
        raise InputError("visual_token_ids must name at least one token id where mm_token_type_ids is not given")
    return tokens, _is_in(tokens, [ids] if isinstance(ids, int) else ids)


def _require_shape_of(tokens: Tensor, **given: Tensor | None) -> None:
    for name, value in given.items():
        if value is not None and value.shape != tokens.shape:
            raise InputError(f"{name} must be {tuple(tokens.shape)} like the tokens, got {tuple(value.shape)}")


def packed_regions(
    input_ids: Tensor | None,
    labels: Tensor | None,
    position_ids: Tensor,
    *,
    attention_mask: Tensor | None = None,
    visual_token_ids: int | Sequence[int] | None = None,
    rows: Rows = "answer",
    mm_token_type_ids: Tensor | None = None,
) -> PackedRegions:
    """`token_regions` of samples packed into rows; position ids that start anew separate them.

    ``position_ids`` are those the model gets: (B, T), (1, T) for all rows, or (4, B, T) for multimodal rotary embeddings,
    text positions first. A sample begins wherever a position is not its predecessor plus one, as in transformers' own
    masks, which keep samples apart only if the model is called with these position ids, without attention_mask and
    with ``use_cache=False``; the hook refuses any other mask. ``attention_mask`` (B, T) marks padding here (0): what holds
    padding alone is no sample. The other arguments are those of `token_regions`, (B, T).

    Returns `PackedRegions` of the N samples in order. Costs two device synchronisations. Raises ValueError as
    `token_regions` does, for position_ids of another shape, and where all tokens are padding.
    """
    tokens = input_ids if mm_token_type_ids is None else mm_token_type_ids
    if tokens is None or tokens.ndim != 2:
        raise InputError("packed samples need input_ids or mm_token_type_ids of shape (B, T)")
    shape = tuple(tokens.shape)
    if position_ids.ndim == 3 and position_ids.shape[0] == 4:
        position_ids = position_ids[0]
    if position_ids.ndim != 2 or tuple(position_ids.shape) not in (shape, (1, shape[1])):
        raise InputError(
            f"position_ids of packed samples must be {shape}, or (4, *{shape}) with text positions first (transformers "
            f"does not keep samples apart by others), got {tuple(position_ids.shape)}"
        )
    position_ids = position_ids.expand(shape)
    _require_shape_of(tokens, input_ids=input_ids, labels=labels, attention_mask=attention_mask)
    real = torch.ones_like(tokens, dtype=torch.bool) if attention_mask is None else attention_mask != 0
    sequence = (torch.diff(position_ids, prepend=position_ids[:, :1] - 1, dim=1) != 1).cumsum(1)
    samples = _samples(sequence, real)
    if not samples:
        raise InputError("packed rows must hold at least one real token")

    width = max(sample.stop - sample.start for sample in samples)
    row, start, stop = torch.tensor(samples, dtype=torch.int64, device=tokens.device).reshape(-1, 3, 1).unbind(1)
    position = start + torch.arange(width, device=tokens.device)
    inside = position < stop
    position = position.clamp(max=shape[1] - 1)

    def unpacked(x: Tensor | None) -> Tensor | None:
        return None if x is None else x[row, position]

    regions = token_regions(
        unpacked(input_ids),
        unpacked(labels),
        inside & real[row, position],
        visual_token_ids=visual_token_ids,
        rows=rows,
        mm_token_type_ids=unpacked(mm_token_type_ids),
    )
    return PackedRegions(*regions, samples, sequence)


def _samples(sequence: Tensor, real: Tensor) -> tuple[PackedSample, ...]:
    """Where the sequences that hold a real token lie; one device synchronisation."""
    samples = []
    for row, (ids, kept) in enumerate(torch.stack((sequence, real.to(sequence.dtype)), 1).tolist()):
        start = 0
        for stop in range(1, len(ids) + 1):
            if stop == len(ids) or ids[stop] != ids[start]:
                if any(kept[start:stop]):
                    samples.append(PackedSample(row, start, stop))
                start = stop
    return tuple(samples)


def _is_in(tokens: Tensor, ids: Sequence[int]) -> Tensor:
    found = tokens == ids[0]
    for token in ids[1:]:
        found = found | (tokens == token)
    return found


def check_same_visual_tokens(teacher_cols: Tensor, student_cols: Tensor) -> None:
    """Make sure that teacher and student see every image through the same number of visual tokens.

    ``teacher_cols`` (B, V) and ``student_cols`` (B, V') are the columns of their `Regions`, -1 = padding. Costs one
    device synchronisation. Raises ValueError naming the first sample that differs and both counts.
    """
    if teacher_cols.shape[0] != student_cols.shape[0]:
        raise InputError(
            f"teacher and student batches differ: {teacher_cols.shape[0]} and {student_cols.shape[0]} samples"
        )
    counts = torch.stack(((teacher_cols >= 0).sum(1), (student_cols >= 0).sum(1).to(teacher_cols.device)))
    for sample, (teacher, student) in enumerate(zip(*counts.tolist(), strict=True)):
        if teacher != student:
            raise InputError(
                f"sample {sample} has {teacher} visual tokens for the teacher and {student} for the student; "
                "attention can be aligned between equal numbers only"
            )


def require_same_counts(
    teacher: Regions | PackedRegions, student: Regions | PackedRegions, *, columns: bool = True
) -> None:
    """Raise ValueError unless every sample has as many rows and, with ``columns``, as many columns for both; on CUDA a
    device-side assertion."""
    pairs = (("rows", teacher.rows, student.rows), ("visual tokens", teacher.cols, student.cols))
    for name, theirs, ours in pairs if columns else pairs[:1]:
        message = f"teacher and student must have equally many {name} in every sample"
        if theirs.shape != ours.shape:
            raise InputError(f"{message}; they have (samples, {name}) {tuple(theirs.shape)} and {tuple(ours.shape)}")
        require_on_device(((theirs >= 0) == (ours >= 0).to(theirs.device)).all(), message)


def require_on_device(ok: Tensor, message: str) -> None:
    """Raise ValueError unless ``ok`` (0-dim bool) holds; on CUDA a device-side assertion, because reading it would sync."""
    if ok.device.type != "cpu":
        torch._assert_async(ok, message)
    elif not ok:
        raise InputError(message)


def grounded_regions(grounding: Tensor, places: Tensor) -> tuple[Regions, Tensor]:
    """Rows and columns for aligning attention with given targets instead of a teacher's.

    Args:
        grounding: (B,T,V) floating point: what share of its attention to the V places every token should pay to each of
            them; a zero row asks for nothing.
        places: (B,V) integer positions, -1 = padding.

    Returns:
        Regions of the tokens that ask for something, and their targets (B,R,V), zero at padding.
    """
    asks = grounding.sum(2) > 0
    width = int(asks.sum(1).max()) if asks.numel() else 0
    order = torch.argsort(asks.logical_not().int(), dim=1, stable=True)[:, :width]
    picked = asks.gather(1, order)
    rows = torch.where(picked, order, -1).int()
    targets = grounding.gather(1, order[:, :, None].expand(-1, -1, grounding.shape[2])) * picked[:, :, None]
    return Regions(rows, places.int()), targets
