"""Commands of cdistill as processes to which something happens, and what they leave: for `benchmarks.soak`.

Each is a fork of this process, which has imported everything, so that a start takes a moment. `_file_operations.c`, which
`prepare` compiles and preloads, counts what a process does to files, and ends it at a number.
"""

from __future__ import annotations

import ctypes
import gc
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

SOURCE = Path(__file__).with_name("_file_operations.c")
LAB = "CDISTILL_SOAK"  # environment variable: the folder of all that this program makes
TIMES = ("samples_per_s", "tokens_per_s", "elapsed_s", "memory_mb")  # in metrics; they differ from run to run
HANGS = 60.0  # seconds of a processor, for what takes a few, or without any


def compile_shim(folder: Path) -> Path:
    """Compile `_file_operations.c`. Raises CalledProcessError."""
    shim = folder / "file_operations.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", shim, SOURCE, "-ldl"], check=True)
    return shim


def prepare(module: str) -> Path:
    """Start ``python -m module`` again with the shim and one thread, unless that has happened; import what commands need.

    Returns the folder of this program.
    """
    if LAB not in os.environ:
        lab = tempfile.mkdtemp(prefix="cdistill-soak-")
        one = {
            "OMP_NUM_THREADS": "1",
            "MKL_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "DS_ACCELERATOR": "cpu",
        }
        environment = {**os.environ, **one, LAB: lab, "LD_PRELOAD": str(compile_shim(Path(lab)))}
        os.execve(sys.executable, [sys.executable, "-m", module, *sys.argv[1:]], environment)
    import deepspeed
    import peft
    import torch
    import torch._dynamo
    import torch.utils.tensorboard

    import cdistill.cli
    import cdistill.train.cache_writer
    import cdistill.train.stages

    assert all((peft, torch, cdistill))
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would be compiled for minutes
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()
    return Path(os.environ[LAB])


class Start:
    """A command that runs in a fork.

    Args:
        words: of the command line.
        folder: below which its file operations are counted.
        at: number of the operation at which it is ended; 0 never.
        full: the disk is full from that operation on, instead.
        log: file that lists the operations.
    """

    def __init__(
        self, words: Sequence[object], folder: Path, *, at: int = 0, full: bool = False, log: Path | None = None
    ) -> None:
        self._output = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115
        self.begun, self.code = time.monotonic(), None
        sys.stdout.flush()
        self.pid = os.fork()
        if not self.pid:
            self._become([str(word) for word in words], folder, at, full, log)

    def _become(self, words: list[str], folder: Path, at: int, full: bool, log: Path | None) -> None:
        code = 70
        try:
            for number in (1, 2):
                os.dup2(self._output.fileno(), number)
            sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))  # noqa: SIM115
            if at or log:
                shim = ctypes.CDLL(os.environ["LD_PRELOAD"])
                shim.arm(os.fsencode(folder), ctypes.c_long(at), int(full), os.fsencode(log or ""))
            from cdistill import cli

            code = cli.main(words)
        except SystemExit as end:
            code = end.code
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def send(self, number: int) -> None:
        """Send a signal, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def poll(self) -> int | None:
        """The exit code, negative for a signal, or None."""
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
        return self.code

    def wait(self, seconds: float = float("inf")) -> int | None:
        """The exit code, or None where it still runs after some time, or hangs; a busy machine may make it wait for long."""
        begun = moved = time.monotonic()
        used = self._used()
        while self.poll() is None and time.monotonic() < begun + seconds:
            time.sleep(0.005)
            if self._used() != used:
                used, moved = self._used(), time.monotonic()
            if used > HANGS or time.monotonic() > moved + HANGS:
                break
        return self.code

    def _used(self) -> float:
        """Seconds of a processor that it has had."""
        if self.code is not None:
            return 0.0
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def end(self) -> str | None:
        """Wait for its end; returns what is wrong with how it ended, or None."""
        if self.wait() is None:
            self.send(signal.SIGKILL)
            while self.poll() is None:
                time.sleep(0.005)
            return "hangs"
        text = self.text()
        errors = [line for line in text.splitlines() if line.startswith("cdistill: error: ")]
        if "Traceback (most recent call last)" in text:
            return "a traceback"
        if self.code in (1, 2) and len(errors) != 1:
            return f"exit status {self.code} with {len(errors)} lines about it"
        if self.code not in (0, 1, 2, 128 + signal.SIGTERM, -signal.SIGTERM, -signal.SIGKILL):
            return f"exit status {self.code}"
        return None

    def text(self) -> str:
        """All it has written so far."""
        self._output.seek(0)
        return self._output.read().replace("\r", "\n")

    def said(self, lab: Path) -> str:
        """Its last line, which tells of an error where there is one."""
        lines = [line for line in self.text().splitlines() if line.strip() and "%|" not in line]  # bars
        errors = [line for line in lines if "error" in line or "damaged" in line]
        return (errors or lines or [""])[-1].replace(str(lab), "LAB")[:300]


def state(folder: Path, *, logs: bool = True) -> dict[str, str]:
    """SHA-256 of what lies below a folder, by path: a log without its times, or no log; of TensorBoard's files the folder."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_dir():
            found[f"{name}/"] = ""
        elif path.name == "metrics.jsonl" and not logs:
            continue
        elif path.name == "metrics.jsonl":
            entries = [json.loads(line) for line in path.read_text().splitlines()]
            kept = [{key: value for key, value in entry.items() if key not in TIMES} for entry in entries]
            found[name] = hashlib.sha256(json.dumps(kept).encode()).hexdigest()
        elif not path.name.startswith("events."):
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def difference(expected: dict[str, str], found: dict[str, str]) -> str | None:
    """What is missing, left behind or other, or None."""
    said = [
        *(f"{name} is missing" for name in expected.keys() - found.keys()),
        *(f"{name} is left behind" for name in found.keys() - expected.keys()),
        *(f"{name} differs" for name in expected.keys() & found.keys() if expected[name] != found[name]),
    ]
    return ", ".join(sorted(said)[:4]) or None


def cleared(folder: Path) -> Path:
    """An empty folder to work in."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder
