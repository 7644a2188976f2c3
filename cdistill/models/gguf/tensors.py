"""Tensors of a GGUF file: in which format each is kept, how they are written one at a time, and whether they came back."""

from __future__ import annotations

import ctypes
import importlib.util
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFReader, GGUFWriter, LlamaFileType
from gguf.quants import dequantize, quantize
from torch import Tensor

from cdistill.errors import InputError

Kind = GGMLQuantizationType
FILE_TYPES = {
    "f16": LlamaFileType.MOSTLY_F16,
    "q8_0": LlamaFileType.MOSTLY_Q8_0,
    "q4_0": LlamaFileType.MOSTLY_Q4_0,
    "q4_k_m": LlamaFileType.MOSTLY_Q4_K_M,
}
# What llama.cpp takes where a row is no whole number of blocks.
_COARSER = {Kind.Q4_K: Kind.Q5_0, Kind.Q6_K: Kind.Q8_0, Kind.Q5_0: Kind.F16, Kind.Q8_0: Kind.F16, Kind.Q4_0: Kind.F16}
_PACKED_BY_LLAMA_CPP = (Kind.Q4_K, Kind.Q6_K)
# How far a weight may be from what was written: in parts of the largest of its block (q8_0: half of a 127th, and the scale
# itself is an fp16) and 127 times half of fp16's smallest number more; or the root mean square in parts of the tensor's.
_STEP, _LEAST, _ROOT_MEAN_SQUARE = 0.5 / 127 + 2**-11, 127 * 2**-25, 0.15


@dataclass(frozen=True)
class Entry:
    """A tensor of a file: its name there, its weights (of any float format) and the format it is kept in."""

    name: str
    weight: Tensor
    kind: Kind

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.weight.shape)


def entry(name: str, weight: Tensor, kind: Kind) -> Entry:
    """A tensor in a format that its rows can have; vectors are fp32."""
    if weight.ndim < 2:
        return Entry(name, weight, Kind.F32)
    while kind in _COARSER and weight.shape[-1] % GGML_QUANT_SIZES[kind][0]:
        kind = _COARSER[kind]
    return Entry(name, weight, kind)


def matrix_kind(name: str, quantize: str, layers: int, *, tied: bool) -> Kind:
    """Format of a matrix of the language model, by its name in the file; of ``q4_k_m`` as llama.cpp mixes it.

    That keeps 6 bits of the output layer (where it is ``tied`` that is the embedding), and of ``attn_v`` and ``ffn_down`` in
    the first and last eighth of the layers and every third between.
    """
    if quantize == "f16":
        return Kind.F16
    if quantize == "q8_0":
        return Kind.Q8_0
    if quantize == "q4_0":  # a stage that trains for it rounds the layers alone
        return Kind.Q4_0 if name.startswith("blk.") else Kind.Q8_0
    if name == "output.weight" or (tied and name == "token_embd.weight"):
        return Kind.Q6_K
    parts = name.split(".")
    if parts[0] == "blk" and parts[2] in ("attn_v", "ffn_down"):
        layer, eighth = int(parts[1]), layers // 8
        if layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2:
            return Kind.Q6_K
    return Kind.Q4_K


def write_file(path: Path, writer: GGUFWriter, entries: Sequence[Entry]) -> None:
    """Write a file whose fields the writer has, one tensor in memory at a time.

    Raises:
        OSError: it cannot be written.
        ValueError: a weight is too large for fp16, or the package that packs a format is missing.
    """
    pack = _packer() if any(entry.kind in _PACKED_BY_LLAMA_CPP for entry in entries) else quantize
    for e in entries:
        bytes_of = math.prod(e.shape) // GGML_QUANT_SIZES[e.kind][0] * GGML_QUANT_SIZES[e.kind][1]
        writer.add_tensor_info(e.name, e.shape, np.dtype(np.float32), bytes_of, raw_dtype=e.kind)
    try:
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for e in entries:
            writer.write_tensor_data(_packed(e, pack))
    finally:
        writer.close()


