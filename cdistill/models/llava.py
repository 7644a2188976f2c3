"""LLaVA composition from transformers parts, with or without teacher adapter fetch (TAF, `cdistill.models.taf`).

A student without TAF is the stock ``LlavaForConditionalGeneration``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
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
    """The frozen vision encoder's features of the model's feature layers: (I, 3, H, W) pixels to (I, V, d_v), no gradient."""
    layers = model.config.vision_feature_layer
    with torch.no_grad():
        hidden = model.model.vision_tower(pixel_values, output_hidden_states=True).hidden_states
    features = [hidden[layer] for layer in ([layers] if isinstance(layers, int) else layers)]
    if model.config.vision_feature_select_strategy == "default":  # without the class token
        features = [x[:, 1:] for x in features]
    return features[0] if len(features) == 1 else torch.cat(features, -1)


def merge_visual_tokens(model: Llava, input_ids: Tensor, tokens: Tensor | None) -> Tensor:
    """Input embeddings (B, T, d) with the visual tokens (I, V, d) put where ``input_ids`` holds the image token, in order.

    Raises:
        ValueError: the number of image tokens in ``input_ids`` is not I * V (on CUDA a device-side assertion).
    """
    embeds = model.get_input_embeddings()(input_ids)
    mask = input_ids == model.config.image_token_id
    wanted = 0 if tokens is None else tokens.shape[0] * tokens.shape[1]
    found = mask.sum()
    if input_ids.device.type != "cpu":
        torch._assert_async(found == wanted, "input_ids hold another number of image tokens than the images give")
    elif int(found) != wanted:
        raise ValueError(f"input_ids hold {int(found)} image tokens, the images give {wanted}")
    if tokens is None:
        return embeds
    return embeds.masked_scatter(mask.unsqueeze(-1), tokens.to(embeds.dtype))


class SharedVision(NamedTuple):
    """What student and teacher share of a batch's images: one pass of the encoder and, with TAF, of the teacher's adapter."""

    features: Tensor  # (I, V, d_v)
    teacher_tokens: Tensor | None  # (I, V, d_T), with TAF
    shown: bool = True  # False where no sample has an image, and the modules ran for other processes' sake


def share_vision(student: Llava, pixel_values: Tensor | None, *, idle: bool = False) -> SharedVision | None:
    """Look at (I, 3, H, W) pixels with the frozen parts of the student that are also the teacher's; None without images.

    With ``idle`` a blank is looked at where there are none: every process must have the same graph, and another one may have
    images (`cdistill.train.blank`).
    """
    shown = pixel_values is not None
    if pixel_values is None:
        if not idle:
            return None
        vision: Any = student.config.vision_config
        size = (1, vision.num_channels, vision.image_size, vision.image_size)
        pixel_values = next(student.parameters()).new_zeros(size)
    features = encode_images(student, pixel_values)
    adapter = student.model.multi_modal_projector
    if not isinstance(adapter, TAFAdapter):
        return SharedVision(features, None, shown)
    with torch.no_grad():
        return SharedVision(features, adapter.teacher(features), shown)


def student_embeddings(student: Llava, input_ids: Tensor, shared: SharedVision | None) -> Tensor:
    """The student's input embeddings (B, T, d_S)."""
    adapter = student.model.multi_modal_projector
    tokens = None
    if shared is not None:
        fetched = shared.teacher_tokens
        tokens = adapter(shared.features) if fetched is None else adapter.from_teacher_tokens(fetched)
    return _embeddings(student, input_ids, shared, tokens)


@torch.no_grad()
def teacher_embeddings(teacher: Llava, input_ids: Tensor, shared: SharedVision | None) -> Tensor:
    """The teacher's input embeddings (B, T, d_T); its vision encoder is not used, nor is its adapter with TAF."""
    tokens = None if shared is None else shared.teacher_tokens
    if shared is not None and tokens is None:
        dtype = next(teacher.model.multi_modal_projector.parameters()).dtype
        tokens = teacher.model.multi_modal_projector(shared.features.to(dtype))
    return _embeddings(teacher, input_ids, shared, tokens)


def _embeddings(model: Llava, input_ids: Tensor, shared: SharedVision | None, tokens: Tensor | None) -> Tensor:
    if shared is None or shared.shown:
        return merge_visual_tokens(model, input_ids, tokens)
    assert tokens is not None
    embeds = merge_visual_tokens(model, input_ids, None)  # refuses image tokens
    nowhere = torch.zeros_like(input_ids, dtype=torch.bool).unsqueeze(-1)
    return embeds.masked_scatter(nowhere, tokens.to(embeds.dtype))  # as in `merge_visual_tokens`: the same graph
