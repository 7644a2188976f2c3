"""Whether a student and a teacher can be distilled: same tokens, same images cut into the same visual tokens, same P_T."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

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
        same = len(fetched) == len(trained) and all(
            torch.equal(a.to(b.dtype), b) for a, b in zip(fetched, trained, strict=True)
        )
        if not same:
            raise ValueError("multi_modal_projector differs: the student's fetched adapter is not this teacher's")


def _check_equal(name: str, student: Any, teacher: Any, prefix: str = "") -> None:
    ours, theirs = getattr(student, name, None), getattr(teacher, name, None)
    if ours != theirs:
        what = "visual tokens" if name == "image_seq_length" else ""
        raise ValueError(f"{prefix}{name} differs: student {ours}, teacher {theirs} {what}".rstrip())


def _equal(a: nn.Module, b: nn.Module) -> bool:
    mine, theirs = a.state_dict(), b.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[k].to(theirs[k].dtype), theirs[k]) for k in mine)
