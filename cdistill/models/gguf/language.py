"""A language model of transformers in llama.cpp's terms: fields and tensors by architecture, and what it cannot express."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from gguf import MODEL_ARCH, GGUFWriter, RopeScalingType, get_tensor_name_map
from torch import Tensor

from cdistill.errors import InputError
from cdistill.models.gguf.tensors import Entry, Kind, entry, matrix_kind


@dataclass(frozen=True)
class Architecture:
    """What llama.cpp calls a model type, and whether its rotary pairs are neighbours, for which rows of q and k are moved."""

    kind: MODEL_ARCH
    neighbours: bool = False


ARCHITECTURES = {
    "llama": Architecture(MODEL_ARCH.LLAMA, neighbours=True),
    "mistral": Architecture(MODEL_ARCH.LLAMA, neighbours=True),
    "qwen2": Architecture(MODEL_ARCH.QWEN2),
    "qwen3": Architecture(MODEL_ARCH.QWEN3),
}


def check_language(text: Any, prefix: str) -> None:
    """Raise ValueError naming the field, after ``prefix``, of a language model that llama.cpp cannot express."""
    if text.model_type not in ARCHITECTURES:
        raise InputError(
            f"model: {prefix}model_type {text.model_type} is not written for llama.cpp; known are {', '.join(ARCHITECTURES)}"
        )
    if text.hidden_act != "silu":
        raise InputError(f"model: {prefix}hidden_act {text.hidden_act}: llama.cpp's {text.model_type} has silu alone")
    kinds = set(getattr(text, "layer_types", None) or ["full_attention"])
    window = getattr(text, "sliding_window", None) if text.model_type == "mistral" else None
    if kinds != {"full_attention"} or (window is not None and window < text.max_position_embeddings):
        raise InputError(f"model: {prefix}sliding_window: llama.cpp's {text.model_type} has full attention alone")
    rope = text.rope_parameters
    if rope.get("rope_type", "default") not in ("default", "linear", "llama3"):
        raise InputError(
            f"model: {prefix}rope_parameters.rope_type {rope['rope_type']}: written are default, linear and llama3"
        )
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise InputError(f"model: {prefix}rope_parameters.partial_rotary_factor: llama.cpp turns whole heads")


def language_writer(text: Any) -> GGUFWriter:
    """A writer with the fields of a language model's configuration."""
    writer = GGUFWriter(None, _architecture_name(text))  # type: ignore[arg-type]
    writer.add_type("model")
    writer.add_vocab_size(text.vocab_size)
    writer.add_context_length(text.max_position_embeddings)
    writer.add_embedding_length(text.hidden_size)
    writer.add_block_count(text.num_hidden_layers)
    writer.add_feed_forward_length(text.intermediate_size)
    writer.add_head_count(text.num_attention_heads)
    writer.add_head_count_kv(text.num_key_value_heads)
    writer.add_key_length(_head_width(text))
    writer.add_value_length(_head_width(text))
    writer.add_layer_norm_rms_eps(text.rms_norm_eps)
    writer.add_rope_dimension_count(_head_width(text))
    writer.add_rope_freq_base(text.rope_parameters["rope_theta"])
    if text.rope_parameters.get("rope_type") == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(text.rope_parameters["factor"])
    return writer


def language_entries(model: Any, quantize: str) -> list[Entry]:
    """The tensors of a language model, alone or in a LLaVA, with the matrices in the format of ``quantize``."""
    text = model.config.get_text_config(decoder=True)
    architecture = ARCHITECTURES[text.model_type]
    names = get_tensor_name_map(architecture.kind, text.num_hidden_layers)
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    result = []
    for name, weight in _weights(model, tied):
        target = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if target is None:
            raise InputError(f"model: {name} has no place in llama.cpp's {_architecture_name(text)}")
        if architecture.neighbours and ".self_attn.q_proj." in name:
            weight = _as_neighbours(weight, text.num_attention_heads)
        if architecture.neighbours and ".self_attn.k_proj." in name:
            weight = _as_neighbours(weight, text.num_key_value_heads)
        result.append(entry(target, weight, matrix_kind(target, quantize, text.num_hidden_layers, tied=tied)))
    if text.rope_parameters.get("rope_type") == "llama3":
        result.append(Entry("rope_freqs.weight", _llama3_factors(text), Kind.F32))
    return result


def _weights(model: Any, tied: bool) -> Iterator[tuple[str, Tensor]]:
    inner = model.get_decoder()
    for name, weight in inner.state_dict().items():
        yield f"model.{name}", weight
    if not tied:
        for name, weight in model.get_output_embeddings().state_dict().items():
            yield f"lm_head.{name}", weight


def _architecture_name(text: Any) -> str:
    from gguf import MODEL_ARCH_NAMES

    return MODEL_ARCH_NAMES[ARCHITECTURES[text.model_type].kind]


def _head_width(text: Any) -> int:
    return getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads


def _as_neighbours(weight: Tensor, heads: int) -> Tensor:
    """Rows of q or k, (heads * width, ...), with each rotary pair side by side instead of half a head apart."""
    width = weight.shape[0] // heads
    return weight.reshape(heads, 2, width // 2, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)


def _llama3_factors(text: Any) -> Tensor:
    """What llama.cpp divides each rotary frequency by, (width / 2,) fp32, for Llama 3's long contexts."""
    rope, width = text.rope_parameters, _head_width(text)
    frequencies = rope["rope_theta"] ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    turns = rope["original_max_position_embeddings"] * frequencies / (2 * math.pi)  # within the first context
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    kept = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return (1.0 / (kept + (1.0 - kept) / rope["factor"])).float()
