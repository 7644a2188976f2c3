"""The model ``cdistill`` of lmms-eval: whatever `cdistill eval` measures, in its batches."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from lmms_eval.api.model import lmms
from PIL import Image
from tqdm import tqdm

from cdistill.data.images import seen
from cdistill.errors import InputError
from cdistill.eval.contract import Question
from cdistill.eval.inference import Inference
from cdistill.eval.lmms_eval.utils import question_of, reply_of
from cdistill.eval.loading import load
from cdistill.eval.prompts import Prompt, Prompts
from cdistill.eval.runner import Runner

NEW_TOKENS = 1024  # where a task does not say, as the harness's own models have it


class CDistill(lmms):
    """Answers a harness's requests.

    Args:
        pretrained: what ``cdistill eval`` takes as a model.
        dtype: ``fp32``, ``bf16`` or ``fp16``; the files' by default.
        load_in: ``8bit`` or ``4bit``.
        device_map: of accelerate.
        batch_size: questions of a batch, or ``auto``. The harness says 1 where its user says nothing.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str,
        dtype: str | None = None,
        load_in: str | None = None,
        device_map: str | None = None,
        batch_size: int | str = "auto",
        device: str | None = None,
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            from accelerate import Accelerator

            self.accelerator = Accelerator()
            self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        loaded = load(pretrained, dtype=dtype, load_in=load_in, device_map=device_map)
        self._inference = Inference(loaded.model, Prompts(loaded.processor))
        self._inference.find_way()
        self._batch_size = None if str(batch_size) == "auto" else int(batch_size)

    @property
    def device(self) -> torch.device:
        """Where the inputs go."""
        return self._inference.device

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """A reply to each request, or to a question of ours that asks for a score, the score as JSON.

        Raises:
            ValueError: a request samples, or its messages are not one turn that begins with all its images.
        """
        told = [_Request(self.task_dict, place, request.args) for place, request in enumerate(requests)]
        found = {each.question.id: each for each in told}

        def source(questions: Sequence[Question]) -> list[Prompt]:
            turns = [found[question.id].turn() for question in questions]
            whole = [
                replace(q, prompt=text, images=tuple(f"{q.images}{k}" for k in range(len(images))))
                for q, (images, text) in zip(questions, turns, strict=True)
            ]
            return self._inference.prompts.about(whole, turns[0][0])

        runner = Runner(self._inference, source, self._batch_size, say=tqdm.write)
        questions = [each.question for each in told]
        runner.plan(questions)
        replies: dict[str, str] = {}
        with tqdm(total=len(questions), desc="cdistill", unit=" questions", disable=self.rank > 0) as bar:
            for answers in runner.answers(questions, bar):
                replies |= {answer.question.id: found[answer.question.id].reply(reply_of(answer)) for answer in answers}
        if runner.unread:
            raise InputError(
                f"the images of {len(runner.unread)} requests cannot be read: {next(iter(runner.unread.values()))}"
            )
        return [replies[question.id] for question in questions]

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Refused: what the harness does with log-likelihoods is wrong (0.7.3)."""
        raise NotImplementedError("lmms-eval 0.7.3 cannot compare log-likelihoods; the tasks cd_... do")

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Refused: questions are of one turn."""
        raise NotImplementedError("--model cdistill answers questions of one turn")


class _Request:
    """A request of the harness: (context, messages of a document, options, document, task, split)."""

    def __init__(self, documents: Any, place: int, args: tuple[Any, ...]) -> None:
        _, self._messages, options, number, self._task, split = args
        self._doc = documents[self._task][split][number]
        warmth = options.get("temperature", 1.0 if options.get("do_sample") else 0.0)
        if float(warmth or 0.0) > 0 or int(options.get("num_beams") or 1) > 1:
            raise InputError(
                f"{self._task} samples or searches; --model cdistill is greedy: --gen_kwargs temperature=0"
            )
        until = options.get("until") or []
        self._until = [until] if isinstance(until, str) else [each for each in until if each]
        if "benchmark" in self._doc and "facts" in self._doc:
            self.question = replace(question_of(self._doc), id=str(place))
        else:
            new = int(options.get("max_new_tokens") or NEW_TOKENS)
            self.question = Question(str(place), "", (f"{self._task}/{split}/{number}",), max_new_tokens=new)

    def turn(self) -> tuple[list[Image.Image], str]:
        """The images and the text of the user's turn."""
        messages = self._messages(self._doc)
        parts = messages[0]["content"] if len(messages) == 1 and messages[0]["role"] == "user" else messages
        parts = [{"type": "text", "text": parts}] if isinstance(parts, str) else parts
        kinds = [part.get("type") for part in parts]
        images = kinds.count("image")
        if not kinds or kinds != ["image"] * images + ["text"] * (len(kinds) - images):
            raise InputError(
                f"{self._task}: --model cdistill takes one turn of the user, images first, then text; got {kinds!r:.80}"
            )
        shown = [part["url"] for part in parts[:images]]
        if not all(isinstance(image, Image.Image) for image in shown):
            raise InputError(f"{self._task}: --model cdistill takes images as the data set decodes them")
        return [seen(image) for image in shown], "".join(part["text"] for part in parts[images:])

    def reply(self, text: str) -> str:
        """The reply up to where the task wants it to end."""
        for end in self._until:
            text = text.split(end)[0]
        return text
