"""Vision encoder, adapter, language model and head of a multimodal model, in any family of transformers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from torch import nn

from cdistill.errors import InputError
from cdistill.families import Family, family_of

Part = Literal["vision", "adapter", "fetched", "language", "lora"]


def named_parts(model: Any) -> Iterator[tuple[str, nn.Parameter, Part]]:
    """Every parameter of a model with its name and the part it belongs to, by the names of its modules (`cdistill.families`).

    ``fetched`` is the teacher's frozen adapter inside a student's (TAF), ``lora`` what LoRA has added to the language model.
    """
    family = family_of(model)
    for name, parameter in model.named_parameters():
        yield name, parameter, _part_of(name, family)


def require_known_parts(model: Any) -> None:
    """Raise ValueError for a multimodal model with a parameter that is outside its language model and of no known part.

    It would be frozen and trained with the language model.
    """
    if not has_vision(model):
        return
    language = {
        id(p) for part in (language_model(model), head_of(model)) if part is not None for p in part.parameters()
    }
    for name, parameter, part in named_parts(model):
        if part == "language" and id(parameter) not in language:
            raise InputError(
                f"{name} of {type(model).__name__} belongs neither to its language model nor to a known adapter or encoder: "
                f"register a row for {model.config.model_type} that names its module (cdistill.register_family)"
            )


def parameters_of(model: Any, *parts: Part) -> list[nn.Parameter]:
    """The parameters of some parts of a model."""
    return [parameter for _, parameter, part in named_parts(model) if part in parts]


def _part_of(name: str, family: Family) -> Part:
    path = name.split(".")
    if any(word in path for word in family.adapters):  # first: Qwen's mergers lie inside its encoder
        after = path[path.index("multi_modal_projector") + 1] if "multi_modal_projector" in path else ""
        return "fetched" if after == "teacher" else "adapter"
    if any(word in path for word in family.encoders):
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
