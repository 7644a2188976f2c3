"""Which heads of the teacher each head of the student is aligned with, where the numbers differ (the paper's future work).

A head of the student is compared with the mean of a group of the teacher's heads: neighbours, or the one that the best
assignment gives it; or with a convex mixture of all heads of its window, whose weights are trained with the student.
"""

from collections.abc import Mapping, Sequence
from functools import reduce
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cdistill.ops import attention_slice, slice_alignment
from cdistill.vat.matching import HeadGroups, LayerMatch


class HeadCounts(NamedTuple):
    """Query heads of an attention layer of both models."""

    student: int
    teacher: int


def head_counts(student: Any, teacher: Any) -> HeadCounts:
    """Of two models of transformers, by their configurations."""
    counts = (model.config.get_text_config(decoder=True).num_attention_heads for model in (student, teacher))
    return HeadCounts(*map(int, counts))


def group_heads(student: int, teacher: int) -> HeadGroups:
    """Contiguous groups of the teacher's heads, in order, every head in one of them.

    Sizes differ by one at most. Where the student has more heads, several neighbours of its heads share one of the teacher's.
    """
    starts = [i * teacher // student for i in range(student + 1)]
    return tuple(tuple(range(first, max(stop, first + 1))) for first, stop in pairwise(starts))


def assign_heads(distances: Tensor) -> HeadGroups:
    """The assignment of one of the teacher's heads to each of the student's whose distances have the least sum.

    ``distances`` is (student's heads, teacher's heads). No head of the teacher is given twice; where the student has more,
    each is given as evenly as can be, ``ceil(student / teacher)`` times at most.
    """
    import networkx

    count, others = distances.shape
    places = others * -(-count // others)  # of which number j is the teacher's head j modulo its heads
    graph = networkx.Graph()
    for i, row in enumerate(distances.tolist()):
        graph.add_weighted_edges_from((i, count + j, -row[j % others]) for j in range(places))
    pairs = (sorted(pair) for pair in networkx.max_weight_matching(graph, maxcardinality=True))
    found = {i: (place - count) % others for i, place in pairs}
    return tuple((found[i],) for i in range(count))


def with_groups(matches: Sequence[LayerMatch], counts: HeadCounts) -> tuple[LayerMatch, ...]:
    """The matches with contiguous groups of heads, the same in all layers."""
    groups = group_heads(*counts)
    return tuple(match._replace(heads=(groups,) * len(match.teachers)) for match in matches)


def mean_of_groups(slices: Tensor, groups: HeadGroups) -> Tensor:
    """(B,Hs,R,V) the mean over every student head's group of the teacher's slices (B,Ht,R,V); one head's slice bit for bit."""
    total = None
    for place in range(max(map(len, groups))):
        chosen = [group[min(place, len(group) - 1)] for group in groups]
        shares = [1.0 / len(group) if place < len(group) else 0.0 for group in groups]
        part = slices[:, chosen]
        if any(share != 1.0 for share in shares):
            part.mul_(torch.tensor(shares, device=slices.device)[:, None, None])
        total = part if total is None else total.add_(part)
    assert total is not None
    return total


def heads_of_layers(
    match: LayerMatch, layers: Sequence[tuple[Tensor, Tensor, float | None]]
) -> list[tuple[Tensor, Tensor, float | None]]:
    """Queries and keys (B,H,T,D) and scales of a window's layers with the heads that the student's are compared with.

    Place by place, all groups being equally large: (B,Hs,T,D), a key head for every query head; as they are without matched
    heads.
    """
    if match.heads is None:
        return list(layers)
    found = []
    for (q, k, scale), groups in zip(layers, match.heads, strict=True):
        shared = q.shape[1] // k.shape[1]
        for chosen in zip(*groups, strict=True):
            found.append((q[:, list(chosen)], k[:, [head // shared for head in chosen]], scale))
    return found


def alignment_with_trained_target(
    q: Tensor,
    k: Tensor,
    target: Tensor,
    rows: Tensor,
    cols: Tensor,
    *,
    loss: str,
    reduction: str,
    sink_filter: bool,
    heads: str,
    scale: float | None,
    **how: Any,
) -> Tensor:
    """As `attention_alignment`, where the target has a gradient, too."""
    a = attention_slice(q, k, rows, cols, heads=heads, scale=scale, **how)
    return slice_alignment(a, target, rows, cols, loss=loss, reduction=reduction, sink_filter=sink_filter, **how)


class HeadMixture(nn.Module):
    """The target of every student head as a convex mixture of all teacher heads of its window, with trained weights.

    The weights are the softmax of logits, which begin as equal. A logit is `SPEED` times its parameter: Adam moves a parameter
    by its learning rate at most in each step, and those of language models would leave the mixture where it begins.
    """

    SPEED = 100.0

    def __init__(self, matches: Sequence[LayerMatch], counts: HeadCounts):
        super().__init__()
        self.matches, window = tuple(matches), len(matches[0].teachers)
        self.logits = nn.Parameter(torch.zeros(len(self.matches), counts.student, window, counts.teacher))

    def weights(self) -> Tensor:
        """(matches, student's heads, window, teacher's heads) fp32, with sum one over the last two."""
        return (self.SPEED * self.logits.float()).flatten(2).softmax(-1).view_as(self.logits)

    def forward(self, slices: Mapping[int, Tensor] | None) -> list[Tensor]:
        """Targets (B,Hs,R,V) fp32 of the matches, with gradient, from the teacher's slices (B,Ht,R,V) by layer.

        Without slices a zero with gradient for each match, so that all processes have one.
        """
        weights = self.weights()
        if slices is None:
            return list(0.0 * weights.sum((1, 2, 3)))
        with torch.autocast(weights.device.type, enabled=False):
            return [
                _mixed(of_match, [slices[layer] for layer in match.teachers])
                for of_match, match in zip(weights, self.matches, strict=True)
            ]


def _mixed(weights: Tensor, window: Sequence[Tensor]) -> Tensor:
    """(B,Hs,R,V) by weights (Hs,g,Ht) of a window's slices (B,Ht,R,V)."""
    parts = (w @ slices.flatten(2) for w, slices in zip(weights.unbind(1), window, strict=True))
    return reduce(torch.add, parts).unflatten(2, window[0].shape[2:])
