"""The models of a run, built and checked before anything is written, and how their layers run."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedTokenizerBase

from cdistill.builtin.dataset import build_tokenizer
from cdistill.data.samples import IMAGE_TOKEN, Source
from cdistill.models.llava import Llava, compose, visual_tokens
from cdistill.models.load import (
    DTYPES,
    Model,
    load_config,
    load_encoder,
    load_model,
    load_multimodal,
    load_tokenizer,
    resolve_folder,
)
from cdistill.models.pair import check_pair, shares_encoder
from cdistill.models.parts import has_vision, language_model
from cdistill.models.processor import (
    COMPOSITIONS,
    Processor,
    ProcessorFiles,
    build_processor,
    check_image_processors,
    has_image_processor,
    image_pixels,
    load_image_processor,
    load_processor,
)
from cdistill.models.taf import TAFAdapter
from cdistill.train.config import Recipe, StudentConfig
from cdistill.train.teacher import quantized
from cdistill.vat import VAT, attention_layers


@dataclass
class Models:
    """What a run trains and distils from; without a vision encoder the student is a causal language model.

    ``processor`` is what a result's folder holds beside the weights, the tokenizer alone where there are no images;
    ``reader`` makes batches of conversations, None where images always become the same tokens; ``held`` is the teacher as
    a recipe wants it held, once it is; ``sources`` are the data sets that stages have opened; with ``shares_vision`` both
    models look at an image once, through the encoder they have in common.
    """

    student: Model
    teacher: Model | None
    tokenizer: PreTrainedTokenizerBase
    processor: Processor
    reader: Any = None
    held: Any = None
    sources: dict[str, Source] = field(default_factory=dict)
    shares_vision: bool = False


def build_models(recipe: Recipe) -> Models:
    """Student, teacher and tokenizer of a recipe, on CPU in fp32; fresh parts are a function of ``recipe.seed``.

    Raises ValueError for missing or corrupt checkpoints and for a pair that cannot be distilled.
    """
    teacher, teacher_tokenizer = None, None
    if recipe.needs_teacher:
        assert recipe.teacher is not None
        folder = resolve_folder(recipe.teacher, "teacher")
        teacher, teacher_tokenizer = _load_teacher(recipe, folder), load_tokenizer(folder, "teacher")
    student, tokenizer = _build_student(recipe.student, recipe.seed, teacher, teacher_tokenizer)
    if teacher is not None:
        check_pair(student, teacher)
        check_image_processors({"teacher": folder, **_student_folders(recipe)})
        if isinstance(teacher, Llava):
            _set_visual_tokens(teacher, "teacher", folder)
    check_objectives(recipe, student, teacher)
    models = Models(student, teacher, tokenizer, _processor(recipe, student, tokenizer))
    models.shares_vision = teacher is not None and shares_encoder(student, teacher)
    if isinstance(student, Llava) and isinstance(teacher, Llava) and not models.shares_vision:
        print("student and teacher have vision encoders of their own: each looks at the images itself", flush=True)
    if isinstance(student, Llava):
        source = _processor_folder(recipe)
        if visual_tokens(student.config) is None and source is not None:
            models.reader = load_processor(source, "student")
    elif has_vision(student):
        assert recipe.student.base is not None
        models.reader = load_processor(resolve_folder(recipe.student.base, "student.base"), "student.base")
    if teacher is not None and recipe.teacher_memory.cache is not None:
        teacher.to("meta")  # what is left to ask of it stands in its configuration
    return models


def precision_of(recipe: Recipe) -> str:
    """The number format the recipe asks for on this machine. Raises ValueError for fp16 on CPU."""
    if recipe.precision == "fp16" and not torch.cuda.is_available():
        raise ValueError("precision fp16 needs a GPU; use fp32 or bf16 on CPU")
    if recipe.precision != "auto":
        return recipe.precision
    if not torch.cuda.is_available():
        return "fp32"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def _load_teacher(recipe: Recipe, folder: Path) -> Model:
    """The teacher, quantised if the recipe wants it, and without its language model where a cache stands in for it."""
    memory = recipe.teacher_memory
    if memory.cache is not None:
        return load_multimodal(folder, "teacher", language=False)
    if memory.quantization is None:
        return load_multimodal(folder, "teacher")
    dtype = DTYPES[precision_of(recipe)]
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if torch.cuda.is_available() else "cpu"
    options = {"quantization_config": quantized(memory.quantization, dtype), "device_map": {"": device}}
    return load_multimodal(folder, "teacher", dtype=dtype, **options)


def _processor(recipe: Recipe, student: Model, tokenizer: PreTrainedTokenizerBase) -> Processor:
    """What goes beside the weights. Raises ValueError if it cannot be made although a stage reads images from files."""
    if not has_vision(student):
        return tokenizer
    if student.config.model_type not in COMPOSITIONS:
        return ProcessorFiles(list(_student_folders(recipe).values())[:1], "student.base")
    try:
        source = _processor_folder(recipe)
        _set_visual_tokens(student, "student", source)
        if visual_tokens(student.config) is None:
            if source is None:
                raise ValueError(
                    f"student: preprocessor_config.json is missing in {', '.join(map(str, _folders(recipe)))}"
                )
            return ProcessorFiles([source], "student")
        return build_processor(student.config, tokenizer, "student", source=source)
    except ValueError as error:
        if any(recipe.stage[name].data.path is not None for name in recipe.stages):
            raise
        print(f"the student is saved without a processor: {error}", flush=True)
        return tokenizer


def _folders(recipe: Recipe) -> list[Path]:
    """Folders that an image processor may be taken from, the first that has one first."""
    folders = list(_student_folders(recipe).values())
    if recipe.needs_teacher:
        assert recipe.teacher is not None
        folders.append(resolve_folder(recipe.teacher, "teacher"))
    return folders


def _processor_folder(recipe: Recipe) -> Path | None:
    return next((folder for folder in _folders(recipe) if has_image_processor(folder)), None)


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
        raise ValueError(f"{key}: {error}") from None
    if tokens is None or tokens.total == config.image_seq_length:
        return None
    said, config.image_seq_length = config.image_seq_length, tokens.total
    return f"{key}: its config.json says image_seq_length {said}, its images become {tokens.total} visual tokens"


def _set_visual_tokens(model: Llava, key: str, folder: Path | None) -> None:
    line = set_visual_tokens(model.config, key, folder)
    if line is not None:
        print(f"{line}: {model.config.image_seq_length} is taken", flush=True)  # type: ignore[attr-defined]


def _student_folders(recipe: Recipe) -> dict[str, Path]:
    """Folders that the student's parts come from, by key of the recipe."""
    references = {"student.base": recipe.student.base, "student.vision": recipe.student.vision}
    return {key: resolve_folder(reference, key) for key, reference in references.items() if reference is not None}


def check_objectives(recipe: Recipe, student: Model, teacher: Llava | None) -> None:
    """Raise ValueError unless the models can be trained in every stage of the recipe, layer matching included."""
    for name in recipe.stages:
        stage = recipe.stage[name]
        text = stage.objective in ("text", "ground") and (stage.data.path or stage.data.modality == "text")
        if not has_vision(student) and not text:
            raise ValueError(
                f"stage.{name}.objective must be text or ground, with data.modality text, for a student without a vision "
                f"encoder (student.vision, student.vision_config), got {stage.objective}"
            )
        if recipe.aligns(stage.objective):
            assert teacher is not None
            config = recipe.vat
            layers = attention_layers(student), attention_layers(teacher)
            if config.matching == "adaptive":
                VAT.measure(config, *layers)
            else:
                VAT(config, *layers)
            heads = [model.config.get_text_config().num_attention_heads for model in (student, teacher)]
            if config.heads == "each" and heads[0] != heads[1]:
                raise ValueError(
                    f"vat.heads each needs equal head counts, got {heads[0]} and {heads[1]} for the teacher"
                )


def _build_student(
    config: StudentConfig, seed: int, teacher: Llava | None, teacher_tokenizer: PreTrainedTokenizerBase | None
) -> tuple[Model, PreTrainedTokenizerBase]:
    language: Model = None
    if config.base is not None:
        folder = resolve_folder(config.base, "student.base")
        language, tokenizer = load_model(folder), load_tokenizer(folder, "student.base")
        if teacher_tokenizer is not None:
            _check_vocabularies(tokenizer, teacher_tokenizer)
            tokenizer = teacher_tokenizer  # the same, and it knows the image token
        if has_vision(language):
            check_same_kind(config, language)
            return language, tokenizer
        text = language.config
    else:
        tokenizer = teacher_tokenizer or build_tokenizer()
        text = fresh_config(config.text_config, "student.text_config", vocab_size=len(tokenizer), **_special(tokenizer))
    source: Model = teacher
    encoder: Model = None
    if teacher is not None and not isinstance(teacher, Llava):
        raise ValueError(
            f"student.base must be a {teacher.config.model_type} model, like the teacher: only a LLaVA's vision encoder can be "
            "put before another language model"
        )
    if not config.taf and config.vision is not None:
        folder = resolve_folder(config.vision, "student.vision")
        source = load_multimodal(folder, "student.vision") if holds_llava(folder, "student.vision") else None
        encoder = load_encoder(folder, "student.vision") if source is None else None
    torch.manual_seed(seed)  # after loading, which may or may not draw random numbers
    if config.vision_config is not None:
        vision = fresh_config(config.vision_config, "student.vision_config")
        source = None
    elif encoder is not None:
        vision = encoder.config
    elif source is not None:
        vision, encoder = source.config.vision_config, source.model.vision_tower
    else:
        return _with_vocabulary(language or AutoModelForCausalLM.from_config(text), tokenizer), tokenizer
    if IMAGE_TOKEN not in tokenizer.get_vocab() and teacher is None:
        tokenizer.add_special_tokens({"extra_special_tokens": [IMAGE_TOKEN]})
    student: Model = compose(
        vision,
        text,
        image_token_id=int(teacher.config.image_token_id if teacher else tokenizer.get_vocab()[IMAGE_TOKEN]),  # type: ignore[attr-defined]
        source=source,
        teacher=teacher if config.taf else None,
        taf_activation=config.taf_activation,
    )
    if encoder is not None:
        student.model.vision_tower.load_state_dict(encoder.state_dict())
    if language is not None:
        student.model.language_model.load_state_dict(language.model.state_dict())
        student.lm_head.load_state_dict(language.lm_head.state_dict())
        student.generation_config.eos_token_id = language.generation_config.eos_token_id
    return _with_vocabulary(student, tokenizer), tokenizer


