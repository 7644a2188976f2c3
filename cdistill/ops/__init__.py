"""The fused ops: visual attention slices, their alignment losses, and distillation through the language-model head.

Importing this package imports torch, and neither triton nor the C++ module: a backend is loaded when it is first used.
"""

from cdistill.ops._engine import AttentionEngine
from cdistill.ops._engines import register_attention_engine
from cdistill.ops._problem import AttentionProblem
from cdistill.ops.attention_alignment import attention_alignment
from cdistill.ops.attention_relation import attention_relation
from cdistill.ops.attention_slice import attention_slice, attention_slice_accumulate
from cdistill.ops.attention_with_alignment import attention_with_alignment
from cdistill.ops.flash_attention import flash_attention
from cdistill.ops.linear_distillation import LinearDistillation, TokenLosses, linear_distillation, linear_token_losses
from cdistill.ops.slice_alignment import slice_alignment

__all__ = [
    "AttentionEngine",
    "AttentionProblem",
    "LinearDistillation",
    "TokenLosses",
    "attention_alignment",
    "attention_relation",
    "attention_slice",
    "attention_slice_accumulate",
    "attention_with_alignment",
    "flash_attention",
    "linear_distillation",
    "linear_token_losses",
    "register_attention_engine",
    "slice_alignment",
]
