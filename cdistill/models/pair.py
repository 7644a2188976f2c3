"""Whether a student and a teacher can be distilled: same tokens, same images cut into the same visual tokens, same P_T."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from cdistill.models.llava import Llava, VisualTokens, visual_tokens
from cdistill.models.load import Model
from cdistill.models.parts import has_vision
from cdistill.models.taf import TAFAdapter, adapter_layers, linear_layers

# What decides how many visual tokens an image becomes, in the configurations of transformers' families.
_OF_THE_MODEL = (
    "image_token_id",
    "video_token_id",
    "image_seq_length",
    "vision_feature_select_strategy",
    "vision_aspect_ratio",
    "image_grid_pinpoints",
    "scale_factor",
    "downsample_ratio",
)
_OF_THE_ENCODER = ("image_size", "patch_size", "spatial_merge_size", "temporal_patch_size")
MOST_PADDING = 256  # tokens, or 1 %: of embeddings that are padded


def shares_encoder(student: Model, teacher: Model) -> bool:
    """Whether two LLaVAs have one vision encoder and take the same of it, so that an image need be looked at once."""
    if not isinstance(student, Llava) or not isinstance(teacher, Llava):
        return False
    ours, theirs = student.config, teacher.config
    same = ours.vision_feature_select_strategy == theirs.vision_feature_select_strategy
    same = same and _feature_layers(ours) == _feature_layers(theirs)
    return same and _equal(student.model.vision_tower, teacher.model.vision_tower)


def check_pair(student: Model, teacher: Model) -> None:
    """Raise ValueError unless two models can be distilled: same visual tokens, and with TAF one encoder and the same P_T.

    LLaVAs without TAF may have vision encoders of their own, if their visual tokens stand for the same patches.
    """
    if has_vision(student) != has_vision(teacher):
        raise ValueError(f"only the {'student' if has_vision(student) else 'teacher'} has a vision encoder")
    _check_vocabulary(student.config.get_text_config(), teacher.config.get_text_config())
    if isinstance(student, Llava) and isinstance(teacher, Llava):
        _check_equal("image_token_id", student.config, teacher.config)
        _check_visual_tokens(student, teacher)
        _check_fetched(student, teacher)
        return
    for name in _OF_THE_MODEL:
        _check_equal(name, student.config, teacher.config)
    if has_vision(student):
        for name in _OF_THE_ENCODER:
            _check_equal(name, student.config.vision_config, teacher.config.vision_config, "vision_config.")


def _feature_layers(config: Any) -> list[int]:
    """Feature layers counted from the first: of 3 layers, whose hidden states are 4, -2 is 2."""
    layers = config.vision_feature_layer
    layers = [layers] if isinstance(layers, int) else list(layers)
    count = getattr(config.vision_config, "num_hidden_layers", None)
    return layers if count is None else [layer % (count + 1) for layer in layers]


def _check_visual_tokens(student: Llava, teacher: Llava) -> None:
    """Every position among an image's visual tokens must be the same patch for both models."""
    for name in ("image_size", "patch_size"):
        _check_equal(name, student.config.vision_config, teacher.config.vision_config, "vision_config.")
    ours, theirs = visual_tokens(student.config), visual_tokens(teacher.config)
    if ours != theirs:
        raise ValueError(
            f"visual tokens of an image differ: student {_told(ours, student)}, teacher {_told(theirs, teacher)}"
        )


def _told(tokens: VisualTokens | None, model: Llava) -> str:
    how = f"{model.config.vision_config.model_type}, {model.config.vision_feature_select_strategy}"
    if tokens is None:
        return f"any number ({how})"
    more = f", {tokens.special} of them no patches" if tokens.special else ""
    return f"{tokens.count} ({how}{more}{', without the first patch' if tokens.dropped else ''})"


def _check_fetched(student: Llava, teacher: Llava) -> None:
    adapter = student.model.multi_modal_projector
    if not isinstance(adapter, TAFAdapter):
        return
    if not shares_encoder(student, teacher):
        raise ValueError(
            "vision_tower differs: a student with TAF sees through its teacher's encoder, at the same vision_feature_layer and "
            "vision_feature_select_strategy; this teacher has another"
        )
    trained = [p for layer in linear_layers(teacher.model.multi_modal_projector) for p in layer.parameters()]
    fetched = [p for layer in adapter.fetched for p in layer.parameters()]
    same = adapter.activations == [layer["activation"] for layer in adapter_layers(teacher)]
    if not same or len(fetched) != len(trained) or not all(map(_same, fetched, trained)):
        raise ValueError("multi_modal_projector differs: the student's fetched adapter is not this teacher's")


def _check_vocabulary(student: Any, teacher: Any) -> None:
    """One tokenizer's embeddings may be padded to different sizes, and their special tokens have the same ids."""
    ours, theirs = student.vocab_size, teacher.vocab_size
    if abs(ours - theirs) > max(MOST_PADDING, max(ours, theirs) // 100):
        raise ValueError(f"vocab_size differs: student {ours}, teacher {theirs}; both must have one tokenizer")
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if getattr(student, name, None) is not None and getattr(teacher, name, None) is not None:
            _check_equal(name, student, teacher)


def _check_equal(name: str, student: Any, teacher: Any, prefix: str = "") -> None:
    ours, theirs = getattr(student, name, None), getattr(teacher, name, None)
    if ours != theirs:
        raise ValueError(f"{prefix}{name} differs: student {ours}, teacher {theirs}")


def _equal(a: nn.Module, b: nn.Module) -> bool:
    mine, theirs = a.state_dict(), b.state_dict()
    return mine.keys() == theirs.keys() and all(_same(mine[name], theirs[name]) for name in mine)


def _same(a: Tensor, b: Tensor) -> bool:
    """Equality in the narrower of two dtypes, on whatever devices they are."""
    if hasattr(a, "ds_id") or hasattr(b, "ds_id"):
        raise ValueError(
            "models that ZeRO-3 has partitioned cannot be compared: put them together before the engine does"
        )
    dtype = min(a.dtype, b.dtype, key=lambda d: d.itemsize)
    return torch.equal(a.to(b.device, dtype), b.to(dtype))
