"""From a table's name to its page: plan, check, train what is missing, and tell."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from cdistill.choices import MOST_DRAWN, MOST_PROCESSES, MOST_SEEDS, require_count
from cdistill.errors import InputError
from cdistill.files import owned, write_text
from cdistill.reproduce import page, runs, text
from cdistill.reproduce.findings import Findings, samples_of
from cdistill.reproduce.runs import FAILED, STARTED, STOPPED, Record, Run
from cdistill.reproduce.schedule import Schedule, part_folder
from cdistill.reproduce.tables import load_table


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
    for key, value, most in (
        ("seeds", seeds, MOST_SEEDS),
        ("processes", processes, MOST_PROCESSES),
        ("n", n, MOST_DRAWN),
    ):
        require_count(f"--{key}", value, most)
    work = Reproduction(table, pair, output, seeds, n)
    if train:
        work.train(processes=processes, resume=resume, keep=keep)
    return work.tell()


class Reproduction:
    """A table on a pair, in a folder. The arguments are those of `reproduce`; ``overrides`` change the pair's keys."""

    def __init__(self, table: str, pair: str, output: Path, seeds: int, n: int, overrides: Sequence[str] = ()) -> None:
        self.table, self.name = load_table(table), Path(table).stem
        self.pair, self.recipe, self.overrides = pair, runs.load_pair(pair, overrides), tuple(overrides)
        self.output, self.seeds, self.n = output, seeds, n
        self.records = runs.read_records(output)
        self.rates = runs.tuned_rates(self.recipe, n, self.records)
        self.parts, self.teacher = runs.plan_parts(self.table), runs.plan_teacher(self.recipe, n, self.table.pairs)
        self.folders = {part: part_folder(output, run) for part, run in self.parts.items()}

    def rows(self, folders: Mapping[str, Path] | None = None) -> list[Run]:
        """Runs of the rows. Their hashes depend on the parts, which must be there or known by their records, or on models for
        them in other ``folders``."""
        parts = {part: str(folder) for part, folder in (folders or self.folders).items()}
        known = {parts[part]: model for part in parts if (model := self._known(part)) is not None}
        return runs.plan(
            self.name, self.table, self.recipe, seeds=self.seeds, n=self.n, rates=self.rates, parts=parts, known=known
        )

    def _known(self, part: str) -> str | None:
        """What tells the weights of a part that is no longer there from others."""
        record = self.records.get(self.parts[part].hash)
        return None if record is None or self.folders[part].is_dir() else record.model

    def train(self, *, processes: int, resume: bool, keep: bool) -> None:
        """Make the runs that the folder lacks."""
        with TemporaryDirectory() as folder:
            check(self.name, self.rows(untrained(self.name, self.parts, Path(folder))))
        rows = [] if self.parts else self.rows()
        self.output.mkdir(parents=True, exist_ok=True)
        with owned(self.output, "--output"):
            self.records |= runs.read_records(self.output)
            schedule = Schedule(self.output, self.records, processes, keep)
            self._begin([*self.parts.values(), self.teacher, *rows], resume)
            _note_killed(self.records, self.output)
            if self.parts:
                schedule.work(list(self.parts.values()))
                rows = self.rows()
                self._begin(rows, resume)
            schedule.work([self.teacher, *{run.hash: run for run in rows}.values()])

    def _begin(self, planned: Sequence[Run], resume: bool) -> None:
        """Have a record of every planned run in memory, that says who asks for it."""
        records = self.records
        begun = [run for run in planned if (r := records.get(run.hash)) and r.status in (STARTED, STOPPED, FAILED)]
        if begun and not resume:
            record = records[begun[0].hash]
            raise InputError(
                f"--output: {self.output} holds {len({run.hash for run in begun})} runs of table {self.name} begun and not "
                f"finished ({begun[0].row}, seed {record.seed}: {record.status}): go on with --resume"
            )
        for run in planned:
            exam = None if run.exam is None else run.exam.facts()
            fresh = Record(run.hash, self.pair, [*self.overrides, *run.overrides], run.recipe.seed, exam)
            record = records.setdefault(run.hash, fresh)
            record.samples = 0 if run.model else samples_of(run.recipe.stages, run.recipe.stage)
            asked = f"{self.name}: {run.row}"
            if asked not in record.rows:
                record.rows.append(asked)
                if record.attempts:
                    record.write(self.output)

    def tell(self) -> Findings:
        """Write the page and the numbers of the runs that are there."""
        for part, folder in self.folders.items():
            if not folder.is_dir() and self._known(part) is None:
                raise InputError(
                    f"table {self.name} lacks its part {part} in {self.output}: leave --report out to make it"
                )
        rows = self.rows()
        findings = Findings(self.table, rows, self.records)
        if not any(findings.values(row, "compositional", size, rate) for _, row, size, rate in text.places(findings)):
            raise InputError(f"table {self.name} has no finished run in {self.output}: leave --report out to make them")
        facts = self._facts(rows)
        content = text.as_json(findings, self.name, facts)
        write_text(self.output / f"{self.name}.json", json.dumps(content, indent=1) + "\n")
        write_text(self.output / f"{self.name}.html", page.page(findings, self.name, facts))
        return findings

    def _facts(self, rows: Sequence[Run]) -> dict[str, Any]:
        """What the page says of where its numbers come from: every run that was started for the table among it."""
        mine = {run.hash for run in (*self.parts.values(), self.teacher, *rows)}
        asked = f"{self.name}: "
        started = [r for r in self.records.values() if r.attempts and any(row.startswith(asked) for row in r.rows)]
        teacher = self.records.get(self.teacher.hash)
        return {
            "command": f"cdistill reproduce {self.name} --seeds {self.seeds} --pair {self.pair}",
            "pair": self.recipe.name,
            "questions": next(run.exam.facts() for run in rows if run.exam is not None),
            "tuned_rates": self.rates,
            "teacher": None if teacher is None else teacher.accuracy,
            "commits": sorted({str(a.get("commit")) for r in started for a in r.attempts}),
            "runs": [_told(record, record.hash in mine) for record in started],
        }


