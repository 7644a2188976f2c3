"""Tiny random multimodal models of every supported family, and batches laid out as the family's processor does it.

``build(name, seed)`` makes a model, ``draw(name, seed)`` a batch for it, labels included, and ``draw_with_layout`` the same
batch with the visual positions that the family's documentation promises: written down by hand here, not read off the ids.
A batch has four samples: an image between words, words alone, two images, and a video (a second image where the family has
no video), padded to one length.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from itertools import chain
from typing import Any

import numpy as np
import torch
import transformers
from family_table import BOS, EOS, FAMILIES, ID, PAD, VOCABULARY, WORDS, Family, Size
from PIL import Image

STUDENT_LAYERS, TEACHER_LAYERS = 3, 5
# Of transformers' TrainingArguments: a run on the CPU that logs every step and writes nothing.
QUIET = {
    "use_cpu": True,
    "report_to": "none",
    "save_strategy": "no",
    "logging_steps": 1,
    "disable_tqdm": True,
    "remove_unused_columns": False,
}


def build(
    name: str,
    seed: int,
    layers: int = STUDENT_LAYERS,
    width: int = 32,
    heads: int = 2,
    kv_heads: int = 1,
    **options: Any,
) -> Any:
    """A random model of the family, in evaluation mode, whose attention is far from uniform (fp32)."""
    family = FAMILIES[name]
    if family.layer_types:
        options = {"layer_types": [family.layer_types[i % len(family.layer_types)] for i in range(layers)], **options}
    text = getattr(transformers, family.text)(
        **{
            "vocab_size": VOCABULARY,
            "hidden_size": width,
            "intermediate_size": 2 * width,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "initializer_range": 0.25,
            "pad_token_id": PAD,
            "bos_token_id": BOS,
            "eos_token_id": EOS,
            **dict(family.text_options),
            **options,
        }
    )
    torch.manual_seed(seed)
    return getattr(transformers, family.model)(family.config(text)).eval()


def build_pair(name: str, **options: Any) -> tuple[Any, Any]:
    """A student of 3 layers and a teacher of 5, twice as wide."""
    return build(name, 0, **options), build(name, 1, TEACHER_LAYERS, 64, 4, 2, **options)


@cache
def processor(name: str) -> Any:
    """The family's processor, made without files."""
    return FAMILIES[name].processor()


def draw(name: str, seed: int, padding: str = "right") -> dict[str, torch.Tensor]:
    """A batch of four samples: what the model's forward pass takes, labels of the answers included."""
    return draw_with_layout(name, seed, padding)[0]


def draw_with_layout(name: str, seed: int, padding: str = "right") -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The batch and which of its tokens are visual by the family's documentation, (4, T) bool."""
    return collate(name, draw_samples(name, seed), padding)


@dataclass(frozen=True)
class Sample:
    """One sample of a batch before padding."""

    ids: list[int]
    labels: list[int]
    visual: list[bool]
    tensors: dict[str, torch.Tensor]  # pixels and their sizes


def draw_samples(name: str, seed: int) -> list[Sample]:
    """The four samples of a batch."""
    family = FAMILIES[name]
    generator = torch.Generator().manual_seed(seed)

    def words(count: int) -> list[str]:
        return [f"w{i}" for i in torch.randint(WORDS, (count,), generator=generator)]

    def image(size: Size) -> Image.Image:
        pixels = torch.randint(256, (*size, 3), generator=generator, dtype=torch.uint8)
        return Image.fromarray(np.asarray(pixels))

    first, second = family.images
    video = family.video is not None
    plans: list[tuple[list[Any], int]] = [
        ([*words(2), first, *words(3)], 4),
        ([*words(6)], 3),
        ([*words(1), second, *words(2), first, *words(3)], 5),
        (["video" if video else second, *words(2)], 1),
    ]
    return [_sample(family, processor(name), parts, words(answer), image, generator) for parts, answer in plans]


def _sample(
    family: Family,
    process: Any,
    parts: list[Any],
    answer: list[str],
    image: Callable[[Size], Image.Image],
    generator: torch.Generator,
) -> Sample:
    sizes = [part for part in parts if isinstance(part, tuple)]
    layouts = family.several if family.several and len(sizes) > 1 else family.images
    text, visual, tensors = [], "", {}
    for part in parts:
        if part == "video":
            assert family.video is not None
            video, tensors = family.video(generator)
            text.append(video)
            visual += family.video_layout
        elif isinstance(part, tuple):
            text.append(family.placeholder)
            visual += layouts[part]
        else:
            text.append(part)
            visual += "t"
    prompt = " ".join(text)
    if sizes:
        encoded = process(text=[prompt], images=[[image(size) for size in sizes]], return_tensors="pt")
        ids = encoded["input_ids"][0].tolist()
        text_only = ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids")
        tensors = {key: torch.as_tensor(value) for key, value in encoded.items() if key not in text_only}
    else:
        ids = process.tokenizer(prompt)["input_ids"]
    said = [ID[word] for word in answer]
    visual += "t" * len(said)
    return Sample(ids + said, [-100] * len(ids) + said, [c == "v" for c in visual], tensors)


