"""Blank images and videos, which keep the autograd graph of a micro-batch without any like that of one with some.

Processes reduce each other's gradients. ZeRO-2 sums them in the order in which they become ready, ZeRO-3 and FSDP2 gather
parameters in the order in which modules run, and DDP waits for every gradient: all need one graph on all processes. So where a
micro-batch has no image, the model looks at a blank one in its own forward pass and shows it to no token.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor

from cdistill.errors import InputError
from cdistill.families import family_of
from cdistill.models.parts import has_vision, named_parts, parameters_of
from cdistill.runtime.collectives import gathered
from cdistill.runtime.zero import is_partitioned

CHECK = "torch_compilable_check"  # what transformers' models call to compare numbers of visual tokens and features


def needs_blank(model: Any) -> bool:
    """Whether a model has to run its vision path even if there is no image.

    True where its parameters are partitioned; with several processes, where vision encoder or adapter are trained; and where
    the encoder is, because only its own forward pass shows which of its layers get a gradient.
    """
    if is_partitioned(model):
        return True
    if not torch.is_grad_enabled():
        return False
    trained = {part for _, p, part in named_parts(model) if p.requires_grad}
    return "vision" in trained or ("adapter" in trained and _world_size() > 1)


def idle_adapter(student: Any) -> dict[str, Tensor]:
    """``idle``, a zero that gives the adapter gradients of 0 in a single process, where the vision path need not run for it."""
    trained = [p for p in parameters_of(student, "adapter") if p.requires_grad]
    return {"idle": 0.0 * torch.stack([p.float().sum() for p in trained]).sum()} if trained else {}


@contextmanager
def with_blanks(model: Any, inputs: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The inputs of a model that embeds images itself, with a blank image or video where it `needs_blank` and has none.

    Inside, the model does not compare how many visual tokens there are with what the encoder yields. Where parameters are
    partitioned, processes agree on whether there is a video, so every process must come here.

    Raises:
        ValueError: what a blank looks like for this family is not known.
    """
    blank = _missing(model, inputs)
    if not blank:
        yield inputs
        return
    modules = {sys.modules[kind.__module__] for kind in type(model.model).__mro__}
    checks = {module: getattr(module, CHECK) for module in modules if hasattr(module, CHECK)}
    if not checks:
        raise InputError(_UNKNOWN.format(model.config.model_type))
    for module in checks:
        setattr(module, CHECK, _accept)
    try:
        yield inputs | blank
    finally:
        for module, check in checks.items():
            setattr(module, CHECK, check)


_UNKNOWN = (
    "a micro-batch holds no image, and other processes of this run may have one: a {} model cannot look at a blank in its "
    "place; give every micro-batch an image, or register a row for its family that has `blank` (cdistill.register_family)"
)


def _accept(condition: Any, message: Any = None) -> None:
    """Compare nothing."""


def _missing(model: Any, inputs: dict[str, Any]) -> dict[str, Tensor]:
    """Inputs for the images and videos that a model must look at beside its own."""
    if not has_vision(model) or "input_ids" not in inputs:
        return {}
    image = "pixel_values" not in inputs and needs_blank(model)
    video = False
    if hasattr(model.model, "get_video_features"):
        has_video = "pixel_values_videos" in inputs
        if is_partitioned(model):
            video = any(gathered(int(has_video))) and not has_video
        elif not has_video and torch.is_grad_enabled():  # a video path with parameters of its own
            own = any("video" in name and p.requires_grad for name, p in model.named_parameters())
            video = own and _world_size() > 1
    if not image and not video:
        return {}
    ids: Tensor = inputs["input_ids"]
    blank: dict[str, Any] = {}
    try:
        if image:
            blank |= _blank(model, "image")
        if video:
            blank |= _blank(model, "video")
    except AttributeError:  # another way to write the configuration
        raise InputError(_UNKNOWN.format(model.config.model_type)) from None
    if ("image_grid_thw" in blank or "video_grid_thw" in blank) and "mm_token_type_ids" not in inputs:
        blank["mm_token_type_ids"] = torch.zeros_like(ids)
    return {name: value.to(ids.device) for name, value in blank.items()}


def _blank(model: Any, kind: Literal["image", "video"]) -> dict[str, Tensor]:
    """The smallest image or video that a family takes. It is not 0, which Idefics takes for padding."""
    family = family_of(model)
    if family.blank is not None:
        return family.blank(model, kind)
    pixels, grid = ("pixel_values", "image_grid_thw") if kind == "image" else ("pixel_values_videos", "video_grid_thw")
    takes = inspect.signature(getattr(model.model, f"get_{kind}_features")).parameters
    config, vision = model.config, model.config.vision_config
    channels = next((c for n in ("num_channels", "in_channels", "in_chans") if (c := getattr(vision, n, None))), 3)
    if grid in takes:  # one visual token of merged patches
        merge = vision.spatial_merge_size
        values = channels * getattr(vision, "temporal_patch_size", 1) * vision.patch_size**2
        return {pixels: torch.ones(merge**2, values), grid: torch.tensor([[1, merge, merge]])}
    size = vision.image_size
    height, width = (size, size) if isinstance(size, int) else size
    image = torch.ones(1, channels, height, width)
    if pixels == "pixel_values_videos" or "pixel_attention_mask" in takes:  # with a dimension of frames or tiles
        return {pixels: image[None]}
    if "image_sizes" not in takes:
        return {pixels: image}
    sizes = torch.tensor([[height, width]])
    pinpoints = getattr(config, "image_grid_pinpoints", None)
    if pinpoints is None:  # LLaVA's encoders but Pixtral have no sizes to divide
        tower = getattr(model.model, "vision_tower", None)
        sized = tower is None or hasattr(tower, "patch_size")
        return {pixels: image, "image_sizes": sizes} if sized else {pixels: image}
    from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

    tiles = image_size_to_num_patches([height, width], pinpoints, size)
    return {pixels: image.repeat(tiles, 1, 1, 1)[None], "image_sizes": sizes}


def _world_size() -> int:
    import torch.distributed as dist

    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
