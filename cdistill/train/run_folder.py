"""A run's folder: how far its run has come, what of the recipe may still change, and that one run at a time writes to it."""

import json
import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from cdistill._plugins import import_plugins
from cdistill.data import strict_yaml
from cdistill.errors import InputError
from cdistill.files import MARK, entries
from cdistill.manifest import verify
from cdistill.models.load import METRICS, RECIPE, load_model
from cdistill.runtime.collectives import first_process
from cdistill.runtime.json_lines import read_lines
from cdistill.train.recipes import Recipe, recipe_from_dict, recipe_to_dict
from cdistill.train.recipes.values import MISSING, differences

CHECKPOINTS = "checkpoints"
# Keys that change nothing of what is trained; checkpoints hold the number of processes that wrote them and refuse others.
FREE = (
    *(
        "name",
        "output",
        "processes",
        "sequence_parallel",
        "workers",
        "save_steps",
        "logging_steps",
        "log_layers",
        "report_to",
    ),
    *("max_bad_samples", "max_nonfinite_steps", "max_stuck_seconds"),
)
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
    return {str(entry["stage"]) for entry in read_lines(metrics, "stage")[0]}


def refuse_other_run(recipe: Recipe, recorded: Recipe, output: Path) -> None:
    """Raise ValueError where a recipe would change what the run in a folder, of the recipe ``recorded``, has trained.

    The keys `FREE`, folders of images, and the sections of stages that have not begun may change, and all of a recipe of
    which no stage has. The message names the keys and both values.
    """
    begun = begun_stages(recorded, output)
    found = list(differences(decided(recorded, begun), decided(recipe, begun))) if begun else []
    if found:
        raise InputError(
            f"output {output} holds a different run: {_listed(found)}; choose another folder, or go on with what is there"
        )


def print_changes(recipe: Recipe, output: Path, recorded: Recipe) -> None:
    """Say in one line what a recipe changes that may change, beside `FREE`."""
    before, now = (recipe_to_dict(r) for r in (recorded, recipe))
    for content in (before, now):
        for name in FREE:
            del content[name]
    found = list(differences(before, now))
    if found:
        print(f"{output} goes on with a changed recipe: {_listed(found)}", flush=True)


def decided(recipe: Recipe, begun: int) -> dict[str, Any]:
    """What of a recipe the first stages have been trained by."""
    content = recipe_to_dict(recipe)
    for name in FREE:
        del content[name]
    content["stages"] = content["stages"][:begun]
    content["stage"] = {name: content["stage"][name] for name in content["stages"]}
    for section in content["stage"].values():
        del section["data"]["images"], section["keep_best"], section["eval"]
    return content


def _listed(found: list[tuple[str, Any, Any]]) -> str:
    named = [
        f"{key} differs ({_shortened(there)} there, {_shortened(here)} here)" for key, there, here in found[:NAMED]
    ]
    return ", ".join(named) + (f", and {len(found) - NAMED} more" if len(found) > NAMED else "")


def _shortened(value: Any) -> str:
    text = "nothing" if value is MISSING else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:77]}..."


def read_recipe(output: Path) -> Recipe:
    """The recipe of the run in an output folder. Raises ValueError naming the file if it holds none."""
    path = output / RECIPE
    import_plugins()
    try:
        content = strict_yaml.load(path.read_text(encoding="utf-8"), str(path))
        if not isinstance(content, dict):
            raise InputError("no mapping of keys")
        return recipe_from_dict(content)
    except ValueError as error:
        reason = " ".join(str(error).removeprefix(f"{path} ").split())
        raise InputError(f"output: {path} is not a recipe ({reason}): put it back, or choose another folder") from None


def check_stages(output: Path, folders: Sequence[Path]) -> None:
    """Raise ValueError unless every stage that a later one went on from is there, and whole."""
    for i, folder in enumerate(folders):
        begun = [f for f in folders[i + 1 :] if f.is_dir() or (output / CHECKPOINTS / f.name).is_dir()]
        if not folder.is_dir():
            if begun:
                raise InputError(
                    f"output: {folder} is missing, but {begun[0].name}, which went on from it, has begun: put it back, "
                    f"or delete {' and '.join(f.name for f in begun)} in {output} and {output / CHECKPOINTS}, too"
                )
            continue
        verify(folder, "output", needed=True)
        load_model(folder, "output")


def check_output(recipe: Recipe, output: Path, resume: bool) -> None:
    """Raise ValueError unless a run of the recipe may begin in a folder or, to ``resume``, go on there."""
    if output.exists() and not output.is_dir():
        raise InputError(f"output {output} is not a folder")
    if output.is_dir() and not entries(output) and any(MARK in path.name for path in output.iterdir()):
        return  # killed before anything else was written
    if not output.is_dir() or not entries(output):
        if resume:
            raise InputError(f"output {output} holds no run to resume")
        return
    if not (output / RECIPE).is_file():
        raise InputError(f"output {output} is not empty and holds no run: choose another folder")
    recorded = read_recipe(output)
    refuse_other_run(recipe, recorded, output)
    if not resume and begun_stages(recorded, output):
        raise InputError(f"output {output} already holds a run of this recipe: continue it with --resume")


def remove_leftovers(output: Path, folder: Path) -> None:
    """Remove what a run that was killed after a stage's last rename has left of it."""
    if first_process():
        shutil.rmtree(output / CHECKPOINTS / folder.name, ignore_errors=True)
        with suppress(OSError):  # it holds those of another stage, or has never been
            (output / CHECKPOINTS).rmdir()
