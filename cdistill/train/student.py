"""The student of a recipe, made of its parts: with weights for a run, on the meta device for a plan."""

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from cdistill.errors import InputError
from cdistill.models.llava import Llava, compose, has_field, visual_tokens
from cdistill.models.load import (
    Model,
    encoder_config,
    load_config,
    load_encoder,
    load_model,
    load_multimodal,
    load_structure,
    resolve_folder,
)
from cdistill.models.parts import has_vision, require_known_parts
from cdistill.models.processor import COMPOSITIONS, has_image_processor, image_pixels, load_image_processor
from cdistill.models.pruned import prune
from cdistill.models.taf import TAFAdapter
from cdistill.train.recipes import StudentConfig


class Vocabulary(NamedTuple):
    """What a student knows of its tokenizer."""

    size: int
    image_token_id: int
    special: Mapping[str, int | None] = MappingProxyType({})  # of a fresh language model


def make_student(
    config: StudentConfig, teacher: Model | None, vocabulary: Vocabulary, *, seed: int = 0, meta: bool = False
) -> Model:
    """The student that a recipe describes, beside its teacher; fresh parts are a function of ``seed``.

    With ``meta`` it is all structure and no weights, on the meta device, from configurations alone: a plan counts what a run
    trains, because one function makes both.

    Raises ValueError for folders that lack something, and for parts that do not fit.
    """
    language: Model = None
    if config.base is not None:
        folder = resolve_folder(config.base, "student.base", weights=not meta)
        language = load_structure(folder, "student.base") if meta else load_model(folder)
        if config.pruning is not None:
            prune(language, "student.pruning", **asdict(config.pruning))
        if has_vision(language):
            _check_same_kind(config, language)
            require_known_parts(language)
            return language
        text = language.config
    else:
        defaults = {"vocab_size": vocabulary.size, **vocabulary.special}
        text = _fresh_config(config.text_config, "student.text_config", **defaults)
    if teacher is not None and not isinstance(teacher, Llava):
        kind = teacher.config.model_type
        raise InputError(
            f"student.base must be a {kind} model, like the teacher: only a LLaVA's vision encoder can be put before another "
            "language model"
        )
    source, vision, encoder = _seeing(config, teacher, meta=meta)
    if not meta:
        torch.manual_seed(seed)  # after loading, which may or may not draw random numbers
    options: dict[str, Any] = {"attn_implementation": "sdpa"} if meta else {}
    with torch.device("meta") if meta else nullcontext():
        if vision is None:
            student = language or AutoModelForCausalLM.from_config(text, **options)
        else:
            student = compose(
                vision,
                text,
                image_token_id=vocabulary.image_token_id,
                source=source,
                teacher=teacher if config.taf else None,
                taf_activation=config.taf_activation,
            )
    if meta:
        return student
    if encoder is not None:
        student.model.vision_tower.load_state_dict(encoder.state_dict())
    if vision is not None and language is not None:
        student.model.language_model.load_state_dict(language.model.state_dict())
        student.lm_head.load_state_dict(language.lm_head.state_dict())
        student.generation_config.eos_token_id = language.generation_config.eos_token_id
    if student.get_input_embeddings().weight.shape[0] < vocabulary.size:
        student.resize_token_embeddings(vocabulary.size)
    return student


def _seeing(
    config: StudentConfig, teacher: Model | None, *, meta: bool
) -> tuple[Model | None, PretrainedConfig | None, Model | None]:
    """The LLaVA whose way of seeing is inherited, the configuration of the vision encoder, and one with its weights."""
    if config.vision_config is not None:
        return None, _fresh_config(config.vision_config, "student.vision_config"), None
    source = teacher
    if not config.taf and config.vision is not None:
        folder = resolve_folder(config.vision, "student.vision", weights=not meta)
        if load_config(folder, "student.vision").model_type not in COMPOSITIONS:  # an encoder alone
            if meta:
                return None, encoder_config(folder, "student.vision"), None
            encoder = load_encoder(folder, "student.vision")
            return None, encoder.config, encoder
        source = load_structure(folder, "student.vision") if meta else load_multimodal(folder, "student.vision")
    if source is None:
        return None, None, None
    return source, source.config.vision_config, source.model.vision_tower


def _check_same_kind(config: StudentConfig, model: Llava) -> None:
    if config.vision is not None or config.vision_config is not None:
        raise InputError("student.vision and student.vision_config must be null: student.base already has an encoder")
    if isinstance(getattr(model.model, "multi_modal_projector", None), TAFAdapter) != config.taf:
        kind = "was made without" if config.taf else "was made with"
        raise InputError(f"student.taf must be {str(not config.taf).lower()}: student.base {kind} it")


def _fresh_config(values: dict[str, Any] | None, key: str, **defaults: Any) -> PretrainedConfig:
    assert values is not None
    values = {**defaults, **values}
    kind = values.pop("model_type")
    try:
        config = AutoConfig.for_model(kind)
    except ValueError:
        raise InputError(f"{key}.model_type is not a model type of transformers: {kind!r}") from None
    if "vision_config" in config.sub_configs:
        config = config.vision_config  # type: ignore[attr-defined]
    unknown = [name for name in values if not has_field(config, name)]
    if unknown:
        raise InputError(f"{key}.{unknown[0]} is not a field of {type(config).__name__}")
    return type(config)(**values)


def folders_of(config: StudentConfig, teacher: str | None = None) -> dict[str, Path]:
    """Folders that the student's parts come from, by key of the recipe; the last is that of a ``teacher`` it is made beside."""
    references = {"student.base": config.base, "student.vision": config.vision, "teacher": teacher}
    return {
        key: resolve_folder(reference, key, weights=False)
        for key, reference in references.items()
        if reference is not None
    }


def set_visual_tokens(config: Any, key: str, folder: Path | None) -> str | None:
    """Let a LLaVA's configuration say how many visual tokens an image really becomes, with the image processor in a folder.

    Returns a line about it if it said otherwise. Raises ValueError if the encoder does not take the processor's images.
    """
    size = None
    if folder is not None and has_image_processor(folder) and visual_tokens(config) is not None:
        size = image_pixels(load_image_processor(folder, key), config.vision_config)
    try:
        tokens = visual_tokens(config, size)
    except ValueError as error:
        raise InputError(f"{key}: {error}") from None
    if tokens is None or tokens.total == config.image_seq_length:
        return None
    said, config.image_seq_length = config.image_seq_length, tokens.total
    return f"{key}: its config.json says image_seq_length {said}, its images become {tokens.total} visual tokens"
