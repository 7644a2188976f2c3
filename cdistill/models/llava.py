"""LLaVA composition from transformers parts, with or without teacher adapter fetch (TAF, `cdistill.models.taf`).

A student without TAF is the stock ``LlavaForConditionalGeneration``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PretrainedConfig,
)

from cdistill.models.taf import MERGED, TAFAdapter, TAFLlavaConfig, TAFLlavaForConditionalGeneration

Llava = LlavaForConditionalGeneration


def register() -> None:
    """Let the auto classes of transformers load TAF students; may be called again."""
    AutoConfig.register(TAFLlavaConfig.model_type, TAFLlavaConfig, exist_ok=True)
    AutoModelForImageTextToText.register(TAFLlavaConfig, TAFLlavaForConditionalGeneration, exist_ok=True)


def compose(
    vision: PretrainedConfig,
    text: PretrainedConfig,
    *,
    image_token_id: int,
    image_seq_length: int,
    teacher: Any = None,
    taf_activation: str = "linear",
) -> Llava:
    """A randomly initialised LLaVA of a vision encoder and a causal language model; with ``teacher``, a TAF student of it.

    Args:
        vision: SigLIP (or CLIP) vision configuration; its penultimate layer is used, all positions of it.
        text: configuration of any causal language model of transformers.
        image_token_id: id that marks a visual token in ``input_ids``.
        image_seq_length: visual tokens per image.
        teacher: if given, the student fetches this model's adapter and vision encoder (both copied).
        taf_activation: `TAFLlavaConfig.taf_activation`.
    """
    common: dict[str, Any] = {
        "vision_config": vision,
        "text_config": text,
        "image_token_index": image_token_id,
        "image_seq_length": image_seq_length,
        "vision_feature_select_strategy": "full",
        "vision_feature_layer": -2,
        "tie_word_embeddings": text.tie_word_embeddings,
    }
    if teacher is None:
        return LlavaForConditionalGeneration(LlavaConfig(**common))
    if taf_activation == MERGED:
        raise ValueError(
            "taf_activation merged is what export makes of linear: a student is composed with linear or gelu"
        )
    width = teacher.config.text_config.hidden_size
    model = TAFLlavaForConditionalGeneration(
        TAFLlavaConfig(teacher_hidden_size=width, taf_activation=taf_activation, **common)
    )
    model.model.vision_tower.load_state_dict(teacher.model.vision_tower.state_dict())
    model.model.multi_modal_projector.fetch(teacher.model.multi_modal_projector)
    return model


def encode_images(model: Llava, pixel_values: Tensor) -> Tensor:
    """The frozen vision encoder's features of the model's feature layer: (I, 3, H, W) pixels to (I, V, d_v), no gradient."""
    with torch.no_grad():
        hidden = model.model.vision_tower(pixel_values, output_hidden_states=True).hidden_states
    return hidden[model.config.vision_feature_layer]


def merge_visual_tokens(model: Llava, input_ids: Tensor, tokens: Tensor | None) -> Tensor:
    """Input embeddings (B, T, d) with the visual tokens (I, V, d) put where ``input_ids`` holds the image token, in order.

    Raises:
        ValueError: the number of image tokens in ``input_ids`` is not I * V.
    """
    embeds = model.get_input_embeddings()(input_ids)
    mask = input_ids == model.config.image_token_id
    wanted = 0 if tokens is None else tokens.shape[0] * tokens.shape[1]
    if input_ids.device.type == "cpu" and int(mask.sum()) != wanted:
        raise ValueError(f"input_ids hold {int(mask.sum())} image tokens, the images give {wanted}")
    if tokens is None:
        return embeds
    return embeds.masked_scatter(mask.unsqueeze(-1), tokens.to(embeds.dtype))


def shared_embeddings(
    student: Llava, teacher: Llava | None, input_ids: Tensor, pixel_values: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Input embeddings of student (B, T, d_S) and teacher (B, T, d_T) from one pass of vision encoder and teacher adapter.

    Student and teacher share one frozen encoder (`check_pair`); with TAF they share P_T too.
    """
    if pixel_values is None:
        teacher_embeds = merge_visual_tokens(teacher, input_ids, None) if teacher is not None else None
        return merge_visual_tokens(student, input_ids, None), teacher_embeds
    features = encode_images(student, pixel_values)
    adapter = student.model.multi_modal_projector
    if teacher is None:
        return merge_visual_tokens(student, input_ids, adapter(features)), None
    with torch.no_grad():
        teacher_tokens = teacher.model.multi_modal_projector(features)
        teacher_embeds = merge_visual_tokens(teacher, input_ids, teacher_tokens)
    tokens = adapter.from_teacher_tokens(teacher_tokens) if isinstance(adapter, TAFAdapter) else adapter(features)
    return merge_visual_tokens(student, input_ids, tokens), teacher_embeds


def check_pair(student: Llava, teacher: Llava) -> None:
    """Raise ValueError unless the two models can be distilled: same image token, vocabulary, visual tokens, encoder and P_T."""
    ours, theirs = student.config, teacher.config
    if ours.image_token_id != theirs.image_token_id:
        raise ValueError(f"image_token_id differs: student {ours.image_token_id}, teacher {theirs.image_token_id}")
    if ours.image_seq_length != theirs.image_seq_length:
        raise ValueError(
            f"image_seq_length differs: student {ours.image_seq_length}, teacher {theirs.image_seq_length} visual tokens"
        )
    if not _equal(student.model.vision_tower, teacher.model.vision_tower):
        raise ValueError("vision_tower differs: student and teacher must share one frozen vision encoder")
    adapter = student.model.multi_modal_projector
    if isinstance(adapter, TAFAdapter):
        fetched = [p for layer in (adapter.teacher[0], adapter.teacher[2]) for p in layer.parameters()]
        trained = list(teacher.model.multi_modal_projector.parameters())
        same = len(fetched) == len(trained) and all(
            torch.equal(a.to(b.dtype), b) for a, b in zip(fetched, trained, strict=True)
        )
        if not same:
            raise ValueError("multi_modal_projector differs: the student's fetched adapter is not this teacher's")


def _equal(a: nn.Module, b: nn.Module) -> bool:
    mine, theirs = a.state_dict(), b.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[k].to(theirs[k].dtype), theirs[k]) for k in mine)
