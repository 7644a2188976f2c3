"""Attention engines: whose flash attention runs underneath, chosen by name or as the fastest one that is there.

An engine makes ``out`` and its log-sum-exp, and the gradients for both. Kernels that take no gradient of the LSE get it
folded into ``out`` (`Backend.fold_dlse`). To add an engine, write one class and put it into ``ENGINES``.
"""

import importlib
from abc import ABC, abstractmethod
from importlib.util import find_spec
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from cdistill.ops._dispatch import Backend, backend

Gradients = tuple[Tensor, Tensor, Tensor]


class Attention(NamedTuple):
    """One attention problem: q (B,Hq,T,D), k and v (B,Hkv,T,D), unit stride on D; key_mask (B,T) bool or None; scale > 0."""

    q: Tensor
    k: Tensor
    v: Tensor
    key_mask: Tensor | None
    causal: bool
    scale: float

    @property
    def options(self) -> dict[str, Any]:
        """The keyword arguments of `Backend`'s primitives."""
        return {"causal": self.causal, "scale": self.scale, "key_mask": self.key_mask}


class Engine(ABC):
    """How to reach one implementation of flash attention; ``deterministic``: it is, or is where torch asks for it."""

    name: str
    deterministic = True
    SPLITS_LSE = False  # whether its forward pass also gives the split lse of `Backend`, which its backward pass takes

    def missing(self) -> str | None:
        """What is not installed, and how to install it; None if nothing."""
        return None

    @abstractmethod
    def refusal(self, x: Attention) -> str | None:
        """Why this problem cannot be computed; None if it can."""

    @abstractmethod
    def forward(self, x: Attention) -> tuple[Tensor, Tensor]:
        """out (B,Hq,T,D), and lse (B,Hq,T) fp32, natural, contiguous; a row that sees no key has out 0 and lse -inf."""

    def forward_split(self, x: Attention) -> tuple[Tensor, Tensor, Tensor | None]:
        """`forward`, and with SPLITS_LSE the split lse (2,B,Hq,T), else None."""
        return *self.forward(x), None

    @abstractmethod
    def backward(
        self,
        x: Attention,
        out: Tensor,
        lse: Tensor,
        dout: Tensor | None,
        dlse: Tensor | None,
        rows: Tensor | None,
        impl: Backend,
    ) -> Gradients:
        """Gradients of q, k and v, new; ``rows`` (B,R), -1 = padding, are those where dlse may differ from zero.

        ``lse`` as of `forward`, or with SPLITS_LSE as of `forward_split`. ``impl`` does what the engine lacks.
        """


class FoldingEngine(Engine):
    """An engine whose backward pass takes no dlse: it gets it folded into ``out``, which is put back afterwards."""

    @abstractmethod
    def plain_backward(self, x: Attention, out: Tensor, lse: Tensor, dout: Tensor) -> Gradients:
        """Gradients of q, k and v for that of ``out`` alone."""

    def backward(
        self,
        x: Attention,
        out: Tensor,
        lse: Tensor,
        dout: Tensor | None,
        dlse: Tensor | None,
        rows: Tensor | None,
        impl: Backend,
    ) -> Gradients:
        if dlse is None:
            if dout is None:
                return torch.zeros_like(x.q), torch.zeros_like(x.k), torch.zeros_like(x.v)
            return self.plain_backward(x, out, lse, _dense(dout))
        if rows is None:
            rows = torch.arange(x.q.shape[2], device=x.q.device).expand(x.q.shape[0], -1).contiguous()
        if dout is None:
            dq, dk = impl.row_lse_backward(x.q, x.k, lse, rows, dlse, **x.options)
            return dq.to(x.q.dtype), dk.to(x.k.dtype), torch.zeros_like(x.v)
        dout = _dense(dout)
        if dout.untyped_storage().data_ptr() == out.untyped_storage().data_ptr():
            dout = dout.clone()
        saved, rest = impl.fold_dlse(out, dout, dlse, rows)
        try:
            dq, dk, dv = self.plain_backward(x, out, lse, dout)
        finally:
            impl.unfold_dlse(out, saved, rows)
        impl.row_lse_backward(x.q, x.k, lse, rows, rest, **x.options, into=(dq, dk))
        return dq, dk, dv


def _dense(dout: Tensor) -> Tensor:
    """dout with unit stride on D and no repeated elements, as the libraries' kernels want it."""
    return dout.contiguous() if dout.stride(-1) != 1 or 0 in dout.stride() else dout


