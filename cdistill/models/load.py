"""Loading models and tokenizers from folders made by ``save_pretrained``, with errors that name the file."""

import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from cdistill.errors import InputError
from cdistill.manifest import verify
from cdistill.models.folder import (
    CONFIG,
    NO_CODE,
    check_config,
    check_depth,
    check_folder,
    read_json,
    reading,
    weight_files,
)
from cdistill.models.hub import is_hub_name, snapshot

ASSETS = Path(__file__).parent.parent / "assets"
BUILTIN = "builtin:"
RECIPE, METRICS = "recipe.yaml", "metrics.jsonl"  # in the folder of a run
STAGE = r"\d+-\w+"  # folder of a stage's result there
PLAIN_TOKENIZERS = (PreTrainedTokenizerFast.__name__, "PreTrainedTokenizerFast")  # as transformers 5 and 4 name it
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# A LLaVA or a causal language model; their attributes have too many types in transformers to be worth checking.
Model: TypeAlias = Any


def resolve_folder(reference: str, key: str, *, weights: bool = True) -> Path:
    """Folder of a checkpoint: a path (of a run, its last finished stage), ``builtin:NAME`` for package data, or a model of the
    hub (`cdistill.models.hub`), without its weights where they are not needed.

    Raises ValueError naming ``key``.
    """
    if not reference.startswith(BUILTIN) and is_hub_name(reference):
        return snapshot(reference, key, weights=weights)
    builtin = reference.startswith(BUILTIN)
    folder = ASSETS / reference.removeprefix(BUILTIN) if builtin else Path(reference)
    if not folder.is_dir():
        known = ", ".join(sorted(f"{BUILTIN}{p.name}" for p in ASSETS.glob("*") if p.is_dir())) or "none"
        raise InputError(f"{key}: there is no folder {reference!r}" + (f"; built-in: {known}" if builtin else ""))
    if (folder / CONFIG).is_file() or not (folder / RECIPE).is_file():
        verify(folder, key, needed=_is_result(folder))
        return folder
    # The stages of a run appear under their names when they are finished.
    stages = [path for path in folder.iterdir() if re.fullmatch(STAGE, path.name) and path.is_dir()]
    if not stages:
        raise InputError(f"{key}: the run in {folder} has no finished stage")
    last = max(stages, key=lambda path: int(path.name.partition("-")[0]))
    verify(last, key, needed=_is_result(last))
    return last


def _is_result(folder: Path) -> bool:
    """Whether a folder is a stage's result in the folder of a run that has trained."""
    beside = all((folder.parent / name).is_file() for name in (RECIPE, METRICS))
    return beside and re.fullmatch(STAGE, folder.name) is not None


def load_model(
    folder: str | Path,
    key: str = "student.base",
    *,
    dtype: torch.dtype | str = torch.float32,
    attention: str | None = "sdpa",
    **options: Any,
) -> Model:
    """LLaVA or causal language model in a folder made by ``save_pretrained``; ``dtype`` "auto" is that of the files.

    ``attention`` None is the model's own choice, ``options`` are those of ``from_pretrained``. Raises ValueError naming the
    missing or corrupt file.
    """
    folder = Path(folder)
    config = load_config(folder, key)
    auto = AutoModelForImageTextToText if hasattr(config, "vision_config") else AutoModelForCausalLM
    return _load(auto, folder, key, dtype, attention, **options)


def load_structure(folder: Path, key: str) -> Model:
    """The model whose configuration a folder holds, on the meta device: no weights are read, and none need be there.

    Raises ValueError in one line for a configuration that is missing, corrupt, or of another kind of model.
    """
    config = load_config(folder, key)
    with torch.device("meta"), reading(key, f"the model in {folder}"):
        return auto_class(config, folder, key).from_config(config, attn_implementation="sdpa")


def auto_class(config: PretrainedConfig, folder: Path, key: str) -> Any:
    """The auto class that makes the model of a configuration. Raises ValueError for one that writes no text."""
    auto = AutoModelForImageTextToText if hasattr(config, "vision_config") else AutoModelForCausalLM
    if type(config) not in auto._model_mapping:
        kind = config.model_type
        raise InputError(
            f"{key}: {folder} holds a {kind} model: neither a language model nor one that answers about images"
        )
    return auto


def load_for_evaluation(reference: str, key: str) -> Model:
    """Model of a folder or ``builtin:NAME`` in eval mode, on a GPU if any. Raises ValueError naming ``key``."""
    model = load_model(resolve_folder(reference, key), key)
    return model.eval().to("cuda" if torch.cuda.is_available() else "cpu")


def load_config(folder: Path, key: str) -> PretrainedConfig:
    """Configuration of the model in a folder. Raises ValueError naming the missing or corrupt file."""
    check_folder(folder, key)
    path = folder / CONFIG
    values = read_json(path, key)
    check_config(values, key, path)
    if values["model_type"] not in CONFIG_MAPPING:
        raise InputError(f"{key}: {path}: model_type {values['model_type']!r:.60} is not one that transformers knows")
    with reading(key, str(path)):
        return AutoConfig.from_pretrained(folder, **NO_CODE)


