"""LLaVA composition from transformers parts, and the teacher adapter fetch (TAF) that gives a student its teacher's adapter.

A student without TAF is the stock ``LlavaForConditionalGeneration``. With TAF (paper section 4.2, SPEC section 3) its visual
tokens are M(P_T(f(image))): f the frozen vision encoder, P_T the teacher's frozen adapter, M a light trainable map d_T -> d_S.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PretrainedConfig,
)
from transformers.activations import ACT2FN
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

TAF_ACTIVATIONS = ("linear", "gelu")


class TAFLlavaConfig(LlavaConfig):
    """Configuration of a TAF student.

    Attributes:
        teacher_hidden_size: width d_T of the teacher's adapter output.
        taf_activation: ``linear`` for M = Linear (the authors' code), ``gelu`` for M = GELU + Linear.
    """

    model_type = "cdistill_taf_llava"

    teacher_hidden_size: int = 0
    taf_activation: str = "linear"


class TAFAdapter(nn.Module):
    """M(P_T(features)): (..., d_v) encoder features to (..., d_S) visual tokens of the student."""

    def __init__(self, config: TAFLlavaConfig) -> None:
        super().__init__()
        if config.taf_activation not in TAF_ACTIVATIONS:
            raise ValueError(
                f"taf_activation must be one of {', '.join(TAF_ACTIVATIONS)}, got {config.taf_activation!r}"
            )
        if config.teacher_hidden_size < 1:
            raise ValueError(f"teacher_hidden_size must be positive, got {config.teacher_hidden_size}")
        width, bias = config.teacher_hidden_size, config.multimodal_projector_bias
        vision: Any = config.vision_config
        text: Any = config.text_config
        self.teacher = nn.Sequential(
            nn.Linear(vision.hidden_size, width, bias=bias),
            ACT2FN[config.projector_hidden_act],
            nn.Linear(width, width, bias=bias),
        )
        self.act = nn.GELU() if config.taf_activation == "gelu" else nn.Identity()
        self.map = nn.Linear(width, text.hidden_size)

    def fetch(self, teacher_adapter: LlavaMultiModalProjector) -> None:
        """Copy the teacher's trained adapter into P_T.

        Raises:
            ValueError: the teacher's adapter has other widths than this model was built for.
        """
        pairs: list[tuple[Any, Any]] = [
            (self.teacher[0], teacher_adapter.linear_1),
            (self.teacher[2], teacher_adapter.linear_2),
        ]
        for mine, theirs in pairs:
            if mine.weight.shape != theirs.weight.shape:
                raise ValueError(
                    f"teacher adapter is {tuple(theirs.weight.shape)}, this student was built for {tuple(mine.weight.shape)}"
                )
            mine.load_state_dict(theirs.state_dict())

    def from_teacher_tokens(self, tokens: Tensor) -> Tensor:
        """M alone: (..., d_T) visual tokens that the teacher's adapter already made, to (..., d_S)."""
        return self.map(self.act(tokens))

    def forward(self, features: Tensor) -> Tensor:
        return self.from_teacher_tokens(self.teacher(features))


class TAFLlavaForConditionalGeneration(LlavaForConditionalGeneration):
    """LLaVA whose multimodal projector is a `TAFAdapter`; otherwise the stock model, ``generate`` and saving included."""

    config: TAFLlavaConfig
    config_class = TAFLlavaConfig

    def __init__(self, config: TAFLlavaConfig) -> None:
        super().__init__(config)
        self.model.multi_modal_projector = TAFAdapter(config)
        self.post_init()


AutoConfig.register(TAFLlavaConfig.model_type, TAFLlavaConfig, exist_ok=True)
AutoModelForImageTextToText.register(TAFLlavaConfig, TAFLlavaForConditionalGeneration, exist_ok=True)

Llava = LlavaForConditionalGeneration


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


def share_vision(student: Llava, pixel_values: Tensor | None) -> SharedVision | None:
    """Look at (I, 3, H, W) pixels with the frozen parts of the student that are also the teacher's; None without images."""
    if pixel_values is None:
        return None
    features = encode_images(student, pixel_values)
    adapter = student.model.multi_modal_projector
    if not isinstance(adapter, TAFAdapter):
        return SharedVision(features, None)
    with torch.no_grad():
        return SharedVision(features, adapter.teacher(features))


def student_embeddings(student: Llava, input_ids: Tensor, shared: SharedVision | None) -> Tensor:
    """The student's input embeddings (B, T, d_S)."""
    if shared is None:
        return merge_visual_tokens(student, input_ids, None)
    adapter = student.model.multi_modal_projector
    if shared.teacher_tokens is not None:
        return merge_visual_tokens(student, input_ids, adapter.from_teacher_tokens(shared.teacher_tokens))
    return merge_visual_tokens(student, input_ids, adapter(shared.features))


@torch.no_grad()
def teacher_embeddings(teacher: Llava, input_ids: Tensor, shared: SharedVision | None) -> Tensor:
    """The teacher's input embeddings (B, T, d_T); its vision encoder is not used, nor is its adapter with TAF."""
    tokens = None if shared is None else shared.teacher_tokens
    if shared is not None and tokens is None:
        dtype = next(teacher.model.multi_modal_projector.parameters()).dtype
        tokens = teacher.model.multi_modal_projector(shared.features.to(dtype))
    return merge_visual_tokens(teacher, input_ids, tokens)
