"""Models that are large enough for tensors to dominate, and the peak of tensor memory in the steps of a real run."""

import gc
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any
from unittest import mock

import pytest
import torch
from builtin_models import llava, recipe_values, text_config
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, TrainerCallback

from cdistill.builtin.dataset import build_tokenizer
from cdistill.data.samples import IGNORE_INDEX, IMAGE_TOKEN
from cdistill.train import prepare, run
from cdistill.train.recipes import Recipe, recipe_from_dict

VISUAL = 256
VISION = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 3, "num_attention_heads": 4}
VISION |= {"image_size": 128, "patch_size": 8}
STUDENT = {"vocab_size": 16000, "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4}
STUDENT |= {"num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 4096}
TEACHER = STUDENT | {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 6}
TEACHER |= {"num_key_value_heads": 6}


def save_models(folder, **changes: Any):
    """A student base and a teacher of these shapes, with tokenizers; ``changes`` are of both text configurations."""
    torch.manual_seed(0)
    teacher = llava(vision=VISION, **(TEACHER | {"tie_word_embeddings": False} | changes))
    teacher.config.image_seq_length = VISUAL
    teacher.save_pretrained(folder / "teacher")
    base = AutoModelForCausalLM.from_config(text_config(**(STUDENT | {"tie_word_embeddings": False} | changes)))
    base.save_pretrained(folder / "base")
    for name in ("teacher", "base"):
        build_tokenizer().save_pretrained(folder / name)
    return folder


@dataclass
class Batches:
    """The only batch of a run: its samples are all alike, ``answers`` labelled tokens at the end of ``length``."""

    length: int
    answers: int

    def __len__(self) -> int:
        return 10**6

    def __getitem__(self, index: int) -> int:
        if index >= len(self):
            raise IndexError(index)
        return index

    def collate(self, items: list[int]) -> dict[str, torch.Tensor]:
        ids = torch.randint(6, 60, (len(items), self.length))
        ids[:, :VISUAL] = build_tokenizer().convert_tokens_to_ids(IMAGE_TOKEN)
        labels = torch.full_like(ids, IGNORE_INDEX)
        labels[:, -self.answers :] = ids[:, -self.answers :]
        size = VISION["image_size"]
        return {"input_ids": ids, "labels": labels, "pixel_values": torch.randn(len(items), 3, size, size)}


def tensor_bytes() -> int:
    """Bytes of all tensors that Python knows of."""
    tensors = [x for x in gc.get_objects() if issubclass(type(x), torch.Tensor)]  # isinstance calls lazy proxies
    return sum({pointer: size for pointer, size in map(_storage, tensors) if pointer}.values())


def _storage(x: torch.Tensor) -> tuple[int, int]:
    """Where a tensor's bytes lie and how many they are; (0, 0) for meta tensors and what a compiler or a plan has made up."""
    try:
        storage = x.untyped_storage()
        return storage.data_ptr(), storage.nbytes()
    except (RuntimeError, NotImplementedError):
        return 0, 0


class SecondSteps(TrainerCallback):
    """Most bytes that tensors hold at one time in the second step of every stage, less what they held before the run.

    What they hold when it begins is counted, and a profile of torch's CPU allocator tells what comes and goes: it misses
    what gloo's threads free, and would add that up from step to step. One-off allocations of the first step are left out.
    """

    def __init__(self) -> None:
        gc.collect()  # what an earlier run has left would be freed inside
        self.before, self.peaks = tensor_bytes(), []

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 1:
            self.held = tensor_bytes() - self.before
            self.profiler = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
            self.profiler.start()

    def on_train_end(self, args, state, control, **kwargs):
        self.profiler.stop()
        events = [e for e in self.profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
        changes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]
        self.peaks.append(self.held + max(accumulate(changes, initial=0)))
        del self.profiler


def recipe_of(output, models, **changes: Any) -> Recipe:
    values = recipe_values(output, models, **{"vat__rows": "answer", **changes})
    for section in values["stage"].values():
        section["global_batch_size"] = 2
        section["samples"] = 4
    return recipe_from_dict(values)


@contextmanager
def no_products() -> Iterator[None]:
    """Products of matrices are zeros: how many bytes tensors hold depends on no value, and products are most of the time."""

    def mm(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return a.new_empty(a.shape[0], b.shape[1]).zero_()

    def addmm(
        bias: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *, beta: float = 1, alpha: float = 1
    ) -> torch.Tensor:
        return mm(a, b)

    with (
        torch.library._scoped_library("aten", "IMPL") as library,
        warnings.catch_warnings(),
        mock.patch("cdistill.ops._vocabulary.multiplies", return_value=True),  # nothing is widened for want of bf16
        mock.patch("cdistill.ops._engines_torch.multiplies", return_value=True),
    ):
        warnings.simplefilter("ignore", UserWarning)  # that an op of torch's is replaced
        library.impl("mm", mm, "CPU")
        library.impl("addmm", addmm, "CPU")
        yield


def measured_peaks(recipe: Recipe, batches: Batches, monkeypatch) -> dict[str, int]:
    """Most bytes that tensors hold at one time in the second step of every stage."""
    monkeypatch.setattr(prepare, "open_stage", lambda *_: (batches, batches.collate))
    steps = SecondSteps()
    with no_products():
        run(recipe, callbacks=[steps])
    return dict(zip(recipe.stages, steps.peaks, strict=True))


def lingering(collective: Any) -> Any:
    """A collective that returns after gloo's thread has let go of its tensors: the profiler sees what this thread frees."""

    def call(*args: Any, **kwargs: Any) -> Any:
        result = collective(*args, **kwargs)
        time.sleep(0.02)
        return result

    return call


def peaks_of_a_rank(recipe: Recipe, batches: Batches) -> dict[str, int]:
    """The measured peaks of one of several processes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.distributed, "all_reduce", lingering(torch.distributed.all_reduce))
        return measured_peaks(recipe, batches, patch)