def _load(
    auto: Any,
    folder: Path,
    key: str,
    dtype: torch.dtype | str = torch.float32,
    attention: str | None = "sdpa",
    **options: Any,
) -> Model:
    """``auto.from_pretrained`` on verified files."""
    check_folder(folder, key)
    paths = weight_files(folder, key)
    if auto is not AutoModel and "config" not in options:
        check_depth(paths, load_config(folder, key), key, folder)
    options |= {"dtype": dtype, "attn_implementation": attention}
    wrong = f"{key}: the weights in {folder} do not fit its {CONFIG}"
    with reading(key, f"the model in {folder}"):
        try:
            model, info = auto.from_pretrained(folder, **NO_CODE, output_loading_info=True, **options)
        except RuntimeError as error:
            if "ignore_mismatched_sizes" not in str(error):
                raise
            # not asked for: weights of other shapes would be made anew, in the shapes of any size
            raise InputError(f"{wrong}: some have other shapes") from None
        check_loaded(model, info, wrong)
    broken = not_finite(model)
    if broken is not None:
        raise InputError(f"{key}: the weights in {folder} are not all finite: {broken} holds NaN or inf")
    return model


def check_loaded(model: nn.Module, info: Mapping[str, Any], wrong: str) -> None:
    """Raise ValueError, beginning with ``wrong``, where ``from_pretrained`` has made a weight anew or left one of a layer out.

    ``info`` is what it says with ``output_loading_info``.
    """
    if info["missing_keys"]:
        raise InputError(f"{wrong}: {min(info['missing_keys'])} is missing")
    left_out = _left_out(model, info["unexpected_keys"])
    if left_out is not None:
        raise InputError(
            f"{wrong}: {left_out} would be left out, as its layer has no such weight there (a bias, the scale of a quantised "
            "weight, an adapter that is not merged)"
        )


def _left_out(model: nn.Module, unexpected: Iterable[str]) -> str | None:
    """The first weight in a file that is a layer's of the model and that the model has no place for; None if there is none.

    Layers that the model does not have at all (a text encoder's) are not meant, and of a quantised model its quantiser knows.
    """
    if getattr(model, "hf_quantizer", None) is not None:
        return None
    layers = {name for name, module in model.named_modules() if module._parameters and not module._modules}
    buffers = {name for name, _ in model.named_buffers()}
    for name in sorted(set(unexpected) - buffers):
        parts = name.split(".")
        if any(".".join(parts[:i]) in layers for i in range(1, len(parts))):
            return name
    return None


@torch.no_grad()
def not_finite(model: nn.Module) -> str | None:
    """The first parameter that holds NaN or inf, or None. Of a partitioned model this process's part is looked at, of one
    that is offloaded or quantised what is neither."""
    for name, parameter in model.named_parameters():
        value = getattr(parameter, "ds_tensor", parameter)
        seen = value.is_floating_point() and value.element_size() > 1 and value.numel() and not value.is_meta
        # with a NaN both the smallest and the largest are NaN
        if seen and not all(map(math.isfinite, map(float, value.aminmax()))):
            return name
    return None


def load_multimodal(folder: Path, key: str, *, language: bool = True, **options: Any) -> Model:
    """Multimodal model in a folder made by ``save_pretrained``, fp32 unless ``options`` of ``from_pretrained`` differ.

    Without ``language`` the layers of its language model are neither built nor read; the configuration still tells of them.
    Raises ValueError naming the missing or corrupt file, or saying that the model sees no images.
    """
    config = load_config(folder, key)
    if not hasattr(config, "vision_config"):
        raise InputError(f"{key}: {folder} holds a {config.model_type} model, which has no vision encoder")
    if language:
        return _load(AutoModelForImageTextToText, folder, key, **options)
    shallow = load_config(folder, key)
    text = shallow.get_text_config(decoder=True)
    text.num_hidden_layers, text.layer_types = 0, []
    model = _load(AutoModelForImageTextToText, folder, key, config=shallow, **options)
    model.config = config
    return model


def encoder_config(folder: Path, key: str) -> PretrainedConfig:
    """Configuration of the vision encoder in a folder that holds one alone or beside a text encoder (SigLIP, CLIP).

    Raises ValueError naming the missing or corrupt file, or saying that there is no encoder that a LLaVA could have.
    """
    config = load_config(folder, key)
    vision = getattr(config, "vision_config", config)
    others = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    if (
        others
        or type(vision) not in MODEL_MAPPING
        or not all(hasattr(vision, x) for x in ("image_size", "hidden_size"))
    ):
        raise InputError(
            f"{key}: {folder} holds a {config.model_type} model: neither a LLaVA nor a vision encoder for one"
        )
    if hasattr(vision, "vision_use_head"):
        vision.vision_use_head = False  # of SigLIP: a LLaVA takes hidden states
    return vision


def load_encoder(folder: Path, key: str) -> Model:
    """Vision encoder that `encoder_config` finds in a folder, fp32. Raises ValueError as it does."""
    return _load(AutoModel, folder, key, config=encoder_config(folder, key))


def load_tokenizer(folder: Path, key: str) -> PreTrainedTokenizerBase:
    """Tokenizer in a folder. Raises ValueError naming the missing or corrupt file."""
    check_folder(folder, key)
    kind = read_json(folder / "tokenizer_config.json", key).get("tokenizer_class")
    # Beside a model of type qwen2, AutoTokenizer makes a Qwen2Tokenizer even of files that say they are another one's.
    auto = PreTrainedTokenizerFast if kind in PLAIN_TOKENIZERS else AutoTokenizer
    with reading(key, f"the tokenizer in {folder}"):
        return auto.from_pretrained(folder, **NO_CODE)
