"""`cdistill export --format`: a model in the layout of another project, which its own code loads."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from cdistill.errors import InputError
from cdistill.files import building, disk_full, scratch
from cdistill.formats import names, projector
from cdistill.formats.flat import PROJECTOR
from cdistill.formats.importing import BASE, ORIGINAL, RECORD, UNUSED
from cdistill.formats.source import STRATEGIES
from cdistill.formats.weights import Weights, counted, weights_in, write
from cdistill.models.export import ADAPTER_CONFIG, Exported, base_of, export
from cdistill.models.folder import CONFIG, one_line, read_json
from cdistill.models.load import resolve_folder
from cdistill.models.processor import ProcessorFiles
from cdistill.models.published import published_name, weight_rules
from cdistill.models.taf import TAFLlavaConfig

KEY = "model"  # begins messages
_ANEW = ("compodistill", "llava")  # of which a configuration can be written for any model that fits
_LANGUAGES = {"llama": "llava_llama", "mistral": "llava_mistral"}
_FEATURES = {ours: theirs for theirs, ours in STRATEGIES.items()}
_ARCHITECTURES = {
    "compodistill": "CompoDistillForConditionalGeneration",
    "llava_llama": "LlavaLlamaForCausalLM",
    "llava_mistral": "LlavaMistralForCausalLM",
}
_BESIDE = ("generation_config.json", "preprocessor_config.json")

Read = Callable[[], Tensor]


def export_as(
    name: str,
    model: str | Path,
    output: str | Path,
    *,
    dtype: str | None = None,
    merge_taf: bool = True,
    vision_tower: str | None = None,
) -> Exported:
    """Write a model as another project lays its checkpoints out, atomically.

    What was imported from that project gets its weights, files and names back bit for bit. For other models a configuration is
    written, for LLaVA's and the authors' code.

    Args:
        name: a project of `cdistill.formats.export_command.TAKES`.
        model, dtype, merge_taf: as of `cdistill.models.export.export`; the authors' format keeps a linear map
            of TAF as their ``post_connector``.
        output: a folder that does not exist or is empty.
        vision_tower: name of the vision encoder on the hub, for LLaVA's configuration of a model that was not imported.

    Raises:
        ValueError: the model is missing or corrupt, the project cannot express it, or ``output`` cannot be written.
    """
    output = Path(os.path.abspath(output))
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise InputError(f"output: {output} exists and is no empty folder")
    folder = resolve_folder(str(model), KEY)
    adapted = (folder / ADAPTER_CONFIG).is_file()
    original = (base_of(folder) if adapted else folder) / ORIGINAL
    record = _record_in(original)
    again = record is not None and not adapted and dtype is None and name in _formats_of(record)
    if name not in _ANEW and not again:
        raise InputError(
            f"{KEY}: {folder} was not imported from {name}, or is changed, and only that can be written as {name}; known for "
            f"others are {', '.join(_ANEW)}"
        )
    if record is not None and vision_tower is None:
        vision_tower = read_json(original / CONFIG, KEY).get("mm_vision_tower")
    remarks: tuple[str, ...] = ()
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with scratch(output) as work, building(output) as part:
            plain = folder if again else work / "plain"
            if not again:
                merge = merge_taf and name != "compodistill"
                remarks = export(folder, plain, dtype=dtype, merge_taf=merge).remarks
            values, held = _published(plain)
            if again:
                assert record is not None
                remarks = _write_again(name, held, original, record, part)
            else:
                _write_anew(name, held, values, plain, part, vision_tower)
    except Exception as error:
        if not (isinstance(error, OSError | SafetensorError) or disk_full(error)):
            raise
        raise InputError(f"output: {output} could not be written: {one_line(error)}") from None
    return Exported(output, name, str(values.get("torch_dtype", "")), (), remarks)


def _published(folder: Path) -> tuple[dict[str, Any], Weights]:
    """Configuration and weights of a folder of transformers, these by published names."""
    values, held = read_json(folder / CONFIG, KEY), weights_in(folder, KEY)
    rules = weight_rules(values)
    held.rename(lambda name: published_name(name, rules))
    return values, held


def _record_in(original: Path) -> dict[str, Any] | None:
    """What import has written down of a checkpoint, if there is anything. Raises ValueError if it is corrupt."""
    path = original / RECORD
    if not path.is_file():
        return None
    record = read_json(path, KEY)
    shapes = record.get("shapes")
    lists = isinstance(shapes, dict) and all(isinstance(shape, list) for shape in shapes.values())
    if record.get("format") not in names.NAMES or not lists or not isinstance(record.get("projector"), bool):
        raise InputError(f"{KEY}: {path} is corrupt (it must say format, projector and shapes)")
    return record


def _formats_of(record: Mapping[str, Any]) -> tuple[str, ...]:
    """As what an imported checkpoint can be written again."""
    return (record["format"].split()[0], *(("projector",) if record["projector"] else ()))


def _write_again(name: str, held: Weights, original: Path, record: Mapping[str, Any], part: Path) -> tuple[str, ...]:
    """The checkpoint that was imported, of its files and of the weights as they are now; returns remarks."""
    rules = names.NAMES[record["format"]]
    unused = Weights([original / UNUSED], KEY) if (original / UNUSED).is_file() else None
    result: dict[str, Read] = {}
    for weight, shape in record["shapes"].items():
        if unused is not None and weight in unused.shapes:
            result[weight] = _reader(unused, weight)
            continue
        ours = names.ours(weight, rules) or weight
        found = held.shapes.get(ours)
        if found is None or found[1:] != tuple(shape[1:]) or found[:1] < tuple(shape[:1]):
            raise InputError(f"{KEY}: {ours} is not as it was imported, so {weight} cannot be written")
        result[weight] = _first_rows(held, ours, shape[0] if ours in names.EMBEDDINGS else None)
    if name == "projector":
        parts = {weight: read() for weight, read in result.items() if "mm_projector." in weight}
        torch.save({weight: tensor.clone() for weight, tensor in parts.items()}, part / projector.ALONE)
    else:
        write(result, part, KEY)
    folders = [original] if name == "projector" else [original, original / BASE]
    for path in (path for folder in folders for path in sorted(folder.glob("*.*"))):
        if path.name not in (RECORD, UNUSED):
            shutil.copyfile(path, part / path.name)
    tower = names.theirs("vision_tower.", rules)
    if tower is not None and not any(weight.startswith(tower) for weight in record["shapes"]):
        return ("the vision tower is not among the weights, as before: the project's code takes its own by name",)
    return ()


def _reader(weights: Weights, name: str) -> Read:
    return lambda: weights[name]


def _first_rows(weights: Weights, name: str, rows: int | None) -> Read:
    """A weight, or its first rows: without that of the image token."""
    return lambda: weights[name] if rows is None else weights[name][:rows]


def _write_anew(
    name: str, held: Weights, values: Mapping[str, Any], plain: Path, part: Path, tower: str | None
) -> None:
    """A model that was not imported from the project, if its code computes the same."""
    made, row = (_flat if name == "llava" else _nested)(values, tower)
    images = plain / "preprocessor_config.json"
    if images.is_file() and read_json(images, KEY).get("do_pad") and made["image_aspect_ratio"] == "square":
        made["image_aspect_ratio"] = "pad"
    rules = names.NAMES[row]
    called = {weight: names.theirs(weight, rules) for weight in held.shapes}
    lost = sorted(weight for weight, their in called.items() if their is None)
    if lost:
        raise InputError(f"{KEY}: format {name} has no name for {counted(lost, 'weight')}")
    write({str(their): _reader(held, weight) for weight, their in called.items()}, part, KEY)
    ProcessorFiles([plain], KEY).save_pretrained(part)
    for beside in _BESIDE:
        if (plain / beside).is_file():
            shutil.copyfile(plain / beside, part / beside)
    (part / "processor_config.json").unlink(missing_ok=True)
    made["architectures"] = [_ARCHITECTURES[made["model_type"]]]
    (part / CONFIG).write_text(json.dumps(made, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _fits(name: str, values: Mapping[str, Any], towers: tuple[str, ...]) -> None:
    """Raise ValueError for a model that no configuration of the project describes."""
    kind = values["model_type"]
    taf = TAFLlavaConfig.model_type
    kinds = {"compodistill": ("llava", taf), "llava": ("llava", "llava_next")}[name]
    if kind not in kinds:
        why = (
            ": merge its TAF map (without --keep-taf), which needs equal widths of teacher and student"
            if kind == taf
            else ""
        )
        raise InputError(f"{KEY}: format {name} does not express a {kind} model{why}")
    said = {
        "projector_hidden_act": (values.get("projector_hidden_act", "gelu"), ("gelu",)),
        "multimodal_projector_bias": (values.get("multimodal_projector_bias", True), (True,)),
        "vision_config.model_type": (values["vision_config"].get("model_type", "clip_vision_model"), towers),
        "taf_activation": (values.get("taf_activation", "linear"), ("linear",)),
        "teacher_adapter": (values.get("teacher_adapter"), (None,)),
    }
    for field, (value, allowed) in said.items():
        if value not in allowed:
            raise InputError(f"{KEY}: format {name} does not express {field} {value!r:.60}: known are {allowed}")
    if not isinstance(values.get("vision_feature_layer", -2), int):
        raise InputError(f"{KEY}: format {name} does not express several layers in vision_feature_layer")


def _nested(values: Mapping[str, Any], tower: str | None) -> tuple[dict[str, Any], str]:
    """Configuration of the authors' code, and the row of the table of names."""
    name = "compodistill"
    _fits(name, values, ("siglip_vision_model", "clip_vision_model"))
    text, vision = dict(values["text_config"]), dict(values["vision_config"])
    result = {
        "model_type": name,
        "llm_model_name_or_path": "",
        "vision_model_name_or_path": tower or "",
        "connector_type": PROJECTOR,
        "text_config": text,
        "vision_config": vision,
        "vision_hidden_size": vision["hidden_size"],
        "hidden_size": text["hidden_size"],
        "vocab_size": text["vocab_size"],
        "vision_feature_layer": values.get("vision_feature_layer", -2),
        "vision_feature_select_strategy": _FEATURES[values.get("vision_feature_select_strategy", "default")],
        "image_token_index": -200,
        "image_aspect_ratio": "square",
        "torch_dtype": values.get("torch_dtype"),
        "use_cache": True,
    }
    student = values["model_type"] == TAFLlavaConfig.model_type
    width = values["teacher_hidden_size"] if student else None
    return result | {"post_connector_use": student, "connector_hidden_size": width}, name + " student" * student


