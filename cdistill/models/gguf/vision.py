"""A LLaVA's encoder and adapter in llama.cpp's terms (projector ``mlp``), and what it cannot express."""

from __future__ import annotations

import re
from typing import Any

import torch
from gguf import MODEL_ARCH, GGUFWriter, get_tensor_name_map
from torch import Tensor

from cdistill.errors import InputError
from cdistill.models.gguf.tensors import FILE_TYPES, Entry, Kind, entry
from cdistill.models.processor import COMPOSITIONS, image_pixels
from cdistill.models.published import published_name, weight_rules
from cdistill.models.taf import MERGED

# An encoder's activation as a field of the file; without one llama.cpp takes the first. Its GELU is the one with tanh.
_ACTIVATIONS = {"quick_gelu": None, "gelu": "use_gelu", "gelu_pytorch_tanh": "use_gelu", "silu": "use_silu"}
_GELU = ("gelu", "gelu_pytorch_tanh", "gelu_new")
_ENCODER = "siglip_vision_model"
_BICUBIC = 3  # as Pillow numbers it
_LAYER = re.compile(r"\.encoder\.layers\.(\d+)\.")


def check_vision(config: Any) -> None:
    """Raise ValueError naming the field of a multimodal model that llama.cpp's projector ``mlp`` cannot express."""
    if config.model_type not in COMPOSITIONS:
        raise InputError(f"model: model_type {config.model_type} is not written for llama.cpp; known is llava")
    vision = config.vision_config
    if vision.model_type == "clip_vision_model":  # ggml-org/llama.cpp 25814
        raise InputError(
            "model: vision_config.model_type clip_vision_model: llama.cpp takes the class token for a patch and drops the first"
        )
    if vision.model_type != _ENCODER:
        raise InputError(
            f"model: vision_config.model_type {vision.model_type} is no encoder of llama.cpp's LLaVA; known is {_ENCODER}"
        )
    if vision.hidden_act not in _ACTIVATIONS:
        raise InputError(f"model: vision_config.hidden_act {vision.hidden_act} is not in llama.cpp's encoder")
    if not isinstance(vision.image_size, int) or vision.image_size % vision.patch_size:
        raise InputError(
            f"model: vision_config.image_size {vision.image_size}: llama.cpp takes square images of whole patches"
        )
    if config.vision_feature_select_strategy != "full":
        raise InputError(
            f"model: vision_feature_select_strategy {config.vision_feature_select_strategy}: llama.cpp keeps all patches of "
            f"{_ENCODER}, it must be full"
        )
    encoder_layers(config)
    if getattr(config, "taf_activation", MERGED) != "linear":  # which may be merged
        check_adapter(config)


def check_adapter(config: Any) -> None:
    """Raise ValueError naming the field of an adapter, merged where it can be, that llama.cpp's ``mlp`` cannot express."""
    kind = getattr(config, "taf_activation", MERGED)
    if kind != MERGED:
        raise InputError(
            f"model: taf_activation {kind}: llama.cpp's mlp has two layers, and a map of TAF that cannot be merged makes more"
        )
    if config.projector_hidden_act not in _GELU:
        raise InputError(f"model: projector_hidden_act {config.projector_hidden_act}: llama.cpp's mlp has gelu alone")


def encoder_layers(config: Any) -> list[int]:
    """After how many of the encoder's layers features are taken, each of which the adapter gets side by side.

    Raises ValueError naming the field.
    """
    chosen, total = config.vision_feature_layer, config.vision_config.num_hidden_layers
    chosen = [chosen] if isinstance(chosen, int) else list(chosen)
    layers = [layer if layer >= 0 else total + 1 + layer for layer in chosen]
    if layers != sorted(set(layers)) or not 1 <= layers[0] <= layers[-1] <= total:
        raise InputError(
            f"model: vision_feature_layer {chosen}: llama.cpp takes features after layers 1 to {total}, in their order"
        )
    return layers


