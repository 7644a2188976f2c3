"""Modules over the fused ops that drop into other people's trainers, and the names by which Liger and TRL know them."""

from cdistill.nn.head import DistillationHead, HeadLosses
from cdistill.nn.liger import LigerFusedLinearCrossEntropyLoss, LigerFusedLinearJSDLoss
from cdistill.nn.trl import generalized_jsd_loss

__all__ = [
    "DistillationHead",
    "HeadLosses",
    "LigerFusedLinearCrossEntropyLoss",
    "LigerFusedLinearJSDLoss",
    "generalized_jsd_loss",
]
