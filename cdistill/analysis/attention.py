"""Where a model looks when it answers: visual attention of the row that predicts the answer (paper section 3)."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from cdistill.data.samples import IGNORE_INDEX
from cdistill.vat import LayerMatch, Regions, SliceRecorder, installed, layer_range, match_layers, token_regions
from cdistill.vat.hook import KEYWORD


def depth(model: PreTrainedModel) -> int:
    """Attention layers of a model's language model."""
    return model.config.get_text_config(decoder=True).num_hidden_layers


def visual_understanding_layers(model: PreTrainedModel) -> tuple[int, ...]:
    """0-based indices of the middle 30-70 % of a model's attention layers (paper section 3.1)."""
    return layer_range(depth(model), "intermediate")


def aligned_layers(student: PreTrainedModel, teacher: PreTrainedModel) -> tuple[LayerMatch, ...]:
    """Group matching of the visual understanding layers, as the default alignment has it (paper section 4.1)."""
    return match_layers(visual_understanding_layers(student), visual_understanding_layers(teacher))


def answer_regions(batch: dict[str, Tensor], image_token_id: int) -> Regions:
    """The one row that predicts the first answer token of every sample, (B, 1), and the visual columns (B, V).

    ``batch`` holds ``input_ids``, ``labels`` (-100 outside the answer) and ``attention_mask``, all (B, T).
    """
    regions = token_regions(
        batch["input_ids"], batch["labels"], batch["attention_mask"], visual_token_ids=image_token_id
    )
    first = (batch["labels"] != IGNORE_INDEX).int().argmax(1, keepdim=True)
    return Regions((first - 1).to(torch.int32), regions.cols)


@torch.no_grad()
def answer_attention(model: PreTrainedModel, batch: dict[str, Tensor], layers: Collection[int] | None = None) -> Tensor:
    """Attention to the visual tokens from the position that predicts the answer, mean over heads.

    Args:
        model: LLaVA.
        batch: collated single questions about one image each, with ``labels``.
        layers: 0-based indices, all by default.

    Returns:
        (L, B, V) fp32 on the CPU, layers in increasing order; a sum over V is the share of attention on the image.
    """
    device = next(model.parameters()).device
    chosen = range(depth(model)) if layers is None else layers
    batch = {name: value.to(device) for name, value in batch.items()}
    regions = answer_regions(batch, model.config.image_token_id)
    recorder = SliceRecorder(chosen, regions, key_mask=batch["attention_mask"])
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    with installed(model):
        model.model(**inputs, use_cache=False, **{KEYWORD: recorder})
    return torch.stack([a[:, 0] for a in recorder.slices.values()]).cpu()


@dataclass(frozen=True)
class AttentionSimilarity:
    """How alike teacher and student look at the image when they answer.

    Attributes:
        layers: (student layers, teacher layers) mean cosine similarity over the questions.
        aligned: per matched student layer, similarity to the mean over its window of teacher layers.
        matches: the windows.
    """

    layers: list[list[float]]
    aligned: list[float]
    matches: tuple[LayerMatch, ...]


def attention_similarity(
    students: Sequence[PreTrainedModel], teacher: PreTrainedModel, data: Iterable[dict[str, Tensor]]
) -> list[AttentionSimilarity]:
    """Cosine similarity of every student's attention with the teacher's, from the answer to the image (paper figure 2).

    ``data`` yields collated batches of single questions; the teacher is run once for all students.
    """
    matches = [aligned_layers(student, teacher) for student in students]
    layer_sums = [torch.zeros(depth(student), depth(teacher)) for student in students]
    aligned_sums = [torch.zeros(len(match)) for match in matches]
    total = 0
    for batch in data:
        target = answer_attention(teacher, batch)
        total += target.shape[1]
        for i, student in enumerate(students):
            seen = answer_attention(student, batch)
            layer_sums[i] += F.cosine_similarity(seen[:, None], target[None], dim=-1).sum(-1)
            for j, match in enumerate(matches[i]):
                window = target[list(match.teachers)].mean(0)
                aligned_sums[i][j] += F.cosine_similarity(seen[match.student], window, dim=-1).sum()
    if not total:
        raise ValueError("data holds no batch")
    return [
        AttentionSimilarity((layers / total).tolist(), (aligned / total).tolist(), match)
        for layers, aligned, match in zip(layer_sums, aligned_sums, matches, strict=True)
    ]
