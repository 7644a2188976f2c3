"""What goes together with several teachers."""

import re
from collections.abc import Iterator
from typing import Any

from cdistill.train.objectives import OBJECTIVES
from cdistill.train.recipes.models import StudentConfig, TeacherConfig
from cdistill.train.terms import OF_SEVERAL

NAME = re.compile(r"[A-Za-z0-9_]{1,64}")  # a part of keys that are logged


class Teachers:
    """What a recipe's keys ``teacher`` and ``teachers`` say."""

    teacher: str | None
    teachers: dict[str, TeacherConfig]
    student: StudentConfig

    @property
    def weights_by_teacher(self) -> dict[str, dict[str, float]]:
        """Weights by kind of sample, by the names of several teachers; empty with one."""
        return {name: teacher.weights for name, teacher in self.teachers.items()}

    @property
    def every_teacher(self) -> dict[str, str]:
        """References of all teachers by the keys that name them."""
        if self.teachers:
            return {f"teachers.{name}.model": teacher.model for name, teacher in self.teachers.items()}
        return {} if self.teacher is None else {"teacher": self.teacher}

    @property
    def lead(self) -> str | None:
        """The teacher whose tokenizer, encoder and adapter the student takes: of several that of `lead_name`."""
        return self.teacher if self.lead_name is None else self.teachers[self.lead_name].model

    @property
    def lead_key(self) -> str:
        """The key that names `lead`."""
        return "teacher" if self.lead_name is None else f"teachers.{self.lead_name}.model"

    @property
    def lead_name(self) -> str | None:
        """The first of several teachers, or the one whose adapter is fetched."""
        wanted = self.student.taf_teacher
        return wanted if wanted in self.teachers else next(iter(self.teachers), None)


def teachers_problems(recipe: Any) -> Iterator[str]:
    """What is wrong with ``teachers``, and what does not go together with them, a line for each."""
    student = recipe.student
    if not recipe.teachers:
        if student.taf_teacher is not None:
            yield "student.taf_teacher must be null without teachers"
        return
    names = ", ".join(recipe.teachers)
    if recipe.teacher is not None:
        yield "teacher must be null with teachers: make it one of them"
    for name in recipe.teachers:
        if not NAME.fullmatch(name):
            yield f"teachers.{name!r} must be of letters, digits and _, 64 at most: losses are logged by it"
    if student.taf and student.taf_teacher not in recipe.teachers:
        yield f"student.taf_teacher must say whose adapter is fetched ({names}), got {student.taf_teacher!r}"
    if not student.taf and student.taf_teacher is not None:
        yield "student.taf_teacher must be null without student.taf"
    for name in recipe.stages:
        for term in OBJECTIVES[recipe.stage[name].objective].kinds:
            if term.teacher and term.name not in OF_SEVERAL:
                yield f"stage.{name}.objective must distil by kd and vat alone with teachers: {term.name} knows a single one"
    yield from _alone(recipe)


def _alone(recipe: Any) -> Iterator[str]:
    """Keys that know a single teacher."""
    vat = recipe.vat
    aligned = any(recipe.aligns(recipe.stage[name].objective) for name in recipe.stages)
    for key, found, wrong, needed in (
        ("packing", recipe.packing, recipe.packing, "false"),
        ("sequence_parallel", recipe.sequence_parallel, recipe.sequence_parallel > 1, "1"),
        ("teacher_memory.cache", recipe.teacher_memory.cache, recipe.teacher_memory.cache is not None, "null"),
        ("kd.alignment", recipe.kd.alignment, recipe.kd.alignment != "token", "token"),
        ("vat.visual", vat.visual, aligned and vat.visual != "equal", "equal"),
        ("vat.matching", vat.matching, aligned and vat.matching == "adaptive", "group or simple"),
        ("vat.head_matching", vat.head_matching, aligned and (vat.assigns_heads or vat.learns_mixture), "group"),
        ("vat.engine", vat.engine, aligned and vat.engine != "sdpa", "sdpa"),
    ):
        if wrong:
            yield f"{key} must be {needed} with teachers, got {str(found).lower() if found is True else found!r}"
