"""A teacher on one machine for students on others: `cdistill cache RECIPE --serve` makes shards as they are asked for.

What is sent is a cache's own files (`cdistill.train.cache`), so that a served run is a run from a cache. The teacher works
ahead of what is asked; with a window it stops so many shards ahead, and keeps no more of them behind, so that a disk of any
size serves a data set of any size. Who restarts, server or run, goes on where it was: shards are told by their numbers alone.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from cdistill.errors import InputError
from cdistill.runtime import launch
from cdistill.runtime.signals import StopRequest
from cdistill.train.cache import MissingShards, shard_path
from cdistill.train.cache_wire import DIGEST, INDEX, NAME, NONCE, POLL_SECONDS, SIGNATURE, is_signed, signature

LEAST_WINDOW = 2  # shards: who reads one has the next one fetched
LOOK_SECONDS = 0.5  # between looks for a signal
IDLE_SECONDS = 60.0  # that a connection may be silent


class ServedStage:
    """A stage's shards, made one by one.

    Args:
        label: of the stage.
        folder: of its files.
        work: what is missing there.
        make: runs the teacher over one shard.
        finish: says that all are there.
    """

    def __init__(
        self,
        label: str,
        folder: Path,
        work: MissingShards,
        make: Callable[[MissingShards], None],
        finish: Callable[[], None],
    ) -> None:
        self.label, self.folder, self.work, self._make, self._finish = label, folder, work, make, finish
        self.shards = -(-work.samples // work.per_shard)
        self.there = set(range(self.shards)) - set(work.missing)
        self.asked, self.when = min(self.there, default=0), 0.0  # where a server before this one was, with a window

    def next(self, window: int | None) -> int | None:
        """The shard to make, counted from what was asked for last; those before it only without a window."""
        ahead = range(self.asked, self.shards)
        wanted = (*ahead, *range(self.asked)) if window is None else ahead[: window + 1]
        return next((shard for shard in wanted if shard not in self.there), None)

    def make(self, shard: int) -> None:
        """Run the teacher; takes as long as it takes."""
        self._make(self.work._replace(missing=[shard]))

    def made(self, shard: int) -> None:
        """The shard is there."""
        self.there.add(shard)
        if len(self.there) == self.shards:
            self._finish()

    def drop(self, window: int) -> None:
        """Remove what lies further than a window from what was asked for last."""
        for shard in [shard for shard in self.there if abs(shard - self.asked) > window]:
            path = shard_path(self.folder, shard)
            path.with_suffix(".json").unlink(missing_ok=True)
            path.unlink(missing_ok=True)
            self.there.discard(shard)


class CacheServer:
    """Hands out the shards of several stages; `work` makes them, in the thread that has the teacher."""

    def __init__(self, stages: Iterable[ServedStage], key: bytes, window: int | None) -> None:
        self.stages = {stage.label: stage for stage in stages}
        self.key, self.window, self.samples = key, window, 0
        self.changed = threading.Condition()

    def count(self, samples: int) -> None:
        """So many samples more have been made: whoever waits for a shard sees that the teacher lives."""
        self.samples += samples

    def work(self, request: StopRequest) -> None:
        """Make shards until a signal has come; what is asked for comes first."""
        while not request.received:
            with self.changed:
                found = self._next()
                if found is None:
                    self.changed.wait(LOOK_SECONDS)
                    continue
            stage, shard = found
            stage.make(shard)
            with self.changed:
                stage.made(shard)
                if self.window is not None:
                    stage.drop(self.window)
                self.changed.notify_all()

    def _next(self) -> tuple[ServedStage, int] | None:
        for stage in sorted(self.stages.values(), key=lambda stage: -stage.when):
            shard = stage.next(self.window)
            if shard is not None:
                return stage, shard
        return None

    def find(self, path: str) -> tuple[int, Any]:
        """Status, and an open file or a text, for a path; waits a while for a shard that is being made."""
        match = NAME.fullmatch(path)
        stage = self.stages.get(match[1]) if match else None
        if match is None or stage is None:
            return 404, f"this server has stages {', '.join(self.stages)}"
        if match[2] is None:
            return 200, (stage.folder / INDEX).open("rb")
        shard = int(match[2])
        if shard >= stage.shards:
            return 404, f"stage {stage.label} has {stage.shards} shards"
        with self.changed:
            stage.asked, stage.when = shard, time.monotonic()
            if self.window is not None:
                stage.drop(self.window)
            self.changed.notify_all()
            if self.changed.wait_for(lambda: shard in stage.there, POLL_SECONDS):
                return 200, shard_path(stage.folder, shard).open("rb")
        return 202, json.dumps({"made": self.samples})


class Handler(BaseHTTPRequestHandler):
    """One request: signed by somebody who has the key, answered with what he can check."""

    timeout = IDLE_SECONDS
    server_version, sys_version = "cdistill", ""

    def __init__(self, server: CacheServer, *args: Any) -> None:
        self.cache = server
        super().__init__(*args)

    def do_GET(self) -> None:
        nonce, signed = self.headers.get(NONCE, ""), self.headers.get(SIGNATURE)
        if not re.fullmatch("[0-9a-f]{32}", nonce) or not is_signed(
            self.cache.key, signed, "request", self.path, nonce
        ):
            self._send(403, nonce, b"the request is not signed with the key of this server")
            return
        try:
            status, found = self.cache.find(self.path)
        except OSError as error:
            self._send(500, nonce, str(error).encode())
            return
        if isinstance(found, str):
            self._send(status, nonce, found.encode())
            return
        with found as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            size = file.tell()
            file.seek(0)
            self._begin(status, nonce, digest, size)
            shutil.copyfileobj(file, self.wfile, 2**20)

    def _begin(self, status: int, nonce: str, digest: str, size: int) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(size))
        self.send_header(DIGEST, digest)
        self.send_header(SIGNATURE, signature(self.cache.key, "answer", self.path, nonce, str(status), digest))
        self.end_headers()

    def _send(self, status: int, nonce: str, body: bytes) -> None:
        self._begin(status, nonce, hashlib.sha256(body).hexdigest(), len(body))
        self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        """Nothing: a run asks thousands of times."""


class Listener(ThreadingHTTPServer):
    """Listens in threads of its own; a client that goes away is no error."""

    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Tell what is not a connection's end."""
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            print(f"cache: a request from {client_address[0]} failed: {error!r:.200}", file=sys.stderr, flush=True)


