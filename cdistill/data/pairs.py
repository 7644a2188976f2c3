"""Samples that teacher and student encode differently: each is encoded twice, and both encodings learn the same tokens.

The student's encoding makes a batch as ever. The teacher's stands beside it in the same batch, its keys with a prefix
(``teacher_input_ids``, ``teacher_labels``, ``teacher_pixel_values``, ...), and what relates the two behind another (``pair_``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from PIL import Image
from torch import Tensor

from cdistill.data.batches import PaddingCollator
from cdistill.data.conversations import Encoded, Encoder
from cdistill.data.samples import IGNORE_INDEX, BadSampleError, Mark, Message
from cdistill.errors import InputError

PREFIX = "teacher_"
RELATION = "pair_"
TEACHER_IDS = f"{PREFIX}input_ids"
ADVICE = "; they must have one tokenizer and one template"


@dataclass(frozen=True)
class EncodedPair:
    """One sample as student and teacher read it, and what relates the two, tensors by names."""

    student: Encoded
    teacher: Encoded
    relation: Mapping[str, Tensor] = field(default_factory=dict)


class PairEncoder:
    """Makes tokens, labels and pixels of conversations for two models that have one tokenizer and see images differently.

    A sample ends where the first of the two reaches its ``max_length``: the other is cut behind the same label.

    Args:
        student, teacher: encoders of one template, each with its own processor.

    Raises:
        ValueError: the two learn different tokens of a made-up conversation.
    """

    def __init__(self, student: Encoder, teacher: Encoder) -> None:
        self.student, self.teacher = student, teacher
        self._check()

    def __call__(self, messages: Sequence[Message], images: Sequence[Image.Image]) -> EncodedPair:
        """Both encodings of a conversation about ``images``.

        Raises:
            BadSampleError: whatever keeps one of them from being made, or labels that are not the same tokens in both.
        """
        ours, theirs = self.student(messages, images), self.teacher(messages, images)
        most, least = _labelled(ours), _labelled(theirs)
        if len(most) > len(least):
            ours = self.student(messages, images, labels=len(least))
        elif len(least) > len(most):
            theirs = self.teacher(messages, images, labels=len(most))
        if not torch.equal(_labelled(ours), _labelled(theirs)):
            raise BadSampleError("labels", f"the student and the teacher make different tokens of its answers{ADVICE}")
        return EncodedPair(ours, theirs, self.relate(ours, theirs, images))

    def relate(self, student: Encoded, teacher: Encoded, images: Sequence[Image.Image]) -> dict[str, Tensor]:
        """What terms of the loss need to know of the two; nothing here. Raises BadSampleError."""
        return {}

    def _check(self) -> None:
        """Encode a made-up conversation."""
        image = () if self.student.template.image_token is None else (Mark.IMAGE,)
        pictures = [Image.new("RGB", (64, 48))] if image else []
        made_up = [Message("user", (*image, "See?")), Message("assistant", ("Yes.",))]
        try:
            self(made_up, pictures)
        except BadSampleError as error:
            raise InputError(
                f"teacher and student cannot read one sample, each in its own way: {error.detail}"
            ) from None


@dataclass(frozen=True)
class PairCollator:
    """Batches of `EncodedPair`: the student's keys, the teacher's behind `PREFIX`, and those of the relation behind `RELATION`.

    Tensors of a relation are put one behind the other along a new first dimension (B, ...), padded behind to a common shape:
    integers with -1, others with 0.
    """

    student: PaddingCollator
    teacher: PaddingCollator

    def __call__(self, samples: Sequence[EncodedPair]) -> dict[str, Tensor]:
        batch = self.student([sample.student for sample in samples])
        theirs = self.teacher([sample.teacher for sample in samples])
        names = dict.fromkeys(name for sample in samples for name in sample.relation)
        related = {f"{RELATION}{name}": _stacked([sample.relation[name] for sample in samples]) for name in names}
        return batch | {f"{PREFIX}{name}": value for name, value in theirs.items()} | related


def split_sides(batch: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The student's keys of a batch and the teacher's, by the names of a model's inputs, each with what relates the two."""
    ours = {name: value for name, value in batch.items() if not name.startswith(PREFIX)}
    theirs = {name.removeprefix(PREFIX): value for name, value in batch.items() if name.startswith((PREFIX, RELATION))}
    return ours, theirs


def _labelled(encoded: Encoded) -> Tensor:
    return encoded.labels[encoded.labels != IGNORE_INDEX]


def _stacked(values: Sequence[Tensor]) -> Tensor:
    shape = torch.tensor([value.shape for value in values]).amax(0).tolist()
    fill = 0 if values[0].is_floating_point() else -1
    result = values[0].new_full((len(values), *shape), fill)
    for row, value in zip(result, values, strict=True):
        row[tuple(slice(size) for size in value.shape)] = value
    return result