def _packed(e: Entry, pack: Any) -> np.ndarray:
    values = _values(e.weight)
    if e.kind == Kind.F32:
        return values
    if np.abs(values).max(initial=0.0) > np.finfo(np.float16).max:  # scales of blocks are fp16, too
        raise InputError(f"model: {e.name} has weights beyond {np.finfo(np.float16).max:.0f}, the most of fp16")
    if e.kind == Kind.F16:
        return values.astype(np.float16)
    packed: np.ndarray = (pack if e.kind in _PACKED_BY_LLAMA_CPP else quantize)(values, e.kind)
    return packed


def _values(weight: Tensor) -> np.ndarray:
    values: np.ndarray = weight.detach().to("cpu", torch.float32).contiguous().numpy()
    return values


def check_packer(quantize: str) -> None:
    """Raise ValueError if what packs a format is not installed."""
    if quantize == "q4_k_m":
        _packer()


def _packer() -> Any:
    """llama.cpp's own packing of rows, (values, format) to bytes, from the library inside xllamacpp."""
    found = importlib.util.find_spec("xllamacpp")
    library = None if found is None else importlib.util.find_spec("xllamacpp.xllamacpp")
    if library is None or library.origin is None:
        raise InputError(
            "quantize: q4_k_m is packed by llama.cpp itself: pip install xllamacpp, or export f16 and run llama-quantize "
            "FILE q4_k_m"
        )
    chunk = ctypes.CDLL(library.origin).ggml_quantize_chunk
    chunk.restype = ctypes.c_size_t
    chunk.argtypes = [ctypes.c_int, *[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 3, ctypes.c_void_p]

    def pack(values: np.ndarray, kind: Kind) -> np.ndarray:
        block, size = GGML_QUANT_SIZES[kind]
        rows, width = values.reshape(-1, values.shape[-1]).shape
        packed = np.empty((rows, width // block * size), np.uint8)
        written = chunk(int(kind), values.ctypes.data, packed.ctypes.data, 0, rows, width, None)
        assert written == packed.nbytes
        return packed

    return pack


def check_file(path: Path, entries: Sequence[Entry]) -> str:
    """Compare a file's tensors with what was meant to be in it; says what was compared.

    Names, shapes and formats are the same; fp32 and fp16 have the bits of the weights' rounding, q8_0 is within half a step
    of each block, k-quants and q5_0 within 15 % of the root mean square.

    Raises:
        ValueError: a tensor is missing, another, or not what it was.
    """
    found = {tensor.name: tensor for tensor in GGUFReader(path).tensors}
    wanted = {e.name: e for e in entries}
    if found.keys() != wanted.keys():
        name = sorted(found.keys() ^ wanted.keys())[0]
        raise InputError(f"output: {path.name} read back has {len(found)} tensors of {len(wanted)}: {name} differs")
    worst = 0.0
    for name, e in wanted.items():
        tensor = found[name]
        values = _values(e.weight)
        shape = tuple(int(n) for n in reversed(tensor.shape))
        if shape != e.shape or tensor.tensor_type != e.kind:
            raise InputError(f"output: {path.name} read back: {name} is {tensor.tensor_type.name} {shape}")
        got = dequantize(tensor.data, tensor.tensor_type).reshape(e.shape).astype(np.float32)
        if not _alike(got, values, e.kind):
            raise InputError(f"output: {path.name} read back: {name} is not what was written")
        scale = float(np.abs(values).max(initial=0.0))
        worst = max(worst, float(np.abs(got - values).max(initial=0.0)) / scale if scale else 0.0)
    return f"{path.name} read back: {len(found)} tensors, weights within {worst:.2g} of each one's largest"


def _alike(got: np.ndarray, values: np.ndarray, kind: Kind) -> bool:
    if kind == Kind.F32:
        return np.array_equal(got, values)
    if kind == Kind.F16:
        return np.array_equal(got, values.astype(np.float16).astype(np.float32))
    if kind == Kind.Q8_0:
        blocks = np.abs(values).reshape(-1, GGML_QUANT_SIZES[kind][0])
        allowed = _STEP * blocks.max(axis=1, keepdims=True) + _LEAST
        return bool((np.abs(got - values).reshape(blocks.shape) <= allowed).all())
    far = float(np.square(got - values, dtype=np.float64).mean())
    return far <= _ROOT_MEAN_SQUARE**2 * float(np.square(values, dtype=np.float64).mean())
