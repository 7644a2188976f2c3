"""What the authors' checkpoints and TinyLLaVA's share: configurations of both parts in one, and a connector beside them."""

from __future__ import annotations

from typing import Any

from transformers import CONFIG_MAPPING, LlavaConfig

from cdistill.errors import InputError
from cdistill.formats.flat import ONE_PROJECTOR, PROJECTOR
from cdistill.formats.source import KEY, STRATEGIES, Given, Source, llava_config, remark_on_unread, text_config
from cdistill.models.folder import CONFIG, reading
from cdistill.models.llava import has_field
from cdistill.models.load import encoder_config, resolve_folder
from cdistill.models.processor import has_image_processor

TOWERS = ("siglip_vision_model", "clip_vision_model")
PROMPTS = {"llama": "vicuna_v1"}  # of others qwen2_base
_READ = (
    "connector_",
    "post_connector_use",
    "vision_",
    "image_",
    "text_config",
    "hidden_size",
    "vocab_size",
    "ignore_index",
)
_OF_TRAINING = ("llm_model_", "tokenizer_", "tune_", "cache_dir", "pad_token")
_SAME_TOWER = ("model_type", "image_size", "patch_size", "hidden_size")


def read_nested(given: Given, names: str, kind: Any = LlavaConfig, **fields: Any) -> Source:
    """A checkpoint of this layout.

    Args:
        given: the checkpoint.
        names: row of the table of names.
        kind: class of the configuration.
        fields: further fields of that.

    Raises:
        ValueError: a field says what cannot be expressed.
    """
    for part in ("text_config", "vision_config"):
        value = given.values.get(part)
        if not isinstance(value, dict) or not isinstance(value.get("model_type"), str):
            raise given.refused(part, "it must be an object with a model_type", value)
    given.require("connector_type", (PROJECTOR,), ONE_PROJECTOR)
    given.require("vision_model_name_or_path2", (None, ""), "two vision towers are not what a LLaVA has")
    ratio = given.require(
        "image_aspect_ratio", (None, "square", "pad"), "known ways to prepare an image are square, pad"
    )
    known = f"known are {', '.join(STRATEGIES)}"
    strategy = STRATEGIES[given.require("vision_feature_select_strategy", tuple(STRATEGIES), known, "patch")]
    layer = given.whole("vision_feature_layer", "it must be the number of one layer", -2)
    inner = given.values["text_config"]
    text: Any = text_config(given, inner, inner["model_type"], "text_config.")
    vision = _vision(given)
    width = vision.hidden_size
    given.require("vision_hidden_size", (None, width), f"vision_config says {width}")
    config = llava_config(given, kind, vision, text, layer, strategy, **fields)
    prompt = given.options.prompt or PROMPTS.get(text.model_type, "qwen2_base")
    source = Source(names, given.folder, given.weights, config, given.folder, None, prompt, pad=ratio == "pad")
    _find_images(source, given)
    remark_on_unread(source, given.values, (*_READ, *_OF_TRAINING))
    return source


def _vision(given: Given) -> Any:
    values = given.values["vision_config"]
    kind = values["model_type"]
    if kind not in TOWERS:
        raise given.refused("vision_config.model_type", f"known vision towers are {', '.join(TOWERS)}", kind)
    fields = {name: value for name, value in values.items() if not name.startswith("model_name_or_path")}
    with reading(KEY, str(given.folder / CONFIG)):
        vision: Any = CONFIG_MAPPING[kind].from_dict(fields)
    if has_field(vision, "vision_use_head"):  # kept, though a LLaVA does not use it: nothing of the checkpoint is lost
        vision.vision_use_head = any(".vision_model.head." in name for name in given.weights.shapes)
    return vision


def _find_images(source: Source, given: Given) -> None:
    """Where it is said how images become pixels: in the checkpoint, else in a folder of the vision tower."""
    if has_image_processor(source.folder):
        source.images = source.folder
        if given.options.vision_tower is not None:
            source.remarks.append(
                "--vision-tower is not used: the checkpoint has a tower and an image processor of its own"
            )
    elif given.options.vision_tower is not None:
        place = resolve_folder(given.options.vision_tower, "vision_tower")
        found, ours = encoder_config(place, "vision_tower"), source.config.vision_config
        for name in _SAME_TOWER:
            other, mine = getattr(found, name), getattr(ours, name)
            if other != mine:
                raise InputError(
                    f"vision_tower: {place} holds another model than the checkpoint: {name} is {other}, there {mine}"
                )
        source.images = place
    else:
        source.remarks.append(
            f"no image processor in {source.folder}: its vision encoder's usual one was taken (or give --vision-tower FOLDER)"
        )
