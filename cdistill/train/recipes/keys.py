"""The keys of a recipe: nested frozen dataclasses, each key with its type, range, default and meaning.

pydantic checks types and ranges, ``problems`` of a class what concerns several of its keys; `cdistill.train.recipes` reads
files and tells what is wrong with them. The strings below the fields are the text of docs/recipes.md and of the JSON schema.
Importing this module imports neither torch nor transformers, so that listing recipes is fast.
"""

import re
from collections.abc import Iterator
from dataclasses import field, fields
from typing import Annotated, Literal, TypeAlias

from annotated_types import Ge, Gt, Le
from pydantic import StringConstraints, WithJsonSchema
from pydantic.dataclasses import dataclass

from cdistill.builtin.task import BuiltinTask
from cdistill.choices import BelowOne, KDConfig, NotNegative, OnPolicyConfig, Positive, Template, VATConfig
from cdistill.eval import benchmarks
from cdistill.train.objectives import OBJECTIVES
from cdistill.train.recipes.models import StudentConfig, TeacherConfig, TeacherMemory
from cdistill.train.recipes.section import STRICT, AtLeastOne, Count, Keys, Processes, Turns, Workers, ZeroStage
from cdistill.train.recipes.sequences import sequence_problems
from cdistill.train.recipes.teachers import Teachers, teachers_problems

LAST_SEED = 4_294_967_000  # numpy's seeds have 32 bits, and every stage adds its number
STAGE_NAME = re.compile(r"[A-Za-z0-9_]{1,64}")  # as `cdistill.models.load.STAGE` has it
TemplatePath: TypeAlias = Annotated[str, StringConstraints(pattern=r"\.jinja$")]


@dataclass(frozen=True, config=STRICT)
class VATOptions(VATConfig):
    """Visual attention alignment (paper section 4.1)."""

    enabled: bool = True
    """Whether stages with objective dft align attention at all."""
    weight: NotNegative | Literal["auto"] = 1.0
    """Factor of the term in the loss. auto measures it at the start of a stage, on its first `measure_samples` samples: the
    gradient of the alignment becomes as long as that of all other terms together, and the factor then stays."""
    measure_samples: AtLeastOne = 256
    """Samples on which matching adaptive measures the distances between layers, head_matching assignment those between heads,
    and weight auto the gradients."""


@dataclass(frozen=True, config=STRICT)
class DataConfig(Keys):
    """What a stage is trained on: a data set in files or, without path, samples of the built-in task."""

    modality: Literal["image", "text"] = "image"
    """Built-in task: show the scene as pixels, or write it out before the first question."""
    caption: float = BuiltinTask.caption
    """Built-in task: share of samples whose first turn asks for a caption, from 0 to 1."""
    sentences: Turns = BuiltinTask.sentences
    """Built-in task: sentences of a caption beyond the list of objects."""
    turns: Turns = BuiltinTask.turns
    """Built-in task: questions of a sample."""
    subtypes: tuple[str, ...] = BuiltinTask.subtypes
    """Built-in task: kinds of questions, drawn uniformly."""
    one_kind: bool = BuiltinTask.one_kind
    """Built-in task: all questions of a sample are of one kind, so that it has this kind for the weights of `teachers`."""
    pairs: Literal["all", "seen"] = "all"
    """Built-in task: pairs of colour and shape. seen leaves six of the 36 out, in pictures as in words (one for each colour
    and each shape); the table `unseen` asks about these alone."""
    text: float = BuiltinTask.text
    """Built-in task: share of samples, below 1, without an image: the scene is written out, with questions of every kind."""
    seed: Count | None = None
    """Seed of the samples or of their order; null derives it from the recipe's seed and the place of the stage, so that the
    i-th stages of two recipes with the same seed and data see the same samples."""
    path: str | None = None
    """LLaVA-format JSON or JSON Lines, tar shards, a data set of Hugging Face datasets, a mix file of several, or NAME:REST for
    a reader of another package (`cdistill data check` reads them alike); null for the built-in task."""
    images: str | dict[str, str] | None = None
    """Folder under which the images lie, or one for each first part of their names."""
    allow_urls: bool = False
    """Images may be named by http and https URLs, and are then fetched."""
    columns: dict[str, str] | None = None
    """Which columns of a Hugging Face data set hold what."""
    config: str | None = None
    """Which configuration of a set on the hub."""
    split: str | None = None
    """Its split."""
    streaming: bool = False
    """Read it as a stream, in its order."""
    exif: bool = True
    """Turn images as their EXIF orientation says, as transformers does where the model is used. False gives pixels as LLaVA's
    own pipeline trains on, which answers need that give places in the pixels as they are stored."""
    template: Template | TemplatePath = "auto"
    """How a conversation becomes text (`cdistill.data.templates`); auto is the processor's own chat template, a path that
    ends in .jinja one of your own."""
    max_length: Annotated[int, Ge(2)] = 2048
    """Tokens of a sample, visual tokens included, beyond which it is cut."""

    def problems(self) -> Iterator[str]:
        given = [n for n in ("images", "allow_urls", "columns", "config", "split", "streaming") if getattr(self, n)]
        given += [] if self.exif else ["exif"]
        if self.path is None and given:
            yield f"path must be given where {given[0]} is"
        for f in fields(BuiltinTask):
            if self.path is not None and getattr(self, f.name) != f.default:
                yield f"{f.name} is of the built-in task: leave it out, or {f.default}, where path is given"
        try:
            _ = self.builtin
        except ValueError as error:
            yield str(error)

    @property
    def builtin(self) -> BuiltinTask:
        """What samples of the built-in task are made of. Raises ValueError if they cannot be."""
        return BuiltinTask(**{f.name: getattr(self, f.name) for f in fields(BuiltinTask)})


