"""The keys of a recipe that say what student and teacher are made of and how they are held."""

from collections.abc import Iterator
from typing import Any, Literal

from pydantic.dataclasses import dataclass

from cdistill.choices import BelowOne, NotNegative
from cdistill.train.recipes.section import STRICT, AtLeastOne, Count, Keys, TeacherZero


@dataclass(frozen=True, config=STRICT)
class LoRAConfig(Keys):
    """Low-rank adaptation of every linear layer of the student's language model but its head, by peft.

    The defaults are the authors' (SPEC section 4). A stage's result has it merged.
    """

    r: AtLeastOne = 128
    """Rank."""
    alpha: AtLeastOne = 256
    """The additions are multiplied by alpha / r."""
    dropout: BelowOne = 0.05
    """Share of the additions' inputs that is dropped in training."""


@dataclass(frozen=True, config=STRICT)
class TeacherMemory(Keys):
    """How a teacher is held that does not fit beside the student."""

    zero: TeacherZero = "off"
    """3 partitions the teacher over the processes under a DeepSpeed engine of its own; off keeps it whole on each."""
    offload: bool = False
    """Keep the partitioned parameters in CPU memory until a layer needs them."""
    quantization: Literal["8bit", "4bit"] | None = None
    """Weights of its language model's layers in so many bits, by bitsandbytes."""
    cache: str | None = None
    """Folder of what `cdistill cache` has kept of the teacher, or http://HOST:PORT of a machine where `cdistill cache --serve`
    makes it; training then needs no teacher in memory."""
    top_k: AtLeastOne = 128
    """Log-probabilities that the cache keeps for each labelled token, the largest."""

    def problems(self) -> Iterator[str]:
        if self.offload and self.zero != 3:
            yield "offload needs zero 3"
        if self.quantization is not None and self.zero == 3:
            yield "quantization and zero 3 exclude each other: quantised weights cannot be partitioned"


@dataclass(frozen=True, config=STRICT)
class TeacherConfig(Keys):
    """One of several teachers, and how much samples are to learn of it."""

    model: str
    """Folder or built-in asset, as `teacher`."""
    weights: dict[str, NotNegative]
    """Factor of this teacher's losses (kd and vat) by kind of sample; `default` is that of all other kinds. The kind of a
    sample is the name of its data set: in a mix that of its source, else of the file; of the built-in task the sub-type of its
    questions, caption without any, mixed with questions of several."""

    def problems(self) -> Iterator[str]:
        if not any(self.weights.values()):
            yield "weights must have one above 0: this teacher would teach nothing"


@dataclass(frozen=True, config=STRICT)
class PruningConfig(Keys):
    """What is kept of base's language model. base may be the teacher: the student then begins as a smaller copy of it."""

    layers: AtLeastOne | tuple[Count, ...] | None = None
    """Layers that are kept: their numbers from 0, in order, or how many, spread evenly from the first to the last; null keeps
    all."""
    intermediate_size: AtLeastOne | None = None
    """Neurons kept in each layer's MLP, those whose weights weigh most; null keeps all."""
    key_value_heads: AtLeastOne | None = None
    """Key and value heads kept in each layer, with the query heads that share them, those whose weights weigh most; null keeps
    all."""

    def problems(self) -> Iterator[str]:
        if self.layers is None and self.intermediate_size is None and self.key_value_heads is None:
            yield "layers, intermediate_size or key_value_heads must say what is kept"
        if isinstance(self.layers, tuple):
            if not self.layers:
                yield "layers must keep at least one layer"
            if any(a >= b for a, b in zip(self.layers, self.layers[1:], strict=False)):
                yield f"layers must be in order and each once, got {list(self.layers)}"


@dataclass(frozen=True, config=STRICT)
class StudentConfig(Keys):
    """What the student is made of."""

    base: str | None = None
    """Folder or built-in asset of a causal language model, or of a multimodal model to go on from; null where text_config
    describes a fresh language model."""
    pruning: PruningConfig | None = None
    """Keep a part of base's language model alone; null keeps all of it."""
    vision: str | None = None
    """Folder of a LLaVA whose vision encoder is taken, or of an encoder such as SigLIP or CLIP; null where vision_config
    describes a fresh one, where the teacher's is taken, or where the student has none."""
    text_config: dict[str, Any] | None = None
    """transformers configuration of a fresh language model, model_type included."""
    tokenizer: str | None = None
    """Folder of the tokenizer that a fresh language model reads with, such as builtin:subwords; null: its teacher's, or that of
    the built-in task. base has its own."""
    vision_config: dict[str, Any] | None = None
    """transformers configuration of a fresh vision encoder, model_type included."""
    taf: bool = False
    """Teacher adapter fetch (paper section 4.2); false gives the student an adapter of its own."""
    taf_teacher: str | None = None
    """Which of several `teachers` the adapter is fetched from; null with one `teacher`."""
    taf_activation: Literal["linear", "gelu"] = "linear"
    """Of the light map before the teacher's adapter: linear is a linear layer (the authors' code), gelu one after a GELU."""
    lora: LoRAConfig | None = None
    """Train low-rank additions to the language model instead of all of it; null trains all."""

    def problems(self) -> Iterator[str]:
        if (self.base is None) == (self.text_config is None):
            yield "base or text_config must be given, and not both"
        if self.pruning is not None and self.base is None:
            yield "pruning needs base: a fresh language model has the size that text_config says"
        if self.tokenizer is not None and self.text_config is None:
            yield "tokenizer must be null with base, which has its own"
        if self.vision is not None and self.vision_config is not None:
            yield "vision and vision_config exclude each other"
        for name in ("text_config", "vision_config"):
            value = getattr(self, name)
            if value is not None and not isinstance(value.get("model_type"), str):
                yield f"{name}.model_type must name a model type of transformers, such as qwen2"
