"""Exported folders as published checkpoints of their families are laid out, so that readers of any age take them.

transformers 5 writes names of weights, fields and files that only it reads: transformers 4 starts a vision tower afresh where
its names have no ``vision_model``, takes another rotary base where ``rope_theta`` is not in its old place, and knows no
``TokenizersBackend``. `publish` gives what transformers wrote the names that llava-hf, Qwen and others have published.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING

from cdistill.models.folder import CONFIG, INDEX, MOST_BYTES_OF_A_TOKENIZER, read_json, reading

Rule = tuple[str, str]  # pattern of a weight's name, and what replaces it


@dataclass(frozen=True)
class Layout:
    """In what the published checkpoints of a model type differ from what transformers writes.

    Attributes:
        weights: rules of `re.sub`, each applied to every name.
        flat: the fields of ``text_config`` stand beside the model's own, and the vision encoder names no type.
        multimodal_rope: ``rope_scaling`` with ``mrope_section`` says ``"type": "mrope"``.
        local_rope: field with the base of layers of sliding attention, where it differs from that of the others.
        fields: what fields of the configuration are called.
    """

    weights: tuple[Rule, ...] = ()
    flat: bool = False
    multimodal_rope: bool = False
    local_rope: str = ""
    fields: Mapping[str, str] = field(default_factory=dict)


_TOWERS = r"^((?:model\.)?(?:vision_tower|image_tower|video_tower|vision_model)\.)"
_PARTS = r"(?=(?:embeddings|pre_layrnorm|encoder|post_layernorm|head)\.)"
_NESTED = Layout(weights=((_TOWERS + _PARTS, r"\1vision_model."),))
_QWEN_VL = Layout(flat=True, multimodal_rope=True)
_NEOX = Layout(fields={"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"})

# By model type of a model, of its language model or of its vision encoder.
LAYOUTS: Mapping[str, Layout] = {
    "siglip_vision_model": _NESTED,
    "siglip2_vision_model": _NESTED,
    "clip_vision_model": _NESTED,
    "qwen2_vl": _QWEN_VL,
    "qwen2_5_vl": _QWEN_VL,
    "gemma3_text": Layout(local_rope="rope_local_base_freq"),
    "qwen3_moe": Layout(fields={"num_local_experts": "num_experts"}),
    "gpt_neox": _NEOX,
    "gpt_neox_japanese": _NEOX,
}

# Fields of any file that tell of the machine or the folder a part came from.
LOCAL = (
    "_name_or_path",
    "name_or_path",
    "_commit_hash",
    "is_local",
    "local_files_only",
    "tokenizer_file",
    "vocab_file",
)
_OF_ROPE = ("rope_theta", "partial_rotary_factor")  # which older configurations have beside `rope_scaling`
_PLAIN_ROPE = ("default", "axial")
_STANDARD_TOKENS = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))


def publish(folder: Path, key: str) -> list[str]:
    """Give a folder that transformers wrote the names, fields and files of published checkpoints; returns remarks.

    Weights keep their bits and their places in the files. Raises ValueError that begins with ``key`` for a corrupt file.
    """
    config = read_json(folder / CONFIG, key)
    rules = weight_rules(config)
    for path in sorted(folder.glob("*.safetensors")):
        _rename_weights(path, rules)
    if (folder / INDEX).is_file():
        index = read_json(folder / INDEX, key)
        index["weight_map"] = {published_name(name, rules): file for name, file in index["weight_map"].items()}
        _write(folder / INDEX, index)
    published = published_config(config)
    with reading(key, str(folder / CONFIG)):
        meant = _meaning(folder, config["model_type"])
        _write(folder / CONFIG, published)
        if _meaning(folder, config["model_type"]) != meant:  # not every family of transformers 5 reads the older fields
            published = published_config(config, rope=False)
            _write(folder / CONFIG, published)
    _publish_generation(folder, key)
    _publish_processor(folder, key)
    _publish_tokenizer(folder, key)
    return unread_by_older(published)


def weight_rules(config: Mapping[str, Any]) -> tuple[Rule, ...]:
    """Rules for the names of a model's weights, by the model types in its ``config.json``."""
    parts = [config, *(value for name, value in config.items() if name.endswith("_config") and isinstance(value, dict))]
    layouts = [LAYOUTS[part["model_type"]] for part in parts if part.get("model_type") in LAYOUTS]
    return tuple(rule for layout in layouts for rule in layout.weights)


