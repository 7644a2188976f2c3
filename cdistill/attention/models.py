"""A teacher and its students, loaded as `cdistill eval` loads models, and questions as tokens that all of them read alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from threading import Lock
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from cdistill.data.samples import Message, Sample
from cdistill.errors import InputError
from cdistill.eval.contract import Question
from cdistill.eval.inference import WAYS, Inference
from cdistill.eval.loading import Loaded
from cdistill.eval.prompts import Prompt, Prompts
from cdistill.vat import LayerMatch, attention_layers, layer_range, match_layers, visual_token_ids


@dataclass(frozen=True)
class Reading(Prompt):
    """A question with its right answer as the teacher reads it.

    Attributes:
        answers: places of the answers' tokens in ``ids + continuation``, increasing.
        of_students: what each student's processor makes of the images; None where the teacher's tensors serve.
    """

    answers: tuple[int, ...] = ()
    of_students: tuple[Mapping[str, Tensor] | None, ...] = ()

    @property
    def tokens(self) -> list[int]:
        """The whole text."""
        return self.ids + self.continuation

    def for_student(self, index: int) -> Reading:
        """The same tokens with the images as a student sees them."""
        images = self.of_students[index]
        return self if images is None else replace(self, images=dict(images))


@dataclass(frozen=True)
class Alignment:
    """How a student's layers meet the teacher's.

    Attributes:
        depth: every attention layer of the student with the teacher's at the same relative depth.
        understanding: the layers of the middle 30-70 % by group matching (paper section 4.1), the windows that visual attention
            alignment takes by default; by relative depth where the teacher has fewer of them.
        grouped: whether they are those windows.
    """

    depth: tuple[LayerMatch, ...]
    understanding: tuple[LayerMatch, ...]
    grouped: bool


class Models:
    """A teacher and any number of students.

    Args:
        teacher, students: loaded models.

    Attributes:
        teacher: `Inference` that pads.
        students: the same of each student.
        names: the students', as the user called them.

    Raises:
        ValueError: a model sees no images, or its attention cannot be recorded.
    """

    def __init__(self, teacher: Loaded, students: Sequence[Loaded]) -> None:
        self.loaded = (teacher, *students)
        for each in self.loaded:
            if not each.sees:
                raise InputError(f"model: {each.name} sees no images, so there is no attention to them")
        inferences = []
        for each in self.loaded:
            inference = Inference(each.model, Prompts(each.processor))
            inference.find_way(WAYS[1:])
            inferences.append(inference)
        self.teacher, *self.students = inferences
        self.names = [each.name for each in students]
        self.alignments = [alignment(student.model, teacher.model) for student in students]
        self.visual_ids = torch.tensor(visual_token_ids(teacher.model))
        self._one_at_a_time = Lock()  # tokenizers are changed where they are used
        self._alike = [_reads_alike(teacher.processor, student.processor) for student in students]
        for student in students:
            if (ids := visual_token_ids(student.model)) != visual_token_ids(teacher.model):
                raise InputError(
                    f"model: visual tokens of {student.name} have the ids {ids}, those of {teacher.name} "
                    f"{visual_token_ids(teacher.model)}: teacher and students must read the same tokens"
                )

    @property
    def equal_lengths(self) -> bool:
        """Whether a model takes batches of one length only."""
        return any(each.way == "equal" for each in (self.teacher, *self.students))

    def read(self, questions: Sequence[Question], images: Sequence[Image.Image]) -> list[Reading]:
        """Questions about the same images, each with its ``continuation`` as the answer (none where it is to be written).

        Raises:
            ValueError: a student reads other tokens, in one line.
        """
        ours = self.teacher.prompts.about(questions, images)
        others = [
            None if alike else student.prompts.about(questions, images)
            for alike, student in zip(self._alike, self.students, strict=True)
        ]
        result = []
        seen: list[Mapping[str, Tensor] | None]
        for i, (question, prompt) in enumerate(zip(questions, ours, strict=True)):
            seen = []
            for student, theirs in enumerate(others):
                if theirs is None:
                    seen.append(None)
                    continue
                mine, text = prompt.ids + prompt.continuation, theirs[i].ids + theirs[i].continuation
                self._require_same(question.id, student, mine, text)
                seen.append(theirs[i].images)
            answers = range(len(prompt.ids), len(prompt.ids) + len(prompt.continuation))
            result.append(Reading(**vars(prompt), answers=tuple(answers), of_students=tuple(seen)))
        return result

    def read_sample(self, sample: Sample, images: Sequence[Image.Image]) -> Reading:
        """A conversation of a data set; all of its answers count.

        Raises:
            BadSampleError: it cannot be read.
            ValueError: a student reads other tokens, in one line.
        """
        with self._one_at_a_time:
            return self._encoded(sample.id, sample.messages, images)

    def _encoded(self, name: str, messages: Sequence[Message], images: Sequence[Image.Image]) -> Reading:
        encoded = _encoder(self.teacher, self.loaded[0].name)(messages, images)
        seen: list[Mapping[str, Tensor] | None] = []
        for i, student in enumerate(self.students):
            if self._alike[i]:
                seen.append(None)
                continue
            theirs = _encoder(student, self.names[i])(messages, images)
            self._require_same(name, i, encoded.input_ids.tolist(), theirs.input_ids.tolist())
            seen.append(theirs.images)
        ids = encoded.input_ids.tolist()
        answers = (encoded.labels >= 0).nonzero()[:, 0].tolist()
        types = {kind: of.tolist() for kind, of in encoded.types.items()}
        return Reading(ids, [], types, 0, encoded.images, (name,), 0, tuple(answers), tuple(seen))

    def _require_same(self, name: str, student: int, mine: list[int], theirs: list[int]) -> None:
        if mine == theirs:
            return
        ids = set(self.visual_ids.tolist())
        counts = [sum(token in ids for token in text) for text in (mine, theirs)]
        who = f"{self.loaded[0].name} and {self.names[student]}"
        if counts[0] != counts[1]:
            raise InputError(
                f"model: {who} see {counts[0]} and {counts[1]} visual tokens in {name!r}; attention can be compared between "
                "equal numbers only"
            )
        raise InputError(
            f"model: {who} read {name!r} as different tokens (their tokenizers or chat templates differ); attention can be "
            "compared between equal tokens only"
        )


def _encoder(inference: Inference, name: str) -> Any:
    encoder = inference.prompts.encoder
    if encoder is None:
        raise InputError(
            f"model: {name} has a chat template or processor by which answers cannot be told from questions"
        )
    return encoder


def _reads_alike(a: Any, b: Any) -> bool:
    """Whether two processors make the same of everything, so that one will do."""

    def facts(processor: Any) -> list[Any]:
        tokenizer = getattr(processor, "tokenizer", processor)
        images = getattr(processor, "image_processor", None)
        own = {k: v for k, v in processor.to_dict().items() if "processor" not in k and k != "tokenizer"}
        own = {k: v for k, v in own.items() if isinstance(v, (int, float, str, bool))}
        template = getattr(processor, "chat_template", None) or tokenizer.chat_template
        return [own, template, tokenizer.backend_tokenizer.to_str(), None if images is None else images.to_dict()]

    try:
        return type(a) is type(b) and facts(a) == facts(b)
    except (AttributeError, TypeError):  # a slow tokenizer, a processor that describes itself otherwise
        return False


def heads_of(model: Any) -> int:
    """Query heads of a layer of a model's language model."""
    return int(model.config.get_text_config(decoder=True).num_attention_heads)


