"""A look at a student and a teacher without their weights: whether they fit, and what a recipe must say of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from cdistill.data.conversations import Encoder
from cdistill.errors import InputError
from cdistill.models.llava import Llava, visual_tokens
from cdistill.models.load import Model, auto_class, load_config, load_structure, load_tokenizer, resolve_folder
from cdistill.models.pair import check_configurations
from cdistill.models.parts import require_known_parts
from cdistill.models.processor import check_image_processors
from cdistill.train.build import check_objectives, processor_of, tokenizer_of, vocabulary_of
from cdistill.train.recipes import Recipe, recipe_from_dict
from cdistill.train.student import folders_of, make_student, set_visual_tokens
from cdistill.vat import attention_layers, layer_range

TEMPLATES = ("auto", "chatml", "vicuna_v1", "qwen2_base")  # tried in this order


@dataclass(frozen=True)
class Pair:
    """What was found.

    Attributes:
        student, teacher, vision: as the user named them; ``vision`` an encoder of the student's own.
        composed: the student is a language model that is put behind a vision encoder.
        taf: the student sees through its teacher's adapter; ``no_taf`` says why not, where it might have.
        about: a line on each of the two models.
        vat: keys of the recipe's section; ``no_vat`` says why attention cannot be aligned.
        aligned: numbers of layers, the student's and the teacher's, whose attention is compared.
        template: how conversations become text; ``no_template`` says why not by the model's own.
        encoder: makes tokens of them.
        any_size: images become any number of visual tokens.
        most_tokens: that the student can take.
    """

    student: str
    teacher: str
    vision: str | None
    composed: bool
    taf: bool
    no_taf: str
    about: tuple[str, str]
    vat: dict[str, Any]
    no_vat: str
    aligned: tuple[int, int]
    template: str
    no_template: str
    encoder: Encoder
    any_size: bool
    most_tokens: int | None


def check_teacher(reference: str) -> str:
    """The reference of a model that sees images. Raises ValueError for any other."""
    folder = resolve_folder(reference, "teacher", weights=False)
    config = load_config(folder, "teacher")
    if not hasattr(config, "vision_config"):
        kind = config.model_type
        raise InputError(f"teacher: {folder} holds a {kind} model, which sees no images: name a multimodal model")
    return reference


def look(student: str, teacher: str, vision: str | None = None) -> Pair:
    """What a recipe for these two must say, from configurations, tokenizers and processors alone.

    Raises ValueError for a folder that is no model, and for two that cannot be distilled.
    """
    check_teacher(teacher)
    folder = resolve_folder(student, "student.base", weights=False)
    config = load_config(folder, "student.base")
    auto_class(config, folder, "student.base")
    composed = not hasattr(config, "vision_config")
    reasons: list[str] = []
    for taf in (False,) if vision is not None else (True, False) if composed else (False, True):
        try:
            made = _make(student, teacher, vision, taf)
        except ValueError as error:
            reasons.append(str(error))
            continue
        no_taf = reasons[0] if composed and reasons else ""
        return _pair(made, student, teacher, vision, composed=composed, taf=taf, no_taf=no_taf)
    raise InputError(reasons[-1 if composed or reasons[0].startswith("student.taf must be true") else 0])


@dataclass(frozen=True)
class _Made:
    recipe: Recipe
    student: Model
    teacher: Model
    tokenizer: Any
    processor: Any


def _make(student: str, teacher: str, vision: str | None, taf: bool) -> _Made:
    """Both models without weights, checked against each other."""
    recipe = recipe_from_dict(
        {
            "name": "init",
            "output": "init",
            "teacher": teacher,
            "student": {"base": student, "vision": vision, "taf": taf},
            "stages": ["sft"],  # one that needs no alignment
            "stage": {"sft": {"samples": 64, "learning_rate": 1.0, "data": {"path": "data"}}},
        }
    )
    folder = resolve_folder(teacher, "teacher", weights=False)
    tokenizer = tokenizer_of(recipe.student, load_tokenizer(folder, "teacher"))
    theirs = load_structure(folder, "teacher")
    require_known_parts(theirs)
    ours = make_student(recipe.student, theirs, vocabulary_of(tokenizer, theirs), meta=True)
    check_configurations(ours, theirs)
    if isinstance(theirs, Llava):
        set_visual_tokens(theirs.config, "teacher", folder)
    check_image_processors({"teacher": folder, **folders_of(recipe.student)})
    processor, reader = processor_of(_distilling(recipe, "sft"), ours, tokenizer)
    return _Made(recipe, ours, theirs, tokenizer, reader or processor)


def _distilling(recipe: Recipe, objective: str, **vat: Any) -> Recipe:
    """The recipe with another objective, and options of alignment."""
    stage = replace(recipe.stage["sft"], objective=objective)
    return replace(recipe, stages=(objective,), stage={objective: stage}, vat=replace(recipe.vat, **vat))


def _pair(
    made: _Made, student: str, teacher: str, vision: str | None, *, composed: bool, taf: bool, no_taf: str
) -> Pair:
    encoder, template, no_template = _encoder(made.processor)
    vat, aligned, no_vat = _alignment(made)
    text: Any = made.student.config.get_text_config(decoder=True)
    return Pair(
        student=student,
        teacher=teacher,
        vision=vision,
        composed=composed,
        taf=taf,
        no_taf=no_taf,
        about=(_about(made.student, composed), _about(made.teacher)),
        vat=vat,
        no_vat=no_vat,
        aligned=aligned,
        template=template,
        no_template=no_template,
        encoder=encoder,
        any_size=not isinstance(made.student, Llava) or visual_tokens(made.student.config) is None,
        most_tokens=getattr(text, "max_position_embeddings", None),
    )


def _about(model: Model, composed: bool = False) -> str:
    config, text = model.config, model.config.get_text_config(decoder=True)
    seen = getattr(config, "image_seq_length", None) if isinstance(model, Llava) else None
    tokens = f", {seen} visual tokens an image" if seen and visual_tokens(config) is not None else ""
    kind = text.model_type if composed else config.model_type
    size = f"{text.num_hidden_layers} layers of width {text.hidden_size}, vocabulary {text.vocab_size:,}"
    return f"{kind}, {size}{tokens}"


def _encoder(processor: Any) -> tuple[Encoder, str, str]:
    """What makes tokens of conversations, by the first template that fits, its name, and why it is not the model's own."""
    reasons: list[str] = []
    for name in TEMPLATES:
        try:
            return Encoder(processor, name), name, reasons[0] if reasons else ""
        except ValueError as error:
            reasons.append(str(error))
    raise InputError(f"student: no template fits: {reasons[0]}")


def _alignment(made: _Made) -> tuple[dict[str, Any], tuple[int, int], str]:
    """The recipe's section vat, how many layers of each model are aligned, and why attention cannot be aligned if it cannot."""
    try:
        layers = [attention_layers(model) for model in (made.student, made.teacher)]
        ours, theirs = (layer_range(of, "intermediate") for of in layers)
        vat: dict[str, Any] = {"layers": "intermediate"}
        if len(ours) > len(theirs):  # group matching needs as many of the teacher's
            first = (len(ours) - len(theirs)) // 2
            ours = ours[first : first + len(theirs)]
            whole = ours == tuple(range(ours[0], ours[-1] + 1))
            vat["student_layers"] = f"{ours[0]}-{ours[-1]}" if whole else list(ours)
        check_objectives(_distilling(made.recipe, "dft", **vat), made.student, made.teacher)
    except ValueError as error:
        return {"enabled": False}, (0, 0), str(error)
    return vat, (len(ours), len(theirs)), ""
