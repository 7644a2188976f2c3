"""The models of a run, built and checked before anything is written, and how their layers run."""

import os
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from cdistill.builtin.dataset import build_tokenizer
from cdistill.data.samples import IMAGE_TOKEN, Source
from cdistill.errors import InputError
from cdistill.families import family_of, require_known_everywhere
from cdistill.models.llava import Llava, visual_tokens
from cdistill.models.load import (
    DTYPES,
    Model,
    load_config,
    load_multimodal,
    load_tokenizer,
    resolve_folder,
)
from cdistill.models.pair import check_apart, check_fetched, check_pair, check_spans, shares_encoder, visual_difference
from cdistill.models.parts import has_vision, language_model
from cdistill.models.processor import (
    COMPOSITIONS,
    Processor,
    ProcessorFiles,
    build_processor,
    has_image_processor,
    image_processor_difference,
    load_processor,
)
from cdistill.models.quantized import quantized
from cdistill.ops import flash_attention
from cdistill.runtime import launch
from cdistill.train.objectives import OBJECTIVES
from cdistill.train.recipes import Recipe, StudentConfig, VATOptions
from cdistill.train.resolve import precision_of
from cdistill.train.rounding import layers_to_round
from cdistill.train.several import require_same_reading
from cdistill.train.sharded import NO_COMMON_VISION, check_shardable
from cdistill.train.student import Vocabulary, folders_of, make_student, set_visual_tokens
from cdistill.train.terms import Alignment, Term, check_terms
from cdistill.vat import VAT, attention_layers, check_heads, head_counts

_DIFFERENT = "set kd.alignment to merged (or uld) to distil between different tokenizers"


@dataclass
class Models:
    """What a run trains and distils from; without a vision encoder the student is a causal language model.

    ``processor`` is saved beside the weights of a result, the tokenizer alone where there are no images. ``reader`` makes
    batches of conversations; it is None where every image becomes the same tokens. ``teacher_source`` gives stages the
    teacher's signal, once one has needed it. ``sources`` are the data sets that stages have opened. With ``shares_vision``
    both models look at an image once, through the encoder they have in common. ``teacher_reader`` is the teacher's processor
    where the two encode samples differently, so that each sample is encoded for both; else None. With ``spans`` they do so
    because their tokenizers differ, and are compared by the spans of words. ``teachers`` are several ones by name, ``teacher``
    then the one that the student takes parts of.
    """

    student: Model
    teacher: Model | None
    tokenizer: PreTrainedTokenizerBase
    processor: Processor
    reader: Any = None
    teacher_source: Any = None
    sources: dict[str, Source] = field(default_factory=dict)
    shares_vision: bool = False
    teacher_reader: Any = None
    spans: bool = False
    teachers: dict[str, Model] = field(default_factory=dict)

    @property
    def reads_apart(self) -> bool:
        """Whether each sample is encoded for both models."""
        return self.teacher_reader is not None


