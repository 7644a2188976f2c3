"""What the public attention ops accept: one check per argument, each error naming the argument and what is allowed."""

import itertools
import math
from collections.abc import Sequence
from numbers import Integral, Real
from typing import cast

import torch
from torch import Tensor
from torch.autograd import forward_ad

from cdistill.choices import ALIGNMENT_LOSSES, HEADS, REDUCTIONS, RELATION_LOSSES
from cdistill.errors import InputError
from cdistill.ops._problem import AttentionProblem, Gradients

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
HEAD_DIMS = range(16, 257, 8)  # that ops over queries and keys take
HEAD_DIMS_SAID = f"a multiple of {HEAD_DIMS.step} from {HEAD_DIMS.start} to {HEAD_DIMS[-1]}"
TINY, HUGE = 2.0**-100, 2.0**100  # of numbers that kernels take, multiply by and divide by in fp32
# The smallest normal fp32 number: in KL a smaller share counts as this one, and nothing pulls it up.
LEAST_SHARE = 2.0**-126
SWAPPED = (
    "; if these are (B, T, H, D), give x.transpose(1, 2)"  # where sizes look as if heads and tokens were exchanged
)


def require_choice(name: str, value: object, allowed: tuple[str, ...]) -> None:
    """Raise ValueError unless value is one of the allowed names."""
    if value not in allowed:
        raise InputError(f"{name} must be one of {allowed}, got {value!r}")


def require_bool(name: str, value: object) -> None:
    """Raise ValueError unless value is True or False."""
    if not isinstance(value, bool):
        raise InputError(f"{name} must be True or False, got {value!r}")


def require_tensor(name: str, value: object) -> None:
    """Raise ValueError unless value is a tensor, without a tangent: forward-mode derivatives would come out as zero."""
    if not isinstance(value, Tensor):
        raise InputError(f"{name} must be a tensor, got {type(value).__name__}")
    if forward_ad._current_level >= 0 and forward_ad.unpack_dual(value).tangent is not None:
        raise InputError(
            f"{name} has a forward-mode tangent, but the op has a backward pass only: use torch.func.vjp or grad"
        )


def is_number(value: object, kind: type = Real) -> bool:
    """Whether value is a number: Python's or numpy's, or with ``kind`` Integral a whole one; truth values are none."""
    return isinstance(value, kind) and not isinstance(value, bool)


def require_shape(name: str, tensor: Tensor, shape: tuple[int, ...], axes: str, why: str = "") -> None:
    """Raise ValueError unless tensor has this shape; axes are its names for the message, ``why`` what asks for it."""
    require_tensor(name, tensor)
    if tuple(tensor.shape) != shape:
        raise InputError(f"{name} must have shape ({axes}) = {shape}{why}, got {tuple(tensor.shape)}")


def require_device(name: str, tensor: Tensor, device: torch.device, like: str = "q") -> None:
    """Raise ValueError unless tensor lies on the device of the argument ``like``."""
    if tensor.device != device:
        raise InputError(f"{name} must be on {device} like {like}, got {tensor.device}")


def require_values(ok: Tensor, message: str) -> None:
    """Raise ValueError unless ok (0-dim bool) holds; on CUDA, where reading it would sync, and in a compiled graph, where
    it would break the graph, an assertion of torch's.
    """
    if ok.device.type == "cpu" and not torch.compiler.is_compiling():
        if not ok:
            raise InputError(message)
    else:
        torch._assert_async(ok, message)


