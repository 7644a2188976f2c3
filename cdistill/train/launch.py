"""Processes and their environment: one process, several on this machine, or those a launcher has started."""

import atexit
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

POLL_SECONDS = 0.1


class ProcessError(RuntimeError):
    """One of several processes failed; it has told why."""


def launched() -> bool:
    """Whether torchrun, the deepspeed launcher or `start_processes` started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


@contextmanager
def environment(*, distributed: bool) -> Iterator[None]:
    """The environment variables of a run, restored afterwards.

    Without a GPU DeepSpeed is told to use the CPU; ``distributed`` makes this process a world of its own where no
    launcher has done so (DeepSpeed needs a process group even for one process).
    """
    import torch

    # Without OMP_NUM_THREADS accelerate sets torch's threads to the number of physical cores.
    values = {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": str(torch.get_num_threads())}
    if not torch.cuda.is_available():
        values["DS_ACCELERATOR"] = "cpu"
    if distributed and not launched():
        values |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
        values |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
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
    """Join the process group the environment describes, unless that has happened; it lives as long as the process."""
    import torch
    import torch.distributed as dist

    if dist.is_initialized():
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    atexit.register(lambda: dist.is_initialized() and dist.destroy_process_group())


def start_processes(count: int, output: Path) -> None:
    """Run ``count`` data-parallel processes over the recipe in a prepared output folder and wait for them.

    Raises ProcessError with the exit code if one of them fails; the others are ended then.
    """
    import torch

    shared = {
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        "OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // count)),
    }
    command = [sys.executable, "-m", "cdistill.train.worker", str(output)]
    workers = []
    try:
        for rank in range(count):
            environ = {**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            workers.append(subprocess.Popen(command, env=environ))
        while any(worker.poll() is None for worker in workers):
            if any(worker.poll() for worker in workers):
                break
            time.sleep(POLL_SECONDS)
    finally:
        for worker in workers:
            if worker.poll() is None:
                worker.send_signal(signal.SIGTERM)
        codes = [worker.wait() for worker in workers]
    failed = [(rank, code) for rank, code in enumerate(codes) if code]
    if failed:
        # Those we ended ourselves come last.
        rank, code = min(failed, key=lambda item: item[1] == -signal.SIGTERM)
        raise ProcessError(f"process {rank} of {count} failed with exit code {code}; its message is above")


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]
