"""Where the teacher's signal comes from: one class for each way in which a teacher is there, or has been."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch

from cdistill.errors import InputError
from cdistill.models.llava import SharedVision
from cdistill.models.load import DTYPES, Model
from cdistill.models.logits import after_head
from cdistill.models.pair import shares_encoder
from cdistill.runtime.zero import is_partitioned
from cdistill.train.kinds import WEIGHTS
from cdistill.train.recipes import TeacherMemory
from cdistill.train.step import Signal, Step
from cdistill.train.teacher import Teacher, partitioned
from cdistill.train.terms import Term
from cdistill.vat import Recorder


class TeacherSource:
    """What `DistillationModel` asks for the teacher's signal.

    Attributes:
        title: what messages call it.
        gives: of `cdistill.train.terms.base.SIGNALS`, those it has.
        inputs: keys of a batch that it reads, and that are no input of a model.
        teacher: the module that is run, None where none is here.
    """

    title: ClassVar[str] = "the teacher"
    gives: ClassVar[tuple[str, ...]] = ("predictions", "hidden", "visual", "attention", "relations")
    inputs: ClassVar[tuple[str, ...]] = ()
    teacher: Teacher | None = None

    @property
    def teachers(self) -> tuple[Teacher, ...]:
        """All modules that are run."""
        return () if self.teacher is None else (self.teacher,)

    @property
    def shares_vision(self) -> bool:
        """Whether the teacher sees images by the student's vision encoder."""
        return self.teacher is None or self.teacher.shares_vision

    @property
    def reads_apart(self) -> bool:
        """Whether the teacher has an encoding of the samples of its own."""
        return self.teacher is not None and self.teacher.reads_apart

    @property
    def is_partitioned(self) -> bool:
        """Whether all processes have to run it together."""
        return self.teacher is not None and is_partitioned(self.teacher)

    @classmethod
    def check(cls, terms: Iterable[Term | type[Term]]) -> None:
        """Raise ValueError for a term that needs what it does not give."""
        for term in terms:
            for what in term.teacher:
                if what not in cls.gives:
                    lacks = f"which {cls.title} does not have: leave one of them out"
                    raise InputError(f"term {term.name!r} needs the teacher's {what!r}, {lacks}")

    def ask(
        self, step: Step, recorder: Recorder | None, shared: SharedVision | None, inputs: Mapping[str, Any]
    ) -> Signal:
        """The signal for a batch, whose attention the recorder sees; ``inputs`` are the models'."""
        raise NotImplementedError

    def move(self, device: torch.device | str) -> None:
        """Bring it to a device, if it can be moved."""


class InMemory(TeacherSource):
    """A whole teacher on every process."""

    def __init__(self, teacher: Teacher) -> None:
        self.teacher: Teacher = teacher
        self._run: Any = teacher

    def ask(
        self, step: Step, recorder: Recorder | None, shared: SharedVision | None, inputs: Mapping[str, Any]
    ) -> Signal:
        """By a pass of the teacher, without gradient; over its own encoding of the samples, where it has one."""
        if step.theirs is not None:
            if step.spans is None:
                step.require_same_labels()
            step, shared = step.theirs, None
            inputs = step.inputs
        places = torch.cat((step.places, step.visual_places.places)) if step.needs_visual else step.places
        hidden = self._run(places, recorder, shared, step.shards, **inputs)
        attention: Any = recorder
        hidden, visual = hidden.tensor_split([len(step.places)])
        return Signal(hidden, visual if step.needs_visual else None, self.teacher.head, attention=attention)

    def move(self, device: torch.device | str) -> None:
        """Parameters and buffers."""
        self.teacher.to(device)


class Partitioned(InMemory):
    """A teacher under a ZeRO-3 engine of its own; its parts stay where they are."""

    def __init__(self, engine: Any) -> None:
        super().__init__(engine.module)
        self._run = engine

    def move(self, device: torch.device | str) -> None:
        """Nothing."""


class Quantised(InMemory):
    """A teacher with layers of 8 or 4 bits, which stay on the device they were quantised on."""

    def move(self, device: torch.device | str) -> None:
        """Nothing."""