def _finite(x: Attention) -> tuple[Attention, Tensor | None]:
    """x with zeros for inf and NaN, and which rows of out (B,Hq,T) would have had them; None if x is finite already.

    A block of torch's CPU kernel multiplies keys and values of the future by zero, and 0 * NaN would reach earlier rows.
    """
    if all(y.isfinite().all() for y in (x.q, x.k, x.v)):
        return x, None
    bad_q, bad_k, bad_v = (~y.isfinite().all(3) for y in (x.q, x.k, x.v))
    bad = bad_k | bad_v
    if x.key_mask is not None:
        bad = bad & x.key_mask[:, None]
    bad = (bad.cumsum(2) if x.causal else bad.sum(2, keepdim=True).expand_as(bad)) > 0
    affected = bad_q | bad.repeat_interleave(x.q.shape[1] // x.k.shape[1], 1)
    q, k, v = (y.nan_to_num(0.0, 0.0, 0.0) for y in (x.q, x.k, x.v))
    return x._replace(q=q, k=k, v=v), affected


def _refuse(x: Attention, *, width: int, capability: tuple[int, int], most: tuple[int, int] = (99, 0)) -> str | None:
    """What the libraries' CUDA kernels have in common: 16-bit types, no key mask, a range of GPUs and head dims."""
    if x.q.device.type != "cuda":
        return f"needs CUDA tensors, q is on {x.q.device}"
    if x.q.dtype == torch.float32:
        return "needs float16 or bfloat16, q is float32"
    if x.key_mask is not None:
        return "takes no key_mask"
    if x.q.shape[3] > width:
        return f"has head dims up to {width}, q has {x.q.shape[3]}"
    if not capability <= torch.cuda.get_device_capability(x.q.device) <= most:
        return f"does not support {torch.cuda.get_device_name(x.q.device)}"
    return None


class Triton(Engine):
    """Our own kernels: every dtype, head dim and key mask; takes dlse."""

    name = "triton"
    SPLITS_LSE = True

    def missing(self) -> str | None:
        return None if find_spec("triton") else "the package triton is not installed: pip install triton"

    def refusal(self, x: Attention) -> str | None:
        try:
            backend("triton", x.q)
        except ValueError as error:
            return str(error).removeprefix("impl='triton' ")
        return None

    def forward(self, x: Attention) -> tuple[Tensor, Tensor]:
        out, lse, _ = self.forward_split(x)
        return out, lse

    def forward_split(self, x: Attention) -> tuple[Tensor, Tensor, Tensor | None]:
        from cdistill.kernels.flash_attention import flash_forward

        return flash_forward(x.q, x.k, x.v, **x.options)

    def backward(
        self,
        x: Attention,
        out: Tensor,
        lse: Tensor,
        dout: Tensor | None,
        dlse: Tensor | None,
        rows: Tensor | None,
        impl: Backend,
    ) -> Gradients:
        from cdistill.kernels.flash_gradient import flash_backward

        if dout is not None and dout.stride(-1) != 1:
            dout = dout.contiguous()
        return flash_backward(dout, dlse, x.q, x.k, x.v, out, lse, **x.options)


class TorchFlash(FoldingEngine):
    """torch's own flash attention: FlashAttention-2 on CUDA, and on the CPU one that takes key masks."""

    name = "torch_flash"

    def refusal(self, x: Attention) -> str | None:
        return None if x.q.device.type == "cpu" else _refuse(x, width=256, capability=(8, 0))

    def forward(self, x: Attention) -> tuple[Tensor, Tensor]:
        if x.q.device.type == "cpu":
            if not x.q.numel():
                return torch.empty_like(x.q), x.q.new_empty(x.q.shape[:3], dtype=torch.float32)
            x, affected = _finite(x)
            out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                *self._ungrouped(x), 0.0, x.causal, attn_mask=self._mask(x), scale=x.scale
            )
            lse = lse.masked_fill(~self._sees_key(x), -torch.inf).contiguous()
            if affected is not None:
                affected = affected & self._sees_key(x)
                out, lse = out.masked_fill(affected[..., None], torch.nan), lse.masked_fill(affected, torch.nan)
            return out, lse
        out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(
            x.q, x.k, x.v, 0.0, x.causal, False, scale=x.scale
        )
        return out, lse.contiguous()

    def plain_backward(self, x: Attention, out: Tensor, lse: Tensor, dout: Tensor) -> Gradients:
        if x.q.device.type == "cpu":
            if not x.q.numel():
                return torch.zeros_like(x.q), torch.zeros_like(x.k), torch.zeros_like(x.v)
            x, affected = _finite(x)
            lse = lse.masked_fill(lse == -torch.inf, 0.0)
            if affected is not None:  # these rows give nothing to other tokens, unless their dout is not finite either
                lse = lse.masked_fill(affected, torch.inf)
                out = out.masked_fill(affected[..., None], 0.0)
            dq, *grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                dout, *self._ungrouped(x), out, lse, 0.0, x.causal, attn_mask=self._mask(x), scale=x.scale
            )
            if x.k.shape[1] != x.q.shape[1]:
                grads = [g.float().unflatten(1, (x.k.shape[1], -1)).sum(2).to(g.dtype) for g in grads]
            return dq, *grads
        T = x.q.shape[2]
        seed = x.q.new_empty(2, dtype=torch.uint64)  # of the dropout there is not
        return torch.ops.aten._scaled_dot_product_flash_attention_backward(
            dout, x.q, x.k, x.v, out, lse, None, None, T, T, 0.0, x.causal, seed, seed[:0], scale=x.scale
        )

    @staticmethod
    def _ungrouped(x: Attention) -> tuple[Tensor, Tensor, Tensor]:
        group = x.q.shape[1] // x.k.shape[1]
        if group == 1:
            return x.q, x.k, x.v
        return x.q, x.k.repeat_interleave(group, 1), x.v.repeat_interleave(group, 1)

    @staticmethod
    def _mask(x: Attention) -> Tensor | None:
        if x.key_mask is None:
            return None
        hidden = ~x.key_mask[:, None, None]
        return torch.zeros_like(hidden, dtype=x.q.dtype).masked_fill_(hidden, -torch.inf)

    @staticmethod
    def _sees_key(x: Attention) -> Tensor:
        if x.key_mask is None:
            return torch.ones(1, 1, 1, dtype=torch.bool, device=x.q.device)
        keys_seen = x.key_mask.cumsum(1) if x.causal else x.key_mask.sum(1, keepdim=True)
        return (keys_seen > 0)[:, None]


