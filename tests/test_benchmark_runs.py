"""What `pytest benchmarks/` and `python -m benchmarks.gpu` do around a measurement: what is run, kept, shown and left out."""

import json
import shutil
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import _exactness_attention, _gpu_tasks, _measure, _plots, _relation, _results, conftest, gpu, report
from benchmarks._cases import attention, measured, relation
from benchmarks._contenders import COMPILED_STACK, FLEX_ON_CPU, STACK, Shape, contenders, draw
from benchmarks._gpu_tasks import CHECKS, TASKS, Task
from benchmarks._measure import REHEARSAL, rounds
from benchmarks._results import ROOT, ResultsFile
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
    long = config.stash.get(conftest.LONG, [])
    assert len(long) == (6 if wanted else 0) and "bench_gpu.py" not in long


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


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("", ["check T4096", "attention T4096", "attention paper"]),
        ("not check", ["attention T4096", "attention paper"]),
        ("T4096 and not check", ["attention T4096"]),
        ("paper or check", ["check T4096", "attention paper"]),
    ],
)
def test_tasks_are_taken_by_words_of_their_names(words, found):
    names = ["check T4096", "attention T4096", "attention paper"]
    assert [name for name in names if gpu.matches(words, name)] == found


def test_what_matters_most_comes_first_on_a_gpu():
    assert list(TASKS)[:3] == ["rates", "attention T4096", "attention T32768"]
    assert list(CHECKS)[:3] == ["check compile-T4096", "check compile-T32768", "check bf16-d128-gqa-masked"]
    assert set(CHECKS) >= {f"check {config}" for config in _exactness_attention.CONFIGS}
    assert list(TASKS).index("attention T131072") > list(TASKS).index("attention paper teacher")
    most_before_rest = sum(TASKS[name].most for name in list(TASKS)[:3])
    assert most_before_rest < (1 - gpu.FOR_CHECKS) * gpu.SECONDS - gpu.FOR_REPORT


@pytest.fixture
def file(tmp_path):
    return ResultsFile(tmp_path / "results.json", {"device": "x"})


def test_checks_share_their_time_and_what_is_late_was_not_reached(monkeypatch, file):
    def run_apart(module, name, seconds):
        assert 0 < seconds <= 100
        return {"good": {}, "bad": {"flash": "dq: error 3"}, "late": None}[name]

    monkeypatch.setattr(gpu, "run_apart", run_apart)
    monkeypatch.setattr(gpu, "CHECKS", {f"check {name}": ("module", name) for name in ("good", "bad", "late")})
    names = list(gpu.CHECKS)
    gpu.run_checks(file, names, gpu.time.monotonic() + 100)
    assert file.data["done"] == {"check good": [], "check bad": ["flash dq: error 3"]}
    assert json.loads(file.path.read_text())["failed_parts"] == {"check bad": {"flash": "dq: error 3"}}
    late = ResultsFile(file.path, {"done": {}})
    gpu.run_checks(late, names, gpu.time.monotonic() + 1)
    assert late.data["done"] == {}


def test_a_process_that_dies_is_followed_by_another(file, monkeypatch):
    """Behind the task in which it died; one that ends late is not followed."""
    calls = []

    def spawn(command, cwd, timeout):
        names = command[command.index(str(file.path)) + 2 :]
        calls.append(names)
        it = ResultsFile.read(file.path)
        it.add("begun", {names[0]: 0.0})
        if names[0] == "b":
            return SimpleNamespace(returncode=-11)
        it.add("done", {names[0]: []})
        if names[0] == "c":
            raise subprocess.TimeoutExpired(command, timeout)
        it.add("begun", {names[1]: 0.0})
        return SimpleNamespace(returncode=-6)

    file.add("done", {})
    gpu.run_tasks(file, ["a", "b", "c", "d"], gpu.time.monotonic() + 100, spawn)
    assert calls == [["a", "b", "c", "d"], ["c", "d"]]
    assert file.data["done"] == {"a": [], "b": ["its process ended with exit code -6"], "c": []}
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("no time is left"))
    gpu.run_tasks(file, ["d"], gpu.time.monotonic() + 1)


