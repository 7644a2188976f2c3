"""A run's folder: how far its run has come, what of the recipe may still change, and that one run at a time writes to it."""

import fcntl
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cdistill.train.config import Recipe
from cdistill.train.recipes import recipe_to_dict
from cdistill.train.values import MISSING, differences

CHECKPOINTS = "checkpoints"
METRICS = "metrics.jsonl"
# Keys that change nothing of what is trained; checkpoints hold the number of processes that wrote them and refuse others.
FREE = (
    *("name", "output", "processes", "workers", "save_steps", "logging_steps", "log_layers"),
    *("max_bad_samples", "max_nonfinite_steps"),
)
LOCK_SECONDS = 6.0  # processes that read samples notice within 5 that the run which started them has been killed
NAMED = 4  # differences in a message


def stage_folders(recipe: Recipe, output: Path) -> list[Path]:
    """Folders of the results of a recipe's stages, in order."""
    return [output / f"{i}-{name}" for i, name in enumerate(recipe.stages, 1)]


def begun_stages(recipe: Recipe, output: Path) -> int:
    """How many of a recipe's stages, from the first on, have left a result, a checkpoint or a logged step."""
    logged = _logged(output / METRICS)
    for number, folder in reversed(list(enumerate(stage_folders(recipe, output), 1))):
        saved = (output / CHECKPOINTS / folder.name).glob("checkpoint-*/complete")
        if folder.is_dir() or recipe.stages[number - 1] in logged or any(saved):
            return number
    return 0


def _logged(metrics: Path) -> set[str]:
    """Sections of the stages that have logged a step; a line that was cut off tells nothing."""
    found = set()
    for line in metrics.read_text(encoding="utf-8").splitlines() if metrics.is_file() else ():
        try:
            found.add(json.loads(line)["stage"])
        except (ValueError, KeyError, TypeError):
            continue
    return found


def refuse_other_run(recipe: Recipe, held: Recipe, output: Path) -> None:
    """Raise ValueError where a recipe would change what the run in a folder, of the recipe ``held``, has trained.

    The keys `FREE`, folders of images, and the sections of stages that have not begun may change, and all of a recipe of
    which no stage has. The message names the keys and both values.
    """
    begun = begun_stages(held, output)
    found = list(differences(_decided(held, begun), _decided(recipe, begun))) if begun else []
    if found:
        raise ValueError(
            f"output {output} holds a different run: {_told(found)}; choose another folder, or go on with what is there"
        )


def tell_changes(recipe: Recipe, output: Path, held: Recipe) -> None:
    """Say in one line what a recipe changes that may change, beside `FREE`."""
    before, now = (recipe_to_dict(r) for r in (held, recipe))
    for content in (before, now):
        for name in FREE:
            del content[name]
    found = list(differences(before, now))
    if found:
        print(f"{output} goes on with a changed recipe: {_told(found)}", flush=True)


def _decided(recipe: Recipe, begun: int) -> dict[str, Any]:
    """What of a recipe the first stages have been trained by."""
    content = recipe_to_dict(recipe)
    for name in FREE:
        del content[name]
    content["stages"] = content["stages"][:begun]
    content["stage"] = {name: content["stage"][name] for name in content["stages"]}
    for section in content["stage"].values():
        del section["data"]["images"]
    return content


def _told(found: list[tuple[str, Any, Any]]) -> str:
    named = [f"{key} differs ({_shown(there)} there, {_shown(here)} here)" for key, there, here in found[:NAMED]]
    return ", ".join(named) + (f", and {len(found) - NAMED} more" if len(found) > NAMED else "")


def _shown(value: Any) -> str:
    text = "nothing" if value is MISSING else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:77]}..."


@contextmanager
def locked(output: Path) -> Iterator[None]:
    """Keep other runs out of a folder. Raises ValueError if one is there and does not end within `LOCK_SECONDS`."""
    descriptor, deadline = os.open(output, os.O_RDONLY), time.monotonic() + LOCK_SECONDS
    try:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise ValueError(
                        f"output {output} is in use by another run: wait for its end, or choose another folder"
                    ) from None
                time.sleep(0.05)
            except OSError:  # a file system that has no locks
                break
        yield
    finally:
        # Before it is closed: processes that read samples have copies of the descriptor.
        try:
            fcntl.flock(descriptor, fcntl.LOCK_UN)
        finally:
            os.close(descriptor)
