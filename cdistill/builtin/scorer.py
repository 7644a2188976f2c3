"""Accuracy of a model on held-out scenes of the built-in task, per kind of question."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from cdistill.builtin import questions
from cdistill.builtin.dataset import BuiltinDataset, Collator
from cdistill.builtin.task import SUBTYPES, BuiltinTask
from cdistill.choices import MOST_DRAWN, require_count
from cdistill.data.samples import IGNORE_INDEX
from cdistill.errors import InputError

FAMILIES: dict[str, tuple[str, ...]] = {
    "recognition": questions.RECOGNITION,
    "compositional": questions.COMPOSITIONAL,
}


def held_out_questions(
    subtype: str,
    *,
    n: int,
    seed: int = 0,
    modality: str = "image",
    tokenizer: PreTrainedTokenizerFast | None = None,
    pairs: str = "all",
) -> BuiltinDataset:
    """``n`` single questions of one kind, each about its own held-out scene; no two kinds share their scenes.

    ``pairs``: of colour and shape, see `BuiltinTask`.
    """
    return BuiltinDataset(
        BuiltinTask(modality=modality, turns=1, subtypes=(subtype,), pairs=pairs),
        size=n,
        seed=seed * len(SUBTYPES) + SUBTYPES.index(subtype),
        tokenizer=tokenizer,
        held_out=True,
    )


def batches(data: BuiltinDataset, batch_size: int) -> Iterator[dict[str, Tensor]]:
    """Collated batches of a dataset, in order."""
    collate = Collator(data.tokenizer.pad_token_id)
    for start in range(0, len(data), batch_size):
        yield collate([data[i] for i in range(start, min(start + batch_size, len(data)))])


@torch.no_grad()
def predict(
    model: PreTrainedModel, batch: dict[str, Tensor], *, eos_token_id: int
) -> list[tuple[list[int], list[int]]]:
    """Predicted and right answer tokens of every sample of a batch of single questions.

    The right answer is fed to the model, whose most likely token over the whole vocabulary is read off at each position
    that predicts an answer token: prediction and right answer are equal if and only if greedy decoding starts with the
    right answer. ``batch`` holds ``input_ids``, ``labels`` and ``attention_mask`` (B, T), and ``pixel_values``
    (B, 3, H, W) where the questions are about images.
    """
    device = next(model.parameters()).device
    inputs = {name: value.to(device) for name, value in batch.items() if name != "labels"}
    if "pixel_values" in inputs:
        inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    targets = batch["labels"][:, 1:]
    answers = (targets != IGNORE_INDEX) & (targets != eos_token_id)
    hidden = model.model(**inputs, use_cache=False).last_hidden_state[:, :-1][answers.to(device)]
    predicted = model.get_output_embeddings()(hidden).argmax(-1).tolist()
    right = targets[answers].tolist()
    result, start = [], 0
    for length in answers.sum(1).tolist():
        result.append((predicted[start : start + length], right[start : start + length]))
        start += length
    return result


def standard_error(accuracy: float, n: int) -> float:
    """Standard error of an accuracy measured on n independent questions: sqrt(p (1 - p) / n)."""
    return math.sqrt(accuracy * (1.0 - accuracy) / n)


def standard_error_of_mean(errors: Sequence[float]) -> float:
    """Standard error of the mean of independent measurements with the given standard errors."""
    return math.sqrt(sum(e * e for e in errors)) / len(errors)


def evaluate(
    model: PreTrainedModel,
    *,
    n: int = 500,
    seed: int = 0,
    modality: str = "image",
    batch_size: int = 100,
    tokenizer: PreTrainedTokenizerFast | None = None,
) -> dict[str, Any]:
    """Accuracy on held-out scenes, drawn fresh from ``seed``: ``n`` single questions of every kind.

    Args:
        model: LLaVA for ``modality="image"``; any causal language model for ``"text"``, where the scene is written out.
        n: questions per kind.
        seed: seed of scenes, questions and pixel noise.
        modality: ``image`` or ``text``.
        batch_size: questions per forward pass.
        tokenizer: the model's, if it is not the built-in one.

    Returns:
        ``recognition`` and ``compositional``: accuracy in 0..1 by sub-type, and their mean under ``avg``;
        ``standard_error`` and ``constant_answer`` (score of giving the most frequent answer every time): the same two
        tables; ``n`` and ``seed``.

    Raises:
        ValueError: n or batch_size is not positive, or the model cannot see images.
    """
    for name, value in (("n", n), ("batch_size", batch_size)):
        require_count(name, value, MOST_DRAWN)
    if modality == "image" and not hasattr(model.config, "vision_config"):
        raise InputError("modality must be text for a model without a vision encoder, got 'image'")
    was_training = model.training
    model.eval()
    result: dict[str, Any] = {"standard_error": {}, "constant_answer": {}, "n": n, "seed": seed}
    for family, subtypes in FAMILIES.items():
        accuracies, errors, constant = {}, {}, {}
        for subtype in subtypes:
            data = held_out_questions(subtype, n=n, seed=seed, modality=modality, tokenizer=tokenizer)
            eos = data.tokenizer.eos_token_id
            answered = [pair for batch in batches(data, batch_size) for pair in predict(model, batch, eos_token_id=eos)]
            accuracies[subtype] = sum(predicted == right for predicted, right in answered) / n
            errors[subtype] = standard_error(accuracies[subtype], n)
            constant[subtype] = Counter(tuple(right) for _, right in answered).most_common(1)[0][1] / n
        accuracies["avg"] = sum(accuracies.values()) / len(subtypes)
        errors["avg"] = standard_error_of_mean(list(errors.values()))
        constant["avg"] = sum(constant.values()) / len(subtypes)
        result[family] = accuracies
        result["standard_error"][family], result["constant_answer"][family] = errors, constant
    model.train(was_training)
    return result
