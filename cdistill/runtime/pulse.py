"""A process that hangs while others wait for it: told by its number, where it is, and ended with the run.

Every process of a run has a thread that tells how many steps it has trained and, where none has been made for a while, where
its main thread stands. Who listens is the process that started them (`cdistill.runtime.launch.start_processes`) or, where a
launcher has, the first two of them. A process that is stopped, or waits for a dead disk, is silent; one that hangs in Python
stands outside of what waits for others. When one process of a launcher's ends with an error, all end, on every machine.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

from cdistill.runtime.errors import PEER_LOST, Stopped, line_of

BEAT_SECONDS = 1.0
END = "pulse/end"  # key of what a process has said that ends the run
END_SECONDS = 10.0  # what the others have to end by themselves
WATCHERS = 2  # of a launcher's processes: one that hangs cannot tell of itself
SILENT_SECONDS = 60.0  # without a word, and a process does not run: nobody waits longer for it
FRAMES = 6  # of a stack that are shown
# Parts of the paths of what waits for other processes, or for a device on which they are waited for.
_WAITING = ("/torch/distributed/", "/torch/autograd/", "/torch/nn/parallel/", "/torch/_tensor.py", "/deepspeed/")


class Pulse:
    """What a process tells of itself; `beat` after each step, `paused` around work that no step waits for.

    Args:
        store: where the processes tell of themselves; the thread has a connection of its own.
        rank: of this process.
        ends: whether what another process says under `END` ends this one.
    """

    def __init__(self, store: Any, rank: int, *, ends: bool = False) -> None:
        self._store, self._key, self._ends = store, f"pulse/{rank}", ends
        self._main = threading.main_thread().ident
        self._steps, self._counts, self._changed = 0, False, time.monotonic()
        self._beats = 0
        threading.Thread(target=self._tell, daemon=True).start()

    def beat(self) -> None:
        """A step has been made: from now on the next one is waited for."""
        self._steps, self._counts, self._changed = self._steps + 1, True, time.monotonic()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Work of any length: saving, measuring, the end of a stage."""
        counted, self._counts = self._counts, False
        try:
            yield
        finally:
            self._changed, self._counts = time.monotonic(), counted

    def end(self) -> None:
        """No further step is waited for."""
        self._counts = False

    def _tell(self) -> None:
        while True:
            self._beats += 1
            still = time.monotonic() - self._changed if self._counts else 0.0
            said = {"beats": self._beats, "still": still, "host": socket.gethostname(), "pid": os.getpid()}
            if still > BEAT_SECONDS:
                said["stack"] = self._stack()
            try:
                self._store.set(self._key, json.dumps(said))
                if self._ends and self._store.check([END]):
                    time.sleep(END_SECONDS)
                    os._exit(PEER_LOST)
            except RuntimeError:  # torch's, of a store whose owner has ended, and this process with it
                return
            time.sleep(BEAT_SECONDS)

    def _stack(self) -> list[list[str]]:
        frame = sys._current_frames().get(self._main or 0)
        return [[f.filename, f"{f.filename}:{f.lineno} in {f.name}"] for f in traceback.extract_stack(frame)][::-1]


_pulse: Pulse | None = None
_together: _Together | None = None


def start(host: str, port: int, rank: int) -> None:
    """Let this process tell the one that started it of itself from now on."""
    global _pulse
    if _pulse is None:
        _pulse = Pulse(_connection(host, port), rank)


def start_together(host: str, port: int, rank: int, world: int) -> None:
    """Let this process, one of a launcher's, tell the others of itself from now on, and end with them."""
    global _pulse, _together
    if _pulse is None:
        _together = _Together(host, port, rank, world)
        _pulse = Pulse(_together.connect(), rank, ends=True)


def watch(limit: float) -> None:
    """Have the first of a launcher's processes end the run where one makes no step for ``limit`` seconds while others wait."""
    if _together is not None and _together.rank < WATCHERS:
        _together.watch(limit)


@contextmanager
def ending_together() -> Iterator[None]:
    """Let an error that ends this process of a launcher's end the others, too, on whatever machine."""
    try:
        yield
    except BaseException as error:
        if _together is not None and not isinstance(error, Stopped):
            _together.end(line_of(error))
        raise


