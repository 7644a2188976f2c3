"""The built-in task's questions put to a model that has a tokenizer of its own, and judged as those of the task's models."""

from __future__ import annotations

from typing import Any

from tqdm import tqdm

from cdistill.builtin.questions import CHOICES
from cdistill.eval.builtin_task import BATCH_SIZE, SUBTYPES, Exam
from cdistill.eval.contract import Question
from cdistill.eval.inference import Inference
from cdistill.eval.prompts import Prompt, Prompts
from cdistill.models.load import Model


def in_own_words(exam: Exam, model: Model, processor: Any, title: str) -> dict[str, dict[str, Any]]:
    """Accuracy as `Exam.evaluate_both` gives it: ``greedy``, by the tokens of the right answer, and by ``choice``, by the
    log-likelihood of every possible answer, however many tokens it has."""
    inference = Inference(model, Prompts(processor), "padded")
    said: dict[str, str] = {}
    chosen: dict[str, str] = {}
    right: dict[str, str] = {}
    names = [(subtype, i) for subtype in SUBTYPES for i in range(exam.n)]
    with tqdm(total=len(names), desc=title, unit=" questions") as bar:
        for part in (names[i : i + BATCH_SIZE] for i in range(0, len(names), BATCH_SIZE)):
            prompts: list[Prompt] = []
            for subtype, i in part:
                of_question, answer = _prompts(exam, inference.prompts, subtype, i)
                right[f"{subtype}/{i}"] = answer
                prompts += of_question
            scores = iter(inference.log_likelihoods(prompts))
            tokens = iter(prompts)
            asked = []
            for subtype, i in part:
                choices, name = CHOICES[subtype], f"{subtype}/{i}"
                likelihoods = [next(scores) for _ in choices]
                chosen[name] = choices[max(range(len(choices)), key=likelihoods.__getitem__)]
                asked.append([next(tokens) for _ in choices][choices.index(right[name])])
            for (subtype, i), prompt, reply in zip(part, asked, inference.forced(asked), strict=True):
                whole = reply == prompt.continuation
                said[f"{subtype}/{i}"] = right[f"{subtype}/{i}"] if whole else inference.prompts.reply(reply)
            bar.update(len(part))
    return {"greedy": exam.result(said, right), "choice": exam.result(chosen, right)}


def _prompts(exam: Exam, prompts: Prompts, subtype: str, index: int) -> tuple[list[Prompt], str]:
    """A question with each of its possible answers, and the right one."""
    asked, answered = exam.messages(subtype, index)
    parts = asked["content"]
    images = [part["image"] for part in parts if part["type"] == "image"]
    text = " ".join(part["text"] for part in parts if part["type"] == "text")
    shown = tuple(f"{subtype}/{index}" for _ in images)
    questions = [Question(f"{subtype}/{index}", text, shown, "log_likelihood", choice) for choice in CHOICES[subtype]]
    return prompts.about(questions, images), answered["content"][0]["text"]
