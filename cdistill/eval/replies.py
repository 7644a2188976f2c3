"""What a reply says: letters, yes or no, short answers, each by its benchmark's own rule."""

from __future__ import annotations

import re


def letter(reply: str, letters: str) -> str | None:
    """The first of these letters that stands alone in a reply, whatever its case: "a cat" reads as A."""
    found = re.search(rf"\b([{letters}])\b", reply.upper())
    return found[1] if found else None
