"""`cdistill.distill`: the losses of CompoDistill for people with their own trainer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from cdistill.data.builtin import IGNORE_INDEX
from cdistill.models.load import Model
from cdistill.models.pair import check_pair, shares_encoder
from cdistill.models.parts import part_of
from cdistill.train.config import KDConfig
from cdistill.train.model import DistillationModel
from cdistill.train.objectives import Objective
from cdistill.train.teacher import Teacher
from cdistill.vat import VAT, VATConfig, attention_layers


class Distillation(nn.Module):
    """Two models as one module from a batch to its losses; made by `cdistill.distill`.

    Its parameters are the student's alone: hand it to an optimizer, an accelerator or an engine in the student's place.
    The student is ``distillation.student``.
    """

    def __init__(self, losses: DistillationModel, student: Model, *, vat_weight: float) -> None:
        super().__init__()
        self.losses, self.vat_weight = losses, vat_weight
        self._given = (student,)  # a tuple hides it from nn.Module, which has its layers already

    @property
    def student(self) -> Model:
        """The trained model, as it was given."""
        return self._given[0]

    def forward(self, batch: Mapping[str, Tensor] | None = None, **inputs: Tensor) -> dict[str, Tensor]:
        """The losses of a batch, given as a mapping or as keywords.

        Args:
            batch: what the models' processor made, for both models: ``input_ids`` and ``attention_mask`` (B, T), padded on
                either side, pixel values and whatever else the family takes; and ``labels`` (B, T), not shifted, -100 outside
                the answers. Samples packed into rows come without ``attention_mask`` but with the ``position_ids`` that tell
                them apart (`cdistill.vat.packed_regions`), and with labels -100 at their first tokens.

        Returns:
            fp32 scalars ``loss`` = ar + kd.weight * kd + vat_weight * vat, to be differentiated, and its terms: ``ar`` and
            ``kd`` in nats, means over the labels of the batch, ``vat``, the mean over its samples (those without image count
            0); ``vat_layers`` (L,), detached, vat of every matched student layer.

        Raises:
            ValueError: labels or input_ids are missing.
        """
        given = {**(batch or {}), **inputs}
        for name in ("input_ids", "labels"):
            if given.get(name) is None:
                raise ValueError(f"{name} must be in the batch")
        self._follow(given["input_ids"].device)
        sums = self.losses(**given)
        labels = given["labels"]
        tokens = (labels[:, 1:] != IGNORE_INDEX).sum().clamp(min=1)
        result = {name: sums[name] / tokens for name in ("ar", "kd") if name in sums}
        result |= {name: sums[name] / sums["samples"] for name in ("vat", "vat_layers") if name in sums}
        weights = {"ar": 1.0, "kd": self.losses.kd.weight, "vat": self.vat_weight}
        terms = [result[name] * weight for name, weight in weights.items() if name in result]
        return {"loss": torch.stack([*terms, sums["idle"]] if "idle" in sums else terms).sum()} | result

    def _follow(self, device: torch.device) -> None:
        """Bring the teacher to the batch: an accelerator moves the student alone."""
        model: Any = self.losses.teacher and self.losses.teacher.model
        held = getattr(model, "is_quantized", False) or getattr(model, "hf_device_map", None)
        if model is not None and not held and model.device != device:
            model.to(device)


def distill(
    teacher: Model,
    student: Model,
    *,
    vat: VATConfig | VAT | None = None,
    kd: KDConfig | None = None,
    vat_weight: float = 1.0,
) -> Distillation:
    """Wrap a teacher and a student for training with any loop (SPEC section 4: L_ar + L_kd + L_vat)::

        distillation = cdistill.distill(teacher, student)
        losses = distillation(batch)
        losses["loss"].backward()

    The teacher is frozen, put into eval mode and follows the batches to their device; what of the student is trained is up to
    the caller. Two LLaVAs with one vision encoder, frozen, look at the images once; other models each look for themselves.

    Args:
        teacher, student: multimodal models of transformers with one tokenizer and one image processor, in whatever dtypes;
            either may be a peft model.
        vat: visual attention alignment (paper section 4.1), by default `VATConfig()`; a `VAT` for adaptive matching.
        kd: divergence over the vocabulary and its weight, by default `KDConfig()`; with weight 0 it is left out.
        vat_weight: weight of the alignment; with 0 it is left out.

    Raises:
        ValueError: the models cannot be distilled: other visual tokens or vocabularies, attention that cannot be aligned,
            layers that cannot be matched, a head that is more than a linear layer.
    """
    for name, value in (("vat_weight", vat_weight), ("kd.weight", (kd or KDConfig()).weight)):
        if not 0 <= value < float("inf"):
            raise ValueError(f"{name} must be at least 0 and finite, got {value}")
    kd = kd or KDConfig()
    given = student
    # A peft model's layers are in the model that it wraps.
    student, teacher = (m.get_base_model() if hasattr(m, "get_base_model") else m for m in (student, teacher))
    check_pair(student, teacher)
    used = {"ar": True, "kd": kd.weight > 0, "vat": vat_weight > 0}
    aligned = vat if isinstance(vat, VAT) else None
    if aligned is None and used["vat"]:
        assert not isinstance(vat, VAT)
        aligned = VAT(vat or VATConfig(), attention_layers(student), attention_layers(teacher))
    model = DistillationModel(
        student,
        Objective(tuple(name for name, is_used in used.items() if is_used), ("language", "adapter")),
        teacher=Teacher(teacher, shares_vision=shares_encoder(student, teacher) and _is_frozen(student)),
        kd=kd,
        vat=aligned if used["vat"] else None,
        pads_right=False,
    )
    return Distillation(model, given, vat_weight=vat_weight)


def _is_frozen(student: Model) -> bool:
    """Whether nothing is trained of what a LLaVA would share with its teacher."""
    shared = [p for name, p in student.named_parameters() if part_of(name) in ("vision", "fetched")]
    return not any(p.requires_grad for p in shared)
