"""What models answer, in batches: greedy replies, and log-likelihoods of given ones.

The tokens that all prompts about the same images begin with run once, the images among them; the keys and values they leave
are the past of every prompt. Where a shorter beginning was padded that past has a gap, which is masked and not counted in
positions. Not every family can do this: `Inference.find_way` tries a model, and what it cannot do is not done.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping, Sequence
from itertools import takewhile
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from cdistill.data.batches import joined_images
from cdistill.errors import InputError
from cdistill.eval.contract import Question
from cdistill.eval.prompts import Prompt, Prompts
from cdistill.models.folder import one_line
from cdistill.models.load import Model

# From the fastest to the one that every family can: beginnings that run once, prompts that are padded, prompts of one length.
WAYS = ("shared", "padded", "equal")
SHARED_TYPES = {"mm_token_type_ids"}  # others may tell attention what sees what
WORTH = 0.75  # of the tokens at most, or sharing is not worth a pass of its own
# By how much two ways may differ, in units of the dtype's rounding and of what batches of one prompt differ from one by one.
ROUNDINGS, NOISES = 16.0, 4.0
MOST_ROUNDING = 0.25  # nats: in bf16 a mask or a position that is wrong must not pass for rounding
FAILURES = (AssertionError, AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError)
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "max_length")


class Reply(NamedTuple):
    """Generated text, the number of its tokens (without the one that ended it), and whether it was cut."""

    text: str
    tokens: int
    cut: bool


class Begun(NamedTuple):
    """Prompts whose beginnings have run: the tokens left of each, and of that past the cache, the mask and its end."""

    left: list[list[int]]
    cache: Any
    ids: Tensor  # (B, P)
    mask: Tensor  # (B, P)
    positions: Tensor  # (B,) of the first token left


class Inference:
    """A model in eval mode that answers prompts.

    Results are those of one prompt at a time, without padding and without a past, up to rounding. Log-probabilities are taken
    over the whole vocabulary, in fp32 (of a model in fp64 in fp64).

    Args:
        model: a causal language model or an image-text model of transformers.
        prompts: how questions become tokens for it.
        way: one of `WAYS`, how batches are made.

    Attributes:
        stops: tokens that end a reply: the model's, and what its chat template closes an answer with.
        passes: forward passes so far.
        cache_name: what the model calls its past, as an argument and in its output.
    """

    def __init__(self, model: Model, prompts: Prompts, way: str = "shared") -> None:
        self.model, self.prompts, self.way = model.eval(), prompts, way
        self.device = model.get_input_embeddings().weight.device
        self.passes = 0
        self._worth = WORTH
        parameters = inspect.signature(model.forward).parameters
        self.cache_name = "cache" if "cache" in parameters else "past_key_values"  # transformers 5.24 renamed it
        self._keeps_logits = "logits_to_keep" in parameters
        if "position_ids" not in parameters and way == "shared":
            self.way = "padded"
        own = model.generation_config.eos_token_id
        known = [] if own is None else [own] if isinstance(own, int) else list(own)
        self.stops = list(dict.fromkeys([*known, *prompts.stops]))
        if not self.stops and prompts.tokenizer.eos_token_id is not None:
            self.stops = [prompts.tokenizer.eos_token_id]
        self._configs: dict[int, Any] = {}  # by max_new_tokens
        self._greedy = copy.deepcopy(model.generation_config)
        self._greedy.update(**dict.fromkeys(_SAMPLING), do_sample=False, num_beams=1, eos_token_id=self.stops or None)
        self._greedy.pad_token_id = self.stops[0] if self.stops else prompts.tokenizer.pad_token_id

    @torch.no_grad()
    def generate(self, prompts: Sequence[Prompt]) -> list[Reply]:
        """Greedy replies, each until the model ends it or its ``max_new_tokens``: those of transformers' ``generate``."""
        replies: dict[int, Reply] = {}
        for limit in sorted({prompt.max_new_tokens for prompt in prompts}):
            chosen = [i for i, prompt in enumerate(prompts) if prompt.max_new_tokens == limit]
            for part in self._parts(chosen, prompts):
                made = self._generate([prompts[i] for i in part], limit).tolist()
                replies |= zip(part, (self._reply(tokens, limit) for tokens in made), strict=True)
        return [replies[i] for i in range(len(prompts))]

    @torch.no_grad()
    def log_likelihoods(self, prompts: Sequence[Prompt]) -> list[float]:
        """Log-likelihood in nats of each prompt's continuation as the model's turn: the sum over its tokens."""
        sums: dict[int, float] = {}
        for part in self._parts(range(len(prompts)), prompts):
            sums |= zip(part, self._log_likelihoods([prompts[i] for i in part]), strict=True)
        return [sums[i] for i in range(len(prompts))]

    def find_way(self, ways: Sequence[str] = WAYS) -> str:
        """Try the model on made-up questions, and settle on the fastest of ``ways`` that gives what one prompt at a time does.

        Raises:
            ValueError: it does not answer one prompt at a time either.
        """
        asked = _made_up(self.prompts)
        self.way = "equal"
        try:
            expected = torch.cat([self._measure([prompt]) for prompt in asked], 1)
            again = torch.cat([self._measure([prompt] * 2)[:, :1] for prompt in asked], 1)
        except FAILURES as error:
            raise InputError(f"model: {type(self.model).__name__} answers no question: {one_line(error)}") from None
        if expected.isnan().any():
            raise InputError(
                f"model: {type(self.model).__name__} gives no numbers in {self.model.dtype}; take --dtype fp32 or bf16, or see "
                "whether its weights are whole"
            )
        self._worth = 1.0  # it is to be tried
        for way in ways[:-1]:
            self.way = way
            try:
                found = self._measure(asked)
            except FAILURES:  # of a family that does not take a past, positions or padding
                continue
            if self.way == way and same_but_for_rounding(found, expected, again, self.model.dtype):
                break
        else:
            self.way = ways[-1]
        self._worth = WORTH
        return self.way

    @torch.no_grad()
    def _measure(self, prompts: list[Prompt]) -> Tensor:
        """(3, B) log-likelihoods of the continuations, and the highest log-probabilities of the first two tokens generated."""
        steps = self._generate(prompts, 2, min_new_tokens=2, return_dict_in_generate=True, output_logits=True).logits
        generated = [step.double().cpu().log_softmax(-1).amax(-1) for step in steps]
        return torch.stack([torch.tensor(self._log_likelihoods(prompts), dtype=torch.float64), *generated])

    def _parts(self, chosen: Sequence[int], prompts: Sequence[Prompt]) -> list[list[int]]:
        """All of the chosen, or those of one length together."""
        if self.way != "equal":
            return [list(chosen)] if chosen else []
        by_length: dict[int, list[int]] = {}
        for i in chosen:
            by_length.setdefault(len(prompts[i].ids) + len(prompts[i].continuation), []).append(i)
        return list(by_length.values())

    def _generate(self, prompts: list[Prompt], limit: int, **options: Any) -> Any:
        """(B, T) tokens of replies, filled up behind their ends, or what ``options`` of ``generate`` ask for."""
        rows = [prompt.ids for prompt in prompts]
        begun = self._begin(prompts, rows)
        if begun is None:
            inputs = self.inputs(prompts, rows, left=True)
        else:
            inputs = self._continued(prompts, begun, left=True)
            inputs["input_ids"] = torch.cat((begun.ids, inputs["input_ids"]), 1)
            past = begun.ids.new_zeros(*inputs["position_ids"].shape[:-1], begun.ids.shape[1])  # which has run
            inputs["position_ids"] = torch.cat((past, inputs["position_ids"]), -1)
        config = self._configs.get(limit)
        if config is None or options:
            config = copy.deepcopy(self._greedy)
            config.update(max_new_tokens=limit, **options)
        if not options:
            self._configs[limit] = config
        made = self.write(prompts, inputs, config)
        if options:
            return made
        made = made[:, inputs["input_ids"].shape[1] :]
        self.passes += made.shape[1]
        return made

    def _reply(self, tokens: list[int], limit: int) -> Reply:
        said = list(takewhile(lambda token: token not in self.stops, tokens))
        return Reply(self.prompts.reply(said), len(said), len(said) == limit)

    def _log_likelihoods(self, prompts: list[Prompt]) -> list[float]:
        sums = []
        for scores, prompt in zip(self._scores(prompts), prompts, strict=True):
            scores = (scores if scores.dtype == torch.float64 else scores.float()).log_softmax(-1)
            said = torch.tensor(prompt.continuation, device=scores.device)
            sums.append(float(scores.gather(1, said[:, None]).double().sum()))
        return sums

    @torch.no_grad()
    def forced(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """The most likely token at each place of a continuation, behind the continuation's own tokens.

        They are the continuation if and only if greedy decoding begins with it.
        """
        return [scores.argmax(-1).tolist() for scores in self._scores(list(prompts))]

    @torch.no_grad()
    def chosen(self, prompts: Sequence[Prompt], choices: Sequence[Sequence[int]]) -> list[tuple[list[int], int]]:
        """What `forced` gives, and of each prompt's choices, one token each, the one with the highest log-likelihood."""
        result = []
        for scores, allowed in zip(self._scores(list(prompts)), choices, strict=True):
            best = allowed[int(scores[0][list(allowed)].argmax())]
            result.append((scores.argmax(-1).tolist(), best))
        return result

    def _scores(self, prompts: list[Prompt]) -> Iterator[Tensor]:
        """Of each prompt the logits (L, V) of its continuation's L tokens."""
        rows = [prompt.ids + prompt.continuation for prompt in prompts]
        begun = self._begin(prompts, rows)
        if begun is None:
            inputs: dict[str, Any] = self.inputs(prompts, rows) | {"use_cache": False}
        else:
            inputs = self._continued(prompts, begun)
        left = rows if begun is None else begun.left
        stops = [len(row) - 1 for row in left]  # the last token predicts nothing that is asked for
        starts = [stop - len(prompt.continuation) for stop, prompt in zip(stops, prompts, strict=True)]
        kept = torch.tensor(sorted({i for a, b in zip(starts, stops, strict=True) for i in range(a, b)}))
        self.passes += 1
        logits = self.answer_logits(prompts, inputs, kept)
        for row, start, stop in zip(logits, starts, stops, strict=True):
            yield row[torch.searchsorted(kept, torch.arange(start, stop)).to(row.device)]

    def write(self, prompts: Sequence[Prompt], inputs: Mapping[str, Any], config: Any) -> Any:
        """What ``generate`` gives for prompts whose ``inputs`` are made; a subclass may run the model another way."""
        return self.model.generate(**inputs, generation_config=config)

    def answer_logits(self, prompts: Sequence[Prompt], inputs: Mapping[str, Any], kept: Tensor) -> Tensor:
        """`logits` of prompts with their continuations; a subclass may run the model another way."""
        return self.logits(inputs, kept)

    def logits(self, inputs: Mapping[str, Any], kept: Tensor) -> Tensor:
        """Logits (B, K, V) of the K positions ``kept``, which are the same in every row."""
        if self._keeps_logits:
            return self.model(**inputs, logits_to_keep=kept.to(self.device)).logits
        return self.model(**inputs).logits[:, kept.to(self.device)]

    def _begin(self, prompts: list[Prompt], rows: list[list[int]]) -> Begun | None:
        """Run what rows of prompts about the same images begin with; None where that is not to be done."""
        if self.way != "shared" or any(prompt.types.keys() - SHARED_TYPES for prompt in prompts):
            return None
        groups: dict[Any, list[int]] = {}
        for i, prompt in enumerate(prompts):
            groups.setdefault(prompt.seen or tuple(prompt.ids), []).append(i)
        counts = [common_beginning([prompts[i] for i in group]) for group in groups.values()]
        whole = sum(map(len, rows))
        spared = sum(count * (len(group) - 1) for count, group in zip(counts, groups.values(), strict=True))
        if not all(counts) or whole - spared > self._worth * whole:
            return None
        firsts = [prompts[group[0]] for group in groups.values()]
        inputs = self.inputs(firsts, [first.ids[:count] for first, count in zip(firsts, counts, strict=True)])
        inner: Any = getattr(self.model, "model", None)
        if hasattr(inner, "rope_deltas"):
            inner.rope_deltas = None  # of an earlier batch
        self.passes += 1
        made = self.model(**inputs, use_cache=True, **({"logits_to_keep": 1} if self._keeps_logits else {}))
        cache = getattr(made, self.cache_name, None)
        if cache is None or not all(type(layer) is DynamicLayer for layer in cache.layers):
            self.way = "padded"  # states and windows cannot begin anew behind a gap
            return None
        place = {i: g for g, group in enumerate(groups.values()) for i in group}
        source = torch.tensor([place[i] for i in range(len(prompts))])
        cache.batch_select_indices(source)
        left = [row[counts[place[i]] :] for i, row in enumerate(rows)]
        positions = torch.tensor(counts)
        deltas = getattr(inner, "rope_deltas", None)
        if deltas is not None:  # an image takes fewer positions than tokens
            positions = positions + deltas.to("cpu")[:, 0]
        selected = (
            x.to(self.device)[source.to(self.device)]
            for x in (inputs["input_ids"], inputs["attention_mask"], positions)
        )
        return Begun(left, cache, *selected)

    def inputs(self, prompts: list[Prompt], rows: list[list[int]], *, left: bool = False) -> dict[str, Tensor]:
        """Token rows that show the prompts' images, padded, as the model takes them."""
        ids, mask = padded(rows, [self._filler(prompt) for prompt in prompts], left=left)
        inputs = {"input_ids": ids, "attention_mask": mask}
        for name in prompts[0].types:
            types = [(p.types[name] + [0] * len(row))[: len(row)] for p, row in zip(prompts, rows, strict=True)]
            inputs[name] = padded(types, [0] * len(rows), left=left)[0]
        inputs |= joined_images([prompt.images for prompt in prompts])
        moved = {name: value.to(self.device) for name, value in inputs.items()}
        return {n: value.to(self.model.dtype) if value.is_floating_point() else value for n, value in moved.items()}

    def _continued(self, prompts: list[Prompt], begun: Begun, *, left: bool = False) -> dict[str, Any]:
        """What is left of prompts behind their past."""
        ids, mask = (
            x.to(self.device) for x in padded(begun.left, [self._filler(prompt) for prompt in prompts], left=left)
        )
        positions = begun.positions[:, None] + (mask.cumsum(1) - 1).clamp(min=0)
        if hasattr(getattr(self.model, "model", None), "rope_deltas"):
            positions = positions.expand(3, -1, -1)  # of words: the same in time, height and width
        whole = torch.cat((begun.mask, mask), 1)
        return {"input_ids": ids, "attention_mask": whole, "position_ids": positions, self.cache_name: begun.cache}

    def _filler(self, prompt: Prompt) -> int:
        """A token of the prompt itself for its padding, which is masked: penalties for repetition then see nothing new."""
        return next((token for token in prompt.ids if token not in self.prompts.visual), prompt.ids[0])


def same_but_for_rounding(found: Tensor, expected: Tensor, again: Tensor, dtype: torch.dtype) -> bool:
    """Whether log-probabilities of a model in ``dtype`` are those ``expected``, which ``again`` were another time."""
    rounding = ROUNDINGS * torch.finfo(dtype).eps * (1.0 + float(expected.abs().max()))
    allowed = NOISES * float((again - expected).abs().max()) + min(rounding, MOST_ROUNDING)
    return bool((found - expected).abs().max() <= allowed)


def common_beginning(prompts: Sequence[Prompt]) -> int:
    """How many tokens run once for prompts about the same images: 0 where they part before the images end."""
    most = min(len(prompt.ids) for prompt in prompts) - 1  # what is left of a prompt predicts the first token behind it
    shown = max(prompt.shown for prompt in prompts)
    if any(prompt.images for prompt in prompts) and not 0 < shown <= most:
        return 0
    first = prompts[0].ids
    count = min((_equal(first[:most], prompt.ids[:most]) for prompt in prompts), default=most)
    return count if count >= shown else 0


def _equal(a: list[int], b: list[int]) -> int:
    """How many tokens two rows begin with in common."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def padded(rows: Sequence[Sequence[int]], fill: Sequence[int], *, left: bool) -> tuple[Tensor, Tensor]:
    """Rows of tokens as (B, T) int64, and a mask that is 1 at real ones."""
    longest = max(map(len, rows))
    ids = torch.tensor(list(fill))[:, None].repeat(1, longest)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        place = slice(longest - len(row), longest) if left else slice(len(row))
        ids[i, place], mask[i, place] = torch.tensor(row, dtype=torch.long), 1
    return ids, mask


def _made_up(prompts: Prompts) -> list[Prompt]:
    """Three questions of two lengths about each of two images, or about none."""
    noise = np.random.default_rng(0)
    asked = (
        ("Is there a dog left of the red car? Answer yes or no.", "Yes"),
        ("What is it?", "a dog"),
        ("What is it?", "Yes"),
    )
    result = []
    for shape in ((48, 64, 3), (64, 48, 3)) if prompts.takes_images else (None,):
        images = [] if shape is None else [Image.fromarray(noise.integers(0, 256, shape, np.uint8))]
        seen = tuple(f"made-up {image.size}" for image in images)
        questions = [Question(words, words, seen, "log_likelihood", said) for words, said in asked]
        result += prompts.about(questions, images)
    return result
