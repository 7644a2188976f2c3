"""The page of runs: what of a folder it shows, thinned but with the extremes, in a file that needs nothing else."""

import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import vl_convert
import yaml
from builtin_models import make_recipe, recipe_values, save_base, save_teacher
from hypothesis import given
from hypothesis import strategies as st
from pages import Page
from transformers import TrainerCallback
from transformers.integrations import integration_utils

from cdistill import cli
from cdistill.files import owned
from cdistill.report.charts import charts
from cdistill.report.history import read_run
from cdistill.report.page import clock, page
from cdistill.report.thinning import thinned
from cdistill.train import run


@given(
    st.lists(st.none() | st.floats(-1e6, 1e6), min_size=1, max_size=400),
    st.integers(8, 60),
)
def test_a_thinned_series_has_its_ends_and_extremes(values, points):
    places = thinned(values, points)
    assert places == sorted(set(places)) and len(places) <= max(points, min(len(values), points))
    kept = [values[i] for i in places]
    assert places[0] == 0 and places[-1] == len(values) - 1
    numbers = [value for value in values if value is not None]
    if numbers:
        left = [value for value in kept if value is not None]
        assert (min(left), max(left)) == (min(numbers), max(numbers))
    assert (None in kept) == (None in values)


def entry(stage, step, **values):
    return {"stage": stage, "step": step, "samples": 4 * step, "loss": 1.0, "elapsed_s": float(step), **values}


@pytest.fixture
def write(tmp_path):
    """Writes a folder of a run of stages dpt, dft, sft, of 3 steps each, that has logged these entries."""

    def write(entries, place="run", **changes):
        folder = tmp_path / place
        folder.mkdir()
        values = recipe_values(folder, tmp_path, **changes)
        (folder / "recipe.yaml").write_text(yaml.safe_dump(values))
        (folder / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in entries))
        return folder

    return write


def drawn(html):
    """The charts' numbers as the page's script has them, by title."""
    titles = re.findall(r'<h3 id="title\d+">(.*?)</h3>', html)
    charts = json.loads(re.search(r"^const charts = (\[.*\]), stages = ", html, re.M)[1])
    return {title: chart["data"] for title, chart in zip(titles, charts, strict=True)}


def test_states_of_stages_and_what_is_left_of_them(write):
    folder = write([entry("dpt", 1), entry("dpt", 3), entry("dft", 1), entry("dft", 2)])
    (folder / "1-dpt").mkdir()
    (folder / "bad_samples.jsonl").write_text(
        json.dumps({"stage": "2-dft", "reason": "unreadable", "place": "x"}) + "\n"
    )
    with owned(folder):
        found = read_run(folder)
        assert [stage.state for stage in found.stages] == ["done", "running", "not begun"]
        assert found.state == "running" and found.stages[1].seconds_left == pytest.approx(1.0)
    found = read_run(folder)
    assert [stage.state for stage in found.stages] == ["done", "stopped", "not begun"]
    assert found.stages[1].bad == {"unreadable": 1} and found.seconds == 5.0
    assert found.series("loss")[0] == [4, 12, 12 + 4, 12 + 8], "samples since the run's start"


def test_the_page_has_every_number_and_needs_nothing_else(write):
    logged = [entry("dpt", i, ar=i / 7, learning_rate=1e-3, vat_layers=[i / 10, i / 20]) for i in (1, 2, 3)]
    measured = {"stage": "dpt", "step": 2, "samples": 8, "validation": {"kd": 0.25}}
    html = page([read_run(write([*logged, measured, {"stage": "dpt"}]))])
    assert Page(re.sub(r"<script>.*?</script>", "", html, flags=re.S)).references == []
    charts = drawn(html)
    assert charts["AR"] == {"run": ["test"] * 3, "x": [4, 8, 12], "y": pytest.approx([1 / 7, 2 / 7, 3 / 7], rel=1e-5)}
    assert charts["Validation: KD"] == {"run": ["test"], "x": [8], "y": [0.25]}
    layers = charts["Alignment of every layer"]
    assert layers["layer"] == [0, 1] * 3 and layers["y"] == pytest.approx([0.1, 0.05, 0.2, 0.1, 0.3, 0.15])
    assert layers["x2"][:-2] == layers["x"][2:], "no gap between columns"
    assert "KD" not in charts, "nothing has logged it"


def test_a_hundred_thousand_steps_are_a_small_page(write):
    steps = range(1, 100_001)
    values = np.random.default_rng(0).normal(size=(len(steps), 3))
    values[70_001] = 99.0
    keys = ("loss", "kd", "grad_norm")
    entries = [
        entry("dft", i, **dict(zip(keys, value.tolist(), strict=True))) for i, value in zip(steps, values, strict=True)
    ]
    html = page([read_run(write(entries))])
    assert len(html.encode()) < 2_000_000
    for data in drawn(html).values():
        assert len(data["y"]) <= 600 and max(data["y"]) == 99.0


def test_runs_of_one_name_are_told_apart_by_their_folders(write):
    runs = [read_run(write([entry("dft", 1)], name)) for name in ("a", "b")]
    assert drawn(page(runs))["Loss, all terms weighted"]["run"] == ["a", "b"]


def test_what_a_file_says_is_shown_and_not_run(write):
    evil = "</script><script>alert(1)</script><b>"
    html = page([read_run(write([{**entry("dft", 1), evil: 2.0}], name=evil))])
    assert html.count("<script>") == 2 and "<b>" not in html.partition("<script>")[0].replace('class="card"><b>', "")
    assert evil in drawn(html)[evil.replace("<", "&lt;").replace(">", "&gt;")]["run"]


