"""The processes that share a sequence, in DeepSpeed's words: neighbours by rank."""

from typing import Any


def sequence_group(size: int) -> Any:
    """The group of ``size`` processes that this one is of; every process must call it."""
    import torch.distributed as dist
    from deepspeed import comm
    from deepspeed.runtime.sequence_parallel import parallel_state_sp as state

    if not comm.is_initialized():
        comm.init_distributed(dist_backend=dist.get_backend(), verbose=False)
    if state._SEQUENCE_PARALLEL_GROUP is not None and state.get_sequence_parallel_world_size() != size:
        state._release_sequence_parallel_groups()
    if state._SEQUENCE_PARALLEL_GROUP is None:
        state.initialize_sequence_parallel(sequence_parallel_size=size)
    return state.get_sequence_parallel_group()
