"""Which backend computes an attention op: by device when ``impl`` is None, else exactly the one that was asked for."""

import importlib
import os
import warnings
from functools import cache
from importlib.util import find_spec
from typing import Protocol, cast

import torch
from torch import Tensor

from cdistill.choices import IMPLS
from cdistill.errors import InputError
from cdistill.ops._problem import AttentionProblem, Base, Comparison, Gradients, VocabularyOptions, VocabularyRows

_MODULES = {
    "torch": "cdistill.ops._torch",
    "cpp": "cdistill.ops._cpp",
    "triton": "cdistill.kernels.backend",
}


class Backend(Protocol):
    """The primitives of a backend; arguments come validated, every result is fp32 unless it says otherwise.

    lse and dlse (B,Hq,T) are read at the rows only; a row that sees no key may have any lse. Gradients of q and k come in
    fp32 or in q's dtype.
    """

    SPLITS_LSE: bool  # whether the lse that it makes itself is split in two (2,B,Hq,T), for its own primitives to read
    FUSES_HEAD_COSINE: bool  # whether it has `head_cosine` and its backward pass
    FUSES_DENOMINATOR: bool  # whether it has `slice_forward_with_lse` and `slice_backward_with_denominator`
    FUSES_ACCUMULATION: bool  # whether it has `slice_accumulate`
    TAKES_FEWER_QUERIES: bool  # whether problems may have fewer queries than keys
    HAS_REVERSE_KL: bool  # whether "reverse_kl" is one of its alignment losses

    def regions(self, problem: AttentionProblem) -> tuple[Tensor, Tensor, Tensor]:
        """Rows (B,R) that see one of their columns, columns (B,V) that are not padding, and () bool: all allowed."""

    def row_lse(self, problem: AttentionProblem) -> Tensor:
        """log sum exp(scale * q.k) over all keys a row sees, +inf where there is none: (B,Hq,T), only rows written.

        Split with SPLITS_LSE, as large scores need it: P = exp(s - lse) is off by |lse| 2^-24. Only without
        FUSES_DENOMINATOR.
        """

    def row_lse_backward(
        self, problem: AttentionProblem, dlse: Tensor, into: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Gradient of ``row_lse`` in q and k for the lse of the problem, new, or added to ``into`` in place."""

    def fold_dlse(self, out: Tensor, dout: Tensor, dlse: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Change out (B,Hq,T,D) at the rows so that sum(dout * out) falls by dlse (B,Hq,T), for `unfold_dlse` to undo.

        Returns what stood there (B,Hq,R,D), and the part of dlse (B,Hq,T) for rows where dout is too small to carry it.
        """

    def unfold_dlse(self, out: Tensor, saved: Tensor, rows: Tensor) -> None:
        """Undo `fold_dlse`, bit for bit."""

    def slice_forward(self, problem: AttentionProblem) -> Tensor:
        """exp(scale * q.k - lse) at (rows, cols): (B,R,V) head mean, or (B,Hq,R,V)."""

    def slice_accumulate(self, problem: AttentionProblem, sums: Tensor, windows: list[int]) -> None:
        """Add ``slice_forward`` to sums[w] for every w in ``windows``."""

    def slice_backward(
        self,
        problem: AttentionProblem,
        grad: Tensor,
        base: Base | None,
        bound: Tensor | None = None,
        into: tuple[Tensor, Tensor] | None = None,
    ) -> Gradients:
        """Gradient of ``slice_forward`` in q, k and lse (B,Hq,T), zero outside the rows.

        ``base(dlse)`` gives the gradients of q and k to which those of the slice are added; None stands for zero, or for
        ``into``, which is added to in place. ``bound`` (B,) is what |grad * P| of any head does not exceed, where |grad|
        itself may be huge.
        """

    def slice_forward_with_lse(self, problem: AttentionProblem) -> tuple[Tensor, Tensor]:
        """``slice_forward`` from the ``row_lse`` of its rows, and that."""

    def slice_backward_with_denominator(
        self, problem: AttentionProblem, grad: Tensor, into: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Gradient of ``slice_forward_with_lse`` in q and k, new, or added to ``into`` in place.

        The problem has the lse that ``slice_forward_with_lse`` returned.
        """

    def alignment_loss(self, a: Tensor, compared: Comparison) -> Tensor:
        """Distance of a (N,R,V) from the target: (N,)."""

    def alignment_grad(self, a: Tensor, compared: Comparison, grad_out: Tensor, dtype: torch.dtype) -> Tensor:
        """Gradient of sum(grad_out * alignment_loss) in a: (N,R,V), rounded to ``dtype`` where that saves memory."""

    def head_cosine(self, problem: AttentionProblem, target: Tensor) -> tuple[Tensor, Tensor]:
        """1 - cos of the rows of every head's slice with target (B,Hq,R,V): (B,Hq,R), anything where rows are -1.

        Also what the gradient needs of them, (4,B,Hq,R). The slice itself never exists, and no lse is made for it.
        """

    def head_cosine_backward(
        self, problem: AttentionProblem, kept: Tensor, target: Tensor, grad: Tensor, base: Base | None
    ) -> Gradients:
        """Gradient of ``head_cosine`` for grad (B,Hq,R), zero where rows are -1; results as of ``slice_backward``.

        Without an lse ``base`` and dlse are None.
        """

    def vocabulary_losses(self, rows: VocabularyRows, options: VocabularyOptions) -> None:
        """Write cross-entropy and divergence of rows of logits.

        With ``options.gradient`` student's logits become that gradient, else they may be anything afterwards.
        """


@cache
def _why_no_cpp() -> str | None:
    """None if the C++ module can be imported, else the reason it cannot."""
    try:
        importlib.import_module("cdistill._C")
    except ImportError as error:
        return str(error)
    return None


@cache
def multiplies(dtype: torch.dtype) -> bool:
    """Whether this CPU has products of matrices in a dtype; without, torch takes 6 to 13 times as long as in fp32."""
    name = {torch.float16: "fp16", torch.bfloat16: "bf16"}.get(dtype)
    known = None if name is None else getattr(torch.ops.mkldnn, f"_is_mkldnn_{name}_supported", None)
    return name is None or (known is not None and bool(known()))


@cache
def multiplies_tiles() -> bool:
    """Whether this CPU has instructions for products of tiles of bf16 matrices (AMX), and torch may use them."""
    known = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return multiplies(torch.bfloat16) and known is not None and bool(known()) and torch.cpu._init_amx()


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
            raise InputError(f"impl='cpp' needs CPU tensors, {name} is on {x.device}")
        reason = _why_no_cpp()
        if reason is not None:
            raise InputError(f"impl='cpp' needs the C++ module cdistill._C, which is not available ({reason})")
    if impl == "triton":
        if find_spec("triton") is None:
            raise InputError("impl='triton' needs the package triton, which is not installed")
        interpreted = os.environ.get("TRITON_INTERPRET") == "1"
        if not x.is_cuda and not (interpreted and x.device.type == "cpu"):
            raise InputError(
                f"impl='triton' needs CUDA tensors (or CPU tensors and TRITON_INTERPRET=1), {name} is on {x.device}"
            )
        if x.is_cuda and torch.cuda.get_device_capability(x.device) < (8, 0):
            raise InputError(
                "impl='triton' needs compute capability 8.0 or higher, "
                f"{torch.cuda.get_device_name(x.device)} has {_capability(x.device)}"
            )
        if interpreted and x.dtype == torch.bfloat16:
            raise InputError(
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
        raise InputError(f"impl must be None or one of {IMPLS}, got {impl!r}")
    _require(impl, x, name)
    return cast(Backend, importlib.import_module(_MODULES[impl]))
