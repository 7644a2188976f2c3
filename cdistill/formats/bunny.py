"""Checkpoints of Bunny: SigLIP, all of whose positions are seen, or CLIP without its class token; the penultimate layer."""

from __future__ import annotations

from cdistill.formats.flat import PROJECTOR, Kind, check_fields, language_of, read_flat
from cdistill.formats.source import NOT_EXPRESSED, Given, Source

LANGUAGES = {"bunny-llama": "llama", "bunny-phi3": "phi3", "bunny-qwen2": "qwen2"}
REFUSED = {
    "bunny-phi": NOT_EXPRESSED["phi"],
    "bunny-minicpm": "it scales what each layer adds, which no language model of transformers does likewise",
    "bunny-stablelm": "its configuration is of a StableLM that lies beside it as code, with fields that transformers' has not",
}


def read(given: Given) -> Source:
    """A checkpoint of the whole model. Raises ValueError for fields that cannot be expressed."""
    language = language_of(given, LANGUAGES, REFUSED)
    check_fields(given, PROJECTOR)
    tower = str(given.values.get("mm_vision_tower", "")).lower()
    if "sig" in tower:
        towers, strategy = ("siglip_vision_model",), "full"
    elif "clip" in tower and "eva" not in tower:
        towers, strategy = ("clip_vision_model",), "default"
    else:
        raise given.refused("mm_vision_tower", "known vision towers are SigLIP and CLIP")
    prompt = "bunny_llama" if language == "llama" else "qwen2_base"
    return read_flat(given, Kind("bunny", language, towers, prompt, strategy, -2))
