"""The mechanism of `benchmarks.soak`: processes ended at a file operation, what they leave, and what counts as a fault."""

import os
import signal
import subprocess
import sys
import time

import pytest

from benchmarks._troubled_runs import Start, compile_shim, difference, state
from cdistill import cli

SCRIPT = """
import ctypes, os, shutil, sys
from pathlib import Path
folder, at, full, log = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
ctypes.CDLL(os.environ["LD_PRELOAD"]).arm(os.fsencode(folder), ctypes.c_long(at), full, os.fsencode(log))
(folder.parent / "outside").write_text("not counted")
os.chdir(folder)
os.mkdir("a")
with open("a/new", "wb", buffering=0) as file:
    file.write(b"12345678")
    os.fsync(file.fileno())
os.replace("a/new", folder / "a" / "file")
Path("old").unlink()
shutil.rmtree("tree")
"""
BEFORE, TREE = {"old": b"o"}, {"tree/": None, "tree/x": b"x"}
LEFT = {  # the operations in order, and what a process leaves that is ended at each: of a write half is done
    "mkdir a": BEFORE | TREE,
    "open a/new": BEFORE | TREE | {"a/": None},
    "write a/new": BEFORE | TREE | {"a/": None, "a/new": b"1234"},
    "fsync a/new": BEFORE | TREE | {"a/": None, "a/new": b"12345678"},
    "rename a/file": BEFORE | TREE | {"a/": None, "a/new": b"12345678"},
    "unlink old": BEFORE | TREE | {"a/": None, "a/file": b"12345678"},
    "unlink tree/x": TREE | {"a/": None, "a/file": b"12345678"},
    "rmdir tree": {"tree/": None, "a/": None, "a/file": b"12345678"},
}


@pytest.fixture(scope="module")
def shim(tmp_path_factory):
    return compile_shim(tmp_path_factory.mktemp("shim"))


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "run" / "tree").mkdir(parents=True)
    (tmp_path / "run" / "tree" / "x").write_text("x")
    (tmp_path / "run" / "old").write_text("o")
    return tmp_path / "run"


def act(shim, folder, at=0, full=0):
    """Exit code, errors and noted operations of the script."""
    log = folder.parent / "log"
    command = [sys.executable, "-S", "-E", "-c", SCRIPT, folder, str(at), str(full), log]
    done = subprocess.run(command, env=os.environ | {"LD_PRELOAD": str(shim)}, stderr=subprocess.PIPE, text=True)
    noted = [line.replace(f"{folder}/", "") for line in log.read_text().splitlines()] if log.exists() else []
    return done.returncode, done.stderr, noted


def left(folder):
    found = {str(path.relative_to(folder)): path for path in folder.rglob("*")}
    return {name + "/" * path.is_dir(): None if path.is_dir() else path.read_bytes() for name, path in found.items()}


def test_operations_are_counted_below_the_folder_alone(shim, folder):
    code, errors, noted = act(shim, folder)
    assert code == 0, errors
    assert noted == [f"{number} {operation}" for number, operation in enumerate(LEFT, 1)]
    assert left(folder) == {"a/": None, "a/file": b"12345678"}


@pytest.mark.parametrize("operation", LEFT)
def test_a_process_is_ended_at_its_operation(shim, folder, operation):
    at = 1 + list(LEFT).index(operation)
    code, _, noted = act(shim, folder, at)
    assert code == -signal.SIGKILL and len(noted) == at
    assert left(folder) == LEFT[operation]


@pytest.mark.parametrize(("at", "kept"), [(1, []), (2, ["a/"]), (3, ["a/", "a/new"])])
def test_a_disk_is_full_from_an_operation_on(shim, folder, at, kept):
    code, errors, _ = act(shim, folder, at, full=1)
    assert code == 1 and "No space left on device" in errors
    assert sorted(name for name in left(folder) if name.startswith("a")) == kept
    assert (folder.parent / "outside").read_text() == "not counted"


def test_a_state_knows_every_file_but_times(folder):
    (folder / "metrics.jsonl").write_text('{"step": 1, "elapsed_s": 0.5}\n')
    before = state(folder)
    (folder / "metrics.jsonl").write_text('{"step": 1, "elapsed_s": 0.7}\n')
    (folder / "tree" / "events.out").touch()
    assert difference(before, state(folder)) is None
    (folder / "metrics.jsonl").write_text('{"step": 2, "elapsed_s": 0.7}\n')
    (folder / "old").unlink()
    (folder / ".new").mkdir()
    assert difference(before, state(folder)) == ".new/ is left behind, metrics.jsonl differs, old is missing"


@pytest.mark.parametrize(
    ("words", "fault", "code"),
    [
        (["recipes"], None, 0),
        (["train", "nowhere.yaml"], None, 2),
        (["train"], "exit status 2 with 0 lines about it", 2),
        (["recipes", None], "a traceback", 70),
    ],
)
def test_how_a_start_ends(tmp_path, monkeypatch, words, fault, code):
    if None in words:
        monkeypatch.setattr(cli, "main", lambda words: 1 / 0)
    start = Start(words, tmp_path)
    assert (start.end(), start.code) == (fault, code), start.text()


def forever(words):
    while True:
        pass


@pytest.mark.parametrize("act", [forever, lambda words: time.sleep(60)], ids=["busy", "idle"])
def test_a_start_that_hangs_is_ended(tmp_path, monkeypatch, act):
    monkeypatch.setattr("benchmarks._troubled_runs.HANGS", 0.3)
    monkeypatch.setattr(cli, "main", act)
    start = Start(["recipes"], tmp_path)
    assert start.end() == "hangs" and start.code == -signal.SIGKILL
