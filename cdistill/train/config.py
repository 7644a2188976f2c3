"""Recipes: YAML files read into nested frozen dataclasses, validated before anything runs.

Importing this module imports neither torch nor transformers, so that listing recipes is fast.
"""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from cdistill.builtin.task import BuiltinTask
from cdistill.choices import TEMPLATE_FILE, TEMPLATES, KDConfig, VATConfig
from cdistill.data import strict_yaml
from cdistill.train.objectives import OBJECTIVES
from cdistill.train.values import build, differences, override

RECIPES = Path(__file__).parent.parent / "recipes"
PRECISIONS = ("auto", "fp32", "bf16", "fp16")
ZERO_STAGES = (0, 1, 2, 3, "off")
SCHEDULES = ("cosine", "linear", "constant", "constant_with_warmup")
TAF_ACTIVATIONS = ("linear", "gelu")
QUANTIZATIONS = ("8bit", "4bit")
LAST_SEED = 4_294_967_000  # numpy's seeds have 32 bits, and every stage adds its number


def _choice(name: str, value: Any, allowed: Sequence[Any]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(str, allowed))}, got {value!r}")


def _at_least(name: str, value: float, least: float) -> None:
    if not value >= least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def _finite(name: str, value: float) -> None:
    if not 0 <= value < float("inf"):
        raise ValueError(f"{name} must be at least 0 and finite, got {value}")


@dataclass(frozen=True)
class VATOptions(VATConfig):
    """Visual attention alignment (paper section 4.1): the fields of `VATConfig`, a switch and a weight.

    ``measure_samples`` is the number of samples on which adaptive matching measures the distances between layers.
    """

    enabled: bool = True
    weight: float = 1.0
    measure_samples: int = 256

    def __post_init__(self) -> None:
        super().__post_init__()
        _finite("weight", self.weight)
        _at_least("measure_samples", self.measure_samples, 1)


@dataclass(frozen=True)
class LoRAConfig:
    """Low-rank adaptation of every linear layer of the student's language model but its head, by peft.

    The defaults are the authors' (SPEC section 4). A stage's result has it merged.
    """

    r: int = 128
    alpha: int = 256
    dropout: float = 0.05

    def __post_init__(self) -> None:
        _at_least("r", self.r, 1)
        _at_least("alpha", self.alpha, 1)
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, got {self.dropout}")


@dataclass(frozen=True)
class TeacherMemory:
    """How a teacher is held that does not fit beside the student.

    Attributes:
        zero: 3 partitions the teacher over the processes under a DeepSpeed engine of its own; ``off`` keeps it whole on each.
        offload: keep the partitioned parameters in CPU memory until a layer needs them.
        quantization: ``8bit`` or ``4bit`` weights of its language model's layers, by bitsandbytes; null for none.
        cache: folder of what `cdistill cache` has kept of the teacher; training then needs none in memory. Null for none.
        top_k: log-probabilities the cache keeps per labelled token, the largest.
    """

    zero: int | str = "off"
    offload: bool = False
    quantization: str | None = None
    cache: str | None = None
    top_k: int = 128

    def __post_init__(self) -> None:
        _choice("zero", self.zero, (3, "off"))
        if self.quantization is not None:
            _choice("quantization", self.quantization, QUANTIZATIONS)
        _at_least("top_k", self.top_k, 1)
        if self.offload and self.zero != 3:
            raise ValueError("offload needs zero 3")
        if self.quantization is not None and self.zero == 3:
            raise ValueError("quantization and zero 3 exclude each other: quantised weights cannot be partitioned")


