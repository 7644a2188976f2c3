"""Two vocabularies: which of their tokens say the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from cdistill.errors import InputError

_BROKEN = "\ufffd"  # what a part of a character is decoded to
Text: TypeAlias = tuple[str, str]  # what kind of token it is, and what it says


@dataclass(frozen=True)
class Vocabularies:
    """The tokens of a student and a teacher that say the same, in three contexts.

    A tokenizer has tokens with and without a space before the word, or none with one. Where both models write the next word
    in one way, tokens match by their texts (``matches[0]``); where only the student's token has the space, its " word" is
    the teacher's "word" (``matches[1]``); where only the teacher's has it, the other way round (``matches[-1]``).

    Attributes:
        student, teacher: how many tokens they have; what a head has beyond is padding.
        matches: (2, K) int64 ids of student and teacher, by context.
        student_spaces, teacher_spaces: (V,) bool, whether a token's text begins with a space.
    """

    student: int
    teacher: int
    matches: dict[int, Tensor]
    student_spaces: Tensor
    teacher_spaces: Tensor

    def within(self, student: int, teacher: int) -> Vocabularies:
        """Without tokens that the heads of the models, of so many outputs, do not have."""
        sizes = min(self.student, student), min(self.teacher, teacher)
        if sizes == (self.student, self.teacher):
            return self
        limits = torch.tensor(sizes)[:, None]
        known = {context: pairs[:, (pairs < limits).all(0)] for context, pairs in self.matches.items()}
        return Vocabularies(*sizes, known, self.student_spaces[: sizes[0]], self.teacher_spaces[: sizes[1]])

    def to(self, device: torch.device) -> Vocabularies:
        """With its tensors on a device."""
        if self.student_spaces.device == device:
            return self
        moved = {context: pairs.to(device) for context, pairs in self.matches.items()}
        spaces = self.student_spaces.to(device), self.teacher_spaces.to(device)
        return Vocabularies(self.student, self.teacher, moved, *spaces)


def vocabularies(student: Any, teacher: Any, ends: tuple[Sequence[int], Sequence[int]] = ((), ())) -> Vocabularies:
    """The vocabularies of two fast tokenizers; ``ends`` are the tokens that close an answer, which stand for each other.

    Raises ValueError for a tokenizer that is slow.
    """
    ours, theirs = token_texts(student), token_texts(teacher)
    matches = {}
    for context in (0, 1, -1):
        found = _matched(ours, theirs, context)
        for one, other in zip(*ends, strict=False):
            found = [pair for pair in found if one != pair[0] and other != pair[1]] + [(one, other)]
        matches[context] = torch.tensor(sorted(found), dtype=torch.int64).reshape(-1, 2).T.contiguous()
    spaces = [torch.tensor([kind == "text" and text[:1] == " " for kind, text in of]) for of in (ours, theirs)]
    return Vocabularies(len(ours), len(theirs), matches, spaces[0], spaces[1])


def _matched(student: list[Text], teacher: list[Text], context: int) -> list[tuple[int, int]]:
    def key(token: Text, spaced: bool) -> Text | None:
        """What is compared of a token: where one side alone has spaces, its words without them."""
        kind, text = token
        if context == 0 or kind == "special":
            return token
        if kind != "text" or spaced != (text[:1] == " "):
            return None
        return kind, text.removeprefix(" ")

    theirs: dict[Text, int] = {}
    for i, token in enumerate(teacher):
        if (text := key(token, context == -1)) is not None and text[1]:
            theirs.setdefault(text, i)
    found, taken = [], set()
    for i, token in enumerate(student):
        text = key(token, context == 1)
        if text in theirs and text not in taken:
            taken.add(text)
            found.append((i, theirs[text]))
    return found


def token_texts(tokenizer: Any) -> list[Text]:
    """What every token says behind a word, by its id: decoders write a space there or not. Parts of characters say themselves.

    Raises ValueError for a tokenizer that is slow.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise InputError(
            f"{type(tokenizer).__name__} is not a fast tokenizer, by whose offsets words are found; convert it, or take "
            "the fast one of its family"
        )
    backend, size = tokenizer.backend_tokenizer, len(tokenizer)
    special = {i: str(token) for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    alone = backend.decode_batch([[i] for i in range(size)], skip_special_tokens=False)
    anchor = next(i for i, text in enumerate(alone) if i not in special and text.strip().isalpha())
    behind = backend.decode_batch([[anchor, i] for i in range(size)], skip_special_tokens=False)
    before = alone[anchor]
    result: list[Text] = []
    for i, text in enumerate(behind):
        if i in special:
            result.append(("special", special[i]))
        elif _BROKEN in text or not text.startswith(before):
            result.append(("raw", backend.id_to_token(i) or ""))
        else:
            result.append(("text", text[len(before) :]))
    return result
