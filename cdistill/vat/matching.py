"""Which student layer is aligned with which teacher layers: layer spans and the three matchings of the paper."""

import math
import re
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

from torch import Tensor

from cdistill.choices import MATCHINGS, NAMED_SPANS, Matching
from cdistill.errors import InputError

Role: TypeAlias = Literal["student", "teacher"]
Span: TypeAlias = str | Sequence[int]
Layers: TypeAlias = int | Sequence[int]  # of a model: how many, or the indices of those that have attention
HeadGroups: TypeAlias = tuple[
    tuple[int, ...], ...
]  # for each head of the student the teacher's heads it is compared with

ROLES: tuple[str, ...] = get_args(Role)

# The authors' code lists layers per model instead of computing them; no rounding of 30-70 % yields its choice.
# Teacher spans cover every layer of the windows (starts 13..19 with g = 5 are layers 13..23).
OFFICIAL_LAYERS: dict[str, dict[int, range]] = {
    "student": {24: range(8, 15)},
    "teacher": {24: range(8, 16), 28: range(9, 18), 32: range(11, 20), 40: range(13, 24)},
}


class LayerMatch(NamedTuple):
    """One student layer and the teacher layers whose mean attention it is aligned with (0-based indices)."""

    student: int
    teachers: tuple[int, ...]
    heads: tuple[HeadGroups, ...] | None = None  # of every teacher layer; None: their mean, or each with its own number

    def groups_of(self, teacher: int) -> HeadGroups:
        """The matched heads of one of the teacher layers."""
        assert self.heads is not None
        return self.heads[self.teachers.index(teacher)]


def layer_range(num_layers: Layers, span: Span, *, role: Role = "student") -> tuple[int, ...]:
    """Indices of the layers of a model that are aligned (paper sections 3.1 and 5.3).

    ``num_layers`` is the model's number of layers, or, where some have no softmax attention, the indices of those that do
    (`cdistill.vat.attention_layers`): only they are counted. ``span`` is one of

    - ``"intermediate"`` (30-70 %, the paper's visual understanding layers): the ``round(0.4 * n)`` of n layers in
      the middle (halves round up; where they cannot be centred they lie one layer towards the input);
    - ``"early"`` (< 30 %) and ``"later"`` (> 70 %): the layers before and after those; ``"all"``: every layer;
    - ``"official"``: the layers the authors' code lists for its models (`OFFICIAL_LAYERS`); they depend on ``role``;
    - ``"8-14"``: the attention layers between two indices, both included; or a strictly increasing sequence of indices.

    Every named span holds at least one layer (early keeps the first, later the last layer of a one- or two-layer model)
    and never shrinks with depth, so that a teacher at least as deep as the student can always be group matched.

    Returns 0-based indices in increasing order, counted over all layers of the model. Raises ValueError for an unknown
    span, indices outside the model or of layers without attention.
    """
    model = _model_layers(num_layers)
    if role not in ROLES:
        raise InputError(f"role must be one of {', '.join(ROLES)}, got {role!r}")
    if not isinstance(span, str):
        return _explicit(model, tuple(span))
    if bounds := re.fullmatch(r"(\d+)-(\d+)", span):
        first, last = map(int, bounds.groups())
        if first > last:
            raise InputError(f"layer span {span!r} is empty: the first layer must not be after the last")
        return _between(model, first, last)
    if span not in NAMED_SPANS:
        raise InputError(
            f"layer span must be one of {', '.join(NAMED_SPANS)}, 'first-last' or a list of indices, got {span!r}"
        )
    return tuple(model[i] for i in _named(len(model), span, role))


def _model_layers(layers: Layers) -> tuple[int, ...]:
    if isinstance(layers, int):
        if layers < 1:
            raise InputError(f"num_layers must be at least 1, got {layers}")
        return tuple(range(layers))
    model = tuple(layers)
    if not model:
        raise InputError("the model has no attention layers")
    if list(model) != sorted(set(model)) or model[0] < 0:
        raise InputError(f"a model's attention layers must be strictly increasing indices, got {list(model)}")
    return model