@dataclass(frozen=True)
class StudentConfig:
    """What the student is made of.

    Attributes:
        base: folder or built-in asset of a causal language model, or of a LLaVA to go on from; None when `text_config`
            describes a fresh language model.
        vision: folder of a LLaVA whose vision encoder is taken, or of an encoder such as SigLIP or CLIP; None when
            `vision_config` describes a fresh one, when the teacher's is taken, or when the student has none.
        text_config, vision_config: transformers configuration of a freshly initialised part, ``model_type`` included.
        taf: teacher adapter fetch (paper section 4.2); False gives the student an adapter of its own.
        taf_activation: ``linear`` or ``gelu``.
        lora: train low-rank additions to the language model instead of all of it; null trains all.
    """

    base: str | None = None
    vision: str | None = None
    text_config: dict[str, Any] | None = None
    vision_config: dict[str, Any] | None = None
    taf: bool = False
    taf_activation: str = "linear"
    lora: LoRAConfig | None = None

    def __post_init__(self) -> None:
        _choice("taf_activation", self.taf_activation, TAF_ACTIVATIONS)
        if (self.base is None) == (self.text_config is None):
            raise ValueError("base or text_config must be given, and not both")
        if self.vision is not None and self.vision_config is not None:
            raise ValueError("vision and vision_config exclude each other")
        for name in ("text_config", "vision_config"):
            value = getattr(self, name)
            if value is not None and not isinstance(value.get("model_type"), str):
                raise ValueError(f"{name}.model_type must name a model type of transformers, such as qwen2")


@dataclass(frozen=True)
class DataConfig:
    """What a stage is trained on: a data set in files or, without ``path``, a mixture of the built-in task's samples.

    Attributes:
        modality, caption, sentences, turns, subtypes: of the built-in task (`cdistill.builtin.task.BuiltinTask`).
        seed: seed of the samples or of their order; None derives it from the recipe's seed and the place of the stage, so
            that the i-th stages of two recipes with the same seed and data see the same samples.
        path: what `cdistill.data.mix.open_source` opens: LLaVA-format JSON or JSON Lines, tar shards, a data set of Hugging
            Face `datasets`, or a mix file of several.
        images: folder under which the images of ``path`` lie, or one for each first part of their names.
        allow_urls: images may be named by http and https URLs, and are then fetched.
        columns: which columns of a Hugging Face data set hold what.
        config: which configuration of a set on the hub.
        split: its split.
        streaming: read it as a stream, in its order.
        exif: turn images as their EXIF orientation says, as transformers does where the model is used. Set it to false for
            pixels as LLaVA's own pipeline trains on, or where answers give places in the pixels as they are stored.
        template: how a conversation becomes text (`cdistill.data.templates`); ``auto`` is the processor's own chat template,
            a path that ends in ``.jinja`` one of your own.
        max_length: tokens of a sample, visual tokens included, beyond which it is cut.
    """

    modality: str = BuiltinTask.modality
    caption: float = BuiltinTask.caption
    sentences: int = BuiltinTask.sentences
    turns: int = BuiltinTask.turns
    subtypes: tuple[str, ...] = BuiltinTask.subtypes
    seed: int | None = None
    path: str | None = None
    images: str | dict[str, str] | None = None
    allow_urls: bool = False
    columns: dict[str, str] | None = None
    config: str | None = None
    split: str | None = None
    streaming: bool = False
    exif: bool = True
    template: str = "auto"
    max_length: int = 2048

    def __post_init__(self) -> None:
        task = self.builtin
        _at_least("seed", self.seed or 0, 0)
        if not self.template.endswith(TEMPLATE_FILE):
            _choice("template", self.template, (*TEMPLATES, f"a path that ends in {TEMPLATE_FILE}"))
        _at_least("max_length", self.max_length, 2)
        given = [n for n in ("images", "allow_urls", "columns", "config", "split", "streaming") if getattr(self, n)]
        given += [] if self.exif else ["exif"]
        if self.path is None and given:
            raise ValueError(f"path must be given where {given[0]} is")
        for f in fields(task):
            if self.path is not None and getattr(task, f.name) != f.default:
                raise ValueError(f"{f.name} is of the built-in task: leave it out, or {f.default}, where path is given")

    @property
    def builtin(self) -> BuiltinTask:
        """What samples of the built-in task are made of. Raises ValueError if they cannot be."""
        return BuiltinTask(**{f.name: getattr(self, f.name) for f in fields(BuiltinTask)})


