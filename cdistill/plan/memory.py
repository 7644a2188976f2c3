"""How much memory a recipe needs on each GPU, from configurations alone: `plan`.

Every stage passes through phases (the teacher's pass, the student's, the losses over the vocabulary, both ends of the backward
pass, the optimizer step). A phase is a table of components in bytes; what a stage needs is its largest phase. What layers hold
is read off them (`cdistill.plan.footprint`), everything else is arithmetic below, one function per component.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from cdistill.builtin.render import PATCH_CLASSES
from cdistill.models.llava import Llava, image_size
from cdistill.models.load import DTYPES
from cdistill.models.parts import has_vision, head_of, language_model
from cdistill.models.taf import TAFAdapter, feature_width
from cdistill.ops._vocabulary import ROW_UNIT, chunk_rows
from cdistill.plan.blueprint import Blueprint, check_models, is_llava, shares_vision, student_of, teacher_of
from cdistill.plan.footprint import (
    Footprint,
    alignment_recorder,
    decoder_footprint,
    encoder_footprint,
    logits_footprint,
    patch_footprint,
)
from cdistill.runtime.zero import BUCKET
from cdistill.train.config import Recipe, StageConfig
from cdistill.train.objectives import OBJECTIVES, Objective
from cdistill.train.resolve import check_batches
from cdistill.vat import VAT, attention_layers, layer_range

Bytes = dict[str, int]

PAPER_LENGTH = 2048
OVERHEAD = 10**9  # CUDA's context, kernels, workspaces of libraries and NCCL's buffers: assumed, not measured
LIVE_PARAMETERS = 10**9  # DeepSpeed's stage3_max_reuse_distance: what ZeRO-3 may keep gathered
QUANTISED = {"8bit": 1.0, "4bit": 0.5 + 4 / 64}  # bytes per weight, scales of blocks of 64 included


@dataclass(frozen=True)
class Setting:
    """What the bytes of a stage depend on beside its models.

    Attributes:
        precision: fp32, bf16 or fp16.
        zero: ZeRO stage, or ``off``: plain torch, with autocast for half precision.
        batch: samples of a micro-batch; ``length``, ``visual`` and ``answers`` tokens are of one sample.
        accumulates: gradients are added up over several micro-batches.
    """

    precision: str
    zero: int | str
    gpus: int
    device: str
    batch: int
    accumulates: bool
    length: int
    visual: int
    answers: int

    @property
    def half(self) -> torch.dtype:
        """What matrix products are made in."""
        return DTYPES[self.precision]

    @property
    def student(self) -> torch.dtype:
        """What the student's weights are held in."""
        return torch.float32 if self.zero == "off" else self.half

    @property
    def autocast(self) -> torch.dtype | None:
        """What plain torch casts to."""
        return self.half if self.student != self.half else None

    @property
    def partitions(self) -> int:
        """Parts that optimizer states are cut into."""
        return self.gpus if self.zero in (1, 2, 3) else 1

    @property
    def labelled(self) -> int:
        """Labelled tokens of a micro-batch."""
        return self.batch * self.answers


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
        gpus: data-parallel processes, one per GPU.
        precision: fp32, bf16 or fp16; by default the recipe's, bf16 for ``auto``.
        device: ``cuda``, or ``cpu`` for what its processes need there (chunks of logits are smaller).
        length: tokens of a sample, visual tokens included; by default 2048 as in the paper, or what the student can take.
        visual: visual tokens of a sample, by default those of one image.
        answers: labelled tokens of a sample, by default all that are not visual, which no batch can exceed.

    Raises:
        ValueError: a folder is missing, models do not fit each other, or sizes are impossible.
    """
    if gpus < 1:
        raise ValueError(f"gpus must be at least 1, got {gpus}")
    recipe = replace(recipe, processes=gpus)
    check_batches(recipe, gpus)
    check_models(recipe)
    precision = precision or ("bf16" if recipe.precision == "auto" else recipe.precision)
    if precision not in DTYPES:
        raise ValueError(f"precision must be one of {', '.join(DTYPES)}, got {precision!r}")
    stages = []
    remarks = []
    for index, name in enumerate(recipe.stages):
        stage = recipe.stage[name]
        student = student_of(recipe, stage.objective)
        micro = stage.micro_batch_size or stage.global_batch_size // gpus
        setting = Setting(
            precision=precision,
            zero=recipe.deepspeed,
            gpus=gpus,
            device=device,
            batch=micro,
            accumulates=stage.global_batch_size > micro * gpus,
            **_tokens(student, stage, length, visual, answers),
        )
        stages.append(StagePlan(name, setting, _phases(recipe, index, student, setting)))
        if has_vision(student.model) and not is_llava(student.model):
            remarks.append(f"the working memory of {student.model.config.model_type}'s vision encoder is not counted")
    return Plan(recipe, tuple(stages), tuple(dict.fromkeys(remarks)))


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
            raise ValueError(f"visual must be given: images of a {config.model_type} have any number of tokens")
    if length < 2:
        raise ValueError(f"length must be at least 2, got {length}")
    if not 0 <= visual < length:
        raise ValueError(f"visual must be at least 0 and below length {length}, got {visual}")
    answers = length - visual - (visual == 0) if answers is None else answers  # nothing predicts the first token
    if not 1 <= answers <= length - visual:
        raise ValueError(f"answers must be from 1 to {length - visual}, got {answers}")
    return {"length": length, "visual": visual, "answers": answers}


def _phases(recipe: Recipe, index: int, student: Blueprint, s: Setting) -> dict[str, Bytes]:
    """The phases of a step."""
    objective = OBJECTIVES[recipe.stage[recipe.stages[index]].objective]
    resident = {
        "CUDA and NCCL": 0 if s.device == "cpu" else OVERHEAD,
        "student weights": _weights(student, s),
        "optimizer": _optimizer(student, s),
    }
    teacher = teacher_of(recipe)
    stages = [OBJECTIVES[recipe.stage[other].objective].distils for other in recipe.stages]
    begun = s.device == "cpu" or any(stages[: index + 1])  # in CPU memory until a stage distils
    if teacher is not None and begun and any(stages[index:]):
        resident["teacher weights"] = _teacher_weights(recipe, student, teacher, s)
    if not objective.distils or recipe.teacher_memory.cache is not None:
        teacher = None
    gradients = _gradients(student, s)
    waiting = resident | {"gradients": gradients["between"]}
    if "patch" in objective.losses:
        patches = patch_footprint(student.model, s.batch, sum(PATCH_CLASSES), dtype=s.student, autocast=s.autocast)
        phases = {
            "forward": waiting | {"activations": patches.cached},
            "backward": resident | {"gradients": gradients["begin"], "activations": patches.backward},
        }
        return phases | {"optimizer step": resident | {"gradients": gradients["step"]}}
    images = _images(student, s)
    targets = _targets(recipe, objective, student, s)
    hidden = _teacher_hidden(recipe, objective, teacher, s)
    acts = _activations(recipe, objective, student, s)
    logits = _vocabulary(recipe, objective, student, teacher, s)
    gathered = {"pass": 0, "losses": 0} if teacher is None else _gathered(recipe, teacher, s)
    inputs = {"images": images["kept"], "targets": targets}
    phases = {"images": waiting | {"images": images["peak"]}}
    if teacher is not None:
        phases["teacher"] = (
            waiting | inputs | {"teacher's pass": _teacher_pass(recipe, objective, teacher, s) + gathered["pass"]}
        )
    inputs["images"] += hidden
    forward = waiting | inputs
    phases["forward"] = forward | {"activations": acts["forward"]}
    phases["losses"] = forward | {"activations": acts["cached"], "logits": logits.forward + gathered["losses"]}
    after = resident | {"images": acts["images"], "targets": targets}
    phases["backward of the losses"] = after | {
        "gradients": gradients["between"],
        "activations": acts["kept"],
        "logits": logits.backward,
    }
    if s.zero != "off":
        phases["gradient of the head"] = after | {
            "gradients": gradients["begin"],
            "activations": acts["kept"],
            "logits": _first_gradient(objective, student, s),
        }
    phases["backward begins"] = after | {
        "gradients": max(gradients["between"], gradients["begin"] + _head_gradient(student, s)),
        "activations": acts["begin"],
    }
    last = _embedding_gradients(student, s)
    phases["backward ends"] = after | {
        "gradients": max(gradients["between"], gradients["end"] - last["missing"] - _layer_gradients(student, s)),
        "activations": acts["end"],
    }
    phases["backward of the embeddings"] = after | {
        "gradients": gradients["end"] + last["extra"],
        "activations": acts["embeddings"],
    }
    phases["optimizer step"] = resident | {"gradients": gradients["step"]}
    return phases


def _size(dtype: torch.dtype) -> int:
    return dtype.itemsize


def _weights(student: Blueprint, s: Setting) -> int:
    """fp32 under plain torch; in the precision under DeepSpeed, which ZeRO-3 partitions and gathers as it goes.

    One GPU alone has no parts to gather.
    """
    whole = student.total * _size(s.student)
    if s.zero != 3 or s.gpus == 1:
        return whole
    return whole // s.gpus + min(student.total, LIVE_PARAMETERS) * _size(s.student)


def _optimizer(student: Blueprint, s: Setting) -> int:
    """AdamW's two fp32 states of the trained parameters, and under DeepSpeed an fp32 copy of these, partitioned by ZeRO."""
    copies = 2 if s.zero == "off" or (s.zero == 0 and s.precision == "fp32") else 3
    return copies * 4 * student.trained // s.partitions


