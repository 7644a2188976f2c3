"""Students and teachers: LLaVA composition, teacher adapter fetch (TAF), the shared vision pass."""

from cdistill.models.llava import (
    compose,
    encode_images,
    merge_visual_tokens,
    register,
    share_vision,
    student_embeddings,
    teacher_embeddings,
)
from cdistill.models.pair import check_pair
from cdistill.models.taf import MergedAdapter, TAFAdapter, TAFLlavaConfig, TAFLlavaForConditionalGeneration

__all__ = [
    "MergedAdapter",
    "TAFAdapter",
    "TAFLlavaConfig",
    "TAFLlavaForConditionalGeneration",
    "check_pair",
    "compose",
    "encode_images",
    "merge_visual_tokens",
    "register",
    "share_vision",
    "student_embeddings",
    "teacher_embeddings",
]

register()