class TorchCudnn(FoldingEngine):
    """cuDNN's attention as torch ships it."""

    name = "torch_cudnn"
    deterministic = False

    def refusal(self, x: Attention) -> str | None:
        if x.q.device.type == "cuda" and not torch.backends.cudnn.is_available():
            return "needs cuDNN, which this torch was built without"
        if x.q.shape[2] == 1:
            return "needs more than one token"
        return _refuse(x, width=128, capability=(8, 0))

    def forward(self, x: Attention) -> tuple[Tensor, Tensor]:
        out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
            x.q, x.k, x.v, None, True, 0.0, x.causal, False, scale=x.scale
        )
        return out, lse.view(x.q.shape[:3]).contiguous()

    def plain_backward(self, x: Attention, out: Tensor, lse: Tensor, dout: Tensor) -> Gradients:
        T = x.q.shape[2]
        seed = x.q.new_empty((), dtype=torch.int64)  # of the dropout there is not
        return torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
            dout, x.q, x.k, x.v, out, lse[..., None], seed, seed, None, None, None, T, T, 0.0, x.causal, scale=x.scale
        )


class _FlashAttnPackage(Engine):
    """What the releases of flash-attn share: tensors (B,T,H,D)."""

    module: str
    install: str

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

    @staticmethod
    def _tokens_first(*tensors: Tensor) -> list[Tensor]:
        return [x.transpose(1, 2) for x in tensors]


class FlashAttn2(_FlashAttnPackage, FoldingEngine):
    """FlashAttention-2, the package flash-attn."""

    name = "flash_attn_2"
    module = "flash_attn.flash_attn_interface"
    install = "pip install flash-attn --no-build-isolation"
    _fixed: ClassVar = {
        "dropout_p": 0.0,
        "window_size_left": -1,
        "window_size_right": -1,
        "softcap": 0.0,
        "alibi_slopes": None,
    }

    def refusal(self, x: Attention) -> str | None:
        return _refuse(x, width=256, capability=(8, 0))

    def forward(self, x: Attention) -> tuple[Tensor, Tensor]:
        out, lse, *_ = self._module()._flash_attn_forward(
            *self._tokens_first(x.q, x.k, x.v),
            softmax_scale=x.scale,
            causal=x.causal,
            return_softmax=False,
            **self._fixed,
        )
        return out.transpose(1, 2), lse.contiguous()

    def plain_backward(self, x: Attention, out: Tensor, lse: Tensor, dout: Tensor) -> Gradients:
        dout, q, k, v, out = self._tokens_first(dout, x.q, x.k, x.v, out)
        grads = [torch.empty_like(y) for y in (q, k, v)]
        self._module()._flash_attn_backward(
            *(dout, q, k, v, out, lse, *grads),
            softmax_scale=x.scale,
            causal=x.causal,
            deterministic=torch.are_deterministic_algorithms_enabled(),
            **self._fixed,
        )
        dq, dk, dv = self._tokens_first(*grads)
        return dq, dk, dv


