"""A byte-level tokenizer split as Qwen's is, processors of all families with it, and conversations about images."""

from collections.abc import Sequence
from functools import cache
from typing import Any
from unittest.mock import patch

import family_table
import numpy as np
from family_table import FAMILIES
from PIL import Image
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from cdistill.data.samples import Mark, Message

QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
ENDS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
SENTENCES = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, and "
    "polite answers to the user's questions. USER: How many? ASSISTANT: A red ring. One.",
    "USER:\nsystem\nuser\nassistant\nYou are a helpful assistant.\nWhat is in the picture?\nHow many?\nA red ring.\nOne.\n",
)

Turn = tuple[tuple[str | Mark, ...], str]


@cache
def _trained() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(QWEN_SPLIT), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(SENTENCES, trainers.BpeTrainer(initial_alphabet=alphabet, show_progress=False))
    return tokenizer.to_str()


def byte_level_tokenizer(**named: str) -> PreTrainedTokenizerFast:
    """Every word of `SENTENCES` is one token, with the space before it, and every mark of every family is, too."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_trained()),
        pad_token="<pad>",
        eos_token="</s>",
        **({"extra_special_tokens": named} if named else {}),
    )
    marks = [mark for mark in (*family_table._NAMED.values(), *ENDS) if mark not in named.values()]
    tokenizer.add_tokens(marks, special_tokens=True)
    return tokenizer


@cache
def byte_level_processor(name: str) -> Any:
    """The family's processor with that tokenizer."""
    with patch.object(family_table, "tokenizer", byte_level_tokenizer):
        return FAMILIES[name].processor()


def conversation(*turns: Turn) -> list[Message]:
    """Messages of a conversation of questions and answers."""
    return [m for question, answer in turns for m in (Message("user", question), Message("assistant", (answer,)))]


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def drawn(name: str) -> list[tuple[list[Message], list[Image.Image]]]:
    """Five conversations: an image in the first turn, words alone, images in several turns, one late, and two in one turn."""
    first, second = (picture(*size, seed) for seed, size in enumerate(FAMILIES[name].images))
    image = Mark.IMAGE
    return [
        (conversation(((image, "\nw1 w2 w3"), "w4 w5"), (("w6",), "w7 w8 w9")), [first]),
        (conversation((("w1 w3",), "w5")), []),
        (
            conversation(((image, "w2", image, "w3"), "w9 w1"), (("w4", image), "w2"), (("w0",), "w3 w3")),
            [second, first, first],
        ),
        (conversation((("w7",), "w8 w6"), ((image, "w5 w6"), "w7 w1")), [second]),
        (conversation((("w8 ", image, " w1 ", image), "w2 w4 w6 w8")), [first, second]),
    ]


def runs(labels: Sequence[int]) -> list[list[int]]:
    """The labelled tokens, each stretch of them by itself."""
    found: list[list[int]] = [[]]
    for label in labels:
        if label != -100:
            found[-1].append(label)
        elif found[-1]:
            found.append([])
    return [run for run in found if run]
