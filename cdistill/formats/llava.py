"""Checkpoints of LLaVA itself, 1.5 and 1.6: CLIP, a projector of two layers, and with 1.6 images in tiles."""

from __future__ import annotations

import ast
from dataclasses import replace
from pathlib import Path

from transformers import LlavaNextConfig

from cdistill.formats.flat import Kind, check_fields, language_of, read_flat
from cdistill.formats.source import Given, Source

LANGUAGES = {"llava": "llama", "llava_llama": "llama", "llava_mistral": "mistral"}
_MARK = "<|im_end|>"  # of ChatML, which LLaVA-1.6-34B speaks


def read(given: Given) -> Source:
    """A checkpoint of the whole model. Raises ValueError for fields that cannot be expressed."""
    language = language_of(given, LANGUAGES, {})
    check_fields(given, "linear")
    prompt = "mistral_instruct" if language == "mistral" else "vicuna_v1"
    if _is_chatml(given.folder):
        prompt = "chatml_direct"
    kind = Kind("llava", language, ("clip_vision_model",), prompt)
    why = "transformers' LLaVA-NeXT puts tiles together as spatial_unpad alone, its LLaVA has none (flat)"
    if given.require("mm_patch_merge_type", (None, "flat", "spatial_unpad"), why) == "spatial_unpad":
        fields = {"image_grid_pinpoints": _pinpoints(given)}
        kind = replace(kind, ratios=("anyres",), config=LlavaNextConfig, fields=fields)
    return read_flat(given, kind)


def _pinpoints(given: Given) -> list[list[int]]:
    """Heights and widths of images in tiles, of LLaVA's widths and heights, which may stand in a text."""
    said = given.values.get("image_grid_pinpoints")
    try:
        points = ast.literal_eval(said) if isinstance(said, str) else said
        return [[int(height), int(width)] for width, height in points]  # type: ignore[union-attr]
    except (ValueError, TypeError, SyntaxError):
        raise given.refused("image_grid_pinpoints", "it must list widths and heights") from None


def _is_chatml(folder: Path) -> bool:
    """Whether the tokenizer knows the tokens of ChatML, which Vicuna's does not."""
    files = (folder / name for name in ("added_tokens.json", "tokenizer_config.json", "special_tokens_map.json"))
    return any(_MARK in path.read_text(encoding="utf-8", errors="replace") for path in files if path.is_file())
