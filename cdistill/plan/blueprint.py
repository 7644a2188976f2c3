"""The models of a recipe on the meta device: all of their structure from config.json, none of their weights."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import torch

from cdistill.builtin.dataset import build_tokenizer
from cdistill.errors import InputError
from cdistill.models.llava import INHERITED, Llava, visual_tokens
from cdistill.models.load import Model, load_structure, load_tokenizer, resolve_folder
from cdistill.models.parts import has_vision
from cdistill.models.processor import has_image_processor
from cdistill.plan.footprint import prepare
from cdistill.train.build import (
    check_objectives,
    checkpoint_activations,
    difference,
    different_tokenizers,
)
from cdistill.train.lora import add_lora
from cdistill.train.objectives import OBJECTIVES, set_trained
from cdistill.train.recipes import LoRAConfig, Recipe, StageConfig, StudentConfig
from cdistill.train.recipes.mistakes import build
from cdistill.train.rounding import round_weights
from cdistill.train.several import require_same_reading
from cdistill.train.sharded import NO_COMMON_VISION
from cdistill.train.student import Vocabulary, folders_of, make_student, set_visual_tokens


@dataclass(frozen=True, eq=False)
class Blueprint:
    """A student, ready for one objective, or a teacher; hashed by identity."""

    model: Model
    trained: int  # parameters
    total: int


def check_models(recipe: Recipe) -> bool:
    """Whether student and teacher need an encoding of each sample of their own.

    Raises ValueError unless the recipe's folders hold models that can be trained in every stage.
    """
    student, teacher = _student(*_key(recipe)), _teacher_model(recipe)
    check_objectives(recipe, student, teacher, recipe.lead_key)
    for key, other in teachers_of(recipe).items():
        if recipe.teachers and key != recipe.lead_key:
            require_same_reading(recipe, student, other.model, key)
            check_objectives(recipe, student, other.model, key)
    if teacher is not None and recipe.kd.alignment != "token":
        different_tokenizers(recipe, student, teacher)
        return True
    why = None if teacher is None else difference(recipe, student, teacher)
    apart = why is not None
    if apart and recipe.teachers:
        raise InputError(f"teachers must read what the student reads, and {recipe.lead_key} does not: {why}")
    if apart and recipe.sequence_parallel > 1:
        raise InputError(NO_COMMON_VISION)
    return apart


def teacher_of(recipe: Recipe) -> Blueprint | None:
    """The teacher, if the recipe needs one; of several the one that the student takes parts of."""
    return teachers_of(recipe).get(recipe.lead_key)


def teachers_of(recipe: Recipe) -> dict[str, Blueprint]:
    """All teachers that the recipe needs, by their keys."""
    if not recipe.needs_teacher:
        return {}
    return {key: _teacher(reference, key) for key, reference in recipe.every_teacher.items()}


def student_of(recipe: Recipe, stage: StageConfig) -> Blueprint:
    """The student as a stage trains it: LoRA added, weights rounded, parts frozen, activations checkpointed."""
    objective = stage.objective
    lora = recipe.student.lora if "language" in OBJECTIVES[objective].trained else None
    checkpointed = bool(recipe.gradient_checkpointing) and objective != "vision"
    return _prepared_student(*_key(recipe), objective, lora, stage.quantization, checkpointed)


def _key(recipe: Recipe) -> tuple[str, str | None]:
    """What a student without LoRA depends on, hashable."""
    return json.dumps(asdict(recipe.student) | {"lora": None}), recipe.lead if recipe.needs_teacher else None


def _teacher_model(recipe: Recipe) -> Any:
    teacher = teacher_of(recipe)
    return None if teacher is None else teacher.model


@lru_cache(maxsize=8)
def _teacher(reference: str, key: str = "teacher") -> Blueprint:
    model = load_structure(resolve_folder(reference, key, weights=False), key)
    if not has_vision(model):
        raise InputError(f"{key}: {reference} holds no multimodal model but a {model.config.model_type} model")
    prepare(model)
    model.requires_grad_(False)
    return Blueprint(model, 0, sum(p.numel() for p in model.parameters()))


@lru_cache(maxsize=32)  # three stages, each with and without LoRA and checkpoints
def _prepared_student(
    student: str, teacher: str | None, objective: str, lora: LoRAConfig | None, grid: str | None, checkpointed: bool
) -> Blueprint:
    model = _student.__wrapped__(student, teacher)
    if lora is not None:
        with torch.device("meta"):
            add_lora(model, lora)
    if grid is not None:
        round_weights(model, grid, "quantization")
    set_trained(model, OBJECTIVES[objective])
    prepare(model)
    if checkpointed:
        checkpoint_activations(model, reentrant=False)
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return Blueprint(model, sum(n for n, trained in sizes if trained), sum(n for n, _ in sizes))


@lru_cache(maxsize=4)
def _student(student: str, teacher_reference: str | None) -> Model:
    config = build(StudentConfig, json.loads(student))
    teacher = _teacher(teacher_reference).model if teacher_reference is not None else None
    known = teacher.config.get_text_config().vocab_size if teacher is not None else len(build_tokenizer())
    if config.tokenizer is not None:
        folder = resolve_folder(config.tokenizer, "student.tokenizer", weights=False)
        known = len(load_tokenizer(folder, "student.tokenizer"))
    token = 0 if teacher is None else getattr(teacher.config, "image_token_id", 0)
    model = make_student(config, teacher, Vocabulary(known, image_token_id=token), meta=True)
    if is_llava(model):
        folders = folders_of(config, teacher_reference).values()
        set_visual_tokens(model.config, "student", next((f for f in folders if has_image_processor(f)), None))
    return model


def is_llava(model: Model) -> bool:
    """Whether what a model holds of its images is known (`cdistill.plan.footprint.encoder_footprint`)."""
    return isinstance(model, Llava) and visual_tokens(model.config) is not None


def shares_vision(student: Model, teacher: Model) -> bool:
    """Whether a student may have its teacher's vision encoder, as far as configurations tell."""
    if not isinstance(student, Llava) or not isinstance(teacher, Llava):
        return False
    ours: Any = student.config.vision_config
    theirs: Any = teacher.config.vision_config
    same = all(getattr(student.config, name) == getattr(teacher.config, name) for name in INHERITED[:2])
    return same and ours.to_dict() == theirs.to_dict()
