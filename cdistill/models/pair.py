"""Whether a student and a teacher can be distilled: same tokens, same images cut into the same visual tokens, same P_T."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from cdistill.models.llava import Llava
from cdistill.models.load import Model
from cdistill.models.parts import has_vision
from cdistill.models.taf import TAFAdapter

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
MOST_PADDING = 256  # tokens, or 1 %: of embeddings that are padded
_OF_THE_ENCODER = ("image_size", "patch_size", "spatial_merge_size", "temporal_patch_size")


def shares_encoder(student: Model, teacher: Model) -> bool:
    """Whether two LLaVAs have one frozen vision encoder, so that an image need be looked at once."""
    if not isinstance(student, Llava) or not isinstance(teacher, Llava):
        return False
    same = student.config.vision_feature_layer == teacher.config.vision_feature_layer
    return same and _equal(student.model.vision_tower, teacher.model.vision_tower)


def check_pair(student: Model, teacher: Model, *, shared: bool = True) -> None:
    """Raise ValueError unless two models can be distilled: same visual tokens, and the same P_T with TAF.

    ``shared`` also asks LLaVAs for one vision encoder (`shares_encoder`), as the paper has it.
    """
    if has_vision(student) != has_vision(teacher):
        raise ValueError(f"only the {'student' if has_vision(student) else 'teacher'} has a vision encoder")
    _check_vocabulary(student.config.get_text_config(), teacher.config.get_text_config())
    for name in _OF_THE_MODEL:
        _check_equal(name, student.config, teacher.config)
    if has_vision(student):
        for name in _OF_THE_ENCODER:
            _check_equal(name, student.config.vision_config, teacher.config.vision_config, "vision_config.")
    if not isinstance(student, Llava) or not isinstance(teacher, Llava):
        return
    if shared and not shares_encoder(student, teacher):
        raise ValueError("vision_tower differs: student and teacher must share one frozen vision encoder")
    adapter = student.model.multi_modal_projector
    if isinstance(adapter, TAFAdapter):
        fetched = [p for layer in (adapter.teacher[0], adapter.teacher[2]) for p in layer.parameters()]
        trained = list(teacher.model.multi_modal_projector.parameters())
        same = len(fetched) == len(trained) and all(map(_same, fetched, trained))
        if not same:
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
        what = "visual tokens" if name == "image_seq_length" else ""
        raise ValueError(f"{prefix}{name} differs: student {ours}, teacher {theirs} {what}".rstrip())


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
