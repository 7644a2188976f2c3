"""A model card of a run: what was trained, on what, by which losses, and what was measured, without this machine's folders."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cdistill.data import strict_yaml
from cdistill.models.hub import is_hub_name
from cdistill.models.load import BUILTIN
from cdistill.report.charts import charts
from cdistill.report.history import RunHistory, StageHistory
from cdistill.report.page import clock, environment
from cdistill.train.recipes import recipe_to_dict

TEMPLATE, PICTURE = "card.md.j2", "training.png"


def card(run: RunHistory, repository: str, *, license: str | None, needs_cdistill: bool, picture: bool) -> str:
    """The card as Markdown, its facts for the hub in front.

    Args:
        run: whose result is published.
        repository: name on the hub.
        license: identifier of the hub's, None where the publisher fills it in later.
        needs_cdistill: whether transformers alone cannot load the model.
        picture: whether `PICTURE` lies beside the card.
    """
    recipe = run.recipe
    teachers = tuple(recipe.every_teacher.values()) if recipe.needs_teacher else ()
    references = (*teachers, recipe.student.base, recipe.student.vision)
    bases = [reference.partition("@")[0] for reference in references if reference is not None and _is_pinned(reference)]
    how = "fine-tuned"
    if recipe.needs_teacher:
        aligned = any(recipe.aligns(stage.objective) for stage in run.stages)
        whose = "the teacher's" if len(teachers) == 1 else "the teachers'"
        how = f"distilled from {' and '.join(map(_public, teachers))}" + (
            f", its visual attention aligned with {whose}" if aligned else ""
        )
    return (
        environment()
        .get_template(TEMPLATE)
        .render(
            name=repository.partition("/")[2],
            repository=repository,
            license=license,
            bases=list(dict.fromkeys(bases)),
            how=how,
            needs_cdistill=needs_cdistill,
            stages=[_row(run, stage) for stage in run.stages],
            time=clock(run.seconds),
            processes=recipe.processes,
            picture=picture,
            measured=list(_measured(run)),
            recipe=strict_yaml.dump(_without_folders(recipe_to_dict(recipe))).rstrip(),
        )
    )


def draw(run: RunHistory, path: Path) -> bool:
    """Draw the weighted loss of a run as PNG; False where nothing was logged, or without the package that draws."""
    try:
        import vl_convert
    except ImportError:
        return False
    shown = [chart for chart in charts([run], [run.recipe.name]) if chart.key == "loss"]
    if not shown:
        return False
    columns = shown[0].data
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    spec = shown[0].spec | {"width": 640, "data": {"values": rows}, "title": shown[0].title}
    path.write_bytes(vl_convert.vegalite_to_png(spec, scale=2))
    return True


def _row(run: RunHistory, stage: StageHistory) -> list[str]:
    config = run.recipe.stage[stage.label.partition("-")[2]]
    data = "built-in" if config.data.path is None else _public(config.data.path)
    loss = stage.logged[-1].get("loss") if stage.logged else None
    numbers = [f"{stage.samples:,}", f"{stage.steps:,}", f"{config.learning_rate:g}"]
    return [stage.label, stage.objective, data, *numbers, f"{loss:.4f}" if isinstance(loss, float) else "-"]


def _measured(run: RunHistory) -> Iterator[list[str]]:
    """The last value of everything that was measured of the student."""
    for key in run.logged_keys():
        if "." in key:
            x, y = run.series(key)
            found = [(value, samples) for value, samples in zip(y, x, strict=True) if value is not None]
            if found:
                yield [key, f"{found[-1][0]:.4g}", f"{found[-1][1]:,}"]


def _public(reference: str) -> str:
    """A reference as strangers may read it: of a folder its last name alone."""
    if reference.startswith(BUILTIN) or _is_pinned(reference) or "://" in reference:
        return reference
    return Path(reference).name


def _is_pinned(reference: str) -> bool:
    """Whether a run's recipe names a model of the hub: with its commit, which no folder has, wherever it is now."""
    return "@" in reference and is_hub_name(reference)


def _without_folders(values: Any) -> Any:
    """Plain values with the folders of this machine cut to their last names."""
    if isinstance(values, dict):
        return {key: _without_folders(value) for key, value in values.items()}
    if isinstance(values, list):
        return [_without_folders(value) for value in values]
    if isinstance(values, str) and ("/" in values or "\\" in values):
        return _public(values)
    return values
