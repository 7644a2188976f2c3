"""Questions put to a model: in groups about the same images, in batches by length, in as many processes as there are."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from cdistill.data.samples import BadSampleError
from cdistill.errors import InputError
from cdistill.eval.contract import Answer, Question
from cdistill.eval.inference import Inference
from cdistill.eval.prompts import Prompt
from cdistill.runtime.errors import is_lack_of_memory

MOST_AT_ONCE = {"cpu": 32, "cuda": 128}  # questions of a batch whose size is chosen here
WINDOW, MOST_AHEAD = (
    4,
    256,
)  # batches whose questions are sorted by length, but no more questions than this or one batch
READERS = 4  # threads that open images
SHARE_OF_MEMORY = 0.5  # of what is free, for a batch whose size is chosen here

Asked = tuple[Question, Prompt]
Source = Callable[[Sequence[Question]], list[Prompt]]


class Work(NamedTuple):
    """What a task will take: questions, forward passes at most, tokens of prompts, and bytes beside the weights."""

    questions: int
    groups: int
    passes: int
    tokens: int
    batch: int
    bytes: int

    def line(self, task: str, weights: int, processes: int) -> str:
        """The line that is printed before a task begins."""
        share = "" if processes == 1 else f", in each of {processes} processes"
        return (
            f"{task}: {self.questions:,} questions about {self.groups:,} images or sets of them, at most {self.passes:,} "
            f"forward passes in batches of {self.batch}, about {self.tokens:,} tokens, {self.bytes / 1e9:.2f} GB beside "
            f"{weights / 1e9:.2f} GB of weights{share}"
        )


@dataclass
class Runner:
    """Puts questions to a model.

    Attributes:
        inference: the model.
        source: makes prompts of questions about the same images; BadSampleError where the images cannot be had.
        batch_size: questions of a batch; None to choose one by length and free memory. It is halved where memory runs out.
        ask: makes answers of a batch of one kind, where that is not what `Question.kind` says.
        workers: threads that run batches of a small model on the CPU, instead of torch's threads inside of each operation.
        say: prints a line.
    """

    inference: Inference
    source: Source
    batch_size: int | None = None
    ask: Callable[[list[Asked]], list[Answer]] | None = None
    workers: int = 1
    say: Callable[[str], None] = print
    unread: dict[str, str] = field(default_factory=dict)  # question -> why its images could not be read

    def plan(self, questions: Sequence[Question]) -> Work:
        """What it will take, by the first questions; sets the size of batches where none was given."""
        groups = by_images(questions)
        first = [asked for group in groups[:READERS] for asked in self._encoded(group)]
        tokens = [len(prompt.ids) + len(prompt.continuation) for _, prompt in first] or [1]
        longest = max(tokens) + max((q.max_new_tokens for q in questions if q.kind == "generate"), default=0)
        scored = max((len(prompt.continuation) for _, prompt in first), default=1)
        each = bytes_of_row(self.inference.model, longest, max(1, scored))
        if self.batch_size is None:
            device = self.inference.device
            free = SHARE_OF_MEMORY * free_memory(device)
            self.batch_size = max(1, min(MOST_AT_ONCE.get(device.type, 32), int(free / each)))
        batches = math.ceil(len(questions) / self.batch_size)
        steps = max((q.max_new_tokens if q.kind == "generate" else 1 for q in questions), default=0)
        return Work(
            len(questions),
            len(groups),
            batches * (1 + steps),
            round(len(questions) * sum(tokens) / len(tokens)),
            self.batch_size,
            each * self.batch_size,
        )

    def answers(self, questions: Sequence[Question], bar: tqdm) -> Iterator[list[Answer]]:
        """Answers as they come, batch by batch; questions whose images cannot be read are noted in ``unread``."""
        size = self.batch_size or 1
        windows = list(_windows(by_images(questions), min(WINDOW * size * self.workers, max(size, MOST_AHEAD))))
        with ThreadPoolExecutor(READERS) as readers:
            ahead = [readers.submit(self._encoded, group) for group in windows[0]] if windows else []
            for i, window in enumerate(windows):
                asked = [pair for encoded in ahead for pair in encoded.result()]
                ahead = [
                    readers.submit(self._encoded, group) for following in windows[i + 1 : i + 2] for group in following
                ]
                bar.update(sum(map(len, window)) - len(asked))
                for answers in self._run(self._batches(asked)):
                    bar.update(len(answers))
                    yield answers

    def _run(self, batches: list[list[Asked]]) -> Iterator[list[Answer]]:
        if self.workers == 1:
            for batch in batches:
                yield from self._answered(batch)
            return
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            with ThreadPoolExecutor(self.workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
                for parts in pool.map(lambda batch: list(self._answered(batch)), batches):
                    yield from parts
        finally:
            torch.set_num_threads(threads)

    def _encoded(self, group: Sequence[Question]) -> list[Asked]:
        try:
            return list(zip(group, self.source(group), strict=True))
        except BadSampleError as error:
            self.unread |= dict.fromkeys((question.id for question in group), str(error))
            return []

    def _batches(self, asked: list[Asked]) -> list[list[Asked]]:
        """Questions of one kind and about as long, those about the same images together, shortest first."""
        result: list[list[Asked]] = []
        for scored in (False, True):
            chosen = [pair for pair in asked if (pair[0].kind != "generate") == scored]
            groups: dict[Any, list[Asked]] = {}
            for question, prompt in chosen:
                groups.setdefault((question.images or question.prompt), []).append((question, prompt))
            ordered = sorted(groups.values(), key=lambda group: max(len(p.ids) + len(p.continuation) for _, p in group))
            batch: list[Asked] = []
            for pair in (pair for group in ordered for pair in group):
                batch.append(pair)
                if len(batch) == self.batch_size:
                    result.append(batch)
                    batch = []
            result += [batch] if batch else []
        return result

    def _answered(self, batch: list[Asked]) -> Iterator[list[Answer]]:
        """Answers of a batch; where memory runs out, it and all that follow are cut in halves."""
        size = self.batch_size or len(batch)
        if len(batch) > size:
            for start in range(0, len(batch), size):
                yield from self._answered(batch[start : start + size])
            return
        answers: list[Answer] = []
        try:
            answers = (self.ask or self._ask)(batch)
        except (MemoryError, RuntimeError) as error:
            if not is_lack_of_memory(error):
                raise
        if answers:
            yield answers
            return
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if len(batch) == 1:
            raise InputError(
                f"model: memory does not suffice for question {batch[0][0].id!r} by itself; take --dtype bf16 or --load-in 4bit"
            )
        self.batch_size = (len(batch) + 1) // 2
        self.say(
            f"memory does not suffice for {len(batch)} questions at once: batches of {self.batch_size} from here on"
        )
        yield from self._answered(batch)

    def _ask(self, batch: list[Asked]) -> list[Answer]:
        prompts = [prompt for _, prompt in batch]
        if batch[0][0].kind == "generate":
            replies = self.inference.generate(prompts)
            return [Answer(q, r.text, None, r.tokens, r.cut) for (q, _), r in zip(batch, replies, strict=True)]
        sums = self.inference.log_likelihoods(prompts)
        for (question, _), value in zip(batch, sums, strict=True):
            if math.isnan(value):  # which would lose to every other, and be wrong in silence
                raise InputError(
                    f"model: the log-likelihood of question {question.id!r} is not a number in "
                    f"{self.inference.model.dtype}; take --dtype fp32 or bf16"
                )
        scores = [math.exp(s) if q.kind == "probability" else s for (q, _), s in zip(batch, sums, strict=True)]
        return [Answer(q, "", s, len(p.continuation)) for (q, p), s in zip(batch, scores, strict=True)]


def by_images(questions: Iterable[Question]) -> list[list[Question]]:
    """Questions about the same images together, in the order of the first of each; those without images one by one,
    but for one prompt with several continuations."""
    groups: dict[Any, list[Question]] = {}
    for question in questions:
        groups.setdefault(question.images or question.prompt, []).append(question)
    return list(groups.values())


def _windows(groups: Sequence[list[Question]], size: int) -> Iterator[list[list[Question]]]:
    window: list[list[Question]] = []
    for group in groups:
        window.append(group)
        if sum(map(len, window)) >= size:
            yield window
            window = []
    if window:
        yield window


def bytes_of_row(model: Any, tokens: int, scored: int) -> int:
    """About what a row of a batch takes: its keys and values, what a layer makes on the way, logits."""
    config = model.config.get_text_config(decoder=True)
    unit = torch.empty((), dtype=model.dtype).element_size()
    width, layers = getattr(config, "hidden_size", 1024), getattr(config, "num_hidden_layers", 1)
    heads = getattr(config, "num_attention_heads", None) or 1
    kept = getattr(config, "num_key_value_heads", None) or heads
    head = getattr(config, "head_dim", None) or width // heads
    inner = getattr(config, "intermediate_size", None) or 4 * width
    inner = max(inner) if isinstance(inner, (list, tuple)) else inner
    a_token = unit * (2 * layers * kept * head + 8 * width + 3 * inner)
    return tokens * a_token + (scored + 1) * getattr(config, "vocab_size", 1 << 16) * (unit + 8)


def free_memory(device: torch.device) -> int:
    """Bytes that can be had on a device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            known = dict(line.split(":", 1) for line in file)
        available = int(known["MemAvailable"].split()[0]) * 1024
    except OSError:  # not Linux, where all that there is must do
        available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return available // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