def published_name(name: str, rules: tuple[Rule, ...]) -> str:
    """What a weight that transformers calls ``name`` is called in published checkpoints."""
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def published_config(values: Mapping[str, Any], *, rope: bool = True) -> dict[str, Any]:
    """The fields of a ``config.json``, or of a part of it, as published checkpoints have them; without ``rope`` all but these.

    ``torch_dtype`` for ``dtype``, and that of the whole in its parts, which readers make one by one; ``rope_theta`` and
    ``rope_scaling`` for ``rope_parameters``, unless these differ from layer to layer, for which older configurations have no
    common name; ``tie_word_embeddings`` also in ``text_config``.
    """
    layout = LAYOUTS.get(values.get("model_type", ""), Layout())
    result: dict[str, Any] = {}
    for name, value in values.items():
        if name == "dtype":
            result["torch_dtype"] = value
        elif name not in LOCAL:
            part = name.endswith("_config") and isinstance(value, dict)
            result[name] = published_config(value, rope=rope) if part else _plain(value)
    if rope:
        _separate_rope(result, layout.local_rope)
    result = {layout.fields.get(name, name): value for name, value in result.items()}
    for name, value in result.items():
        if name.endswith("_config") and isinstance(value, dict) and "torch_dtype" in value and "torch_dtype" in result:
            value["torch_dtype"] = result["torch_dtype"]
    text = result.get("text_config")
    if isinstance(text, dict) and "tie_word_embeddings" in result:
        text["tie_word_embeddings"] = result["tie_word_embeddings"]
    if layout.flat and isinstance(text, dict):
        del result["text_config"]
        own = {name: value for name, value in text.items() if name != "model_type"}
        result = own | result
        result["vision_config"].pop("model_type", None)
    scaling = result.get("rope_scaling")
    if layout.multimodal_rope and isinstance(scaling, dict) and "mrope_section" in scaling:
        rest = {name: value for name, value in scaling.items() if name not in ("type", "rope_type")}
        result["rope_scaling"] = {"type": "mrope", **rest}
    return result


