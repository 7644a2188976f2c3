"""The primitives of the ops that run in Triton, in one place for whoever dispatches to them."""

from .alignment_loss import alignment_grad, alignment_loss
from .attention_slice import slice_accumulate, slice_forward
from .head_cosine import head_cosine, head_cosine_backward
from .lse_gradient import fold_dlse, unfold_dlse
from .regions import regions
from .row_lse import row_lse, row_lse_backward
from .slice_gradient import slice_backward
from .vocabulary_losses import vocabulary_losses

__all__ = [
    "alignment_grad",
    "alignment_loss",
    "fold_dlse",
    "head_cosine",
    "head_cosine_backward",
    "regions",
    "row_lse",
    "row_lse_backward",
    "slice_accumulate",
    "slice_backward",
    "slice_forward",
    "unfold_dlse",
    "vocabulary_losses",
]

SPLITS_LSE = FUSES_HEAD_COSINE = FUSES_ACCUMULATION = True
FUSES_DENOMINATOR = TAKES_FEWER_QUERIES = HAS_REVERSE_KL = False
