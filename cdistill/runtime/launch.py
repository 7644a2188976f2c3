"""Processes and their environment: one process, several on this machine, or those a launcher has started."""

import atexit
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from cdistill.errors import InputError
from cdistill.runtime import pulse
from cdistill.runtime.errors import PEER_LOST, ProcessError, Stopped
from cdistill.runtime.signals import stop_on_signals

POLL_SECONDS = 0.1
GRACE_SECONDS = 10.0  # what processes have to end by themselves after one of them has failed
# -P: the working folder's modules do not stand in for others.
WORKER = (sys.executable, "-P", "-m", "cdistill.train.worker")
PARENT = "CDISTILL_PARENT"  # environment variable: the id of the process that started this one and keeps the store
PR_SET_PDEATHSIG = 1


def launched() -> bool:
    """Whether torchrun, the deepspeed launcher or `start_processes` started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def world_size() -> int:
    """How many processes the run has, as far as they have met."""
    import torch.distributed as dist

    return dist.get_world_size() if launched() and dist.is_initialized() else 1


@contextmanager
def environment(*, distributed: bool) -> Iterator[None]:
    """The environment variables of a run, restored afterwards.

    Without a GPU DeepSpeed uses the CPU; ``distributed`` makes this process a world of its own where no
    launcher has done so (DeepSpeed needs a process group even for one process).
    """
    import torch

    # Without OMP_NUM_THREADS accelerate sets torch's threads to the number of physical cores.
    values = {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": str(torch.get_num_threads())}
    if not torch.cuda.is_available():
        values["DS_ACCELERATOR"] = "cpu"
    if distributed and not launched():
        values |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    before = dict(os.environ)
    os.environ.update({name: value for name, value in values.items() if name not in before})
    try:
        yield
    finally:  # accelerate and DeepSpeed leave variables behind that would change the next run of this process
        os.environ.clear()
        os.environ.update(before)


def keep_deepspeed_from_compiling() -> None:
    """Leave out DeepSpeed's shared-memory collectives for CPUs, which it would compile for minutes at run time."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def init_process_group() -> None:
    """Join the process group the environment describes, unless that has happened; it lives as long as the process.

    Raises ValueError if the port that MASTER_PORT names is in use.
    """
    import torch
    import torch.distributed as dist

    if dist.is_initialized():
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if world == 1:  # needs no port
        dist.init_process_group(backend, store=dist.HashStore(), rank=rank, world_size=world)
    elif PARENT in os.environ:
        store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world)
        pulse.start(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), rank)
    else:
        try:
            dist.init_process_group(backend)
        except RuntimeError as error:
            _refuse_taken_port(error, os.environ.get("MASTER_PORT", ""))
        pulse.start_together(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), rank, world)
    atexit.register(lambda: dist.is_initialized() and dist.destroy_process_group())


def start_processes(
    count: int, action: str, path: Path, program: Sequence[str] | None = None, *, max_stuck_seconds: float = 0
) -> None:
    """Run ``count`` processes of a program (`cdistill.train.worker`), which get an action and its path, and wait for them.

    The processes meet at a store of this one, on a free port or on MASTER_PORT if that is set. They get a SIGTERM or
    SIGINT of this process as SIGTERM, and SIGKILL if it dies. One that makes no step for ``max_stuck_seconds`` while others
    wait ends the run (`cdistill.runtime.pulse`); 0 waits for ever.

    Raises:
        ValueError: MASTER_PORT is in use.
        ProcessError: a process failed, which the message names. The others, which cannot go on without it, are killed
            if they have not ended after `GRACE_SECONDS`.
        Stopped: a signal stopped the run.
    """
    import torch

    command = program or WORKER
    store = _host_store()
    shared = {
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        PARENT: str(os.getpid()),
        "OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // count)),
    }
    workers: list[subprocess.Popen] = []
    with stop_on_signals() as request:
        try:
            for rank in range(count):
                environ = {**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank), **where_the_package_is()}
                # A session of its own: a terminal's Ctrl-C reaches this process alone, which passes it on once.
                workers.append(subprocess.Popen([*command, action, str(path)], env=environ, start_new_session=True))
            killed = _wait(workers, request, pulse.Watch(store, count, max_stuck_seconds))
        finally:
            for worker in workers:
                if worker.poll() is None:
                    worker.kill()
                    worker.wait()
    codes = {rank: worker.returncode for rank, worker in enumerate(workers) if worker.returncode}
    own = {rank: code for rank, code in codes.items() if rank not in killed and code != PEER_LOST} or codes
    stops = (128 + signal.SIGTERM, 128 + signal.SIGINT, -signal.SIGTERM)
    if all(code in stops for code in own.values()):
        if own:
            raise Stopped(request.received or signal.SIGTERM)
        return
    rank, code = next((r, c) for r, c in own.items() if c not in stops)
    if code < 0:
        raise ProcessError(
            f"process {rank} of {count} was killed by {signal.Signals(-code).name}; the others are stopped"
        )
    raise ProcessError(f"process {rank} of {count} failed with exit code {code}; its message is above")


