"""The fused ops: visual attention slices, their alignment losses, and distillation through the language-model head.

Importing this package imports torch, and neither triton nor the C++ module: a backend is loaded when it is first used.
"""

from cdistill.ops.attention_alignment import attention_alignment
from cdistill.ops.attention_slice import attention_slice
from cdistill.ops.linear_distillation import LinearDistillation, linear_distillation

__all__ = ["LinearDistillation", "attention_alignment", "attention_slice", "linear_distillation"]
