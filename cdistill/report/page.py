"""The page of runs: one file with everything in it, charts by Vega-Lite, the frame by a template of Jinja."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from cdistill.analysis.figures import DARK_SERIES, SERIES
from cdistill.analysis.figures import STYLE as COLOURS
from cdistill.analysis.page import DARK, STYLE
from cdistill.errors import InputError
from cdistill.report.charts import charts
from cdistill.report.history import DONE, RUNNING, RunHistory, StageHistory

TEMPLATE = "page.html.j2"


def page(runs: Sequence[RunHistory], *, refresh: int | None = None) -> str:
    """The whole document of one or several runs; a browser reads it again after ``refresh`` seconds.

    Raises ValueError without the package that has the charts' scripts.
    """
    names = _names(runs)
    shown = charts(runs, names)
    return (
        environment()
        .get_template(TEMPLATE)
        .render(
            title=names[0] if len(runs) == 1 else f"{len(runs)} runs",
            style=STYLE + COLOURS + DARK,
            script=_script() if shown else "",
            refresh=refresh if any(run.state == RUNNING for run in runs) else None,
            runs=[{"name": name, **_about(run)} for name, run in zip(names, runs, strict=True)],
            charts=shown,
            drawn=[{"spec": chart.spec, "data": chart.data} for chart in shown],
            stages=[[stage.label, stage.before] for stage in max(runs, key=lambda run: len(run.stages)).stages[1:]],
            series=[SERIES[1:], DARK_SERIES[1:]],
        )
    )


def environment() -> Any:
    """Jinja with this room's templates; what goes into HTML is escaped."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    return Environment(
        loader=PackageLoader("cdistill.report", "."),
        autoescape=lambda name: ".html" in (name or ""),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


@lru_cache(maxsize=1)
def _script() -> str:
    """Vega, Vega-Lite and Vega-Embed in one script, about 0.9 MB."""
    try:
        import vl_convert
    except ImportError:
        raise InputError(
            "cdistill report draws with vl-convert-python, which is not installed: pip install 'cdistill[report]'"
        ) from None
    return vl_convert.javascript_bundle().replace("</script", "<\\/script")  # type: ignore[call-arg]  # the stub lacks the default


def _names(runs: Sequence[RunHistory]) -> list[str]:
    """What runs are called: by their recipe or, where several have one name, by what their folders differ in."""
    names = [run.recipe.name for run in runs]
    if len(set(names)) == len(names):
        return names
    folders = [run.folder.absolute() for run in runs]
    common = os.path.commonpath(folders)
    return [str(folder.relative_to(common)) for folder in folders]


def _about(run: RunHistory) -> dict[str, Any]:
    last = next((stage for stage in reversed(run.stages) if stage.logged), None)
    left = [stage.seconds_left for stage in run.stages if stage.state == RUNNING]
    cards = [
        ("state", run.state + (f", {clock(left[0])} left in its stage" if left and left[0] is not None else "")),
        ("trained", clock(run.seconds)),
        ("processes x hours", f"{run.process_hours:,.2f}"),
    ]
    if last is not None and isinstance(last.logged[-1].get("loss"), float):
        cards.append(("loss, last", f"{last.logged[-1]['loss']:.4f}"))
    return {
        "folder": str(run.folder),
        "cards": cards,
        "stages": [_row(stage) for stage in run.stages],
        "bad": [(stage.label, reason, count) for stage in run.stages for reason, count in stage.bad.most_common()],
        "replies": run.replies,
        "recipe": run.text,
    }


def _row(stage: StageHistory) -> list[str]:
    rate = stage.step / stage.steps * stage.samples / stage.seconds if stage.seconds and stage.step else None
    loss = stage.logged[-1].get("loss") if stage.logged else None
    return [
        stage.label,
        stage.objective,
        stage.state,
        f"{stage.steps if stage.state == DONE else stage.step:,} of {stage.steps:,}",
        f"{stage.samples:,}",
        clock(stage.seconds) if stage.step else "-",
        "-" if rate is None else f"{rate:,.1f}",
        f"{loss:.4f}" if isinstance(loss, float) else "-",
        f"{stage.bad.total():,}",
    ]


def clock(seconds: float) -> str:
    """A time as people say it: 45 s, 12 min, 3 h 05 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60:,} h {minutes % 60:02d} min"
