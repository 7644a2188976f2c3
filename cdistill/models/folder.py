"""Model folders, checked before anything in them is believed: none of their code is run, and what is wrong is one line.

Whatever is read of a model folder is read through here: its JSON by `read_json`, its weights' names by `weight_files`, and
what transformers makes of both inside `reading`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from cdistill.errors import InputError
from cdistill.manifest import looks

# Of `from_pretrained` of every class: a folder's own code (auto_map) is neither asked about nor run.
NO_CODE: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
CONFIG, INDEX, WEIGHTS = "config.json", "model.safetensors.index.json", "model.safetensors"
TOKENIZER = "tokenizer.json"
OBJECTS = (  # files that hold a JSON object, if they are there
    *(CONFIG, "generation_config.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("processor_config.json", "preprocessor_config.json", "chat_template.json", "adapter_config.json"),
)
MOST_BYTES, MOST_BYTES_OF_A_TOKENIZER = 1 << 26, 1 << 28  # of a JSON file
MOST, MOST_LAYERS = 1 << 31, 1 << 16  # of a size in a configuration; layers are listed one by one
LONGEST = 400  # characters of what a library says
SIZES = re.compile(
    r"hidden_size|intermediate_size|num_.*_(layers|heads)|vocab_size|head_dim|patch_size|depth|embed_dim"
)
_LANGUAGE_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
_checked: dict[Path, Any] = {}  # how the files looked of folders that `check_folder` has found well
_ELSEWHERE = re.compile(r"vision|visual|audio|encoder|resampler|perceiver|mtp|qformer")


def one_line(error: BaseException) -> str:
    """What a library says, in one line of bounded length."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."


@contextmanager
def reading(key: str, what: str) -> Iterator[None]:
    """Turn whatever a library raises over a file into ValueError, in one line that begins with ``key`` and names it.

    Code that a folder holds is not asked about, also where a processor loads its parts without `NO_CODE`.
    """
    from transformers import dynamic_module_utils
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # what does not fit is said in our line, not in a table before it
    seconds = dynamic_module_utils.TIME_OUT_REMOTE_CODE  # for an answer on the terminal
    dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0
    try:
        yield
    except ValueError as error:
        if str(error).startswith(f"{key}: "):
            raise
        raise InputError(f"{key}: {what} cannot be loaded: {one_line(error)}") from None
    except KeyError as error:
        raise InputError(f"{key}: {what} cannot be loaded: {error} is unknown or missing") from None
    except Exception as error:  # transformers, tokenizers and safetensors raise all kinds of them
        raise InputError(f"{key}: {what} cannot be loaded: {one_line(error)}") from None
    finally:
        dynamic_module_utils.TIME_OUT_REMOTE_CODE = seconds
        logging.set_verbosity(verbosity)


def read_json(path: Path, key: str, *, most: int = MOST_BYTES) -> dict[str, Any]:
    """The object in a JSON file of at most so many bytes. Raises ValueError in one line for anything else."""
    if not path.is_file():
        raise InputError(f"{key}: {path} is missing")
    try:
        if path.stat().st_size > most:
            raise InputError(f"it has {path.stat().st_size:,} bytes")
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{key}: {path} cannot be read ({error.strerror})") from None
    except RecursionError:
        raise InputError(f"{key}: {path} is corrupt (it nests too deeply)") from None
    except ValueError as error:
        raise InputError(f"{key}: {path} is corrupt ({one_line(error)})") from None
    if not isinstance(values, dict):
        raise InputError(f"{key}: {path} is corrupt (it is a {type(values).__name__}, not a JSON object)")
    return values


def check_folder(folder: Path, key: str) -> None:
    """Raise ValueError for a file of a model folder that no loader could take; they are read once, and when one has changed."""
    if not folder.is_dir():
        return
    place, now = folder.resolve(), looks(folder)
    if _checked.get(place) == now:
        return
    for name in OBJECTS:
        if (folder / name).is_file():
            read_json(folder / name, key)
    if (folder / TOKENIZER).is_file():
        read_json(folder / TOKENIZER, key, most=MOST_BYTES_OF_A_TOKENIZER)
    _checked[place] = now


def check_config(values: Mapping[str, Any], key: str, path: Path, within: str = "") -> None:
    """Raise ValueError for a configuration whose values no model can have, before memory is taken for one."""
    import torch

    if not within and not isinstance(values.get("model_type"), str):
        raise InputError(f"{key}: {path} is corrupt (no model_type)")
    for name, value in values.items():
        place = f"{within}{name}"
        if name == "text_config" and not isinstance(value, Mapping):  # a default one may have billions of weights
            raise InputError(f"{key}: {path} is corrupt ({place} must be an object, got {value!r:.40})")
        if isinstance(value, Mapping) and name.endswith("_config"):
            check_config(value, key, path, f"{place}.")
        if SIZES.fullmatch(name) and value is not None and not isinstance(value, (list, Mapping)):
            whole = isinstance(value, int) and not isinstance(value, bool)
            if not whole or not 0 <= value < (MOST_LAYERS if name.endswith("_layers") else MOST):
                raise InputError(f"{key}: {path} is corrupt ({place} must be a size, got {value!r:.40})")
        if (
            name in ("dtype", "torch_dtype")
            and isinstance(value, str)
            and not isinstance(getattr(torch, value.removeprefix("torch."), None), torch.dtype)
        ):
            raise InputError(f"{key}: {path} is corrupt ({place} must name a dtype of torch, got {value!r:.40})")


def weight_files(folder: Path, key: str) -> list[Path]:
    """The safetensors files of a model, each of which can be opened. Raises ValueError naming the one that cannot."""
    single, index = folder / WEIGHTS, folder / INDEX
    if single.is_file():
        paths = [single]
    elif not index.is_file():
        raise InputError(f"{key}: {single} is missing")
    else:
        names = read_json(index, key).get("weight_map")
        if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
            raise InputError(f"{key}: {index} is corrupt (weight_map must say which file holds which weight)")
        outside = [name for name in names.values() if Path(name).name != name or not name.endswith(".safetensors")]
        if outside:
            raise InputError(f"{key}: {index} is corrupt ({outside[0]!r:.80} is no safetensors file of its folder)")
        paths = [folder / name for name in sorted(set(names.values()))]
    for path in paths:
        if not path.is_file():
            raise InputError(f"{key}: {path} is missing")
        try:
            with path.open("rb"):  # safetensors takes what may not be read for what is not there
                pass
            with safe_open(path, framework="pt"):
                pass
        except PermissionError as error:
            raise InputError(f"{key}: {path} cannot be read ({error.strerror})") from None
        except (SafetensorError, OSError) as error:
            raise InputError(f"{key}: {path} is corrupt ({one_line(error)})") from None
    return paths


def check_depth(paths: list[Path], config: Any, key: str, folder: Path) -> None:
    """Raise ValueError where weights are of more or fewer layers of a language model than its configuration says."""
    wanted = getattr(config.get_text_config(decoder=True), "num_hidden_layers", None)
    extra = getattr(config.get_text_config(decoder=True), "num_nextn_predict_layers", 0) or 0
    found = 0
    for path in paths:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                layer = _LANGUAGE_LAYER.search(name)
                if layer is not None and not _ELSEWHERE.search(name):
                    found = max(found, 1 + int(layer[1]))
    if found and wanted is not None and not wanted <= found <= wanted + extra:
        raise InputError(
            f"{key}: the weights in {folder} do not fit its {CONFIG}: they are of {found} layers, num_hidden_layers is {wanted}"
        )
