"""What LLaVA, Bunny and MobileVLM share: a language model's ``config.json`` with fields of a vision side added to it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import LlavaConfig

from cdistill.errors import InputError
from cdistill.formats.names import NAMES, theirs
from cdistill.formats.source import (
    STRATEGIES,
    Given,
    Source,
    llava_config,
    remark_on_unread,
    text_config,
    tower_folder,
    tower_weights,
)
from cdistill.models.folder import CONFIG
from cdistill.models.llava import has_field

PROJECTOR = "mlp2x_gelu"
ONE_PROJECTOR = (
    f"transformers' LLaVA has two layers with a GELU between them ({PROJECTOR}), for each visual token by itself"
)
# Fields of the vision side that are read here, or say how it was trained.
_KNOWN = frozenset(
    {
        *(
            "mm_hidden_size",
            "mm_projector_type",
            "mm_vision_tower",
            "mm_vision_select_layer",
            "mm_vision_select_feature",
        ),
        *(
            "mm_patch_merge_type",
            "mm_use_im_start_end",
            "mm_use_im_patch_token",
            "mm_projector_lr",
            "mm_vision_tower_lr",
        ),
    }
)
_READ = ("mm_", "image_aspect_ratio", "image_grid_pinpoints", "s2", "use_s2", "vision_tower_type", "use_mm_proj")
_OF_TRAINING = ("freeze_", "unfreeze_", "tune_", "tokenizer_", "continuous_training")


@dataclass(frozen=True)
class Kind:
    """What a project decides for a checkpoint.

    Attributes:
        names: row of the table of names.
        language: transformers type of the language model.
        towers: transformers types of encoders that the project knows.
        prompt: conversation mode, unless another one is asked for.
        strategy, layer: what is taken of the encoder; None for what fields say.
        ratios: values of ``image_aspect_ratio`` that are taken.
        config, fields: class of the configuration, and further fields of it.
    """

    names: str
    language: str
    towers: tuple[str, ...]
    prompt: str
    strategy: str | None = None
    layer: int | None = None
    ratios: tuple[Any, ...] = (None, "square", "pad")
    config: Any = LlavaConfig
    fields: Mapping[str, Any] = field(default_factory=dict)


def check_fields(given: Given, projector: str) -> None:
    """Raise ValueError for a vision side that transformers' LLaVA does not compute, by the field that says so.

    ``projector`` is what the project takes where ``mm_projector_type`` is missing.
    """
    for name in ("s2", "use_s2"):
        given.require(
            name, (None, False), "images are seen at several sizes (S2), which transformers' LLaVA does not do"
        )
    marks = "images stand between two tokens of their own, <im_start> and <im_end>, which is not read"
    given.require("mm_use_im_start_end", (None, False), marks)
    given.require("mm_projector_type", (PROJECTOR,), ONE_PROJECTOR, projector)
    for name, value in sorted(given.values.items()):
        if name.startswith("mm_") and name not in _KNOWN and value not in (None, False):
            raise given.refused(name, "no field that is known, so what it changes is not known either", value)


def read_flat(given: Given, kind: Kind) -> Source:
    """A checkpoint whose fields have been checked (`check_fields`).

    Raises:
        ValueError: the vision tower is not given or another one, or a field says what cannot be expressed.
    """
    values, weights = given.values, given.weights
    place, vision = tower_folder(given, kind.towers)
    if values.get("mm_hidden_size") not in (None, vision.hidden_size):
        raise InputError(
            f"vision_tower: {place} holds another model than {given.folder / CONFIG} names: its hidden_size is "
            f"{vision.hidden_size}, mm_hidden_size {values['mm_hidden_size']}"
        )
    layer, strategy = kind.layer, kind.strategy
    if layer is None:
        layer = given.whole("mm_vision_select_layer", "it must be the number of one layer")
    if strategy is None:
        known = f"known are {', '.join(STRATEGIES)}"
        strategy = STRATEGIES[given.require("mm_vision_select_feature", tuple(STRATEGIES), known, "patch")]
    known = ", ".join(map(str, kind.ratios))
    ratio = given.require("image_aspect_ratio", kind.ratios, f"known ways to prepare an image are {known}")
    prefix = theirs("vision_tower.", NAMES[kind.names])
    assert prefix is not None
    inside = any(name.startswith(prefix) for name in weights.shapes)
    if has_field(vision, "vision_use_head"):
        vision.vision_use_head = any(name.startswith(f"{prefix}vision_model.head.") for name in weights.shapes)
    text = text_config(given, values, kind.language)
    config = llava_config(given, kind.config, vision, text, layer, strategy, **kind.fields)
    source = Source(
        kind.names,
        given.folder,
        weights,
        config,
        given.folder,
        place,
        given.options.prompt or kind.prompt,
        pad=ratio == "pad",
    )
    source.tower = tower_weights(place, inside, source.remarks)
    remark_on_unread(source, values, (*_READ, *_OF_TRAINING))
    return source


def language_of(given: Given, languages: Mapping[str, str], why: Mapping[str, str]) -> str:
    """The transformers type of a checkpoint's language model by its ``model_type``; ValueError saying why there is none."""
    kind = given.values["model_type"]
    if kind not in languages:
        raise given.refused("model_type", why.get(kind, f"known are {', '.join(languages)}"))
    return languages[kind]
