"""The built-in task: seeded datasets of scenes with captions and questions, their tokenizer, and the collator.

Nothing is read from disk and nothing is stored: sample ``i`` of a dataset is a function of its seed and ``i``.
"""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerFast

from cdistill.builtin import questions, render, scenes
from cdistill.builtin.grounding import Grounded, grounded, padded
from cdistill.builtin.task import SUBTYPES, BuiltinTask
from cdistill.data.conversations import Encoded, Encoder
from cdistill.data.samples import IGNORE_INDEX, IMAGE_TOKEN, Mark, Message

PAD, EOS, USER, ASSISTANT = "<pad>", "</s>", "USER:", "ASSISTANT:"
NUM_VISUAL_TOKENS = scenes.GRID * scenes.GRID

# The vicuna_v1 layout as a template; what it marks as generated is what `BuiltinDataset` labels.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
    {%- set parts = [{"type": "text", "text": message.content}] if message.content is string else message.content -%}
    {%- if message.role not in ("user", "assistant") -%}
        {{- raise_exception("roles are user and assistant, got " ~ message.role) -}}
    {%- endif -%}
    {{- ("" if loop.first else " ") ~ ("USER:" if message.role == "user" else "ASSISTANT:") -}}
    {%- if message.role == "user" -%}
        {%- for part in parts -%}{{- " " ~ ("<image>" if part.type == "image" else part.text) -}}{%- endfor -%}
    {%- else -%}
        {{- " " -}}
        {%- generation -%}
            {%- for part in parts -%}{{- part.text ~ " " -}}{%- endfor -%}{{- eos_token -}}
        {%- endgeneration -%}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- " ASSISTANT:" -}}{%- endif -%}
