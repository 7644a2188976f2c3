"""The runs of a table: recipes, the hash that tells each, and its record in the folder of results."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from cdistill import __version__
from cdistill.errors import InputError
from cdistill.eval.files import read_text
from cdistill.files import write_text
from cdistill.reproduce.tables import TUNE, Row, Table, load_table
from cdistill.train.recipes import Recipe, load_recipe, recipe_to_dict, with_overrides
from cdistill.train.recipes.values import override

QUESTIONS = 300  # per sub-type
REPORTED, VALIDATION = 1, 0  # seeds of questions: of tables, and of tuning
TUNING_SEED = -1  # training seed of tuning, counted from the first that tables report
FORMAT = 1  # of a record
TEACHER = "teacher"  # row of the pair's teacher, in every table
FINISHED, FAILED, STOPPED, STARTED = "finished", "failed", "stopped", "started"


@dataclass(frozen=True)
class Exam:
    """Questions that judge a run: how many per sub-type, their seed, and the pairs of colour and shape they are about."""

    n: int
    seed: int
    pairs: str = "all"

    def facts(self) -> dict[str, Any]:
        """Its values; what kept records did not have is left out where it is as it was."""
        return {name: value for name, value in asdict(self).items() if (name, value) != ("pairs", "all")}


@dataclass(frozen=True)
class Run:
    """One student to be trained; or a part, which is examined by nobody, or the teacher, which only is.

    Attributes:
        row: of the table.
        size: factor of the samples.
        rate: factor of the learning rates, those of the row and of tuning among them.
        recipe: all of it, without an output folder of its own.
        exam: what it is asked; None of a part.
        overrides: what makes the recipe of the pair's, parts by their names.
        hash: of the values that decide its weights and answers.
        model: what is there already and only examined.
    """

    row: str
    size: float
    rate: float
    recipe: Recipe
    exam: Exam | None
    overrides: tuple[str, ...]
    hash: str
    model: str | None = None


@dataclass
class Record:
    """What is kept of a run: small, one JSON file.

    Attributes:
        hash: the run's, also the name of the file.
        pair: recipe that the table's rows change.
        overrides: what makes the run's recipe of it.
        seed: of training.
        exam: questions per sub-type and their seed; None of a part.
        rows: TABLE: ROW of all that asked for it.
        attempts: status, seconds, CPU seconds, commit, versions, machine, threads and reason of every start, in order.
        samples: of all stages.
        accuracy: by way (``greedy``, ``choice``), family and sub-type, in 0..1; None before the end.
        model: of a part, what tells its weights from others, so that its table can be told of without them.
    """

    hash: str
    pair: str
    overrides: list[str]
    seed: int
    exam: dict[str, Any] | None
    rows: list[str] = field(default_factory=list)
    samples: int = 0
    attempts: list[dict[str, Any]] = field(default_factory=list)
    accuracy: dict[str, Any] | None = None
    model: str | None = None

    @property
    def status(self) -> str:
        """Of the last attempt; one that only began was killed, if nobody works on it now."""
        return str(self.attempts[-1]["status"]) if self.attempts else "not started"

    def write(self, folder: Path) -> None:
        """Put it into the folder of results."""
        whole = {"format": FORMAT, "cdistill": __version__, **asdict(self)}
        write_text(folder / f"{self.hash}.json", json.dumps(whole, indent=1) + "\n")


def read_records(folder: Path) -> dict[str, Record]:
    """All records of a folder by hash. Raises ValueError for one of another version, or for a file that is none."""
    found = {}
    for path in sorted(folder.glob("[0-9a-f]" * 16 + ".json")):
        try:
            content = json.loads(read_text(path))
            form, version = content.pop("format"), content.pop("cdistill")
            record = Record(**content) if form == FORMAT else None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{path}: is no record of a run ({error!r:.80}); move it away") from None
        if record is None or version != __version__:
            raise InputError(
                f"{path}: was written by cdistill {version} in format {form}, this is {__version__} in format {FORMAT}: "
                "take another --output"
            )
        found[record.hash] = record
    return found


def load_pair(name_or_path: str, overrides: Sequence[str] = ()) -> Recipe:
    """The distilled recipe that a table's rows change. Raises ValueError unless it distils."""
    recipe = load_recipe(name_or_path, overrides)
    if recipe.teacher is None:
        raise InputError(f"--pair: recipe {recipe.name} has no teacher: there is nothing to distil")
    return replace(recipe, processes=1)


