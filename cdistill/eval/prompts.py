"""Questions as a model reads them: its own chat template and processor, images made ready once for all questions about them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from cdistill.data.conversations import TOKEN_TYPES, Encoder, ImageParts
from cdistill.data.images import seen
from cdistill.data.samples import BadSampleError, Mark, Message
from cdistill.errors import InputError
from cdistill.eval.contract import Question


@dataclass(frozen=True)
class Prompt:
    """A question as tokens.

    Attributes:
        ids: the prompt, up to where the model's turn begins, images expanded.
        continuation: tokens of what is scored as the model's turn; empty where it generates.
        types: what the processor says of each token of ``ids``, by name.
        shown: tokens up to the end of the last image; 0 without images.
        images: what the processor makes of the images, as for a batch of this prompt alone.
        seen: what tells prompts about the same images from others.
        max_new_tokens: where a reply is cut.
    """

    ids: list[int]
    continuation: list[int]
    types: dict[str, list[int]]
    shown: int
    images: dict[str, Tensor]
    seen: tuple[str, ...]
    max_new_tokens: int


class Prompts:
    """Writes questions as a model's chat template does.

    Args:
        processor: of a multimodal model, or a tokenizer for a model that sees no images.

    Attributes:
        tokenizer: the processor's.
        stops: tokens by which the template closes an answer.
        encoder: makes tokens and labels of conversations; None for a template or processor by which labels cannot be placed.

    Raises:
        ValueError: there is no chat template.
    """

    def __init__(self, processor: Any) -> None:
        self.processor = processor
        self.tokenizer = getattr(processor, "tokenizer", processor)
        if not (getattr(processor, "chat_template", None) or self.tokenizer.chat_template):
            raise InputError(
                "model: it has no chat template, so questions cannot be put to it; put a chat_template.jinja beside its weights"
            )
        if self.tokenizer.pad_token_id is None:  # padding is masked: any token will do
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self._one_at_a_time = Lock()  # tokenizers are changed where they are used
        self.takes_images = getattr(processor, "image_processor", None) is not None
        self.encoder: Encoder | None
        try:
            self.encoder = Encoder(processor)
        except ValueError:  # labels cannot be placed by this template or processor; prompts can be written
            self.encoder = None
        self.stops: tuple[int, ...] = () if self.encoder is None else self.encoder.contract.end_ids
        visual = (getattr(processor, name, None) for name in ("image_token", "video_token"))
        self.visual = {self.tokenizer.convert_tokens_to_ids(token) for token in visual if token is not None}

    def about(self, questions: Sequence[Question], images: Sequence[Image.Image]) -> list[Prompt]:
        """Prompts of questions that all show the same images, in their order.

        Raises:
            BadSampleError: images that the processor does not take.
            ValueError: a question that cannot be written, named by its id; images for a model that takes none.
        """
        with self._one_at_a_time:
            return self._about(questions, images)

    def _about(self, questions: Sequence[Question], images: Sequence[Image.Image]) -> list[Prompt]:
        if images and not self.takes_images:
            raise InputError(f"model: it has no image processor, and question {questions[0].id!r} shows an image")
        images = [image if image.mode == "RGB" else seen(image, exif=False) for image in images]
        visual = None if self.encoder is None else self.encoder.image_parts(images)
        result = []
        for question in questions:
            try:
                if self.encoder is None or visual is None:
                    result.append(self._by_processor(question, images))
                else:
                    result.append(self._by_encoder(self.encoder, question, visual))
            except BadSampleError as error:
                raise InputError(f"question {question.id!r}: {error}") from None
        return result

    def reply(self, ids: Sequence[int]) -> str:
        """The text of generated tokens, without special ones."""
        with self._one_at_a_time:
            return self.tokenizer.decode(list(ids), skip_special_tokens=True)

    def _by_encoder(self, encoder: Encoder, question: Question, visual: ImageParts) -> Prompt:
        asked = Message("user", (*[Mark.IMAGE] * len(question.images), question.prompt))
        ids, types = encoder.prompt([asked], visual)
        continuation: list[int] = []
        if question.kind != "generate":
            tokens, answers = encoder.contract([asked, Message("assistant", (question.continuation,))])
            continuation = [token for token, answer in zip(tokens, answers, strict=True) if answer]
            if continuation[-1:] == list(self.stops):
                del continuation[-1]
        return self._prompt(question, ids, continuation, types, visual.tensors)

    def _by_processor(self, question: Question, images: Sequence[Image.Image]) -> Prompt:
        """As transformers does it, with the words of the model's turn right behind the prompt."""
        words = {"type": "text", "text": question.prompt}
        content: Any = [*({"type": "image"} for _ in images), words] if self.takes_images else question.prompt
        chat = [{"role": "user", "content": content}]
        text = self.processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        bos = self.tokenizer.bos_token
        bare = self.processor is self.tokenizer or (bos is not None and text.startswith(bos))
        shown = {"images": [list(images)]} if images else {}
        made = dict(self.processor(text=[text], **shown, add_special_tokens=not bare, return_tensors="pt"))
        ids = made.pop("input_ids")[0].tolist()
        made.pop("attention_mask", None)
        types = {name: made.pop(name)[0].tolist() for name in TOKEN_TYPES if name in made}
        continuation: list[int] = []
        if question.kind != "generate":
            before, both = (
                self.tokenizer(part, add_special_tokens=False)["input_ids"]
                for part in (text, text + question.continuation)
            )
            if both[: len(before)] != before:
                both = before + self.tokenizer(question.continuation, add_special_tokens=False)["input_ids"]
            continuation = both[len(before) :]
        tensors = {name: torch.as_tensor(value) for name, value in made.items()} if images else {}
        return self._prompt(question, ids, continuation, types, tensors)

    def _prompt(
        self,
        question: Question,
        ids: list[int],
        continuation: list[int],
        types: dict[str, list[int]],
        images: dict[str, Tensor],
    ) -> Prompt:
        if question.kind != "generate" and not continuation:
            raise BadSampleError("empty answer", f"no tokens of the continuation {question.continuation!r}")
        shown = max((i + 1 for i, token in enumerate(ids) if token in self.visual), default=0)
        return Prompt(ids, continuation, types, shown, images, question.images, question.max_new_tokens)
