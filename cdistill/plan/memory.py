"""How much memory a recipe needs on each GPU, from configurations alone: `plan`.

Every stage passes through phases (the teacher's pass, the student's, the losses over the vocabulary, both ends of the backward
pass, the optimizer step). A phase is a table of components in bytes (`cdistill.plan.phases`); what a stage needs is its largest
phase.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from cdistill.errors import InputError
from cdistill.models.llava import Llava
from cdistill.models.load import DTYPES
from cdistill.models.parts import has_vision
from cdistill.plan.blueprint import Blueprint, check_models, is_llava, student_of, teacher_of
from cdistill.plan.phases import phases_of
from cdistill.plan.setting import Bytes, Setting
from cdistill.train.objectives import OBJECTIVES
from cdistill.train.recipes import Recipe, StageConfig
from cdistill.train.resolve import check_batches, check_rounding
from cdistill.train.terms import Sizes

PAPER_LENGTH = 2048


@dataclass(frozen=True)
class StagePlan:
    """What a stage needs on each GPU."""

    name: str
    setting: Setting
    phases: dict[str, Bytes]

    @property
    def peak(self) -> str:
        """The phase that needs most."""
        return max(self.phases, key=lambda phase: sum(self.phases[phase].values()))

    @property
    def components(self) -> Bytes:
        """Bytes of each component in that phase."""
        return {name: size for name, size in self.phases[self.peak].items() if size}

    @property
    def total(self) -> int:
        """Bytes per GPU."""
        return sum(self.phases[self.peak].values())


@dataclass(frozen=True)
class Plan:
    """What a recipe needs on each of its GPUs, stage by stage; ``remarks`` say what is not counted."""

    recipe: Recipe
    stages: tuple[StagePlan, ...]
    remarks: tuple[str, ...] = ()

    @property
    def total(self) -> int:
        """Bytes per GPU of the stage that needs most."""
        return max(stage.total for stage in self.stages)


def plan(
    recipe: Recipe,
    *,
    gpus: int,
    precision: str | None = None,
    device: str = "cuda",
    length: int | None = None,
    visual: int | None = None,
    answers: int | None = None,
) -> Plan:
    """What a recipe needs on each GPU, from the configurations of its models; no weights are read.

    Args:
        gpus: processes, one per GPU, those that share sequences included.
        precision: fp32, bf16 or fp16; by default the recipe's, bf16 for ``auto``.
        device: ``cuda``, or ``cpu`` for what its processes need there (chunks of logits are smaller).
        length: tokens of a sample, visual tokens included; by default 2048 as in the paper, or what the student can take.
        visual: visual tokens of a sample, by default those of one image.
        answers: labelled tokens of a sample, by default all that are not visual, which no batch can exceed.

    Raises:
        ValueError: a folder is missing, models do not fit each other, or sizes are impossible.
    """
    if gpus < 1:
        raise InputError(f"gpus must be at least 1, got {gpus}")
    recipe = replace(recipe, processes=gpus)
    ways = check_batches(recipe, gpus)
    apart = check_models(recipe)
    precision = precision or ("bf16" if recipe.precision == "auto" else recipe.precision)
    if precision not in DTYPES:
        raise InputError(f"precision must be one of {', '.join(DTYPES)}, got {precision!r}")
    check_rounding(recipe, precision)
    stages = []
    remarks: list[str] = []
    for index, name in enumerate(recipe.stages):
        stage = recipe.stage[name]
        student = student_of(recipe, stage)
        micro = stage.micro_batch_size or stage.global_batch_size // ways
        setting = Setting(
            precision=precision,
            zero=recipe.deepspeed,
            gpus=gpus,
            device=device,
            batch=micro,
            accumulates=stage.global_batch_size > micro * ways,
            sharers=recipe.sequence_parallel,
            **_tokens(student, stage, length, visual, answers),
        )
        setting = _with_teacher(recipe, stage, student, setting, remarks) if apart else setting
        stages.append(StagePlan(name, setting, phases_of(recipe, index, student, setting)))
        if "generation" in stages[-1].phases:
            cache = stages[-1].phases["generation"]["cache of replies"]
            remarks.append(f"stage {name} generates with a key-value cache of {cache / 1e9:.2f} GB, which is counted")
        if has_vision(student.model) and not is_llava(student.model):
            remarks.append(f"the working memory of {student.model.config.model_type}'s vision encoder is not counted")
        sizes = Sizes(setting.batch, setting.length, setting.visual, setting.answers)
        for term in OBJECTIVES[stage.objective].kinds:
            if term.memory(recipe, student.model, sizes) is None:
                remarks.append(f"what term {term.name} keeps is not counted")
    return Plan(recipe, tuple(stages), tuple(dict.fromkeys(remarks)))


def _with_teacher(
    recipe: Recipe, stage: StageConfig, student: Blueprint, setting: Setting, remarks: list[str]
) -> Setting:
    """The setting of a stage whose teacher has an encoding of its own, with as many visual tokens as that has."""
    teacher = teacher_of(recipe)
    if teacher is None or not setting.visual or not OBJECTIVES[stage.objective].distils:
        return setting
    if not (is_llava(teacher.model) and is_llava(student.model)):
        raise InputError(
            "plan cannot tell how many visual tokens the teacher makes: it needs two LLaVAs of fixed numbers"
        )
    remarks.append("the teacher's own look at the images is not counted")
    images = math.ceil(setting.visual / student.model.config.image_seq_length)
    return replace(setting, teacher_visual=images * int(teacher.model.config.image_seq_length))


def _tokens(
    student: Blueprint, stage: StageConfig, length: int | None, visual: int | None, answers: int | None
) -> dict[str, int]:
    """Tokens of a sample: in all, visual, and labelled."""
    config = student.model.config
    most = getattr(config.get_text_config(), "max_position_embeddings", PAPER_LENGTH)
    if length is None:
        length = min(PAPER_LENGTH, most) if stage.data.path is None else stage.data.max_length
    if not has_vision(student.model) or (stage.data.path is None and stage.data.modality == "text"):
        visual = 0
    elif visual is None:
        known = is_llava(student.model) or not isinstance(student.model, Llava)
        visual = getattr(config, "image_seq_length", None) if known else None
        if visual is None:
            raise InputError(f"visual must be given: images of a {config.model_type} have any number of tokens")
    if length < 2:
        raise InputError(f"length must be at least 2, got {length}")
    if not 0 <= visual < length:
        raise InputError(f"visual must be at least 0 and below length {length}, got {visual}")
    answers = length - visual - (visual == 0) if answers is None else answers  # nothing predicts the first token
    if not 1 <= answers <= length - visual:
        raise InputError(f"answers must be from 1 to {length - visual}, got {answers}")
    return {"length": length, "visual": visual, "answers": answers}
