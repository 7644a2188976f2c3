"""Students as llama.cpp loads them: the language model in one GGUF file, the encoder and its adapter (`mmproj`) in another."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from cdistill.errors import InputError

if TYPE_CHECKING:
    from cdistill.models.export import Exported

QUANTIZE = ("f16", "q8_0", "q4_0", "q4_k_m")  # number formats of the language model's matrices


def export_gguf(model: str | Path, output: str | Path, *, quantize: str = "f16", check: bool = False) -> Exported:
    """Write a model as ``model-QUANTIZE.gguf`` and, of one with an encoder, ``mmproj-f16.gguf``, atomically.

    A LoRA adapter and a linear TAF map are merged as by `cdistill.models.export.export`; llama.cpp's projector ``mlp`` has an
    inner width of its own, so that a merged TAF adapter is one.

    Args:
        model: as for `cdistill.models.export.export`.
        output: a folder that does not exist or is empty.
        quantize: of the language model's matrices: ``f16``, ``q8_0`` (blocks of 32 in 8 bits), ``q4_0`` (layers in 4 bits,
            embeddings and output in 8) or ``q4_k_m`` (llama.cpp's mixture of 4 and 6 bits, packed by llama.cpp itself). Vectors
            are fp32, the encoder's matrices fp16. Layers that a stage has rounded to q8_0 or q4_0 keep their numbers.
        check: before the folder gets its name, read the files back and compare every tensor with the model's, and where
            xllamacpp is installed, let llama.cpp answer a question and compare that.

    Raises:
        ValueError: as `cdistill.models.export.export`; or a package is missing, or llama.cpp has nothing that a field of the
            model asks for.
    """
    if quantize not in QUANTIZE:
        raise InputError(f"quantize must be one of {', '.join(QUANTIZE)}, got {quantize!r}")
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise InputError("format gguf needs the package gguf: pip install 'cdistill[gguf]'") from None
    from cdistill.models.gguf.writing import write_model

    return write_model(model, Path(output), quantize, check=check)
