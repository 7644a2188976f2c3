"""Models whose language model's layers have 8 or 4 bits, by bitsandbytes."""

from __future__ import annotations

from typing import Any

import torch

from cdistill.errors import InputError
from cdistill.families import Family


def quantized(kind: str, dtype: torch.dtype, family: Family, key: str) -> Any:
    """What ``from_pretrained`` takes to load a model with layers of 8 or 4 bits.

    Head, adapter and vision encoder keep ``dtype``: losses over the vocabulary need the head's weight as it is. Raises
    ValueError, which begins with ``key``, if bitsandbytes is not installed.
    """
    from importlib.util import find_spec

    from transformers import BitsAndBytesConfig

    if find_spec("bitsandbytes") is None:
        raise InputError(f"{key} needs bitsandbytes: pip install cdistill[quantization]")
    visual = family.adapters + family.encoders
    whole = ["lm_head", *visual, *(rf".*\.{name}" for name in visual)]  # patterns match from the start
    if kind == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=whole)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype, llm_int8_skip_modules=whole
    )
