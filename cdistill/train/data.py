"""Datasets and collators of the stages: of files, or of the built-in task."""

import json
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset, Subset

from cdistill.builtin.dataset import (
    NUM_VISUAL_TOKENS,
    BuiltinDataset,
    Collator,
    ConversationDataset,
    PatchDataset,
    build_tokenizer,
    collate_patches,
)
from cdistill.builtin.grounding import GroundedCollator
from cdistill.data.batches import PackingCollator, PaddingCollator
from cdistill.data.conversations import Encoded, Encoder
from cdistill.data.dataset import BadSampleCollator, SampleDataset
from cdistill.data.grouping import length_grouped, modality_grouped
from cdistill.data.mix import HeldOut, Order, kinds_of, open_source
from cdistill.data.pairs import PairCollator, PairEncoder
from cdistill.data.samples import IMAGE_TOKEN, Source
from cdistill.data.span_pairs import SpanEncoder
from cdistill.data.tokens import Vocabularies
from cdistill.errors import InputError
from cdistill.models.load import Model
from cdistill.train.build import Models
from cdistill.train.kinds import WeighingCollator, require_known_kinds, weights_of_kinds
from cdistill.train.recipes import DataConfig, Recipe
from cdistill.train.resampling import ResamplingEncoder, pair_encoder
from cdistill.train.resolve import Run, Stage, resolve
from cdistill.vat import check_packable, packed_position_ids

CHARACTERS_PER_TOKEN, USUAL_VISUAL_TOKENS = 4, 576  # for lengths that are only compared


def stage_dataset(recipe: Recipe, index: int, models: Models) -> tuple[Dataset, Any]:
    """Dataset and collator of the stage at a place in the recipe's list. Raises ValueError as `open_stage`."""
    return open_stage(resolve(recipe, world=1).stages[index], models)


def open_stage(stage: Stage, models: Models) -> tuple[Dataset, Any]:
    """Dataset and collator of a stage.

    Raises:
        ValueError: a data set cannot be opened, a template does not fit the tokenizer, the student has no processor or, for
            the built-in task, its tokenizer not all the words.
    """
    seed, group_by = stage.data_seed, stage.recipe.group_by
    if stage.objective.trains_on_patches:
        try:
            patches = PatchDataset(size=stage.samples, seed=seed, visual_tokens=_visual_tokens(models))
        except ValueError as error:
            raise InputError(f"stage.{stage.name}.objective: {error}") from None
        return patches, collate_patches
    make = _builtin_dataset if stage.config.data.path is None else _file_dataset
    try:
        data, collate, sizes = make(stage, models)
    except ValueError as error:
        raise InputError(f"stage.{stage.name}.data: {error}") from None
    collate = _weighing(stage, models, collate)
    try:
        if group_by is None:
            return data, collate
        lengths, images = sizes()
    except ValueError as error:
        raise InputError(f"stage.{stage.name}.data: {error}") from None
    if group_by == "length":
        return Subset(data, length_grouped(lengths, stage.config.global_batch_size, seed)), collate
    return Subset(data, modality_grouped(lengths, images, stage.config.global_batch_size, seed)), collate


def open_validation(stage: Stage, models: Models) -> tuple[Dataset, Any]:
    """Dataset and collator of what a stage with ``validation`` holds out of its data. Raises ValueError as `open_stage`."""
    assert stage.config.validation is not None
    make = _builtin_dataset if stage.config.data.path is None else _file_dataset
    data, collate, _ = make(stage, models, held_out=stage.config.validation.samples)
    return data, _weighing(stage, models, collate)


def stage_kinds(stage: Stage, models: Models) -> tuple[str, ...]:
    """Kinds of a stage's samples, as the weights of several teachers name them; none where nothing distils."""
    options = stage.config.data
    if not stage.objective.distils:
        return ()
    return options.builtin.kinds if options.path is None else kinds_of(_open(models, options, stage.samples))


def check_kinds(run: Run, models: Models) -> None:
    """Raise ValueError for weights of several teachers that name a kind which no sample has."""
    teachers = run.recipe.weights_by_teacher
    require_known_kinds(teachers, [kind for stage in run.stages for kind in stage_kinds(stage, models)])