def _flat(values: Mapping[str, Any], tower: str | None) -> tuple[dict[str, Any], str]:
    """Configuration of LLaVA's code, and the row of the table of names."""
    name = "llava"
    _fits(name, values, ("clip_vision_model",))
    text, vision = dict(values["text_config"]), values["vision_config"]
    kind = text.pop("model_type", "llama")
    if kind not in _LANGUAGES:
        raise InputError(f"{KEY}: format {name} has no {kind}: its language models are {', '.join(_LANGUAGES)}")
    if tower is None:
        raise InputError(
            f"{KEY}: format {name} names the vision tower, as in --vision-tower openai/clip-vit-large-patch14-336"
        )
    tiles = values["model_type"] == "llava_next"
    result = text | {
        "model_type": _LANGUAGES[kind],
        "tie_word_embeddings": values.get("tie_word_embeddings", False),
        "torch_dtype": values.get("torch_dtype"),
        "mm_vision_tower": tower,
        "unfreeze_mm_vision_tower": True,  # else LLaVA's code takes the tower's weights from the hub
        "mm_hidden_size": vision["hidden_size"],
        "mm_projector_type": PROJECTOR,
        "mm_vision_select_layer": values.get("vision_feature_layer", -2),
        "mm_vision_select_feature": _FEATURES[values.get("vision_feature_select_strategy", "default")],
        "mm_patch_merge_type": "spatial_unpad" if tiles else "flat",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "image_aspect_ratio": "anyres" if tiles else "square",
        "use_mm_proj": True,
    }
    if tiles:
        result["image_grid_pinpoints"] = [[width, height] for height, width in values["image_grid_pinpoints"]]
    return result, name
