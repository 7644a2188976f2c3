"""Products of the logits of visual tokens, from hidden states and the head's weight, without the logits.

With hidden states X (V, H) and a head of weight W (vocabulary, H) and bias b the logits are L = X W^T + 1 b^T, so that
L L^T = X G X^T + X u 1^T + 1 (X u)^T + b^T b with G = W^T W (H, H) and u = W^T b: nothing as long as the vocabulary is held.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cdistill.models.parts import head_of
from cdistill.train.inside import instead_of_forward, make_replaceable
from cdistill.train.step import Step

BLOCK = 4096  # rows of a head in fp32 at a time


class _Gram(torch.autograd.Function):
    """W^T W (H, H) fp32 of a weight (n, H) of any dtype."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        total = weight.new_zeros(weight.shape[1], weight.shape[1], dtype=torch.float32)
        for block in weight.split(BLOCK):
            rows = block.float()
            total.addmm_(rows.mT, rows)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        (weight,) = ctx.saved_tensors
        both, result = grad + grad.mT, torch.empty_like(weight)
        for block, out in zip(weight.split(BLOCK), result.split(BLOCK), strict=True):
            out.copy_(block.float() @ both)
        return result


def _products(hidden: Tensor, head: nn.Linear, vocabulary: int, counts: tuple[int, ...]) -> list[Tensor]:
    """L L^T (V, V) fp32 of every sample with visual tokens, of hidden (M, H); tokens from ``vocabulary`` on are padding."""
    hidden, weight = hidden.float(), head.weight[:vocabulary].to(hidden.device)
    left, bias = hidden @ _Gram.apply(weight), None if head.bias is None else head.bias[:vocabulary].to(weight)
    found = []
    for x, xg in zip(hidden.split(counts), left.split(counts), strict=True):
        if len(x):
            product = xg @ x.mT
            if bias is not None:
                along = x @ (weight.mT @ bias).float()
                product = product + along[:, None] + along + bias.float().square().sum()
            found.append(product)
    return found


def distance_of_relations(step: Step) -> Tensor:
    """Sum over samples of 1 - cosine between student's and teacher's products of logits at visual tokens."""
    head, teacher, counts = head_of(step.student), step.teacher, step.visual_places.counts
    assert teacher is not None and teacher.visual is not None and teacher.head is not None
    theirs, open_head = teacher.visual, teacher.head
    make_replaceable(head)  # what gathers its weight is a hook on its call

    def distance(hidden: Tensor) -> Tensor:
        with open_head() as of_teacher, torch.autocast(hidden.device.type, enabled=False):
            vocabulary = min(len(head.weight), len(of_teacher.weight))
            with torch.no_grad():
                targets = _products(theirs, of_teacher, vocabulary, counts)
            pairs = zip(_products(hidden, head, vocabulary, counts), targets, strict=True)
            losses = [1.0 - F.cosine_similarity(ours.flatten(), target.flatten(), dim=0) for ours, target in pairs]
            return torch.stack(losses).sum() if losses else 0.0 * hidden.float().sum()

    return head(step.visual, **instead_of_forward(distance))