def untrained(name: str, parts: Mapping[str, Run], folder: Path) -> dict[str, Path]:
    """Models in ``folder`` that stand for the parts of table ``name`` until these are trained, by part.

    Raises ValueError for a part that cannot be built or trained.
    """
    from cdistill.runtime.launch import quiet
    from cdistill.train.build import build_models
    from cdistill.train.prepare import check_data, open_data, save_processor
    from cdistill.train.resolve import resolve

    for part, run in parts.items():
        try:
            with quiet():
                models, resolved = build_models(run.recipe), resolve(run.recipe, world=1)
                check_data(resolved, models)
                data = open_data(resolved.stages[-1], models)
        except ValueError as error:
            raise InputError(f"table {name}, part {part}: {error}") from None
        models.student.save_pretrained(folder / part)
        save_processor(folder / part, models, data)
    return {part: folder / part for part in parts}


def check(name: str, planned: Sequence[Run]) -> None:
    """Raise ValueError for a row whose models cannot be built or trained, or whose data cannot be read, before any is."""
    from cdistill.eval.builtin_task import knows_the_pixels, knows_the_task
    from cdistill.runtime.launch import quiet
    from cdistill.train.build import build_models
    from cdistill.train.prepare import check_data
    from cdistill.train.resolve import resolve

    seen = set()
    for run in planned:
        if run.row in seen:
            continue
        seen.add(run.row)
        try:
            with quiet():
                models = build_models(run.recipe)
                check_data(resolve(run.recipe, world=1), models)
        except ValueError as error:
            raise InputError(f"table {name}, row {run.row}: {error}") from None
        reads = models.tokenizer.chat_template is not None  # the words, in its own way
        if not (knows_the_task(models.student, models.tokenizer) or (reads and knows_the_pixels(models.student))):
            raise InputError(
                f"--pair: the student of table {name}, row {run.row} does not know the words and pixels of the built-in "
                "world, by which `cdistill reproduce` judges"
            )


def _note_killed(records: Mapping[str, Record], output: Path) -> None:
    """Note that runs which only began were killed: nobody else works in the folder now."""
    for record in records.values():
        if record.status == STARTED:
            record.attempts[-1] |= {"status": STOPPED, "reason": "killed"}
            record.write(output)


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