@dataclass(frozen=True, config=STRICT)
class ValidationConfig(Keys):
    """The stage's own losses on samples that it is not trained on, without gradients."""

    samples: AtLeastOne = 500
    """Samples held out: the last ones of the order in which the data set is gone through, which changes in nothing else; of
    the built-in task, samples of its held-out scenes."""
    every: AtLeastOne = 500
    """Steps between two measurements; there is one after the last step, too."""


@dataclass(frozen=True, config=STRICT)
class EvalConfig(Keys):
    """Benchmarks that the student is put to as it is trained; the answers are those that `cdistill eval` would get."""

    tasks: tuple[str, ...]
    """Benchmarks, or groups of them, by the names that `cdistill eval --task` takes."""
    data: str | None = None
    """Folder of the benchmark's files, or one with a folder for each task; null for builtin, which has no files."""
    images: str | None = None
    """Where the images are, if not there."""
    limit: AtLeastOne | None = 200
    """Questions of a task, spread over it; null asks all."""
    every: AtLeastOne = 500
    """Steps between two evaluations; there is one after the last step, too."""

    def problems(self) -> Iterator[str]:
        if not self.tasks:
            yield "tasks must name at least one benchmark"
        for task in self.tasks:
            try:
                benchmarks.names(task)
            except ValueError as error:
                yield f"tasks must be benchmarks: {error}"
                return
        files = [name for name in self.names if name != "builtin"]
        if files and self.data is None:
            yield f"data must name the folder of the files of {files[0]}; `cdistill eval presets` says what to fetch"

    @property
    def names(self) -> tuple[str, ...]:
        """The benchmarks."""
        return tuple(dict.fromkeys(name for task in self.tasks for name in benchmarks.names(task)))