def _gradients(student: Blueprint, s: Setting) -> Bytes:
    """Gradients between micro-batches, when the backward pass begins and ends, and in the optimizer step.

    Plain torch: fp32, with a copy in buckets where processes average them. ZeRO-1 to 3: in the precision, through a bucket that
    is allocated whole; the step makes an fp32 copy of a process' part.
    """
    trained, item = student.trained, _size(s.student)
    if s.zero == "off":
        whole, buckets = 4 * trained, 4 * trained if s.gpus > 1 else 0
        between = whole if s.accumulates else 0
        return {
            "between": between + buckets,
            "begin": between + buckets,
            "end": whole + buckets,
            "step": whole + buckets,
        }
    bucket = item * min(BUCKET, trained)
    held = item * trained // (s.gpus if s.zero in (2, 3) else 1)
    part = trained // s.partitions
    if s.zero == 3:  # both are allocated once and for all
        return {
            "between": held + bucket,
            "begin": held + bucket,
            "end": held + bucket,
            "step": held + bucket + (4 + item) * part,
        }
    between = held if s.accumulates else 0
    step = held + (4 + item if item < 4 else 4) * part
    return {"between": between, "begin": between + bucket, "end": held + bucket, "step": step}


def _teacher_weights(recipe: Recipe, student: Blueprint, teacher: Blueprint, s: Setting) -> int:
    """In the precision, without what the student has, too: the vision encoder and, with TAF, the adapter.

    Partitioned, in CPU memory, with quantised layers, or kept by a cache and not here at all.
    """
    memory, item = recipe.teacher_memory, _size(s.half)
    if memory.cache is not None:
        return 0
    held = teacher.total
    if shares_vision(student.model, teacher.model):
        shared = [teacher.model.model.vision_tower]
        if isinstance(student.model.model.multi_modal_projector, TAFAdapter):
            shared.append(teacher.model.model.multi_modal_projector)
        held -= sum(p.numel() for part in shared for p in part.parameters())
    if memory.zero == 3:
        return 0 if memory.offload else item * held // s.gpus
    if memory.quantization is None:
        return item * held
    linear = sum(_linear_sizes(teacher))
    return int(item * (held - linear) + QUANTISED[memory.quantization] * linear)


