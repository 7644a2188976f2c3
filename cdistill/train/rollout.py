"""Answers that the student generates in the place of given ones, for on-policy distillation (GKD: Agarwal et al., 2024,
arXiv:2306.13649).

`Rollouts` makes of a batch another one, in which a share of the samples ends with the student's own reply. What is drawn
(whether a sample is taken, and the tokens) is a function of the seed and of the sample's number in the training, and of no
generator's state: equal for any number of processes and of accumulation steps, and after a resumption.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, TopPLogitsWarper

from cdistill.choices import OnPolicyConfig
from cdistill.data.batches import PaddingCollator
from cdistill.data.conversations import TOKEN_TYPES, Encoded
from cdistill.data.samples import IGNORE_INDEX
from cdistill.errors import InputError
from cdistill.eval.inference import padded, same_but_for_rounding
from cdistill.models.load import Model
from cdistill.runtime import pulse
from cdistill.runtime.zero import is_partitioned
from cdistill.train.kinds import WEIGHTS
from cdistill.train.replies import Reply, ReplyLog
from cdistill.train.reply_server import Prompt, ReplyServer
from cdistill.vat import visual_token_ids

COUNTS = "image_counts"  # key of a batch: how much of each tensor of images is of which sample
OF_TOKENS = ("input_ids", "labels", "attention_mask", *TOKEN_TYPES)
DRAWS = 0x0B5  # tells these random numbers from others of the same seed
Images = list[dict[str, Tensor]]


@dataclass(frozen=True)
class CountingCollator:
    """Says under `COUNTS` what of a batch's tensors of images is whose, for samples with ``images`` or ``pixel_values``."""

    collate: Callable[[Sequence[Any]], dict[str, Any]]

    def __call__(self, items: Sequence[Any]) -> dict[str, Any]:
        batch = self.collate(items)
        counts = [_image_counts(item[0] if isinstance(item, tuple) else item) for item in items]
        names = {name for count in counts for name in count}
        return batch | {COUNTS: {name: [count.get(name, 0) for count in counts] for name in sorted(names)}}


def _image_counts(item: Any) -> dict[str, int]:
    if isinstance(item, Encoded):
        return {name: len(value) for name, value in item.images.items()}
    return {"pixel_values": 1} if "pixel_values" in item else {}


@dataclass(frozen=True)
class _Row:
    """A sample without its padding; of one that is taken what comes before its last answer, in whose place a reply comes."""

    ids: list[int]
    labels: list[int]
    types: dict[str, list[int]]
    number: int
    given: list[int] | None = None
    draws: Any = None  # fp64, uniform, one for each token that there may be


