"""What each stage trains and by which losses: one table, and the function that freezes everything else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Objective:
    """Losses of a stage (patch, ar, ground, kd, vat) and the parts it trains (vision, language, adapter)."""

    losses: tuple[str, ...]
    trained: tuple[str, ...]

    @property
    def distils(self) -> bool:
        """Whether a loss needs the teacher."""
        return "kd" in self.losses or "vat" in self.losses


# `adapter` is the light map alone where the teacher's adapter is fetched (TAF), the whole adapter elsewhere.
OBJECTIVES = {
    "vision": Objective(("patch",), ("vision",)),
    "text": Objective(("ar",), ("language",)),
    "ground": Objective(("ar", "ground"), ("language", "adapter")),
    "pt": Objective(("ar",), ("adapter",)),
    "dpt": Objective(("ar", "kd"), ("adapter",)),
    "dft": Objective(("ar", "kd", "vat"), ("language", "adapter")),
    "sft": Objective(("ar",), ("language", "adapter")),
}


def set_trained(student: Any, objective: Objective) -> None:
    """Let the objective's parts of a model take gradients, and nothing else; of a language model with LoRA, that alone."""
    import torch

    from cdistill.models.llava import image_size, vision_features
    from cdistill.models.parts import part_of

    parts = {name: part_of(name) for name, _ in student.named_parameters()}
    trained = set(objective.trained)
    if "language" in trained and "lora" in parts.values():
        trained = trained - {"language"} | {"lora"}
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(parts[name] in trained)
    if "vision" in objective.trained:
        # Layers above the one whose features are used get no gradient, yet under ZeRO weight decay would move them.
        tower = student.model.vision_tower.requires_grad_(True)
        vision = student.config.vision_config
        pixels = next(tower.parameters()).new_zeros(1, vision.num_channels, *image_size(vision))
        features = vision_features(student, pixels)
        parameters = list(tower.parameters())
        for p, gradient in zip(
            parameters, torch.autograd.grad(features.sum(), parameters, allow_unused=True), strict=True
        ):
            p.requires_grad_(gradient is not None)
