"""What the task files beside this one call. lmms-eval loads this file by its path, so names are absolute.

``CDISTILL_EVAL_DATA`` names the folder of the benchmarks' files, with a folder for each task, as ``--data`` of ``cdistill
eval``; ``CDISTILL_EVAL_IMAGES`` that of images, if they lie elsewhere. The name of a split is the benchmark's.

Scores need log-probabilities, for which the harness has no way that works (its evaluator makes texts of them, and takes the
least likely choice). They travel as JSON in the place of a reply, from our model to `process_results`.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from PIL import Image

from cdistill.errors import InputError
from cdistill.eval import benchmarks
from cdistill.eval.contract import Answer, Question
from cdistill.eval.pictures import Pictures

DATA, IMAGES = "CDISTILL_EVAL_DATA", "CDISTILL_EVAL_IMAGES"

# What the harness shows of each; `cdistill eval score` has all.
METRICS = {
    "sugarcrepe": (
        *("add_att", "add_obj", "replace_att", "replace_obj", "replace_rel", "swap_att", "swap_obj"),
        "mean",
    ),
    "sade": ("mean",),
    "bivlc": ("i2t", "t2i", "group"),
    "winoground": ("text", "image", "group"),
    "rbench": ("accuracy", "precision", "recall", "yes_ratio", "f1"),
    "reefknot": ("perception", "cognitive", "total"),
    "vsr": ("accuracy",),
    "mmvp": ("accuracy", "pairs"),
    "naturalbench": ("accuracy", "question", "image", "group"),
    "pope": ("accuracy", "precision", "recall", "yes_ratio", "f1"),
    "vqav2": ("accuracy",),
    "vizwiz": ("accuracy",),
    "gqa": ("accuracy",),
    "textvqa": ("accuracy",),
    "mme": ("cognition", "perception", "perception/20"),
}


def __getattr__(name: str) -> Any:
    """``metrics_TASK``: a task file's list of metrics."""
    if name.startswith("metrics_"):
        task = name.removeprefix("metrics_")
        return [
            {"metric": metric, "aggregation": _aggregation(task, metric), "higher_is_better": metric != "yes_ratio"}
            for metric in METRICS[task]
        ]
    raise AttributeError(name)


def process_docs(dataset: Any) -> Any:
    """The questions of the benchmark that the split is named after, in place of what was in the file.

    Raises:
        ValueError: no folder of data is named, or its files are not right.
    """
    import datasets

    task = str(dataset.split)
    questions = benchmarks.get(task).questions(folder(task))
    return datasets.Dataset.from_list([document(task, question) for question in questions], split=dataset.split)


def folder(task: str) -> Path:
    """Where a benchmark's files are."""
    if not os.environ.get(DATA):
        raise InputError(f"{DATA} must name the folder of the benchmarks' files, with a folder {task} in it")
    root = Path(os.environ[DATA])
    return root / task if (root / task).is_dir() else root


@lru_cache(maxsize=32)
def pictures(task: str, images: str | None) -> Pictures:
    """What opens a benchmark's images; ``images`` is the variable's value."""
    data = folder(task)
    roots = [data, data / "images"]
    if images:
        own = Path(images) / task
        roots.insert(0, own if own.is_dir() else Path(images))
    return Pictures(roots)


def document(task: str, question: Question) -> dict[str, Any]:
    """A question as a row of a data set; facts, which are of any kind, as JSON."""
    return {
        "benchmark": task,
        **vars(question),
        "images": list(question.images),
        "facts": json.dumps(dict(question.facts)),
    }


def question_of(doc: Mapping[str, Any]) -> Question:
    """The question of such a row."""
    fields = {name: value for name, value in doc.items() if name != "benchmark"}
    return Question(**{**fields, "images": tuple(doc["images"]), "facts": json.loads(doc["facts"])})


def doc_to_visual(doc: Mapping[str, Any]) -> list[Image.Image]:
    """The images, in order."""
    opener = pictures(doc["benchmark"], os.environ.get(IMAGES))
    return [opener.open(name) for name in doc["images"]]


def doc_to_text(doc: Mapping[str, Any], lmms_eval_specific_kwargs: Any = None) -> str:
    """The user's text."""
    return doc["prompt"]


def doc_to_target(doc: Mapping[str, Any]) -> str:
    """What is right, where it is one text."""
    return str(json.loads(doc["facts"]).get("label", ""))


def reply_of(answer: Answer) -> str:
    """An answer as a reply: its text, or its score as JSON."""
    return answer.reply if answer.score is None else json.dumps({"score": answer.score, "tokens": answer.tokens})


def answer_of(doc: Mapping[str, Any], reply: str) -> Answer:
    """The answer that such a reply stands for.

    Raises:
        ValueError: a score was asked for and the reply is a text.
    """
    question = question_of(doc)
    if question.kind == "generate":
        return Answer(question, reply)
    try:
        said = json.loads(reply)
        return Answer(question, score=float(said["score"]), tokens=int(said["tokens"]))
    except (ValueError, TypeError, KeyError):
        raise InputError(
            f"cd_{doc['benchmark']} compares log-probabilities, which only --model cdistill gives; got {reply!r:.60}"
        ) from None


def process_results(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, str]:
    """The answer, for each metric: what it is worth is seen among all.

    It is written as JSON, because the harness computes a standard error of items that have a ``score``, as if no two of them
    shared an image.
    """
    task = doc["benchmark"]
    return dict.fromkeys(METRICS[task], json.dumps(answer_of(doc, results[0]).to_json(task)))


def _aggregation(task: str, metric: str) -> Callable[[Sequence[str]], float]:
    def aggregate(records: Sequence[str]) -> float:
        tally = benchmarks.get(task).tally([Answer.from_json(json.loads(record), task) for record in records])
        values = dict(zip(tally.names, 100.0 * tally.values(tally.sums().sum(0)), strict=True)) if tally.names else {}
        return float(values.get(metric, math.nan))  # of a sub-type that --limit has left out

    return aggregate