def _named(num_layers: int, span: str, role: str) -> Sequence[int]:
    if span == "official":
        known = OFFICIAL_LAYERS[role]
        if num_layers not in known:
            depths = ", ".join(map(str, known))
            raise InputError(f"layer span 'official' knows {role}s of {depths} layers only, got {num_layers}")
        return known[num_layers]
    if span == "all":
        return range(num_layers)
    middle = max(1, (4 * num_layers + 5) // 10)
    first = (num_layers - middle) // 2
    if span == "early":
        return range(max(first, 1))
    if span == "later":
        return range(min(first + middle, num_layers - 1), num_layers)
    return range(first, first + middle)


def _between(model: tuple[int, ...], first: int, last: int) -> tuple[int, ...]:
    if last > model[-1] and model == tuple(range(len(model))):
        raise InputError(f"layer indices must lie in 0..{len(model) - 1}, got '{first}-{last}'")
    chosen = tuple(i for i in model if first <= i <= last)
    if not chosen:
        raise InputError(f"layer span '{first}-{last}' holds none of the attention layers {list(model)}")
    return chosen


def _explicit(model: tuple[int, ...], layers: tuple[int, ...]) -> tuple[int, ...]:
    if not layers:
        raise InputError("layer span is an empty list; name at least one layer")
    if any(isinstance(i, bool) or not isinstance(i, int) for i in layers):
        raise InputError(f"layer indices must be integers, got {list(layers)}")
    if list(layers) != sorted(set(layers)):
        raise InputError(f"layer indices must be strictly increasing, got {list(layers)}")
    if not set(layers) <= set(model):
        if model == tuple(range(len(model))):
            raise InputError(f"layer indices must lie in 0..{len(model) - 1}, got {list(layers)}")
        raise InputError(f"layer indices must be among the attention layers {list(model)}, got {list(layers)}")
    return layers


def match_layers(
    student_layers: Sequence[int],
    teacher_layers: Sequence[int],
    *,
    matching: Matching = "group",
    distances: Any = None,
) -> tuple[LayerMatch, ...]:
    """Match n student layers with m >= n teacher layers, in order (paper section 4.1 and appendix F).

    - ``group``: student layer i gets the window of g = m - n + 1 consecutive entries i..i+g-1 of ``teacher_layers``
      (stride 1, so every teacher layer is used).
    - ``simple``: one to one, uniformly sampled: entry ``floor((i + 1) * m / n) - 1``, which ends at the last layer
      (5 student and 10 teacher layers give every second teacher layer).
    - ``adaptive``: one to one by ``distances``, an (n, m) matrix of KL distances (nested sequence or tensor, see
      `cdistill.vat.LayerDistances`). Greedy in student order: each picks the nearest teacher layer after the previous
      pick that leaves at least one teacher layer for every student layer still to come; the earlier one wins a tie.

    Returns one `LayerMatch` per student layer. Raises ValueError when m < n and when ``distances`` is missing, of the
    wrong shape, not finite, or given for another matching.
    """
    n, m = len(student_layers), len(teacher_layers)
    if matching not in MATCHINGS:
        raise InputError(f"matching must be one of {', '.join(MATCHINGS)}, got {matching!r}")
    if n == 0:
        raise InputError("student_layers is empty; name at least one layer")
    if m < n:
        raise InputError(f"{matching} matching needs at least as many teacher as student layers, got {m} for {n}")
    if (distances is not None) != (matching == "adaptive"):
        raise InputError("distances belong to matching='adaptive', which needs them, and to no other matching")
    if matching == "group":
        g = m - n + 1
        windows = [tuple(teacher_layers[i : i + g]) for i in range(n)]
    elif matching == "simple":
        windows = [(teacher_layers[(i + 1) * m // n - 1],) for i in range(n)]
    else:
        windows = [(teacher_layers[j],) for j in _greedy(_matrix(distances, n, m))]
    return tuple(LayerMatch(s, w) for s, w in zip(student_layers, windows, strict=True))


def _matrix(distances: Any, n: int, m: int) -> list[list[float]]:
    rows = distances.tolist() if hasattr(distances, "tolist") else [list(row) for row in distances]
    if len(rows) != n or any(not isinstance(row, list) or len(row) != m for row in rows):
        raise InputError(f"distances must be an ({n}, {m}) matrix: student layers by teacher layers")
    if not all(math.isfinite(d) for row in rows for d in row):
        raise InputError("distances must be finite")
    return rows


def _greedy(distances: list[list[float]]) -> list[int]:
    n, m = len(distances), len(distances[0])
    picks: list[int] = []
    for i, row in enumerate(distances):
        allowed = range(picks[-1] + 1 if picks else 0, m - (n - 1 - i))
        picks.append(min(allowed, key=row.__getitem__))
    return picks


def by_layer(
    matches: Sequence[LayerMatch],
    targets: Sequence[Tensor],
    wanted: tuple[int, int, int],
    *,
    resampled: int | None = None,
) -> dict[int, Tensor]:
    """The targets of the student's layers; ``resampled`` is how many columns are made of theirs, if they are resampled.

    Raises ValueError unless each is of (samples, rows, visual tokens) ``wanted``.
    """
    if len(targets) != len(matches):
        raise InputError(f"targets must hold one tensor for each of the {len(matches)} matches, got {len(targets)}")
    for target in targets:
        columns = target.shape[-1] if resampled is None else resampled
        if (target.shape[0], target.shape[-2], columns) != wanted:
            raise InputError(
                f"targets must be (samples, rows, visual tokens) = {wanted} like the student's regions, got "
                f"{tuple(target.shape)}: teacher and student must see every image through equally many visual tokens, or "
                "resampling make these of the teacher's"
            )
    return {match.student: target for match, target in zip(matches, targets, strict=True)}
