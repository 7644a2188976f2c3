"""The alignment of a stage: layers and heads matched, where that needs distances by those of its first samples.

What is measured is written into the run's folder, so that a resumed run goes on with the same, on whatever machine.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from cdistill.data.dataset import BAD
from cdistill.errors import InputError
from cdistill.files import write_text
from cdistill.models.load import Model
from cdistill.runtime import checkpoints
from cdistill.runtime.collectives import on_first_process
from cdistill.train.build import Models
from cdistill.train.model import DistillationModel
from cdistill.train.recipes import VATOptions
from cdistill.train.resolve import Stage
from cdistill.train.run_folder import begun_stages
from cdistill.train.teacher_source import TeacherSource
from cdistill.train.terms.alignment import Alignment
from cdistill.vat import VAT, HeadCounts, HeadDistances, LayerDistances, LayerMatch, attention_layers, head_counts

MATCHES = "matches.json"  # in a run's folder: what has been measured, by stage


def vat_of(stage: Stage, student: Model, teacher: Model) -> VAT:
    """The alignment of a stage of which nothing need be measured."""
    layers = attention_layers(student), attention_layers(teacher)
    return VAT(stage.recipe.vat, *layers, heads=head_counts(student, teacher))


def make_vat(stage: Stage, models: Models, teacher: TeacherSource | None, batches: DataLoader) -> VAT:
    """The alignment of a stage; ``teacher`` is asked, for ``batches`` of its first samples, if something must be measured."""
    config, student = stage.recipe.vat, models.student
    layers, heads = (attention_layers(student), attention_layers(models.teacher)), head_counts(student, models.teacher)
    if config.matching != "adaptive" and not config.assigns_heads:
        return vat_of(stage, student, models.teacher)
    matches = on_first_process(lambda: _read(stage))
    if matches is None:
        probe = VAT(replace(config, matching="group", heads="mean"), *layers)
        model = DistillationModel(student, [Alignment(probe)], teacher=teacher)
        matches = _measured(config, layers, heads, model, batches)
        matches = on_first_process(lambda: _write(stage, matches))
    return VAT(config, *layers, heads=heads, matches=matches)


def _measured(
    config: VATOptions,
    layers: tuple[tuple[int, ...], tuple[int, ...]],
    heads: HeadCounts,
    model: DistillationModel,
    batches: DataLoader,
) -> tuple[LayerMatch, ...]:
    """The matches by the distances between layers, where the matching is adaptive, then by those between heads."""
    distances = None
    if config.matching == "adaptive":
        of_layers = VAT.measure(config, *layers)
        _measure(of_layers, config, model, batches)
        distances = of_layers.matrix()
    if not config.assigns_heads:
        return VAT(config, *layers, distances=distances, heads=heads).matches
    of_heads = VAT.measure_heads(config, *layers, distances=distances)
    _measure(of_heads, config, model, batches)
    return of_heads.assigned()


@torch.no_grad()
def _measure(
    distances: LayerDistances | HeadDistances, config: VATOptions, model: DistillationModel, batches: DataLoader
) -> None:
    """Add ``measure_samples`` samples to distances between layers or heads."""
    wanted = math.ceil(config.measure_samples / (batches.batch_size or 1))
    for _, batch in zip(range(wanted), batches, strict=False):
        batch.pop(BAD, None)
        inputs = {name: value.to(model.student.device) for name, value in batch.items()}
        step = model.step(inputs.pop("labels"), inputs)
        view, (term,) = step.teacher_view, model.terms
        assert isinstance(term, Alignment)
        student = distances.student(step.regions, step.key_mask)
        teacher = distances.teacher(view.regions, view.key_mask)
        shared, inputs = model.inputs(step)
        assert model.source is not None
        model.source.ask(step, teacher, shared, inputs)
        model.student_hidden(inputs, shared, student)
        distances.update(student, teacher, term.resampling(step))


def _read(stage: Stage) -> tuple[LayerMatch, ...] | None:
    """What a begun stage has measured. Raises ValueError for a file that does not say."""
    path = Path(stage.recipe.output) / MATCHES
    if not path.is_file() or begun_stages(stage.recipe, path.parent) <= stage.index:
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8")).get(stage.label)
        return None if found is None else tuple(map(_match, found))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"output: {path} does not hold matched layers ({error!r:.80}): put it back, or delete it"
        ) from None


def _match(entry: dict[str, Any]) -> LayerMatch:
    heads = entry["heads"]
    groups = None if heads is None else tuple(tuple(tuple(map(int, g)) for g in of_layer) for of_layer in heads)
    return LayerMatch(int(entry["student"]), tuple(map(int, entry["teachers"])), groups)


def _write(stage: Stage, matches: Sequence[LayerMatch]) -> Sequence[LayerMatch]:
    """Add a stage to the file; returns the matches."""
    path = Path(stage.recipe.output) / MATCHES
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    text = json.dumps(known | {stage.label: [match._asdict() for match in matches]}) + "\n"
    with checkpoints.saving(path, len(text)):
        write_text(path, text)
    return matches