class _Together(NamedTuple):
    """A launcher's processes, none of which has started the others."""

    host: str
    port: int
    rank: int
    world: int

    def connect(self) -> Any:
        import torch.distributed as dist

        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # a launcher may start them again on one store
        return dist.PrefixStore(f"cdistill/{attempt}", _connection(self.host, self.port))

    def watch(self, limit: float) -> None:
        watch = Watch(self.connect(), self.world, limit)

        def look() -> None:
            while True:
                time.sleep(BEAT_SECONDS)
                try:
                    line = watch.stuck()
                except RuntimeError:  # the store is gone, and the run with it
                    return
                if line is not None:
                    if self.end(line):
                        print(f"cdistill: error: {line}", file=sys.stderr, flush=True)
                    os._exit(1)

        threading.Thread(target=look, daemon=True).start()

    def end(self, line: str) -> bool:
        """Tell the others why this one ends; whether nobody else has said something before."""
        with suppress(RuntimeError):
            return self.connect().compare_set(END, "", line) == line.encode()
        return True


def _connection(host: str, port: int) -> Any:
    import torch.distributed as dist

    return dist.TCPStore(host, port, is_master=False, timeout=timedelta(seconds=60))


def beat() -> None:
    """See `Pulse.beat`; nothing where nobody listens."""
    if _pulse is not None:
        _pulse.beat()


@contextmanager
def paused() -> Iterator[None]:
    """See `Pulse.paused`."""
    if _pulse is None:
        yield
    else:
        with _pulse.paused():
            yield


def end() -> None:
    """See `Pulse.end`."""
    if _pulse is not None:
        _pulse.end()


class Watch:
    """What the process that started others knows of them.

    Args:
        store: of this process, in which they tell of themselves.
        count: how many there are.
        limit: seconds without a step while others wait; 0 watches nothing.
    """

    def __init__(self, store: Any, count: int, limit: float) -> None:
        self._store, self._count, self._limit = store, count, limit
        self._last: dict[int, tuple[int, float]] = {}  # beats, and when there was one more
        self._said: dict[int, Mapping[str, Any]] = {}
        self._looked = 0.0

    def stuck(self) -> str | None:
        """What to say of a process that hangs while others wait, or None."""
        now = time.monotonic()
        if not self._limit or now - self._looked < BEAT_SECONDS:
            return None
        self._looked = now
        for rank in range(self._count):
            if self._store.check([f"pulse/{rank}"]):
                said = json.loads(self._store.get(f"pulse/{rank}"))
                if self._last.get(rank, (0, 0.0))[0] != said["beats"]:
                    self._last[rank], self._said[rank] = (said["beats"], now), said
        waiting = [rank for rank, said in self._said.items() if said["still"] > self._limit]
        enough = min(SILENT_SECONDS, self._limit)
        for rank, (_, heard) in self._last.items():
            silent = now - heard
            others = [said for other, said in self._said.items() if other != rank and said["still"] > enough]
            if others and silent > enough:
                return self._line(rank, silent, f"it does not run ({_state(self._said[rank])})")
        hanging = [rank for rank in waiting if not _waits(self._said[rank])]
        if hanging and len(hanging) < len(waiting):
            where = " < ".join(text for _, text in self._said[hanging[0]].get("stack", ())[:FRAMES])
            return self._line(hanging[0], self._said[hanging[0]]["still"], f"it is at {where}")
        return None

    def _line(self, rank: int, seconds: float, where: str) -> str:
        said = self._said[rank]
        return (
            f"process {rank} of {self._count} (process {said['pid']} on {said['host']}) has made no step for {seconds:.0f} s "
            f"while others wait: {where}; the run is ended (max_stuck_seconds)"
        )


def _waits(said: Mapping[str, Any]) -> bool:
    """Whether a process stands in something that waits for others."""
    return any(part in path for path, _ in said.get("stack", ())[:FRAMES] for part in _WAITING)


def _state(said: Mapping[str, Any]) -> str:
    """What the kernel says of a process of this machine."""
    if said["host"] != socket.gethostname():
        return "its machine has not told why"
    try:
        lines = Path(f"/proc/{said['pid']}/status").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("State:"))
    except (OSError, StopIteration):
        return "it is gone"