def holds_llava(folder: Path, key: str) -> bool:
    """Whether a folder holds a LLaVA, and not a vision encoder alone."""
    return load_config(folder, key).model_type in COMPOSITIONS


def _special(tokenizer: PreTrainedTokenizerBase) -> dict[str, int | None]:
    return {
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": tokenizer.bos_token_id,
    }


def _with_vocabulary(model: Model, tokenizer: PreTrainedTokenizerBase) -> Model:
    if model.get_input_embeddings().weight.shape[0] < len(tokenizer):
        model.resize_token_embeddings(len(tokenizer))
    return model


def check_same_kind(config: StudentConfig, model: Llava) -> None:
    if config.vision is not None or config.vision_config is not None:
        raise ValueError("student.vision and student.vision_config must be null: student.base already has an encoder")
    if isinstance(getattr(model.model, "multi_modal_projector", None), TAFAdapter) != config.taf:
        kind = "was made without" if config.taf else "was made with"
        raise ValueError(f"student.taf must be {str(not config.taf).lower()}: student.base {kind} it")


def _check_vocabularies(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> None:
    """Raise ValueError unless every token of the student has the same id for the teacher, who may know more of them."""
    theirs = teacher.get_vocab()
    for token, index in sorted(student.get_vocab().items(), key=lambda item: item[1]):
        if theirs.get(token) != index:
            other = f"{theirs[token]}" if token in theirs else "none"
            raise ValueError(
                f"vocabularies differ: token {token!r} is {index} for the student, {other} for the teacher"
            )
    extra = [token for token, index in theirs.items() if token not in student.get_vocab()]
    added = teacher.get_added_vocab()
    if any(token not in added for token in extra):
        raise ValueError(f"vocabularies differ: {len(extra)} tokens of the teacher are unknown to the student")


def fresh_config(values: dict[str, Any] | None, key: str, **defaults: Any) -> PretrainedConfig:
    assert values is not None
    values = {**defaults, **values}
    kind = values.pop("model_type")
    try:
        config = AutoConfig.for_model(kind)
    except ValueError:
        raise ValueError(f"{key}.model_type is not a model type of transformers: {kind!r}") from None
    if "vision_config" in config.sub_configs:
        config = config.vision_config  # type: ignore[attr-defined]
    unknown = [name for name in values if not hasattr(config, name)]
    if unknown:
        raise ValueError(f"{key}.{unknown[0]} is not a field of {type(config).__name__}")
    return type(config)(**values)


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Numbers of trained and of all parameters."""
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return sum(n for n, trained in sizes if trained), sum(n for n, _ in sizes)


def check_batches(recipe: Recipe, world: int) -> None:
    """Raise ValueError unless the global batches can be split among ``world`` processes."""
    for name in dict.fromkeys(recipe.stages):
        stage = recipe.stage[name]
        if stage.global_batch_size % (world * (stage.micro_batch_size or 1)):
            raise ValueError(
                f"stage.{name}.global_batch_size must be a multiple of {world} processes x micro_batch_size "
                f"{stage.micro_batch_size or 1}, got {stage.global_batch_size}"
            )


def checkpoint_activations(student: Model, *, reentrant: bool) -> None:
    """Let the layers of the language model recompute their activations in the backward pass."""
    language = language_model(student)
    options = {"use_reentrant": reentrant}
    if hasattr(language, "activation_checkpointing_enable"):  # transformers 5.20 renamed it
        language.activation_checkpointing_enable(options)
    else:
        language.gradient_checkpointing_enable(options)


def compile_layers(student: Model, backend: str = "inductor") -> None:
    """Compile each layer of the language model for batches of any length; layers of one kind are compiled once."""
    for layer in language_model(student).layers:
        layer.compile(dynamic=True, backend=backend)