class FlashAttn3(_FlashAttnPackage, FoldingEngine):
    """FlashAttention-3 for Hopper."""

    name = "flash_attn_3"
    module = "flash_attn_interface"
    install = "build the hopper/ folder of github.com/Dao-AILab/flash-attention"

    def refusal(self, x: Attention) -> str | None:
        return _refuse(x, width=256, capability=(9, 0), most=(9, 9))

    def forward(self, x: Attention) -> tuple[Tensor, Tensor]:
        tensors = self._tokens_first(x.q, x.k, x.v)
        out, lse, *_ = self._module()._flash_attn_forward(*tensors, softmax_scale=x.scale, causal=x.causal)
        return out.transpose(1, 2), lse.contiguous()

    def plain_backward(self, x: Attention, out: Tensor, lse: Tensor, dout: Tensor) -> Gradients:
        dout, q, k, v, out = self._tokens_first(dout, x.q, x.k, x.v, out)
        grads = [torch.empty_like(y) for y in (q, k, v)]
        self._module()._flash_attn_backward(
            *(dout, q, k, v, out, lse),
            **dict(zip(("dq", "dk", "dv"), grads, strict=True)),
            softmax_scale=x.scale,
            is_causal=x.causal,
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )
        dq, dk, dv = self._tokens_first(*grads)
        return dq, dk, dv


class FlashAttn4(_FlashAttnPackage):
    """FlashAttention-4, the package flash-attn-4; takes dlse."""

    name = "flash_attn_4"
    module = "flash_attn.cute.interface"
    install = "pip install flash-attn-4"

    def refusal(self, x: Attention) -> str | None:
        return _refuse(x, width=128, capability=(9, 0), most=(11, 9))

    def forward(self, x: Attention) -> tuple[Tensor, Tensor]:
        tensors = self._tokens_first(x.q, x.k, x.v)
        out, lse, *_ = self._module()._flash_attn_fwd(*tensors, softmax_scale=x.scale, causal=x.causal, return_lse=True)
        return out.transpose(1, 2), lse.contiguous()

    def backward(
        self,
        x: Attention,
        out: Tensor,
        lse: Tensor,
        dout: Tensor | None,
        dlse: Tensor | None,
        rows: Tensor | None,
        impl: Backend,
    ) -> Gradients:
        q, k, v, out, dout = self._tokens_first(
            x.q, x.k, x.v, out, torch.zeros_like(out) if dout is None else _dense(dout)
        )
        grads = self._module()._flash_attn_bwd(
            *(q, k, v, out, dout, lse),
            softmax_scale=x.scale,
            causal=x.causal,
            deterministic=torch.are_deterministic_algorithms_enabled(),
            dlse=dlse,
        )
        dq, dk, dv = self._tokens_first(*grads[:3])
        return dq, dk, dv


ENGINES: dict[str, Engine] = {
    e.name: e for e in (Triton(), TorchFlash(), TorchCudnn(), FlashAttn2(), FlashAttn3(), FlashAttn4())
}

# Fastest first, by compute capability; by what their authors publish, until our own benchmark says otherwise.
_HOPPER = ("flash_attn_3", "torch_cudnn", "flash_attn_4", "triton", "flash_attn_2", "torch_flash")
_BLACKWELL = ("flash_attn_4", "torch_cudnn", "triton", "flash_attn_2", "torch_flash")
_OTHER = ("flash_attn_2", "torch_flash", "torch_cudnn", "triton")
_PREFERRED = {9: _HOPPER, 10: _BLACKWELL, 11: _BLACKWELL}


def engine(name: str | None, x: Attention) -> Engine:
    """The engine of this name, or the fastest that is installed and can compute ``x``.

    Where torch.use_deterministic_algorithms is on, the default is a deterministic one.

    Raises:
        ValueError: the name is unknown, the engine is not installed, or it cannot compute ``x``; the message says why.
    """
    if name is not None:
        if name not in ENGINES:
            raise ValueError(f"engine must be None or one of {tuple(ENGINES)}, got {name!r}")
        chosen = ENGINES[name]
        if reason := chosen.missing():
            raise ValueError(f"engine={name!r} cannot run: {reason}")
        if reason := chosen.refusal(x):
            raise ValueError(f"engine={name!r} {reason}")
        return chosen
    preferred: tuple[str, ...] = ("torch_flash",)
    if x.q.is_cuda:
        preferred = _PREFERRED.get(torch.cuda.get_device_capability(x.q.device)[0], _OTHER)
    refusals = []
    for candidate in (ENGINES[n] for n in preferred):
        if torch.are_deterministic_algorithms_enabled() and not candidate.deterministic:
            continue
        reason = candidate.missing() or candidate.refusal(x)
        if reason is None:
            return candidate
        refusals.append(f"{candidate.name}: {reason}")
    raise ValueError("no attention engine can run here (" + "; ".join(refusals) + ")")