def build_models(recipe: Recipe) -> Models:
    """Student, teacher and tokenizer of a recipe, on CPU in fp32; fresh parts are a function of ``recipe.seed``.

    Raises ValueError for missing or corrupt checkpoints and for a pair that cannot be distilled.
    """
    teacher, teacher_tokenizer = None, None
    if recipe.needs_teacher:
        assert recipe.lead is not None
        folder = resolve_folder(recipe.lead, recipe.lead_key)
        teacher, teacher_tokenizer = _load_teacher(recipe, folder), load_tokenizer(folder, recipe.lead_key)
    spans = teacher is not None and recipe.kd.alignment != "token"
    tokenizer = tokenizer_of(recipe.student, teacher_tokenizer, own=spans)
    vocabulary = vocabulary_of(tokenizer, None if spans else teacher)
    student = make_student(recipe.student, teacher, vocabulary, seed=recipe.seed)
    if not launch.launched():
        given = (model.config for model in (student, teacher) if model is not None)
        require_known_everywhere(given, recipe.processes)
    apart = visual = None
    if teacher is not None:
        apart = visual = (different_tokenizers if spans else difference)(recipe, student, teacher)
        if spans:
            too = "" if visual is None else f", and {visual}"
            apart = f"kd.alignment is {recipe.kd.alignment}, for different tokenizers{too}"
            if visual is None and isinstance(student, Llava) and isinstance(teacher, Llava):
                check_fetched(student, teacher)
        elif visual is None:
            check_pair(student, teacher)
        if isinstance(teacher, Llava):
            _set_visual_tokens(teacher, "teacher", folder)
    check_objectives(recipe, student, teacher, recipe.lead_key)
    processor, reader = processor_of(recipe, student, tokenizer, apart=visual is not None, needed=spans)
    models = Models(student, teacher, tokenizer, processor, reader, spans=spans)
    if recipe.teachers and teacher is not None:
        if apart is not None:
            raise InputError(f"teachers must read what the student reads, and {recipe.lead_key} does not: {apart}")
        models.teachers = _several(recipe, student, teacher, teacher_tokenizer)
    if apart is not None:
        models.teacher_reader = _reader_of(teacher, folder)
        print(f"each sample is encoded for student and teacher, because {apart}", flush=True)
    models.shares_vision = apart is None and teacher is not None and shares_encoder(student, teacher)
    if recipe.sequence_parallel > 1 and teacher is not None and not models.shares_vision:
        raise InputError(NO_COMMON_VISION)
    if apart is None and isinstance(student, Llava) and isinstance(teacher, Llava) and not models.shares_vision:
        print("student and teacher have vision encoders of their own: each looks at the images itself", flush=True)
    if teacher is not None and recipe.teacher_memory.cache is not None:
        teacher.to("meta")  # what is left to ask of it stands in its configuration
    return models


def difference(recipe: Recipe, student: Model, teacher: Model) -> str | None:
    """Why student and teacher need an encoding of each sample of their own; None where one is for both.

    Raises ValueError where the recipe has something that needs one for both.
    """
    why = visual_difference(student, teacher)
    if why is None:
        folder = resolve_folder(str(recipe.lead), recipe.lead_key, weights=False)
        why = image_processor_difference({recipe.lead_key: folder, **folders_of(recipe.student)})
    if why is None:
        return None
    if any(recipe.aligns(recipe.stage[name].objective) for name in recipe.stages) and recipe.vat.visual == "equal":
        raise InputError(f"{why}; vat.visual resample aligns attention to other visual tokens")
    check_apart(student, teacher)
    for key, given in (("packing", recipe.packing), ("teacher_memory.cache", recipe.teacher_memory.cache is not None)):
        if given:
            raise InputError(f"{key} must be left out where each sample is encoded for student and teacher: {why}")
    for name in recipe.stages:
        if recipe.stage[name].replies is not None:
            raise InputError(f"stage.{name}.generation must be null: replies are encoded once, and {why}")
        try:
            check_terms(OBJECTIVES[recipe.stage[name].objective].kinds, reads_apart=True)
        except ValueError as error:
            raise InputError(f"stage.{name}.objective: {error} ({why})") from None
    return why


def different_tokenizers(recipe: Recipe, student: Model, teacher: Model) -> str | None:
    """How the visual tokens of models that are compared by spans differ; None if they do not. Raises ValueError for others."""
    aligned = any(recipe.aligns(recipe.stage[name].objective) for name in recipe.stages)
    visual = check_spans(student, teacher, resampled=not aligned or recipe.vat.visual == "resample")
    for name in recipe.stages:
        for term in OBJECTIVES[recipe.stage[name].objective].kinds:
            if term.teacher and not term.compares_spans:
                raise InputError(
                    f"stage.{name}.objective: term {term.name!r} compares teacher and student token by token, and kd.alignment "
                    f"{recipe.kd.alignment} is for different tokenizers: take dpt, dft or sft"
                )
    return visual


