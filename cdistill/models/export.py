"""Results that travel: one folder that plain transformers loads, adapters merged, processor beside the weights."""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import LlavaConfig, LlavaForConditionalGeneration

from cdistill.errors import InputError
from cdistill.files import building, disk_full
from cdistill.models import taf
from cdistill.models.chat_template import taking_parts
from cdistill.models.export_check import check_folder_replies
from cdistill.models.folder import one_line
from cdistill.models.load import DTYPES, Model, load_config, load_model, load_tokenizer, resolve_folder
from cdistill.models.processor import COMPOSITIONS, Processor, ProcessorFiles, build_processor, has_image_processor
from cdistill.models.published import publish
from cdistill.models.taf import MERGED, TAFAdapter, TAFLlavaConfig, TAFLlavaForConditionalGeneration

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
CODE = "modeling_cdistill_taf"


@dataclass(frozen=True)
class Exported:
    """What `export` wrote: where, which class loads it, in which number format, what was merged, what to know about it."""

    folder: Path
    model_class: str
    dtype: str
    merged: tuple[str, ...]
    remarks: tuple[str, ...]
    checked: str = ""  # what `check` compared


def export(
    model: str | Path,
    output: str | Path,
    *,
    dtype: str | None = None,
    merge_taf: bool = True,
    code: bool = False,
    max_shard_size: int | str | None = None,
    check: bool = False,
) -> Exported:
    """Write a model as one folder with safetensors, processor and chat template, atomically.

    Names of weights, fields and files are those of the family's published checkpoints (`cdistill.models.published`).

    A LoRA adapter is merged into its base in fp32 and rounded once. A student whose TAF map is linear gets it multiplied
    into the teacher adapter's last layer (`merge_taf`), and is a stock LLaVA where the widths allow that. Where nothing is
    merged the weights are the same bits, unless ``dtype`` changes them.

    Args:
        model: folder made by ``save_pretrained``, folder of a run (its last finished stage), folder of a peft adapter whose
            base is a local folder, or ``builtin:NAME``.
        output: a folder that does not exist or is empty.
        dtype: ``fp32``, ``bf16`` or ``fp16``; by default that of the model.
        merge_taf: False leaves a TAF student as it was trained.
        code: put the code of a TAF student beside the weights, for ``trust_remote_code`` where cdistill is not installed.
        max_shard_size: bytes of a file of weights, or such as ``5GB``; by default that of ``save_pretrained``.
        check: read the folder back in a fresh process and compare its replies with the model's before it gets its name.

    Raises:
        ValueError: the model, its base or its tokenizer is missing or corrupt, ``output`` is not empty or cannot be written,
            or ``check`` has found another model in it.
    """
    output = Path(os.path.abspath(output))
    _check_options(output, dtype, max_shard_size)
    folders, processor, remarks = find_parts(model)  # before the weights, which may take long
    loaded, merged, left = load_merged(folders, None if dtype is None else DTYPES[dtype], merge_taf=merge_taf)
    remarks += left
    if code and not isinstance(loaded, TAFLlavaForConditionalGeneration):
        remarks.append(f"--code: {type(loaded).__name__} is part of transformers and needs none")
        code = False
    checked, more = _write(loaded, processor, output, code=code, max_shard_size=max_shard_size, check=check)
    name = next(name for name, value in DTYPES.items() if value == loaded.dtype)
    return Exported(output, type(loaded).__name__, name, tuple(merged), (*remarks, *more), checked)


def find_parts(model: str | Path) -> tuple[list[Path], Processor, list[str]]:
    """Folders of a model, of an adapter with its base first; what goes beside the weights, and remarks on it.

    Raises ValueError as `export`.
    """
    folder = resolve_folder(str(model), "model")
    folders = [base_of(folder), folder] if (folder / ADAPTER_CONFIG).is_file() else [folder]
    return folders, *_check(folders)


def load_merged(
    folders: Sequence[Path], dtype: torch.dtype | None, *, merge_taf: bool = True
) -> tuple[Model, list[str], list[str]]:
    """The model in folders that `find_parts` found, what was merged into it, and remarks on that.

    ``dtype`` None is that of the files. Raises ValueError as `export`.
    """
    loaded, merged, remarks = _load(folders[0]), [], []
    target = loaded.dtype if dtype is None else dtype
    if len(folders) > 1:
        loaded, merged = (
            merge_adapter(loaded.float(), folders[1]),
            ["LoRA"],
        )  # a narrower format would lose what was learnt
    is_taf = isinstance(loaded, TAFLlavaForConditionalGeneration)
    if merge_taf and is_taf and loaded.config.taf_activation == "linear":
        if can_merge_taf(loaded):
            loaded, merged = merge_taf_map(loaded, target), [*merged, "TAF"]
        else:
            remarks.append("TAF was left as trained: the teacher's adapter has more activations than a LLaVA's")
    return loaded.to(target), merged, remarks


