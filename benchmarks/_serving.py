"""What served students are asked: questions of the built-in task about images, and when a reply is right."""

import base64
import io
import json
import subprocess
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from PIL import Image

import cdistill
from benchmarks._results import cpu_environment, results_folder
from cdistill.builtin.scorer import held_out_questions
from cdistill.builtin.task import SUBTYPES
from cdistill.models.load import Model

EACH = 50  # questions of a kind
THREADS = 2
ASKED, PAIRS, PLAIN = 350, 25, 25  # conversations with an image, with two, and with words alone
MOST_TOKENS, LONG, TRIES = 12, 128, 5  # of a reply; of one that is timed, and how often


def questions() -> Iterator[tuple[list[dict[str, Any]], str]]:
    """Messages with an image and a question, and the right answer; every kind in turn."""
    data = [held_out_questions(kind, n=EACH) for kind in SUBTYPES]
    for i in range(EACH):
        for one in data:
            asked, answered = one.messages(i)
            yield [asked], answered["content"][0]["text"]


def right(reply: str, answer: str) -> bool:
    """Whether a reply begins with the right answer, as the built-in task counts it."""
    return reply.split()[: len(answer.split())] == answer.split()


def conversations() -> tuple[list[list[dict[str, Any]]], list[str]]:
    """Questions about an image with their answers, then about two images and about none."""
    asked = list(questions())[:ASKED]
    images = [message["content"][0] for (message,), _ in asked]
    words = [message["content"][1] for (message,), _ in asked]
    more = [[{"role": "user", "content": [images[i], images[-1 - i], words[i]]}] for i in range(PAIRS)]
    more += [[{"role": "user", "content": [words[i]]}] for i in range(PLAIN)]
    return [messages for messages, _ in asked] + more, [answer for _, answer in asked]


def as_request(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A conversation as servers take it: images as data URLs."""

    def part(value: dict[str, Any]) -> dict[str, Any]:
        if value["type"] != "image":
            return value
        file = io.BytesIO()
        image: Image.Image = value["image"]
        image.save(file, format="PNG")
        return {
            "type": "image_url",
            "image_url": {"url": f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"},
        }

    return [{**message, "content": [part(value) for value in message["content"]]} for message in messages]


@torch.no_grad()
def by_transformers(model: Model, processor: Any, asked: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Greedy replies, one conversation at a time."""
    found = []
    for messages in asked:
        given = processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        ids = model.generate(**given, max_new_tokens=MOST_TOKENS, do_sample=False)[0]
        prompt = given["input_ids"].shape[1]
        found.append({"prompt": prompt, "ids": ids[prompt:].tolist()})
    return found


def ask_elsewhere(
    python: Path, worker: Path, folder: Path, asked: list[list[dict[str, Any]]], scratch: Path
) -> dict[str, Any]:
    """What a process of another environment answers, and how fast it is; of a worker that takes a request as vLLM's does."""
    request = {
        "folder": str(folder),
        "length": 512,
        "tokens": MOST_TOKENS,
        "timed": LONG,
        "tries": TRIES,
        "conversations": [as_request(messages) for messages in asked],
    }
    (scratch / "request.json").write_text(json.dumps(request))
    subprocess.run([python, worker, scratch / "request.json", scratch / "answer.json"], check=True, cwd=scratch)
    answer: dict[str, Any] = json.loads((scratch / "answer.json").read_text())
    return answer


def compared(
    answer: dict[str, Any], expected: list[dict[str, Any]], answers: list[str], processor: Any
) -> dict[str, Any]:
    """How often `ask_elsewhere` got transformers' replies to the `conversations`, and right ones; and tokens a second."""
    same = [a == b for a, b in zip(answer["replies"], expected, strict=True)]
    replies = [processor.decode(x["ids"], skip_special_tokens=True).strip() for x in answer["replies"][: len(answers)]]
    return {
        "same_replies_of_50": sum(same[:50]),
        "same_replies": sum(same),
        "conversations": len(same),
        "two_images": sum(same[ASKED : ASKED + PAIRS]),
        "words_alone": sum(same[ASKED + PAIRS :]),
        "accuracy": sum(map(right, replies, answers)) / len(answers),
        "tokens_per_second": round(answer["tokens_per_second"]),
    }


def write_rows(name: str, rows: list[dict[str, Any]], **facts: Any) -> None:
    """Keep a table in benchmarks/results/serve, with what it was measured on."""
    known = {"date": datetime.now(UTC).isoformat(timespec="seconds"), **cpu_environment(), "threads": THREADS}
    path = results_folder() / "serve" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(known | {"cdistill": cdistill.__version__} | facts | {"rows": rows}, indent=1) + "\n")
