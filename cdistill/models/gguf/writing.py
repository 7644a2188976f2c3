"""The two files of a student for llama.cpp, written whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from gguf import GGML_QUANT_VERSION, GGUFWriter

from cdistill.errors import InputError
from cdistill.files import building
from cdistill.models.export import Exported, check_output, find_parts, load_merged
from cdistill.models.folder import one_line
from cdistill.models.gguf.asking import compare_answers
from cdistill.models.gguf.language import check_language, language_entries, language_writer
from cdistill.models.gguf.template import llama_cpp_template
from cdistill.models.gguf.tensors import FILE_TYPES, Entry, check_file, check_packer, write_file
from cdistill.models.gguf.vision import check_adapter, check_vision, image_remark, vision_entries, vision_writer
from cdistill.models.gguf.vocabulary import add_vocabulary, make_vocabulary
from cdistill.models.load import Model, load_config, load_tokenizer
from cdistill.models.processor import load_image_processor, load_processor

MMPROJ = "mmproj-f16.gguf"
Files = dict[str, tuple[GGUFWriter, list[Entry]]]


def write_model(model: str | Path, output: Path, quantize: str, *, check: bool) -> Exported:
    """What `cdistill.models.gguf.export_gguf` does."""
    output = Path(os.path.abspath(output))
    check_output(output)
    check_packer(quantize)
    folders, processor, remarks = find_parts(model)
    config: Any = load_config(folders[0], "model")
    multimodal = hasattr(config, "vision_config")
    if multimodal:
        check_vision(config)
    check_language(config.get_text_config(decoder=True), "text_config." if multimodal else "")
    loaded, merged, _ = load_merged(folders, None)
    files: Files = {}
    with tempfile.TemporaryDirectory() as name:  # processors are known by what they save
        beside = Path(name)
        loaded.config.save_pretrained(beside)
        processor.save_pretrained(beside)
        files[f"model-{quantize}.gguf"], more = _language(loaded, beside, quantize)
        if multimodal:
            check_adapter(loaded.config)
            images = load_image_processor(beside, "model")
            files[MMPROJ] = vision_writer(loaded.config, images), vision_entries(loaded)
            more.append(image_remark(loaded.config, images))
        checked = _write(files, output, partial(_ask, loaded, beside, quantize) if check else None)
    return Exported(output, type(loaded).__name__, quantize, tuple(merged), (*remarks, *more), checked)


def _language(model: Model, beside: Path, quantize: str) -> tuple[tuple[GGUFWriter, list[Entry]], list[str]]:
    """The language model's file, with the vocabulary and the chat template in ``beside``, and remarks."""
    text = model.config.get_text_config(decoder=True)
    tokenizer = load_tokenizer(beside, "model")
    vocabulary = make_vocabulary(tokenizer, model.get_input_embeddings().weight.shape[0])
    writer = language_writer(text)
    writer.add_file_type(FILE_TYPES[quantize])
    writer.add_quantization_version(GGML_QUANT_VERSION)
    stops = model.generation_config.eos_token_id
    stops = tokenizer.eos_token_id if stops is None else stops
    add_vocabulary(writer, vocabulary, tokenizer, [stops] if isinstance(stops, int) else list(stops or ()))
    template = _template(tokenizer, beside)
    if template is not None:
        image = getattr(model.config, "image_token_id", None)
        token = None if image is None else str(tokenizer.convert_ids_to_tokens(image))
        unspaced = [t for t in tokenizer.all_special_tokens if t in template] if vocabulary.prompt_space else None
        writer.add_chat_template(llama_cpp_template(template, token, unspaced))
    return (writer, language_entries(model, quantize)), list(vocabulary.remarks)


def _template(tokenizer: Any, beside: Path) -> str | None:
    """The chat template in a folder, as transformers prefers them."""
    path = beside / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = tokenizer.chat_template
    return template if isinstance(template, str) else None


def _ask(model: Model, beside: Path, quantize: str, folder: Path) -> str:
    """Let llama.cpp and the model, by the processor in ``beside``, answer the same question; says how alike they are."""
    sees = hasattr(model.config, "vision_config")
    speaker = load_processor(beside, "model") if sees else load_tokenizer(beside, "model")
    if getattr(speaker, "chat_template", None) is None:
        return "llama.cpp was not asked, for want of a chat template"
    return compare_answers(folder, model, speaker, quantize)


def _write(files: Files, output: Path, ask: Callable[[Path], str] | None) -> str:
    said = []
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with building(output) as part:
            for name, (writer, entries) in files.items():
                write_file(part / name, writer, entries)
                if ask is not None:
                    said.append(check_file(part / name, entries))
            if ask is not None:
                said.append(ask(part))
    except OSError as error:
        raise InputError(f"output: {output} could not be written: {one_line(error)}") from None
    return "; ".join(said)