def test_a_task_is_begun_if_its_time_is_left(file, monkeypatch, capsys):
    def broken(file, seconds):
        raise RuntimeError("illegal memory access\nmore")

    ran = []
    tasks = {
        "a": Task(lambda file, seconds: ran.append(seconds) or [], need=1, most=5),
        "b": Task(broken, need=1, most=5),
        "c": Task(lambda *_: pytest.fail("too little time is left"), need=1000, most=2000),
        "d": Task(lambda *_: ["inexact"], need=1, most=5),
    }
    monkeypatch.setattr(_gpu_tasks, "TASKS", tasks)
    monkeypatch.setattr(_gpu_tasks, "gpu", lambda: CPU)
    assert _gpu_tasks.work(file, list(tasks), gpu.time.time() + 100) == 0
    assert file.data["done"] == {"a": [], "b": ["RuntimeError: illegal memory access"], "d": ["inexact"]}
    assert ran == [5] and "left out: c, which needs 1000 s" in capsys.readouterr().out

    def dead(device):
        raise RuntimeError("CUDA error")

    monkeypatch.setattr(_gpu_tasks, "synchronize", dead)
    again = ResultsFile(file.path, {})
    assert _gpu_tasks.work(again, ["a", "d"], gpu.time.time() + 100) == _gpu_tasks.DEAD
    assert again.data["done"] == {"a": []}


def test_what_failed_its_check_is_not_timed_on_a_gpu(file, monkeypatch):
    told = []
    monkeypatch.setattr(
        _gpu_tasks, "measured", lambda case, *_, failed, **__: told.append(failed) or ([{"both_ms": 1}], [])
    )
    failed = {
        "bf16-d128-mha": {"slice": "dq: error 3"},
        "vocabulary-bf16-plain": {"jsd": "crashed"},
        "fp32-d128-mha": {"": ""},
    }
    file.add("failed_parts", {f"check {name}": parts for name, parts in failed.items()})
    for name in ("attention T4096", "attention T4096 D64", "vocabulary trained, jsd"):
        assert TASKS[name].run(file, 1.0) == []
    assert told == [{"slice": "dq: error 3"}, {}, {"jsd": "crashed"}]
    assert TASKS["slices T4096"].run(file, 1.0) == ["not timed: its check failed"]


def test_kernels_of_a_pass_are_timed(file, monkeypatch):
    def products(q, k, v, *_):
        return q @ k.repeat(1, 2, 1, 1).mT @ v.repeat(1, 2, 1, 1), None

    monkeypatch.setenv(REHEARSAL, "1")
    monkeypatch.setattr(_gpu_tasks, "ours", lambda engine: products)
    assert TASKS["kernels T4096"].run(file, 5.0) == []
    times = {row["kernel"]: row for row in file.data["kernels"] if row["contender"] == "ours/triton"}
    assert times["aten::bmm"]["calls"] == 6 and times["aten::bmm"]["ms"] > 0  # two products, and four gradients
    assert "| `aten::bmm` | 6 |" in report.kernels_table(file.data)


def test_a_tile_that_was_not_checked_is_not_timed_on_a_gpu(file, monkeypatch):
    told = []
    monkeypatch.setattr(_gpu_tasks._passes, "timed_tiles", lambda *_, failed, **__: told.append(failed) or [])
    names = [name for name in CHECKS if name.startswith("check tile-slice_rows-d128")]
    file.add("planned", names)
    file.add("done", {names[0]: [], names[1]: ["dq: error 3"]})
    TASKS["tiles slice_rows D128"].run(file, 1.0)
    shown = [name.removeprefix("check ") for name in names]
    assert told == [{shown[1]: "dq: error 3", shown[2]: "not reached"}]


@pytest.mark.skipif(torch.cuda.is_available(), reason="the run itself would begin")
def test_a_mistake_in_the_call_is_one_line(capsys, monkeypatch):
    monkeypatch.setenv(REHEARSAL, "1")  # which is undone
    for arguments, words in ((["--rehearse", "-k", "nothing"], "attention T4096"), ([], "--rehearse")):
        with pytest.raises(SystemExit):
            gpu.main(arguments)
        assert words in capsys.readouterr().err.splitlines()[-1]


