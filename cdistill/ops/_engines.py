"""Attention engines by name, and which one computes a problem: the one asked for, or the fastest that can.

An engine of this package is a class in `_engines_torch`, `_engines_flash_attn` or below, and stands in ``ENGINES``; one of
another package is registered.
"""

from importlib.util import find_spec

import torch
from torch import Tensor

from cdistill import choices
from cdistill.errors import InputError
from cdistill.ops._dispatch import backend
from cdistill.ops._engine import AttentionEngine
from cdistill.ops._engines_flash_attn import FlashAttn2, FlashAttn3, FlashAttn4
from cdistill.ops._engines_torch import TorchCudnn, TorchFlash
from cdistill.ops._pieces import for_pieces
from cdistill.ops._problem import AttentionProblem
from cdistill.ops._registered import Registered


class Triton(AttentionEngine):
    """Our own kernels: every dtype, head dim and key mask; takes dlse."""

    SPLITS_LSE = True

    def missing(self) -> str | None:
        return None if find_spec("triton") else "the package triton is not installed: pip install triton"

    def refusal(self, problem: AttentionProblem) -> str | None:
        try:
            backend("triton", problem.q)
        except ValueError as error:
            return str(error).removeprefix("impl='triton' ")
        return None

    def forward(self, problem: AttentionProblem) -> tuple[Tensor, Tensor]:
        out, lse, _ = self.forward_split(problem)
        return out, lse

    def forward_split(self, problem: AttentionProblem) -> tuple[Tensor, Tensor, Tensor | None]:
        from cdistill.kernels.flash_attention import flash_forward

        return flash_forward(problem)

    def backward(
        self, problem: AttentionProblem, out: Tensor, dout: Tensor | None, dlse: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        from cdistill.kernels.flash_gradient import flash_backward

        return flash_backward(problem, out, dout, dlse)


ENGINES: dict[str, AttentionEngine] = {
    "triton": Triton(),
    "torch_flash": TorchFlash(),
    "torch_cudnn": TorchCudnn(),
    "flash_attn_2": FlashAttn2(),
    "flash_attn_3": FlashAttn3(),
    "flash_attn_4": FlashAttn4(),
}
REGISTERED: dict[str, AttentionEngine] = {}

# Fastest first, by compute capability; by what their authors publish, until our own benchmark says otherwise.
_HOPPER = ("flash_attn_3", "torch_cudnn", "flash_attn_4", "triton", "flash_attn_2", "torch_flash")
_BLACKWELL = ("flash_attn_4", "torch_cudnn", "triton", "flash_attn_2", "torch_flash")
_OTHER = ("flash_attn_2", "torch_flash", "torch_cudnn", "triton")
_PREFERRED = {9: _HOPPER, 10: _BLACKWELL, 11: _BLACKWELL}


def register_attention_engine(name: str, engine: AttentionEngine) -> None:
    """Let ops, `VATConfig` and recipes take an attention engine of another package by this name, in this process.

    It then computes where it is asked for: ``engine=name`` of `flash_attention` and `attention_with_alignment`, and
    ``vat.engine``. The default never becomes a registered engine. Before its first result on a device it computes a small
    problem, which is compared with float64.

    Args:
        name: a Python identifier that no engine has.
        engine: an instance of a class derived from `AttentionEngine`, which says what its methods take and return.

    Raises:
        ValueError: the name is taken or no identifier, or the engine is something else.
    """
    if not isinstance(name, str) or not name.isidentifier():
        raise InputError(f"name must be an identifier, as my_engine, got {name!r}")
    if name in (*choices.VAT_ENGINES, *REGISTERED):
        raise InputError(f"name {name!r} is taken by another attention engine: choose one that is not")
    if not isinstance(engine, AttentionEngine):
        got = f"the class {engine.__name__}" if isinstance(engine, type) else type(engine).__name__
        raise InputError(f"engine must be an instance of a subclass of cdistill.ops.AttentionEngine, got {got}")
    REGISTERED[name] = Registered(name, engine)
    choices.REGISTERED_ENGINES.append(name)


def engine(name: str | None, problem: AttentionProblem) -> AttentionEngine:
    """The engine of this name, or the fastest of ours that is installed and can compute the problem.

    Where torch.use_deterministic_algorithms is on, the default is a deterministic one.

    Raises:
        ValueError: the name is unknown, the engine is not installed, or it cannot compute the problem; the message says why.
    """
    if name is not None:
        chosen = ENGINES.get(name) or REGISTERED.get(name)
        if chosen is None:
            raise InputError(f"engine must be None or one of {(*ENGINES, *REGISTERED)}, got {name!r}")
        if reason := chosen.missing():
            raise InputError(f"engine={name!r} cannot run: {reason}")
        chosen = for_pieces(chosen, problem)
        if reason := chosen.refusal(problem):
            raise InputError(f"engine={name!r} {reason}")
        return chosen
    preferred: tuple[str, ...] = ("torch_flash",)
    if problem.q.is_cuda:
        preferred = _PREFERRED.get(torch.cuda.get_device_capability(problem.q.device)[0], _OTHER)
    refusals = []
    for candidate in preferred:
        chosen = for_pieces(ENGINES[candidate], problem)
        if torch.are_deterministic_algorithms_enabled() and not chosen.deterministic:
            continue
        reason = chosen.missing() or chosen.refusal(problem)
        if reason is None:
            return chosen
        refusals.append(f"{candidate}: {reason}")
    raise InputError("no attention engine can run here (" + "; ".join(refusals) + ")")