@dataclass(frozen=True, config=STRICT)
class StageConfig(Keys):
    """One stage."""

    objective: str
    """What is trained and by which losses: vision, text, ground, pt, dpt, dft, opd, sft, or a baseline (hidden, mdist, rdist,
    llava_kd, llava_kd_dpt, relation, iva); by default the section's name. opd is dft with `generation`."""
    samples: int
    """Samples of the stage, rounded down to whole global batches."""
    learning_rate: Positive
    """Highest learning rate of AdamW."""
    global_batch_size: AtLeastOne = 64
    """Samples of an optimizer step, over all processes."""
    micro_batch_size: int | None = None
    """Samples of a process at a time; null does not accumulate gradients."""
    warmup_ratio: BelowOne = 0.03
    """Share of the steps in which the learning rate rises from 0."""
    weight_decay: NotNegative = 0.0
    """Of matrices; vectors do not decay."""
    betas: tuple[BelowOne, BelowOne] = (0.9, 0.999)
    """Decay rates of AdamW's moments."""
    schedule: Literal["cosine", "linear", "constant", "constant_with_warmup"] = "cosine"
    """How the learning rate falls."""
    max_grad_norm: Annotated[
        float, Gt(0), WithJsonSchema({"type": "number", "exclusiveMinimum": 0, "infinite": True})
    ] = 1.0
    """Gradients are scaled down to this norm; .inf leaves them as they are."""
    quantization: Literal["q8_0", "q4_0"] | None = None
    """Train with the weights of the language model's layers rounded to what GGUF's Q8_0 or Q4_0 can hold: 8 or 4 bits, and a
    scale for each 32. The stage's result holds rounded weights, in fp32. null rounds nothing."""
    generation: OnPolicyConfig | None = None
    """Distil on answers that the student generates, too; null generates none, except in stages with objective opd, which then
    have its defaults."""
    data: DataConfig = field(default_factory=DataConfig)
    validation: ValidationConfig | None = None
    """Measure the stage's losses on a held-out part of its data; null measures nothing."""
    eval: EvalConfig | None = None
    """Put the student to benchmarks as it is trained; null puts it to none."""
    keep_best: str | None = None
    """Keep the student that has been best so far, in a folder beside the stage's result (2-dft-best): by which metric, such as
    validation.ar or validation.loss (the lowest), or eval.sugarcrepe.mean (the highest); null keeps the last one alone."""

    def problems(self) -> Iterator[str]:
        whole, micro = self.global_batch_size, self.micro_batch_size
        if self.samples < whole:
            yield f"samples must be at least global_batch_size ({whole}), got {self.samples}"
        if micro is not None and (micro < 1 or whole % micro):
            yield f"micro_batch_size must divide global_batch_size ({whole}), got {micro}"
        yield from self._problems_of_measuring()
        if (
            self.generation is not None
            and self.objective in OBJECTIVES
            and not OBJECTIVES[self.objective].takes_replies
        ):
            why = (
                "whose labels only the built-in task has"
                if OBJECTIVES[self.objective].distils
                else "where nothing distils"
            )
            yield f"generation must be null for objective {self.objective}, {why}"
        if self.objective not in OBJECTIVES:
            yield f"objective must be one of {', '.join(OBJECTIVES)}, got {self.objective!r}"
        elif self.data.path is not None:
            if OBJECTIVES[self.objective].has_builtin_labels:
                yield f"data.path must be null for objective {self.objective}: only the built-in task has its labels"
        elif self.objective == "text" and self.data.modality != "text":
            yield f"data.modality must be text for objective text, got {self.data.modality!r}"
        elif self.objective in ("vision", "pt", "dpt") and self.data.modality != "image":
            yield f"data.modality must be image for objective {self.objective}, got {self.data.modality!r}"

    def _problems_of_measuring(self) -> Iterator[str]:
        if self.validation is not None:
            if self.data.streaming:
                yield "validation must be null with data.streaming: no samples of a stream can be held out"
            if self.objective in OBJECTIVES and OBJECTIVES[self.objective].trains_on_patches:
                yield f"validation must be null for objective {self.objective}, which is trained on patches of images"
            if self.eval is not None and OBJECTIVES[self.objective].trains_on_patches:
                yield f"eval must be null for objective {self.objective}, which trains the vision encoder alone"
        metric, tasks = self.keep_best, () if self.eval is None else self.eval.names
        if metric is None or metric in self.measured:
            return
        if not any(metric.startswith(f"eval.{task}.") for task in tasks):  # whose metrics its files tell
            known = [*self.measured, *(f"eval.{task}.METRIC" for task in tasks)]
            names = ", ".join(known) or "none, as validation and eval are null"
            yield f"keep_best must be a metric of this stage ({names}), got {metric!r}"

    @property
    def replies(self) -> OnPolicyConfig | None:
        """How the student generates answers, if it does."""
        return OnPolicyConfig() if self.generation is None and self.objective == "opd" else self.generation

    @property
    def measured(self) -> tuple[str, ...]:
        """Losses by which the best student can be told."""
        if self.validation is None or self.objective not in OBJECTIVES:
            return ()
        return ("validation.loss", *(f"validation.{name}" for name in OBJECTIVES[self.objective].losses))

    @property
    def steps(self) -> int:
        """Optimizer steps of the stage."""
        return self.samples // self.global_batch_size