def vision_writer(config: Any, images: Any) -> GGUFWriter:
    """A writer with the fields of an encoder and an adapter.

    Args:
        config: the LLaVA's, as `check_vision` passes it.
        images: its image processor.

    Raises:
        ValueError: the processor makes images of another size than the encoder's.
    """
    vision, layers = config.vision_config, encoder_layers(config)
    made = image_pixels(images, vision)
    if made != (vision.image_size, vision.image_size):
        raise InputError(
            f"model: its image processor makes {made[0]} x {made[1]} pixels, llama.cpp those of vision_config.image_size "
            f"{vision.image_size}"
        )
    writer = GGUFWriter(None, "clip")  # type: ignore[arg-type]
    writer.add_type("mmproj")
    writer.add_file_type(FILE_TYPES["f16"])
    writer.add_clip_has_vision_encoder(True)
    writer.add_clip_projector_type("mlp")
    writer.add_bool("clip.has_llava_projector", True)  # what llama.cpp wanted before it had types of projectors
    writer.add_vision_projection_dim(config.text_config.hidden_size)
    writer.add_vision_image_size(vision.image_size)
    writer.add_vision_patch_size(vision.patch_size)
    writer.add_vision_embedding_length(vision.hidden_size)
    writer.add_vision_feed_forward_length(vision.intermediate_size)
    writer.add_vision_block_count(layers[-1])
    writer.add_array("clip.vision.feature_layer", layers)
    writer.add_vision_head_count(vision.num_attention_heads)
    writer.add_vision_attention_layernorm_eps(vision.layer_norm_eps)
    activation = _ACTIVATIONS[vision.hidden_act]
    if activation is not None:
        writer.add_bool(f"clip.{activation}", True)
    mean, std = normalisation(images)
    writer.add_vision_image_mean(mean)
    writer.add_vision_image_std(std)
    return writer


def normalisation(images: Any) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel as llama.cpp takes them: of pixels divided by 255."""
    scale = 255.0 * (images.rescale_factor if images.do_rescale else 1.0)
    mean, std = (images.image_mean, images.image_std) if images.do_normalize else ([0.0] * 3, [1.0] * 3)
    return [float(m) / scale for m in mean], [float(s) / scale for s in std]


def image_remark(config: Any, images: Any) -> str:
    """For which images llama.cpp makes the pixels that the image processor makes: it pads to a square and is bicubic."""
    side = config.vision_config.image_size
    if images.resample == _BICUBIC and {images.size.get("height"), images.size.get("width")} == {side}:
        return "llama.cpp pads images that are not square, where transformers does not: make them square first"
    return f"llama.cpp resizes images in its own way: make them {side} x {side} pixels first"


def vision_entries(model: Any) -> list[Entry]:
    """The tensors of a LLaVA's encoder, as far as it is used, and of its adapter; matrices in fp16.

    Patches and positions are fp32: they are few, and llama.cpp rounds an image to the format of the patches' weights.
    """
    config, tower = model.config, model.model.vision_tower
    layers, rules = encoder_layers(config)[-1], weight_rules(config.to_dict())
    names = get_tensor_name_map(MODEL_ARCH.MMPROJ, layers)
    result = []
    for own, weight in tower.state_dict().items():
        name = published_name(f"vision_tower.{own}", rules)
        layer = _LAYER.search(name)
        unused = "post_layernorm" in name or ".head." in name or own.endswith("position_ids")
        if unused or (layer is not None and int(layer[1]) >= layers):
            continue
        target = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if target is None:
            raise InputError(f"model: {name} has no place in llama.cpp's encoder")
        result.append(entry(target, weight, Kind.F32 if ".embeddings." in name else Kind.F16))
    adapter = model.model.multi_modal_projector
    for number, linear in ((0, adapter.linear_1), (2, adapter.linear_2)):
        result.append(entry(f"mm.{number}.weight", linear.weight, Kind.F16))
        result.append(entry(f"mm.{number}.bias", _bias(linear), Kind.F32))
    return result


def _bias(linear: Any) -> Tensor:
    """llama.cpp adds one always."""
    return torch.zeros(linear.out_features) if linear.bias is None else linear.bias