class Several(TeacherSource):
    """Several teachers, of which each sample learns as much as its kind says (`cdistill.train.kinds`).

    One that no sample of a batch learns of is not run, unless all processes have to run it together. Recorders are a list, one
    for each teacher.

    Args:
        sources: by name, in the order of the weights.
        lead: name of the one that the student takes parts of, its adapter with TAF.
    """

    title = "several teachers (teachers)"
    gives = ("predictions", "attention")
    inputs = (WEIGHTS,)

    def __init__(self, sources: Mapping[str, InMemory], lead: str) -> None:
        self.sources, self.lead, self.teacher = dict(sources), lead, sources[lead].teacher

    @property
    def teachers(self) -> tuple[Teacher, ...]:
        """All of them, in order."""
        return tuple(source.teacher for source in self.sources.values())

    @property
    def shares_vision(self) -> bool:
        """Whether any of them does."""
        return any(source.shares_vision for source in self.sources.values())

    @property
    def is_partitioned(self) -> bool:
        """Whether any of them is."""
        return any(source.is_partitioned for source in self.sources.values())

    def ask(self, step: Step, recorder: Any, shared: SharedVision | None, inputs: Mapping[str, Any]) -> Signal:
        """Of each teacher its own signal; one device synchronisation."""
        weights = step.teacher_weights
        if weights.shape[1] != len(self.sources):
            raise InputError(f"{WEIGHTS} must be of {len(self.sources)} teachers, got {weights.shape[1]}")
        wanted = (weights > 0).any(0).tolist()
        parts: list[Signal | None] = []
        for i, (name, source) in enumerate(self.sources.items()):
            if not wanted[i] and not source.is_partitioned:
                parts.append(None)
                continue
            seen = shared
            if shared is not None and name != self.lead:  # whose adapter a student may have fetched
                seen = shared._replace(teacher_tokens=None)
            looks: tuple[SharedVision | None, Mapping[str, Any]] = seen, inputs
            if not source.shares_vision:
                looks = None, step.inputs
            signal = source.ask(step, None if recorder is None else recorder[i], *looks)
            parts.append(replace(signal, after_head=after_head(source.teacher.model, "teacher")))
        return Signal(parts=tuple(parts))

    def move(self, device: torch.device | str) -> None:
        """Each as it can be."""
        for source in self.sources.values():
            source.move(device)


class Cached(TeacherSource):
    """What a teacher gave earlier, in the batch.

    ``teacher_values`` and ``teacher_indices`` (N, K) are its largest log-probabilities, of ``vocabulary`` tokens, and
    ``teacher_targets`` is (L, B, [Hq,] R, V).
    """

    title = "a cache (teacher_memory.cache)"
    gives = ("predictions", "attention")
    inputs = ("teacher_values", "teacher_indices", "teacher_targets")

    def __init__(self, vocabulary: int | None = None) -> None:
        self.vocabulary = vocabulary

    def ask(
        self, step: Step, recorder: Recorder | None, shared: SharedVision | None, inputs: Mapping[str, Any]
    ) -> Signal:
        """Out of the batch."""
        values, indices, targets = (step.batch.get(name) for name in self.inputs)
        topk = None if values is None or indices is None else (values, indices)
        return Signal(topk=topk, vocabulary=self.vocabulary, attention=targets)


def source_of(teacher: Model | TeacherSource, student: Model) -> TeacherSource:
    """The source around a plain model."""
    if isinstance(teacher, TeacherSource):
        return teacher
    return InMemory(Teacher(teacher, shares_vision=shares_encoder(student, teacher)))


def place_teacher(
    memory: TeacherMemory,
    model: Model,
    student: Model,
    precision: str,
    device: torch.device,
    *,
    shares_vision: bool,
    reads_apart: bool = False,
    fetched: bool = True,
) -> InMemory:
    """The source of a recipe's teacher: in memory, partitioned or quantised, without the parts that the student has, too.

    Of several teachers a student with TAF has the adapter of the one that is ``fetched``.
    """
    teacher = Teacher(model, shares_vision=shares_vision, reads_apart=reads_apart)
    teacher.drop_shared_parts(student, adapter=fetched)
    if memory.zero == 3:
        whole = teacher.to(dtype=DTYPES[precision])
        return Partitioned(partitioned(whole, precision=precision, offload=memory.offload))
    if memory.quantization:
        return Quantised(teacher.to(device))
    return InMemory(teacher.to(device, DTYPES[precision]))
