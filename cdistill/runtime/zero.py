"""The DeepSpeed configuration, written in this one place, and the end of DeepSpeed's engines."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from cdistill.runtime.errors import RunError

BUCKET = 500_000_000


def deepspeed_config(
    stage: int,
    *,
    precision: str,
    micro_batch_size: int,
    accumulation: int,
    world_size: int,
    max_grad_norm: float,
    trained: int,
) -> dict[str, Any]:
    """DeepSpeed's JSON for a ZeRO stage (0 to 3); ``trained`` is the number of trained parameters.

    Any torch optimizer is allowed, so that nothing is compiled at run time. Buckets are no larger than the model,
    because DeepSpeed allocates them whole.
    """
    bucket = max(1, min(BUCKET, trained))
    return {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": accumulation,
        "train_batch_size": micro_batch_size * accumulation * world_size,
        "gradient_clipping": max_grad_norm,
        "bf16": {"enabled": precision == "bf16"},
        "fp16": {"enabled": precision == "fp16", "initial_scale_power": 16},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {
            "stage": stage,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
            "overlap_comm": False,
            "stage3_gather_16bit_weights_on_model_save": True,
        },
        "steps_per_print": 10**12,
        "wall_clock_breakdown": False,
    }


def teacher_config(*, precision: str, offload: bool) -> dict[str, Any]:
    """DeepSpeed's JSON for a teacher that is never trained, partitioned by ZeRO-3.

    Nothing is fetched ahead: the head is gathered outside the engine, and a fetch of it that is under way then fails.
    """
    return {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": precision == "bf16"},
        "fp16": {"enabled": precision == "fp16"},
        "zero_optimization": {"stage": 3, "stage3_prefetch_bucket_size": 0}
        | ({"offload_param": {"device": "cpu"}} if offload else {}),
        "steps_per_print": 10**12,
    }


def is_partitioned(model: nn.Module) -> bool:
    """Whether ZeRO-3 or FSDP2 has partitioned a model's parameters: then every rank must run the same modules."""
    from torch.distributed.tensor import DTensor

    return any(hasattr(p, "ds_id") or isinstance(p, DTensor) for p in model.parameters())


@contextmanager
def released(*, engines: bool) -> Iterator[ExitStack]:
    """Free what was made inside and nothing outside holds, with ``engines`` DeepSpeed's engines too.

    Gradient hooks hold an engine until it is destroyed: put its ``destroy`` on the exit stack. Under ZeRO-3 two more things
    hold its module, and with it weights, gradients and optimizer, for as long as the process lives: the stack of running
    modules, at whose bottom every engine puts its own, and a cache over a method, whose keys are modules. And transformers
    would load the next models as shards. An engine that lives on needs none of these.
    """
    from accelerate.utils import release_memory

    try:
        with ExitStack() as at_end:
            if engines:
                _let_go_of_modules(at_end)
            yield at_end
    finally:
        release_memory()


def _let_go_of_modules(at_end: ExitStack) -> None:
    """Have the exit stack empty DeepSpeed's and transformers' globals of what is put into them from now on."""
    from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    depth = len(FWD_MODULE_STACK)
    at_end.callback(FWD_MODULE_STACK.__delitem__, slice(depth, None))
    at_end.callback(_clear_caches, PartitionedParameterCoordinator)
    at_end.callback(unset_hf_deepspeed_config)


def _clear_caches(kind: type) -> None:
    """Clear every `functools.lru_cache` over a method of a class, also inside another decorator."""
    for method in vars(kind).values():
        closure = getattr(method, "__closure__", None) or ()
        for function in (method, *(cell.cell_contents for cell in closure)):
            if hasattr(function, "cache_clear"):
                function.cache_clear()


@contextmanager
def unpickling_data_alone() -> Iterator[None]:
    """Let DeepSpeed read checkpoints without running code that a file may name, which its own ``torch.load`` does.

    Tensors and plain values are read, and the few classes of DeepSpeed's own that its optimizers write. Anything else raises
    RunError in one line that names the file.
    """
    import pickle

    import torch
    from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    def load(self: Any, path: str, map_location: Any = None) -> Any:
        try:
            return torch.load(path, map_location=map_location, weights_only=True)
        except pickle.UnpicklingError as error:
            reason = str(error).partition("\n")[0]
            raise RunError(
                f"output: {path} holds more than numbers, which no checkpoint of a run does, and is not read ({reason:.160}): "
                "delete its folder, and the stage goes on from an earlier one"
            ) from None

    before = TorchCheckpointEngine.load
    TorchCheckpointEngine.load = load
    try:
        with torch.serialization.safe_globals([DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]):
            yield
    finally:
        TorchCheckpointEngine.load = before
