"""What the public attention ops accept: one check per argument, each error naming the argument and what is allowed."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
HEADS = ("mean", "each")
LOSSES = ("cosine", "mse", "kl")
REDUCTIONS = ("row", "matrix", "column")


class SliceArguments(NamedTuple):
    """Validated arguments of an attention slice, in the form the backends take."""

    q: Tensor  # (B,Hq,T,D)
    k: Tensor  # (B,Hkv,T,D)
    lse: Tensor | None  # (B,Hq,T) fp32
    rows: Tensor  # (B,R) int32
    cols: Tensor  # (B,V) int32
    key_mask: Tensor | None  # (B,T) bool
    causal: bool
    scale: float
    each: bool


def require_choice(name: str, value: object, allowed: tuple[str, ...]) -> None:
    """Raise ValueError unless value is one of the allowed names."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {allowed}, got {value!r}")


def require_bool(name: str, value: object) -> None:
    """Raise ValueError unless value is True or False."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, got {value!r}")


def require_tensor(name: str, value: object) -> None:
    """Raise ValueError unless value is a tensor."""
    if not isinstance(value, Tensor):
        raise ValueError(f"{name} must be a tensor, got {type(value).__name__}")


def require_shape(name: str, tensor: Tensor, shape: tuple[int, ...], axes: str) -> None:
    """Raise ValueError unless tensor has this shape; axes are its names for the message."""
    require_tensor(name, tensor)
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} must have shape ({axes}) = {shape}, got {tuple(tensor.shape)}")


def require_device(name: str, tensor: Tensor, device: torch.device) -> None:
    """Raise ValueError unless tensor lies on this device."""
    if tensor.device != device:
        raise ValueError(f"{name} must be on {device} like the other tensors, got {tensor.device}")


def require_values(ok: Tensor, message: str) -> None:
    """Raise ValueError unless ok (0-dim bool) holds; on CUDA a device-side assertion, because reading it would sync."""
    if ok.device.type == "cpu":
        if not ok:
            raise ValueError(message)
    else:
        torch._assert_async(ok, message)


def _require_queries_and_keys(q: Tensor, k: Tensor) -> None:
    for name, tensor in (("q", q), ("k", k)):
        require_tensor(name, tensor)
        if tensor.dim() != 4:
            raise ValueError(
                f"{name} must have 4 dimensions (batch, heads, tokens, head dim), got {tuple(tensor.shape)}"
            )
        if tensor.dtype not in DTYPES:
            raise ValueError(f"{name} must be float16, bfloat16 or float32, got {tensor.dtype}")
        if tensor.stride(-1) != 1:
            raise ValueError(f"{name} must have unit stride on its last dimension, got strides {tensor.stride()}")
    batch, q_heads, tokens, width = q.shape
    k_heads = k.shape[1]
    if k.dtype != q.dtype:
        raise ValueError(f"k must have the dtype of q, {q.dtype}, got {k.dtype}")
    require_device("k", k, q.device)
    require_shape("k", k, (batch, k_heads, tokens, width), "B, Hkv, T, D")
    if tokens == 0:
        raise ValueError("q must hold at least one token, got T = 0")
    if not 16 <= width <= 256 or width % 8:
        raise ValueError(f"q must have a head dim that is a multiple of 8 from 16 to 256, got {width}")
    if q_heads == 0 or k_heads == 0 or q_heads % k_heads:
        raise ValueError(f"k must have a number of heads that divides the {q_heads} heads of q, got {k_heads}")


def _positions(name: str, positions: Tensor, q: Tensor) -> Tensor:
    """Check row or column positions and return them as contiguous int32."""
    require_tensor(name, positions)
    batch, _, tokens, _ = q.shape
    if positions.dim() != 2 or positions.shape[0] != batch:
        raise ValueError(f"{name} must have shape (B, count) with B = {batch}, got {tuple(positions.shape)}")
    if positions.is_floating_point() or positions.is_complex() or positions.dtype == torch.bool:
        raise ValueError(f"{name} must have an integer dtype, got {positions.dtype}")
    require_device(name, positions, q.device)
    if positions.numel():
        require_values(
            ((positions >= -1) & (positions < tokens)).all(),
            f"{name} must hold positions from 0 to T-1 = {tokens - 1}, or -1 for padding",
        )
        ordered = positions.sort(dim=1).values
        repeated = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
        require_values(~repeated.any(), f"{name} must hold distinct positions within a sample")
    return positions.to(torch.int32).contiguous()


def slice_arguments(
    q: Tensor,
    k: Tensor,
    rows: Tensor,
    cols: Tensor,
    *,
    lse: Tensor | None,
    causal: bool,
    scale: float | None,
    key_mask: Tensor | None,
    heads: str,
) -> SliceArguments:
    """Validate the arguments that attention_slice and attention_alignment share.

    Raises:
        ValueError: an argument has a wrong shape, dtype, device or value; the message names it.
    """
    _require_queries_and_keys(q, k)
    require_choice("heads", heads, HEADS)
    require_bool("causal", causal)
    batch, q_heads, tokens, width = q.shape
    if lse is not None:
        require_shape("lse", lse, (batch, q_heads, tokens), "B, Hq, T")
        if lse.dtype != torch.float32:
            raise ValueError(f"lse must be float32, got {lse.dtype}")
        require_device("lse", lse, q.device)
    if key_mask is not None:
        require_shape("key_mask", key_mask, (batch, tokens), "B, T")
        if key_mask.dtype != torch.bool:
            raise ValueError(f"key_mask must be bool (True = real key), got {key_mask.dtype}")
        require_device("key_mask", key_mask, q.device)
        key_mask = key_mask.contiguous()
    if scale is None:
        scale = 1.0 / math.sqrt(width)
    elif isinstance(scale, bool) or not isinstance(scale, int | float) or not math.isfinite(scale):
        raise ValueError(f"scale must be None or a finite number, got {scale!r}")
    return SliceArguments(
        q=q,
        k=k,
        lse=lse,
        rows=_positions("rows", rows, q),
        cols=_positions("cols", cols, q),
        key_mask=key_mask,
        causal=causal,
        scale=float(scale),
        each=heads == "each",
    )
