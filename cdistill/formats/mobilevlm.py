"""Checkpoints of MobileVLM, with a projector of two layers: those with LDP, which merges visual tokens, are refused."""

from __future__ import annotations

from cdistill.formats.flat import Kind, check_fields, read_flat
from cdistill.formats.source import Given, Source


def read(given: Given) -> Source:
    """A checkpoint of the whole model. Raises ValueError for fields that cannot be expressed."""
    if str(given.values.get("mm_projector_type")).startswith("ldp"):
        why = "it makes fewer visual tokens of an image by convolutions, as no LLaVA of transformers does"
        raise given.refused("mm_projector_type", why)
    check_fields(given, "linear")
    given.require("vision_tower_type", (None, "clip"), "MobileVLM has no other vision tower than clip")
    return read_flat(given, Kind("mobilevlm", "llama", ("clip_vision_model",), "vicuna_v1"))