@dataclass(frozen=True, config=STRICT)
class Recipe(Teachers, Keys):
    """A whole run: models, losses and stages in order (SPEC section 4)."""

    name: str
    """What the run is called; by default of a recipe that extends another, its file's name."""
    output: str
    """Folder of the run; by default of a recipe that extends another, runs/NAME."""
    student: StudentConfig
    stages: tuple[str, ...]
    """Names of sections of stage, in the order they run."""
    stage: dict[str, StageConfig]
    """Sections, one for each stage, by names of your own; a section called dpt, dft and so on has that objective."""
    seed: Annotated[int, Ge(0), Le(LAST_SEED)] = 0
    """Decides fresh weights, the order of samples and dropout: equal seeds give equal bits on the same machine."""
    processes: Processes = 1
    """Data-parallel processes started on this machine; torchrun and the deepspeed launcher start them themselves."""
    sequence_parallel: AtLeastOne = 1
    """Processes that share every sequence, by DeepSpeed's Ulysses: each has a part of the tokens, and in attention all tokens
    and a part of the heads. They are given the same micro-batches. For LLaVAs whose heads it divides; needs `deepspeed`."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Number format; auto is fp32 on a CPU, bf16 on a GPU that has it, else fp16."""
    deepspeed: ZeroStage = 2
    """DeepSpeed's ZeRO stage, or off for plain torch."""
    gradient_checkpointing: bool | Literal["reentrant"] = False
    """Recompute the language model's layers in the backward pass; reentrant is torch's old way, without alignment."""
    compile: bool = False
    """Compile the layers of the language model with torch.compile."""
    group_by: Literal["length", "modality"] | None = None
    """Put samples of similar length, or of one modality and similar length, into a batch, in a random order of batches."""
    packing: bool = False
    """Put the samples of a micro-batch into as few rows of at most max_length tokens as they fit into."""
    workers: Workers = 0
    """Processes of each training process that read samples ahead; what they read does not depend on how many."""
    max_bad_samples: Count = 100
    """Samples of a stage's data set that may be left out because they cannot be used; more end the run."""
    logging_steps: AtLeastOne = 20
    """Steps between two lines of metrics.jsonl."""
    log_layers: bool = False
    """Log the alignment loss of every layer, too."""
    report_to: tuple[str, ...] = ("tensorboard",)
    """Where the log goes beside metrics.jsonl: tensorboard, wandb, trackio, mlflow and what else transformers reports to."""
    save_steps: Count = 0
    """Steps between checkpoints to resume from inside a stage, 0 for none but that of a stopped run."""
    max_nonfinite_steps: AtLeastOne = 20
    """Steps in a row that may be skipped because a loss or gradient is not finite; that many end the run."""
    max_stuck_seconds: Count = 300
    """Seconds that a process may make no step while others wait for it; the run then ends, 0 waits for ever."""
    teacher: str | None = None
    """Folder made by save_pretrained, or of a run (its last finished stage), or builtin:NAME; null where no stage distils."""
    teachers: dict[str, TeacherConfig] = field(default_factory=dict)
    """Sections, one for each of several teachers, by names of your own, in the place of teacher: how much each kind of sample
    learns of whom."""
    teacher_memory: TeacherMemory = field(default_factory=TeacherMemory)
    kd: KDConfig = field(default_factory=KDConfig)
    vat: VATOptions = field(default_factory=VATOptions)
    baseline_weight: NotNegative | Literal["auto"] = 1.0
    """Factor of the terms that a baseline's objective has beside ar and kd; auto for each as vat.weight."""

    def problems(self) -> Iterator[str]:
        if not self.output.strip():
            yield "output must name a folder"
        if not self.stages:
            yield "stages must name at least one section of stage"
        for name in self.stage:
            if not STAGE_NAME.fullmatch(name):
                yield f"stage.{name!r} must be of letters, digits and _, 64 at most: it names a folder of the run"
        for name in self.stages:
            if name not in self.stage:
                yield f"stages must name sections of stage ({', '.join(self.stage)}), got {name!r}"
                return
        for name in dict.fromkeys(n for n in self.stages if self.stages.count(n) > 1):
            yield f"stages must not repeat {name!r}: give it a second section with the same objective"
        objectives = [self.stage[name].objective for name in self.stages]
        yield from self._problems_of_the_teacher(objectives)
        if self.packing:
            yield from self._problems_of_packing()
        if self.sequence_parallel > 1:
            yield from sequence_problems(self)
        if self.kd.alignment != "token":
            yield from self._problems_of_spans(objectives)
        yield from teachers_problems(self)
        if self.student.taf:
            if self.student.vision_config is not None or self.student.vision not in (None, self.lead):
                yield "student.vision must be null or the teacher with student.taf, whose encoder is shared"
            if "vision" in objectives:
                yield "stages must not train the vision encoder with student.taf: it is the teacher's"
        for name in self.stages:
            if self.stage[name].keep_best == "validation.vat" and not self.vat.enabled:
                yield f"stage.{name}.keep_best must not be validation.vat without vat.enabled: nothing is aligned"
        yield from self._problems_of_rounding()
        yield from self._problems_of_generation()
        if self.gradient_checkpointing == "reentrant" and any(map(self.aligns, objectives)):
            yield "gradient_checkpointing must not be reentrant with vat.enabled: it would drop the gradient"
        if self.gradient_checkpointing == "reentrant" and "relation" in objectives:
            yield "gradient_checkpointing must not be reentrant with objective relation: it would drop the gradient"

    def _problems_of_the_teacher(self, objectives: list[str]) -> Iterator[str]:
        distilling = [name for name in self.stages if OBJECTIVES[self.stage[name].objective].distils]
        if self.lead is None and self.student.taf:
            yield "teacher must be given for student.taf: there is no adapter to fetch"
        elif self.lead is None and distilling:
            name = distilling[0]
            yield f"teacher must be given for stage {name!r}, whose objective {self.stage[name].objective} distils"
        if "vision" in objectives:
            later = objectives[objectives.index("vision") + 1 :]
            if any(OBJECTIVES[objective].distils for objective in later):
                yield "stages must not distil after vision: the encoder would no longer be the teacher's"
        if self.teacher_memory.zero == 3 and self.deepspeed == "off":
            yield "teacher_memory.zero 3 needs deepspeed"
        if self.teacher_memory.cache is not None:
            for name in distilling:
                if self.stage[name].validation is not None:
                    yield f"stage.{name}.validation must be null with teacher_memory.cache, which keeps training samples alone"
        if self.teacher_memory.cache is not None and any(map(self.aligns, objectives)):
            if self.vat.matching == "adaptive":
                yield (
                    "vat.matching must not be adaptive with teacher_memory.cache: it measures the student where a stage begins"
                )
            if self.vat.assigns_heads or self.vat.learns_mixture:
                yield f"vat.head_matching must be group with teacher_memory.cache, got {self.vat.head_matching}"
            if self.vat.target == "recomputed":
                yield "vat.target must be stored with teacher_memory.cache, which keeps slices and no queries and keys"

    def _problems_of_rounding(self) -> Iterator[str]:
        grid = None
        for name in self.stages:
            before, grid = grid, self.stage[name].quantization
            if grid is not None and "language" not in OBJECTIVES[self.stage[name].objective].trained:
                yield f"stage.{name}.quantization must be null: {self.stage[name].objective} leaves the language model as it is"
            if grid is not None and self.student.lora is not None:
                yield f"stage.{name}.quantization must be null with student.lora, whose sums are rounded by nobody"
            if before is not None and grid != before:
                yield f"stage.{name}.quantization must be {before}, as in the stage before: its result would lose it"

    def _problems_of_spans(self, objectives: list[str]) -> Iterator[str]:
        """What cannot be done between different tokenizers."""
        why = f"with kd.alignment {self.kd.alignment}"
        if self.packing:
            yield f"packing must be false {why}: samples are encoded for both models and padded"
        if self.teacher_memory.cache is not None:
            yield f"teacher_memory.cache must be null {why}: it keeps what one tokenizer has"
        for name in self.stages:
            if self.stage[name].replies is not None:
                yield f"stage.{name}.generation must be null {why}: replies are tokens of the student's alone"
        if not any(map(self.aligns, objectives)):
            return
        wrong = {"rows": ("all",), "matching": ("adaptive",), "target": ("recomputed",)}
        for name, values in wrong.items():
            if getattr(self.vat, name) in values:
                yield f"vat.{name} must not be {getattr(self.vat, name)} {why}: its rows are compared one by one, not by spans"
        if self.vat.engine != "sdpa":
            yield f"vat.engine must be sdpa {why}, got {self.vat.engine!r}"
        if self.vat.heads == "match" and self.vat.head_matching != "group":
            yield f"vat.head_matching must be group {why}, got {self.vat.head_matching!r}: heads are compared row by row"

    def _problems_of_generation(self) -> Iterator[str]:
        name = next((name for name in self.stages if self.stage[name].replies is not None), None)
        if name is None:
            return
        if self.packing:
            yield f"packing must be false for stage {name!r}, whose replies have no length before they are generated"
        if self.teacher_memory.cache is not None:
            yield f"teacher_memory.cache must be null for stage {name!r}: no teacher would be there to judge replies"
        if self.deepspeed == 3:
            yield f"deepspeed must not be 3 for stage {name!r}, whose student generates with whole weights: take 2"

    def _problems_of_packing(self) -> Iterator[str]:
        builtin = [name for name in self.stages if self.stage[name].data.path is None]
        if builtin:
            yield f"packing needs data.path in every stage; stage.{builtin[0]} has none"
        if self.teacher_memory.cache is not None:
            yield "packing must be false with teacher_memory.cache, which keeps samples one by one"

    def aligns(self, objective: str) -> bool:
        """Whether visual attention is aligned under an objective of this recipe."""
        return self.vat.enabled and "vat" in OBJECTIVES[objective].losses

    @property
    def needs_teacher(self) -> bool:
        """Whether any stage or the student's adapter needs the teacher."""
        return self.student.taf or any(OBJECTIVES[self.stage[name].objective].distils for name in self.stages)