def _gathered(recipe: Recipe, teacher: Blueprint, s: Setting) -> Bytes:
    """Whole weights of a teacher that is held otherwise: one layer's in its pass, its head's in the losses."""
    memory, item = recipe.teacher_memory, _size(s.half)
    if memory.zero == 3:  # nothing is fetched ahead
        head = head_of(teacher.model).weight.numel()
        alone = s.gpus == 1 and not memory.offload  # nothing to gather, but the head is copied
        return {"pass": 0 if alone else item * max(head, _largest_layer(teacher)), "losses": item * head}
    return {"pass": item * max(_linear_sizes(teacher)) if memory.quantization else 0, "losses": 0}


def _linear_sizes(blueprint: Blueprint) -> list[int]:
    """Elements of every matrix in the layers of a language model."""
    layers = language_model(blueprint.model).layers
    return [module.weight.numel() for module in layers.modules() if isinstance(module, nn.Linear)]


def _largest_layer(blueprint: Blueprint) -> int:
    return max(sum(p.numel() for p in layer.parameters()) for layer in language_model(blueprint.model).layers)


def _images(student: Blueprint, s: Setting) -> Bytes:
    """The shared pass over a batch's images: its peak, and the features and tokens that stay for both models."""
    if not s.visual or not is_llava(student.model):
        return {"peak": 0, "kept": 0}
    config, adapter = student.model.config, student.model.model.multi_modal_projector
    count = s.batch * math.ceil(s.visual / config.image_seq_length)
    encoder = _encoder(student, count, s.student, s.autocast)
    fetched = config.teacher_hidden_size if isinstance(adapter, TAFAdapter) else 0
    tokens = count * config.image_seq_length
    size = math.prod(image_size(config.vision_config)) * config.vision_config.num_channels * 4
    kept = count * size + tokens * (feature_width(config) * _size(s.student) + fetched * _size(s.half))
    return {"peak": count * size + encoder.forward, "kept": kept}


