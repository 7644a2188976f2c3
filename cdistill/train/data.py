"""Datasets and collators of the stages, on the built-in task."""

import random
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset

from cdistill.data.batches import PaddingCollator
from cdistill.data.builtin import IMAGE_TOKEN, BuiltinDataset, Collator, build_tokenizer
from cdistill.data.conversations import ConversationDataset, Encoder
from cdistill.data.grouping import length_grouped
from cdistill.data.render import patch_labels, render
from cdistill.data.scenes import sample_scene
from cdistill.train.build import Models
from cdistill.train.config import Recipe


class PatchDataset(Dataset):
    """``size`` images with the labels of every patch: ``pixel_values`` (3, H, W) fp32 and ``labels`` (V, 3) int64."""

    def __init__(self, *, size: int, seed: int) -> None:
        self.size, self.seed = size, seed

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < self.size:
            raise IndexError(index)
        rng = random.Random(f"{self.seed}/{index}/patch")
        scene = sample_scene(rng)
        pixels = render(scene, np.random.default_rng(rng.getrandbits(64)))
        return {"pixel_values": torch.from_numpy(pixels), "labels": torch.from_numpy(patch_labels(scene))}


def collate_patches(items: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """(B, 3, H, W) images and (B, V, 3) labels."""
    return {name: torch.stack([item[name] for item in items]) for name in items[0]}


def stage_seed(recipe: Recipe, index: int) -> int:
    """Seed of the samples of the stage at a place in the recipe's list."""
    seed = recipe.stage[recipe.stages[index]].data.seed
    return recipe.seed * 1000 + index if seed is None else seed


def stage_dataset(recipe: Recipe, index: int, models: Models) -> tuple[Dataset, Any]:
    """Dataset and collator of the stage at a place in the recipe's list.

    Raises:
        ValueError: the tokenizer does not have the words of the built-in task, or the processor no chat template.
    """
    stage = recipe.stage[recipe.stages[index]]
    size, seed = stage.steps * stage.global_batch_size, stage_seed(recipe, index)
    if stage.objective == "vision":
        return PatchDataset(size=size, seed=seed), collate_patches
    tokenizer: Any = models.tokenizer
    vocabulary = tokenizer.get_vocab()
    for word in build_tokenizer().get_vocab():
        if word not in vocabulary and word != IMAGE_TOKEN:
            raise ValueError(
                f"stage.{recipe.stages[index]}.data needs the built-in tokenizer: there is no token {word!r}"
            )
    source = BuiltinDataset(
        stage.data, size=size, seed=seed, tokenizer=tokenizer, grounding=stage.objective == "ground"
    )
    data: Dataset = source
    collate: Any = Collator(tokenizer.pad_token_id)
    if models.reader is not None:
        encoder = Encoder(models.reader)
        data, collate = ConversationDataset(source, encoder), PaddingCollator(encoder.pad_token_id)
    if recipe.group_by_length:
        data = Subset(data, length_grouped([source.length(i) for i in range(size)], stage.global_batch_size, seed))
    return data, collate
