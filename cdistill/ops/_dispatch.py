"""Which backend computes an attention op: by device when ``impl`` is None, else exactly the one that was asked for."""

import importlib
import os
import warnings
from functools import cache
from importlib.util import find_spec
from typing import Protocol, cast

import torch
from torch import Tensor

_MODULES = {
    "torch": "cdistill.ops._torch",
    "cpp": "cdistill.ops._cpp",
    "triton": "cdistill.kernels.attention_slice",
}
IMPLS = tuple(_MODULES)


class Backend(Protocol):
    """The six primitives of a backend; arguments come validated, every result is fp32.

    q (B,Hq,T,D), k (B,Hkv,T,D) with unit stride on D; rows (B,R), cols (B,V) int32 contiguous, -1 = padding; key_mask
    (B,T) bool or None; lse (B,Hq,R), +inf where a row is padding or sees no key. dq and dk are fp32 contiguous buffers
    that are added to. N below is B, or B*Hq for ``heads="each"``.
    """

    def row_lse(
        self, q: Tensor, k: Tensor, rows: Tensor, *, causal: bool, scale: float, key_mask: Tensor | None
    ) -> Tensor:
        """log sum exp(scale * q.k) over all keys a row sees: (B,Hq,R)."""

    def row_lse_backward(
        self,
        q: Tensor,
        k: Tensor,
        lse: Tensor,
        rows: Tensor,
        dlse: Tensor,
        dq: Tensor,
        dk: Tensor,
        *,
        causal: bool,
        scale: float,
        key_mask: Tensor | None,
    ) -> None:
        """Add the gradient of ``row_lse`` to dq and dk."""

    def slice_forward(
        self,
        q: Tensor,
        k: Tensor,
        lse: Tensor,
        rows: Tensor,
        cols: Tensor,
        *,
        causal: bool,
        scale: float,
        key_mask: Tensor | None,
        each: bool,
    ) -> Tensor:
        """exp(scale * q.k - lse) at (rows, cols): (B,R,V) head mean, or (B,Hq,R,V)."""

    def slice_backward(
        self,
        q: Tensor,
        k: Tensor,
        lse: Tensor,
        rows: Tensor,
        cols: Tensor,
        grad: Tensor,
        dq: Tensor,
        dk: Tensor,
        *,
        causal: bool,
        scale: float,
        key_mask: Tensor | None,
        each: bool,
    ) -> Tensor:
        """Add the gradient of ``slice_forward`` to dq and dk; return that of lse, (B,Hq,R)."""

    def alignment_loss(
        self,
        a: Tensor,
        target: Tensor,
        row_valid: Tensor,
        col_valid: Tensor,
        *,
        loss: str,
        reduction: str,
        sink_filter: bool,
    ) -> Tensor:
        """Distance of a and target (N,R,V): (N,)."""

    def alignment_grad(
        self,
        a: Tensor,
        target: Tensor,
        row_valid: Tensor,
        col_valid: Tensor,
        grad_out: Tensor,
        *,
        loss: str,
        reduction: str,
        sink_filter: bool,
    ) -> Tensor:
        """Gradient of sum(grad_out * alignment_loss) in a: (N,R,V)."""


@cache
def _why_no_cpp() -> str | None:
    """None if the C++ module can be imported, else the reason it cannot."""
    try:
        importlib.import_module("cdistill._C")
    except ImportError as error:
        return str(error)
    return None


@cache
def _warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=2)


def _choose(q: Tensor) -> str:
    """The implementation for this device, with one line per process when it is not the fast one."""
    if q.is_cuda:
        if find_spec("triton") is not None:
            return "triton"
        _warn_once("cdistill: triton is not installed, CUDA ops use the torch implementation")
    elif q.device.type == "cpu":
        reason = _why_no_cpp()
        if reason is None:
            return "cpp"
        _warn_once(f"cdistill: cdistill._C is not available ({reason}), CPU ops use the torch implementation")
    return "torch"


def _require(impl: str, q: Tensor) -> None:
    """Raise ValueError, saying why, unless ``impl`` can run on q's device and dtype."""
    if impl == "cpp":
        if q.device.type != "cpu":
            raise ValueError(f"impl='cpp' needs CPU tensors, q is on {q.device}")
        reason = _why_no_cpp()
        if reason is not None:
            raise ValueError(f"impl='cpp' needs the C++ module cdistill._C, which is not available ({reason})")
    if impl == "triton":
        if find_spec("triton") is None:
            raise ValueError("impl='triton' needs the package triton, which is not installed")
        interpreted = os.environ.get("TRITON_INTERPRET") == "1"
        if not q.is_cuda and not (interpreted and q.device.type == "cpu"):
            raise ValueError(
                f"impl='triton' needs CUDA tensors (or CPU tensors and TRITON_INTERPRET=1), q is on {q.device}"
            )
        if interpreted and q.dtype == torch.bfloat16:
            raise ValueError(
                "impl='triton' cannot compute in bfloat16 under TRITON_INTERPRET=1, q must be fp32 or fp16"
            )


def backend(impl: str | None, q: Tensor) -> Backend:
    """The backend module for ``impl``, or for q's device if it is None.

    Raises:
        ValueError: impl is unknown, or cannot run here; the message says why.
    """
    if impl is None:
        impl = _choose(q)
    elif impl not in IMPLS:
        raise ValueError(f"impl must be None or one of {IMPLS}, got {impl!r}")
    _require(impl, q)
    return cast(Backend, importlib.import_module(_MODULES[impl]))
