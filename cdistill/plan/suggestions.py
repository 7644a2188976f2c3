"""Which keys of a recipe bring its plan under a limit: tried in an order, each planned again."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from cdistill.plan.memory import Plan, plan
from cdistill.train.recipes import Recipe, with_overrides


@dataclass(frozen=True)
class Suggestion:
    """Overrides of a recipe, what they save in the stage that gains most, and what the largest stage then needs, in bytes."""

    overrides: tuple[str, ...]
    saved: int
    total: int


def suggestions(planned: Plan, limit: int, **options: Any) -> list[Suggestion]:
    """Overrides that bring a plan under a limit in bytes, one after the other: each is planned on top of those before it.

    Those that do not change the results of training come first. Only what saves is in the list, which ends when everything
    fits or nothing is left to try. ``options`` are those of `plan`.
    """
    chosen: list[tuple[str, ...]] = []
    current = planned
    for attempt in _ATTEMPTS:
        for overrides in attempt(current, limit):
            if current.total <= limit:
                break
            changed = _changed(current, overrides, options)
            if changed is not None and _excess(changed, limit) < _excess(current, limit):
                chosen.append(overrides)
                current = changed
    steps = _applied(planned, chosen, options)
    for overrides in chosen[:-1]:  # what a later one has made superfluous
        rest = [x for x in chosen if x != overrides]
        others = _applied(planned, rest, options)
        if others[-1].total <= max(steps[-1].total, limit) and len(others) == len(rest) + 1:
            chosen, steps = rest, others
    result = []
    for overrides, before, after in zip(chosen, steps, steps[1:], strict=False):
        saved = max(x.total - y.total for x, y in zip(before.stages, after.stages, strict=True))
        needed = tuple(x for x in overrides if _matters(before.recipe, x))
        result.append(Suggestion(needed, saved, after.total))
    return result


def _changed(current: Plan, overrides: tuple[str, ...], options: dict[str, Any]) -> Plan | None:
    try:
        return plan(with_overrides(current.recipe, overrides), **options)
    except ValueError:  # a combination that the recipe forbids
        return None


def _applied(planned: Plan, chosen: list[tuple[str, ...]], options: dict[str, Any]) -> list[Plan]:
    """Plans after none, one, two and so on of the overrides, as far as the recipe allows them."""
    result = [planned]
    for overrides in chosen:
        changed = _changed(result[-1], overrides, options)
        if changed is None:
            break
        result.append(changed)
    return result


def _matters(recipe: Recipe, override: str) -> bool:
    try:
        return with_overrides(recipe, [override]) != recipe
    except ValueError:  # needs the others
        return True


def _excess(planned: Plan, limit: int) -> int:
    return sum(max(0, stage.total - limit) for stage in planned.stages)


def _checkpointing(current: Plan, limit: int) -> Iterator[tuple[str, ...]]:
    if not current.recipe.gradient_checkpointing:
        yield ("gradient_checkpointing=true",)


def _smaller_batches(current: Plan, limit: int) -> Iterator[tuple[str, ...]]:
    """Halves of the micro-batches of the stages that do not fit, all of them at once."""
    sizes = {stage.name: stage.setting.batch for stage in current.stages if stage.total > limit}
    while any(size > 1 and size % 2 == 0 for size in sizes.values()):
        sizes = {name: size // 2 if size % 2 == 0 else size for name, size in sizes.items()}
        yield tuple(f"stage.{name}.micro_batch_size={size}" for name, size in sizes.items())


def _partitioning(current: Plan, limit: int) -> Iterator[tuple[str, ...]]:
    for stage in (2, 3):
        if current.recipe.deepspeed == "off" or int(current.recipe.deepspeed) < stage:
            yield (f"deepspeed={stage}",)


def _teacher_memory(current: Plan, limit: int) -> Iterator[tuple[str, ...]]:
    memory = current.recipe.teacher_memory
    if current.recipe.needs_teacher and memory.cache is None:
        yield ("teacher_memory.zero=3",)
        yield ("teacher_memory.zero=3", "teacher_memory.offload=true")
        plain = ("teacher_memory.zero=off", "teacher_memory.offload=false")
        yield (*plain, "teacher_memory.quantization=8bit")
        yield (*plain, "teacher_memory.quantization=4bit")
        yield (*plain, "teacher_memory.quantization=null", f"teacher_memory.cache={current.recipe.output}-teacher")


def _low_rank(current: Plan, limit: int) -> Iterator[tuple[str, ...]]:
    if current.recipe.student.lora is None:
        yield ("student.lora.r=128",)


_ATTEMPTS = (_checkpointing, _partitioning, _smaller_batches, _teacher_memory, _low_rank)
