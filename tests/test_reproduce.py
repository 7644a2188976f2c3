"""`cdistill reproduce`: tables as data, runs by hash, kill and resume, orders in words, the page."""

import json
import math
import shutil
import signal
import statistics
from dataclasses import replace

import pytest
import torch
import yaml
from builtin_models import TOKENIZER, llava, shape, text_config
from pages import Page
from transformers import Qwen2ForCausalLM

from cdistill.cli import main
from cdistill.plan.blueprint import check_models
from cdistill.reproduce import reproduce as reproduction
from cdistill.reproduce import runs, schedule, worker
from cdistill.reproduce.findings import CONTRADICTED, HOLDS, OPEN, Findings, area, paired, reaches, verdict
from cdistill.reproduce.tables import load_table, names
from cdistill.reproduce.text import table_text
from cdistill.runtime.errors import Stopped
from cdistill.train.recipes import load_recipe, with_overrides

TWO = {
    "title": "Two rows",
    "source": "ours",
    "reference": "KD",
    "rows": {
        "KD": {"set": ["student.taf=false", "vat.enabled=false"], "paper": [56.8, 62.9]},
        "all": {"paper": [62.9, 66.7]},
    },
    "claims": [{"better": "all", "worse": "KD"}],
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A pair whose models are random and whose stages take two steps, and a table of two rows."""
    folder = tmp_path_factory.mktemp("pair")
    torch.manual_seed(1)
    for name, model in (("teacher", llava(**shape(4))), ("base", Qwen2ForCausalLM(text_config(**shape(2, 32))))):
        model.save_pretrained(folder / name)
        TOKENIZER.save_pretrained(folder / name)
    stage = {"learning_rate": 1e-3, "global_batch_size": 4, "samples": 8}
    data = {"turns": 2, "subtypes": ["colour"], "text": 0.5}
    pair = {
        "name": "tiny",
        "seed": 4,
        "output": str(folder / "unused"),
        "deepspeed": "off",
        "teacher": str(folder / "teacher"),
        "student": {"base": str(folder / "base"), "taf": True},
        "stages": ["dpt", "dft"],
        "stage": {"dpt": stage | {"data": {"caption": 1.0}}, "dft": stage | {"data": data}},
    }
    for name, content in (("tiny", pair), ("two", TWO)):
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    return folder


class Here:
    """A run in this process, in place of one of its own; by seed it may fail with a code and a line."""

    started: list = []  # noqa: RUF012
    fails: dict = {}  # noqa: RUF012

    def __init__(self, folder, threads):
        recipe, self.returncode, line = worker.read_recipe(folder), 0, ""
        if json.loads((folder / worker.JOB).read_text())["model"] is None:
            Here.started.append(recipe)
            self.returncode, line = Here.fails.get(recipe.seed, (0, ""))
        (folder / "log").write_text(line)
        if not self.returncode:
            (folder / worker.RESULT).write_text(json.dumps(worker.perform(folder)))

    def poll(self):
        return self.returncode

    wait = poll

    def kill(self):
        pass

    def send_signal(self, number):
        pass


@pytest.fixture
def here(monkeypatch):
    monkeypatch.setattr(schedule, "start_process", Here)
    monkeypatch.setattr(schedule, "POLL_SECONDS", 0.0)
    monkeypatch.setattr(Here, "started", [])
    monkeypatch.setattr(Here, "fails", {})
    return Here


def reproduce(tiny, output, table="two", **options):
    options = {"seeds": 2, "n": 2} | options
    return reproduction.reproduce(str(tiny / f"{table}.yaml"), pair=str(tiny / "tiny.yaml"), output=output, **options)


def test_from_a_table_to_its_page_and_back(tiny, here, tmp_path):
    findings = reproduce(tiny, tmp_path)
    assert [recipe.seed for recipe in here.started] == [4, 4, 5, 5]  # all rows of a seed before the next seed
    assert sorted(findings.values("all", "compositional")) == [4, 5]
    records = runs.read_records(tmp_path)
    assert len(records) == 5 and {record.status for record in records.values()} == {"finished"}
    assert not any((tmp_path / "work").iterdir())  # weights are gone
    record = next(record for record in records.values() if record.rows == ["two: all"] and record.seed == 5)
    assert record.overrides == ["seed=5"] and record.samples == 16
    attempt = record.attempts[-1]
    assert (
        attempt["versions"]["torch"]
        and attempt["threads"] >= 1
        and attempt["seconds"] >= 0
        and attempt["cpu_seconds"] > 0
    )
    text = (tmp_path / "two.html").read_text(encoding="utf-8")
    Page(text)
    for said in ("Two rows", "62.9", "all &gt; KD", *(record.hash for record in records.values()), "paired by seed"):
        assert said in text
    told = json.loads((tmp_path / "two.json").read_text())
    assert told["rows"][1]["by_seed"]["recognition"].keys() == {"4", "5"}
    assert len(told["runs"]) == 5 and told["teacher"]["greedy"]["recognition"].keys() >= {"colour", "avg"}
    # finished runs are used, by whatever table asks for them, and the page can be made without training
    (tiny / "other.yaml").write_text(yaml.safe_dump(TWO | {"title": "Other"}), encoding="utf-8")
    assert reproduce(tiny, tmp_path, "other").values("all", "greedy") == findings.values("all", "greedy")
    assert len(here.started) == 4
    assert runs.read_records(tmp_path)[record.hash].rows == ["two: all", "other: all"]
    assert reproduce(tiny, tmp_path, train=False, seeds=3).values("KD", "recognition").keys() == {4, 5}


def test_runs_that_fail_or_are_stopped_stay_in_the_page(tiny, here, tmp_path):
    here.fails = {4: (1, "step\rcdistill: error: too many steps are not finite\n")}
    findings = reproduce(tiny, tmp_path)
    assert findings.values("all", "compositional").keys() == {5}
    text = (tmp_path / "two.html").read_text()
    assert "too many steps are not finite" in text and text.count(">failed<") == 2
    assert "is open, with fewer than 3 seeds" in table_text(findings)
    with pytest.raises(ValueError, match=r"holds 2 runs of table two begun and not finished \(KD, seed 4: failed\)"):
        reproduce(tiny, tmp_path)
    here.fails = {}
    record = next(r for r in runs.read_records(tmp_path).values() if r.rows == ["two: all"] and r.seed == 4)
    record.attempts[-1]["status"] = "started"  # as a kill of all leaves it
    record.write(tmp_path)
    findings = reproduce(tiny, tmp_path, resume=True)
    assert findings.values("all", "compositional").keys() == {4, 5}
    attempts = runs.read_records(tmp_path)[record.hash].attempts
    assert [attempt["status"] for attempt in attempts] == ["stopped", "finished"]
    assert attempts[0]["reason"] == "killed"


def test_a_signal_stops_all_and_begins_nothing_more(tiny, here, tmp_path, monkeypatch):
    class Slow(Here):
        def __init__(self, folder, threads):
            here.started.append(folder)
            self.returncode = None

        def poll(self):
            if self.returncode is None:
                signal.raise_signal(signal.SIGTERM)
            return self.returncode

        def send_signal(self, number):
            self.returncode = 128 + number

    monkeypatch.setattr(schedule, "start_process", Slow)
    with pytest.raises(Stopped):
        reproduce(tiny, tmp_path)
    assert [record.status for record in runs.read_records(tmp_path).values()] == ["stopped"]
    assert len(here.started) == 1


def test_a_run_that_was_killed_goes_on_to_the_same_answers(tiny, tmp_path, monkeypatch):
    """The first time by the real worker, in a process of its own; the teacher is examined in this one."""
    begin = schedule.start_process

    def start(folder, threads):
        known = json.loads((folder / worker.JOB).read_text())["model"] is not None
        return Here(folder, threads) if known else begin(folder, threads)

    monkeypatch.setattr(schedule, "start_process", start)
    table = TWO | {"rows": {"all": {}}, "reference": "all", "claims": []}
    (tiny / "one.yaml").write_text(yaml.safe_dump(table), encoding="utf-8")
    first = reproduce(tiny, tmp_path, "one", seeds=1, keep=True)
    record = next(r for r in runs.read_records(tmp_path).values() if r.rows == ["one: all"])
    weights = tmp_path / "work" / record.hash / worker.WEIGHTS
    assert (weights / "1-dpt").is_dir()
    shutil.rmtree(weights / "2-dft")  # as if it had been killed in the second stage
    record.attempts[-1]["status"], record.accuracy = "started", None
    record.write(tmp_path)
    monkeypatch.setattr(schedule, "start_process", Here)
    again = reproduce(tiny, tmp_path, "one", seeds=1, resume=True)
    assert again.values("all", "compositional") == first.values("all", "compositional")
    assert not weights.exists()


def test_the_hash_tells_what_decides_the_weights_and_nothing_else(tiny):
    pair, exam = runs.load_pair(str(tiny / "tiny.yaml")), runs.Exam(2, 1)

    def hash_of(*overrides, exam=exam):
        return runs.hash_of(with_overrides(pair, overrides), exam)

    base = hash_of()
    for same in (["name=x"], ["output=elsewhere"], ["save_steps=3"], ["logging_steps=1"], ["stage.dft.data.seed=4001"]):
        assert hash_of(*same) == base, same
    for other in (
        ["seed=5"],
        ["vat.weight=2.0"],
        ["stage.dft.samples=12"],
        ["student.taf=false"],
        ["kd.temperature=2.0"],
    ):
        assert hash_of(*other) != base, other
    assert hash_of(exam=runs.Exam(2, 0)) != base
    off = "vat.enabled=false"
    assert hash_of(off, "vat.weight=2.0") == hash_of(off) != base  # of an alignment that is off nothing counts
    fine = ["student.taf=false", f"student.vision={pair.teacher}", "stage.dpt.objective=pt", "stage.dft.objective=sft"]
    assert hash_of(*fine, "kd.temperature=2.0") == hash_of(*fine, "vat.rows=answer") == hash_of(*fine)


def test_a_model_that_changed_under_its_name_is_another_run(tiny, tmp_path):
    pair, exam = runs.load_pair(str(tiny / "tiny.yaml")), runs.Exam(2, 1)
    shutil.copytree(tiny / "teacher", tmp_path / "teacher")
    moved = replace(pair, teacher=str(tmp_path / "teacher"))
    assert runs.hash_of(moved, exam) == runs.hash_of(pair, exam)
    model = llava(**shape(4))
    model.save_pretrained(tmp_path / "teacher")
    assert runs.hash_of(moved, exam) != runs.hash_of(pair, exam)


def test_tuning_takes_the_best_finished_grid(tiny):
    pair = replace(load_recipe("demo-compodistill"), seed=4)
    planned = runs.plan("tune", load_table("tune"), pair, seeds=3, n=2, rates={})
    assert {run.recipe.seed for run in planned} == {3} and {run.exam.seed for run in planned} == {runs.VALIDATION}
    half = next(run for run in planned if run.row == "all" and run.rate == 0.5)
    assert [half.recipe.stage[s].learning_rate for s in half.recipe.stages] == [1e-2, 3e-3, 1e-3]
    records = {}
    for run in planned:
        if run.row != "KD" or run.rate != 2.0:  # whose grid is not whole
            value = {"all": {0.5: 0.6, 1.0: 0.7, 2.0: 0.7}}.get(run.row, {}).get(run.rate, run.rate / 4)
            accuracy = {
                way: {f: {"avg": value} for f in ("recognition", "compositional")} for way in ("greedy", "choice")
            }
            records[run.hash] = runs.Record(run.hash, "", [], 3, {}, accuracy=accuracy)
    rates = runs.tuned_rates(pair, 2, records)
    assert rates == dict.fromkeys(load_table("tune").rows.keys() - {"KD"}, 2.0) | {"all": 1.0}
    tuned = runs.plan("table2", load_table("table2"), pair, seeds=1, n=2, rates=rates)
    assert [run.rate for run in tuned] == [2.0, 1.0, 2.0, 2.0, 1.0]


def test_orders_are_told_by_the_paired_interval():
    first, second = {1: 0.70, 2: 0.80, 3: 0.75, 9: 0.1}, {1: 0.60, 2: 0.72, 3: 0.66, 8: 0.9}
    found = paired(first, second)
    apart = [0.10, 0.08, 0.09]
    reach = 4.303 * statistics.stdev(apart) / math.sqrt(3)  # Student's t, 2 degrees of freedom
    assert (found.seeds, found.positive) == (3, 3)
    assert found.mean == pytest.approx(0.09)
    assert (found.low, found.high) == (pytest.approx(0.09 - reach, abs=1e-6), pytest.approx(0.09 + reach, abs=1e-6))
    assert verdict(found) == HOLDS and verdict(paired(second, first)) == CONTRADICTED
    assert verdict(paired({1: 0.9, 2: 0.2}, {1: 0.5, 2: 0.4})) == OPEN
    assert verdict(paired({1: 0.9}, {1: 0.5})) == OPEN
    assert verdict(paired({1: 0.9, 2: 0.8}, {1: 0.5, 2: 0.4})) == OPEN, "by chance"
    assert found.words() == "+9.0 (+6.5 to +11.5; 3 seeds, above zero in 3)"


def test_areas_and_samples_to_a_height_go_by_the_logarithm():
    points = [(100, 0.5), (200, 0.7), (800, 0.9)]
    assert area(points) == pytest.approx((0.6 + 2 * 0.8) / 3)
    assert reaches(points, 0.8) == pytest.approx(400)
    assert reaches(points, 0.4) == 100 and reaches(points, 0.95) is None


def test_curves_scale_samples_and_are_drawn(tiny, here, tmp_path):
    table = TWO | {"sizes": [1.0, 2.0], "claims": [{"better": "all", "worse": "KD", "column": "area"}]}
    (tiny / "curve.yaml").write_text(yaml.safe_dump(table), encoding="utf-8")
    findings = reproduce(tiny, tmp_path, "curve", seeds=1)
    assert [samples for samples, _ in findings.points("all", 4)] == [16, 32]
    assert findings.values("all", "area")[4] == pytest.approx(statistics.fmean(v for _, v in findings.points("all", 4)))
    Page((tmp_path / "curve.html").read_text())
    assert "samples to 90 %" in table_text(findings)


def test_rows_are_made_of_parts_that_are_trained_first(tiny, here, tmp_path, monkeypatch):
    part = {"recipe": str(tiny / "tiny.yaml"), "set": ["stages=[dpt]", "student.taf=false"]}
    table = TWO | {"parts": {"seeing": part}}
    table["rows"] = TWO["rows"] | {"all": {"set": ["student.base={seeing}", "student.taf=false"]}}
    (tiny / "parts.yaml").write_text(yaml.safe_dump(table), encoding="utf-8")
    findings = reproduce(tiny, tmp_path, "parts", seeds=1)
    assert [recipe.stages for recipe in here.started] == [("dpt",), ("dpt", "dft"), ("dpt", "dft")]
    (kept,) = (tmp_path / "parts").iterdir()
    assert here.started[-1].student.base == str(kept)
    record = next(r for r in runs.read_records(tmp_path).values() if r.rows == ["parts: all"])
    assert record.overrides[1] == "student.base={seeing}"
    assert "part seeing" in (tmp_path / "parts.html").read_text()
    assert reproduce(tiny, tmp_path, "parts", seeds=1).values("all", "greedy") == findings.values("all", "greedy")
    assert len(here.started) == 3
    shutil.rmtree(kept)  # is made anew where it is gone, and is not needed to tell of its rows
    told = reproduce(tiny, tmp_path, "parts", seeds=1, train=False)
    assert told.values("all", "greedy") == findings.values("all", "greedy") != {}
    part = next(r for r in runs.read_records(tmp_path).values() if r.rows == ["parts: part seeing"])
    replace(part, model="0" * 16).write(tmp_path)  # other weights: the rows are of none that is known
    assert not reproduce(tiny, tmp_path, "parts", seeds=1, train=False).values("all", "greedy")
    replace(part, model=None).write(tmp_path)
    with pytest.raises(ValueError, match="lacks its part seeing"):
        reproduce(tiny, tmp_path, "parts", seeds=1, train=False)
    reproduce(tiny, tmp_path, "parts", seeds=1)
    assert len(here.started) == 4


@pytest.mark.parametrize("name", names())
def test_every_shipped_table_fits_the_default_pair(name, tmp_path):
    table, pair = load_table(name), load_recipe("demo-compodistill")
    parts = reproduction.untrained(name, runs.plan_parts(table), tmp_path)
    parts = {part: str(folder) for part, folder in parts.items()}
    planned = runs.plan(name, table, pair, seeds=2, n=2, rates={}, parts=parts)
    assert {run.row for run in planned} == set(table.rows)
    for run in {run.row: run for run in planned}.values():
        check_models(run.recipe)
    findings = Findings(table, planned, {})
    assert all(each.difference.seeds == 0 for each in findings.verdicts())
    for row in table.rows.values():
        assert row.method in load_table("tune").rows


def test_the_shipped_baseline_is_the_row_of_the_tables():
    pair = load_recipe("demo-compodistill")
    planned = runs.plan("table2", load_table("table2"), pair, seeds=1, n=2, rates={})
    assert planned[0].row == "SFT"
    assert planned[0].hash == runs.hash_of(load_recipe("demo-sft"), planned[0].exam)
    assert planned[-1].hash == runs.hash_of(pair, planned[-1].exam)


def test_mistakes_are_one_line_and_begin_nothing(tiny, tmp_path, capsys):
    output = ["--output", str(tmp_path / "out")]
    (tmp_path / "bad.yaml").write_text(yaml.safe_dump(TWO | {"reference": "none"}))
    each = tmp_path / "each.yaml"
    each.write_text(
        yaml.safe_dump(TWO | {"rows": {"KD": {}, "all": {}, "each": {"set": ["vat.heads=each"]}}, "claims": []})
    )
    unread = tmp_path / "unread.yaml"
    lost = ["stage.dft.data={path: /nowhere.json}"]
    unread.write_text(yaml.safe_dump(TWO | {"rows": TWO["rows"] | {"unread": {"set": lost}}}))
    for words, said in (
        (["table9"], "table 'table9' is neither a file nor one of table2, table3"),
        ([str(tmp_path / "bad.yaml")], "reference must be a row (KD, all), got 'none'"),
        (["table2", "--seeds", "0"], "--seeds must be at least 1"),
        (["table2", "--pair", "builtin-student-base"], "has no teacher"),
        (["table2", "--report"], "has no finished run"),
        (
            ["table14", "--pair", str(tiny / "tiny.yaml")],
            "row PT + SFT: it names the objectives of 3 stages, tiny has 2",
        ),
        ([str(each)], "table each, row each: vat.heads each needs equal head counts"),
        ([str(unread)], "table unread, row unread: stage.dft.data: no such file: /nowhere.json"),
    ):
        assert main(["reproduce", *words, *output]) == 2, words
        error = capsys.readouterr().err.strip()
        assert said in error and "\n" not in error
    assert not (tmp_path / "out").exists()
    off = tmp_path / "off.yaml"
    off.write_text(yaml.safe_dump({"extends": "demo-compodistill", "vat": {"enabled": False}}))
    assert main(["reproduce", "table2", "--pair", str(off), *output]) == 2
    assert "rows both and TAF are the same run with this pair" in capsys.readouterr().err


def test_results_of_another_version_are_refused(tmp_path):
    record = runs.Record("0" * 16, "tiny", [], 4, {"n": 2, "seed": 1})
    record.write(tmp_path)
    path = tmp_path / f"{'0' * 16}.json"
    assert runs.read_records(tmp_path) == {"0" * 16: record}
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"cdistill": "0.0.1"}))
    with pytest.raises(ValueError, match=r"was written by cdistill 0\.0\.1"):
        runs.read_records(tmp_path)
    path.write_text("{}")
    with pytest.raises(ValueError, match="is no record of a run"):
        runs.read_records(tmp_path)
