"""What `pytest benchmarks/` does around a measurement: what is run, kept and shown, how memory is measured; the report."""

import json
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import _plots, _relation, conftest, report
from benchmarks._cases import attention, measured, relation
from benchmarks._contenders import FLEX_ON_CPU, STACK, Shape
from benchmarks._measure import rounds
from benchmarks._results import ROOT
from benchmarks._tables import overview

CPU = torch.device("cpu")
TINY = attention(Shape("T30", 1, 2, 1, 30, 16, 3, 9))
TINY_RELATION = relation(_relation.Size("one-layer", 2, 3, 1, 3, 9, 30, 16))


def row(op, shape, contender, both_ms, peak_mb=None, **more):
    """As `measured` makes it; 8 GFLOP, 1 GB."""
    same = {"op": op, "shape": shape, "size": f"B1 {shape}", "dtype": "bf16", "flops": 8e9, "bytes": 1e9}
    times = {"forward_ms": both_ms / 4, "both_ms": both_ms, "peak_mb": peak_mb, "tflops": 8 / both_ms}
    return same | {"contender": contender} | times | more


def results():
    """Attention at two lengths, one vocabulary layer, and a contender that was left out."""
    rows = [
        row("attention with alignment", name, who, tokens / 100 * times, 10 * times, tokens=tokens, **more)
        for name, tokens in (("T1024", 1024), ("T2048", 2048))
        for who, times, more in (
            ("ours", 1.0, {"times_ours": 1.0, "overhead_percent_over_best_plain": 25.0}),
            ("eager", 3.0, {"times_ours": 3.5, "overhead_percent_over_best_plain": 275.0}),
            ("sdpa/flash", 0.8, {"times_ours": 0.8, "overhead_percent_over_best_plain": 0.0}),
        )
    ]
    rows += [row("vocabulary layer", "trained, jsd", "ours", 4.0, times_ours=1.0)]
    rows += [
        {"op": "vocabulary layer", "shape": "trained, jsd", "contender": "liger", "skipped": "not installed\nat all"}
    ]
    return {
        "device": "Some processor",
        "date": "2026-01-01",
        "commit": "abc",
        "versions": {"torch": "2"},
        "compiled": False,
        "cores": 2,
        "threads": 1,
        "load_average": 0.5,
        "rates": {"matmul_tflops": 2.0, "copy_tb_per_s": 0.5},
        "rows": rows,
    }


def test_one_table_shows_ours_beside_every_rival():
    lines = [line.split("  ") for line in overview(results()).splitlines()]
    cells = [[cell.strip() for cell in line if cell.strip()] for line in lines]
    assert cells[:5] == [
        ["ms", "times ours", "peak MB", "times ours"],
        ["attention with alignment, T1024: B1 T1024, bf16"],
        ["ours", "10.2", "1", "10", "1"],
        ["sdpa/flash (no loss)", "8.19", "0.8", "8", "0.8"],
        ["eager", "30.7", "3.5", "30", "3"],
    ]
    assert cells[-2:] == [["ours", "4", "1", "-", "-"], ["not timed: liger: not installed"]]


def test_the_report_draws_times_memory_and_the_roofline(tmp_path, monkeypatch):
    data, titles, finish = results(), [], _plots._finish
    monkeypatch.setattr(
        _plots, "_finish", lambda axis, title, *more: finish(axis, titles.append(title) or title, *more)
    )
    (tmp_path / "it").mkdir()
    path = tmp_path / "it/results.json"
    path.write_text(json.dumps(data))
    said = []
    report.report(tmp_path, said.append)
    assert said[0].startswith("# Some processor") and "Targets" not in said[0]
    picture = path.with_suffix(".png")
    assert said[0].rstrip().endswith(f"picture: {picture}") and picture.read_bytes()[1:4] == b"PNG"
    assert len(titles) == 6 and titles[3].startswith("Roofline: 2 TFLOP/s")
    assert titles[4:] == [title for _, title, _ in _plots.LENGTHS]
    assert _plots.lengths(data, "peak_mb")["eager"] == [(1024, 30.0), (2048, 30.0)]
    points = {name: point for name, *point in _plots.roofline_points(data)}
    assert points["vocabulary layer, trained, jsd"] == [8.0, 2.0] and len(points) == 3
    data["rows"] = [
        {"op": "vocabulary layer", "shape": "x", "contender": "ours", "size": "", "dtype": "", "skipped": "no"}
    ]
    assert _plots.plot(data, picture) is None


def test_a_run_that_had_a_plan_says_what_was_not_reached(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "plot", lambda data, path: path)
    data = results() | {"planned": ["check a", "check b", "attention x", "attention y"]}
    data["done"] = {"check a": [], "attention x": ["dq: error 3 times what is allowed"]}
    path = tmp_path / "results.json"
    path.write_text(json.dumps(data))
    closing = "\n".join(report.closing(path))
    assert "1 of 2 passed, 0 failed" in closing and "_C was not built" in closing
    assert "- attention x: dq: error 3 times what is allowed" in closing
    assert closing.partition("Not reached:\n\n")[2].startswith("- check b\n- attention y\n")
    assert f"picture: {path.with_suffix('.png')}" in closing and "Targets" in report.markdown(data)


