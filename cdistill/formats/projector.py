"""A trained projector and the language model it was trained on: ``mm_projector.bin``, or ``non_lora_trainables.bin`` with LoRA.

The projects keep it so after their first stage, and after LoRA: beside the ``config.json`` of the whole, without the language
model, whose folder has to be given.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from cdistill.errors import InputError
from cdistill.formats.source import KEY, Given, Options, Source
from cdistill.formats.weights import Weights, counted, has_weights
from cdistill.models.export import ADAPTER_CONFIG, ADAPTER_WEIGHTS, merge_adapter
from cdistill.models.folder import CONFIG, read_json, reading
from cdistill.models.load import resolve_folder

ALONE, WITH_LORA, PICKLED_ADAPTER = "mm_projector.bin", "non_lora_trainables.bin", "adapter_model.bin"
_PART = "mm_projector."
# What says how a language model of certain shapes computes: equal in the checkpoint and in the base.
_COMPARED = ("num_attention_heads", "num_key_value_heads", "hidden_act", "rms_norm_eps", "rope_theta", "sliding_window")

Read = Callable[[Given], Source]


def is_projector(folder: Path) -> bool:
    """Whether a folder holds a projector without the language model."""
    return not has_weights(folder) and any((folder / name).is_file() for name in (ALONE, WITH_LORA))


def read(given: Given, project: Read) -> Source:
    """A projector put before its language model, as ``project`` reads the whole.

    Raises:
        ValueError: the language model is not given, or another than the checkpoint's; its LoRA adapter is missing or cannot be
            merged; a file holds anything else than a projector.
    """
    base, whole = base_of(given.folder, given.options), given.weights
    adapted = (given.folder / WITH_LORA).is_file()
    path = given.folder / (WITH_LORA if adapted else ALONE)
    found = Weights([path], KEY)
    found.rename(_without_wrapping)
    others = sorted(name for name in found.shapes if not name.startswith(f"model.{_PART}"))
    if others:
        raise InputError(f"{KEY}: {path} holds more than a projector: {counted(others, 'weight')}")
    source = project(given)
    _check_base(base, source)
    source.tokenizer, source.projector = base, not adapted
    if adapted:
        whole.take(_merged(given.folder, base, source))
        source.remarks.append("LoRA was merged into the language model")
    whole.take({name: found[name] for name in found.shapes})
    return source


def base_of(folder: Path, options: Options) -> Path:
    """Folder of the language model of a projector alone. Raises ValueError where it was not given."""
    if options.base is None:
        name = ALONE if (folder / ALONE).is_file() else WITH_LORA
        raise InputError(f"{KEY}: {folder} holds {name} without its language model: give the folder of that as --base")
    return resolve_folder(options.base, "base")


def _without_wrapping(name: str) -> str:
    """The name in the whole model: peft and older versions have put words before it."""
    return f"model.{_PART}{name.partition(_PART)[2]}" if _PART in name else name


def _check_base(base: Path, source: Source) -> None:
    theirs = read_json(base / CONFIG, "base")
    kind: Any = type(source.config.text_config)
    if theirs.get("model_type") != kind.model_type:
        raise InputError(
            f"base: {base} holds a {theirs.get('model_type')!r:.60}, {source.folder / CONFIG} is of a {kind.model_type}"
        )
    with reading("base", str(base / CONFIG)):
        found = kind.from_dict(theirs)
    for name in _COMPARED:
        ours, other = (_field(config, name) for config in (source.config.text_config, found))
        if ours != other:
            raise InputError(
                f"base: {base} holds another model than {source.folder / CONFIG} is of: {name} is {other}, there {ours}"
            )


def _field(config: Any, name: str) -> Any:
    rope = getattr(config, "rope_parameters", None) or {}
    return rope.get("rope_theta") if name == "rope_theta" and rope else getattr(config, name, None)


def _merged(folder: Path, base: Path, source: Source) -> Mapping[str, Tensor]:
    """The language model's weights with the adapter merged: summed in fp32, rounded once to what each is in."""
    if not (folder / ADAPTER_CONFIG).is_file():
        raise InputError(f"{KEY}: {folder / ADAPTER_CONFIG} is missing, the LoRA adapter beside {WITH_LORA}")
    state = {name: source.weights[name] for name in source.weights.shapes}
    with torch.device("meta"), reading("base", f"the model in {base}"):
        model = AutoModelForCausalLM.from_config(source.config.text_config)
    with reading("base", f"the model in {base}"):
        missing = model.load_state_dict(state, assign=True, strict=False).missing_keys
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    lost = sorted(set(missing) - set(tied))
    if lost:
        raise InputError(f"base: {base} lacks {counted(lost, 'weight')}")
    model.tie_weights()
    with tempfile.TemporaryDirectory() as name:
        adapter = Path(name)
        values = read_json(folder / ADAPTER_CONFIG, KEY)
        values["base_model_name_or_path"] = None  # peft would ask the hub about it
        (adapter / ADAPTER_CONFIG).write_text(json.dumps(values), encoding="utf-8")
        if (folder / PICKLED_ADAPTER).is_file() and not (folder / ADAPTER_WEIGHTS).is_file():
            pickled = Weights([folder / PICKLED_ADAPTER], KEY)
            save_file({key: pickled[key].clone() for key in pickled.shapes}, adapter / ADAPTER_WEIGHTS)
        elif (folder / ADAPTER_WEIGHTS).is_file():
            shutil.copyfile(folder / ADAPTER_WEIGHTS, adapter / ADAPTER_WEIGHTS)
        try:
            merged = merge_adapter(model.float(), adapter).state_dict()
        except ValueError as error:
            raise InputError(str(error).replace("model: ", f"{KEY}: ", 1).replace(name, str(folder))) from None
    return {key: value.to(state[key].dtype) for key, value in merged.items() if key in state}
