"""Conversations about images as a processor of transformers takes them: messages in, padded batches with labels out."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.data import Dataset

from cdistill.data.builtin import IGNORE_INDEX, BuiltinDataset

Messages = list[dict[str, Any]]


class ConversationDataset(Dataset):
    """The samples of a `BuiltinDataset` as messages with PIL images, for processors of any family."""

    def __init__(self, data: BuiltinDataset) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Messages:
        return self.data.messages(index)


class ProcessorCollator:
    """Makes a batch of conversations by the chat template and the processor of a model.

    Gives what the processor gives, padded on the right, and ``labels`` (B, T): not shifted, -100 outside the answers, which
    end with what the template closes a turn with. Images stand in the first message only.

    Args:
        processor: with a chat template and a fast tokenizer.

    Raises:
        ValueError: there is no chat template, or it does not keep what it wrote when a conversation grows.
    """

    def __init__(self, processor: Any) -> None:
        if processor.chat_template is None:
            raise ValueError(f"{type(processor).__name__} has no chat template, which conversations need")
        self.processor = processor
        processor.tokenizer.padding_side = "right"

    def __call__(self, conversations: list[Messages]) -> dict[str, torch.Tensor]:
        texts = [self._text(messages) for messages in conversations]
        pictures = [[p["image"] for p in messages[0]["content"] if p["type"] == "image"] for messages in conversations]
        images = {"images": [p for p in pictures if p]} if any(pictures) else {}
        batch = dict(self.processor(text=texts, **images, padding=True, return_tensors="pt"))
        labels = torch.full_like(batch["input_ids"], IGNORE_INDEX)
        for i, (messages, text) in enumerate(zip(conversations, texts, strict=True)):
            length = int(batch["attention_mask"][i].sum())
            self._label(messages, text, batch["input_ids"][i, :length], labels[i, :length])
        return batch | {"labels": labels}

    def _text(self, messages: Messages, **options: Any) -> str:
        return self.processor.apply_chat_template(messages, tokenize=False, **options)

    def _label(self, messages: Messages, text: str, ids: torch.Tensor, labels: torch.Tensor) -> None:
        written = self.processor.tokenizer(text, return_offsets_mapping=True)
        grown = len(ids) - len(written["input_ids"])  # by the visual tokens, all of which precede the answers
        for turn, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._text(messages[:turn], add_generation_prompt=True)
            after = self._text(messages[: turn + 1]).rstrip()
            if not after.startswith(before) or not text.startswith(after):
                raise ValueError("the chat template rewrites earlier turns: answers cannot be found in its text")
            for token, (start, stop) in enumerate(written["offset_mapping"]):
                if start < stop and start >= len(before) and stop <= len(after):
                    labels[token + grown] = ids[token + grown]
