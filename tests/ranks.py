"""Processes of a distributed run that stay alive between calls: ``Ranks`` runs functions of test modules on them.

They are forks (`forks.py`) that join one gloo group and then wait for calls, so that a call costs no start. A group in which a
call failed or hung is replaced by a new one.
"""

import contextlib
import os
import signal
import sys
import tempfile
import time
import traceback
from multiprocessing import connection
from pathlib import Path

from forks import ENVIRONMENT, Fork
from garbage import freeze_imports

HANGS = 120  # seconds, for a call that takes a few


class RankError(AssertionError):
    """A call failed or hung on a rank; the message is its traceback."""


class Ranks:
    """Groups of processes, one for each number of them that is asked for; a group of 1 is a plain process without a group."""

    def __init__(self):
        self.groups = {}
        self.folder = tempfile.TemporaryDirectory()

    def call(self, function, *args, world=2, timeout=HANGS):
        """What a function of a module, called by every rank with the same arguments, returns on each of them."""
        results = self.start(function, *args, world=world)
        return results(timeout)

    def start(self, function, *args, world=2):
        """As `call`, but returns at once a function that waits for the results."""
        if world not in self.groups:
            store = Path(self.folder.name) / f"{world}-{time.monotonic_ns()}"
            arguments = [(rank, world, str(store)) for rank in range(world)]
            self.groups[world] = [Fork("ranks:_serve", *each, serves=True) for each in arguments]
        for fork in self.groups[world]:
            fork.connection.send((function, args))
        return lambda timeout=HANGS: self._results(world, timeout)

    def _results(self, world, timeout):
        pipes = [fork.connection for fork in self.groups[world]]
        deadline, answers = time.monotonic() + timeout, {}
        while len(answers) < world and not any(error for error, _ in answers.values()):
            waiting = [pipe for i, pipe in enumerate(pipes) if i not in answers]
            ready = connection.wait(waiting, max(0, deadline - time.monotonic()))
            if not ready:
                answers |= {i: ("it hangs", None) for i in range(world) if i not in answers}
            for pipe in ready:
                try:
                    answers[pipes.index(pipe)] = pipe.recv()
                except EOFError:
                    answers[pipes.index(pipe)] = ("it has died", None)
        failed = {rank: error for rank, (error, _) in answers.items() if error}
        if failed:
            self._end(world)
            raise RankError("\n".join(f"rank {rank} of {world}: {error}" for rank, error in failed.items()))
        return [answers[rank][1] for rank in range(world)]

    def _end(self, world):
        for fork in self.groups.pop(world):
            fork.connection.close()
            with contextlib.suppress(ProcessLookupError):
                fork.kill()

    def close(self):
        """End all processes."""
        for world in list(self.groups):
            self._end(world)
        self.folder.cleanup()


def _serve(pipe, rank, world, store):
    """Carry out calls until the other end of the pipe is closed."""
    import torch.distributed as dist
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ.update(ENVIRONMENT)
    if world > 1:
        here = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
        os.environ.update({name: str(value) for name, value in here.items()})
        os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"})
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    while True:
        freeze_imports()
        try:
            function, args = pipe.recv()
        except EOFError:
            break
        before = dict(os.environ)
        try:
            answer = None, function(*args)
        except BaseException:
            answer = traceback.format_exc(), None
        os.environ.clear()
        os.environ.update(before)
        unset_hf_deepspeed_config()  # with ZeRO-3's the models of later calls would be made in parts
        sys.stdout.flush()
        with contextlib.suppress(BrokenPipeError):
            pipe.send(answer)
    os._exit(0)  # not through what atexit does with a group whose other ranks may be gone