"""


def build_tokenizer() -> PreTrainedTokenizerFast:
    """The task's word-level tokenizer, with its chat template; the vocabulary is a fixed function of the task's words."""
    vocabulary = [PAD, EOS, IMAGE_TOKEN, USER, ASSISTANT, "<unk>"]
    vocabulary += sorted(set(scenes.words()) | set(questions.WORDS))
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        eos_token=EOS,
        unk_token="<unk>",
        extra_special_tokens={"image_token": IMAGE_TOKEN},
        padding_side="right",
        chat_template=CHAT_TEMPLATE,
    )


class BuiltinDataset(Dataset):
    """``size`` conversations or captions about scenes of the training split (or the held-out one).

    Each item is a dict of ``input_ids`` and ``labels`` (T,) int64 tensors, labels not shifted and -100 outside the answers,
    and ``pixel_values`` (3, IMAGE_SIZE, IMAGE_SIZE) fp32 for image samples. With ``grounding`` also ``grounding`` (T, V)
    fp32, which of V places every word speaks of (`render.grounding`), and their positions ``places`` (V,) int64: the
    image's tokens or, for text samples, the last words of the objects that the scene is written out as. An image becomes
    ``visual_tokens`` tokens; of more than a cell has one, its tokens share what words speak of it (`render.cells`). With
    ``kinds`` also ``kind``, one of the task's.
    """

    def __init__(
        self,
        task: BuiltinTask,
        *,
        size: int,
        seed: int,
        tokenizer: PreTrainedTokenizerFast | None = None,
        held_out: bool = False,
        grounding: bool = False,
        visual_tokens: int = NUM_VISUAL_TOKENS,
        kinds: bool = False,
    ) -> None:
        self.task, self.size, self.seed, self.held_out, self.kinds = task, size, seed, held_out, kinds
        self.grounding, self.visual_tokens = grounding, visual_tokens
        self._cells = render.cells(visual_tokens) if grounding else None
        self.tokenizer = tokenizer or build_tokenizer()
        self._vocabulary = self.tokenizer.get_vocab()
        self._words = {i: word for word, i in self._vocabulary.items()}

    def __len__(self) -> int:
        return self.size

    def _encode(self, text: str) -> list[int]:
        return [self._vocabulary[word] for word in text.split()]

    def __getitem__(self, index: int) -> dict[str, Any]:
        rng, written, scene, turns, kind = self._draw(index)
        item: dict[str, Any] = self._conversation(self._prefix(scene, written), turns)
        if self.kinds:
            item["kind"] = kind
        if not written:
            pixels = render.render(scene, np.random.default_rng(rng.getrandbits(64)))
            item["pixel_values"] = torch.from_numpy(pixels)
        return item | self._grounding(scene, item["input_ids"], written) if self.grounding else item

    def length(self, index: int) -> int:
        """Tokens of an item, whose image is not drawn for it."""
        _, written, scene, turns, _ = self._draw(index)
        return len(self._conversation(self._prefix(scene, written), turns)["input_ids"])

    def has_image(self, index: int) -> bool:
        """Whether an item shows its scene as pixels."""
        return not self._draw(index)[1]

    def kind(self, index: int) -> str:
        """What kind of questions an item asks, one of the task's ``kinds``."""
        return self._draw(index)[4]

    def messages(self, index: int) -> list[dict[str, Any]]:
        """The same conversation as messages for a chat template; an image stands in the first of them as PIL image."""
        rng, written, scene, turns, _ = self._draw(index)
        result: list[dict[str, Any]] = []
        for question, answer in turns:
            result.append({"role": "user", "content": [{"type": "text", "text": question}]})
            result.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
        if not written:
            pixels = render.render(scene, np.random.default_rng(rng.getrandbits(64)))
            first: dict[str, Any] = {"type": "image", "image": render.to_image(pixels)}
        else:
            first = {"type": "text", "text": scenes.describe(scene)}
        result[0]["content"].insert(0, first)
        return result

    def _draw(self, index: int) -> tuple[random.Random, bool, scenes.Scene, list[tuple[str, str]], str]:
        """Where its random numbers go on, whether the scene is written out, the scene, what is said about it, and its kind."""
        if not 0 <= index < self.size:
            raise IndexError(index)
        task, rng = self.task, random.Random(f"{self.seed}/{index}/{self.held_out}")
        if task.text and rng.random() < task.text:
            return rng, True, *self._scene_and_turns(rng, SUBTYPES)
        return rng, task.modality == "text", *self._scene_and_turns(rng, task.subtypes)

    def grounded(self, index: int, encoded: Encoded) -> Grounded:
        """An item's encoding by any tokenizer, with its ``grounding`` and ``places``. Raises BadSampleError."""
        _, written, scene, *_ = self._draw(index)
        found = grounded(encoded, scene, written=written, visual_tokens=self.visual_tokens)
        return Grounded(**vars(encoded), given=self._compared(scene, *found, written))

    def _grounding(self, scene: scenes.Scene, input_ids: torch.Tensor, written: bool) -> dict[str, torch.Tensor]:
        words = [self._words[i] for i in input_ids.tolist()]
        cells = render.grounding(scene, words)
        places = [i for i, word in enumerate(words) if word == IMAGE_TOKEN]
        if written:
            each = len(scenes.describe(scene[:1]).split())
            places = [(i + 1) * (each + 1) - 1 for i in range(len(scene))]  # after USER:, with ; between the objects
            cells[: places[-1] + 1] = 0.0  # the scene itself
        return self._compared(scene, cells, places, written)

    def _compared(
        self, scene: scenes.Scene, cells: np.ndarray, places: list[int], written: bool
    ) -> dict[str, torch.Tensor]:
        """What a batch has of the cells that tokens speak of, (T, GRID * GRID), and of where objects or visual tokens stand."""
        shares = torch.from_numpy(cells)
        if written:
            shares = shares[:, [t.row * scenes.GRID + t.column for t in scene]]
        else:
            shares = shares[:, self._cells] * (NUM_VISUAL_TOKENS / self.visual_tokens)
        return {"grounding": shares, "places": torch.tensor(places)}

    def _prefix(self, scene: scenes.Scene, written: bool) -> str:
        return scenes.describe(scene) if written else " ".join([IMAGE_TOKEN] * self.visual_tokens)

    def _scene_and_turns(
        self, rng: random.Random, subtypes: tuple[str, ...]
    ) -> tuple[scenes.Scene, list[tuple[str, str]], str]:
        """A scene, what is said about it, and of which kind; scenes that allow none of the wanted questions are passed over."""
        captioned = rng.random() < self.task.caption
        if self.task.one_kind:
            subtypes = (rng.choice(subtypes),)
        while True:
            scene = scenes.sample_scene(rng, held_out=self.held_out, seen=self.task.pairs == "seen")
            if self.task.pairs == "unseen" and not any(thing.name in scenes.UNSEEN for thing in scene):
                continue
            asked = [questions.ask_any(scene, subtypes, rng, self.task.pairs) for _ in range(self.task.turns)]
            if None in asked:
                continue
            turns = [(q.text, q.answer) for q in asked if q is not None]
            if captioned:
                turns.insert(0, ("describe the scene", scenes.caption(scene, rng, sentences=self.task.sentences)))
            (kind, *others) = self.task.kinds
            return scene, turns, asked[0].subtype if others and asked[0] is not None else kind

    def _conversation(self, prefix: str, turns: list[tuple[str, str]]) -> dict[str, torch.Tensor]:
        """The vicuna_v1 layout: ``USER: prefix question ASSISTANT: answer </s> USER: question ...``, labels on the answers."""
        ids: list[int] = []
        labels: list[int] = []
        for i, (question, answer) in enumerate(turns):
            prompt = self._encode(f"{USER} {prefix if i == 0 else ''} {question} {ASSISTANT}")
            reply = self._encode(f"{answer} {EOS}")
            ids += prompt + reply
            labels += [IGNORE_INDEX] * len(prompt) + reply
        return {"input_ids": torch.tensor(ids), "labels": torch.tensor(labels)}


