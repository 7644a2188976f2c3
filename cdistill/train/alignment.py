"""The alignment of a stage: layers matched, for adaptive matching by the distances measured on its first samples."""

import math
from dataclasses import replace
from typing import Any

import torch
from torch.utils.data import DataLoader

from cdistill.data.dataset import BAD
from cdistill.models.load import Model
from cdistill.train.build import Models
from cdistill.train.model import DistillationModel
from cdistill.train.recipes import VATOptions
from cdistill.train.resolve import Stage
from cdistill.train.teacher_source import TeacherSource
from cdistill.train.terms.alignment import Alignment
from cdistill.vat import VAT, LayerDistances, attention_layers


def vat_of(stage: Stage, models: Models) -> VAT | None:
    """The alignment of a stage whose layers need not be measured, if it has one."""
    if not stage.aligns:
        return None
    return VAT(stage.recipe.vat, attention_layers(models.student), attention_layers(models.teacher))


def make_vat(
    config: VATOptions,
    layers: tuple[tuple[int, ...], tuple[int, ...]],
    student: Model,
    teacher: TeacherSource | None,
    batches: DataLoader,
) -> VAT:
    """The alignment of attention ``layers`` (student's, teacher's); ``teacher`` is asked for adaptive matching."""
    if config.matching != "adaptive":
        return VAT(config, *layers)
    measured = VAT.measure(config, *layers)
    wanted = math.ceil(config.measure_samples / (batches.batch_size or 1))
    probe = VAT(replace(config, matching="group"), *layers)
    term = Alignment(probe)
    model = DistillationModel(student, [term], teacher=teacher)
    for _, batch in zip(range(wanted), batches, strict=False):
        batch.pop(BAD, None)
        _measure(measured, model, term, {name: value.to(student.device) for name, value in batch.items()})
    return VAT(config, *layers, distances=measured.matrix())


@torch.no_grad()
def _measure(distances: LayerDistances, model: DistillationModel, term: Alignment, batch: dict[str, Any]) -> None:
    """Add a batch to the distances between layers."""
    step = model.step(batch.pop("labels"), batch)
    view = step.teacher_view
    student = distances.student(step.regions, step.key_mask)
    teacher = distances.teacher(view.regions, view.key_mask)
    shared, inputs = model.inputs(step)
    assert model.source is not None
    model.source.ask(step, teacher, shared, inputs)
    model.student_hidden(inputs, shared, student)
    distances.update(student, teacher, term.resampling(step))
