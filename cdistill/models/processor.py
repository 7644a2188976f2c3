"""What stands beside a model's weights: the processor of a LLaVA composition, or files that are taken over as they are."""

import json
import shutil
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

from PIL import Image
from transformers import AutoProcessor, LlavaProcessor, PretrainedConfig, PreTrainedTokenizerBase
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from cdistill.errors import InputError
from cdistill.models.chat_template import taking_parts
from cdistill.models.folder import NO_CODE, read_json, reading
from cdistill.models.llava import encoder_positions, image_size
from cdistill.models.taf import TAFLlavaConfig

COMPOSITIONS = ("llava", TAFLlavaConfig.model_type)
IMAGE_PROCESSORS = ("processor_config.json", "preprocessor_config.json")
_NO_SETTINGS = ("processor_class", "image_processor_type", "auto_map", "_processor_class")
FILES = (
    *IMAGE_PROCESSORS,
    "video_preprocessor_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.tiktoken",
    "spiece.model",
    "sentencepiece*.model",
    "chat_template.*",
    "additional_chat_templates/*.jinja",
)


class Processor(Protocol):
    """Anything that can put itself beside the weights: a processor, a tokenizer, `ProcessorFiles`."""

    def save_pretrained(self, save_directory: Any) -> Any: ...


class ProcessorFiles:
    """The processor and tokenizer files of some folders, a later folder's in place of an earlier one's.

    They are copied: loading may need packages that are not here (torchvision for video), and saving is not always exact.
    ``chat_template``, if it is set, takes the place of theirs.

    Raises:
        ValueError: a JSON file among them is corrupt.
    """

    chat_template: str | None = None

    def __init__(self, folders: Sequence[Path], key: str) -> None:
        self.files = {
            path.relative_to(folder): path for folder in folders for name in FILES for path in sorted(folder.glob(name))
        }
        for path in self.files.values():
            if path.suffix == ".json" and path.name != "tokenizer.json":
                read_json(path, key)

    def save_pretrained(self, save_directory: Any) -> None:
        for name, path in self.files.items():
            target = Path(save_directory) / name
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, target)
        if self.chat_template is not None:
            save_chat_template(Path(save_directory), self.chat_template)


def save_chat_template(folder: Path, source: str) -> None:
    """Make this the chat template of the processor and tokenizer in a folder, in place of one in any older form."""
    (folder / "chat_template.jinja").write_text(source, encoding="utf-8")
    (folder / "chat_template.json").unlink(missing_ok=True)  # transformers would prefer it
    for name in ("processor_config.json", "tokenizer_config.json"):
        path = folder / name
        values = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        if "chat_template" in values:
            del values["chat_template"]
            path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def add_stop_tokens(model: Any, tokens: Sequence[int]) -> None:
    """Add tokens to those at which a model stops generating, also in the generation config that is saved with it."""
    known = model.generation_config.eos_token_id
    known = [] if known is None else [known] if isinstance(known, int) else list(known)
    ids = [*(token for token in tokens if token not in known), *known]
    if ids:
        model.generation_config.eos_token_id = ids[0] if len(ids) == 1 else ids


def has_image_processor(folder: Path) -> bool:
    """Whether a folder says how images become pixel values."""
    return any((folder / name).is_file() for name in IMAGE_PROCESSORS)


