"""The built-in task put to models by the runner: a reply that begins with the right answer is right.

Models that know the task's own words and pixels get both as they were trained on them; all others get words by their chat
template and pictures by their processor.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from cdistill.builtin.dataset import NUM_VISUAL_TOKENS, BuiltinDataset, build_tokenizer
from cdistill.builtin.questions import CHOICES
from cdistill.builtin.scenes import IMAGE_SIZE
from cdistill.builtin.scorer import FAMILIES, held_out_questions, standard_error, standard_error_of_mean
from cdistill.choices import MOST_DRAWN, require_count
from cdistill.data.samples import IGNORE_INDEX
from cdistill.errors import InputError
from cdistill.eval.benchmarks.builtin import BENCHMARK
from cdistill.eval.contract import Answer, Question
from cdistill.eval.inference import Inference
from cdistill.eval.loading import load
from cdistill.eval.pictures import Pictures
from cdistill.eval.prompts import Prompt, Prompts
from cdistill.eval.runner import Asked, Runner
from cdistill.models.load import Model

BATCH_SIZE = 32  # of small models: activations of more fall out of the processor's cache
SUBTYPES = tuple(subtype for subtypes in FAMILIES.values() for subtype in subtypes)


class Exam:
    """Held-out questions, drawn once for any number of models.

    Args:
        n: questions per sub-type, each about a scene of its own.
        seed: of scenes, questions and pixel noise.
        modality: ``image``, or ``text`` with the scenes written out.
        pairs: of colour and shape that are asked about: ``all``, or those that training with `BuiltinTask.pairs` leaves out.
    """

    def __init__(self, *, n: int = 500, seed: int = 0, modality: str = "image", pairs: str = "all") -> None:
        require_count("n", n, MOST_DRAWN)
        self.n, self.seed, self.modality = n, seed, modality
        self.tokenizer = build_tokenizer()
        self._drawn: dict[str, Prompt] = {}
        vocabulary = self.tokenizer.get_vocab()
        self._choices = {s: [vocabulary[word] for word in CHOICES[s]] for s in SUBTYPES}
        self._data: dict[str, BuiltinDataset] = {
            s: held_out_questions(s, n=n, seed=seed, modality=modality, tokenizer=self.tokenizer, pairs=pairs)
            for s in SUBTYPES
        }

    def evaluate(self, model: Model, title: str = "built-in task", batch_size: int | None = None) -> dict[str, Any]:
        """Accuracy of a model that knows the task's own words and pixels, as `cdistill.builtin.scorer.evaluate` gives it."""
        return self.evaluate_both(model, title, batch_size)["greedy"]

    def evaluate_both(
        self, model: Model, title: str = "built-in task", batch_size: int | None = None
    ) -> dict[str, dict[str, Any]]:
        """Accuracy as `evaluate` gives it: ``greedy``, and by ``choice``, where the answer of the sub-type with the highest
        log-likelihood is taken (`cdistill.builtin.questions.CHOICES`), whatever else the model would rather say."""
        if self.modality == "image" and not hasattr(model.config, "vision_config"):
            raise InputError("modality must be text for a model without a vision encoder, got 'image'")
        was_training = model.training
        inference = Inference(model, Prompts(self.tokenizer), "padded")
        chosen: dict[str, str] = {}
        workers = 1 if inference.device.type != "cpu" else torch.get_num_threads()

        def answers(batch: list[Asked]) -> list[Answer]:
            choices = [self._choices[asked.id.partition("/")[0]] for asked, _ in batch]
            said = inference.chosen([prompt for _, prompt in batch], choices)
            chosen.update({asked.id: self._text([best]) for (asked, _), (_, best) in zip(batch, said, strict=True)})
            return [Answer(asked, self._text(ids)) for (asked, _), (ids, _) in zip(batch, said, strict=True)]

        runner = Runner(inference, self._prompts, batch_size or BATCH_SIZE, answers, workers, tqdm.write)
        questions = [Question(f"{s}/{i}", "", (f"{s}/{i}",)) for s in SUBTYPES for i in range(self.n)]
        said = ask(runner, questions, title)
        model.train(was_training)
        right = {name: self._text(prompt.continuation) for name, prompt in self._drawn.items()}
        return {"greedy": self.result(said, right), "choice": self.result(chosen, right)}

    def messages(self, subtype: str, index: int) -> list[dict[str, Any]]:
        """A question and its answer as messages for a chat template (`BuiltinDataset.messages`)."""
        return self._data[subtype].messages(index)

    def _text(self, ids: Sequence[int]) -> str:
        return " ".join(self.tokenizer.convert_ids_to_tokens(list(ids)))

    def result(self, said: Mapping[str, str], answers: Mapping[str, str]) -> dict[str, Any]:
        """The tables of replies and right answers by question, ``SUBTYPE/NUMBER``."""
        result: dict[str, Any] = {"standard_error": {}, "constant_answer": {}, "n": self.n, "seed": self.seed}
        for family, subtypes in FAMILIES.items():
            accuracies, errors, constant = {}, {}, {}
            for subtype in subtypes:
                names = [f"{subtype}/{i}" for i in range(self.n)]
                right = [said[name].split()[: len(answers[name].split())] == answers[name].split() for name in names]
                accuracies[subtype] = sum(right) / self.n
                errors[subtype] = standard_error(accuracies[subtype], self.n)
                constant[subtype] = Counter(answers[name] for name in names).most_common(1)[0][1] / self.n
            accuracies["avg"] = sum(accuracies.values()) / len(subtypes)
            errors["avg"] = standard_error_of_mean(list(errors.values()))
            constant["avg"] = sum(constant.values()) / len(subtypes)
            result[family] = accuracies
            result["standard_error"][family], result["constant_answer"][family] = errors, constant
        return result

    def _prompts(self, questions: Sequence[Question]) -> list[Prompt]:
        return [self._prompt(question.id) for question in questions]

    def _prompt(self, name: str) -> Prompt:
        if name not in self._drawn:
            subtype, _, index = name.partition("/")
            item = self._data[subtype][int(index)]
            ids, labels = item["input_ids"].tolist(), item["labels"].tolist()
            start = next(i for i, label in enumerate(labels) if label != IGNORE_INDEX)
            answer = [token for token in labels[start:] if token != self.tokenizer.eos_token_id]
            images = {"pixel_values": item["pixel_values"][None]} if "pixel_values" in item else {}
            self._drawn[name] = Prompt(ids[:start], answer, {}, 0, images, (name,), 0)
        return self._drawn[name]


