"""Bytes of what a step makes on its way: images, attention that is compared, hidden states, logits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from cdistill.models.llava import image_size
from cdistill.models.parts import head_of, language_model
from cdistill.models.taf import TAFAdapter, feature_width
from cdistill.ops._relation import CPU_ROWS, CUDA_ROWS
from cdistill.ops._vocabulary import ROW_UNIT, chunk_rows
from cdistill.plan.blueprint import Blueprint, is_llava
from cdistill.plan.footprint import (
    Footprint,
    alignment_recorder,
    decoder_footprint,
    encoder_footprint,
    logits_footprint,
)
from cdistill.plan.setting import Bytes, Setting, item_size
from cdistill.train.kinds import products
from cdistill.train.recipes import Recipe
from cdistill.train.terms import Memory
from cdistill.vat import VAT, attention_layers


def images(student: Blueprint, s: Setting) -> Bytes:
    """The shared pass over a batch's images: its peak, and the features and tokens that stay for both models."""
    if not s.visual or not is_llava(student.model):
        return {"peak": 0, "kept": 0}
    config, adapter = student.model.config, student.model.model.multi_modal_projector
    count = s.batch * math.ceil(s.visual / config.image_seq_length)
    encoder = _encoder(student, count, s.student, s.autocast)
    fetched = config.teacher_hidden_size if isinstance(adapter, TAFAdapter) else 0
    tokens = count * config.image_seq_length
    size = math.prod(image_size(config.vision_config)) * config.vision_config.num_channels * 4
    kept = count * size + tokens * (feature_width(config) * item_size(s.student) + fetched * item_size(s.half))
    return {"peak": count * size + encoder.forward, "kept": kept}


def attention_slice(recipe: Recipe, student: Blueprint, rows: int, s: Setting) -> int:
    """Bytes of one layer's slice of attention, fp32, (B, R, V) or (B, Hq, R, V) of the heads that a process has."""
    heads = 1 if recipe.vat.heads == "mean" else student.model.config.get_text_config().num_attention_heads // s.sharers
    return 4 * s.batch * heads * rows * (s.visual or s.length)


def _recomputed(rows: int, s: Setting) -> tuple[int, int]:
    """Rows of the slices that exist at a time while attention is recomputed, and their number.

    Both models', their gradient and what that is made of.
    """
    return min(rows, CUDA_ROWS if s.device == "cuda" else CPU_ROWS), 4


def targets(recipe: Recipe, terms: Memory, student: Blueprint, teacher: Blueprint | None, s: Setting) -> int:
    """The teacher's window means, one slice per aligned student layer; a single one for grounded words.

    With ``vat.target`` recomputed the queries and keys of its aligned layers; with ``vat.head_matching`` mixture a slice of
    every head of these beside the means. What is resampled is there twice.
    """
    resampled = attention_slice(recipe, student, terms.rows, s) if s.of_teacher is not s else 0
    each = resampled + attention_slice(recipe, student, terms.rows, s.of_teacher)
    means = 0 if terms.recomputes else terms.targets * each
    if teacher is None or not (terms.recomputes or recipe.vat.learns_mixture):
        return means
    _, layers = VAT.spans(recipe.vat, attention_layers(student.model), attention_layers(teacher.model))
    if not terms.recomputes:
        return means + len(layers) * attention_slice(recipe, teacher, terms.rows, s.of_teacher)
    config = teacher.model.config.get_text_config()
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    vectors = config.num_attention_heads + config.num_key_value_heads
    return len(layers) * s.batch * s.length * vectors * width * item_size(s.half)


def generation(student: Blueprint, s: Setting) -> Bytes:
    """What the student needs to answer: keys and values of all layers at every token (of one layer twice, as its cache grows),
    one layer's working memory, and the logits of a token with what it is drawn by in fp64."""
    config = student.model.config.get_text_config()
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    layers = len(language_model(student.model).layers)
    layer = _decoder(student, 1, s.batch, s.length, s.student, s.autocast, None)
    drawn = s.batch * head_of(student.model).out_features * (4 + 3 * 8)
    cache = (layers + 1) * 2 * s.batch * s.length * heads * width * item_size(s.half)
    return {"cache of replies": cache, "activations": layer.forward, "logits": drawn}


def teacher_hidden(recipe: Recipe, teacher: Blueprint | None, s: Setting) -> int:
    """What the losses over the vocabulary need of the teacher: hidden states of labelled tokens, or stored top-k."""
    if teacher is None:
        return s.labelled * recipe.teacher_memory.top_k * (4 + 8)
    return s.labelled * teacher.model.config.get_text_config().hidden_size * item_size(s.half)


def teacher_pass(recipe: Recipe, terms: Memory, teacher: Blueprint, s: Setting) -> int:
    """Embeddings, one layer's working memory, hidden states, and a slice on its way into the targets."""
    s, width = s.of_teacher, teacher.model.config.get_text_config().hidden_size
    layer = _decoder(teacher, 1, s.batch, s.tokens, s.half, None, None)
    on_its_way = 0 if terms.recomputes else attention_slice(recipe, teacher, terms.rows, s)
    embeddings = s.batch * (s.length + s.tokens) * width * item_size(s.half)
    return embeddings + layer.forward + on_its_way + _exchange(teacher, s.half, s)