def _weighing(stage: Stage, models: Models, collate: Any) -> Any:
    """The collator of a stage, with what its samples learn of each of several teachers."""
    teachers = stage.recipe.weights_by_teacher
    if not _needs_kinds(stage):
        return collate
    table = weights_of_kinds(teachers, stage_kinds(stage, models), f"stage.{stage.name}.data")
    return WeighingCollator(collate, table)


def _needs_kinds(stage: Stage) -> bool:
    return bool(stage.recipe.teachers) and stage.objective.distils


def encoder_of(dataset: Dataset) -> Encoder | None:
    """What makes the student's tokens of the samples of a stage; None where the built-in task does that itself."""
    encoder = getattr(dataset.dataset if isinstance(dataset, Subset) else dataset, "encoder", None)
    return encoder.student if isinstance(encoder, PairEncoder) else encoder


def vocabularies_of(dataset: Dataset) -> Vocabularies | None:
    """Which tokens of student and teacher say the same, where the samples of a stage are encoded for different tokenizers."""
    encoder = getattr(dataset.dataset if isinstance(dataset, Subset) else dataset, "encoder", None)
    return encoder.vocabularies() if isinstance(encoder, SpanEncoder) else None


def _builtin_dataset(stage: Stage, models: Models, held_out: int = 0) -> Any:
    """Dataset, collator, and what tells lengths and numbers of images of all samples; or of so many that are ``held_out``."""
    size, options = held_out or stage.samples, stage.config.data
    tokenizer: Any = models.tokenizer
    vocabulary = tokenizer.get_vocab()
    unknown = [word for word in build_tokenizer().get_vocab() if word not in vocabulary and word != IMAGE_TOKEN]
    if unknown and tokenizer.chat_template is None:
        raise InputError(f"path must be given, or the tokenizer be the built-in one: there is no token {unknown[0]!r}")
    tokenizer = build_tokenizer() if unknown else tokenizer
    source = BuiltinDataset(
        options.builtin,
        size=size,
        seed=stage.data_seed,
        tokenizer=tokenizer,
        held_out=held_out > 0,
        grounding=_grounds(stage),
        visual_tokens=_visual_tokens(models),
        kinds=_needs_kinds(stage),
    )
    data: Dataset = source
    collate: Any = Collator(tokenizer.pad_token_id)
    if unknown or models.reader is not None or models.reads_apart:
        if _grounds(stage):
            _check_places(stage, models)
        encoder, collate = _encoding(stage, models)
        data = ConversationDataset(source, encoder)
        if _grounds(stage):
            collate = GroundedCollator(collate)
            data[0]  # says what a template or a tokenizer does to words
    return (
        data,
        collate,
        lambda: tuple(zip(*((source.length(i), int(source.has_image(i))) for i in range(size)), strict=True)),
    )


def _grounds(stage: Stage) -> bool:
    """Whether a term compares attention with the places of words."""
    return "grounding" in stage.objective.inputs


def _check_places(stage: Stage, models: Models) -> None:
    """Raise ValueError where the places of words are not known, in a sample that an encoder makes tokens of."""
    if models.reads_apart and stage.objective.distils:
        raise InputError(
            f"objective {stage.config.objective} must not distil here: places of words are the student's, and each sample is "
            "encoded for student and teacher"
        )
    if models.reader is not None and stage.config.data.modality != "text":
        kind = models.student.config.model_type
        raise InputError(
            f"modality must be text with objective {stage.config.objective}: the visual tokens of {kind} are not those of one "
            "grid, of which alone the places are known"
        )


def _visual_tokens(models: Models, unknown: int = NUM_VISUAL_TOKENS) -> int:
    """What an image becomes for the student, where its configuration says it."""
    return int(getattr(models.student.config, "image_seq_length", unknown))


