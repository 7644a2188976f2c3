"""Conversations as tokens: a template and a processor of transformers make a sample what a model of any family takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cdistill.data.contract import LabelContract
from cdistill.data.images import check_resizing, seen
from cdistill.data.samples import IGNORE_INDEX, BadSampleError, Mark, Message, blamed_on_sample
from cdistill.data.spans import Places, places, said
from cdistill.errors import InputError

TOKEN_TYPES = ("mm_token_type_ids", "token_type_ids")  # what processors may say of every token


@dataclass(frozen=True)
class Encoded:
    """One sample for a model: ``input_ids`` and ``labels`` (T,) int64, labels not shifted and -100 outside the answers.

    The first token is never a label, because nothing before it could predict it: samples may be packed.
    ``types`` are (T,) int64 by the processor's name for them, ``images`` what it makes of the sample's images (empty
    without), as for a batch of this sample alone; ``spans`` say where the tokens of each image,
    marks around it included, begin and stop. ``places`` are those of its words, where they are asked for; ``kind`` is what
    `cdistill.data.mix.kinds_of` calls a sample, likewise.
    """

    input_ids: Tensor
    labels: Tensor
    types: dict[str, Tensor]
    images: dict[str, Tensor]
    spans: tuple[tuple[int, int], ...] = ()
    places: Places | None = None
    kind: str = ""


class ImageParts(NamedTuple):
    """Images as a processor sees them: the tokens (and their types) that each stands for, and the tensors of all."""

    tokens: list[list[int]]
    types: dict[str, list[list[int]]]
    tensors: dict[str, Tensor]


class Encoder:
    """Makes tokens, labels and pixels of conversations with images at any place, one sample at a time.

    The text is tokenised with one mark per image (`LabelContract`, which decides what is learned); the marks are then replaced
    by the tokens that the processor gives for these images.

    A sample longer than ``max_length`` ends with its last token of an answer within it: an answer is cut, a question is left
    out, and so are the images from there on. No image is cut.

    Args:
        processor: of a multimodal model, or a tokenizer, for text alone; the tokenizer must be a fast one.
        template: as for `cdistill.data.templates.Template`.
        max_length: tokens of a sample at most, those of its images included; None for any number.
        places: find which words each token says, too.

    Raises:
        ValueError: a template that does not fit (`Template`), a tokenizer that is slow or without padding, or a processor
            that does not expand marks in place.
    """

    def __init__(
        self, processor: Any, template: str = "auto", max_length: int | None = None, *, places: bool = False
    ) -> None:
        self.processor = processor
        self.tokenizer = getattr(processor, "tokenizer", processor)
        self.max_length: int | None = None
        if not self.tokenizer.is_fast:
            raise InputError(f"{type(self.tokenizer).__name__} is not a fast tokenizer, which labels need")
        if self.tokenizer.pad_token_id is None:
            raise InputError(
                f"{type(self.tokenizer).__name__} has no pad_token, which batches need; set one in "
                "tokenizer_config.json (eos_token will do)"
            )
        self._places = places
        self.contract = LabelContract(processor, template, offsets=places)
        self.template = self.contract.template
        self.pad_token_id: int = self.tokenizer.pad_token_id
        self._types: tuple[str, ...] = ()
        self._visual = [
            token for name in ("image_token", "video_token") if (token := getattr(processor, name, None)) is not None
        ]
        self._image_id: int | None = None
        if self.template.image_token is not None:
            self._image_id = self.tokenizer.convert_tokens_to_ids(self.template.image_token)
        self._check()
        self.max_length = max_length

    def __call__(
        self, messages: Sequence[Message], images: Sequence[Image.Image], *, labels: int | None = None
    ) -> Encoded:
        """Tokens of a conversation about ``images``, in the order of their marks, with so many ``labels`` at most.

        Raises:
            BadSampleError: no token of an answer within ``max_length``, a text that holds a mark of an image itself, more
                or fewer marks than images, or answers that the tokenizer does not keep apart from questions.
        """
        self._refuse_marks(messages)
        if images and self._image_id is None:
            raise BadSampleError("image count", f"{len(images)} images for a model that takes none")
        tokens, labelled, rendered = self.contract.written(messages)
        self._require_marks(tokens.ids, len(images))
        found = places(said(self.template, messages, rendered), tokens.offsets, labelled) if self._places else None
        images = [image if image.mode == "RGB" else seen(image, exif=False) for image in images]
        return self._fit(tokens.ids, labelled, images, labels, found)

    def prompt(self, messages: Sequence[Message], visual: ImageParts) -> tuple[list[int], dict[str, list[int]]]:
        """Tokens that ask for an answer to messages of which the last is the user's, and their types.

        ``visual`` is what `image_parts` made of the images that the messages show; it serves any number of prompts.

        Raises:
            BadSampleError: a text that holds a mark of an image itself, more or fewer marks than images, or messages that the
                template refuses.
        """
        self._refuse_marks(messages)
        with blamed_on_sample("chat template"):
            ids = self.contract.prompt_ids(messages)
        self._require_marks(ids, len(visual.tokens))
        _, tokens, types, _ = self._expand(ids, visual)
        return tokens, types

    def _refuse_marks(self, messages: Sequence[Message]) -> None:
        for message in messages:
            for part in message.parts:
                if isinstance(part, str) and (found := [token for token in self._visual if token in part]):
                    raise BadSampleError(
                        "mark in the text", f"{found[0]} stands for an image, and in the text of the sample"
                    )

    def _require_marks(self, ids: Sequence[int], images: int) -> None:
        if (count := sum(token == self._image_id for token in ids)) != images:
            raise BadSampleError("image count", f"{count} marks in the text, {images} images")

    def _tokenize(self, *texts: str) -> list[list[int]]:
        """Tokens of texts that a template has written, as the processor makes them of words alone."""
        return [self.contract.text_ids(text) for text in texts]

    def _fit(
        self,
        ids: list[int],
        labelled: np.ndarray,
        images: list[Image.Image],
        labels: int | None,
        found: Places | None,
    ) -> Encoded:
        """Put tokens in place of the marks, and shorten the sample until it fits."""
        while True:
            visual = self.image_parts(images)
            origins, tokens, types, spans = self._expand(ids, visual)
            answers = labelled[origins]
            answers[:1] = False  # no token precedes it that could predict it
            limit = len(tokens) if self.max_length is None else min(self.max_length, len(tokens))
            if labels is not None and answers.sum() > labels:
                limit = min(limit, int(np.flatnonzero(answers)[labels - 1]) + 1)
            if not answers[:limit].any():
                reason = "too long" if limit < len(tokens) else "empty answer"
                raise BadSampleError(reason, f"{len(tokens)} tokens, none of an answer among the first {limit}")
            if limit < len(tokens):
                limit = int(np.flatnonzero(answers[:limit])[-1]) + 1
                ids = ids[: origins[limit - 1] + 1]
            kept = sum(token == self._image_id for token in ids)
            if kept == len(images):
                break
            images = images[:kept]  # again: what an image becomes may depend on how many there are
        input_ids = torch.tensor(tokens[:limit])
        learned = input_ids.where(torch.from_numpy(answers[:limit]), IGNORE_INDEX)
        kinds = {name: torch.tensor(of[:limit]) for name, of in types.items()}
        said_by = None if found is None else found.taken(origins[:limit])
        return Encoded(input_ids, learned, kinds, visual.tensors, tuple(spans), said_by)

    def image_parts(self, images: list[Image.Image]) -> ImageParts:
        """What the processor makes of the images of one sample."""
        if not images:
            return ImageParts([], {name: [] for name in self._types}, {})
        between = self.tokenizer.eos_token or self.tokenizer.pad_token
        marks = between.join([self.template.image_token or ""] * len(images))
        for image in images:
            check_resizing(getattr(self.processor, "image_processor", None), *image.size)
        with blamed_on_sample("image processor"):
            made = dict(self.processor(text=[marks], images=[images], add_special_tokens=False, return_tensors="pt"))
        ids = made.pop("input_ids")[0].tolist()
        made.pop("attention_mask", None)
        separator = self.tokenizer.convert_tokens_to_ids(between)
        cuts = [-1, *(i for i, token in enumerate(ids) if token == separator), len(ids)]
        types = {name: made.pop(name)[0].tolist() for name in TOKEN_TYPES if name in made}
        parts = {name: [of[a + 1 : b] for a, b in pairwise(cuts)] for name, of in {"ids": ids, **types}.items()}
        return ImageParts(parts.pop("ids"), parts, {name: torch.as_tensor(value) for name, value in made.items()})

    def _expand(
        self, ids: list[int], visual: ImageParts
    ) -> tuple[list[int], list[int], dict[str, list[int]], list[tuple[int, int]]]:
        """Tokens with images in place of their marks: the index in ``ids`` that each comes from, their ids and types, and
        where each image begins and stops."""
        origins: list[int] = []
        spans: list[tuple[int, int]] = []
        tokens: list[int] = []
        types: dict[str, list[int]] = {name: [] for name in visual.types}
        images = iter(range(len(visual.tokens)))
        for i, token in enumerate(ids):
            image = next(images) if token == self._image_id else None
            tokens += [token] if image is None else visual.tokens[image]
            for name, of in types.items():
                of += [0] if image is None else visual.types[name][image]
            if image is not None:
                spans.append((len(origins), len(tokens)))
            origins += [i] * (len(tokens) - len(origins))
        return origins, tokens, types, spans

    def _check(self) -> None:
        """Encode a made-up conversation, and see that the processor makes the same tokens of its generation prompt."""
        image = () if self._image_id is None else (Mark.IMAGE,)
        turns = [((*image, "See?"), "Yes."), ((*image, "And here?"), "Not at all.")]
        messages = [m for q, a in turns for m in (Message("user", q), Message("assistant", (a,)))]
        if not image:
            self(messages, [])
            return
        images = [Image.new("RGB", (64, 48)), Image.new("RGB", (48, 64))]
        self._types = tuple(self.image_parts(images).types)
        self(messages, images)
        asked = Message("user", (Mark.IMAGE, "See?", Mark.IMAGE))
        found = self([asked, messages[-1]], images)
        prompt = found.input_ids[: int((found.labels != IGNORE_INDEX).nonzero()[0])].tolist()
        text, bos = self.template.prompt([asked])[0], self.tokenizer.bos_token
        add = bos is None or not text.startswith(bos)
        (expected,) = self.processor(text=[text], images=[images], add_special_tokens=add)["input_ids"]
        if prompt != list(expected):
            raise InputError(
                f"{type(self.processor).__name__} makes {len(expected)} tokens of a question about two images, "
                f"{len(prompt)} of its words and its images by themselves: labels cannot be placed"
            )
