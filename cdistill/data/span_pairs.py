"""Samples for a student and a teacher of different tokenizers: encoded twice, with the spans of their words numbered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from cdistill.data.conversations import Encoded, Encoder
from cdistill.data.pairs import RELATION, EncodedPair, PairEncoder
from cdistill.data.samples import IGNORE_INDEX, BadSampleError, Message
from cdistill.data.spans import aligned
from cdistill.data.tokens import Vocabularies, vocabularies

_NAMES = ("spans", "spans_of_teacher")
SPANS, SPANS_OF_TEACHER = (f"{RELATION}{name}" for name in _NAMES)  # keys of a batch: (B, T), below 1 outside of spans


class SpanEncoder(PairEncoder):
    """Makes tokens, labels and pixels of conversations for two models with tokenizers and templates of their own.

    Both encoders must find ``places``. Each side ends where its own ``max_length`` is reached; words that one of them has cut
    off are in no span.

    Args:
        student, teacher: of the two models.
        visual: says what relates their visual tokens, where these are not the same.
    """

    def __init__(self, student: Encoder, teacher: Encoder, visual: PairEncoder | None = None) -> None:
        super().__init__(student, teacher)
        self._visual = visual

    def __call__(self, messages: Sequence[Message], images: Sequence[Image.Image]) -> EncodedPair:
        """Both encodings of a conversation about ``images``, with the number of the span that each token belongs to.

        Raises:
            BadSampleError: whatever keeps one of them from being made, an answer that a template changes or a tokenizer reads
                only a part of, or no span that both learn.
        """
        ours, theirs = self.student(messages, images), self.teacher(messages, images)
        assert ours.places is not None and theirs.places is not None
        numbers = [torch.from_numpy(of) for of in aligned(ours.places, theirs.places)]
        sides = list(zip((ours, theirs), numbers, (self.student, self.teacher), ("student", "teacher"), strict=True))
        for side, number, encoder, name in sides:
            _require_known(side, number, encoder, name)
        for side, number, *_ in sides:
            _leave_out_begun(side, number, numbers)
        learned = [set(number[side.labels != IGNORE_INDEX].tolist()) - {0} for side, number, *_ in sides]
        if not learned[0] & learned[1]:
            raise BadSampleError("alignment", "no words of an answer are within max_length for student and teacher")
        return EncodedPair(ours, theirs, dict(zip(_NAMES, numbers, strict=True)) | self.relate(ours, theirs, images))

    def relate(self, student: Encoded, teacher: Encoded, images: Sequence[Image.Image]) -> dict[str, Tensor]:
        """What ``visual`` says of the two."""
        return {} if self._visual is None else self._visual.relate(student, teacher, images)

    def vocabularies(self) -> Vocabularies:
        """Which tokens of the two say the same."""
        ends = self.student.contract.end_ids, self.teacher.contract.end_ids
        return vocabularies(self.student.tokenizer, self.teacher.tokenizer, ends)

    def _check(self) -> None:
        """The encoders have looked at made-up conversations themselves."""


def _leave_out_begun(side: Encoded, number: Tensor, numbers: Sequence[Tensor]) -> None:
    """Take spans apart that are learned in part, as where a sample begins with an answer: nothing predicts its first token."""
    labelled = side.labels != IGNORE_INDEX
    begun = set(number[labelled].tolist()) & set(number[~labelled].tolist()) - {0}
    for of in numbers if begun else ():
        of[torch.isin(of, torch.tensor(sorted(begun)))] = 0


def _require_known(side: Encoded, number: Tensor, encoder: Encoder, name: str) -> None:
    """Raise BadSampleError for an answer whose words a tokenizer does not know: the model would read others."""
    unknown: Any = encoder.tokenizer.unk_token_id
    if unknown is not None and ((side.input_ids == unknown) & (side.labels != IGNORE_INDEX) & (number > 0)).any():
        assert side.places is not None
        said = " ".join(words for words, answer in zip(side.places.words, side.places.answers, strict=True) if answer)
        raise BadSampleError("alignment", f"the {name}'s tokenizer has no tokens for a part of {said[:60]!r}")


def numbers_of(batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor] | None:
    """The spans that tokens of student and teacher belong to, (B, T) and (B, T'); None of a batch without.

    They count from 1, no number is that of two samples, and 0 is none.
    """
    if SPANS not in batch:
        return None
    both = [batch[name].clamp(min=0) for name in (SPANS, SPANS_OF_TEACHER)]
    most = torch.stack([side.max() for side in both]).max()
    before = torch.arange(len(both[0]), device=most.device)[:, None] * most
    ours, theirs = (torch.where(side > 0, side + before, 0) for side in both)
    return ours, theirs