def _exchange(blueprint: Blueprint, dtype: torch.dtype, s: Setting) -> int:
    """What one exchange of tokens for heads holds beside a layer's own queries, keys and values: two copies of these.

    Key heads of which there are fewer than processes are repeated.
    """
    if s.sharers == 1:
        return 0
    config = blueprint.model.config.get_text_config()
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    vectors = config.num_attention_heads + 2 * max(config.num_key_value_heads, s.sharers)
    return 2 * s.batch * s.tokens * vectors * width * item_size(dtype)


def activations(recipe: Recipe, terms: Memory, student: Blueprint, s: Setting) -> Bytes:
    """What the student holds from its embeddings to its last hidden states, by phase.

    The layers are alike: of two footprints of one and two of them the difference is what each further one keeps.
    """
    common = (s.batch, s.tokens, s.student, s.autocast)
    one, two = _decoder(student, 1, *common, None), _decoder(student, 2, *common, None)
    layers, aligned, rows = len(language_model(student.model).layers), terms.layers, terms.rows
    compared, slices = one, 0
    if aligned:
        vat = recipe.vat
        options = (vat.loss, vat.reduction, vat.sink_filter, vat.heads, vat.learns_mixture, terms.recomputes)
        compared = _decoder(student, 1, *common, (options, rows, s.visual or s.length))
        at_a_time, number = _recomputed(rows, s) if terms.recomputes else (rows, 1)
        slices = number * attention_slice(recipe, student, at_a_time, s)
    times = max(1, len(recipe.teachers))  # that a layer is compared
    width = student.model.config.get_text_config().hidden_size
    item = item_size(s.student)
    embeds = s.batch * s.length * width * item + _adapter(student, s)

    parts = 1 if recipe.vat.heads == "mean" else s.sharers  # of what a slice of each head takes
    exchange = _exchange(student, s.half, s)

    def after(which: str, count: int) -> int:
        first, second, with_slice = (getattr(x, which) for x in (one, two, compared))
        return embeds + first + (count - 1) * (second - first) + aligned * times * (with_slice - first) // parts

    working = max(one.backward - one.kept, compared.backward - compared.kept + slices) + exchange
    incoming = 2 * s.batch * s.tokens * width * item  # gradients of the hidden states, before rows were picked
    rows_picked = s.labelled * width * item
    first = embeds + one.kept + (times * (compared.kept - one.kept) if aligned == layers else 0)
    return {
        "forward": after("cached", layers)
        + max(one.forward - one.cached, compared.forward - compared.cached + slices)
        + exchange,
        "cached": after("cached", layers) + rows_picked,
        "kept": after("kept", layers) + rows_picked,
        "begin": after("kept", layers) + working + incoming,
        "end": first + working,
        "embeddings": embeds + incoming,
        "images": images(student, s)["kept"],
    }


def _adapter(student: Blueprint, s: Setting) -> int:
    """What a trained adapter keeps for its backward pass, and the merged embeddings."""
    width = student.model.config.get_text_config().hidden_size
    return s.batch * s.visual * width * item_size(s.half) * 2


def vocabulary(
    recipe: Recipe, terms: Memory, student: Blueprint, teachers: Sequence[Blueprint], s: Setting
) -> Footprint:
    """Losses over the vocabulary.

    Distillation holds the logits of a chunk, both models', and the fp32 gradient of a trained head; plain cross-entropy holds
    whole logits. What is compared at visual tokens, too, has a gradient of the head of its own, and of several teachers have
    the labels that go through the head together (`products`).
    """
    head = head_of(student.model)
    if terms.logits == "none":
        return Footprint(0, 0, 0, 0)
    if terms.logits == "whole":
        return _whole_logits(head, s.labelled, s.student, s.student, s.autocast)
    elements, trained = head.weight.numel(), head.weight.requires_grad
    copied = elements * item_size(s.half) if s.half != s.student else 0
    times = products(recipe.weights_by_teacher)
    gradient = 4 * elements * (times + terms.visual_logits) if trained else 0
    most = max(s.labelled, s.batch * s.visual if terms.visual_logits else 0)  # of the two, one after the other
    hidden = s.labelled * head.in_features * (2 if s.half == torch.bfloat16 else 4)
    if recipe.teachers:  # of labels that are picked, both models' states are copied
        widths = (teacher.model.config.get_text_config().hidden_size for teacher in teachers)
        hidden += times * (hidden + s.labelled * max(widths, default=0) * item_size(s.half))
    vocabulary = head.out_features
    vocabulary = min([vocabulary, *(head_of(teacher.model).out_features for teacher in teachers)])
    buffers = 2 if teachers else 1
    width = torch.float32 if s.half == torch.float16 and s.device == "cpu" else s.half
    row = buffers * math.ceil(vocabulary / ROW_UNIT) * ROW_UNIT * item_size(width)
    rows = chunk_rows(most, row, on_cuda=s.device == "cuda", head_gradient=elements if trained else 0)
    kept = copied + gradient + hidden
    finished = gradient + (elements * item_size(s.half) if trained and s.half != torch.float32 else 0)
    return Footprint(kept + min(rows, most) * row, kept, kept, copied + hidden + finished)


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
        (loss, reduction, sink_filter, heads, trained_target, recomputes), rows, cols = alignment
        count = 0 if heads == "mean" else blueprint.model.config.get_text_config().num_attention_heads
        options = {"loss": loss, "reduction": reduction, "sink_filter": sink_filter}
        options["heads"] = "each" if count else "mean"

        def recorder() -> Any:
            size = batch, rows, cols
            return alignment_recorder(options, *size, count, recomputes=recomputes, trained_target=trained_target)

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