@dataclass(frozen=True)
class StageConfig:
    """One stage; ``objective`` defaults to the name of its section.

    ``samples`` is rounded down to whole global batches; without ``micro_batch_size`` gradients are not accumulated.
    """

    objective: str
    samples: int
    learning_rate: float
    global_batch_size: int = 64
    micro_batch_size: int | None = None
    warmup_ratio: float = 0.03
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    schedule: str = "cosine"
    max_grad_norm: float = 1.0
    data: DataConfig = field(default_factory=DataConfig)

    def __post_init__(self) -> None:
        _choice("objective", self.objective, tuple(OBJECTIVES))
        _choice("schedule", self.schedule, SCHEDULES)
        _at_least("global_batch_size", self.global_batch_size, 1)
        if self.samples < self.global_batch_size:
            raise ValueError(
                f"samples must be at least global_batch_size ({self.global_batch_size}), got {self.samples}"
            )
        if not 0 < self.learning_rate < float("inf"):
            raise ValueError(f"learning_rate must be above 0 and finite, got {self.learning_rate}")
        if self.micro_batch_size is not None and (
            self.micro_batch_size < 1 or self.global_batch_size % self.micro_batch_size
        ):
            raise ValueError(
                f"micro_batch_size must divide global_batch_size ({self.global_batch_size}), "
                f"got {self.micro_batch_size}"
            )
        if not 0 <= self.warmup_ratio < 1:
            raise ValueError(f"warmup_ratio must lie between 0 and 1, got {self.warmup_ratio}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must lie between 0 and 1, got {list(self.betas)}")
        _finite("weight_decay", self.weight_decay)
        if not self.max_grad_norm > 0:
            raise ValueError(f"max_grad_norm must be above 0, got {self.max_grad_norm}")
        if self.data.path is not None:
            if OBJECTIVES[self.objective].has_builtin_labels:
                raise ValueError(
                    f"data.path must be null for objective {self.objective}: only the built-in task has its labels"
                )
            return
        if self.objective == "text" and self.data.modality != "text":
            raise ValueError(f"data.modality must be text for objective text, got {self.data.modality!r}")
        if self.objective in ("vision", "pt", "dpt") and self.data.modality != "image":
            raise ValueError(f"data.modality must be image for objective {self.objective}, got {self.data.modality!r}")

    @property
    def steps(self) -> int:
        """Optimizer steps of the stage."""
        return self.samples // self.global_batch_size


