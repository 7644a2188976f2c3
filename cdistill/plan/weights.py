"""Bytes of weights, optimizer states and gradients, of student and teacher: one function per component."""

from __future__ import annotations

from torch import nn

from cdistill.models.parts import head_of, language_model
from cdistill.models.taf import TAFAdapter
from cdistill.plan.blueprint import Blueprint, shares_vision
from cdistill.plan.setting import Bytes, Setting, item_size
from cdistill.runtime.zero import BUCKET
from cdistill.train.recipes import Recipe
from cdistill.train.terms import Memory

LIVE_PARAMETERS = 10**9  # DeepSpeed's stage3_max_reuse_distance: what ZeRO-3 may keep gathered
QUANTISED = {"8bit": 1.0, "4bit": 0.5 + 4 / 64}  # bytes per weight, scales of blocks of 64 included


def student_weights(student: Blueprint, s: Setting) -> int:
    """fp32 under plain torch; in the precision under DeepSpeed, which ZeRO-3 partitions and gathers as it goes.

    One GPU alone has no parts to gather.
    """
    whole = student.total * item_size(s.student)
    if s.zero != 3 or s.gpus == 1:
        return whole
    return whole // s.gpus + min(student.total, LIVE_PARAMETERS) * item_size(s.student)


def optimizer_states(student: Blueprint, s: Setting) -> int:
    """AdamW's two fp32 states of the trained parameters, and under DeepSpeed an fp32 copy of these, partitioned by ZeRO."""
    copies = 2 if s.zero == "off" or (s.zero == 0 and s.precision == "fp32") else 3
    return copies * 4 * student.trained // s.partitions


def gradients(student: Blueprint, s: Setting) -> Bytes:
    """Gradients between micro-batches, when the backward pass begins and ends, and in the optimizer step.

    Plain torch: fp32, with a copy in buckets where processes average them. ZeRO-1 to 3: in the precision, through a bucket that
    is allocated whole; the step makes an fp32 copy of a process' part.
    """
    trained, item = student.trained, item_size(s.student)
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
    own = item * trained // (s.gpus if s.zero in (2, 3) else 1)
    part = trained // s.partitions
    if s.zero == 3:  # both are allocated once and for all
        return {
            "between": own + bucket,
            "begin": own + bucket,
            "end": own + bucket,
            "step": own + bucket + (4 + item) * part,
        }
    between = own if s.accumulates else 0
    step = own + (4 + item if item < 4 else 4) * part
    return {"between": between, "begin": between + bucket, "end": own + bucket, "step": step}


def teacher_weights(recipe: Recipe, student: Blueprint, teacher: Blueprint, s: Setting, *, fetched: bool = True) -> int:
    """In the precision, without what the student has, too: the vision encoder and, with TAF, the adapter that is ``fetched``.

    Partitioned, in CPU memory, with quantised layers, or kept by a cache and not here at all.
    """
    memory, item = recipe.teacher_memory, item_size(s.half)
    if memory.cache is not None:
        return 0
    count = teacher.total
    if shares_vision(student.model, teacher.model):
        shared = [teacher.model.model.vision_tower]
        if fetched and isinstance(student.model.model.multi_modal_projector, TAFAdapter):
            shared.append(teacher.model.model.multi_modal_projector)
        count -= sum(p.numel() for part in shared for p in part.parameters())
    if memory.zero == 3:
        return 0 if memory.offload else item * count // s.gpus
    if memory.quantization is None:
        return item * count
    linear = sum(_linear_sizes(teacher))
    return int(item * (count - linear) + QUANTISED[memory.quantization] * linear)


def gathered_weights(recipe: Recipe, teacher: Blueprint, s: Setting) -> Bytes:
    """Whole weights of a teacher that is held otherwise: one layer's in its pass, its head's in the losses."""
    memory, item = recipe.teacher_memory, item_size(s.half)
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


def first_gradient(terms: Memory, student: Blueprint, s: Setting) -> int:
    """The head's gradient, for which DeepSpeed allocates its bucket, and of whole logits what it is made from."""
    head = head_of(student.model).weight
    made = head.numel() * item_size(s.student) if head.requires_grad else 0
    return made + (s.labelled * head.shape[0] * item_size(s.half) if terms.logits == "whole" else 0)


def head_gradient(student: Blueprint, s: Setting) -> int:
    """Of a trained head, while the layers' backward passes run; under DeepSpeed it is in the bucket."""
    head = head_of(student.model).weight
    return head.numel() * item_size(s.student) if head.requires_grad and s.zero == "off" and not s.accumulates else 0


def layer_gradients(student: Blueprint, s: Setting) -> int:
    """Of the first layer, which its working memory already holds; under DeepSpeed they move on into the bucket."""
    layer = language_model(student.model).layers[0]
    trained = sum(p.numel() for p in layer.parameters() if p.requires_grad)
    return trained * item_size(s.student) if s.zero == "off" and not s.accumulates else 0


def embedding_gradients(student: Blueprint, s: Setting) -> Bytes:
    """The last gradient to be made: ``missing`` until then, and ``extra`` beside the place it is added or copied to.

    That of tied embeddings is added to the head's.
    """
    weight = student.model.get_input_embeddings().weight
    if not weight.requires_grad:
        return {"missing": 0, "extra": 0}
    size, tied = weight.numel() * item_size(s.student), head_of(student.model).weight is weight
    elsewhere = s.zero != "off" or s.accumulates
    return {"missing": 0 if tied or elsewhere else size, "extra": size if tied or elsewhere else 0}