def _aligned(recipe: Recipe, objective: Objective, student: Blueprint, s: Setting) -> tuple[int, int]:
    """Student layers whose attention is compared, and the compared rows of a sample."""
    if "ground" in objective.losses:
        return len(layer_range(attention_layers(student.model), "intermediate")), s.length
    if not (recipe.vat.enabled and "vat" in objective.losses and s.visual):
        return 0, 0
    layers, _ = VAT.spans(recipe.vat, attention_layers(student.model), attention_layers(student.model))
    rows = {"text": s.length - s.visual, "visual": s.visual, "all": s.length}
    return len(layers), rows.get(recipe.vat.rows, s.answers)  # each label has one row, its own or the one before


def _slice(recipe: Recipe, student: Blueprint, rows: int, s: Setting) -> int:
    """Bytes of one layer's slice of attention, fp32, (B, R, V) or (B, Hq, R, V)."""
    heads = student.model.config.get_text_config().num_attention_heads if recipe.vat.heads == "each" else 1
    return 4 * s.batch * heads * rows * (s.visual or s.length)


def _targets(recipe: Recipe, objective: Objective, student: Blueprint, s: Setting) -> int:
    """The teacher's window means, one slice per aligned student layer; a single one for grounded words."""
    layers, rows = _aligned(recipe, objective, student, s)
    return (1 if "ground" in objective.losses else layers) * _slice(recipe, student, rows, s)


def _teacher_hidden(recipe: Recipe, objective: Objective, teacher: Blueprint | None, s: Setting) -> int:
    """What the losses over the vocabulary need of the teacher: hidden states of labelled tokens, or stored top-k."""
    if not objective.distils:
        return 0
    if teacher is None:
        return s.labelled * recipe.teacher_memory.top_k * (4 + 8)
    return s.labelled * teacher.model.config.get_text_config().hidden_size * _size(s.half)


def _teacher_pass(recipe: Recipe, objective: Objective, teacher: Blueprint, s: Setting) -> int:
    """Embeddings, one layer's working memory, hidden states, and a slice on its way into the targets."""
    width = teacher.model.config.get_text_config().hidden_size
    layer = _decoder(teacher, 1, s.batch, s.length, s.half, None, None)
    _, rows = _aligned(recipe, objective, teacher, s)
    return 2 * s.batch * s.length * width * _size(s.half) + layer.forward + _slice(recipe, teacher, rows, s)


def _activations(recipe: Recipe, objective: Objective, student: Blueprint, s: Setting) -> Bytes:
    """What the student holds from its embeddings to its last hidden states, by phase.

    The layers are alike: of two footprints of one and two of them the difference is what each further one keeps.
    """
    common = (s.batch, s.length, s.student, s.autocast)
    one, two = _decoder(student, 1, *common, None), _decoder(student, 2, *common, None)
    layers, (aligned, rows) = len(language_model(student.model).layers), _aligned(recipe, objective, student, s)
    compared, slices = one, 0
    if aligned:
        options = (recipe.vat.loss, recipe.vat.reduction, recipe.vat.sink_filter, recipe.vat.heads)
        compared = _decoder(student, 1, *common, (options, rows, s.visual or s.length))
        slices = _slice(recipe, student, rows, s)
    width = student.model.config.get_text_config().hidden_size
    item = _size(s.student)
    embeds = s.batch * s.length * width * item + _adapter(student, s)

    def after(which: str, count: int) -> int:
        first, second, with_slice = (getattr(x, which) for x in (one, two, compared))
        return embeds + first + (count - 1) * (second - first) + aligned * (with_slice - first)

    working = max(one.backward - one.kept, compared.backward - compared.kept + slices)
    incoming = 2 * s.batch * s.length * width * item  # gradients of the hidden states, before rows were picked
    rows_picked = s.labelled * width * item
    first = embeds + (one.kept if aligned < layers else compared.kept)
    return {
        "forward": after("cached", layers) + max(one.forward - one.cached, compared.forward - compared.cached + slices),
        "cached": after("cached", layers) + rows_picked,
        "kept": after("kept", layers) + rows_picked,
        "begin": after("kept", layers) + working + incoming,
        "end": first + working,
        "embeddings": embeds + incoming,
        "images": _images(student, s)["kept"],
    }


def _adapter(student: Blueprint, s: Setting) -> int:
    """What a trained adapter keeps for its backward pass, and the merged embeddings."""
    width = student.model.config.get_text_config().hidden_size
    return s.batch * s.visual * width * _size(s.half) * 2


