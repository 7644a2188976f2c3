"""Student and teacher as one module whose forward pass is the losses of a stage (SPEC section 4)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from cdistill.data.pairs import TEACHER_IDS, split_sides
from cdistill.errors import InputError
from cdistill.families import family_of
from cdistill.models.llava import Llava, SharedVision, share_vision, student_embeddings
from cdistill.models.load import Model
from cdistill.models.parts import has_vision
from cdistill.train.blank import idle_adapter, needs_blank
from cdistill.train.left_out import refuse_left_out
from cdistill.train.refused_batches import refuse_misread
from cdistill.train.sharded import NO_COMMON_VISION, SHARDED_TERMS, check_shardable
from cdistill.train.step import Step
from cdistill.train.teacher import Teacher, hidden_states
from cdistill.train.teacher_source import TeacherSource, source_of
from cdistill.train.terms import Term, check_terms
from cdistill.vat import Recorder, SequenceShards, install, visual_token_ids

# Keys of a batch: which samples count, (B,) bool, and which tokens are of the student's own, (B, T) bool.
OF_SAMPLES = ("counted", "sampled")


class DistillationModel(nn.Module):
    """The losses of one stage, as sums: asks for the teacher's signal, runs the student, then every term.

    Two LLaVAs look at the images once, through the vision encoder they share (`cdistill.models.share_vision`); models of
    other families each look for themselves. A teacher with an encoding of its own (`cdistill.data.pairs`) reads that of the
    batch, ``teacher_input_ids`` and so on.

    Args:
        student: a multimodal or a causal language model; the only thing registered as a submodule (beside what terms have of
            their own), so that optimizer and checkpoints never see the teacher.
        terms: of the loss.
        teacher: what terms need of a teacher comes from here; a model is put into eval mode.
        visual_tokens: ids of both models' visual tokens, by default those that the student's configuration names.
        pads_right: batches are padded on the right, so causality alone hides the padding from every real token and neither
            model is given a padding mask.
        shards: the processes that have a part of every sequence, and are given the same batches; losses are then this one's
            share, so that their sum over processes is what a single one computes.

    Raises:
        ValueError: terms that do not go together, or that need what the teacher does not give; models that a term is wrong
            for; a class without `model`; a student that asks for its router loss, or that names no visual tokens where a term
            must know them.
    """

    def __init__(
        self,
        student: Model,
        terms: Iterable[Term],
        *,
        teacher: Model | TeacherSource | None = None,
        visual_tokens: Iterable[int] | None = None,
        pads_right: bool = True,
        shards: SequenceShards | None = None,
    ) -> None:
        super().__init__()
        self.student: Model = student
        self.terms, self.pads_right, self.shards = tuple(terms), pads_right, shards
        check_terms(self.terms)
        distils = any(term.teacher for term in self.terms)
        self.source = source_of(teacher, student) if distils and teacher is not None else None
        self._attention_term = next((term for term in self.terms if term.attention), None)
        self._needs_visual = any("visual" in term.teacher for term in self.terms)
        self._reads_tokens = any(term.labels == "tokens" for term in self.terms)
        if distils and self.source is None:
            needing = ", ".join(term.name for term in self.terms if term.teacher)
            raise InputError(f"terms {needing} need a teacher: give one, or leave them out")
        if self.source is not None:
            self.source.check(self.terms)
        if self._reads_tokens:
            _require_body(student, "student")
            for teacher in self.teachers:
                _require_body(teacher.model, "teacher")
        self._check_models()
        looks = self._needs_visual or any(term.visual for term in self.terms)
        self._visual_ids = tuple(visual_token_ids(student) if visual_tokens is None else visual_tokens) if looks else ()
        self._teacher_visual_ids = self._visual_ids
        if self.reads_apart and self.teacher is not None:
            check_terms(self.terms, reads_apart=True)
            if looks and visual_tokens is None:
                self._teacher_visual_ids = visual_token_ids(self.teacher.model)
        self._image_ids = [_image_ids(model) for model in (student, *(of.model for of in self.teachers[:1]))]
        for term in self.terms:
            for name, module in term.modules(student, None if self.teacher is None else self.teacher.model).items():
                if hasattr(self, name):
                    raise InputError(f"term {term.name!r}: the name of its module {name!r} is taken: choose another")
                self.add_module(name, module)
        if self._attention_term is not None:
            for teacher in self.teachers if self._attention_term.teacher else ():
                install(teacher.model)
            install(student)
        if shards is not None:
            self._shard(shards)

    def _shard(self, shards: SequenceShards) -> None:
        """Let the tokens of both models lie on several processes. Raises ValueError for what needs them in one place."""
        others = [term.name for term in self.terms if term.name not in SHARDED_TERMS]
        if others:
            raise InputError(f"sequence_parallel knows the terms {', '.join(SHARDED_TERMS)}, got {', '.join(others)}")
        if not self.pads_right:
            raise InputError("sequence_parallel needs batches that are padded on the right (pads_right)")
        teacher = None if self.teacher is None else self.teacher.model
        if not self._composed or self.reads_apart:
            raise InputError(NO_COMMON_VISION)
        check_shardable(self.student, teacher, shards.size)
        for model in (self.student, *(() if teacher is None else (teacher,))):
            install(model)

    def _check_models(self) -> None:
        """Before every batch, too: what a caller holds may change."""
        for term in self.terms:
            for model in [teacher.model for teacher in self.teachers] or [None]:
                term.check(self.student, model)
        if not self._reads_tokens:
            return
        refuse_left_out(self.student, "student", "the whole model", called=True)
        if self._composed:
            refuse_left_out(self.student.model, "student", "its part `model`", called=False)
        for teacher in self.teachers:
            refuse_left_out(teacher.model, "teacher", "the whole model", called=False)
            if teacher.shares_vision:
                refuse_left_out(teacher.model.model, "teacher", "its part `model`", called=False)

    @property
    def teachers(self) -> tuple[Teacher, ...]:
        """All of them."""
        return () if self.source is None else self.source.teachers

    @property
    def teacher(self) -> Teacher | None:
        """The teacher, if it is here; of several the one that the student takes parts of."""
        return None if self.source is None else self.source.teacher

    @property
    def reads_apart(self) -> bool:
        """Whether batches hold an encoding of their samples for the teacher, too."""
        return self.source is not None and self.source.reads_apart

    def forward(self, labels: Tensor, **batch: Tensor) -> dict[str, Tensor]:
        """Losses of a batch by the names of the terms, each summed over labels or samples as the term says.

        ``input_ids``, ``labels`` (not shifted, -100 outside the answers) and ``attention_mask`` are (B, T),
        ``pixel_values`` (I, 3, H, W) for a LLaVA and whatever the processor makes for other families; terms on patches take
        only ``pixel_values`` and ``labels`` (I, V, 3). Terms and the teacher's source may have keys of their own.
        Samples packed into rows come with the ``position_ids`` that tell them apart, and without ``attention_mask``.
        ``samples`` is how many a batch holds, where a term counts them: of padded ones those ``counted``, (B,) bool, where it
        is given. ``sampled``, (B, T) bool, are the tokens of the student's own replies, which `Answers` leaves out. ``idle``
        is a zero that keeps an adapter without work in the graph; with several processes a micro-batch without images runs
        the vision path on a blank instead (`cdistill.train.blank`): all ranks reduce the same gradients.
        """
        step = self.step(labels, batch)
        self._check_models()
        if self._reads_tokens:
            self._run(step)
        for term in self.terms:
            step.losses[term.name] = _scalar(term, term.forward(step))
        losses = step.losses | _declared(self.terms, step.details)
        if self.counts_samples:
            losses["samples"] = step.samples
        if "pixel_values" in step.batch or not has_vision(self.student) or self._takes_blanks:
            return losses
        return losses | idle_adapter(self.student)

    @property
    def modules_of_terms(self) -> dict[str, nn.Module]:
        """What terms have of their own, by name."""
        return {name: module for name, module in self.named_children() if module is not self.student}

    @property
    def counts_samples(self) -> bool:
        """Whether a term is a mean over samples."""
        return any(term.per == "sample" for term in self.terms)

    def step(self, labels: Tensor, batch: dict[str, Tensor]) -> Step:
        """A batch as its terms see it, before any model has run."""
        rest = {name: value for name, value in batch.items() if name not in OF_SAMPLES and value is not None}
        of_samples = tuple(batch.get(name) for name in OF_SAMPLES)
        if self.reads_apart is not (TEACHER_IDS in rest):
            raise InputError(_APART if self.reads_apart else _TOGETHER)
        if not self.reads_apart:
            return self._step(labels, rest, self._visual_ids, of_samples)
        ours, theirs = split_sides(rest)
        if "labels" not in theirs or "position_ids" in theirs:
            raise InputError(_APART)
        step = self._step(labels, ours, self._visual_ids, of_samples)
        step.theirs = self._step(theirs.pop("labels"), theirs, self._teacher_visual_ids, of_samples)
        return step

    def _step(self, labels: Tensor, batch: dict[str, Tensor], visual_ids: tuple[int, ...], of_samples: Any) -> Step:
        mask = None if self.pads_right else batch.get("attention_mask")
        visual = visual_ids, self._needs_visual
        step = Step(
            self.student, labels, batch, self.modules_of_terms, *visual, self._attention_term, mask, *of_samples
        )
        step.own, step.shards = self.own_inputs, self.shards
        return step

    def count_samples(self, labels: Tensor, **batch: Tensor) -> Tensor:
        """How many samples a batch holds, as terms over samples are divided by them."""
        if not self.counts_samples and batch.get("counted") is None:
            return torch.full((), len(labels), device=labels.device)
        return self.step(labels, batch).samples

    def ask(self, step: Step, shared: SharedVision | None, inputs: dict[str, Any]) -> None:
        """Let the teacher look at the batch, its attention seen by the term that compares it."""
        assert self.source is not None
        looks = self._attention_term is not None and self.source.teacher is not None
        recorder = self._attention_term.teacher_recorder(step) if looks and self._attention_term else None
        step.teacher = self.source.ask(step, recorder, shared, inputs)

    def _run(self, step: Step) -> None:
        """Let teacher and student look at the batch."""
        refuse_misread(step.batch, step.own, self._image_ids[0])
        if step.theirs is not None:
            refuse_misread(step.theirs.batch, step.own, self._image_ids[-1])
        shared, inputs = self.inputs(step)
        if self.source is not None:
            self.ask(step, shared, inputs)
        if self._attention_term is not None:
            step.recorder = self._attention_term.recorder(step)
        hidden = self.student_hidden(inputs, shared, step.recorder).flatten(0, 1)
        step.hidden = hidden[step.places]
        if step.needs_visual:
            step.visual = hidden[step.visual_places.places]

    def student_hidden(self, inputs: dict[str, Any], shared: SharedVision | None, recorder: Recorder | None) -> Tensor:
        """(B, T, d_S) the student's last hidden states; with shards those of this process's tokens."""
        if self._composed:
            inputs = dict(inputs)
            inputs["inputs_embeds"] = student_embeddings(self.student, inputs.pop("input_ids"), shared)
        return hidden_states(self.student, inputs, recorder, self.shards)

    @property
    def _composed(self) -> bool:
        """Whether images are embedded here (`share_vision`), and not by the model itself."""
        return isinstance(self.student, Llava) and (self.source is None or self.source.shares_vision)

    @property
    def own_inputs(self) -> set[str]:
        """Keys of a batch that are no input of the models."""
        found = {key for term in self.terms for key in term.inputs}
        return found if self.source is None else found | set(self.source.inputs)

    def inputs(self, step: Step) -> tuple[SharedVision | None, dict[str, Any]]:
        """What the models share of the images, and what each of them takes."""
        inputs = step.inputs
        if not self._composed:
            return None, inputs
        pixels, sizes = inputs.pop("pixel_values", None), inputs.pop("image_sizes", None)
        return share_vision(self.student, pixels, sizes, idle=pixels is None and self._takes_blanks), inputs

    @property
    def _takes_blanks(self) -> bool:
        """Whether a blank image stands in where a batch has none."""
        together = self._composed and self.source is not None and self.source.is_partitioned
        return needs_blank(self.student) or together


def _image_ids(model: Model) -> tuple[int, ...]:
    """Of a model's visual tokens; none of one that has no images or does not name them."""
    try:
        return visual_token_ids(model) if has_vision(model) else ()
    except InputError:
        return ()