def _reader_of(teacher: Model, folder: Path) -> Any:
    """What makes batches for a teacher with an encoding of its own."""
    if isinstance(teacher, Llava) and visual_tokens(teacher.config) is not None:
        return build_processor(teacher.config, load_tokenizer(folder, "teacher"), "teacher", source=folder)
    return load_processor(folder, "teacher")


def _several(recipe: Recipe, student: Model, lead: Model, tokenizer: Any) -> dict[str, Model]:
    """All teachers by name, in the recipe's order. Raises ValueError for one that reads otherwise than the student's own."""
    found: dict[str, Model] = {}
    for name, config in recipe.teachers.items():
        if name == recipe.lead_name:
            found[name] = lead
            continue
        key = f"teachers.{name}.model"
        folder = resolve_folder(config.model, key)
        model = found[name] = _load_teacher(recipe, folder)
        if load_tokenizer(folder, key).get_vocab() != tokenizer.get_vocab():
            raise InputError(f"{key}: its tokenizer must be that of {recipe.lead_key}, token by token")
        require_same_reading(recipe, student, model, key)
        check_objectives(recipe, student, model, key)
        if isinstance(model, Llava):
            _set_visual_tokens(model, key, folder)
    return found


def _load_teacher(recipe: Recipe, folder: Path) -> Model:
    """The teacher, quantised if the recipe wants it, and without its language model where a cache stands in for it."""
    memory = recipe.teacher_memory
    if memory.cache is not None:
        return load_multimodal(folder, "teacher", language=False)
    if memory.quantization is None:
        return load_multimodal(folder, "teacher")
    dtype = DTYPES[precision_of(recipe)]
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if torch.cuda.is_available() else "cpu"
    family = family_of(load_config(folder, "teacher"))
    options = {
        "quantization_config": quantized(memory.quantization, dtype, family, "teacher_memory.quantization"),
        "device_map": {"": device},
    }
    return load_multimodal(folder, "teacher", dtype=dtype, **options)


def processor_of(
    recipe: Recipe,
    student: Model,
    tokenizer: PreTrainedTokenizerBase,
    *,
    apart: bool = False,
    needed: bool = False,
) -> tuple[Processor, Any]:
    """What goes beside a student's weights, and what makes batches where images become any number of tokens (else None).

    The student may be without weights. With ``apart`` it sees images by a processor of its own, never by its teacher's.

    Raises ValueError if they cannot be made although they are ``needed``, or a stage reads images from files.
    """
    source = _processor_folder(recipe, apart=apart)
    processor = _processor(recipe, student, tokenizer, source, needed=apart or needed)
    if isinstance(student, Llava):
        if visual_tokens(student.config) is None and source is not None:
            return processor, load_processor(source, "student")
    elif has_vision(student):
        assert recipe.student.base is not None
        folder = resolve_folder(recipe.student.base, "student.base", weights=False)
        return processor, load_processor(folder, "student.base")
    return processor, None


def _processor(
    recipe: Recipe, student: Model, tokenizer: PreTrainedTokenizerBase, source: Path | None, *, needed: bool
) -> Processor:
    """What goes beside the weights. Raises ValueError if it cannot be made although it is ``needed`` (images of files)."""
    if not has_vision(student):
        return tokenizer
    if student.config.model_type not in COMPOSITIONS:
        return ProcessorFiles(list(folders_of(recipe.student).values())[:1], "student.base")
    try:
        _set_visual_tokens(student, "student", source)
        if visual_tokens(student.config) is None:
            if source is None:
                raise InputError(
                    f"student: preprocessor_config.json is missing in {', '.join(map(str, _folders(recipe).values()))}"
                )
            return ProcessorFiles([source], "student")
        return build_processor(student.config, tokenizer, "student", source=source)
    except ValueError as error:
        if needed or any(recipe.stage[name].data.path is not None for name in recipe.stages):
            raise
        print(f"the student is saved without a processor: {error}", flush=True)
        return tokenizer


