"""Loading models and tokenizers from folders made by ``save_pretrained``, with errors that name the file."""

import json
import re
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors import SafetensorError, safe_open
from transformers import (
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

ASSETS = Path(__file__).parent.parent / "assets"
BUILTIN = "builtin:"
RECIPE = "recipe.yaml"  # in the folder of a run
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# A LLaVA or a causal language model; their attributes have too many types in transformers to be worth checking.
Model: TypeAlias = Any


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def resolve_folder(reference: str, key: str) -> Path:
    """Folder of a checkpoint: a path (of a run, its last finished stage) or ``builtin:NAME`` for package data.

    Raises ValueError naming ``key``.
    """
    builtin = reference.startswith(BUILTIN)
    folder = ASSETS / reference.removeprefix(BUILTIN) if builtin else Path(reference)
    if not folder.is_dir():
        known = ", ".join(sorted(f"{BUILTIN}{p.name}" for p in ASSETS.glob("*") if p.is_dir())) or "none"
        raise ValueError(f"{key}: there is no folder {reference!r}" + (f"; built-in: {known}" if builtin else ""))
    if (folder / "config.json").is_file() or not (folder / RECIPE).is_file():
        return folder
    # The stages of a run appear under their names when they are finished.
    stages = [path for path in folder.iterdir() if re.fullmatch(r"\d+-\w+", path.name) and path.is_dir()]
    if not stages:
        raise ValueError(f"{key}: the run in {folder} has no finished stage")
    return max(stages, key=lambda path: int(path.name.partition("-")[0]))


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
    """The model whose configuration a folder holds, on the meta device: no weights are read, and none need be there."""
    config = load_config(folder, key)
    auto = AutoModelForImageTextToText if hasattr(config, "vision_config") else AutoModelForCausalLM
    with torch.device("meta"):
        return auto.from_config(config, attn_implementation="sdpa")


def load_for_evaluation(reference: str, key: str) -> Model:
    """Model of a folder or ``builtin:NAME`` in eval mode, on a GPU if any. Raises ValueError naming ``key``."""
    model = load_model(resolve_folder(reference, key), key)
    return model.eval().to("cuda" if torch.cuda.is_available() else "cpu")


def load_config(folder: Path, key: str) -> PretrainedConfig:
    """Configuration of the model in a folder. Raises ValueError naming the missing or corrupt file."""
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{key}: {path} is missing")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{key}: {path} is corrupt ({error})") from None
    if not isinstance(values, dict) or "model_type" not in values:
        raise ValueError(f"{key}: {path} is corrupt (no model_type)")
    return AutoConfig.from_pretrained(folder)


def _weight_files(folder: Path, key: str) -> list[Path]:
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        raise ValueError(f"{key}: {single} is missing")
    try:
        shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (json.JSONDecodeError, KeyError) as error:
        raise ValueError(f"{key}: {index} is corrupt ({error!r})") from None
    return [folder / shard for shard in shards]


def _load(
    auto: Any,
    folder: Path,
    key: str,
    dtype: torch.dtype | str = torch.float32,
    attention: str | None = "sdpa",
    **options: Any,
) -> Model:
    """``auto.from_pretrained`` on verified files."""
    for path in _weight_files(folder, key):
        if not path.is_file():
            raise ValueError(f"{key}: {path} is missing")
        try:
            with safe_open(path, framework="pt"):
                pass
        except SafetensorError as error:
            raise ValueError(f"{key}: {path} is corrupt ({error})") from None
    options |= {"dtype": dtype, "attn_implementation": attention}
    wrong = f"{key}: the weights in {folder} do not fit its config.json"
    try:
        model, info = auto.from_pretrained(folder, local_files_only=True, output_loading_info=True, **options)
    except (
        RuntimeError
    ) as error:  # not asked for: weights of other shapes would be made anew, in the shapes of any size
        if "ignore_mismatched_sizes" not in str(error):
            raise
        raise ValueError(f"{wrong}: some have other shapes") from None
    if info["missing_keys"]:
        raise ValueError(f"{wrong}: {min(info['missing_keys'])} is missing")
    return model


def load_multimodal(folder: Path, key: str, *, language: bool = True, **options: Any) -> Model:
    """Multimodal model in a folder made by ``save_pretrained``, fp32 unless ``options`` of ``from_pretrained`` differ.

    Without ``language`` the layers of its language model are neither built nor read; the configuration still tells of them.
    Raises ValueError naming the missing or corrupt file, or saying that the model sees no images.
    """
    config = load_config(folder, key)
    if not hasattr(config, "vision_config"):
        raise ValueError(f"{key}: {folder} holds a {config.model_type} model, which has no vision encoder")
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
        raise ValueError(
            f"{key}: {folder} holds a {config.model_type} model: neither a LLaVA nor a vision encoder for one"
        )
    if hasattr(vision, "vision_use_head"):
        vision.vision_use_head = False  # of SigLIP: a LLaVA takes hidden states
    return vision


def load_encoder(folder: Path, key: str) -> Model:
    """Vision encoder that `encoder_config` finds in a folder, fp32. Raises ValueError as it does."""
    return _load(AutoModel, folder, key, config=encoder_config(folder, key))


def load_tokenizer(folder: Path, key: str) -> PreTrainedTokenizerBase:
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        raise ValueError(f"{key}: {path} is missing")
    try:
        kind = json.loads(path.read_text(encoding="utf-8")).get("tokenizer_class")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{key}: {path} is corrupt ({error})") from None
    # Beside a model of type qwen2, AutoTokenizer makes a Qwen2Tokenizer even of files that say they are another one's.
    auto = PreTrainedTokenizerFast if kind == PreTrainedTokenizerFast.__name__ else AutoTokenizer
    return auto.from_pretrained(folder, local_files_only=True)