@dataclass(frozen=True)
class Recipe:
    """A whole run: models, losses and stages in order (SPEC section 4).

    Attributes:
        processes: data-parallel processes started on this machine; under torchrun or the deepspeed launcher, which
            start them themselves, it is ignored.
        precision: ``auto`` is fp32 on CPU, bf16 on a GPU that has it, else fp16.
        deepspeed: ZeRO stage, or ``off``.
        gradient_checkpointing: recompute the language model's layers in the backward pass; ``reentrant`` selects
            torch's old variant, which visual attention alignment cannot work with.
        compile: compile the layers of the language model with torch.compile.
        group_by: put samples of similar ``length`` into one batch, or those of one ``modality`` (with images or without) and
            of similar length, in a random order of batches; null for neither.
        packing: put the samples of a micro-batch into as few rows of at most ``max_length`` tokens as they fit into.
        workers: processes of each training process that read samples ahead; what they read does not depend on how many.
        max_bad_samples: samples of a stage's data set that may be left out because they cannot be used; more end the run.
        save_steps: steps between checkpoints to resume from inside a stage, 0 for none but that of a stopped run.
        max_nonfinite_steps: steps in a row that may be skipped because a loss or gradient is not finite; that many end
            the run.
        teacher: folder made by ``save_pretrained``, or of a run (its last finished stage), or ``builtin:NAME``.
        teacher_memory: how the teacher is held.
        stages: names of sections of `stage`, in the order they run.
    """

    name: str
    output: str
    student: StudentConfig
    stages: tuple[str, ...]
    stage: dict[str, StageConfig]
    seed: int = 0
    processes: int = 1
    precision: str = "auto"
    deepspeed: int | str = 2
    gradient_checkpointing: bool | str = False
    compile: bool = False
    group_by: str | None = None
    packing: bool = False
    workers: int = 0
    max_bad_samples: int = 100
    logging_steps: int = 20
    log_layers: bool = False
    save_steps: int = 0
    max_nonfinite_steps: int = 20
    teacher: str | None = None
    teacher_memory: TeacherMemory = field(default_factory=TeacherMemory)
    kd: KDConfig = field(default_factory=KDConfig)
    vat: VATOptions = field(default_factory=VATOptions)

    def __post_init__(self) -> None:
        _at_least("seed", self.seed, 0)
        if self.seed > LAST_SEED:
            raise ValueError(f"seed must be at most {LAST_SEED}, got {self.seed}")
        _at_least("processes", self.processes, 1)
        _at_least("logging_steps", self.logging_steps, 1)
        _at_least("save_steps", self.save_steps, 0)
        _at_least("max_nonfinite_steps", self.max_nonfinite_steps, 1)
        _choice("precision", self.precision, PRECISIONS)
        _choice("deepspeed", self.deepspeed, ZERO_STAGES)
        _at_least("workers", self.workers, 0)
        _at_least("max_bad_samples", self.max_bad_samples, 0)
        _choice("group_by", self.group_by, (None, "length", "modality"))
        _choice("gradient_checkpointing", self.gradient_checkpointing, (False, True, "reentrant"))
        if not self.output:
            raise ValueError("output must name a folder")
        if not self.stages:
            raise ValueError("stages must name at least one section of stage")
        for name in self.stages:
            if name not in self.stage:
                raise ValueError(f"stages must name sections of stage ({', '.join(self.stage)}), got {name!r}")
            if self.stages.count(name) > 1:
                raise ValueError(f"stages must not repeat {name!r}: give it a second section with the same objective")
        self._check_models()

    def _check_models(self) -> None:
        student, objectives = self.student, [self.stage[name].objective for name in self.stages]
        if self.teacher is None:
            if student.taf:
                raise ValueError("teacher must be given for student.taf: there is no adapter to fetch")
            for name, objective in zip(self.stages, objectives, strict=True):
                if OBJECTIVES[objective].distils:
                    raise ValueError(f"teacher must be given for stage {name!r}, whose objective {objective} distils")
        if "vision" in objectives:
            later = objectives[objectives.index("vision") + 1 :]
            if any(OBJECTIVES[objective].distils for objective in later):
                raise ValueError("stages must not distil after vision: the encoder would no longer be the teacher's")
        if self.teacher_memory.zero == 3 and self.deepspeed == "off":
            raise ValueError("teacher_memory.zero 3 needs deepspeed")
        adaptive = self.vat.matching == "adaptive" and any(map(self.aligns, objectives))
        if self.teacher_memory.cache is not None and adaptive:
            raise ValueError(
                "vat.matching must not be adaptive with teacher_memory.cache: it measures the student where a stage begins"
            )
        if self.packing:
            self._check_packing()
        if student.taf:
            if student.vision_config is not None or student.vision not in (None, self.teacher):
                raise ValueError("student.vision must be null or the teacher with student.taf, whose encoder is shared")
            if "vision" in objectives:
                raise ValueError("stages must not train the vision encoder with student.taf: it is the teacher's")
        if self.gradient_checkpointing == "reentrant" and any(map(self.aligns, objectives)):
            raise ValueError(
                "gradient_checkpointing must not be reentrant with vat.enabled: it would drop the gradient"
            )

    def _check_packing(self) -> None:
        builtin = [name for name in self.stages if self.stage[name].data.path is None]
        if builtin:
            raise ValueError(f"packing needs data.path in every stage; stage.{builtin[0]} has none")
        if self.teacher_memory.cache is not None:
            raise ValueError("packing must be false with teacher_memory.cache, which keeps samples one by one")
        if self.vat.engine != "sdpa":
            raise ValueError(f"packing needs vat.engine sdpa, got {self.vat.engine!r}")

    def aligns(self, objective: str) -> bool:
        """Whether visual attention is aligned under an objective of this recipe."""
        return self.vat.enabled and "vat" in OBJECTIVES[objective].losses

    @property
    def needs_teacher(self) -> bool:
        """Whether any stage or the student's adapter needs the teacher."""
        return self.student.taf or any(OBJECTIVES[self.stage[name].objective].distils for name in self.stages)