def _vocabulary(
    recipe: Recipe, objective: Objective, student: Blueprint, teacher: Blueprint | None, s: Setting
) -> Footprint:
    """Losses over the vocabulary.

    Distillation holds the logits of a chunk, both models', and the fp32 gradient of a trained head; plain cross-entropy holds
    whole logits.
    """
    head = head_of(student.model)
    if "kd" not in objective.losses:
        return _whole_logits(head, s.labelled, s.student, s.student, s.autocast)
    elements, trained = head.weight.numel(), head.weight.requires_grad
    copied = elements * _size(s.half) if s.half != s.student else 0
    gradient = 4 * elements if trained else 0
    hidden = s.labelled * head.in_features * (2 if s.half == torch.bfloat16 else 4)
    vocabulary = head.out_features
    if teacher is not None:
        vocabulary = min(vocabulary, head_of(teacher.model).out_features)
    buffers = 1 if teacher is None else 2
    width = torch.float32 if s.half == torch.float16 and s.device == "cpu" else s.half
    row = buffers * math.ceil(vocabulary / ROW_UNIT) * ROW_UNIT * _size(width)
    rows = chunk_rows(s.labelled, row, on_cuda=s.device == "cuda", head_gradient=elements if trained else 0)
    kept = copied + gradient + hidden
    finished = gradient + (elements * _size(s.half) if trained and s.half != torch.float32 else 0)
    return Footprint(kept + min(rows, s.labelled) * row, kept, kept, copied + hidden + finished)


def _first_gradient(objective: Objective, student: Blueprint, s: Setting) -> int:
    """The head's gradient, for which DeepSpeed allocates its bucket, and of whole logits what it is made from."""
    head = head_of(student.model).weight
    made = head.numel() * _size(s.student) if head.requires_grad else 0
    return made + (0 if "kd" in objective.losses else s.labelled * head.shape[0] * _size(s.half))


def _head_gradient(student: Blueprint, s: Setting) -> int:
    """Of a trained head, while the layers' backward passes run; under DeepSpeed it is in the bucket."""
    head = head_of(student.model).weight
    return head.numel() * _size(s.student) if head.requires_grad and s.zero == "off" and not s.accumulates else 0


def _layer_gradients(student: Blueprint, s: Setting) -> int:
    """Of the first layer, which its working memory already holds; under DeepSpeed they move on into the bucket."""
    layer = language_model(student.model).layers[0]
    trained = sum(p.numel() for p in layer.parameters() if p.requires_grad)
    return trained * _size(s.student) if s.zero == "off" and not s.accumulates else 0


def _embedding_gradients(student: Blueprint, s: Setting) -> Bytes:
    """The last gradient to be made: ``missing`` until then, and ``extra`` beside the place it is added or copied to.

    That of tied embeddings is added to the head's.
    """
    weight = student.model.get_input_embeddings().weight
    if not weight.requires_grad:
        return {"missing": 0, "extra": 0}
    size, tied = weight.numel() * _size(s.student), head_of(student.model).weight is weight
    elsewhere = s.zero != "off" or s.accumulates
    return {"missing": 0 if tied or elsewhere else size, "extra": size if tied or elsewhere else 0}


@lru_cache(maxsize=256)
def _decoder(
    blueprint: Blueprint,
    layers: int,
    batch: int,
    length: int,
    dtype: torch.dtype,
    autocast: torch.dtype | None,
    alignment: tuple[Any, int, int] | None,
) -> Footprint:
    recorder = None
    if alignment is not None:
        (loss, reduction, sink_filter, heads), rows, cols = alignment
        count = blueprint.model.config.get_text_config().num_attention_heads if heads == "each" else 0
        options = {"loss": loss, "reduction": reduction, "sink_filter": sink_filter, "heads": heads}

        def recorder() -> Any:
            return alignment_recorder(options, batch, rows, cols, count)

    trains = blueprint.trained > 0
    return decoder_footprint(
        blueprint.model, layers, (batch, length), dtype=dtype, autocast=autocast, trained=trains, recorder=recorder
    )


@lru_cache(maxsize=64)
def _encoder(student: Blueprint, images: int, dtype: torch.dtype, autocast: torch.dtype | None) -> Footprint:
    return encoder_footprint(student.model, images, dtype=dtype, autocast=autocast)


@lru_cache(maxsize=64)
def _whole_logits(
    head: nn.Linear, rows: int, dtype: torch.dtype, hidden: torch.dtype, autocast: torch.dtype | None
) -> Footprint:
    return logits_footprint(head, rows, dtype=dtype, hidden_dtype=hidden, autocast=autocast)