def _check_options(output: Path, dtype: str | None, max_shard_size: int | str | None) -> None:
    if isinstance(max_shard_size, str) and not re.fullmatch(r"[1-9]\d*([KMGT]B)?", max_shard_size, re.IGNORECASE):
        raise InputError(f"max_shard_size must be a number of bytes or such as 5GB, got {max_shard_size!r}")
    if dtype is not None and dtype not in DTYPES:
        raise InputError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    check_output(output)


def check_output(output: Path) -> None:
    """Raise ValueError if something is in the way of a folder to be written."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise InputError(f"output: {output} exists and is no empty folder")


def merge_taf_map(model: TAFLlavaForConditionalGeneration, dtype: torch.dtype) -> LlavaForConditionalGeneration:
    """A model with the parts of a linear TAF student, M multiplied into the layers of P_T after its activation.

    It is a stock LLaVA if P_T is d_S wide at its activation, else a `TAFLlavaForConditionalGeneration` with a `MergedAdapter`.
    The product is taken in fp64 and rounded once, to ``dtype``; the rest is not copied.
    """
    adapter: Any = model.model.multi_modal_projector
    first = adapter.fetched[0]
    config: Any = copy.deepcopy(model.config)
    config.teacher_adapter, config.teacher_hidden_size = None, first.out_features
    config.projector_hidden_act = adapter.activations[1]
    kind: type[LlavaForConditionalGeneration] = TAFLlavaForConditionalGeneration
    if config.teacher_hidden_size == config.text_config.hidden_size:
        kind = LlavaForConditionalGeneration
        config.multimodal_projector_bias = True  # M has one; the first layer's may be 0
        own = {"model_type", *(set(TAFLlavaConfig().to_dict()) - set(LlavaConfig().to_dict()))}
        config = LlavaConfig.from_dict({name: value for name, value in config.to_dict().items() if name not in own})
    else:
        config.taf_activation = MERGED
    with torch.device("meta"):
        result = kind(config)
    projector: Any = result.model.multi_modal_projector
    weight, bias = _product(adapter)
    state = {f"linear_1.{name}": value.detach() for name, value in first.state_dict().items()}
    if projector.linear_1.bias is not None and first.bias is None:
        state["linear_1.bias"] = first.weight.new_zeros(first.out_features).detach()
    state |= {"linear_2.weight": weight.to(dtype), "linear_2.bias": bias.to(dtype)}
    projector.load_state_dict(state, assign=True)
    result.model.vision_tower, result.model.language_model = model.model.vision_tower, model.model.language_model
    result.lm_head, result.generation_config = model.lm_head, model.generation_config
    return result.eval()


def can_merge_taf(model: TAFLlavaForConditionalGeneration) -> bool:
    """Whether P_T has one activation, after its first layer, as a LLaVA's adapter: what follows are products of matrices."""
    adapter: Any = model.model.multi_modal_projector
    return adapter.activations[1] is not None and not any(adapter.activations[2:])


def _product(adapter: TAFAdapter) -> tuple[Tensor, Tensor]:
    """Weight (d_S, d) and bias (d_S,) of M after all of P_T's layers but the first, fp64."""
    weight, bias = adapter.map.weight.detach().double(), adapter.map.bias.detach().double()
    for layer in reversed(adapter.fetched[1:]):
        if layer.bias is not None:
            bias = bias + weight @ layer.bias.detach().double()
        weight = weight @ layer.weight.detach().double()
    return weight, bias


def base_of(folder: Path) -> Path:
    """Folder of the model that a peft adapter was trained on; ValueError if it is not there or an adapter itself."""
    path = folder / ADAPTER_CONFIG
    try:
        reference = json.loads(path.read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"model: {path} is corrupt ({error!r})") from None
    base = resolve_folder(str(reference), f"model: {path}: base_model_name_or_path")
    if (base / ADAPTER_CONFIG).is_file():
        raise InputError(f"model: {path}: base_model_name_or_path {base} is an adapter itself; export that one first")
    return base


def _check(folders: list[Path]) -> tuple[Processor, list[str]]:
    """What goes beside the weights, a later folder's files before an earlier one's, and remarks on it."""
    config: Any = load_config(folders[0], "model")
    if getattr(config, "quantization_config", None) is not None:
        raise InputError(f"model: the weights in {folders[0]} are quantised; export the model they were made from")
    folder = next((f for f in reversed(folders) if (f / "tokenizer_config.json").is_file()), folders[-1])
    files = ProcessorFiles(folders, "model")
    tokenizer = load_tokenizer(folder, "model")
    remarks = []
    result: Processor = files
    if hasattr(config, "vision_config") and not any(has_image_processor(f) for f in folders):
        if config.model_type not in COMPOSITIONS:
            raise InputError(f"model: {folder / 'processor_config.json'} is missing")
        result = build_processor(config, tokenizer, "model")
        remarks.append(f"no image processor in {folder}: its vision encoder's usual one was taken")
    if config.model_type in COMPOSITIONS and Path("chat_template.json") not in files.files:
        image_token = tokenizer.convert_ids_to_tokens(config.image_token_id)
        template = taking_parts(tokenizer, image_token)
        if template != tokenizer.chat_template:  # of a folder that this package has not made, or an older one has
            files.chat_template = template
            remarks.append(f"the chat template in {folder} takes words alone: messages may have images now")
    if tokenizer.chat_template is None and not any(name.name.startswith("chat_template") for name in files.files):
        remarks.append(f"no chat template in {folder}: apply_chat_template will need one")
    return result, remarks


