"""Loading a trained model to look at it."""

import torch
from transformers import PreTrainedModel

from cdistill.train.build import load_student
from cdistill.train.config import resolve_folder


def load_for_evaluation(reference: str, key: str) -> PreTrainedModel:
    """Model of a folder or ``builtin:NAME`` in eval mode, on a GPU if any. Raises ValueError naming ``key``."""
    model = load_student(resolve_folder(reference, key), key)
    return model.eval().to("cuda" if torch.cuda.is_available() else "cpu")