def collate(name: str, samples: list[Sample], padding: str = "right") -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The samples as one padded batch, and which of its tokens are visual, (B, T) bool."""
    longest = max(len(sample.ids) for sample in samples)

    def padded(values: list[Any], fill: Any) -> list[Any]:
        gap = [fill] * (longest - len(values))
        return gap + values if padding == "left" else values + gap

    batch = {
        "input_ids": torch.tensor([padded(sample.ids, PAD) for sample in samples]),
        "labels": torch.tensor([padded(sample.labels, -100) for sample in samples]),
        "attention_mask": torch.tensor([padded([1] * len(sample.ids), 0) for sample in samples]),
        **visual_tensors(name, samples),
    }
    if name.startswith("qwen"):  # the models refuse to place images without the types of their tokens
        types = {ID["<|image_pad|>"]: 1, ID["<|video_pad|>"]: 2}
        batch["mm_token_type_ids"] = batch["input_ids"].clone().apply_(lambda token: types.get(token, 0))
    return batch, torch.tensor([padded(sample.visual, False) for sample in samples])


def visual_tensors(name: str, samples: list[Sample]) -> dict[str, torch.Tensor]:
    """Pixels and sizes of all samples, put together as the family's models expect them."""
    family = FAMILIES[name]
    result = {}
    for key in {key: None for sample in samples for key in sample.tensors}:
        given = [sample.tensors.get(key) for sample in samples]
        values = [value for value in given if value is not None]
        if key in family.tiled:
            tiles = max(value.shape[1] for value in values)
            if family.every_sample:
                values = [values[0][:, :1] * 0 if value is None else value for value in given]
            values = [torch.cat((v, v.new_zeros(len(v), tiles - v.shape[1], *v.shape[2:])), 1) for v in values]
        result[key] = torch.cat(values)
    return result


@dataclass(frozen=True)
class Packed:
    """A batch whose rows hold several samples each."""

    batch: dict[str, torch.Tensor]  # for the model: position_ids, and no attention_mask
    real: torch.Tensor  # (B, T) bool, False where the end of a row is filled up
    spans: list[tuple[int, int, int]]  # row, start and stop of every sample
    visual: torch.Tensor  # (B, T) bool


def pack(name: str, samples: list[Sample], rows: list[list[int]], model: Any) -> Packed:
    """The samples with these indices one after the other in each row; ``model`` gives multimodal positions where it has some.

    What fills up the shorter rows counts as a sequence of its own.
    """
    length = max(sum(len(samples[i].ids) for i in row) for row in rows)
    batch: dict[str, list[Any]] = {"input_ids": [], "labels": [], "position_ids": []}
    spans, visual, real = [], [], []
    for row in rows:
        lengths = [len(samples[i].ids) for i in row]
        gap = length - sum(lengths)
        starts = np.cumsum([0, *lengths]).tolist()
        spans += [(len(real), start, start + size) for start, size in zip(starts, lengths, strict=False)]
        batch["input_ids"].append(_joined(samples[i].ids for i in row) + [PAD] * gap)
        batch["labels"].append(_joined(samples[i].labels for i in row) + [-100] * gap)
        visual.append(_joined(samples[i].visual for i in row) + [False] * gap)
        real.append([True] * (length - gap) + [False] * gap)
        positions = [_positions(name, samples[i], model) for i in row]
        filling = torch.arange(gap).expand(len(positions[0]), -1)
        batch["position_ids"].append(torch.cat((*positions, filling), 1))
    tensors = {key: torch.tensor(batch[key]) for key in ("input_ids", "labels")}
    tensors["position_ids"] = torch.stack(batch["position_ids"], 1)
    if len(tensors["position_ids"]) == 1:
        tensors["position_ids"] = tensors["position_ids"][0]
    tensors |= visual_tensors(name, [samples[i] for row in rows for i in row])
    return Packed(tensors, torch.tensor(real), spans, torch.tensor(visual))


def _joined(parts: Iterable[list[Any]]) -> list[Any]:
    return list(chain.from_iterable(parts))


def _positions(name: str, sample: Sample, model: Any) -> torch.Tensor:
    """(1, T) positions of one sample, or (4, T) with those of time, height and width."""
    text = torch.arange(len(sample.ids))[None]
    if not name.startswith("qwen"):
        return text
    batch, _ = collate(name, [sample])
    if not sample.tensors:
        return text.expand(4, -1)
    grids = {key: batch.get(key) for key in ("image_grid_thw", "video_grid_thw")}
    positions, _ = model.model.get_rope_index(batch["input_ids"], batch["mm_token_type_ids"], **grids)
    return torch.cat((text, positions[:, 0]))


def without_visual(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The second sample of a batch alone, which holds words only, without its padding."""
    real = batch["attention_mask"][1].bool()
    return {key: batch[key][1:2, real] for key in ("input_ids", "labels", "attention_mask")}