def _require_queries_and_keys(q: Tensor, k: Tensor) -> None:
    for name, tensor in (("q", q), ("k", k)):
        require_tensor(name, tensor)
        if tensor.dim() != 4:
            raise InputError(
                f"{name} must have 4 dimensions (batch, heads, tokens, head dim), got {tuple(tensor.shape)}"
            )
        if tensor.dtype not in DTYPES:
            raise InputError(f"{name} must be float16, bfloat16 or float32, got {tensor.dtype}")
        if tensor.stride(-1) != 1:
            raise InputError(f"{name} must have unit stride on its last dimension, got strides {tensor.stride()}")
    batch, q_heads, tokens, width = q.shape
    k_heads, keys = k.shape[1:3]
    if k.dtype != q.dtype:
        raise InputError(f"k must have the dtype of q, {q.dtype}, got {k.dtype}")
    require_device("k", k, q.device)
    if keys < tokens:
        raise InputError(
            f"k must have the {tokens} tokens of q, or more before them, got {tuple(k.shape)}"
            f"{SWAPPED if k_heads == q_heads else ''}"
        )
    require_shape("k", k, (batch, k_heads, keys, width), "B, Hkv, T, D")
    if tokens == 0:
        raise InputError("q must hold at least one token, got T = 0")
    if width not in HEAD_DIMS:
        raise InputError(f"q must have a head dim that is {HEAD_DIMS_SAID}, got {width}")
    if q_heads == 0 or k_heads == 0 or q_heads % k_heads:
        raise InputError(f"k must have a number of heads that divides the {q_heads} heads of q, got {k_heads}")


def whole_positions(name: str, positions: Tensor, q: Tensor) -> Tensor:
    """Check the form of row or column positions and return them contiguous; `require_positions` checks their values."""
    require_tensor(name, positions)
    batch = q.shape[0]
    if positions.dim() != 2 or positions.shape[0] != batch:
        raise InputError(f"{name} must have shape (B, count) with B = {batch}, got {tuple(positions.shape)}")
    if positions.is_floating_point() or positions.is_complex() or positions.dtype == torch.bool:
        raise InputError(f"{name} must have an integer dtype, got {positions.dtype}")
    require_device(name, positions, q.device)
    if positions.dtype not in (torch.int32, torch.int64):
        positions = positions.int()
    return positions.contiguous()


def require_positions(allowed: Tensor, problem: AttentionProblem) -> None:
    """Raise ValueError unless ``allowed`` (0-dim bool): rows hold distinct positions of queries or -1, cols of keys."""
    (rows, cols), heads, tokens = problem.positions, problem.q.shape[1], problem.k.shape[2]
    if allowed.device.type != "cpu":
        message = f"rows and cols must hold distinct positions from 0 to T-1 = {tokens - 1}, or -1 for padding"
        if problem.offset:
            message += f"; the first query is at {problem.offset}"
        torch._assert_async(allowed, message)
    elif not allowed:
        for name, positions, first in (("rows", rows, problem.offset), ("cols", cols, 0)):
            if ((positions < -1) | (positions >= tokens) | ((positions >= 0) & (positions < first))).any():
                swapped = SWAPPED if int(positions.max()) < heads else ""
                of = f" (those of the last {problem.q.shape[2]} tokens, which q has)" if first else ""
                raise InputError(
                    f"{name} must hold positions from {first} to T-1 = {tokens - 1}{of}, or -1 for padding{swapped}"
                )
        name = "rows" if has_repeats(rows) else "cols"
        raise InputError(f"{name} must hold distinct positions within a sample")


def has_repeats(positions: Tensor) -> Tensor:
    """Whether a sample of positions (B,N) holds one of them, other than padding, twice: () bool."""
    ordered = positions.sort(dim=1).values
    return ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any()


def _key_mask(key_mask: Tensor, q: Tensor, k: Tensor) -> Tensor:
    batch, tokens = q.shape[0], k.shape[2]
    require_tensor("key_mask", key_mask)
    if key_mask.dim() > 2:
        raise InputError(
            f"key_mask must have shape (B, T) = {(batch, tokens)}, got {tuple(key_mask.shape)}: "
            "keys can be hidden as padding or by causal=True, not for some rows only"
        )
    swapped = key_mask.shape[-1:] == q.shape[1:2]
    require_shape("key_mask", key_mask, (batch, tokens), "B, T", SWAPPED if swapped and q.shape[1] != tokens else "")
    if key_mask.dtype != torch.bool:
        raise InputError(f"key_mask must be bool (True = real key), got {key_mask.dtype}")
    require_device("key_mask", key_mask, q.device)
    return key_mask.contiguous()