def plan_parts(table: Table) -> dict[str, Run]:
    """Runs of a table's parts, by name. Raises ValueError for an override that does not fit."""
    result = {}
    for name, part in table.parts.items():
        recipe = replace(load_recipe(part.recipe, part.set), processes=1)
        result[name] = Run(f"part {name}", 1.0, 1.0, recipe, None, part.set, hash_of(recipe, None))
    return result


def plan_teacher(pair: Recipe, n: int, pairs: str = "all") -> Run:
    """The examination of the pair's teacher."""
    from cdistill.eval.loading import fingerprint
    from cdistill.models.load import resolve_folder

    assert pair.teacher is not None
    exam = Exam(n, REPORTED, pairs)
    digest = _digest({"model": fingerprint([resolve_folder(pair.teacher, "teacher")]), "exam": exam.facts()})
    return Run(TEACHER, 1.0, 1.0, pair, exam, (), digest, model=pair.teacher)


def plan(
    name: str,
    table: Table,
    pair: Recipe,
    *,
    seeds: int,
    n: int,
    rates: Mapping[str, float],
    parts: Mapping[str, str] = MappingProxyType({}),
    known: Mapping[str, str] = MappingProxyType({}),
) -> list[Run]:
    """All runs of a table, row by row within a seed, so that the first seed of all rows is there first.

    Args:
        name: of the table, for messages.
        table: its rows.
        pair: the recipe that they change.
        seeds: how many, from the pair's on; tuning has one of its own.
        n: questions per sub-type.
        rates: factors of learning rates by method, those that are tuned.
        parts: folders of the table's parts, by name.
        known: what tells the weights of those from others that are not there, by folder.

    Raises:
        ValueError: a row whose changes do not fit the pair, or a claim about two rows that are one run.
    """
    tuning = name == TUNE
    chosen = [pair.seed + TUNING_SEED] if tuning else [pair.seed + i for i in range(seeds)]
    if chosen[0] < 0:
        raise InputError(
            f"--pair: seed must be at least {-TUNING_SEED}, as tuning takes the one before, got {pair.seed}"
        )
    exam = Exam(n, VALIDATION if tuning else REPORTED, table.pairs)
    runs = []
    for seed in chosen:
        for size in table.sizes:
            for row, change in table.rows.items():
                for rate in table.rates:
                    tuned = change.rate * rate * (1.0 if tuning else rates.get(change.method, 1.0))
                    try:
                        runs.append(_run(pair, row, change, seed, size, tuned, exam, parts, known))
                    except ValueError as error:
                        raise InputError(f"table {name}, row {row}: {error}") from None
    _check_claims(name, table, runs)
    return runs


def _run(
    pair: Recipe,
    row: str,
    change: Row,
    seed: int,
    size: float,
    rate: float,
    exam: Exam,
    parts: Mapping[str, str],
    known: Mapping[str, str],
) -> Run:
    changes = [f"seed={seed}", *change.set]
    if change.objectives is not None:
        if len(change.objectives) != len(pair.stages):
            raise InputError(
                f"it names the objectives of {len(change.objectives)} stages, {pair.name} has {len(pair.stages)}"
            )
        changes += [f"stage.{name}.objective={o}" for name, o in zip(pair.stages, change.objectives, strict=True)]
    content = recipe_to_dict(pair)
    override(content, changes)
    models = {"teacher": str(pair.teacher), **parts}
    for name in pair.stages:
        stage = pair.stage[name]
        factor = size * change.samples
        if factor != 1:
            whole = max(1, round(factor * stage.samples / stage.global_batch_size))
            changes.append(f"stage.{name}.samples={whole * stage.global_batch_size}")
        if rate != 1 and content["stage"][name]["objective"] not in ("pt", "dpt"):
            changes.append(f"stage.{name}.learning_rate={rate * stage.learning_rate:.6g}")
    named = changes
    for key, folder in models.items():
        changes = [text.replace(f"{{{key}}}", folder) for text in changes]
    recipe = with_overrides(pair, changes)
    return Run(row, size * change.samples, rate, recipe, exam, tuple(named), hash_of(recipe, exam, known))


def _check_claims(name: str, table: Table, runs: Sequence[Run]) -> None:
    hashes: dict[str, set[str]] = {}
    for run in runs:
        hashes.setdefault(run.row, set()).add(run.hash)
    for claim in table.claims:
        if hashes[claim.better] == hashes[claim.worse]:
            raise InputError(
                f"table {name}: rows {claim.better} and {claim.worse} are the same run with this pair, which leaves out what "
                "they differ in; choose another --pair"
            )


