"""Vision encoder, adapter, language model and head of a multimodal model, in any family of transformers."""

from __future__ import annotations

from typing import Any, Literal

from torch import nn

Part = Literal["vision", "adapter", "fetched", "language", "lora"]

# Modules between vision encoder and language model; Qwen's mergers lie inside what transformers calls its encoder.
_ADAPTERS = ("multi_modal_projector", "connector", "merger", "deepstack_merger_list", "image_newline")
_ENCODERS = ("vision_tower", "visual", "vision_model", "vision_encoder", "image_tower")
VISUAL_MODULES = _ADAPTERS + _ENCODERS


def part_of(name: str) -> Part:
    """The part a parameter belongs to, by its name in ``named_parameters``.

    ``fetched`` is the teacher's frozen adapter inside a student's (TAF), ``lora`` what LoRA has added to the language model.
    """
    path = name.split(".")
    if any(word in path for word in _ADAPTERS):
        after = path[path.index("multi_modal_projector") + 1] if "multi_modal_projector" in path else ""
        return "fetched" if after == "teacher" else "adapter"
    if any(word in path for word in _ENCODERS):
        return "vision"
    return "lora" if any(word.startswith("lora_") for word in path) else "language"


def has_vision(model: Any) -> bool:
    """Whether a model has a vision encoder."""
    return hasattr(model.config, "vision_config")


def language_model(model: Any) -> Any:
    """The decoder of a multimodal model or of a causal language model, without its head."""
    return model.get_decoder()


def head_of(model: Any) -> Any:
    """The layer that makes logits."""
    return model.get_output_embeddings()


def adapter_modules(model: nn.Module) -> list[nn.Module]:
    """Outermost modules that `part_of` calls adapter; a TAF adapter counts with what it fetched."""
    return [module for name, module in model.named_modules() if name.rpartition(".")[2] in _ADAPTERS]