def require_mask_of(key_mask: Tensor, cols: Tensor, a: Tensor) -> None:
    """Raise ValueError unless key_mask (B,T) says of all columns of slices a (B,...) whether they are real."""
    require_tensor("key_mask", key_mask)
    if key_mask.dim() != 2 or len(key_mask) != len(a) or key_mask.dtype != torch.bool:
        found = f"{key_mask.dtype} of shape {tuple(key_mask.shape)}"
        raise InputError(f"key_mask must be bool of shape (B, T) with B = {len(a)}, got {found}")
    require_device("key_mask", key_mask, a.device, "a")
    if cols.numel():
        message = f"key_mask must have all tokens that cols name, got T = {key_mask.shape[1]}"
        require_values(cols.max() < key_mask.shape[1], message)


def _documents(cu_seqlens: Tensor | Sequence[int], q: Tensor, k: Tensor) -> list[int]:
    """Where documents begin and the last one ends, as numbers."""
    if isinstance(cu_seqlens, Tensor):
        if cu_seqlens.dim() != 1 or cu_seqlens.dtype not in (torch.int32, torch.int64):
            found = f"{cu_seqlens.dtype} of shape {tuple(cu_seqlens.shape)}"
            raise InputError(f"cu_seqlens must be int32 or int64 of shape (documents + 1,), got {found}")
        cu_seqlens = cu_seqlens.tolist()
    elif not isinstance(cu_seqlens, list | tuple) or not all(is_number(x, Integral) for x in cu_seqlens):
        raise InputError(f"cu_seqlens must be a tensor (documents + 1,) or a list of ints, got {cu_seqlens!r}")
    documents = [int(x) for x in cu_seqlens]
    tokens = q.shape[2]
    if q.shape[0] != 1:
        raise InputError(f"cu_seqlens needs documents packed into one row, q (1, H, T, D), got B = {q.shape[0]}")
    if k.shape[2] != tokens:
        raise InputError(f"cu_seqlens needs as many queries as keys, got {tokens} and {k.shape[2]}")
    if len(documents) < 2 or documents[0] != 0 or documents[-1] != tokens:
        ends = f"{documents[0]} to {documents[-1]}" if documents else "nothing"
        raise InputError(f"cu_seqlens must go from 0 to T = {tokens}, where the last document ends, got {ends}")
    for before, after in itertools.pairwise(documents):
        if after < before:
            raise InputError(f"cu_seqlens must not decrease, got {after} after {before}")
    return documents


def _scale(scale: float | None, width: int) -> float:
    if scale is None:
        return 1.0 / math.sqrt(width)
    if not is_number(scale) or not math.isfinite(scale):
        raise InputError(f"scale must be None or a finite number, got {scale!r}")
    if scale and not TINY <= abs(scale) <= HUGE:  # fp32 would make it 0 or inf, and its products with inf NaN
        raise InputError(f"scale must be 0 or of a size from 2^-100 to 2^100, got {scale!r}")
    return float(scale)


def require_attention_values(problem: AttentionProblem) -> None:
    """Raise ValueError unless the problem has values v that fit its keys."""
    k, v = problem.k, cast(Tensor, problem.v)
    require_shape("v", v, tuple(k.shape), "B, Hkv, T, D")
    if v.dtype != k.dtype:
        raise InputError(f"v must have the dtype of q, {k.dtype}, got {v.dtype}")
    require_device("v", v, k.device)
    if v.stride(-1) != 1:
        raise InputError(f"v must have unit stride on its last dimension, got strides {v.stride()}")


def _lse(lse: Tensor, q: Tensor) -> Tensor:
    require_shape("lse", lse, tuple(q.shape[:3]), "B, Hq, T")
    if lse.dtype != torch.float32:
        raise InputError(f"lse must be float32, got {lse.dtype}")
    require_device("lse", lse, q.device)
    return lse.contiguous()


def require_target(target: Tensor, problem: AttentionProblem) -> None:
    """Raise ValueError unless target is a slice (B,R,V), or (B,Hq,R,V) for each."""
    require_tensor("target", target)
    axes, why = ("B, Hq, R, V", " for heads='each'") if problem.each else ("B, R, V", "")
    require_shape("target", target, problem.slice_shape, axes, why)
    if not target.is_floating_point():
        raise InputError(f"target must have a floating dtype, got {target.dtype}")
    require_device("target", target, problem.q.device)