def by_depth(student: Sequence[int], teacher: Sequence[int]) -> tuple[LayerMatch, ...]:
    """Each student layer with the teacher layer whose middle lies at, or next below, the same share of the depth."""
    n, m = len(student), len(teacher)
    return tuple(LayerMatch(layer, (teacher[(2 * i + 1) * m // (2 * n)],)) for i, layer in enumerate(student))


def matches_of(span: Any, student: Any, teacher: Any) -> tuple[tuple[LayerMatch, ...], bool]:
    """Student layers of a span with teacher layers, and whether by the windows of group matching.

    A named span is taken of both models; layers given by number meet those of the same relative depth.

    Raises:
        ValueError: the span names no layers of the student, as `layer_range` says.
    """
    ours, theirs = attention_layers(student), attention_layers(teacher)
    chosen = layer_range(ours, span)
    named = isinstance(span, str) and not span[:1].isdigit()
    if named and span != "all":
        other = layer_range(theirs, span, role="teacher")
        if len(other) >= len(chosen):
            return match_layers(chosen, other), True
    everything = {match.student: match for match in by_depth(ours, theirs)}
    return tuple(everything[layer] for layer in chosen), False


def alignment(student: Any, teacher: Any) -> Alignment:
    """How two models of transformers meet."""
    ours, theirs = attention_layers(student), attention_layers(teacher)
    return Alignment(by_depth(ours, theirs), *matches_of("intermediate", student, teacher))
