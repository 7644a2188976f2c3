"""LLaVA composition from transformers parts, with or without teacher adapter fetch (TAF, `cdistill.models.taf`).

A student without TAF is the stock ``LlavaForConditionalGeneration``.
"""

from __future__ import annotations

import inspect
import json
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PretrainedConfig,
)
from transformers.models.auto.auto_factory import _get_model_class

from cdistill.errors import InputError
from cdistill.models.folder import one_line
from cdistill.models.taf import (
    MERGED,
    TAFAdapter,
    TAFLlavaConfig,
    TAFLlavaForConditionalGeneration,
    adapter_layers,
    stock_layers,
)

Llava = LlavaForConditionalGeneration

# What a student inherits of the LLaVA whose encoder it sees through, field by field of `LlavaConfig`.
INHERITED = (
    "vision_feature_layer",
    "vision_feature_select_strategy",
    "multimodal_projector_bias",
    "projector_hidden_act",
)


def register() -> None:
    """Let the auto classes of transformers load TAF students; may be called again."""
    AutoConfig.register(TAFLlavaConfig.model_type, TAFLlavaConfig, exist_ok=True)
    AutoModelForImageTextToText.register(TAFLlavaConfig, TAFLlavaForConditionalGeneration, exist_ok=True)


class VisualTokens(NamedTuple):
    """The visual tokens of one image, in order: positions that are no patches (class token, registers), then patches.

    ``dropped`` patches are missing at their front: what strategy ``default`` takes off an encoder without a class token.
    """

    total: int
    special: int
    dropped: int


def visual_tokens(config: Any, size: tuple[int, int] | None = None) -> VisualTokens | None:
    """What a LLaVA makes of an image of ``size`` (H, W) pixels, by default its encoder's own, read off the encoder itself.

    The encoder is run on the meta device. None where images keep sizes of their own (Pixtral).

    Raises:
        ValueError: the encoder does not take such images, or the model cannot run with what its configuration says.
    """
    vision = config.vision_config
    layers, strategy = config.vision_feature_layer, config.vision_feature_select_strategy
    if layers == 0:
        raise InputError("vision_feature_layer 0 must be written [0]: alone, transformers takes it for none")
    positions = encoder_positions(vision, size, layers if isinstance(layers, int) else tuple(layers))
    if positions is None:
        if strategy == "default":
            raise InputError(
                f"vision_feature_select_strategy default cannot be used with {vision.model_type}, which has no class token and "
                "puts all images into one row: it must be full"
            )
        return None
    count, patches = positions
    special, cut = max(0, count - patches), int(strategy == "default")
    return VisualTokens(count - cut, max(0, special - cut), max(0, cut - special))


def encoder_positions(
    vision: Any, size: tuple[int, int] | None = None, layers: int | tuple[int, ...] = -2
) -> tuple[int, int] | None:
    """Positions and patches of an encoder's features of an image of ``size`` (H, W); None if its images have any size."""
    key = json.dumps(vision.to_dict(), sort_keys=True, default=str)
    kind: Any = type(vision)
    return _positions(key, kind, None if size is None else tuple(size), layers)


def _encoder_class(vision: Any) -> Any:
    """The class of an encoder by its configuration. Raises ValueError if transformers has none."""
    if type(vision) not in AutoModel._model_mapping:
        raise InputError(f"vision_config.model_type {vision.model_type} is not a model of transformers' AutoModel")
    return _get_model_class(vision, AutoModel._model_mapping)