def where_the_package_is() -> dict[str, str]:
    """The environment in which ``python -P`` finds the package that this process runs, if no other folder has been named."""
    import site

    root = str(Path(__file__).parents[2])
    if root in (*site.getsitepackages(), site.getusersitepackages()):
        return {}
    return {"PYTHONPATH": os.pathsep.join([*filter(None, [os.environ.get("PYTHONPATH")]), root])}


def _wait(workers: list[subprocess.Popen], request: Any, watch: pulse.Watch) -> set[int]:
    """Wait until all have ended and pass on a stop request; returns the ranks that had to be killed.

    Raises ProcessError for one that hangs.
    """
    passed_on, deadline = False, None
    while alive := [rank for rank, worker in enumerate(workers) if worker.poll() is None]:
        if request.received and not passed_on:
            passed_on = True
            for rank in alive:
                workers[rank].send_signal(signal.SIGTERM)
        if len(alive) == len(workers) and (stuck := watch.stuck()) is not None:
            raise ProcessError(stuck)
        if deadline is None and any(worker.returncode for worker in workers):
            deadline = time.monotonic() + GRACE_SECONDS
        if deadline is not None and time.monotonic() > deadline:
            for rank in alive:
                workers[rank].kill()
                workers[rank].wait()
            return set(alive)
        time.sleep(POLL_SECONDS)
    return set()


def die_with_parent() -> None:
    """Have the kernel kill this process when the one that started it dies, so that no rank is left behind writing."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(os.environ[PARENT]):  # it died before
        os.kill(os.getpid(), signal.SIGKILL)


def _host_store() -> Any:
    """A store on a free port of this machine, or on the user's."""
    import torch.distributed as dist

    port = named_port()
    try:
        return dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    except RuntimeError as error:
        _refuse_taken_port(error, str(port))


def named_port() -> int:
    """The port on which processes are to meet, 0 for any free one. Raises ValueError for a MASTER_PORT that is none."""
    port = os.environ.get("MASTER_PORT", "0")
    if not (port.isascii() and port.isdecimal() and len(port) < 6 and int(port) < 1 << 16):
        raise InputError(f"MASTER_PORT must be a port number, got {port!r:.60}")
    return int(port)


def _refuse_taken_port(error: RuntimeError, port: str) -> NoReturn:
    if "EADDRINUSE" in str(error) or "address already in use" in str(error).lower():
        raise InputError(f"MASTER_PORT {port} is in use: set it to a free port") from None
    raise error


@contextmanager
def quiet() -> Iterator[None]:
    """Keep DeepSpeed's, transformers' and accelerate's remarks off the console; errors stay."""
    import logging
    import warnings

    from transformers.utils import logging as transformers_logging

    names = ("DeepSpeed", "transformers", "accelerate", "torch.distributed")
    before = {name: logging.getLogger(name).level for name in names}
    for name in names:
        logging.getLogger(name).setLevel(logging.ERROR)
    bars = transformers_logging.is_progress_bar_enabled()
    try:
        transformers_logging.disable_progress_bar()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        if bars:
            transformers_logging.enable_progress_bar()
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)
