"""The models of a recipe on the meta device: all of their structure from config.json, none of their weights."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from cdistill.builtin.dataset import build_tokenizer
from cdistill.models.llava import INHERITED, Llava, compose, visual_tokens
from cdistill.models.load import Model, encoder_config, load_config, resolve_folder
from cdistill.models.parts import has_vision
from cdistill.plan.footprint import prepare
from cdistill.train.build import (
    check_objectives,
    check_same_kind,
    checkpoint_activations,
    fresh_config,
    holds_llava,
    set_visual_tokens,
)
from cdistill.train.config import LoRAConfig, Recipe, StudentConfig
from cdistill.train.lora import add_lora
from cdistill.train.objectives import OBJECTIVES, set_trained


@dataclass(frozen=True, eq=False)
class Blueprint:
    """A student, ready for one objective, or a teacher; hashed by identity."""

    model: Model
    trained: int  # parameters
    total: int


def check_models(recipe: Recipe) -> None:
    """Raise ValueError unless the recipe's folders hold models that can be trained in every stage."""
    check_objectives(recipe, _student(*_key(recipe.student, recipe.teacher)), _teacher_model(recipe))


def teacher_of(recipe: Recipe) -> Blueprint | None:
    """The teacher, if the recipe needs one."""
    return _teacher(recipe.teacher) if recipe.needs_teacher and recipe.teacher is not None else None


def student_of(recipe: Recipe, objective: str) -> Blueprint:
    """The student as a stage trains it: LoRA added, parts frozen, activations checkpointed."""
    lora = recipe.student.lora if "language" in OBJECTIVES[objective].trained else None
    checkpointed = bool(recipe.gradient_checkpointing) and objective != "vision"
    return _prepared_student(*_key(recipe.student, recipe.teacher), objective, lora, checkpointed)


def _key(student: StudentConfig, teacher: str | None) -> tuple[str, str | None]:
    """What a student without LoRA depends on, hashable."""
    return json.dumps(asdict(student) | {"lora": None}), teacher


def _teacher_model(recipe: Recipe) -> Any:
    teacher = teacher_of(recipe)
    return None if teacher is None else teacher.model


@lru_cache(maxsize=4)
def _teacher(reference: str) -> Blueprint:
    model = _from_folder(reference, "teacher")
    if not has_vision(model):
        raise ValueError(f"teacher: {reference} holds no multimodal model but a {model.config.model_type} model")
    prepare(model)
    model.requires_grad_(False)
    return Blueprint(model, 0, sum(p.numel() for p in model.parameters()))


@lru_cache(maxsize=32)  # three stages, each with and without LoRA and checkpoints
def _prepared_student(
    student: str, teacher: str | None, objective: str, lora: LoRAConfig | None, checkpointed: bool
) -> Blueprint:
    model = _student.__wrapped__(student, teacher)
    if lora is not None:
        with torch.device("meta"):
            add_lora(model, lora)
    set_trained(model, OBJECTIVES[objective])
    prepare(model)
    if checkpointed:
        checkpoint_activations(model, reentrant=False)
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return Blueprint(model, sum(n for n, trained in sizes if trained), sum(n for n, _ in sizes))


@lru_cache(maxsize=4)
def _student(student: str, teacher_reference: str | None) -> Model:
    config = StudentConfig(**json.loads(student))
    teacher = _teacher(teacher_reference).model if teacher_reference is not None else None
    if config.base is not None:
        base = load_config(resolve_folder(config.base, "student.base"), "student.base")
        if hasattr(base, "vision_config"):
            model = _from_folder(config.base, "student.base")
            check_same_kind(config, model)
            if is_llava(model):
                set_visual_tokens(model.config, "student.base", resolve_folder(config.base, "student.base"))
            return model
        text: Any = base
    else:
        known = teacher.config.get_text_config().vocab_size if teacher is not None else len(build_tokenizer())
        text = fresh_config(config.text_config, "student.text_config", vocab_size=known)
    source: Any = teacher
    vision: Any = None
    folder = None if teacher_reference is None else resolve_folder(teacher_reference, "teacher")
    if not config.taf and config.vision is not None:
        folder = resolve_folder(config.vision, "student.vision")
        source = _from_folder(config.vision, "student.vision") if holds_llava(folder, "student.vision") else None
        vision = encoder_config(folder, "student.vision") if source is None else None
    if config.vision_config is not None:
        vision, source = fresh_config(config.vision_config, "student.vision_config"), None
    elif source is not None:
        vision = source.config.vision_config
    with torch.device("meta"):
        if vision is None:
            return AutoModelForCausalLM.from_config(text, attn_implementation="sdpa")
        model = compose(
            vision,
            text,
            image_token_id=0,
            source=source,
            teacher=teacher if config.taf else None,
            taf_activation=config.taf_activation,
        )
    set_visual_tokens(model.config, "student", folder)
    return model


def _from_folder(reference: str, key: str) -> Model:
    """The model whose configuration a folder holds. Raises ValueError naming what is missing."""
    config = load_config(resolve_folder(reference, key), key)
    auto = AutoModelForImageTextToText if hasattr(config, "vision_config") else AutoModelForCausalLM
    with torch.device("meta"):
        return auto.from_config(config, attn_implementation="sdpa")


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