def test_the_whole_run_on_a_gpu_is_rehearsed_on_the_cpu(tmp_path, monkeypatch, capsys):
    """Its processes are this one; `python -m benchmarks.gpu --rehearse` starts them."""
    monkeypatch.setenv("CDISTILL_RESULTS", str(tmp_path))
    monkeypatch.setenv(REHEARSAL, "1")

    def check(module, name, seconds):
        sys.modules[module].TOGETHER[name](CPU)
        return {}

    def spawn(command, cwd, timeout):
        path, until, *names = command[command.index("benchmarks._gpu_tasks") + 1 :]
        return SimpleNamespace(returncode=_gpu_tasks.work(ResultsFile.read(Path(path)), names, float(until)))

    monkeypatch.setattr(gpu, "run_apart", check)
    monkeypatch.setattr(gpu.run_tasks, "__defaults__", (spawn,))
    words = "check vocabulary-bf16-plain or rates or relation one-layer or trained, forward_kl"
    assert gpu.main(["--rehearse", "--seconds", "200", "-k", words]) == 0
    (path,) = tmp_path.glob("*/results.json")
    data = json.loads(path.read_text())
    assert list(data["done"]) == data["planned"] and len(data["planned"]) == 4
    assert {row["op"] for row in data["rows"]} == {"vocabulary layer", "attention relation"} and "rates" in data
    out = capsys.readouterr().out
    assert "1 of 1 passed" in out and "Not reached" not in out and str(path) in out


class OnCuda(torch.Tensor):
    """A CPU tensor that says it is on a GPU."""

    device = property(lambda _: torch.device("cuda"))
    is_cuda = property(lambda _: True)


@pytest.fixture
def fake_cuda(monkeypatch):
    """What the benchmarks ask of torch.cuda, by the clock: an H200's capability, and a queue that is never behind."""

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = time.perf_counter()

        def elapsed_time(self, other):
            return 1e3 * (other.at - self.at)

    empty, slept = torch.empty, []
    answers = {
        "synchronize": None,
        "get_device_name": "NVIDIA H200",
        "get_device_capability": (9, 0),
        "get_device_properties": SimpleNamespace(L2_cache_size=1000),
        "mem_get_info": (10**11, 10**11),
        "memory_allocated": 10**6,
        "max_memory_allocated": 5 * 10**6,
        "reset_peak_memory_stats": None,
        "empty_cache": None,
    }
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer: answer)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", slept.append)
    monkeypatch.setattr(torch, "empty", lambda *size, device, **options: empty(*size, **options))
    _measure._flushed.cache_clear()
    yield slept
    _measure._flushed.cache_clear()


def test_a_gpu_is_timed_by_its_events(fake_cuda):
    device, calls = torch.device("cuda"), []

    def forward():
        calls.append("forward")
        time.sleep(2e-3)

    taken = _measure.passes({"x": (forward, lambda _: time.sleep(4e-3))}, device, float("inf"), pass_seconds=0.05)["x"]
    row = _measure.timings(taken)
    assert len(taken) == 2 and len(calls) == row["repeats"] + 4  # two of each pass do not count
    assert 2 <= row["forward_ms"] < row["backward_ms"] and row["both_ms"] >= 6
    assert len(fake_cuda) == row["repeats"] and min(fake_cuda) > 6 * _measure.CYCLES_PER_MS
    assert _measure.peak_mb(forward, lambda _: None, device) == 4.0
    environment = _results.environment(device)
    assert environment["device"] == "NVIDIA H200" and {"cuda", "cudnn", "driver"} <= environment["versions"].keys()


def test_on_a_gpu_all_rivals_take_part(fake_cuda):
    shape = Shape("T128", 1, 2, 1, 128, 64, 3, 9)
    p = draw(shape, torch.float16, CPU)
    on_gpu = p._replace(**{name: getattr(p, name).detach().as_subclass(OnCuda) for name in "qkv"})
    found, left_out = contenders(shape, on_gpu)
    names = {c.name for c in found}
    assert names >= {"ours", "flash_attention (own)", "sdpa/flash", "sdpa/cudnn", "flex (plain)"}
    assert names >= {"flex + compiled einsum", COMPILED_STACK, "eager"} and STACK not in names
    assert len([name for name in left_out if left_out[name] == "is ours"]) == 1
    assert all(name.startswith("ours/") for name in left_out)
