"""Samples a second that two workers read: 640x480 JPEGs to 384x384 pixels, conversations to tokens and labels.

`python -m pytest benchmarks/bench_data_loader.py`, about 2 minutes on two cores. Beside ours: PIL alone (decoding and
bicubic resizing) in as many processes, and transformers' processor with the same text in the same loader.
"""

import io
import json
import statistics
import time

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.utils.data import DataLoader, Dataset
from transformers import LlavaConfig, PreTrainedTokenizerFast, SiglipVisionConfig

from benchmarks._data_open import made_records, photo
from cdistill.data.batches import PaddingCollator
from cdistill.data.conversations import Encoder
from cdistill.data.dataset import BadSampleCollator, SampleDataset
from cdistill.data.llava import LlavaJson
from cdistill.data.mix import Order
from cdistill.models.processor import build_processor

pytestmark = pytest.mark.long

SIDE, WORKERS, BATCH = 384, 2, 8
IMAGES, SAMPLES, ROUNDS = 32, 320, 5
MARKS = ["<pad>", "</s>", "<image>"]
LEAST = 60.0  # samples a second, with two workers on two cores


def tokenizer(texts):
    """Byte-level BPE, trained on the texts."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=16_000, special_tokens=MARKS, show_progress=False)
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", extra_special_tokens={"image_token": "<image>"}
    )


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """Processor, source and encoder of a set with an image in every sample."""
    folder = tmp_path_factory.mktemp("set")
    for i in range(IMAGES):
        (folder / f"{i}.jpg").write_bytes(photo(640, 480, seed=i))
    records = [record | {"image": f"{i % IMAGES}.jpg"} for i, record in enumerate(made_records(SAMPLES))]
    for record in records:
        first = record["conversations"][0]
        first["value"] = "<image>\n" + first["value"].removeprefix("<image>\n")
    (folder / "set.json").write_text(json.dumps(records))
    vision = SiglipVisionConfig(image_size=SIDE, patch_size=14)
    texts = [turn["value"] for record in records for turn in record["conversations"]]
    words = tokenizer(texts)
    config = LlavaConfig(
        vision_config=vision,
        image_token_index=words.convert_tokens_to_ids("<image>"),
        image_seq_length=(SIDE // 14) ** 2,
        vision_feature_select_strategy="full",
    )
    processor = build_processor(config, words, "student")
    source = LlavaJson(folder / "set.json")
    return folder, processor, source, Encoder(processor, "vicuna_v1", 2048)


class Images(Dataset):
    """Images decoded and resized by PIL, and nothing else."""

    def __init__(self, folder):
        self.folder = folder

    def __len__(self):
        return SAMPLES

    def __getitem__(self, index):
        data = (self.folder / f"{index % IMAGES}.jpg").read_bytes()
        image = Image.open(io.BytesIO(data)).convert("RGB")
        return np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BICUBIC))


class Plain(Dataset):
    """Images by PIL, and texts, for transformers' processor: no labels."""

    def __init__(self, folder, source, encoder, order):
        self.folder, self.source, self.encoder, self.order = folder, source, encoder, order

    def __len__(self):
        return SAMPLES

    def __getitem__(self, number):
        sample = self.source[self.order[number]]
        return self.encoder.template(sample.messages).text, Image.open(sample.images[0].path).convert("RGB")


def test_samples_a_second(benchmark, cpu_environment, target, loaded):
    folder, processor, source, encoder = loaded
    order = Order(source, 0)
    ours = SampleDataset(source, order, encoder, size=SAMPLES, seed=0, about=SIDE)
    plain = Plain(folder, source, encoder, order)

    def processed(items):
        texts, images = zip(*items, strict=True)
        batch = processor(text=list(texts), images=[[image] for image in images], padding=True, return_tensors="pt")
        return dict(batch)

    ways = {
        "cdistill": (ours, BadSampleCollator(PaddingCollator(encoder.pad_token_id))),
        "transformers' processor, without labels": (plain, processed),
        "PIL alone": (Images(folder), lambda images: torch.from_numpy(np.stack(images))),
    }
    batch, expected = (ways[name][1]([ways[name][0][i] for i in range(BATCH)]) for name in list(ways)[:2])
    for name in ("input_ids", "attention_mask", "pixel_values"):
        assert torch.equal(batch[name], expected[name]), name
    rates: dict[str, list[float]] = {name: [] for name in ways}

    def turn():
        for name, (data, collate) in ways.items():
            loader = DataLoader(data, BATCH, num_workers=WORKERS, collate_fn=collate, prefetch_factor=4)
            batches = iter(loader)
            for _ in range(WORKERS):  # the workers have started
                next(batches)
            start = time.perf_counter()
            read = sum(1 for _ in batches)
            rates[name].append(read * BATCH / (time.perf_counter() - start))

    benchmark.pedantic(turn, rounds=ROUNDS)
    medians = {name: statistics.median(found) for name, found in rates.items()}
    tokens = batch["attention_mask"].sum(1).float().mean().item()
    benchmark.extra_info.update(
        cpu_environment,
        workers=WORKERS,
        samples_per_s=medians,
        times_pil={name: rate / medians["PIL alone"] for name, rate in medians.items()},
        mean_tokens=tokens,
    )
    target("samples a second", medians["cdistill"], at_least=LEAST)