def _folders(recipe: Recipe) -> dict[str, Path]:
    """Folders that an image processor may be taken from, the first that has one first."""
    return folders_of(recipe.student, recipe.lead if recipe.needs_teacher else None)


def _processor_folder(recipe: Recipe, *, apart: bool) -> Path | None:
    folders = folders_of(recipe.student) if apart else _folders(recipe)
    return next((folder for folder in folders.values() if has_image_processor(folder)), None)


def _set_visual_tokens(model: Llava, key: str, folder: Path | None) -> None:
    line = set_visual_tokens(model.config, key, folder)
    if line is not None:
        print(f"{line}: {model.config.image_seq_length} is taken", flush=True)  # type: ignore[attr-defined]


def check_objectives(recipe: Recipe, student: Model, teacher: Llava | None, key: str = "teacher") -> None:
    """Raise ValueError unless the models can be trained in every stage of the recipe, layer matching included.

    ``key`` names the teacher.
    """
    for name in recipe.stages:
        stage = recipe.stage[name]
        text = stage.objective in ("text", "ground") and (stage.data.path or stage.data.modality == "text")
        if not has_vision(student) and not text:
            raise InputError(
                f"stage.{name}.objective must be text or ground, with data.modality text, for a student without a vision "
                f"encoder (student.vision, student.vision_config), got {stage.objective}"
            )
        if (
            recipe.student.lora is not None
            and "language" in OBJECTIVES[stage.objective].trained
            and not find_spec("peft")
        ):
            raise InputError("student.lora needs peft: pip install cdistill[lora]")
        if stage.quantization is not None:
            layers_to_round(student, f"stage.{name}.quantization")
        if recipe.sequence_parallel > 1:
            check_shardable(student, teacher, recipe.sequence_parallel)
        _check_heads(recipe, stage.objective, student, teacher, key)
        if recipe.aligns(stage.objective):
            assert teacher is not None
            config = recipe.vat
            _check_engine(recipe, student)
            _check_matching(config, student, teacher)


def _check_heads(recipe: Recipe, objective: str, student: Model, teacher: Model | None, key: str) -> None:
    """Raise ValueError, naming the recipe's key, for a model whose heads no term that compares attention can take."""
    for term in OBJECTIVES[objective].kinds:
        if not term.attention or "relations" in term.teacher or (term is Alignment and not recipe.vat.enabled):
            continue  # relations are of heads of their own
        if term.recorder is not Term.recorder:
            check_heads(student, "student.text_config" if recipe.student.base is None else "student.base")
        if teacher is not None and term.teacher:
            check_heads(teacher, key)


def _check_matching(config: VATOptions, student: Model, teacher: Llava) -> None:
    """Raise ValueError unless layers and heads can be matched."""
    layers, heads = (attention_layers(student), attention_layers(teacher)), head_counts(student, teacher)
    if config.matching == "adaptive" or config.assigns_heads:
        VAT.measure(config, *layers)
    else:
        VAT(config, *layers, heads=heads)
    fits = max(heads) % min(heads) == 0 if config.target == "recomputed" else heads.student == heads.teacher
    if config.heads == "each" and not fits:
        more = ", or a multiple" if config.target == "recomputed" else ""
        raise InputError(
            f"vat.heads each needs equal head counts{more}, got {heads.student} and {heads.teacher} for the teacher: use match"
        )


