"""Logs of JSON lines that a killed process may have torn and anybody may have damaged: what can be read of them is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cdistill.files import write_text


def read_lines(path: Path, *keys: str) -> tuple[list[dict[str, Any]], int]:
    """The objects in a file that have all ``keys``, and how many lines are something else; nothing of a file that is missing.

    A last line that was cut off while it was written does not count. Raises OSError.
    """
    if not path.is_file():
        return [], 0
    found, damaged = [], 0
    *lines, last = path.read_bytes().split(b"\n")
    for line in (*lines, last):
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            damaged += bool(line.strip()) and line is not last
            continue
        if isinstance(entry, dict) and all(key in entry for key in keys):
            found.append(entry)
        else:
            damaged += 1
    return found, damaged


def write_lines(path: Path, entries: list[dict[str, Any]]) -> None:
    """Put a file of these objects in the place of what is there, at once. Raises OSError."""
    write_text(path, "".join(f"{json.dumps(entry)}\n" for entry in entries))


def say_damaged(path: Path, damaged: int) -> None:
    """Tell in one line that some lines of a file could not be read, and are left out."""
    if damaged:
        noun = "line" if damaged == 1 else "lines"
        print(f"{path}: {damaged} {noun} could not be read and {'is' if damaged == 1 else 'are'} left out", flush=True)
