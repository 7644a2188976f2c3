"""What goes together with sequences that lie on several processes."""

from collections.abc import Iterator
from typing import Any

from cdistill.train.objectives import OBJECTIVES


def sequence_problems(recipe: Any) -> Iterator[str]:
    """What a recipe asks for that `sequence_parallel` does not do, a line for each."""
    for name in recipe.stages:
        others = [loss for loss in OBJECTIVES[recipe.stage[name].objective].losses if loss not in ("ar", "kd", "vat")]
        if others:
            yield f"stage.{name}.objective must have no losses but ar, kd and vat with sequence_parallel, got {others[0]}"
        if recipe.stage[name].replies is not None:
            yield f"stage.{name} must not generate replies (opd, generation) with sequence_parallel"
    if any(map(recipe.aligns, (recipe.stage[name].objective for name in recipe.stages))):
        yield from recipe.vat.sequence_parallel_problems()
    for key, value, needed in (
        ("deepspeed", recipe.deepspeed == "off", "0 to 3"),
        ("kd.alignment", recipe.kd.alignment != "token", "token"),
        ("compile", recipe.compile, "false"),
        ("teacher_memory.cache", recipe.teacher_memory.cache is not None, "null"),
    ):
        if value:
            yield f"{key} must be {needed} with sequence_parallel"
