"""`cdistill import`: a checkpoint of another project as a folder that transformers loads, the weights bit for bit."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from tokenizers import AddedToken
from torch import Tensor
from transformers import (
    AutoModelForImageTextToText,
    GenerationConfig,
    LlamaTokenizer,
    LlavaNextConfig,
    LlavaNextProcessor,
    PreTrainedTokenizerBase,
)
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

from cdistill.data.samples import IMAGE_TOKEN
from cdistill.errors import InputError
from cdistill.files import building, disk_full
from cdistill.formats import names
from cdistill.formats.prompts import MODES, chat_template
from cdistill.formats.reading import read
from cdistill.formats.source import KEY, Options, Source
from cdistill.formats.weights import counted, write
from cdistill.models.export import ADAPTER_CONFIG
from cdistill.models.folder import CONFIG, MOST_BYTES_OF_A_TOKENIZER, NO_CODE, one_line, read_json, reading
from cdistill.models.llava import image_size
from cdistill.models.load import load_tokenizer
from cdistill.models.processor import ProcessorFiles, add_stop_tokens, build_processor, load_image_processor
from cdistill.models.published import publish

ORIGINAL = "original"  # folder in the folder: what a checkpoint was beside its weights, for the way back
RECORD, UNUSED, BASE = "import.json", "unused.safetensors", "base"
_KEPT = (".json", ".model", ".txt", ".jinja", ".tiktoken", ".py")  # code is kept and not read
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")

Read = Callable[[], Tensor]


@dataclass(frozen=True)
class Imported:
    """What `import_checkpoint` wrote: where, which class loads it, of which project it was, and what to know about it."""

    folder: Path
    model_class: str
    format: str
    weights: int
    remarks: tuple[str, ...]


def import_checkpoint(
    path: str | Path,
    output: str | Path,
    *,
    vision_tower: str | None = None,
    base: str | None = None,
    prompt: str | None = None,
) -> Imported:
    """Read a published checkpoint into one folder of transformers' layout, atomically.

    Every weight keeps its bits and its number format, but those that a LoRA adapter changes. The embeddings may get one row
    more, for the image token (a copy of another row).

    Args:
        path: folder of the checkpoint, or a projector's file in one.
        output: a folder that does not exist or is empty.
        vision_tower: folder of the vision encoder, where the checkpoint has it elsewhere.
        base: folder of the language model, where the checkpoint is a projector alone.
        prompt: conversation mode, one of `cdistill.formats.prompts.MODES`, by default the project's for such a model.

    Raises:
        ValueError: in one line: the checkpoint is of no known project, damaged or incomplete, or computes what no class of
            transformers does; ``output`` is not empty or cannot be written.
    """
    output = Path(os.path.abspath(output))
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise InputError(f"output: {output} exists and is no empty folder")
    if prompt is not None and prompt not in MODES:
        raise InputError(f"prompt must be one of {', '.join(MODES)}, got {prompt!r}")
    source = read(str(path), Options(vision_tower, base, prompt))
    tokenizer = _tokenizer(source.tokenizer)
    with reading(KEY, f"the tokenizer in {source.tokenizer}"):
        known = len(tokenizer)
        if tokenizer.pad_token is None:  # as the projects set it where they train
            tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
        tokenizer.add_tokens(AddedToken(IMAGE_TOKEN, special=True, normalized=False), special_tokens=True)
        tokenizer.chat_template, end = chat_template(source.prompt, tokenizer, _image_mark(source, tokenizer))
    weights, unused, shapes = _renamed(source, tokenizer, known)
    with reading(KEY, f"the image processor in {source.images or source.folder}"):
        processor = _processor(source, tokenizer)
    generation = _generation(source, tokenizer, end)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with building(output) as part:
            source.config.save_pretrained(part)
            generation.save_pretrained(part)
            write(weights, part, KEY)
            processor.save_pretrained(part)
            publish(part, "output")
            _keep_original(source, part / ORIGINAL, unused, shapes)
    except Exception as error:
        if not (isinstance(error, OSError | SafetensorError) or disk_full(error)):
            raise
        raise InputError(f"output: {output} could not be written: {one_line(error)}") from None
    return Imported(
        output, source.config.architectures[0], source.format.split()[0], len(weights), tuple(source.remarks)
    )


def _renamed(
    source: Source, tokenizer: PreTrainedTokenizerBase, known: int
) -> tuple[dict[str, Read], list[str], dict[str, list[int]]]:
    """The weights by published names, the names of those that are not used, and the shapes of all by the project's names.

    Raises ValueError where they are not those of the model that the configuration describes.
    """
    rules, weights = names.NAMES[source.format], source.weights
    unused = [name for name in weights.shapes if names.BUFFERS.fullmatch(name)]
    where = {name: names.ours(name, rules) for name in weights.shapes if name not in unused}
    shapes = {new: weights.shapes[name] for name, new in where.items() if new is not None}
    if source.tower is not None:
        shapes |= source.tower.shapes
    rows = _make_room(source, tokenizer, known)
    with torch.device("meta"), reading(KEY, f"the model in {source.folder}"):
        model: Any = AutoModelForImageTextToText.from_config(source.config)
    source.config.architectures = [type(model).__name__]
    wanted = names.expected(model)
    for name in names.EMBEDDINGS:  # compared as they are in the checkpoint
        if name in wanted:
            wanted[name] = (rows, *wanted[name][1:])
    tied = source.config.tie_word_embeddings and names.EMBEDDINGS[1] in shapes
    if tied:
        wanted[names.EMBEDDINGS[1]] = wanted[names.EMBEDDINGS[0]]
    known_as = {new: name for name, new in where.items() if new is not None}
    _check_names(source, shapes, wanted, known_as, [name for name, new in where.items() if new is None])
    result: dict[str, Read] = {}
    for name in wanted:
        result[name] = _reader(source, name, known_as.get(name))
    _grow(source, tokenizer, result, rows)
    if tied and not torch.equal(*(result[name]() for name in names.EMBEDDINGS)):
        raise InputError(
            f"{KEY}: {source.folder / CONFIG} says tie_word_embeddings, but {known_as[names.EMBEDDINGS[1]]} is another than "
            f"{known_as[names.EMBEDDINGS[0]]}"
        )
    if unused:
        source.remarks.append(f"not used: {counted(unused, 'buffer')}, which transformers makes itself")
    return result, unused, {name: list(shape) for name, shape in weights.shapes.items()}


def _reader(source: Source, name: str, known_as: str | None) -> Read:
    if known_as is not None:
        return lambda: source.weights[known_as]
    tower = source.tower
    assert tower is not None
    return lambda: tower[name]


def _check_names(
    source: Source,
    shapes: dict[str, tuple[int, ...]],
    wanted: dict[str, tuple[int, ...]],
    known_as: dict[str, str],
    nameless: list[str],
) -> None:
    """Raise ValueError for weights that are missing, of other shapes, or more than the model has, by the project's names."""
    rules = names.NAMES[source.format]

    def said(name: str) -> str:
        return known_as.get(name) or names.theirs(name, rules) or name

    where = f"{KEY}: the weights in {source.folder} do not fit its {CONFIG}"
    missing = sorted(wanted.keys() - shapes.keys())
    if missing:
        raise InputError(f"{where}: missing: {counted([said(name) for name in missing], 'weight')}")
    more = sorted([*nameless, *(said(name) for name in shapes.keys() - wanted.keys())])
    if more:
        raise InputError(f"{where}: no {source.config.model_type} of transformers has {counted(more, 'weight')}")
    wrong = sorted(name for name, shape in wanted.items() if shapes[name] != shape)
    if wrong:
        first = wrong[0]
        raise InputError(
            f"{where}: of other shapes: {counted([said(name) for name in wrong], 'weight')}: {said(first)} is "
            f"{shapes[first]}, not {wanted[first]}"
        )


