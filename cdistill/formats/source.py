"""A checkpoint of another project as it is understood, and the checks of fields that several projects share."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, LlavaConfig, PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from cdistill.errors import InputError
from cdistill.formats.weights import Weights, has_weights, weights_in
from cdistill.models.folder import CONFIG, check_config, read_json, reading
from cdistill.models.llava import visual_tokens
from cdistill.models.load import encoder_config, resolve_folder

KEY = "checkpoint"  # begins messages
STRATEGIES = {"patch": "default", "cls_patch": "full"}  # the projects' word for what is taken of an encoder's positions
DEFAULT_PIXELS = 224  # of an encoder whose name says a patch and no size
LANGUAGE_MODELS = {"llama", "mistral", "phi3", "qwen2", "stablelm"}
NOT_EXPRESSED = {
    "phi": "its head has a bias, and LlavaForConditionalGeneration's has none",
    "gemma": "it scales what it is given in the place of words, images included; transformers' scales words alone",
    "gemma2": "it scales what it is given in the place of words, images included; transformers' scales words alone",
}
_SIZE_IN_NAME = re.compile(r"patch(\d+)(?:-(\d+))?")
_TOWER = re.compile(r"^(?:vision_tower\.)?(?:vision_model\.)?")


@dataclass(frozen=True)
class Options:
    """What is said of a checkpoint beside its path: folders of its other parts, and its conversation mode."""

    vision_tower: str | None = None
    base: str | None = None
    prompt: str | None = None


@dataclass(frozen=True)
class Given:
    """A checkpoint before it is understood.

    Attributes:
        folder: of its ``config.json``.
        values: what that says.
        options: what was said of it.
        weights: by the project's names.
    """

    folder: Path
    values: Mapping[str, Any]
    options: Options
    weights: Weights

    def refused(self, name: str, why: str, value: Any = None) -> InputError:
        """The error of a field whose value, by default what the ``config.json`` says, cannot be expressed."""
        value = self.values.get(name) if value is None else value
        return InputError(f"{KEY}: {self.folder / CONFIG}: {name} is {value!r:.80}: {why}")

    def require(self, name: str, allowed: tuple[Any, ...], why: str, missing: Any = None) -> Any:
        """The value of a field, ``missing`` where there is none; ValueError for one that is not among those allowed."""
        value = self.values.get(name, missing)
        if value not in allowed:
            raise self.refused(name, why, value)
        return value

    def whole(self, name: str, why: str, missing: Any = None) -> int:
        """The whole number that a field says; ValueError for anything else."""
        value = self.values.get(name, missing)
        if not isinstance(value, int) or isinstance(value, bool):
            raise self.refused(name, why, value)
        return value


@dataclass
class Source:
    """A checkpoint of a project, understood.

    Attributes:
        format: row of `cdistill.formats.names.NAMES`.
        folder: of its ``config.json``.
        weights: by the project's names.
        config: of the transformers class that computes the same; its vocabulary has no image token yet.
        tokenizer: folder of the tokenizer.
        images: folder whose image processor is taken; None for the usual one of the encoder.
        prompt: conversation mode.
        tower: weights of an encoder that lies in a folder of its own, by the names of transformers' published LLaVA.
        pad: whether images are padded to squares.
        projector: whether it was a projector alone.
        remarks: what of the checkpoint is not used, and what was chosen.
    """

    format: str
    folder: Path
    weights: Weights
    config: Any
    tokenizer: Path
    images: Path | None
    prompt: str
    tower: Weights | None = None
    pad: bool = False
    projector: bool = False
    remarks: list[str] = field(default_factory=list)


def read_values(folder: Path) -> dict[str, Any]:
    """The ``config.json`` of a checkpoint. Raises ValueError if it is missing or corrupt."""
    values = read_json(folder / CONFIG, KEY)
    check_config(values, KEY, folder / CONFIG)
    return values


def remark_on_unread(source: Source, values: Mapping[str, Any], read: tuple[str, ...]) -> None:
    """Name the fields that say anything, are not of a model in transformers, and are not among ``read``.

    ``read`` are beginnings of the names of fields that are, or that tell of training and loading alone.
    """
    common = PretrainedConfig().to_dict().keys() | source.config.text_config.to_dict().keys()
    common |= {"rope_theta", "rope_scaling", "auto_map", "_name_or_path", "torch_dtype"}
    unread = sorted(
        name for name, value in values.items() if name not in common and not name.startswith(read) and value
    )
    if unread:
        source.remarks.append(f"not used of {CONFIG}: {', '.join(unread)}")


def text_config(given: Given, values: Mapping[str, Any], kind: str, within: str = "") -> PretrainedConfig:
    """Configuration of the language model of a transformers type, made of those fields of ``values`` that it knows.

    Raises:
        ValueError: it is of a type, or has rotary positions, that transformers' LLaVA does not compute likewise.
    """
    if kind not in LANGUAGE_MODELS:
        known = ", ".join(sorted(LANGUAGE_MODELS))
        why = NOT_EXPRESSED.get(kind, f"known language models are {known}")
        raise given.refused(f"{within}model_type", why, kind)
    rope = values.get("rope_scaling")
    if rope is not None:
        name = rope.get("rope_type", rope.get("type")) if isinstance(rope, Mapping) else None
        if name not in (*ROPE_INIT_FUNCTIONS, "default"):
            raise given.refused(
                f"{within}rope_scaling", "rotary positions of a type that transformers does not know", rope
            )
    cls: Any = CONFIG_MAPPING[kind]
    known_fields = (cls().to_dict().keys() | {"rope_theta", "rope_scaling"}) - {
        *("model_type", "architectures", "transformers_version", "_name_or_path", "dtype", "id2label", "label2id"),
    }
    known_fields -= {"rope_scaling"} if rope is None else set()
    with reading(KEY, str(given.folder / CONFIG)), warnings.catch_warnings(action="ignore"):  # of old fields
        config: PretrainedConfig = cls.from_dict(
            {name: value for name, value in values.items() if name in known_fields}
        )
    return config


def tower_folder(given: Given, kinds: tuple[str, ...]) -> tuple[Path, PretrainedConfig]:
    """Folder and configuration of the vision encoder that a checkpoint names.

    Raises:
        ValueError: the folder was not given, or holds another encoder than the name says.
    """
    name = given.values.get("mm_vision_tower")
    if given.options.vision_tower is None:
        raise InputError(
            f"{KEY}: {given.folder / CONFIG} names the vision tower {name!r:.80}: give its folder, which has a config.json and "
            "a preprocessor_config.json, as --vision-tower"
        )
    place = resolve_folder(given.options.vision_tower, "vision_tower")
    config: Any = encoder_config(place, "vision_tower")
    if config.model_type not in kinds:
        raise InputError(
            f"vision_tower: {place} holds a {config.model_type}, and {given.folder / CONFIG} names {name!r:.80}: a {kinds[0]}"
        )
    said = _SIZE_IN_NAME.search(str(name).rpartition("/")[2])
    if said is not None:
        wanted = {"patch_size": int(said[1]), "image_size": int(said[2] or DEFAULT_PIXELS)}
        for size, value in wanted.items():
            if getattr(config, size) != value:
                raise InputError(
                    f"vision_tower: {place} holds another model than {name!r:.80}: {size} is {getattr(config, size)}"
                )
    return place, config


def tower_weights(place: Path, inside: bool, remarks: list[str]) -> Weights | None:
    """Weights of the encoder in a folder of its own, by published names; None where the checkpoint has them ``inside``."""
    if inside:
        if has_weights(place):
            remarks.append(f"the vision tower is the checkpoint's own; the weights in {place} were not used")
        return None
    weights = weights_in(place, "vision_tower")
    if any(name.startswith("vision_model.") for name in weights.shapes):  # beside a text encoder's
        others = [name for name in weights.shapes if not name.startswith("vision_model.")]
    else:
        others = []
    others += [name for name in weights.shapes if name.startswith(("vision_model.head.", "head."))]
    others += [name for name in weights.shapes if name.endswith("embeddings.position_ids") and name not in others]
    if others:
        remarks.append(f"not used of {place}: {len(others)} weights that no LLaVA has, such as {min(others)}")
    weights.drop(others)
    weights.rename(lambda name: _TOWER.sub("vision_tower.vision_model.", name))
    return weights


def llava_config(given: Given, kind: Any, vision: Any, text: Any, layer: int, strategy: str, **more: Any) -> Any:
    """Configuration of a LLaVA; raises ValueError if its encoder cannot be used so."""
    common: dict[str, Any] = {
        "vision_config": vision,
        "text_config": text,
        "vision_feature_layer": layer,
        "vision_feature_select_strategy": strategy,
        "tie_word_embeddings": text.tie_word_embeddings,
        "dtype": given.values.get("torch_dtype", given.values.get("dtype")),
    }
    with reading(KEY, str(given.folder / CONFIG)):
        tokens = visual_tokens(LlavaConfig(**common))
        assert tokens is not None
        return kind(**common, image_seq_length=tokens.total, **more)