def build_processor(
    config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, key: str, *, source: Path | None = None
) -> LlavaProcessor:
    """The processor of a LLaVA composition, with the tokenizer's chat template, which learns to take images if it does not.

    Args:
        config: configuration of the model; it decides how many image tokens an image becomes.
        tokenizer: the model's.
        key: what errors name.
        source: folder whose image processor is taken; without one it is the usual one of the vision encoder.

    Raises:
        ValueError: there is no usual one, that of ``source`` cannot be loaded, or images do not become as many tokens as the
            model was built for.
    """
    vision: Any = config.vision_config  # type: ignore[attr-defined]
    if source is not None and has_image_processor(source):
        images = load_image_processor(source, key)
    else:
        images = _usual_image_processor(vision, key)
    size = image_pixels(images, vision)
    positions = encoder_positions(vision, size)
    assert positions is not None, "images of any size have processors of their own"
    image_token = tokenizer.convert_ids_to_tokens(config.image_token_id)  # type: ignore[attr-defined]
    tokenizer.chat_template = taking_parts(tokenizer, image_token)
    processor = LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=vision.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,  # type: ignore[attr-defined]
        num_additional_image_tokens=positions[0] - positions[1],  # class token, registers
        image_token=image_token,
        chat_template=tokenizer.chat_template,
    )
    ids = processor(text=processor.image_token, images=_blank(vision), add_special_tokens=False)["input_ids"][0]
    image_id, wanted = config.image_token_id, config.image_seq_length  # type: ignore[attr-defined]
    if ids != [image_id] * wanted:
        raise InputError(
            f"{key}: its processor makes {len(ids)} tokens {ids[0]} of an image, the model takes {wanted} tokens {image_id}"
        )
    return processor


def _blank(vision: Any) -> Image.Image:
    height, width = image_size(vision)
    return Image.new("RGB", (width, height))


def load_image_processor(folder: Path, key: str) -> Any:
    """The image processor in a folder that has one. Raises ValueError if it cannot be loaded."""
    return _load(AutoImageProcessor, folder, key)


def image_pixels(images: Any, vision: Any) -> tuple[int, int]:
    """Height and width in pixels of what an image processor makes of a square image."""
    height, width = images(_blank(vision), return_tensors="np")["pixel_values"].shape[-2:]
    return height, width


def _usual_image_processor(vision: Any, key: str) -> Any:
    height, width = image_size(vision)
    size = {"height": height, "width": width}
    if vision.model_type == "siglip_vision_model":
        return SiglipImageProcessorPil(size=size)
    if vision.model_type == "clip_vision_model":
        return CLIPImageProcessorPil(size={"shortest_edge": min(height, width)}, crop_size=size)
    raise InputError(
        f"{key}: preprocessor_config.json is missing, and {vision.model_type} has no usual image processor: put that of the "
        "vision encoder beside its weights"
    )


def load_processor(folder: Path, key: str) -> Any:
    """The processor in a folder.

    Raises:
        ValueError: there is none, a file of it is corrupt, or a package it needs is missing; the message begins with ``key``.
    """
    if not has_image_processor(folder):
        raise InputError(f"{key}: {folder / IMAGE_PROCESSORS[1]} is missing")
    return _load(AutoProcessor, folder, key)


def _load(auto: Any, folder: Path, key: str) -> Any:
    """``auto.from_pretrained`` in a folder that has an image processor, with one line that names what is wrong."""
    paths = [folder / name for name in IMAGE_PROCESSORS if (folder / name).is_file()]
    for path in paths:  # transformers takes a corrupt file for a missing one, or says nothing of its name
        read_json(path, key)
    kind = "image processor" if auto is AutoImageProcessor else "processor"
    with reading(key, f"the {kind} of {paths[0]}"):
        return auto.from_pretrained(folder, **NO_CODE)


def check_image_processors(folders: Mapping[str, Path]) -> None:
    """Check that the folders that have an image processor (by key of the recipe) have one and the same.

    Raises:
        ValueError: they have not, or one of them cannot be loaded.
    """
    difference = image_processor_difference(folders)
    if difference is not None:
        raise InputError(difference)


def image_processor_difference(folders: Mapping[str, Path]) -> str | None:
    """In what the image processors of folders (by key of the recipe) differ, those that have one; None where they are the same.

    Raises:
        ValueError: one of them cannot be loaded.
    """
    known: list[tuple[str, dict[str, Any]]] = []
    for key, folder in folders.items():
        if has_image_processor(folder):
            values = _load(AutoImageProcessor, folder, key).to_dict()
            known.append((key, {name: value for name, value in values.items() if name not in _NO_SETTINGS}))
    for (a, ours), (b, theirs) in pairwise(known):
        for name in sorted(ours.keys() | theirs.keys()):
            if ours.get(name) != theirs.get(name):
                return f"image processors differ: {name} is {ours.get(name)} for {a}, {theirs.get(name)} for {b}"
    return None
