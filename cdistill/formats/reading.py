"""Which project a checkpoint is of, and its reader."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING

from cdistill.errors import InputError
from cdistill.formats import bunny, compodistill, llava, mobilevlm, projector, tinyllava
from cdistill.formats.source import KEY, Given, Options, Source, read_values
from cdistill.formats.weights import has_weights, weights_in
from cdistill.models.folder import CONFIG
from cdistill.models.hub import is_hub_name

_PART = "language_model"  # folder that the factory's training leaves

# By model type.
READERS: Mapping[str, projector.Read] = {
    "compodistill": compodistill.read,
    "tinyllava": tinyllava.read,
    "mobilevlm": mobilevlm.read,
    **dict.fromkeys(llava.LANGUAGES, llava.read),
    **dict.fromkeys(("bunny-llama", "bunny-phi3", "bunny-qwen2", *bunny.REFUSED), bunny.read),
}


def read(path: str, options: Options) -> Source:
    """The checkpoint in a folder, or beside a projector's file.

    Raises:
        ValueError: there is none, it is of no known project, or cannot be expressed; in one line.
    """
    folder = Path(path)
    if folder.is_file() and folder.name in (projector.ALONE, projector.WITH_LORA):
        folder = folder.parent
    if not folder.is_dir():
        more = f": fetch it first, `hf download {path} --local-dir FOLDER`" if is_hub_name(path) else ""
        raise InputError(f"{KEY}: there is no folder {path!r}{more}")
    values = read_values(folder)
    project = READERS.get(values["model_type"])
    nested = isinstance(values.get("text_config"), Mapping)
    if project is None or (nested and project is llava.read):
        raise _unknown(folder, values)
    if values.get("quantization_config") is not None:
        raise InputError(f"{KEY}: the weights in {folder} are quantised: import those that they were made from")
    if projector.is_projector(folder) and project in (llava.read, bunny.read, mobilevlm.read):
        base = projector.base_of(folder, options)
        return projector.read(Given(folder, values, options, weights_in(base, "base")), project)
    if options.base is not None:
        raise InputError(f"{KEY}: {folder} holds no projector alone, so there is nothing to put before --base")
    if nested and (folder / _PART).is_dir() and not has_weights(folder):
        raise InputError(
            f"{KEY}: {folder} is as training has left it, in parts ({_PART} and others): write it as one model first, as the "
            "authors' scripts/upload/prepare_hf_model.py does"
        )
    return project(Given(folder, values, options, weights_in(folder, KEY)))


def _unknown(folder: Path, values: Mapping[str, Any]) -> InputError:
    kind = values["model_type"]
    said = f"{KEY}: {folder / CONFIG}: model_type is {kind!r:.80}"
    if kind in CONFIG_MAPPING:
        return InputError(f"{said}, which transformers loads as it is: nothing is to be imported")
    return InputError(f"{said}: known are {', '.join(READERS)}")
