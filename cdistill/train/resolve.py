"""A recipe resolved for one run: the plain values that its stages go by."""

from dataclasses import dataclass
from pathlib import Path

import torch

from cdistill.errors import InputError
from cdistill.train.objectives import OBJECTIVES, Objective
from cdistill.train.recipes import LoRAConfig, Recipe, StageConfig
from cdistill.train.run_folder import CHECKPOINTS, stage_folders


@dataclass(frozen=True)
class Stage:
    """One stage of a run.

    Attributes:
        recipe: the whole recipe, whose keys kd, vat and teacher_memory hold for all stages.
        index: place in the recipe's list, from 0.
        name: of its section.
        config: the section.
        objective: what it trains, by which losses.
        folder: its result.
        checkpoints: folder of its checkpoints.
        seed: of dropout and of fresh LoRA weights.
        data_seed: of its samples, or of their order.
        micro_batch_size: samples of a process at a time.
        accumulation: micro-batches whose gradients make a step.
    """

    recipe: Recipe
    index: int
    name: str
    config: StageConfig
    objective: Objective
    folder: Path
    checkpoints: Path
    seed: int
    data_seed: int
    micro_batch_size: int
    accumulation: int

    @property
    def samples(self) -> int:
        """Of the whole stage, in whole global batches."""
        return self.config.steps * self.config.global_batch_size

    @property
    def label(self) -> str:
        """What it is called in messages: 2-dft."""
        return self.folder.name

    @property
    def aligns(self) -> bool:
        """Whether visual attention is aligned."""
        return self.recipe.aligns(self.config.objective)

    @property
    def lora(self) -> LoRAConfig | None:
        """The low-rank additions that it trains, if it does."""
        return self.recipe.student.lora if "language" in self.objective.trained else None

    @property
    def is_last(self) -> bool:
        """Whether its student is the run's result."""
        return self.index + 1 == len(self.recipe.stages)


@dataclass(frozen=True)
class Run:
    """A recipe on this machine.

    Attributes:
        recipe: what is run.
        output: the run's folder.
        world: processes, on all machines.
        precision: fp32, bf16 or fp16.
        zero: DeepSpeed's stage, None for plain torch.
        stages: in order.
    """

    recipe: Recipe
    output: Path
    world: int
    precision: str
    zero: int | None
    stages: tuple[Stage, ...]

    def distils_from(self, index: int) -> bool:
        """Whether a stage from this place on needs the teacher."""
        return any(stage.objective.distils for stage in self.stages[index:])


def resolve(recipe: Recipe, world: int | None = None) -> Run:
    """The run of a recipe by ``world`` processes, by default its own number.

    Raises ValueError for fp16 without a GPU, for global batches that the processes cannot share, and for rounded weights that
    the run's number format cannot hold.
    """
    world, output = world or recipe.processes, Path(recipe.output)
    ways = check_batches(recipe, world)
    precision = precision_of(recipe)
    check_rounding(recipe, precision)
    stages = []
    for index, (name, folder) in enumerate(zip(recipe.stages, stage_folders(recipe, output), strict=True)):
        config = recipe.stage[name]
        micro = config.micro_batch_size or config.global_batch_size // ways
        stages.append(
            Stage(
                recipe=recipe,
                index=index,
                name=name,
                config=config,
                objective=OBJECTIVES[config.objective],
                folder=folder,
                checkpoints=output / CHECKPOINTS / folder.name,
                seed=recipe.seed + index,
                data_seed=recipe.seed * 1000 + index if config.data.seed is None else config.data.seed,
                micro_batch_size=micro,
                accumulation=config.global_batch_size // (ways * micro),
            )
        )
    zero = None if recipe.deepspeed == "off" else recipe.deepspeed
    return Run(recipe, output, world, precision, zero, tuple(stages))


def precision_of(recipe: Recipe) -> str:
    """The number format the recipe asks for on this machine. Raises ValueError for fp16 on CPU."""
    if recipe.precision == "fp16" and not torch.cuda.is_available():
        raise InputError("precision fp16 needs a GPU; use fp32 or bf16 on CPU")
    if recipe.precision != "auto":
        return recipe.precision
    if not torch.cuda.is_available():
        return "fp32"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def check_rounding(recipe: Recipe, precision: str) -> None:
    """Raise ValueError for a stage that rounds weights which DeepSpeed keeps in 16 bits: too few for the rounded numbers."""
    if recipe.deepspeed == "off" or precision == "fp32":
        return
    for name in recipe.stages:
        if recipe.stage[name].quantization is not None:
            raise InputError(
                f"stage.{name}.quantization must be null with deepspeed in {precision}, whose weights cannot hold them: "
                "take deepspeed off (weights stay fp32) or precision fp32"
            )


def check_batches(recipe: Recipe, world: int) -> int:
    """Among how many the samples of a global batch are split, of ``world`` processes. Raises ValueError if they cannot be."""
    if world % recipe.sequence_parallel:
        raise InputError(
            f"sequence_parallel must divide the number of processes, {world}, got {recipe.sequence_parallel}"
        )
    ways = world // recipe.sequence_parallel
    for name in dict.fromkeys(recipe.stages):
        stage = recipe.stage[name]
        if stage.global_batch_size % (ways * (stage.micro_batch_size or 1)):
            shared = "" if ways == world else f" / sequence_parallel {recipe.sequence_parallel}"
            raise InputError(
                f"stage.{name}.global_batch_size must be a multiple of {world} processes{shared} x micro_batch_size "
                f"{stage.micro_batch_size or 1}, got {stage.global_batch_size}"
            )
    return ways