def _make_room(source: Source, tokenizer: PreTrainedTokenizerBase, known: int) -> int:
    """Give the configuration its image token and a vocabulary that holds it; returns the rows that embeddings have now."""
    text = source.config.text_config
    rows = int(text.vocab_size)
    image: Any = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    if known > rows:
        raise InputError(f"{KEY}: the tokenizer in {source.tokenizer} has {known} tokens, vocab_size is {rows}")
    source.config.image_token_index = image
    text.vocab_size = max(rows, image + 1)
    return rows


def _grow(source: Source, tokenizer: PreTrainedTokenizerBase, weights: dict[str, Read], rows: int) -> None:
    """Add the image token's row to the embeddings and the head, where they have none: that of a token no reply has."""
    wanted = source.config.text_config.vocab_size
    if wanted == rows:
        return
    with reading(KEY, f"the tokenizer in {source.tokenizer}"):
        ids = (tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id)
    copied = next((token for token in ids if token is not None and token < rows), 0)
    for name in names.EMBEDDINGS:
        if name in weights:
            weights[name] = _with_rows(weights[name], copied, wanted - rows)
    source.remarks.append(
        f"{IMAGE_TOKEN} is token {wanted - 1}: embeddings and head got a row, that of {tokenizer.convert_ids_to_tokens(copied)}"
    )