def shipped_recipes() -> dict[str, str]:
    """Names of the recipes in the package, each with the first comment line of its file."""
    result = {}
    for path in sorted(RECIPES.glob("*.yaml"), key=lambda path: path.stem):
        lines = path.read_text(encoding="utf-8").splitlines()
        result[path.stem] = next((line.lstrip("# ").strip() for line in lines if line.startswith("#")), "")
    return result


def load_recipe(name_or_path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe: the name of a shipped one or the path of a YAML file, changed by ``a.b=value`` overrides.

    A file may begin from another: ``extends: NAME`` (or a path); its name and output are then those of its file unless it
    says otherwise. Values of overrides are YAML, too (`cdistill.data.strict_yaml`).

    Raises:
        ValueError: an unknown recipe, key or value, which the message names, a key that a file gives twice, or an override
            that undoes another.
    """
    content = _read(name_or_path, ())
    override(content, overrides)
    return recipe_from_dict(content)


def _read(name_or_path: str | os.PathLike[str], read: tuple[Path, ...]) -> dict[str, Any]:
    """The plain values of a recipe's file, laid over those of the recipe that it ``extends``, if it does."""
    path = RECIPES / f"{name_or_path}.yaml"
    if not path.is_file():
        path = Path(name_or_path)
    if not path.is_file():
        raise ValueError(
            f"recipe {str(name_or_path)!r} is neither a file nor shipped: `cdistill recipes` lists those that are"
        )
    if path.resolve() in read:
        raise ValueError(f"recipe {path} extends itself")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"recipe {path} is not UTF-8 text: {error}") from None
    content = strict_yaml.load(text, f"recipe {path}")
    if not isinstance(content, dict):
        raise ValueError(f"recipe {path} must be a mapping of keys to values")
    extended = content.pop("extends", None)
    if extended is None:
        return content
    own = {"name": path.stem, "output": f"runs/{path.stem}"} | content
    return _laid_over(_read(extended, (*read, path.resolve())), own)


def _laid_over(below: Any, above: Any) -> Any:
    """Mappings key by key; any other value takes the place of the one below."""
    if isinstance(below, dict) and isinstance(above, dict):
        return {**below, **{key: _laid_over(below.get(key), value) for key, value in above.items()}}
    return above


def with_overrides(recipe: Recipe, overrides: Sequence[str]) -> Recipe:
    """A recipe changed by ``a.b=value`` overrides. Raises ValueError as `load_recipe`."""
    content = recipe_to_dict(recipe)
    override(content, overrides)
    return recipe_from_dict(content)


def recipe_from_dict(content: Mapping[str, Any]) -> Recipe:
    """A recipe from plain values, as `recipe_to_dict` gives them. Raises ValueError naming key and allowed values."""
    content = dict(content)
    sections = content.get("stage")
    if isinstance(sections, Mapping):
        content["stage"] = {
            name: {"objective": name, **section} if isinstance(section, Mapping) else section
            for name, section in sections.items()
        }
    if strict_yaml.switch(content.get("deepspeed")) is False:
        content["deepspeed"] = "off"
    memory = content.get("teacher_memory")
    if isinstance(memory, Mapping) and strict_yaml.switch(memory.get("zero")) is False:
        content["teacher_memory"] = {**memory, "zero": "off"}
    return build(Recipe, content)


def recipe_to_dict(recipe: Recipe) -> dict[str, Any]:
    """A recipe as plain values that YAML and JSON can hold."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, list | tuple) else value

    return plain(dataclasses.asdict(recipe))


def first_difference(a: Any, b: Any) -> str | None:
    """Dotted key of the first value in which two recipes (as plain values) differ, or None."""
    return next((key for key, _, _ in differences(a, b)), None)