def hash_of(recipe: Recipe, exam: Exam | None, known: Mapping[str, str] = MappingProxyType({})) -> str:
    """What tells a run from others: all that decides its weights, and the questions that it is asked.

    Names, folders and what is only logged do not count, nor do keys of losses that no stage has. ``known`` has the fingerprints
    of folders that are not there.
    """
    return _digest({"run": identity(recipe, known), "exam": None if exam is None else exam.facts()})


def _digest(facts: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def identity(recipe: Recipe, known: Mapping[str, str] = MappingProxyType({})) -> dict[str, Any]:
    """The values of a recipe that decide the weights it ends with, models by what their files hold, or are ``known`` to."""
    from cdistill.eval.loading import fingerprint
    from cdistill.models.load import resolve_folder
    from cdistill.train.resolve import resolve
    from cdistill.train.run_folder import decided

    run, content = resolve(recipe, world=1), decided(recipe, len(recipe.stages))
    sections = content.pop("stage")
    content["stages"] = [sections[name] for name in content["stages"]]
    for stage, section in zip(run.stages, content["stages"], strict=True):
        section["data"]["seed"], section["micro_batch_size"] = stage.data_seed, stage.micro_batch_size
    if content["vat"]["heads"] != "match":
        del content["vat"]["head_matching"]
    if not any(stage.aligns for stage in run.stages):
        del content["vat"]
    elif content["vat"]["visual"] == "equal":  # a key that kept records did not have, as two below
        del content["vat"]["visual"]
    if not any(term.baseline for stage in run.stages for term in stage.objective.kinds):
        del content["baseline_weight"]
    if not run.distils_from(0):
        del content["kd"], content["teacher_memory"]
    if not recipe.needs_teacher:
        del content["teacher"]
    lead = content["student"].pop("taf_teacher")
    teachers = content.pop("teachers")
    if teachers and recipe.needs_teacher:  # in order: the first gives the student its encoder
        content["teachers"] = [values | ({"taf": True} if name == lead else {}) for name, values in teachers.items()]
    if recipe.kd.alignment == "token" and "kd" in content:
        del content["kd"]["alignment"]
    if recipe.student.pruning is None:
        del content["student"]["pruning"]
    if recipe.student.tokenizer is None:
        del content["student"]["tokenizer"]
    for section in content["stages"]:
        for key in ("quantization", "generation"):
            if section[key] is None:
                del section[key]
        for key, usual in (("one_kind", False), ("pairs", "all")):
            if section["data"][key] == usual:
                del section["data"][key]
        if "generation" in section:  # once it was one of the answers, and those before it were not learned
            section["generation"]["answer"] = "last"
    for place, key in (
        (content, "teacher"),
        (content["student"], "base"),
        (content["student"], "vision"),
        (content["student"], "tokenizer"),
        *((teacher, "model") for teacher in content.get("teachers", ())),
    ):
        if place.get(key) is not None:
            place[key] = known.get(place[key]) or fingerprint([resolve_folder(place[key], key)])
    return content | {"precision": run.precision}


def tuned_rates(pair: Recipe, n: int, records: Mapping[str, Record]) -> dict[str, float]:
    """Of each method whose grid is finished the factor of its learning rates by the rule of the table `TUNE`.

    None of a pair that the table does not fit, which cannot have been tuned.
    """
    table = load_table(TUNE)
    scores: dict[str, dict[float, float | None]] = {row: {} for row in table.rows}
    try:
        planned = plan(TUNE, table, pair, seeds=1, n=n, rates={})
    except ValueError:
        return {}
    for run in planned:
        record = records.get(run.hash)
        scores[run.row][run.rate] = None if record is None or record.accuracy is None else score(record.accuracy)
    best = {}
    for method, of in scores.items():
        known = {rate: value for rate, value in of.items() if value is not None}
        if len(known) == len(of):
            best[method] = max(known, key=lambda rate: (known[rate], -rate))
    return best


def score(accuracy: Mapping[str, Any]) -> float:
    """By what tuning chooses: the mean of the recognition average and the compositional one, by choice."""
    return (accuracy["greedy"]["recognition"]["avg"] + accuracy["choice"]["compositional"]["avg"]) / 2
