"""The process that starts others: it names the one that died, stops the rest, passes on signals, and finds a port."""

import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from cdistill.runtime import errors, launch

BODY = """
import os, signal, sys, time
from pathlib import Path
rank, output = int(os.environ["RANK"]), Path(sys.argv[2])
(output / f"pid{rank}").write_text(str(os.getpid()))
def say(number, frame):
    (output / f"asked{rank}").touch()
    sys.exit(143)
"""


@pytest.fixture
def start(monkeypatch, tmp_path):
    """Starts 2 processes of a script instead of ranks of a run, with a short grace."""

    def start(script, grace=1.0):
        path = tmp_path / "worker.py"
        path.write_text(BODY + script)
        monkeypatch.setattr(launch, "WORKER", (sys.executable, str(path)))
        monkeypatch.setattr(launch, "GRACE_SECONDS", grace)
        monkeypatch.delenv("MASTER_PORT", raising=False)
        launch.start_processes(2, "train", tmp_path)

    return start


def gone(tmp_path, rank):
    pid = int((tmp_path / f"pid{rank}").read_text())
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def test_processes_that_end_well(start, tmp_path):
    start("")
    assert gone(tmp_path, 0) and gone(tmp_path, 1)


@pytest.mark.parametrize(
    ("death", "message"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", "process 1 of 2 was killed by SIGKILL; the others are stopped"),
        ("os.kill(os.getpid(), signal.SIGSEGV)", "process 1 of 2 was killed by SIGSEGV; the others are stopped"),
        ("sys.exit(3)", "process 1 of 2 failed with exit code 3; its message is above"),
    ],
)
def test_a_dead_process_is_named_although_the_other_hangs(start, tmp_path, death, message):
    began = time.monotonic()
    with pytest.raises(errors.ProcessError) as error:
        start(f"signal.signal(signal.SIGTERM, signal.SIG_IGN)\nif rank: {death}\ntime.sleep(600)")
    assert str(error.value) == message
    assert gone(tmp_path, 0) and time.monotonic() - began < 60


def test_a_process_that_lost_its_peer_is_not_the_one_to_name(start):
    """It ends first here, as when the kernel takes long to take a process apart."""
    with pytest.raises(errors.ProcessError, match=r"^process 1 of 2 failed with exit code 5"):
        start(f"if not rank: sys.exit({errors.PEER_LOST})\ntime.sleep(0.5)\nsys.exit(5)", grace=30)


def test_a_signal_is_passed_on_once_and_waited_for(start, tmp_path):
    pid = os.getpid()
    ready = (
        f"signal.signal(signal.SIGTERM, say)\nif rank: time.sleep(0.5); os.kill({pid}, signal.SIGINT)\ntime.sleep(600)"
    )
    with pytest.raises(errors.Stopped) as stopped:
        start(ready)
    assert stopped.value.exit_code == 128 + signal.SIGINT
    assert (tmp_path / "asked0").exists() and (tmp_path / "asked1").exists()


def test_a_process_that_fails_while_it_stops_is_told(start):
    script = f"""
signal.signal(signal.SIGTERM, say if rank else lambda *_: sys.exit(1))
if rank: time.sleep(0.5); os.kill({os.getpid()}, signal.SIGTERM)
time.sleep(600)"""
    with pytest.raises(errors.ProcessError, match=r"^process 0 of 2 failed with exit code 1"):
        start(script)


def test_a_process_dies_with_its_parent():
    child = (
        "import sys, time; from cdistill.runtime.launch import die_with_parent; die_with_parent();"
        "print('ready', flush=True); time.sleep(600)"
    )
    parent = f"""
import os, subprocess, sys
env = {{**os.environ, "{launch.PARENT}": str(os.getpid())}}
child = subprocess.Popen([sys.executable, "-c", {child!r}], env=env, start_new_session=True, stdout=subprocess.PIPE)
child.stdout.readline()
print(child.pid, flush=True)
os.kill(os.getpid(), 9)
"""
    done = subprocess.run([sys.executable, "-c", parent], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    pid = int(done.stdout)
    for _ in range(600):
        try:
            with open(f"/proc/{pid}/stat") as file:
                if file.read().rpartition(")")[2].split()[0] == "Z":  # dead, and nobody there to reap it
                    return
        except FileNotFoundError:
            return
        time.sleep(0.1)
    raise AssertionError("it lives on")


@pytest.fixture
def taken_port():
    with socket.socket() as server:
        server.bind(("0.0.0.0", 0))
        server.listen()
        yield server.getsockname()[1]


def test_a_port_that_is_in_use(monkeypatch, tmp_path, taken_port):
    message = f"^MASTER_PORT {taken_port} is in use: set it to a free port$"
    monkeypatch.setenv("MASTER_PORT", str(taken_port))
    with pytest.raises(ValueError, match=message):
        launch.start_processes(2, "train", tmp_path)
    for name, value in {"MASTER_ADDR": "127.0.0.1", "RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv(launch.PARENT, raising=False)
    code = (
        "import sys; from cdistill.runtime import launch\n"
        "try: launch.init_process_group()\n"
        "except ValueError as error: sys.exit(str(error))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.strip().splitlines()[-1] == message[1:-1], done.stderr


def test_a_port_that_is_no_number(monkeypatch, tmp_path):
    monkeypatch.setenv("MASTER_PORT", "http")
    with pytest.raises(ValueError, match=r"^MASTER_PORT must be a port number, got 'http'$"):
        launch.start_processes(2, "train", tmp_path)