def require_sums(sums: Tensor, windows: Sequence[int], problem: AttentionProblem) -> None:
    """Raise ValueError unless sums is a stack of slices and windows are distinct indices into it."""
    require_tensor("sums", sums)
    axes = "W, B, Hq, R, V" if problem.each else "W, B, R, V"
    count = sums.shape[0] if sums.dim() else 0
    require_shape("sums", sums, (count, *problem.slice_shape), axes)
    require_device("sums", sums, problem.q.device)
    if sums.dtype not in DTYPES:
        raise InputError(f"sums must be float16, bfloat16 or float32, got {sums.dtype}")
    if sums.requires_grad:
        raise InputError("sums must not require a gradient: it is added to in place, and no gradient is kept")
    if type(windows) not in (list, tuple):
        raise InputError(f"windows must be a list of indices, got {type(windows).__name__}")
    if not sums.is_contiguous():
        raise InputError(f"sums must be contiguous, got strides {sums.stride()}")
    if any(type(w) is not int or not 0 <= w < count for w in windows) or len(set(windows)) != len(windows):
        raise InputError(f"windows must hold distinct indices from 0 to {count - 1}, got {list(windows)}")


def require_loss(loss: str, reduction: str, sink_filter: bool, losses: tuple[str, ...] = ALIGNMENT_LOSSES) -> None:
    """Raise ValueError unless these name an alignment loss."""
    if loss in RELATION_LOSSES and loss not in losses:
        raise InputError(
            f"loss must be one of {losses}, got {loss!r}, which attention_relation alone has: not all kernels do"
        )
    require_choice("loss", loss, losses)
    require_choice("reduction", reduction, REDUCTIONS)
    require_bool("sink_filter", sink_filter)
    if sink_filter and reduction != "column":
        raise InputError(f"sink_filter needs reduction='column', got reduction={reduction!r}")


def attention_problem(
    q: Tensor,
    k: Tensor,
    v: Tensor | None = None,
    regions: tuple[Tensor, Tensor] | None = None,
    *,
    causal: bool,
    scale: float | None,
    key_mask: Tensor | None,
    lse: Tensor | None = None,
    heads: str = "mean",
    cu_seqlens: Tensor | Sequence[int] | None = None,
) -> AttentionProblem:
    """Validate what attention ops take, and bring it into the form that backends and engines take.

    ``regions`` are rows and columns of a slice. A scale that is not positive moves into q, as kernels need it that take the
    maximum of unscaled scores.

    Raises:
        ValueError: an argument has a wrong shape, dtype, device or value; the message names it.
    """
    _require_queries_and_keys(q, k)
    require_bool("causal", causal)
    key_mask = None if key_mask is None else _key_mask(key_mask, q, k)
    documents = None if cu_seqlens is None else _documents(cu_seqlens, q, k)
    factor = _scale(scale, q.shape[-1])
    require_choice("heads", heads, HEADS)
    lse = None if lse is None else _lse(lse, q)
    rows, cols = (None, None) if regions is None else map(whole_positions, ("rows", "cols"), regions, (q, q))
    if factor <= 0:
        q, factor = (-q, -factor) if factor < 0 else (q * 0.0, 1.0)
    return AttentionProblem(q, k, v, key_mask, causal, factor, documents, rows, cols, lse, heads == "each")


def laid_out_like(x: Tensor, like: Tensor) -> Tensor:
    """``x`` (shape of ``like``) with the strides of torch.empty_like(like), which is what torch.compile is told."""
    strides = torch.empty_like(like, device="meta").stride()
    return x if x.stride() == strides else torch.empty_like(like, dtype=x.dtype).copy_(x)


def gradients_like(problem: AttentionProblem, dq: Tensor, dk: Tensor, dv: Tensor) -> Gradients:
    """Gradients of q, k and v with their strides, as `laid_out_like`."""
    q, k, v = problem.qkv
    return laid_out_like(dq, q), laid_out_like(dk, k), laid_out_like(dv, v)
