"""From a table's name to its page: plan, check, train what is missing, and tell."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cdistill.eval.files import write_atomically
from cdistill.reproduce import page, runs, text
from cdistill.reproduce.findings import Findings, samples_of
from cdistill.reproduce.runs import FAILED, STARTED, STOPPED, TEACHER, Record, Run
from cdistill.reproduce.schedule import Schedule, part_folder
from cdistill.reproduce.tables import load_table
from cdistill.train.recipes import Recipe
from cdistill.train.run_folder import locked


def reproduce(
    table: str,
    *,
    pair: str,
    output: Path,
    seeds: int = 1,
    processes: int = 1,
    resume: bool = False,
    train: bool = True,
    keep: bool = False,
    n: int = runs.QUESTIONS,
) -> Findings:
    """Make the runs of a table that ``output`` lacks, and write TABLE.json and TABLE.html there.

    Args:
        table: name or path.
        pair: recipe that its rows change.
        output: holds a record HASH.json for each run that was ever started, and work/ while one is trained.
        seeds: training seeds, from the pair's on.
        processes: runs at once, each on its share of threads.
        resume: go on with runs that were stopped, and try failed ones again.
        train: False tells of the runs that are there.
        keep: keep weights, in work/HASH/run.
        n: questions per sub-type.

    Raises:
        ValueError: an unknown table, a pair that its rows do not fit, results of another version, begun runs without
            ``resume``, or no run to tell of.
        Stopped: a signal came.
    """
    for key, value in (("seeds", seeds), ("processes", processes), ("n", n)):
        if value < 1:
            raise ValueError(f"--{key} must be at least 1, got {value}")
    of, recipe, name = load_table(table), runs.load_pair(pair), Path(table).stem
    records = runs.read_records(output)
    rates = runs.tuned_rates(recipe, n, records)
    parts, teacher = runs.plan_parts(of), runs.plan_teacher(recipe, n)
    folders = {part: str(part_folder(output, run)) for part, run in parts.items()}

    def planned_rows() -> list[Run]:
        return runs.plan(name, of, recipe, seeds=seeds, n=n, rates=rates, parts=folders)

    if train:
        planned = [] if parts else planned_rows()
        check(name, planned)
        output.mkdir(parents=True, exist_ok=True)
        with locked(output):
            records |= runs.read_records(output)
            schedule = Schedule(output, records, processes, keep)
            _begin(name, pair, [*parts.values(), teacher, *planned], records, output, resume)
            _note_killed(records, output)
            if parts:  # which tell the hashes of rows, once they are there
                schedule.work([run for run in parts.values() if not schedule.is_done(run)])
                planned = planned_rows()
                check(name, planned)
                _begin(name, pair, planned, records, output, resume)
            schedule.work([teacher, *{run.hash: run for run in planned}.values()])
    elif missing := [part for part, folder in folders.items() if not Path(folder).is_dir()]:
        raise ValueError(f"table {name} lacks its part {missing[0]} in {output}: leave --report out to make it")
    else:
        planned = planned_rows()
    findings = Findings(of, planned, records)
    if not any(findings.values(row, "compositional", size, rate) for _, row, size, rate in text.places(findings)):
        raise ValueError(f"table {name} has no finished run in {output}: leave --report out to make them")
    facts = _facts(name, pair, recipe, [*parts.values(), teacher, *planned], records, rates, seeds)
    write_atomically(output / f"{name}.json", json.dumps(text.as_json(findings, name, facts), indent=1) + "\n")
    write_atomically(output / f"{name}.html", page.page(findings, name, facts))
    return findings


def check(name: str, planned: Sequence[Run]) -> None:
    """Raise ValueError for a row whose models cannot be built or trained, before anything is."""
    from cdistill.eval.builtin_task import knows_the_task
    from cdistill.runtime.launch import quiet
    from cdistill.train.build import build_models

    seen = set()
    for run in planned:
        if run.row in seen:
            continue
        seen.add(run.row)
        try:
            with quiet():
                models = build_models(run.recipe)
        except ValueError as error:
            raise ValueError(f"table {name}, row {run.row}: {error}") from None
        if not knows_the_task(models.student, models.tokenizer):
            raise ValueError(
                f"--pair: the student of table {name}, row {run.row} does not know the words and pixels of the built-in "
                "world, by which `cdistill reproduce` judges"
            )


def _begin(
    name: str, pair: str, planned: Sequence[Run], records: dict[str, Record], output: Path, resume: bool
) -> None:
    """Have a record of every planned run in memory, that says who asks for it."""
    begun = [run for run in planned if (r := records.get(run.hash)) and r.status in (STARTED, STOPPED, FAILED)]
    if begun and not resume:
        record = records[begun[0].hash]
        raise ValueError(
            f"--output: {output} holds {len({run.hash for run in begun})} runs of table {name} begun and not finished "
            f"({begun[0].row}, seed {record.seed}: {record.status}): go on with --resume"
        )
    for run in planned:
        exam = None if run.exam is None else asdict(run.exam)
        fresh = Record(run.hash, pair, list(run.overrides), run.recipe.seed, exam)
        record = records.setdefault(run.hash, fresh)
        record.samples = samples_of(run.recipe.stages, run.recipe.stage)
        asked = f"{name}: {run.row}"
        if asked not in record.rows:
            record.rows.append(asked)
            if record.attempts:
                record.write(output)


def _note_killed(records: Mapping[str, Record], output: Path) -> None:
    """Note that runs which only began were killed: nobody else works in the folder now."""
    for record in records.values():
        if record.status == STARTED:
            record.attempts[-1] |= {"status": STOPPED, "reason": "killed"}
            record.write(output)


def _facts(
    name: str,
    pair: str,
    recipe: Recipe,
    planned: Sequence[Run],
    records: Mapping[str, Record],
    rates: Mapping[str, float],
    seeds: int,
) -> dict[str, Any]:
    """What the page says of where its numbers come from: every run that was started for the table among it."""
    mine = {run.hash for run in planned}
    started = [r for r in records.values() if r.attempts and any(row.startswith(f"{name}: ") for row in r.rows)]
    return {
        "command": f"cdistill reproduce {name} --seeds {seeds} --pair {pair}",
        "pair": recipe.name,
        "questions": next(asdict(run.exam) for run in reversed(planned) if run.exam is not None),
        "tuned_rates": dict(rates),
        "teacher": next(
            (records[run.hash].accuracy for run in planned if run.row == TEACHER and run.hash in records), None
        ),
        "commits": sorted({str(a.get("commit")) for r in started for a in r.attempts}),
        "runs": [_told(record, record.hash in mine) for record in started],
    }


def _told(record: Record, in_table: bool) -> dict[str, Any]:
    last = record.attempts[-1]
    return {
        "hash": record.hash,
        "rows": record.rows,
        "seed": record.seed,
        "samples": record.samples,
        "status": record.status,
        "reason": last.get("reason", ""),
        "seconds": round(sum(a.get("seconds", 0.0) for a in record.attempts), 1),
        "cpu_seconds": last.get("cpu_seconds"),
        "attempts": len(record.attempts),
        "commit": last.get("commit"),
        "overrides": record.overrides,
        "in_table": in_table,
    }
