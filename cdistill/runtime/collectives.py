"""What the processes of a run tell each other; a process that is alone sends nothing."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

from cdistill.runtime.errors import PeerLostError, RunError


def on_first_process(action: Callable[[], Any]) -> Any:
    """What an action on the first process returns, on all of them; each raises the ValueError, OSError or RunError of it."""
    import torch.distributed as dist

    if not dist.is_initialized() or dist.get_world_size() == 1:
        return action()
    outcome: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome[0] = action()
        except (ValueError, OSError, RunError) as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def gathered(number: int) -> list[int]:
    """A whole number of every process, on all of them, by way of the CPU: the GPU's queue is not waited for."""
    import torch
    import torch.distributed as dist

    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [number]
    numbers = torch.zeros(dist.get_world_size(), dtype=torch.int64)
    dist.all_gather_into_tensor(numbers, torch.tensor([number]), group=_group_on_cpu(dist.group.WORLD))
    return numbers.tolist()


def gathered_objects(value: Any) -> list[Any]:
    """A value of every process, on all of them, by way of the CPU."""
    import torch.distributed as dist

    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, group=_group_on_cpu(dist.group.WORLD))
    return values


def first_process() -> bool:
    """Whether this is the first process of a run, or its only one."""
    import torch.distributed as dist

    return not dist.is_initialized() or dist.get_rank() == 0


@lru_cache(maxsize=1)
def _group_on_cpu(world: Any) -> Any:
    import torch.distributed as dist

    return world if dist.get_backend() == "gloo" else dist.new_group(backend="gloo")


@contextmanager
def naming_lost_peers() -> Iterator[None]:
    """Turn the error that a collective raises when another process is gone into a PeerLostError of one line."""
    try:
        yield
    except RuntimeError as error:
        import torch.distributed as dist

        several = dist.is_initialized() and dist.get_world_size() > 1
        if (
            isinstance(error, RunError)
            or not several
            or not (isinstance(error, dist.DistError) or "gloo" in str(error))
        ):
            raise
        raise PeerLostError(
            f"process {dist.get_rank()} of {dist.get_world_size()} has lost another process of the run and stops"
        ) from None