@pytest.mark.parametrize(("seconds", "said"), [(3.2, "3 s"), (89.4, "89 s"), (90, "2 min"), (5399, "1 h 30 min")])
def test_times_as_people_say_them(seconds, said):
    assert clock(seconds) == said


def test_mistakes_are_lines(write, tmp_path, capsys, monkeypatch):
    assert cli.main(["report", str(tmp_path)]) == 2
    assert "holds no run: recipe.yaml is missing" in capsys.readouterr().err
    folder = write([entry("dft", 1)])
    monkeypatch.setitem(sys.modules, "vl_convert", None)
    from cdistill.report.page import _script

    _script.cache_clear()
    assert cli.main(["report", str(folder)]) == 2
    assert "pip install 'cdistill[report]'" in capsys.readouterr().err
    assert not (folder / "report.html").exists()


def test_every_chart_is_drawn_also_by_a_browser_where_there_is_one(write, tmp_path):
    folder = write([entry("dft", i, kd=1.0 / i, vat_layers=[0.1 * i, 0.2]) for i in (1, 2, 3)])
    shown = charts([read_run(folder)], ["test"])
    assert [chart.key for chart in shown] == ["loss", "kd", "vat_layers"]
    for chart in shown:
        rows = [dict(zip(chart.data, row, strict=True)) for row in zip(*chart.data.values(), strict=True)]
        drawn_by_library = vl_convert.vegalite_to_svg(chart.spec | {"width": 400, "data": {"values": rows}})
        assert chart.unit in drawn_by_library
    assert (
        shown[1].spec["description"].startswith("KD. test: first 1, last 0.3333, lowest 0.3333 at 24, highest 1 at 16")
    )
    assert cli.main(["report", str(folder)]) == 0
    for browser in filter(None, map(shutil.which, ("chromium", "google-chrome"))):
        words = [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/profile"]
        words += ["--window-size=1200,3000", "--virtual-time-budget=10000", "--dump-dom"]
        words += [f"file://{folder}/report.html"]
        done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=True)
        labels = re.findall(r'<div class="draw[^>]*aria-label="([^"]+)"[^>]*>.*?<svg', done.stdout, re.S)
        assert labels == [f"{chart.spec['description']}" for chart in shown]


@pytest.mark.parametrize(
    "damage",
    [
        {"step": "x"},
        {"samples": None},
        {"step": True},
        {"vat_layers": ["x"]},
        {"validation": 3},
        {"kd": "x"},
        {"kd": [1]},
    ],
)
def test_a_damaged_line_spoils_no_page(write, damage):
    broken = entry("dft", 2, kd=0.2, vat_layers=[0.1]) | damage
    assert (
        drawn(page([read_run(write([entry("dft", 1, kd=0.5), broken, entry("dft", 3, kd=0.1)]))]))["KD"]["y"][0] == 0.5
    )


class Tracker(TrainerCallback):
    """Stands for a tracker of transformers: what it is told."""

    told: list = []  # noqa: RUF012

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.told.append((state.global_step, args.run_name, dict(logs)))


def test_trackers_get_what_is_logged_and_change_nothing_of_it(tmp_path, monkeypatch):
    save_teacher(tmp_path / "teacher")
    save_base(tmp_path / "base")
    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "wandb", Tracker)
    there = ["wandb", "tensorboard"]
    monkeypatch.setattr(integration_utils, "get_available_reporting_integrations", lambda: there)
    monkeypatch.setattr(Tracker, "told", [])
    options = {"stages": ["dft"], "log_layers": True, "stage__dft__validation": {"samples": 4, "every": 2}}
    run(make_recipe(tmp_path / "run", tmp_path, report_to=["wandb"], **options))
    run(make_recipe(tmp_path / "other", tmp_path, **options))
    assert not (tmp_path / "run" / "tensorboard").exists() and (tmp_path / "other" / "tensorboard").is_dir()

    def lines(name):
        timed = {"samples_per_s", "tokens_per_s", "elapsed_s", "memory_mb"}
        found = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        return [{key: value for key, value in line.items() if key not in timed} for line in found]

    assert lines("run") == lines("other")
    logged = [line for line in lines("run") if "loss" in line]
    told = [(step, logs) for step, name, logs in Tracker.told if "loss" in logs]
    assert [step for step, _ in told] == [line["step"] for line in logged] == [1, 2, 3]
    for (_, logs), line in zip(told, logged, strict=True):
        assert all(isinstance(value, int | float) for value in logs.values())
        assert logs["kd"] == line["kd"] and logs["vat_layers/1"] == line["vat_layers"][1]
        assert logs["tokens"] > 0 and line["grad_norm"] > 0
    measured = [(step, logs) for step, _, logs in Tracker.told if "loss" not in logs]
    assert measured[0][0] == 2 and {"eval_validation/kd", "eval_validation/loss"} <= set(measured[0][1])
    assert {name for _, name, _ in Tracker.told} == {"test 1-dft"}


@pytest.mark.parametrize(
    ("name", "message"), [("wand", "must name trackers"), ("mlflow", "is not installed: pip install mlflow")]
)
def test_a_tracker_that_is_not_there_is_told_before_anything_is_written(tmp_path, name, message):
    with pytest.raises(ValueError, match=f"report_to.*{message}"):
        run(make_recipe(tmp_path / "run", tmp_path, report_to=[name]))
    assert not (tmp_path / "run").exists()