def test_contenders_take_turns_in_rounds():
    order = []

    def steps(name):
        return lambda: order.append(name), lambda _: order.append(f"{name}'")

    taken = rounds({"a": steps("a"), "b": steps("b")}, CPU, float("inf"), seconds=0.0)
    assert order == ["a", "a'", "b", "b'"] * 4  # the first round does not count
    assert {name: list(map(len, halves)) for name, halves in taken.items()} == {"a": [1, 2], "b": [1, 2]}
    assert rounds({"a": steps("a")}, CPU, 0.0, seconds=0.0) == {"a": [[], []]}


def test_on_a_cpu_ours_is_measured_beside_its_rivals():
    timer = partial(rounds, seconds=0.0)
    rows, problems = measured(TINY_RELATION, "fp32", CPU, timer=timer, peaks={"ours": 5.0})
    own, rival = rows
    assert not problems and (own["contender"], rival["contender"]) == ("ours", _relation.CHUNKED)
    assert own["times_ours"] == 1.0 and own["peak_mb"] == 5.0 and own["error_over_allowed"] <= 1
    assert rival["times_ours"] > 0 and rival["peak_mb"] is None and rival["repeats"] == 3
    found, left_out = TINY.contenders(TINY.draw(torch.float32, CPU), CPU)
    assert {c.name for c in found} >= {"ours", "eager", STACK, "sdpa/flash"}
    assert left_out["flex (plain)"] == FLEX_ON_CPU


def test_a_wrong_relation_is_not_timed(monkeypatch):
    def wrong(loss, x):
        return 1.01 * _relation.chunked(loss, x)

    monkeypatch.setattr(_relation, "CONTENDERS", (_relation.Contender("ours", wrong, frozenset({"relation"})),))
    rows, problems = measured(TINY_RELATION, "fp32", CPU)
    assert "inexact" in rows[0]["skipped"] and problems[0].startswith("ours")


MEMORY = """
import torch
from functools import partial
from benchmarks import _overview
from benchmarks._cases import Case
from benchmarks._measure import Implementation

def spend(mb, drawn):
    return torch.ones(mb * 10**6 // 4) if drawn else torch.ones(1)

def scatter(drawn):
    # 60 MB in blocks that are freed, with others between them, before 64 MB in larger ones
    torch.ones(4 * 10**6)
    blocks = [(torch.ones(10**6 // 4), torch.ones(25000)) for _ in range(60 if drawn else 1)]
    between = [kept for _, kept in blocks]
    del blocks
    larger = [torch.ones(2 * 10**6) for _ in range(8 if drawn else 1)]
    return torch.ones(1)

def case(drawn):
    found = [Implementation(name, partial(spend, mb)) for name, mb in (("much", 200), ("little", 20), ("again", 60))]
    found += [Implementation("scattered", scatter), Implementation("broken", lambda drawn: 1 / 0)]
    return Case("", "", "", lambda dtype, device: drawn, lambda p, device: (found, {}), None,
                lambda c, p: (lambda: c.run(p), lambda x: (x + x).sum()), 0, 0)

print(_overview.added_mb(_overview.Problem(case(True), case(False), {})))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_what_a_step_adds_to_a_process():
    done = subprocess.run([sys.executable, "-c", MEMORY], cwd=ROOT, capture_output=True, text=True, check=True)
    wanted = {"much": 400, "little": 40, "again": 120, "scattered": 70}
    assert eval(done.stdout) == {name: pytest.approx(mb, rel=0.1, abs=3) for name, mb in wanted.items()}


@pytest.mark.parametrize(("words", "wanted"), [("", ["bench_overview.py"]), ("long", None)])
def test_long_suites_run_when_they_are_asked_for(words, wanted):
    """By -m; pytest does not ask about files that are named."""
    config = SimpleNamespace(option=SimpleNamespace(markexpr=words), stash={})
    files = sorted((ROOT / "benchmarks").iterdir())
    ran = [path.name for path in files if not conftest.pytest_ignore_collect(path, config) and path.match("bench_*.py")]
    assert ran == (wanted or [path.name for path in files if path.match("bench_*.py")])
    others = {path.name for path in files if path.match("bench_*.py")} - {"bench_overview.py", "bench_gpu.py"}
    assert set(config.stash.get(conftest.LONG, [])) == (others if wanted else set())


@pytest.mark.parametrize(
    ("in_checkout", "installed", "wanted"),
    [(True, True, "clone"), (False, True, "site"), (False, False, "clone"), (True, False, "clone")],
)
def test_the_compiled_package_is_measured(tmp_path, in_checkout, installed, wanted):
    """A clone that was not compiled beside an installed wheel, a clone that was, and one without a compiler."""
    for place, compiled in (("clone", in_checkout), ("site", installed)):
        package = tmp_path / place / "cdistill"
        package.mkdir(parents=True)
        (package / "__init__.py").touch()
        if compiled:
            (package / "_C.cpython-311-x86_64-linux-gnu.so").touch()
    (tmp_path / "clone/benchmarks").mkdir()
    shutil.copy(ROOT / "benchmarks/__init__.py", tmp_path / "clone/benchmarks")
    code = f"import sys; sys.path.append({str(tmp_path / 'site')!r}); import benchmarks, cdistill; print(cdistill.__file__)"
    done = subprocess.run(
        [sys.executable, "-S", "-c", code], cwd=tmp_path / "clone", env={}, capture_output=True, text=True
    )
    assert Path(done.stdout.strip()).relative_to(tmp_path).parts[0] == wanted, done.stderr