def _meaning(folder: Path, model_type: str) -> Any:
    """What the installed transformers makes of a folder's ``config.json``, but for what is said otherwise on purpose."""
    said = ("dtype", "torch_dtype", "tie_word_embeddings", "transformers_version", *LOCAL)

    def meant(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        left_out = (*said, "type") if "rope_type" in value else said  # older names are kept beside newer ones
        left_out = (*left_out, "partial_rotary_factor") if "rope_parameters" in value else left_out
        return {name: meant(part) for name, part in value.items() if name not in left_out}

    kind: Any = CONFIG_MAPPING[model_type]
    return meant(kind.from_pretrained(folder, local_files_only=True).to_dict())


def _plain(value: Any) -> Any:
    """Infinity and NaN as older versions write them."""
    if isinstance(value, dict):
        return float(value["__float__"]) if value.keys() == {"__float__"} else {k: _plain(v) for k, v in value.items()}
    return [_plain(one) for one in value] if isinstance(value, list) else value


def _separate_rope(values: dict[str, Any], local: str) -> None:
    rope = values.get("rope_parameters")
    if not isinstance(rope, dict):
        return
    layers = {name: value for name, value in rope.items() if isinstance(value, dict)}
    if layers:
        own = layers.get("sliding_attention", {})
        if not local or layers.keys() != {"full_attention", "sliding_attention"} or own.get("rope_type") != "default":
            return
        values[local], rope = own["rope_theta"], layers["full_attention"]
    del values["rope_parameters"]
    kind = rope.get("rope_type", "default")
    values |= {name: rope[name] for name in _OF_ROPE if rope.get(name) is not None}
    rest = {name: value for name, value in rope.items() if name not in ("rope_type", *_OF_ROPE)}
    if rest or kind not in _PLAIN_ROPE:
        values["rope_scaling"] = {"rope_type": "default" if kind in _PLAIN_ROPE else kind, **rest}
    elif kind == "default":
        values["rope_scaling"] = None


def unread_by_older(config: Mapping[str, Any]) -> list[str]:
    """What a published configuration says that transformers 4 does not read, in whose hands it is another model."""
    parts = [config, *(value for name, value in config.items() if name.endswith("_config") and isinstance(value, dict))]
    if any(part.get("rope_parameters") for part in parts):
        return [
            "rotary positions differ from layer to layer, which transformers 4 does not read: it makes another model of them"
        ]
    return []


def _publish_generation(folder: Path, key: str) -> None:
    path = folder / "generation_config.json"
    if path.is_file():
        values = read_json(path, key)
        values.pop("_from_model_config", None)  # it would let a reader change what stands here
        _write(path, _without_local(values))


def _publish_processor(folder: Path, key: str) -> None:
    """Settings of images and videos in files of their own, where they have been until transformers 5."""
    whole = folder / "processor_config.json"
    settings = read_json(whole, key) if whole.is_file() else {}
    named = {"processor_class": settings["processor_class"]} if "processor_class" in settings else {}
    for part, name in (("image", "preprocessor_config.json"), ("video", "video_preprocessor_config.json")):
        path = folder / name
        values = settings.pop(f"{part}_processor", None)
        if values is None and path.is_file():
            values = read_json(path, key)
        if isinstance(values, dict):
            _write(path, _without_local(named | _old_pixels(values)))
    if whole.is_file():
        _write(whole, _without_local(settings))


def _old_pixels(values: dict[str, Any]) -> dict[str, Any]:
    """Qwen2-VL's image processors have been told the least and the most pixels by these names."""
    size, kind = values.get("size"), values.get("image_processor_type", "")
    if kind.startswith("Qwen2VL") and isinstance(size, dict) and {"shortest_edge", "longest_edge"} <= size.keys():
        return values | {"min_pixels": size["shortest_edge"], "max_pixels": size["longest_edge"]}
    return values


def _publish_tokenizer(folder: Path, key: str) -> None:
    path, template = folder / "tokenizer_config.json", folder / "chat_template.jinja"
    if not path.is_file():
        return
    values = _without_local(read_json(path, key, most=MOST_BYTES_OF_A_TOKENIZER))
    if (
        values.pop("backend", None) == "tokenizers"
    ):  # classes of transformers 4 may add a BOS that tokenizer.json has not
        values["tokenizer_class"] = "PreTrainedTokenizerFast"
    if values.get("tokenizer_class") == "PreTrainedTokenizerFast":
        values.setdefault("model_input_names", ["input_ids", "attention_mask"])  # else 4 adds token_type_ids
    values["padding_side"] = "left"  # as published: prompts of a batch must end where replies begin
    named = values.pop("model_specific_special_tokens", None) or {}
    extra = values.pop("extra_special_tokens", None)
    if isinstance(extra, dict):
        named |= extra
    elif extra:
        values.setdefault("additional_special_tokens", extra)
    own = {name: value for name, value in values.items() if name.endswith("_token") and isinstance(value, str)}
    named = {name: value for name, value in (own | named).items() if name not in _STANDARD_TOKENS}
    if named:
        values["extra_special_tokens"] = named
    if template.is_file():
        values["chat_template"] = template.read_text(encoding="utf-8")  # as llama.cpp and older readers look for it
    _write(path, values)


def _without_local(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in LOCAL}


def _write(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _rename_weights(path: Path, rules: tuple[Rule, ...]) -> None:
    """Change the names in a safetensors file: 8 bytes with the length of a JSON header, the header, then the weights."""
    with open(path, "rb") as source:
        header = json.loads(source.read(int.from_bytes(source.read(8), "little")))
        renamed = {published_name(name, rules): value for name, value in header.items()}
        if renamed.keys() == header.keys():
            return
        if len(renamed) != len(header):
            raise AssertionError(f"two weights of {path} have one published name")
        text = json.dumps(renamed, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # the weights begin at a multiple of 8
        changed = path.with_suffix(".renamed")
        with open(changed, "wb") as target:
            target.write(len(text).to_bytes(8, "little") + text)
            shutil.copyfileobj(source, target, 1 << 24)
    os.replace(changed, path)