def _load(folder: Path) -> Model:
    loaded = load_model(folder, "model", dtype="auto", attention="eager").eval()  # every model has eager attention
    if loaded.dtype not in DTYPES.values():
        raise InputError(f"model: the weights in {folder} are {loaded.dtype}; known are {', '.join(DTYPES)}")
    return loaded


def merge_adapter(base: Model, folder: Path) -> Model:
    """The base of a peft adapter with the adapter merged into its weights, in the base's dtype.

    Raises:
        ValueError: peft is not installed, or the adapter is missing, corrupt, of another base or cannot be merged.
    """
    path, weights = folder / ADAPTER_CONFIG, folder / ADAPTER_WEIGHTS
    if not weights.is_file():
        raise InputError(f"model: {weights} is missing")
    try:
        with safe_open(weights, framework="pt") as file:
            saved = set(file.keys())
    except SafetensorError as error:
        raise InputError(f"model: {weights} is corrupt ({error})") from None
    try:
        from peft import PeftModel, get_peft_model_state_dict
    except ImportError:
        raise InputError(f"model: {path} is a peft adapter, and peft is not installed") from None
    try:
        with warnings.catch_warnings(action="ignore"):  # missing weights are an error, below
            adapted: Any = PeftModel.from_pretrained(base, str(folder))
    except (ValueError, TypeError, KeyError, RuntimeError) as error:
        raise InputError(f"model: {path} does not fit its base: {one_line(error)}") from None
    missing = sorted(set(get_peft_model_state_dict(adapted)) ^ saved)
    if missing:
        raise InputError(f"model: {weights} does not fit {path}: {missing[0]} is in one of them only")
    if not hasattr(adapted.base_model, "merge_and_unload"):
        raise InputError(f"model: {path}: peft_type {adapted.active_peft_config.peft_type.value} cannot be merged")
    _untie_adapted(adapted)
    try:
        with warnings.catch_warnings(action="ignore"):  # of tied embeddings, which are dealt with
            merged = adapted.merge_and_unload(safe_merge=True).eval()
    except (ValueError, RuntimeError) as error:
        raise InputError(f"model: {weights} cannot be merged: {one_line(error)}") from None
    head = merged.get_output_embeddings()
    if head is not None and head.weight is not merged.get_input_embeddings().weight:
        for config in (merged.config, merged.config.get_text_config(decoder=True)):
            config.tie_word_embeddings = False  # else loading drops one of the two
    return merged


def _untie_adapted(adapted: Any) -> None:
    """Give every module weights of its own if an adapted one shares them: the adapter holds for that module alone."""
    layers = [module.get_base_layer() for module in adapted.modules() if hasattr(module, "get_base_layer")]
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in adapted.modules():
        for name, weight in module.named_parameters(recurse=False):
            owners.setdefault(id(weight), []).append((module, name))
    shared = [modules for modules in owners.values() if len(modules) > 1]
    if not any(module is layer for modules in shared for module, _ in modules for layer in layers):
        return
    for modules in shared:
        for module, name in modules[1:]:
            setattr(module, name, nn.Parameter(getattr(module, name).detach().clone()))


def _write(
    model: Model, processor: Processor, output: Path, *, code: bool, max_shard_size: int | str | None, check: bool
) -> tuple[str, list[str]]:
    """Save everything beside ``output``, then rename; on failure nothing is left. What was checked, and remarks on that."""
    if hasattr(model.config, "auto_map"):  # it names files of the folder the model came from, which are not taken along
        del model.config.auto_map
    if code:
        model.config.auto_map = {
            "AutoConfig": f"{CODE}.{TAFLlavaConfig.__name__}",
            "AutoModelForImageTextToText": f"{CODE}.{TAFLlavaForConditionalGeneration.__name__}",
        }
    size = int(max_shard_size) if isinstance(max_shard_size, str) and max_shard_size.isdigit() else max_shard_size
    options = {} if size is None else {"max_shard_size": size}
    checked = ""
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with building(output) as part:
            model.save_pretrained(part, **options)
            processor.save_pretrained(part)
            remarks = publish(part, "output")
            if code:
                shutil.copyfile(taf.__file__, part / f"{CODE}.py")
            if check:
                checked, more = check_folder_replies(part, model, processor, code=code)
                remarks += more
    except Exception as error:
        if not (isinstance(error, OSError | SafetensorError) or disk_full(error)):
            raise
        raise InputError(f"output: {output} could not be written: {one_line(error)}") from None
    return checked, remarks