def _with_rows(read: Read, copied: int, count: int) -> Read:
    def grown() -> Tensor:
        weight = read()
        return torch.cat((weight, weight[copied : copied + 1].expand(count, -1)))

    return grown


def _tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a folder, as the versions of transformers made it that the projects were written for."""
    model, whole = folder / "tokenizer.model", folder / "tokenizer.json"
    if model.is_file() and not whole.is_file() and find_spec("sentencepiece") is None:
        raise InputError(f"{KEY}: {model} is read with a package that is not here: pip install sentencepiece")
    values = read_json(folder / "tokenizer_config.json", KEY)
    if not str(values.get("tokenizer_class")).startswith(LlamaTokenizer.__name__):
        return load_tokenizer(folder, KEY)
    legacy = values.get("legacy")  # of tokenizers from before transformers 5, which took true where it is missing
    with reading(
        KEY, f"the tokenizer in {folder}"
    ):  # AutoTokenizer takes another class beside a configuration of LLaVA
        made: PreTrainedTokenizerBase = LlamaTokenizer.from_pretrained(folder, legacy=legacy is not False, **NO_CODE)
    return made


def _image_mark(source: Source, tokenizer: PreTrainedTokenizerBase) -> str:
    """What a template writes where an image stands.

    The projects make tokens of what stands between images part by part. Tokenizers that put a space before a text, and none
    behind special tokens, need one there to make the same tokens of the whole.
    """
    image = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    before, after = (tokenizer(part)["input_ids"] for part in ("USER: ", "\nWhat? ASSISTANT:"))
    if after[:1] == before[:1] == [tokenizer.bos_token_id]:
        after = after[1:]
    for mark in (IMAGE_TOKEN, f"{IMAGE_TOKEN} "):
        if tokenizer(f"USER: {mark}\nWhat? ASSISTANT:")["input_ids"] == [*before, image, *after]:
            return mark
    source.remarks.append("the tokenizer makes other tokens of words beside an image than the project's code does")
    return IMAGE_TOKEN


def _processor(source: Source, tokenizer: PreTrainedTokenizerBase) -> Any:
    """The processor of the model: images as the project prepares them, its prompt, as many image tokens as the model takes."""
    config = source.config
    if isinstance(config, LlavaNextConfig):
        return _tiled_processor(source, tokenizer)
    processor = build_processor(config, tokenizer, KEY, source=source.images)
    if source.pad:
        processor.image_processor = LlavaImageProcessorPil(**_settings(processor.image_processor), do_pad=True)
        source.remarks.append(
            "images are padded to squares (image_aspect_ratio pad), by transformers' LlavaImageProcessor"
        )
    return processor


def _settings(images: Any) -> dict[str, Any]:
    """What an image processor of CLIP or SigLIP does, for another class of image processor."""
    names_of = (
        "size",
        "resample",
        "do_resize",
        "do_rescale",
        "rescale_factor",
        "do_normalize",
        "image_mean",
        "image_std",
    )
    values = {name: getattr(images, name) for name in names_of if getattr(images, name, None) is not None}
    values["do_convert_rgb"] = True
    values["do_center_crop"] = bool(getattr(images, "do_center_crop", False))
    if values["do_center_crop"]:
        values["crop_size"] = images.crop_size
    values["size"] = {name: value for name, value in dict(values["size"]).items() if value is not None}
    return values


def _tiled_processor(source: Source, tokenizer: PreTrainedTokenizerBase) -> LlavaNextProcessor:
    config = source.config
    assert source.images is not None
    height, _ = image_size(config.vision_config)
    settings = _settings(load_image_processor(source.images, KEY))
    settings |= {"size": {"shortest_edge": height}, "crop_size": {"height": height, "width": height}}
    images = LlavaNextImageProcessorPil(**settings, image_grid_pinpoints=config.image_grid_pinpoints)
    return LlavaNextProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=1,  # CLIP's class token
        image_token=IMAGE_TOKEN,
        chat_template=tokenizer.chat_template,
    )


def _generation(source: Source, tokenizer: PreTrainedTokenizerBase, end: int) -> GenerationConfig:
    """How the model writes replies: as the checkpoint says, and stopping where the prompt's answers are closed."""
    path = source.folder / "generation_config.json"
    values = read_json(path, KEY) if path.is_file() else {}
    text = source.config.text_config
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if values.get(name) is None:
            values[name] = getattr(text, name, None)
        ids = values[name] if isinstance(values[name], list) else [values[name] or 0]
        if not all(isinstance(token, int) and not isinstance(token, bool) for token in ids):
            raise InputError(
                f"{KEY}: {path}: {name} must be the number of a token, or several, got {values[name]!r:.60}"
            )
    if values["pad_token_id"] is None:
        values["pad_token_id"] = tokenizer.pad_token_id
    if not values.get("do_sample"):
        dropped = [name for name in _SAMPLING if values.pop(name, None) is not None]
        if dropped:
            source.remarks.append(f"not used of {path.name}: {', '.join(dropped)}, as do_sample is not set")
    values.pop("transformers_version", None)
    with reading(KEY, str(path)):
        made = GenerationConfig.from_dict(values)
        add_stop_tokens(SimpleNamespace(generation_config=made), [end])
    return made


def _keep_original(source: Source, folder: Path, unused: list[str], shapes: dict[str, list[int]]) -> None:
    """What the way back needs and transformers has no place for: files as they were, buffers, names and shapes."""
    folder.mkdir()
    for path in sorted(source.folder.iterdir()):
        fits = path.is_file() and path.suffix in _KEPT and path.stat().st_size <= MOST_BYTES_OF_A_TOKENIZER
        if fits and not path.name.endswith(".index.json") and path.name != ADAPTER_CONFIG:
            shutil.copyfile(path, folder / path.name)
    if source.tokenizer != source.folder:
        (folder / BASE).mkdir()
        ProcessorFiles([source.tokenizer], KEY).save_pretrained(folder / BASE)
    if unused:
        save_file({name: source.weights[name].clone() for name in unused}, folder / UNUSED, metadata={"format": "pt"})
    record = {"format": source.format, "projector": source.projector, "shapes": shapes}
    (folder / RECORD).write_text(json.dumps(record) + "\n", encoding="utf-8")