class Rollouts:
    """Lets the student answer.

    The last answer of a sample is generated, as in TRL's GKD; those before it stay, with their labels. Replies hold no visual
    and no special token but the one that ends them, and no token that the tokenizer does not have. The student is in eval mode
    meanwhile, and its recorded attention is of the training passes alone.

    Args:
        student: the model that is trained.
        tokenizer: the student's.
        config: how it generates.
        seed: of what is drawn.
        stops: tokens that end an answer, beside those of the model's generation config.
        max_length: of a sample with its reply.
        key: what errors name.
        log: where replies are shown.
        server: what generates in the student's place, with its weights.

    Attributes:
        replies: those of the last batch; `lengths` sums up those of several.
        pads: whether prompts of different lengths are generated together; None until it has been tried.

    Raises:
        ValueError: there is no token that ends a reply, or none of padding.
    """

    def __init__(
        self,
        student: Model,
        tokenizer: Any,
        config: OnPolicyConfig,
        *,
        seed: int,
        stops: Sequence[int] = (),
        max_length: int | None = None,
        key: str = "generation",
        log: ReplyLog | None = None,
        server: ReplyServer | None = None,
    ) -> None:
        self.student, self.config, self.seed, self.max_length, self.log = student, config, seed, max_length, log
        self.server = server
        if server is not None:
            server.require_servable(student)
        own = student.generation_config.eos_token_id
        known = [] if own is None else [own] if isinstance(own, int) else list(own)
        self.stops = list(dict.fromkeys([*stops, *known]))
        if not self.stops and tokenizer.eos_token_id is not None:
            self.stops = [tokenizer.eos_token_id]
        if not self.stops:
            raise InputError(
                f"{key}: no token ends a reply: name one as eos_token_id in the student's generation_config.json"
            )
        self.pad: int = self.stops[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        try:
            self.visual = set(visual_token_ids(student))
        except ValueError:  # a student without images
            self.visual = set()
        special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        written = set(tokenizer.get_vocab().values()) - special - self.visual - set(self.stops)
        self.allowed = torch.tensor(sorted([*written, *self.stops]))
        self.replies: list[Reply] = []
        self.pads: bool | None = None
        self._said = [0, 0, 0]  # replies, their tokens, and those that ended, since the last log

    def __call__(self, batch: Mapping[str, Any], first: int) -> dict[str, Any]:
        """The batch with replies, right-padded, and ``sampled`` (B, T) bool, their tokens, where it has any.

        Args:
            batch: ``input_ids``, ``labels``, ``attention_mask`` (B, T), types of tokens, tensors of images, and `COUNTS`.
            first: number of its first sample in the training.

        Raises:
            ValueError: a packed batch, one that the teacher reads otherwise, one that does not tell whose images are whose, or
                a student with partitioned weights.
        """
        if "attention_mask" not in batch and "position_ids" in batch:
            raise InputError(
                "on_policy needs padded batches, and this one is packed: it has position_ids and no attention_mask"
            )
        if "teacher_input_ids" in batch:
            raise InputError(
                "on_policy must be 0 for a teacher with an encoding of its own (teacher_input_ids), which no reply has"
            )
        known = (*OF_TOKENS, COUNTS, WEIGHTS)
        rest = {name: value for name, value in batch.items() if name not in known}
        of_samples = {WEIGHTS: batch[WEIGHTS]} if WEIGHTS in batch else {}
        rows = [self._taken(row) for row in _rows(batch, first)]
        self.replies = []
        chosen = [i for i, row in enumerate(rows) if row.given is not None]
        if not chosen:
            return {name: value for name, value in batch.items() if name != COUNTS}
        images = self._images(rest, batch.get(COUNTS), len(rows), chosen)
        made = self._answers([rows[i] for i in chosen], images)
        for i, tokens in zip(chosen, made, strict=True):
            row = rows[i]
            ended = tokens[-1] in self.stops
            self.replies.append(Reply(row.number, row.ids, row.given or [], tokens, ended))
            self._said = [n + m for n, m in zip(self._said, (1, len(tokens), int(ended)), strict=True)]
            types = {name: of + [0] * len(tokens) for name, of in row.types.items()}
            rows[i] = _Row(row.ids + tokens, row.labels + tokens, types, row.number)
        device = batch["input_ids"].device
        encoded = [_encoded(row) for row in rows]
        padded_rows = {name: value.to(device) for name, value in PaddingCollator(self.pad)(encoded).items()}
        sampled = torch.zeros_like(padded_rows["input_ids"], dtype=torch.bool)
        for i, tokens in zip(chosen, made, strict=True):
            sampled[i, len(rows[i].ids) - len(tokens) : len(rows[i].ids)] = True
        return padded_rows | rest | of_samples | {"sampled": sampled}

    def lengths(self) -> dict[str, float]:
        """Of the replies of this process since the last call: their mean tokens, and the share that ended by themselves."""
        (replies, tokens, ended), self._said = self._said, [0, 0, 0]
        return {"reply_tokens": tokens / replies, "replies_ended": ended / replies} if replies else {}

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs."""
        return {"pads": self.pads, "said": self._said}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`."""
        self.pads, self._said = state["pads"], state["said"]

    def _taken(self, row: _Row) -> _Row:
        """The row cut to the prompt of its last answer, if it is one of those that are generated."""
        draw = np.random.default_rng((self.seed, DRAWS, row.number))
        answers = _answers(row.labels)
        if draw.random() >= self.config.on_policy or not answers:
            return row
        start, stop = answers[-1]
        if start == 0 or self.visual.intersection(row.ids[start:]):  # no prompt, or an image that would be lost
            return row
        types = {name: of[:start] for name, of in row.types.items()}
        draws = draw.random(min(self.config.max_new_tokens, self.max_length or self.config.max_new_tokens))
        return _Row(row.ids[:start], row.labels[:start], types, row.number, row.ids[start:stop], draws)

    def _images(self, rest: Mapping[str, Any], counts: Any, samples: int, chosen: Sequence[int]) -> Images:
        """What the processor made of the images of each of the chosen samples."""
        names = [name for name, value in rest.items() if isinstance(value, Tensor)]
        unknown = [name for name in names if counts is None or name not in counts]
        if unknown:
            raise InputError(
                f"on_policy needs batches that say whose {unknown[0]} is whose, as cdistill's own collators do: wrap yours in "
                "cdistill.train.rollout.CountingCollator, or leave data_collator out"
            )
        parts = {name: rest[name].split(counts[name]) for name in names}
        return [{name: of[i] for name, of in parts.items() if len(of[i])} for i in chosen]

    def _answers(self, rows: list[_Row], images: Images) -> list[list[int]]:
        """Tokens of the replies, each to its end."""
        if is_partitioned(self.student):
            raise InputError(
                "on_policy must be 0 for a student whose weights are partitioned (ZeRO-3, FSDP): take ZeRO-2"
            )
        replies: dict[int, list[int]] = {}
        with answering(self.student):
            if self.server is not None:
                return self._served(self.server, rows, images)
            if self.pads is None:
                self._find_way(rows, images)
            for part in [range(len(rows))] if self.pads is not False else _by_length(rows):
                some = [rows[i] for i in part]
                draws = np.stack([row.draws for row in some])
                processor = Drawing(torch.from_numpy(draws), self.allowed, self.config)
                limit = max(self._limit(row) for row in some)
                made = self._generate(some, [images[i] for i in part], limit, [processor]).tolist()
                replies |= zip(part, map(self._to_its_end, some, made), strict=True)
        return [replies[i] for i in range(len(rows))]

    def begin_step(self) -> None:
        """Let a server take up the student, whose weights are those of a new step."""
        if self.server is not None:
            with answering(self.student):
                self.server.take(self.student)

    def _served(self, server: ReplyServer, rows: list[_Row], images: Images) -> list[list[int]]:
        """Tokens of a server's replies; what it says of the first one is compared with the student."""
        if not server.begun:
            raise InputError("a server must take up the student before it answers: call begin_step() at every step")
        others = sorted({name for of in images for name in of} - {"pixel_values"})
        if others:
            raise server.unfit(f"its images are {', '.join(others)}, too")
        prompts = [
            Prompt(row.ids, server.pictures(of.get("pixel_values")), self._limit(row), int(row.draws[0] * 2**53))
            for row, of in zip(rows, images, strict=True)
        ]
        vocabulary = self.student.get_input_embeddings().weight.shape[0]
        refused = sorted(set(range(vocabulary)).difference(self.allowed.tolist()))
        found = server.replies(
            prompts, self.config, visual=self.visual, stops=self.stops, refused=refused, vocabulary=vocabulary
        )
        first, tokens = rows[0], found[0].tokens
        said = _Row(first.ids + tokens, [], {n: of + [0] * len(tokens) for n, of in first.types.items()}, first.number)
        logits = self.student(**self._inputs([said], images[:1]), use_cache=False).logits[0]
        server.compare(found[0], logits[len(first.ids) - 1 : -1])
        return [self._to_its_end(row, reply.tokens) for row, reply in zip(rows, found, strict=True)]

    def _limit(self, row: _Row) -> int:
        most = self.config.max_new_tokens
        return most if self.max_length is None else max(1, min(most, self.max_length - len(row.ids)))

    def _to_its_end(self, row: _Row, tokens: list[int]) -> list[int]:
        tokens = tokens[: self._limit(row)]
        end = next((i for i, token in enumerate(tokens) if token in self.stops), len(tokens))
        return tokens[: end + 1]

    def _find_way(self, rows: list[_Row], images: Images) -> None:
        """See on two prompts of a batch whether padding on the left changes what the student says."""
        order = sorted(range(len(rows)), key=lambda i: len(rows[i].ids))
        places = [order[0], order[-1]]
        if len(rows[places[0]].ids) == len(rows[places[1]].ids):
            return  # nothing is padded yet

        def measured(places: list[int]) -> Tensor:
            made = self._generate(
                [rows[i] for i in places],
                [images[i] for i in places],
                2,
                [],
                min_new_tokens=2,
                output_logits=True,
                return_dict_in_generate=True,
            )
            return torch.stack([step.double().cpu().log_softmax(-1).amax(-1) for step in made.logits])

        alone = torch.cat([measured([i]) for i in places], 1)
        again = torch.cat([measured([i, i])[:, :1] for i in places], 1)
        device = self.student.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.student.dtype
        self.pads = same_but_for_rounding(measured(places), alone, again, dtype)

    def _generate(self, rows: list[_Row], images: Images, limit: int, processors: list[Any], **options: Any) -> Any:
        """(N, limit at most) tokens behind the prompts, filled up behind their ends, or what ``options`` ask for."""
        inputs = self._inputs(rows, images)
        config = GenerationConfig(
            max_new_tokens=limit,
            do_sample=False,
            eos_token_id=self.stops or None,
            pad_token_id=self.pad,
            use_cache=True,
            **options,
        )
        made = self.student.generate(
            **inputs, generation_config=config, logits_processor=LogitsProcessorList(processors)
        )
        return made if options else made[:, inputs["input_ids"].shape[1] :]

    def _inputs(self, rows: list[_Row], images: Images) -> dict[str, Tensor]:
        """What the student takes of rows, padded on the left."""
        device = self.student.get_input_embeddings().weight.device
        ids, mask = padded([row.ids for row in rows], [self.pad] * len(rows), left=True)
        inputs = {"input_ids": ids, "attention_mask": mask}
        for name in rows[0].types:
            inputs[name] = padded([row.types[name] for row in rows], [0] * len(rows), left=True)[0]
        for name in {name: None for of in images for name in of}:
            inputs[name] = torch.cat([of[name] for of in images if name in of])
        inputs = {name: value.to(device) for name, value in inputs.items()}
        dtype = self.student.dtype
        return {n: value.to(dtype) if value.is_floating_point() else value for n, value in inputs.items()}


def rolled_out(trainer: Any, rollouts: Rollouts, batches: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The micro-batches of a step with replies of the student, whose weights are those that the step starts from."""
    args, step, made, said = trainer.args, trainer.state.global_step, [], []
    with trainer.compute_loss_context_manager(), pulse.paused():
        rollouts.begin_step()
        for i, batch in enumerate(batches):
            place = (step * args.gradient_accumulation_steps + i) * args.world_size + args.process_index
            made.append(rollouts(batch, place * args.per_device_train_batch_size))
            said += rollouts.replies
    if rollouts.log is not None and args.process_index == 0:
        rollouts.log.write(step + 1, said)
    return made


class Drawing(LogitsProcessor):
    """Leaves one token of each row, drawn by numbers that are given: greedy generation then follows them.

    Args:
        draws: (B, N) fp64, uniform in [0, 1), one for each new token.
        allowed: ids that may be drawn.
        config: temperature and top_p.
    """

    def __init__(self, draws: Tensor, allowed: Tensor, config: OnPolicyConfig) -> None:
        self.draws, self.allowed, self.config, self.step = draws, allowed, config, 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """(B, V) logits -> 0 for the token that is drawn, -inf for the others."""
        if self.step == 0:
            self.draws, self.allowed = self.draws.to(scores.device), self.allowed.to(scores.device)
            self.allowed = self.allowed[self.allowed < scores.shape[1]]
        nothing = torch.full_like(scores, -torch.inf, dtype=torch.float64)
        logits = nothing.index_copy(1, self.allowed, scores[:, self.allowed].double())
        if self.config.temperature == 0:
            token = logits.argmax(-1, keepdim=True)
        else:
            logits = logits / self.config.temperature
            if self.config.top_p < 1:
                logits = TopPLogitsWarper(self.config.top_p)(input_ids, logits)
            below = logits.softmax(-1).cumsum(-1)
            drawn = self.draws[:, self.step, None] * below[:, -1:]
            token = torch.searchsorted(below, drawn, right=True).clamp(max=scores.shape[1] - 1)
        self.step += 1
        return nothing.to(scores.dtype).scatter(1, token, 0.0)


@contextmanager
def answering(student: Model) -> Iterator[None]:
    """The student in eval mode, with generation's defaults in place of its own, without gradients and without a compiler."""
    modes = [(module, module.training) for module in student.modules()]
    config, student.generation_config = student.generation_config, GenerationConfig()
    student.eval()
    inner: Any = getattr(student, "model", None)
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            yield
    finally:
        student.generation_config = config
        if hasattr(inner, "rope_deltas"):
            inner.rope_deltas = None  # of these prompts
        for module, mode in modes:
            module.training = mode


def _rows(batch: Mapping[str, Any], first: int) -> list[_Row]:
    """The samples of a padded batch."""
    ids, labels = (batch[name].cpu() for name in ("input_ids", "labels"))
    mask = batch.get("attention_mask")
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.cpu().bool()
    types = {name: batch[name].cpu() for name in TOKEN_TYPES if name in batch}
    return [
        _Row(
            ids[i][r].tolist(),
            labels[i][r].tolist(),
            {name: of[i][r].tolist() for name, of in types.items()},
            first + i,
        )
        for i, r in enumerate(real)
    ]


def _encoded(row: _Row) -> Encoded:
    types = {name: torch.tensor(of) for name, of in row.types.items()}
    return Encoded(torch.tensor(row.ids), torch.tensor(row.labels), types, {})


def _answers(labels: Sequence[int]) -> list[tuple[int, int]]:
    """Where answers begin and end: stretches of labels."""
    marks = [False, *(label != IGNORE_INDEX for label in labels), False]
    ends = [i for i, (before, after) in enumerate(pairwise(marks)) if before != after]
    return list(zip(ends[::2], ends[1::2], strict=True))


def _by_length(rows: Sequence[_Row]) -> list[list[int]]:
    """Places of rows, those of one length together."""
    found: dict[int, list[int]] = {}
    for i, row in enumerate(rows):
        found.setdefault(len(row.ids), []).append(i)
    return list(found.values())
