"""Attention engines of the packages of flash-attn, whose tensors are (B,T,H,D)."""

import importlib
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from cdistill.ops._engine import AttentionEngine, refusal_on_cuda
from cdistill.ops._problem import AttentionProblem


def _tokens_first(*tensors: Tensor) -> list[Tensor]:
    return [x.transpose(1, 2) for x in tensors]


class _FlashAttnPackage(AttentionEngine):
    """What the releases share; those before 4 have the same functions and take no dlse."""

    module: str
    install: str
    takes_dlse = False

    def missing(self) -> str | None:
        try:
            found = find_spec(self.module) is not None
        except ModuleNotFoundError:
            found = False
        except (ImportError, OSError) as error:  # built for another torch or CUDA
            return f"the package of {self.module} cannot be imported ({error})"
        return None if found else f"the module {self.module} is not installed: {self.install}"

    def _module(self) -> Any:
        return importlib.import_module(self.module)

    def _options(self, problem: AttentionProblem, *, backward: bool) -> dict[str, Any]:
        """Keyword arguments of the package's functions, by its own names."""
        raise NotImplementedError

    def forward(self, problem: AttentionProblem) -> tuple[Tensor, Tensor]:
        options = self._options(problem, backward=False)
        out, lse, *_ = self._module()._flash_attn_forward(
            *_tokens_first(*problem.qkv), softmax_scale=problem.scale, **options
        )
        return out.transpose(1, 2), lse

    def backward(
        self, problem: AttentionProblem, out: Tensor, dout: Tensor | None, dlse: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        assert dout is not None
        dout, q, k, v, out = _tokens_first(dout, *problem.qkv, out)
        dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
        self._module()._flash_attn_backward(
            *(dout, q, k, v, out, problem.lse),
            dq=dq,
            dk=dk,
            dv=dv,
            softmax_scale=problem.scale,
            deterministic=torch.are_deterministic_algorithms_enabled(),
            **self._options(problem, backward=True),
        )
        dq, dk, dv = _tokens_first(dq, dk, dv)
        return dq, dk, dv


class FlashAttn2(_FlashAttnPackage):
    """FlashAttention-2, the package flash-attn."""

    module = "flash_attn.flash_attn_interface"
    install = "pip install flash-attn --no-build-isolation"

    def refusal(self, problem: AttentionProblem) -> str | None:
        return refusal_on_cuda(problem, width=256, capability=(8, 0))

    def _options(self, problem: AttentionProblem, *, backward: bool) -> dict[str, Any]:
        window = {"window_size_left": -1, "window_size_right": -1}
        options = {"causal": problem.causal, "dropout_p": 0.0, "softcap": 0.0, "alibi_slopes": None, **window}
        return options if backward else options | {"return_softmax": False}


class FlashAttn3(_FlashAttnPackage):
    """FlashAttention-3 for Hopper."""

    module = "flash_attn_interface"
    install = "build the hopper/ folder of github.com/Dao-AILab/flash-attention"

    def refusal(self, problem: AttentionProblem) -> str | None:
        return refusal_on_cuda(problem, width=256, capability=(9, 0), most=(9, 9))

    def _options(self, problem: AttentionProblem, *, backward: bool) -> dict[str, Any]:
        return {"is_causal" if backward else "causal": problem.causal}


class FlashAttn4(_FlashAttnPackage):
    """FlashAttention-4, the package flash-attn-4; takes dlse."""

    module = "flash_attn.cute.interface"
    install = "pip install flash-attn-4"
    takes_dlse = True

    def refusal(self, problem: AttentionProblem) -> str | None:
        return refusal_on_cuda(problem, width=128, capability=(9, 0), most=(11, 9))

    def forward(self, problem: AttentionProblem) -> tuple[Tensor, Tensor]:
        out, lse, *_ = self._module()._flash_attn_fwd(
            *_tokens_first(*problem.qkv), softmax_scale=problem.scale, causal=problem.causal, return_lse=True
        )
        return out.transpose(1, 2), lse

    def backward(
        self, problem: AttentionProblem, out: Tensor, dout: Tensor | None, dlse: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        dout = torch.zeros_like(out) if dout is None else dout
        grads = self._module()._flash_attn_bwd(
            *(*_tokens_first(*problem.qkv, out, dout), problem.lse),
            softmax_scale=problem.scale,
            causal=problem.causal,
            deterministic=torch.are_deterministic_algorithms_enabled(),
            dlse=dlse,
        )
        dq, dk, dv = _tokens_first(*grads[:3])
        return dq, dk, dv