def _file_dataset(stage: Stage, models: Models, held_out: int = 0) -> Any:
    """As `_builtin_dataset`, of the files that a recipe names."""
    size, seed, options = held_out or stage.samples, stage.data_seed, stage.config.data
    source = _open(models, options, stage.samples)
    validation = stage.config.validation
    try:
        order: Order | HeldOut = Order(source, seed, held_out=0 if validation is None else validation.samples)
    except ValueError as error:
        raise InputError(f"{error}{'' if validation is None else '; lower validation.samples'}") from None
    if held_out:
        order = cast(Order, order).held_out
    encoder, collate = _encoding(stage, models)
    about = _resized_to(models)
    kinds = _needs_kinds(stage)
    data = SampleDataset(source, order, encoder, size=size, seed=seed, about=about, exif=options.exif, kinds=kinds)
    if stage.recipe.packing:
        for model in (models.student, models.teacher):
            if model is not None:
                check_packable(model)
        packed = PackingCollator(collate.pad_token_id, options.max_length)
        collate = PackedCollator(packed, models.student)
    visual = _visual_tokens(models, USUAL_VISUAL_TOKENS)

    def sizes() -> tuple[np.ndarray, np.ndarray]:
        known = source.sizes()
        if known is None:
            raise InputError(f"group_by must be null for {source.name}: lengths of a stream are not known")
        indices = [order[number] for number in range(size)]
        images = known.images[indices].astype(np.int64)
        return known.characters[indices] // CHARACTERS_PER_TOKEN + visual * images, images

    return data, BadSampleCollator(collate), sizes


def unread(stage: Stage, models: Models) -> list[str]:
    """One line for each data set of a stage whose records say what no sample is made of."""
    if stage.objective.trains_on_patches or stage.config.data.path is None:
        return []
    source = _open(models, stage.config.data, stage.samples)
    lines = []
    for part in [part.source for part in getattr(source, "parts", [])] or [source]:
        found = part.unread()
        some = f", of the first {found.records:,} records" if found.records < len(part) else ""
        lines += [f"{part.name}: not read{some}: {found}"] if found.keys else []
    return lines


class PackedCollator:
    """Packs, and gives models with multimodal rotary embeddings the positions they need; ``model`` is asked for these alone."""

    def __init__(self, collate: PackingCollator, model: Model) -> None:
        self.collate, self.model = collate, model

    def __call__(self, samples: Sequence[Encoded]) -> dict[str, Tensor]:
        batch = self.collate(samples)
        return batch | {"position_ids": packed_position_ids(self.model, batch)}


def _open(models: Models, data: DataConfig, size: int) -> Source:
    """The data set that a stage of ``size`` samples names, opened once in a run. Raises ValueError if it cannot be."""
    options: dict[str, Any] = {
        "images": data.images,
        "columns": data.columns,
        "config": data.config,
        "split": data.split,
        "allow_urls": data.allow_urls,
    }
    assert data.path is not None
    if data.streaming:
        options |= {"streaming": True, "size": size}
    key = json.dumps({"path": data.path, **options}, sort_keys=True)
    if key not in models.sources:
        models.sources[key] = open_source(data.path, **options)
    return models.sources[key]


def _encoding(stage: Stage, models: Models) -> tuple[Any, Any]:
    """What makes tokens of a stage's samples, and batches of them: for student and teacher where each needs its own.

    Raises ValueError if student and template do not go together.
    """
    options = stage.config.data
    template: dict[str, Any] = {}
    if options.path is not None:
        template = {"template": options.template, "max_length": options.max_length}
    apart = models.reads_apart and stage.objective.distils
    spans = apart and models.spans
    encoder = Encoder(models.reader or models.processor, **template, places=spans or _grounds(stage))
    collate = PaddingCollator(encoder.pad_token_id)
    if not apart:
        return encoder, collate
    theirs = Encoder(models.teacher_reader, **template, places=spans)
    assert models.teacher is not None
    vat, configs = stage.recipe.vat if stage.aligns else None, (models.student.config, models.teacher.config)
    pair: PairEncoder
    if not spans:
        pair = pair_encoder(encoder, theirs, configs=configs, vat=vat)
    elif vat is None or vat.visual == "equal":
        pair = SpanEncoder(encoder, theirs)
    else:
        pair = SpanEncoder(
            encoder, theirs, ResamplingEncoder(encoder, theirs, configs=configs, rows=vat.rows, spans=True)
        )
    return pair, PairCollator(collate, PaddingCollator(theirs.pad_token_id))


def _resized_to(models: Models) -> int | None:
    """The side in pixels that all images are resized to, where it is one for all."""
    processor: Any = models.processor
    if models.reader is not None or models.reads_apart or not hasattr(processor, "image_processor"):
        return None
    size = dict(processor.image_processor.size)
    return max(size.get(name) or 0 for name in ("height", "width", "shortest_edge")) or None
