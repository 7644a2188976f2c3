"""Pairs of tiny models with questions for `cdistill analyze`, and transformers' eager attention in float64 as their oracle."""

import copy
from functools import cache

import numpy as np
import torch
from family_models import build
from family_table import EOS, FAMILIES, ID
from PIL import Image
from test_eval_inference import TEMPLATE
from vat_oracle import KeepFloat64

from cdistill.attention.models import Models
from cdistill.eval.contract import Question
from cdistill.eval.loading import Loaded


def loaded(model, processor, name):
    return Loaded(model.eval(), processor, name, "0", "fp32", 0, True)


def processor_of(family):
    processor = FAMILIES[family].processor()
    processor.chat_template = TEMPLATE.replace("MARK", FAMILIES[family].placeholder)
    return processor


@cache
def family_pair(family, heads=4):
    """A teacher of 3 layers and a student of 2, with 4 heads each or another number for the student."""
    processor = processor_of(family)
    teacher = build(family, 1, 3, 64, 4, 2)
    student = build(family, 0, 2, 16 * heads, heads, heads // 2)
    for model in (teacher, student):
        model.generation_config.eos_token_id = EOS
    return Models(loaded(teacher, processor, "teacher"), [loaded(student, processor, "student")])


def questions(family, kind="log_likelihood", seed=1):
    """Two questions about each of the family's images, and the images."""
    rng = np.random.default_rng(seed)

    def words(count):
        return " ".join(f"w{i}" for i in rng.integers(2, 30, count))

    result = []
    for i, size in enumerate(FAMILIES[family].images):
        image = Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8))
        asked = [Question(f"{i} {n}", words(n), (f"{i}",), kind, words(1 + n // 3), 2) for n in (6, 3)]
        result.append((asked, [image]))
    return result


def readings(models, family):
    """What the pair reads: a longer question about one image, a shorter one about another."""
    every = [reading for asked, images in questions(family) for reading in models.read(asked, images)]
    return [every[0], every[-1]]


def inputs_alone(inference, reading, dtype):
    """One reading without padding."""
    inputs = inference.inputs([reading], [reading.tokens])
    return {name: x.to(dtype) if x.is_floating_point() else x for name, x in inputs.items()}


@cache
def in_float64(model, implementation):
    """A copy of a model that attends by this implementation of transformers."""
    made = copy.deepcopy(model).double()
    made.set_attn_implementation(implementation)
    return made


def float64_attention(inference, reading):
    """Attention matrices (H, T, T) of a model's attention layers, and its logits (T, V)."""
    inputs = inputs_alone(inference, reading, torch.float64)
    with torch.no_grad(), KeepFloat64():
        made = in_float64(inference.model, "eager")(**inputs, use_cache=False, output_attentions=True)
    assert all(matrix.dtype == torch.float64 for matrix in made.attentions)
    return [matrix[0] for matrix in made.attentions], made.logits[0]


def visual_places(family, reading):
    """Where the visual tokens are, by their names."""
    names = {"<image>", "<IMG_CONTEXT>", "<|image_pad|>"}
    ids = {ID[name] for name in names}
    return [i for i, token in enumerate(reading.tokens) if token in ids]