_APART = (
    "teacher_input_ids, teacher_labels, teacher_attention_mask and the teacher's images must be in the batch, padded and not "
    "packed: teacher and student encode samples differently (cdistill.data.pairs)"
)
_TOGETHER = "teacher_input_ids must not be in the batch: teacher and student of one encoding read the same tokens"


def _scalar(term: Term, found: Any) -> Tensor:
    """A term's sum. Raises ValueError for anything else."""
    if not isinstance(found, Tensor) or found.ndim:
        got = f"one of shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
        raise InputError(f"term {term.name!r}: forward must return a scalar tensor, got {got}")
    return found


def _declared(terms: Iterable[Term], details: dict[str, Tensor]) -> dict[str, Tensor]:
    """Further results of the terms. Raises ValueError unless they are those that the terms have announced."""
    wanted = [name for term in terms for name in term.details]
    if set(wanted) != details.keys():
        raise InputError(
            f"details of terms must be those in step.details ({', '.join(details)}), got {', '.join(wanted)}"
        )
    return details


def _require_body(model: Model, side: str) -> None:
    """Raise ValueError for a class whose hidden states cannot be read, or whose own loss has a term that is not here."""
    if not isinstance(getattr(model, "model", None), nn.Module):
        raise InputError(
            f"the {side}'s class {type(model).__name__} has no submodule `model` that gives hidden states; take one of the "
            "families of docs/how-to/alignment.md"
        )
    configs = (model.config, model.config.get_text_config())
    weights = [getattr(config, name, None) for config in configs for name in family_of(model).router_fields]
    asked = any(getattr(config, "output_router_logits", False) for config in configs)
    if side == "student" and asked and any(weights):
        raise InputError(
            "the student's output_router_logits asks for its experts' router loss (router_aux_loss_coef), which the losses "
            "here leave out; set output_router_logits to False in its configuration"
        )
