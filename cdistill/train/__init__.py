"""Training: recipes, the stages of CompoDistill and the trainer on transformers and DeepSpeed.

Importing this package imports neither torch nor transformers.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cdistill.runtime.errors import RunError, Stopped
from cdistill.train.recipes import Recipe, load_recipe

if TYPE_CHECKING:
    from transformers import TrainerCallback

# Where bitsandbytes is installed, transformers imports it, and without a GPU it warns of a kernel nobody asked for.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

__all__ = ["Recipe", "RunError", "Stopped", "load_recipe", "run"]


def run(recipe: Recipe, *, resume: bool = False, callbacks: "Sequence[TrainerCallback]" = ()) -> Path:
    """Run all stages of a recipe (SPEC section 4) and return the folder of the final model.

    ``recipe.output`` receives recipe.yaml, one ``save_pretrained`` folder ``<i>-<stage>`` per finished stage (i counts
    from 1; it appears by a rename), metrics.jsonl and tensorboard/; checkpoints/ exists while a stage runs.

    Args:
        recipe: see `load_recipe`.
        resume: go on with the run in ``recipe.output``: finished stages are skipped, an unfinished one continues from
            its last undamaged checkpoint, or from its start, and ends with the bits of an uninterrupted run.
        callbacks: transformers callbacks for every stage; they need ``recipe.processes`` 1 or a launcher.

    Raises:
        ValueError: the recipe cannot be run, checked before anything is written: missing or corrupt checkpoints, models
            that do not fit each other, an output folder that holds something else or lacks a stage, a port in use.
        RunError: the run failed for a reason that one line tells: a full disk, too many steps in a row that are not
            finite, another process that died; or it was asked to stop (`Stopped`).
    """
    from cdistill.train.stages import run as run_recipe

    return run_recipe(recipe, resume=resume, callbacks=callbacks)