class ConversationDataset(Dataset):
    """The samples of a `BuiltinDataset` as tokens, for models of any family.

    With ``data.grounding`` they are `Grounded`, and the encoder must find ``places``.
    """

    def __init__(self, data: BuiltinDataset, encoder: Encoder) -> None:
        self.data, self.encoder = data, encoder

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Encoded:
        messages, images = [], []
        for message in self.data.messages(index):
            images += [part["image"] for part in message["content"] if part["type"] == "image"]
            parts = (Mark.IMAGE if part["type"] == "image" else part["text"] for part in message["content"])
            messages.append(Message(message["role"], tuple(parts)))
        encoded = self.encoder(messages, images)
        encoded = replace(encoded, kind=self.data.kind(index)) if self.data.kinds else encoded
        return self.data.grounded(index, encoded) if self.data.grounding else encoded


class Collator:
    """Pads a list of items on the right to the longest and stacks the images: what a model's forward takes.

    Adds ``attention_mask`` (B, T) int64. ``pixel_values`` is (I, 3, H, W) over the samples that have an image, absent if none
    has; ``grounding`` is (B, T, V), padded with zeros, and ``places`` (B, V), padded with -1.
    """

    def __init__(self, pad_token_id: int) -> None:
        self.pad_token_id = pad_token_id

    def __call__(self, items: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        length = max(len(item["input_ids"]) for item in items)
        input_ids = torch.full((len(items), length), self.pad_token_id)
        labels = torch.full((len(items), length), IGNORE_INDEX)
        attention_mask = torch.zeros((len(items), length), dtype=torch.long)
        for i, item in enumerate(items):
            n = len(item["input_ids"])
            input_ids[i, :n], labels[i, :n], attention_mask[i, :n] = item["input_ids"], item["labels"], 1
        batch: dict[str, Any] = {"input_ids": input_ids, "labels": labels, "attention_mask": attention_mask}
        images = [item["pixel_values"] for item in items if "pixel_values" in item]
        if images:
            batch["pixel_values"] = torch.stack(images)
        return batch | padded(items, length) if "grounding" in items[0] else batch


class PatchDataset(Dataset):
    """``size`` images with the labels of every patch: ``pixel_values`` (3, H, W) fp32 and ``labels`` (V, 3) int64."""

    def __init__(self, *, size: int, seed: int, visual_tokens: int = NUM_VISUAL_TOKENS) -> None:
        self.size, self.seed = size, seed
        self._cells = render.cells(visual_tokens)

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not 0 <= index < self.size:
            raise IndexError(index)
        rng = random.Random(f"{self.seed}/{index}/patch")
        scene = scenes.sample_scene(rng)
        pixels = render.render(scene, np.random.default_rng(rng.getrandbits(64)))
        return {
            "pixel_values": torch.from_numpy(pixels),
            "labels": torch.from_numpy(render.patch_labels(scene)[self._cells]),
        }


def collate_patches(items: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """(B, 3, H, W) images and (B, V, 3) labels."""
    return {name: torch.stack([item[name] for item in items]) for name in items[0]}
