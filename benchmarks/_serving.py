"""What served students are asked: questions of the built-in task about images, and when a reply is right."""

from collections.abc import Iterator
from typing import Any

from cdistill.builtin.scorer import held_out_questions
from cdistill.builtin.task import SUBTYPES

EACH = 50  # questions of a kind


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
