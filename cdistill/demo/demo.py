"""The demo from its runs to its files: train and examine what is missing, look at attention, write numbers and a page."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from cdistill.choices import MOST_DRAWN, MOST_PROCESSES, require_count
from cdistill.demo.page import page
from cdistill.demo.result import DISTILLED, SFT, SHOWN, UNALIGNED, Demo
from cdistill.files import write_text
from cdistill.reproduce.command import PAIR
from cdistill.reproduce.findings import Findings
from cdistill.reproduce.reproduce import Reproduction
from cdistill.reproduce.runs import FINISHED, REPORTED, Run
from cdistill.reproduce.schedule import weights_folder
from cdistill.runtime.errors import RunError

TABLE = "demo"
NAMES = {SFT: "sft", UNALIGNED: "kd-taf", DISTILLED: "compodistill"}  # of the students' runs in the output folder
WAYS = {"recognition": "greedy", "compositional": "choice"}
LOOKED_AT = 140  # questions of each family whose attention is compared
PICTURES = ("swap_att", "replace_obj")  # sub-types whose first question is drawn
LOOKS = "looks"  # folder of pictures


def demo(*, output: Path, n: int, processes: int = 1, overrides: Sequence[str] = ()) -> Demo:
    """Train the students, examine them and their teacher, and write results.json and report.html.

    ``output`` also receives a record of each run and its folder (layout of `cdistill.train.run`), under ``sft``, ``kd-taf`` and
    ``compodistill``. Runs that it already holds are gone on with, or used if they are finished.

    Args:
        n: questions per sub-type.
        processes: students trained side by side.
        overrides: ``key=value`` for the recipe of all students.

    Raises:
        ValueError: n or processes is not positive, or an override does not fit.
        RunError: a run failed.
    """
    require_count("--n", n, MOST_DRAWN)
    require_count("--processes", processes, MOST_PROCESSES)
    work = Reproduction(TABLE, PAIR, output, 1, n, overrides)
    runs = {run.row: run for run in (*work.rows(), work.teacher)}
    samples = sum(stage.samples for stage in runs[DISTILLED].recipe.stage.values())
    print(
        f"training {len(runs) - 1} students on {samples:,} samples each, {processes} side by side, and examining them and "
        "their teacher",
        flush=True,
    )
    work.train(processes=processes, resume=True, keep=True)
    for run in runs.values():
        record = work.records[run.hash]
        if record.status != FINISHED:
            raise RunError(
                f"demo: {run.row} {record.status}: {record.attempts[-1].get('reason', 'no reason is known')}"
            )
    for row, name in NAMES.items():
        _link(output / name, weights_folder(output, runs[row]).parent)
    records = {row: work.records[run.hash] for row, run in runs.items()}
    accuracy = {
        row: {family: records[row].accuracy[way][family] for family, way in WAYS.items()}  # type: ignore[index]
        for row in SHOWN
    }
    print("looking at their attention", flush=True)
    looks = look({row: _model(run, output) for row, run in runs.items()}, output / LOOKS)
    attempts = [record.attempts[-1] for record in records.values()]
    facts = {
        "recipe": PAIR,
        "overrides": " ".join(overrides) or "none",
        "seed": runs[DISTILLED].recipe.seed,
        "questions": f"{n} per sub-type, seed {REPORTED}",
        "cpu_seconds": {row: record.attempts[-1]["cpu_seconds"] for row, record in records.items()},
        **{key: attempts[-1].get(key) for key in ("commit", "versions", "machine")},
    }
    found = Demo(Findings(work.table, list(runs.values())[:-1], work.records), accuracy, n, looks, facts)
    _write(found, output)
    return found


def look(models: Mapping[str, str], folder: Path) -> dict[str, dict[str, Any]]:
    """Similarity of the students' attention to the teacher's, and pictures of it, as ``cdistill analyze`` makes them.

    Args:
        models: references by name, as `cdistill.eval.loading.load` takes them; `TEACHER` among them.
        folder: of the pictures.
    """
    from cdistill.attention import maps, results
    from cdistill.attention.data import sets_of
    from cdistill.attention.models import Models
    from cdistill.attention.similarity import similarity
    from cdistill.eval.loading import load
    from cdistill.runtime import launch

    asked = argparse.Namespace(task=[], data=None, images=None, limit=LOOKED_AT, seed=REPORTED)
    with launch.quiet():
        teacher, *students = [replace(load(models[name], usual_processor=True), name=name) for name in SHOWN]
        together = Models(teacher, students)
        sets = sets_of(asked)
        similar = results.whole("similarity", together, similarity(together, sets, None))
        found = maps.cases_of(sets)
        cases = [next(case for case in found if case.question.facts["subtype"] == subtype) for subtype in PICTURES]
        own = [replace(case, question=replace(case.question, kind="generate", continuation="")) for case in cases]
        drawn = maps.maps(together, own, spans=["intermediate"], words=None, folder=folder)
    return results.numbers({"similarity": similar, "maps": results.whole("maps", together, drawn)})


def _link(name: Path, folder: Path) -> None:
    """Give a run's folder a name that can be remembered, where nothing of the user's has it."""
    if name.is_symlink():
        name.unlink()
    if not name.exists():
        name.symlink_to(folder.relative_to(name.parent))


def _model(run: Run, output: Path) -> str:
    """Where a run's model is."""
    return run.model or str(weights_folder(output, run))


def _write(found: Demo, output: Path) -> None:
    content = {
        "accuracy": found.accuracy,
        "standard_error": {
            model: {family: {name: found.error(model, family, name) for name in of} for family, of in families.items()}
            for model, families in found.accuracy.items()
        },
        "similarity": found.looks["similarity"]["sets"],
        "seeds": found.seeds,
        "facts": found.facts,
    }
    write_text(output / "results.json", json.dumps(content, indent=1) + "\n")
    write_text(output / "report.html", page(found, output / LOOKS))
