"""Which backend computes an attention op: by device when ``impl`` is None, else exactly the one that was asked for."""

import importlib
import os
import warnings
from collections.abc import Callable
from functools import cache, wraps
from importlib.util import find_spec
from typing import Any, Protocol, TypeVar, cast

import torch
from torch import Tensor

from cdistill.choices import IMPLS

_MODULES = {
    "torch": "cdistill.ops._torch",
    "cpp": "cdistill.ops._cpp",
    "triton": "cdistill.kernels.backend",
}
T = TypeVar("T")


class Backend(Protocol):
    """The primitives of a backend; arguments come validated, every result is fp32 unless it says otherwise.

    q (B,Hq,T,D), k (B,Hkv,T,D) with unit stride on D; rows (B,R), cols (B,V) int32 or int64, contiguous, -1 = padding;
    key_mask (B,T) bool, contiguous, or None; scale > 0. lse and dlse (B,Hq,T) are read at the rows only; a row that sees no
    key may have any lse. Gradients of q and k come in fp32 or in q's dtype. N below is B, or B*Hq for ``each``.
    """

    SPLITS_LSE: bool  # whether the lse that it makes itself is split in two (2,B,Hq,T), for its own primitives to read
    FUSES_HEAD_COSINE: bool  # whether it has `head_cosine` and its backward pass
    FUSES_DENOMINATOR: bool  # whether it has `slice_forward_with_lse` and `slice_backward_with_denominator`

    def regions(
        self, rows: Tensor, cols: Tensor, key_mask: Tensor | None, *, causal: bool, tokens: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Rows (B,R) that see one of their columns, columns (B,V) that are not padding, and () bool: all allowed."""

    def row_lse(
        self, q: Tensor, k: Tensor, rows: Tensor, *, causal: bool, scale: float, key_mask: Tensor | None
    ) -> Tensor:
        """log sum exp(scale * q.k) over all keys a row sees, +inf where there is none: (B,Hq,T), only rows written.

        Split with SPLITS_LSE, as large scores need it: P = exp(s - lse) is off by |lse| 2^-24. Only without
        FUSES_DENOMINATOR.
        """

    def row_lse_backward(
        self,
        q: Tensor,
        k: Tensor,
        lse: Tensor,
        rows: Tensor,
        dlse: Tensor,
        *,
        causal: bool,
        scale: float,
        key_mask: Tensor | None,
        into: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Gradient of ``row_lse`` in q and k, new, or added to ``into`` in place."""

    def fold_dlse(self, out: Tensor, dout: Tensor, dlse: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Change out (B,Hq,T,D) at the rows so that sum(dout * out) falls by dlse (B,Hq,T), for `unfold_dlse` to undo.

        Returns what stood there (B,Hq,R,D), and the part of dlse (B,Hq,T) for rows where dout is too small to carry it.
        """

    def unfold_dlse(self, out: Tensor, saved: Tensor, rows: Tensor) -> None:
        """Undo `fold_dlse`, bit for bit."""

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

    def slice_accumulate(
        self,
        q: Tensor,
        k: Tensor,
        lse: Tensor,
        rows: Tensor,
        cols: Tensor,
        sums: Tensor,
        windows: list[int],
        *,
        causal: bool,
        scale: float,
        key_mask: Tensor | None,
        each: bool,
    ) -> None:
        """Add ``slice_forward`` to sums[w] for every w in ``windows``."""

    def slice_backward(
        self,
        q: Tensor,
        k: Tensor,
        lse: Tensor,
        rows: Tensor,
        cols: Tensor,
        grad: Tensor,
        base: Callable[[Tensor], tuple[Tensor, Tensor]] | None,
        *,
        causal: bool,
        scale: float,
        key_mask: Tensor | None,
        each: bool,
        bound: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradient of ``slice_forward`` in q, k and lse (B,Hq,T), zero outside the rows.

        ``base(dlse)`` gives the gradients of q and k to which those of the slice are added; None stands for zero.
        ``bound`` (B,) is what |grad * P| of any head does not exceed, where |grad| itself may be huge.
        """

    def slice_forward_with_lse(
        self,
        q: Tensor,
        k: Tensor,
        rows: Tensor,
        cols: Tensor,
        *,
        causal: bool,
        scale: float,
        key_mask: Tensor | None,
        each: bool,
    ) -> tuple[Tensor, Tensor]:
        """``slice_forward`` from the ``row_lse`` of its rows, and that."""

    def slice_backward_with_denominator(
        self,
        q: Tensor,
        k: Tensor,
        lse: Tensor,
        rows: Tensor,
        cols: Tensor,
        grad: Tensor,
        *,
        causal: bool,
        scale: float,
        key_mask: Tensor | None,
        each: bool,
    ) -> tuple[Tensor, Tensor]:
        """Gradient of the slice of ``slice_forward_with_lse`` in q and k; ``lse`` is the one it returned."""

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
        dtype: torch.dtype,
    ) -> Tensor:
        """Gradient of sum(grad_out * alignment_loss) in a: (N,R,V), rounded to ``dtype`` where that saves memory."""

    def head_cosine(
        self,
        q: Tensor,
        k: Tensor,
        lse: Tensor,
        rows: Tensor,
        cols: Tensor,
        target: Tensor,
        *,
        causal: bool,
        scale: float,
        key_mask: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """1 - cos of the rows of every head's slice with target (B,Hq,R,V): (B,Hq,R), anything where rows are -1.

        Also what the gradient needs of them, (4,B,Hq,R). The slice itself never exists.
        """

    def head_cosine_backward(
        self,
        q: Tensor,
        k: Tensor,
        kept: Tensor,
        rows: Tensor,
        cols: Tensor,
        target: Tensor,
        grad: Tensor,
        base: Callable[[Tensor], tuple[Tensor, Tensor]] | None,
        *,
        causal: bool,
        scale: float,
        key_mask: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradient of ``head_cosine`` for grad (B,Hq,R), zero where rows are -1; results as of ``slice_backward``."""

    def vocabulary_losses(
        self,
        student: Tensor,
        teacher: Tensor | None,
        top: tuple[Tensor, Tensor, Tensor] | None,
        labels: Tensor,
        ce: Tensor,
        kd: Tensor,
        *,
        divergence: str,
        temperature: float,
        beta: float,
        ce_weight: float,
        kd_weight: float,
        gradient: bool,
    ) -> None:
        """Write cross-entropy and divergence of rows of logits into ce and kd (c,) fp32.

        student and teacher (c,V) fp32, fp16 (not on the CPU) or bf16, their rows padded to multiples of 64 elements;
        instead of a teacher, log-probabilities (c,K) of its top tokens, their indices, and the log-probability (c,) of
        all others. ``gradient`` turns student into that of ce_weight * ce + kd_weight * kd; without it student
        may hold anything afterwards.
        """


def save_for_backward(ctx: Any, *tensors: Tensor | None) -> None:
    """Save tensors for `saved_for_backward`, also those made in inference mode, which autograd itself refuses.

    Those cannot have a gradient or be changed in place, so they may wait on ``ctx``.
    """
    ctx.inference = [x if x is not None and x.is_inference() else None for x in tensors]
    ctx.save_for_backward(*(x if y is None else None for x, y in zip(tensors, ctx.inference, strict=True)))


def saved_for_backward(ctx: Any) -> list[Tensor | None]:
    """What `save_for_backward` was given; to be called once, as gradient checkpointing allows no second time."""
    return [x if y is None else y for x, y in zip(ctx.saved_tensors, ctx.inference, strict=True)]


def without_autocast(op: Callable[..., T]) -> Callable[..., T]:
    """The implementation of an op, computing in the dtypes of its arguments also where torch.autocast is on."""

    @wraps(op)
    def implementation(*arguments: Any) -> T:
        device = next(x.device for x in arguments if isinstance(x, Tensor))
        with torch.autocast(device.type, enabled=False):
            return op(*arguments)

    return implementation


@cache
def _why_no_cpp() -> str | None:
    """None if the C++ module can be imported, else the reason it cannot."""
    try:
        importlib.import_module("cdistill._C")
    except ImportError as error:
        return str(error)
    return None


@cache
def warn_once(message: str) -> None:
    """One line per process for what is chosen on the caller's behalf."""
    warnings.warn(message, stacklevel=2)


def _choose(x: Tensor) -> str:
    """The implementation for this device, with one line per process when it is not the fast one."""
    if x.is_cuda:
        if find_spec("triton") is not None:
            return "triton"
        warn_once("cdistill: triton is not installed, CUDA ops use the torch implementation")
    elif x.device.type == "cpu":
        reason = _why_no_cpp()
        if reason is None:
            return "cpp"
        warn_once(f"cdistill: cdistill._C is not available ({reason}), CPU ops use the torch implementation")
    return "torch"


def _capability(device: torch.device) -> str:
    return ".".join(map(str, torch.cuda.get_device_capability(device)))


def _require(impl: str, x: Tensor, name: str) -> None:
    """Raise ValueError, saying why, unless ``impl`` can run on x's device and dtype."""
    if impl == "cpp":
        if x.device.type != "cpu":
            raise ValueError(f"impl='cpp' needs CPU tensors, {name} is on {x.device}")
        reason = _why_no_cpp()
        if reason is not None:
            raise ValueError(f"impl='cpp' needs the C++ module cdistill._C, which is not available ({reason})")
    if impl == "triton":
        if find_spec("triton") is None:
            raise ValueError("impl='triton' needs the package triton, which is not installed")
        interpreted = os.environ.get("TRITON_INTERPRET") == "1"
        if not x.is_cuda and not (interpreted and x.device.type == "cpu"):
            raise ValueError(
                f"impl='triton' needs CUDA tensors (or CPU tensors and TRITON_INTERPRET=1), {name} is on {x.device}"
            )
        if x.is_cuda and torch.cuda.get_device_capability(x.device) < (8, 0):
            raise ValueError(
                "impl='triton' needs compute capability 8.0 or higher, "
                f"{torch.cuda.get_device_name(x.device)} has {_capability(x.device)}"
            )
        if interpreted and x.dtype == torch.bfloat16:
            raise ValueError(
                f"impl='triton' cannot compute in bfloat16 under TRITON_INTERPRET=1, {name} must be fp32 or fp16"
            )


def backend(impl: str | None, x: Tensor, name: str = "q") -> Backend:
    """The backend module for ``impl``, or for x's device if it is None; ``name`` is x's in messages.

    Raises:
        ValueError: impl is unknown, or cannot run here; the message says why.
    """
    if impl is None:
        impl = _choose(x)
    elif impl not in IMPLS:
        raise ValueError(f"impl must be None or one of {IMPLS}, got {impl!r}")
    _require(impl, x, name)
    return cast(Backend, importlib.import_module(_MODULES[impl]))
