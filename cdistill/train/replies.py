"""What a student has answered as it was trained on its own replies: a few of them at every logging step, in replies.jsonl."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cdistill.runtime.json_lines import read_lines, say_damaged, write_lines

FILE = "replies.jsonl"
SHOWN, CHARACTERS = 4, 1000  # replies of a step, and of each text the last ones


@dataclass(frozen=True)
class Reply:
    """What the student has answered: tokens, with the one that ended it, in the place of those that were given."""

    number: int
    prompt: list[int]
    given: list[int]
    tokens: list[int]
    ended: bool


class ReplyLog:
    """Writes replies of the first process to `FILE`.

    Args:
        output: the run's folder.
        stage: name of its section.
        tokenizer: the student's.
        every: steps between two that are shown.
        steps: of the stage; the last one is shown.
    """

    def __init__(self, output: Path, stage: str, tokenizer: Any, *, every: int, steps: int) -> None:
        self.path, self.stage, self.tokenizer, self.every, self.steps = output / FILE, stage, tokenizer, every, steps

    def rewind(self, step: int) -> None:
        """Drop what was written of this stage after ``step``, the one that training goes on from."""
        found, damaged = read_lines(self.path, "stage", "step")
        say_damaged(self.path, damaged)
        kept = [e for e in found if e["stage"] != self.stage or (isinstance(e["step"], int) and e["step"] <= step)]
        if len(kept) < len(found) or damaged:
            write_lines(self.path, kept)

    def write(self, step: int, replies: Sequence[Reply]) -> None:
        """Add the first of the replies that are trained on in ``step``, counted from 1, if it is one that is shown."""
        if not replies or (step % self.every and step != self.steps):
            return
        with self.path.open("a", encoding="utf-8") as file:
            for reply in replies[:SHOWN]:
                entry = {
                    "stage": self.stage,
                    "step": step,
                    "sample": reply.number,
                    "prompt": self._text(reply.prompt),
                    "reply": self._text(reply.tokens),
                    "reference": self._text(reply.given),
                    "tokens": len(reply.tokens),
                    "ended": reply.ended,
                }
                file.write(json.dumps(entry) + "\n")

    def _text(self, tokens: list[int]) -> str:
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True))[-CHARACTERS:]