def address(text: str) -> tuple[str, int]:
    """Host and port of HOST:PORT. Raises ValueError for anything else."""
    host, colon, port = text.rpartition(":")
    if not (colon and host and port.isdecimal() and int(port) < 2**16):
        raise InputError(f"--serve must be HOST:PORT, such as 0.0.0.0:8460, got {text!r}")
    return host.strip("[]"), int(port)


def listen(server: CacheServer, where: tuple[str, int], at_end: ExitStack) -> int:
    """Answer requests from now on; returns the port. Raises ValueError if nobody can listen there."""
    try:
        listener = Listener(where, partial(Handler, server))
    except OSError as error:
        raise InputError(f"--serve {where[0]}:{where[1]}: {error.strerror or error}") from None
    at_end.callback(listener.server_close)
    at_end.callback(listener.shutdown)
    threading.Thread(target=listener.serve_forever, daemon=True).start()
    return int(listener.server_address[1])


def check_served(processes: int, zero: Any, window: int | None) -> None:
    """Raise ValueError for what cannot be served."""
    if processes > 1 or launch.launched():
        raise InputError(
            "--serve needs processes 1: one teacher makes the shards in the order in which they are asked for"
        )
    if zero == 3:
        raise InputError(
            "--serve needs teacher_memory.zero off: a partitioned teacher is run by all processes together"
        )
    if window is not None and window < LEAST_WINDOW:
        raise InputError(f"--window must be at least {LEAST_WINDOW} shards, got {window}")