@lru_cache(maxsize=32)
def _positions(
    values: str, kind: Any, size: tuple[int, int] | None, layers: int | tuple[int, ...]
) -> tuple[int, int] | None:
    vision = kind.from_dict(json.loads(values))
    with torch.device("meta"):
        tower = _encoder_class(vision)(vision)  # from_config would shard it where ZeRO-3 is on
    if takes_image_sizes(tower):
        return None
    height, width = size or image_size(vision)
    where = f"vision_config.model_type {vision.model_type}"
    try:
        pixels = torch.empty(1, getattr(vision, "num_channels", 3), height, width, device="meta", dtype=tower.dtype)
        hidden = tower(pixels, output_hidden_states=True).hidden_states
    except (ValueError, TypeError, RuntimeError) as error:
        raise InputError(f"{where}: images of {height} x {width} pixels do not fit: {one_line(error)}") from None
    chosen = (layers,) if isinstance(layers, int) else layers
    for layer in chosen:
        if not -len(hidden) <= layer < len(hidden):
            raise InputError(
                f"vision_feature_layer {layer} does not exist: {where} has {len(hidden)} hidden states, the input included"
            )
    shapes = {tuple(hidden[layer].shape) for layer in chosen}
    if len(shapes) > 1 or len(next(iter(shapes))) != 3:
        raise InputError(f"{where}: hidden states of shapes {sorted(shapes)} are no visual tokens of a LLaVA")
    patch = getattr(vision, "patch_size", None)
    high, wide = (patch, patch) if isinstance(patch, int) else (patch or (1, 1))
    return next(iter(shapes))[1], (height // high) * (width // wide)


def image_size(vision: Any) -> tuple[int, int]:
    """Height and width in pixels of the images that an encoder's configuration names."""
    size = vision.image_size
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def has_field(config: PretrainedConfig, name: str) -> bool:
    """Whether models read a field of a configuration; transformers 5.17's SigLIP reads one that it does not declare."""
    return hasattr(config, name) or (config.model_type, name) == ("siglip_vision_model", "vision_use_head")


def takes_image_sizes(tower: Any) -> bool:
    """Whether an encoder takes images of several sizes in one batch, with ``image_sizes`` (I, 2) that tell them apart."""
    return "image_sizes" in inspect.signature(tower.forward).parameters


def compose(
    vision: PretrainedConfig,
    text: PretrainedConfig,
    *,
    image_token_id: int,
    image_seq_length: int | None = None,
    source: Any = None,
    teacher: Any = None,
    taf_activation: str = "linear",
) -> Llava:
    """A randomly initialised LLaVA of a vision encoder and a causal language model; with ``teacher``, a TAF student of it.

    It does with images what ``source`` does with them: feature layers, select strategy, kind of adapter (`INHERITED`).
    Without one it does as the paper, or as LLaVA where the encoder has a class token: the penultimate layer, and all
    positions but that one.

    Args:
        vision: configuration of the vision encoder, any that LLaVA can have.
        text: configuration of any causal language model of transformers.
        image_token_id: id that marks a visual token in ``input_ids``.
        image_seq_length: visual tokens per image; by default those that the encoder makes of images of its own size.
        source: a LLaVA whose way of seeing is inherited; by default ``teacher``.
        teacher: if given, the student fetches this model's adapter and vision encoder (both copied).
        taf_activation: `TAFLlavaConfig.taf_activation`.

    Raises:
        ValueError: the encoder cannot be used so, or the teacher's adapter cannot be fetched.
    """
    source = teacher if source is None else source
    common: dict[str, Any] = {
        "vision_config": vision,
        "text_config": text,
        "image_token_index": image_token_id,
        "tie_word_embeddings": text.tie_word_embeddings,
    }
    if source is None:
        common |= {"vision_feature_layer": -2, "vision_feature_select_strategy": _usual_strategy(vision)}
    else:
        common |= {name: getattr(source.config, name) for name in INHERITED}
    tokens = visual_tokens(LlavaConfig(**common))
    if image_seq_length is None and tokens is not None:
        image_seq_length = tokens.total
    if image_seq_length is not None:
        common["image_seq_length"] = image_seq_length
    if teacher is None:
        return LlavaForConditionalGeneration(LlavaConfig(**common))
    if taf_activation == MERGED:
        raise InputError(
            "taf_activation merged is what export makes of linear: a student is composed with linear or gelu"
        )
    layers, width = adapter_layers(teacher), teacher.config.text_config.hidden_size
    fetched: dict[str, Any] = {} if layers == stock_layers(teacher.config, width) else {"teacher_adapter": layers}
    model = TAFLlavaForConditionalGeneration(
        TAFLlavaConfig(teacher_hidden_size=width, taf_activation=taf_activation, **fetched, **common)
    )
    model.model.vision_tower.load_state_dict(teacher.model.vision_tower.state_dict())
    model.model.multi_modal_projector.fetch(teacher.model.multi_modal_projector)
    return model


def _usual_strategy(vision: Any) -> str:
    """``default``, which leaves the class token out, for an encoder that has one."""
    positions = encoder_positions(vision)
    return "full" if positions is None or positions[0] <= positions[1] else "default"


def vision_features(model: Llava, pixel_values: Tensor, image_sizes: Tensor | None = None) -> Tensor:
    """What a LLaVA gives its adapter of (I, 3, H, W) pixels: (I, V, d_v), or (1, V_1 + ... + V_I, d_v) of images of any size.

    The latter come padded to one size, with ``image_sizes`` (I, 2), their heights and widths.
    """
    return features_of(model.model.vision_tower, model.config, pixel_values, image_sizes)


def features_of(tower: Any, config: Any, pixel_values: Tensor, image_sizes: Tensor | None = None) -> Tensor:
    """`vision_features` of an encoder that is not in its place."""
    layers = config.vision_feature_layer
    sizes = {} if image_sizes is None else {"image_sizes": image_sizes}
    hidden = tower(pixel_values, output_hidden_states=True, **sizes).hidden_states
    features = [hidden[layer] for layer in ([layers] if isinstance(layers, int) else layers)]
    if config.vision_feature_select_strategy == "default":
        features = [x[:, 1:] for x in features]
    return features[0] if len(features) == 1 else torch.cat(features, -1)


@torch.no_grad()
def encode_images(model: Llava, pixel_values: Tensor, image_sizes: Tensor | None = None) -> Tensor:
    """`vision_features` of a frozen encoder, without gradient."""
    return vision_features(model, pixel_values, image_sizes)


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
        raise InputError(f"input_ids hold {int(found)} image tokens, the images give {wanted}")
    if tokens is None:
        return embeds
    return embeds.masked_scatter(mask.unsqueeze(-1), tokens.to(embeds.dtype))


class SharedVision(NamedTuple):
    """What student and teacher share of a batch's images: one pass of the encoder and, with TAF, of the teacher's adapter."""

    features: Tensor  # (I, V, d_v), or (1, V_1 + ... + V_I, d_v) of images of any size
    teacher_tokens: Tensor | None  # (I, V, d_T) or (1, V_1 + ... + V_I, d_T), with TAF
    shown: bool = True  # False where no sample has an image, and the modules ran for other processes' sake


def share_vision(
    student: Llava, pixel_values: Tensor | None, image_sizes: Tensor | None = None, *, idle: bool = False
) -> SharedVision | None:
    """Look at (I, 3, H, W) pixels with the frozen parts of the student that are also the teacher's; None without images.

    ``image_sizes`` (I, 2) come with images of several sizes, where the encoder takes such (`vision_features`).

    With ``idle`` a blank is looked at where there are none: every process must have the same graph, and another one may have
    images (`cdistill.train.blank`).
    """
    shown = pixel_values is not None
    if pixel_values is None:
        if not idle:
            return None
        vision: Any = student.config.vision_config
        size = (vision.patch_size,) * 2 if takes_image_sizes(student.model.vision_tower) else image_size(vision)
        pixel_values = next(student.parameters()).new_zeros(1, vision.num_channels, *size)
    features = encode_images(student, pixel_values, image_sizes)
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
