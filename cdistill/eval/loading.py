"""Models to be measured: any folder, adapter, run or id of a model, with what makes tokens of questions for it."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cdistill.errors import InputError
from cdistill.families import family_of
from cdistill.models.export import ADAPTER_CONFIG, base_of, merge_adapter
from cdistill.models.folder import one_line
from cdistill.models.load import DTYPES, Model, load_config, load_model, load_tokenizer, resolve_folder
from cdistill.models.processor import COMPOSITIONS, build_processor, has_image_processor, load_processor
from cdistill.models.quantized import quantized

_LOOKED_AT, _PLACES = 1 << 16, 16  # bytes of a file of weights, at so many places


@dataclass(frozen=True)
class Loaded:
    """A model in eval mode on its device, and its processor (a tokenizer where it sees no images).

    Attributes:
        name: what the user called it.
        fingerprint: of its files: other weights have another one.
        form: its number format, as ``bf16`` or ``4bit``.
        bytes: that its weights take.
        sees: whether it sees images.
    """

    model: Model
    processor: Any
    name: str
    fingerprint: str
    form: str
    bytes: int
    sees: bool


def load(
    reference: str,
    *,
    dtype: str | None = None,
    load_in: str | None = None,
    device_map: str | None = None,
    usual_processor: bool = False,
) -> Loaded:
    """Load a model to be measured.

    Args:
        reference: a folder made by ``save_pretrained``, of a run (its last finished stage) or of a peft adapter,
            ``builtin:NAME``, or an id of the Hugging Face hub.
        dtype: ``fp32``, ``bf16`` or ``fp16``; by default that of the files.
        load_in: ``8bit`` or ``4bit``: the language model's layers are quantised by bitsandbytes.
        usual_processor: a LLaVA without an image processor gets the usual one of its vision encoder.
        device_map: of accelerate, as ``auto``; by default the whole model is on this process's GPU, or on the CPU.

    Raises:
        ValueError: in one line, whatever keeps the model from being loaded.
    """
    if load_in is not None and not torch.cuda.is_available():
        raise InputError(f"--load-in {load_in} needs a CUDA GPU, and there is none; leave it out")
    try:
        return _load(reference, dtype, load_in, device_map, usual_processor)
    except (ValueError, OSError, ImportError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        said = one_line(error)
        if not said.startswith("model: "):
            said = f"model: {reference} cannot be loaded: {said or type(error).__name__}"
        raise InputError(said) from None


def _load(reference: str, dtype: str | None, load_in: str | None, device_map: str | None, usual: bool) -> Loaded:
    folder = resolve_folder(reference, "model")
    adapted = (folder / ADAPTER_CONFIG).is_file()
    folders = [base_of(folder), folder] if adapted else [folder]
    if adapted and load_in is not None:
        raise InputError(
            f"model: {folder} is a peft adapter: --load-in takes whole models; `cdistill export` makes one of it"
        )
    config: Any = load_config(folders[0], "model")
    processor = load_questioner(folders, config, usual=usual)  # before the weights, which may take long
    options: dict[str, Any] = {} if device_map is None else {"device_map": device_map}
    wanted: Any = "auto" if dtype is None else DTYPES[dtype]
    if load_in is not None:
        wanted = torch.bfloat16 if dtype is None else wanted
        options["quantization_config"] = quantized(load_in, wanted, family_of(config), "model: --load-in")
        options.setdefault("device_map", {"": _device()})
    model = load_model(folders[0], "model", dtype=wanted, attention=None, **options).eval()
    if adapted:
        target = model.dtype
        model = merge_adapter(model.float(), folder).to(target)  # sums in a narrower format would lose what was learnt
    if "device_map" not in options:
        model = model.to(_device())
    form = load_in or next((name for name, value in DTYPES.items() if value == model.dtype), str(model.dtype))
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    return Loaded(model, processor, reference, fingerprint(folders), form, size, hasattr(config, "vision_config"))


def load_questioner(folders: list[Path], config: Any, *, usual: bool) -> Any:
    """Processor or tokenizer of a model whose files lie in some folders, a later one's before an earlier one's.

    Raises:
        ValueError: a model that sees images has no image processor, nor is the ``usual`` one of a LLaVA's encoder wanted.
    """
    sees = hasattr(config, "vision_config")
    with_images = [folder for folder in folders if has_image_processor(folder)]
    if sees and with_images:
        return load_processor(with_images[-1], "model")
    words = [folder for folder in folders if (folder / "tokenizer_config.json").is_file()]
    tokenizer = load_tokenizer((words or folders)[-1], "model")
    if not sees:
        return tokenizer
    if not usual or config.model_type not in COMPOSITIONS:
        raise InputError(
            f"model: {folders[-1]} has no image processor (preprocessor_config.json or processor_config.json is missing); "
            "put that of the model beside its weights"
        )
    return build_processor(config, tokenizer, "model")


def fingerprint(folders: list[Path]) -> str:
    """What tells a model's files from others: their names, sizes, and bytes at places all over them."""
    digest = hashlib.sha256()
    for folder in folders:
        for path in sorted(path for path in folder.iterdir() if path.suffix in (".safetensors", ".json", ".jinja")):
            size = path.stat().st_size
            digest.update(f"{path.name} {size}\n".encode())
            with path.open("rb") as file:
                for place in range(_PLACES):
                    file.seek(max(0, size - _LOOKED_AT) * place // (_PLACES - 1))
                    digest.update(file.read(_LOOKED_AT))
    return digest.hexdigest()[:16]


def _device() -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
