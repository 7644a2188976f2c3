"""Students and teachers: LLaVA composition, teacher adapter fetch (TAF), the shared vision pass."""

from cdistill.models.llava import (
    TAFAdapter,
    TAFLlavaConfig,
    TAFLlavaForConditionalGeneration,
    compose,
    encode_images,
    merge_visual_tokens,
    share_vision,
    student_embeddings,
    teacher_embeddings,
)
from cdistill.models.pair import check_pair

__all__ = [
    "TAFAdapter",
    "TAFLlavaConfig",
    "TAFLlavaForConditionalGeneration",
    "check_pair",
    "compose",
    "encode_images",
    "merge_visual_tokens",
    "share_vision",
    "student_embeddings",
    "teacher_embeddings",
]
