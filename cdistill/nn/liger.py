"""Two of Liger's losses by its names, arguments and meanings, computed by `cdistill.ops.linear_distillation`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from cdistill.errors import InputError
from cdistill.nn.head import DistillationHead


class LigerFusedLinearJSDLoss(nn.Module):
    """weight_hard_loss * cross-entropy + weight_soft_loss * JSD, means over the labels that are not ignored.

    Args:
        weight_hard_loss, weight_soft_loss, beta, ignore_index, temperature, return_soft_hard_loss: as in Liger, whose
            temperature divides the logits of the divergence only.
        chunk_size: rows whose logits exist at a time; None chooses by memory.
        compiled: taken and not needed: nothing here is compiled.

    A teacher whose vocabulary is padded further than the student's is cut to the student's, where Liger pads the student with
    logits of 0.
    """

    def __init__(
        self,
        weight_hard_loss: float = 0.5,
        weight_soft_loss: float = 0.5,
        beta: float = 0.5,
        ignore_index: int = -100,
        temperature: float = 1.0,
        compiled: bool = True,
        chunk_size: int | None = None,
        return_soft_hard_loss: bool = False,
    ) -> None:
        super().__init__()
        self.return_soft_hard_loss = return_soft_hard_loss
        self.head = DistillationHead(
            ce_weight=weight_hard_loss,
            kd_weight=weight_soft_loss,
            divergence="jsd",
            beta=beta,
            temperature=temperature,
            ignore_index=ignore_index,
            chunk_size=chunk_size,
        )

    def forward(
        self,
        student_input: Tensor,
        student_weight: Tensor,
        teacher_input: Tensor,
        teacher_weight: Tensor,
        true_labels: Tensor,
        student_bias: Tensor | None = None,
        teacher_bias: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        """The loss, or with return_soft_hard_loss (loss, soft loss, hard loss), of inputs (N,H) and weights (V,H)."""
        found = self.head(
            student_input,
            student_weight,
            true_labels,
            bias=student_bias,
            teacher_hidden=teacher_input,
            teacher_weight=teacher_weight,
            teacher_bias=teacher_bias,
        )
        return (found.loss, found.kd, found.ce) if self.return_soft_hard_loss else found.loss


class LigerFusedLinearCrossEntropyLoss(nn.Module):
    """Cross-entropy from hidden states and the head's weight.

    Args:
        ignore_index, reduction ("mean", "sum", "none"), softcap: as in Liger.
        accum_dtype: taken and not needed: gradients are accumulated in fp32.
        ce_weight, lse_square_scale, label_smoothing, return_z_loss, use_token_scaling, return_token_accuracy,
            return_predicted_tokens: refused unless they are Liger's defaults.

    Raises:
        ValueError: one of those is set.
    """

    def __init__(
        self,
        ce_weight: Tensor | None = None,
        ignore_index: int = -100,
        lse_square_scale: float = 0.0,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
        softcap: float | None = None,
        return_z_loss: bool = False,
        accum_dtype: torch.dtype | None = None,
        use_token_scaling: bool = False,
        return_token_accuracy: bool = False,
        return_predicted_tokens: bool = False,
    ) -> None:
        super().__init__()
        given: dict[str, Any] = {
            "ce_weight": ce_weight is not None,
            "lse_square_scale": lse_square_scale,
            "label_smoothing": label_smoothing,
            "return_z_loss": return_z_loss,
            "use_token_scaling": use_token_scaling,
            "return_token_accuracy": return_token_accuracy,
            "return_predicted_tokens": return_predicted_tokens,
        }
        for name, value in given.items():
            if value:
                raise InputError(f"{name} is not supported: leave it as it is by default, or use Liger's own module")
        self.head = DistillationHead(
            kd_weight=0.0, ignore_index=ignore_index, reduction=reduction, student_logit_softcap=softcap
        )

    def forward(self, lin_weight: Tensor, _input: Tensor, target: Tensor, bias: Tensor | None = None) -> Tensor:
        """The loss of _input (N,H), lin_weight (V,H) and target (N,): (), or (N,) with reduction "none"."""
        return self.head(_input, lin_weight, target, bias=bias).loss
