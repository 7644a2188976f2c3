"""`python -m benchmarks.gpu`: its order and its budget, what it does when a process dies, and its rehearsal without a GPU."""

import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import _exactness_attention, _gpu_tasks, _measure, _results, gpu, report
from benchmarks._contenders import COMPILED_STACK, STACK, Shape, contenders, draw
from benchmarks._gpu_tasks import CHECKS, TASKS, Task
from benchmarks._measure import REHEARSAL
from benchmarks._results import ResultsFile

CPU = torch.device("cpu")


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
