"""Students and teachers: LLaVA composition, teacher adapter fetch (TAF), the shared vision pass."""

from cdistill.models.llava import (
    TAFAdapter,
    TAFLlavaConfig,
    TAFLlavaForConditionalGeneration,
    check_pair,
    compose,
    encode_images,
    merge_visual_tokens,
    shared_embeddings,
)

__all__ = [
    "TAFAdapter",
    "TAFLlavaConfig",
    "TAFLlavaForConditionalGeneration",
    "check_pair",
    "compose",
    "encode_images",
    "merge_visual_tokens",
    "shared_embeddings",
]