def ask(runner: Runner, questions: Sequence[Question], title: str) -> dict[str, str]:
    """Replies by the questions' ids, with a bar."""
    said: dict[str, str] = {}
    with tqdm(total=len(questions), desc=title, unit=" questions") as bar:
        for answers in runner.answers(questions, bar):
            said |= {answer.question.id: answer.reply for answer in answers}
    return said


def evaluate_model(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """What `Exam.evaluate` gives for the model that the options name, whatever words it knows, and the modality."""
    loaded = load(
        options.model,
        dtype=options.dtype or "fp32",
        load_in=options.load_in,
        device_map=options.device_map,
        usual_processor=True,  # which models that know the task's own pixels do not need
    )
    n, seed = 500 if options.n is None else options.n, options.seed or 0
    exam = Exam(n=n, seed=seed, modality="image" if loaded.sees else "text")
    prompts = Prompts(loaded.processor)
    if knows_the_task(loaded.model, prompts.tokenizer):
        return exam.evaluate(loaded.model, options.model, options.batch_size), exam.modality
    pictures = Pictures([Path()])
    drawn = BENCHMARK.draw(n=n, seed=seed, modality=exam.modality)
    inference = Inference(loaded.model, prompts)
    inference.find_way()
    runner = Runner(
        inference,
        lambda questions: prompts.about(questions, [pictures.open(name) for name in questions[0].images]),
        options.batch_size,
        say=tqdm.write,
    )
    runner.plan(drawn[:BATCH_SIZE])
    said = ask(runner, drawn, options.model)
    places = {question.id: f"{question.id.split('/')[0]}/{question.id.split('/')[2]}" for question in drawn}
    answers = {places[question.id]: str(question.facts["label"]) for question in drawn}
    return exam.result({places[name]: reply for name, reply in said.items()}, answers), exam.modality


def knows_the_task(model: Model, tokenizer: Any) -> bool:
    """Whether a model was made for the task's own words and pixels."""
    return tokenizer.get_vocab() == build_tokenizer().get_vocab() and knows_the_pixels(model)


def knows_the_pixels(model: Model) -> bool:
    """Whether a model that sees was made for the task's own pixels, whatever words it knows."""
    vision = getattr(model.config, "vision_config", None)
    if vision is None:
        return True
    return (
        getattr(vision, "image_size", None) == IMAGE_SIZE
        and getattr(model.config, "image_seq_length", None) == NUM_VISUAL_TOKENS
    )


def table(result: Mapping[str, Any], modality: str) -> list[str]:
    """The result as `cdistill eval` prints it."""
    lines = []
    for family in FAMILIES:
        lines.append(family)
        for subtype, accuracy in result[family].items():
            error, constant = result["standard_error"][family][subtype], result["constant_answer"][family][subtype]
            lines.append(
                f"  {subtype:<14}{100 * accuracy:6.1f} ± {100 * error:3.1f}   one answer always: {100 * constant:5.1f}"
            )
    lines.append(
        f"accuracy in % on held-out scenes ({modality}), {result['n']} questions per sub-type, ± standard error"
    )
    return lines