@torch.no_grad()
def _check_engine(recipe: Recipe, student: Model) -> None:
    """Raise ValueError for an attention engine that cannot run here, by a small problem of the student's shape."""
    if recipe.vat.engine in ("sdpa", "auto"):
        return
    text = student.config.get_text_config(decoder=True)
    heads = text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // heads
    on_gpu = torch.cuda.is_available() and (
        launch.launched() or recipe.processes == 1
    )  # a parent leaves GPUs to its processes
    if torch.cuda.is_available() and not on_gpu:
        return
    device, dtype = ("cuda" if on_gpu else "cpu"), DTYPES[precision_of(recipe)]
    q = torch.zeros(1, heads, 8, width, device=device, dtype=dtype)
    k = q[:, : getattr(text, "num_key_value_heads", None) or heads]
    try:
        flash_attention(q, k, k, engine=recipe.vat.engine)
    except ValueError as error:
        raise InputError(f"vat.engine: {error}") from None


def vocabulary_of(tokenizer: PreTrainedTokenizerBase, teacher: Model | None) -> Vocabulary:
    """What a student knows of its tokenizer."""
    return Vocabulary(len(tokenizer), _image_token(tokenizer, teacher), _special(tokenizer))


def tokenizer_of(
    config: StudentConfig, teachers: PreTrainedTokenizerBase | None, *, own: bool = False
) -> PreTrainedTokenizerBase:
    """The tokenizer of both models. It knows the image token if the student sees images through an encoder of its own.

    With ``own`` that of the student, whatever its teacher's is, with the image token where its model has no vision encoder yet.

    Raises ValueError for vocabularies that differ.
    """
    tokenizer = teachers or build_tokenizer()
    whole, read = False, config.tokenizer
    if read is not None:
        tokenizer = load_tokenizer(resolve_folder(read, "student.tokenizer", weights=False), "student.tokenizer")
        if teachers is not None and not own:
            _check_vocabularies(tokenizer, teachers)
            tokenizer = teachers
    if config.base is not None:
        folder = resolve_folder(config.base, "student.base", weights=False)
        tokenizer = load_tokenizer(folder, "student.base")
        whole = hasattr(load_config(folder, "student.base"), "vision_config")
        if teachers is not None and not own:
            _check_vocabularies(tokenizer, teachers)
            tokenizer = teachers  # the same, and it knows the image token
    sees = config.vision is not None or config.vision_config is not None
    needed = not whole if own else teachers is None and sees
    if needed and IMAGE_TOKEN not in tokenizer.get_vocab():
        tokenizer.add_special_tokens({"extra_special_tokens": [IMAGE_TOKEN]})
    return tokenizer


def _image_token(tokenizer: PreTrainedTokenizerBase, teacher: Model | None) -> int:
    """The id of a visual token, -1 of a student that sees no images."""
    if isinstance(teacher, Llava):
        return int(teacher.config.image_token_id)  # type: ignore[attr-defined]
    return int(tokenizer.get_vocab().get(IMAGE_TOKEN, -1))


def _special(tokenizer: PreTrainedTokenizerBase) -> dict[str, int | None]:
    return {name: getattr(tokenizer, name) for name in ("pad_token_id", "eos_token_id", "bos_token_id")}


def _check_vocabularies(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> None:
    """Raise ValueError unless every token of the student has the same id for the teacher, who may know more of them."""
    ours, theirs = student.get_vocab(), teacher.get_vocab()  # each call makes a table of all tokens anew
    for token, index in sorted(ours.items(), key=lambda item: item[1]):
        if theirs.get(token) != index:
            other = f"{theirs[token]}" if token in theirs else "none"
            raise InputError(
                f"vocabularies differ: token {token!r} is {index} for the student, {other} for the teacher; {_DIFFERENT}"
            )
    extra = [token for token in theirs if token not in ours]
    added = teacher.get_added_vocab()
    if any(token not in added for token in extra):
        raise InputError(
            f"vocabularies differ: {len(extra)} tokens of the teacher are unknown to the student; {_DIFFERENT}"
        )


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Numbers of trained and of all parameters."""
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return sum(n for n, trained in sizes if trained), sum(n for n, _ in sizes)


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
