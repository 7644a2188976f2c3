"""Several teachers: whether they read what the student reads, and what `cdistill.distill` makes of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

from cdistill.choices import KDConfig
from cdistill.errors import InputError
from cdistill.models.load import Model, resolve_folder
from cdistill.models.pair import check_pair, visual_difference
from cdistill.models.processor import image_processor_difference
from cdistill.train.recipes import Recipe
from cdistill.train.student import folders_of
from cdistill.train.teacher import Teacher
from cdistill.train.teacher_source import InMemory, Several, TeacherSource
from cdistill.train.terms import Settings
from cdistill.vat import VAT, VATConfig, attention_layers, check_heads, head_counts


def alignments(
    config: VATConfig, vat: VAT | VATConfig | None, student: Model, teachers: Mapping[str, Model]
) -> tuple[VAT, ...]:
    """Of the student and each teacher; one that has been made is of a single one."""
    check_heads(student, "student")
    for name, teacher in teachers.items():
        check_heads(teacher, name if name == "teacher" else f"teacher {name}")
    if isinstance(vat, VAT):
        if len(teachers) > 1:
            raise InputError("vat must be a VATConfig with several teachers: each has windows of its own")
        return (vat,)
    ours, make = attention_layers(student), partial(VAT, config)
    return tuple(make(ours, attention_layers(t), heads=head_counts(student, t)) for t in teachers.values())


def settings_of(kd: KDConfig, vats: tuple[VAT, ...], vat_weight: float, names: tuple[str, ...]) -> Settings:
    """What is configured of the terms, of one teacher without ``names``."""
    if names:
        return Settings(kd, vat_weight=vat_weight, vats=vats, teachers=names)
    return Settings(kd, vats[0] if vats else None, vat_weight)


def held(
    student: Model,
    teachers: Mapping[str, Model],
    shares_images: Sequence[Callable[[], bool]],
    *,
    apart: bool,
    several: bool,
) -> TeacherSource:
    """The source of one teacher or of several. Raises ValueError if a student with TAF has fetched the adapter of none."""
    of = zip(teachers.items(), shares_images, strict=True)
    sources = {name: InMemory(Teacher(one, shares_vision=shares(), reads_apart=apart)) for (name, one), shares in of}
    if not several:
        return next(iter(sources.values()))
    errors = []
    for name, teacher in teachers.items():
        try:
            check_pair(student, teacher)
            return Several(sources, name)
        except InputError as error:
            errors.append(error)
    raise errors[0]


def require_same_reading(recipe: Recipe, student: Model, teacher: Model, key: str) -> None:
    """Raise ValueError unless one of several teachers reads what the student reads; both may be without weights."""
    folder = resolve_folder(recipe.every_teacher[key], key, weights=False)
    try:
        why = visual_difference(student, teacher)
    except InputError as error:
        raise InputError(f"{key}: {error}") from None
    why = why or image_processor_difference({key: folder, **folders_of(recipe.student, recipe.lead)})
    if why is not None:
        raise InputError(f"teachers must read what the student reads, and {key} does not: {why}")
