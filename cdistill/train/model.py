"""Student and teacher as one module whose forward pass is the losses of a stage (SPEC section 4)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cdistill.data.builtin import IGNORE_INDEX
from cdistill.models.llava import Llava, shared_embeddings
from cdistill.models.load import Model, is_llava
from cdistill.models.taf import TAFAdapter
from cdistill.ops import linear_distillation
from cdistill.train.config import KDConfig
from cdistill.train.objectives import Objective
from cdistill.vat import VAT, LayerMatch, StudentAlignment, grounded_regions, install, layer_range
from cdistill.vat.hook import KEYWORD


class VocabularyLosses(nn.Module):
    """Cross-entropy and divergence from the hidden states of labelled tokens and the heads of both models.

    A module of its own, because ZeRO-3 gathers a parameter around the module that reads it: here once before all chunks,
    and not for the whole forward pass.
    """

    def __init__(self, kd: KDConfig) -> None:
        super().__init__()
        self.kd = kd

    def forward(
        self, hidden: Tensor, head: nn.Linear, teacher_hidden: Tensor, teacher_head: nn.Linear, labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Sums of L_ar and L_kd over labels (N,), of hidden (N,Hs) and teacher_hidden (N,Ht)."""
        device = hidden.device.type
        if torch.is_autocast_enabled(device):  # as for any linear layer; norms leave fp32 behind
            dtype = torch.get_autocast_dtype(device)
            hidden, teacher_hidden = hidden.to(dtype), teacher_hidden.to(dtype)
        result = linear_distillation(
            hidden,
            head.weight.to(hidden.dtype),
            teacher_hidden,
            teacher_head.weight.to(teacher_hidden.dtype),
            labels,
            divergence=self.kd.divergence,
            temperature=self.kd.temperature,
            beta=self.kd.beta,
            student_bias=head.bias,
            teacher_bias=teacher_head.bias,
            loss_weights=(1.0, self.kd.weight),
        )
        return result.ce, result.kd


# What some families do to logits after the head (Gemma, Cohere, Granite).
AFTER_THE_HEAD = ("final_logit_softcapping", "logit_scale", "logits_scaling")


def _require_plain_head(model: Model, side: str) -> None:
    """Raise ValueError unless the head is its weight and bias: `linear_distillation` would leave out what is more."""
    head, config = model.lm_head, model.config.get_text_config()
    for name in AFTER_THE_HEAD:
        if getattr(config, name, None) not in (None, 1, 1.0):
            raise ValueError(f"the {side}'s {name} {getattr(config, name)} is not supported by the KD loss")
    if type(head) is not nn.Linear:
        raise ValueError(
            f"the {side}'s lm_head must be a torch.nn.Linear for the KD loss, got {type(head).__module__}."
            f"{type(head).__qualname__}: leave lm_head out of LoRA's target_modules and out of quantisation"
        )


class DistillationModel(nn.Module):
    """The losses of one stage, as sums.

    Batches are padded on the right, so causality alone hides the padding from every real token and neither model needs
    a padding mask.

    Args:
        student: a LLaVA or a causal language model; the only thing registered as a submodule (beside the throw-away
            head of objective ``vision``), so that optimizer and checkpoints never see the teacher.
        objective: which losses.
        teacher: needed by ``kd`` and ``vat``; put into eval mode.
        vat: alignment of the two, None to leave that loss out.
        patch_classes: classes of each label that the throw-away head of ``vision`` predicts.

    Raises:
        ValueError: ``kd`` with a head that is more than a linear layer, such as one with LoRA or soft-capped logits.
    """

    def __init__(
        self,
        student: Model,
        objective: Objective,
        *,
        teacher: Llava | None = None,
        kd: KDConfig | None = None,
        vat: VAT | None = None,
        patch_classes: tuple[int, ...] = (),
    ) -> None:
        super().__init__()
        self.student: Model = student
        self.objective, self.kd, self.vat = objective, kd or KDConfig(), vat
        teacher = teacher if objective.distils else None
        self._teacher = (
            None if teacher is None else teacher.eval().requires_grad_(False),
        )  # a tuple hides it from nn.Module
        if "kd" in objective.losses:
            _require_plain_head(student, "student")
            _require_plain_head(teacher, "teacher")
            self.vocabulary_losses = VocabularyLosses(self.kd)
        if "patch" in objective.losses:
            self.patch_head = nn.Linear(student.config.vision_config.hidden_size, sum(patch_classes))
            self.patch_classes = list(patch_classes)
        if vat is not None:
            assert teacher is not None
            install(teacher)
        if vat is not None or "ground" in objective.losses:
            install(student)

    @property
    def teacher(self) -> Llava | None:
        """The teacher, if the stage has one."""
        return self._teacher[0]

    def forward(
        self,
        labels: Tensor,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        grounding: Tensor | None = None,
        places: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Losses of a batch: ``ar``, ``kd`` or ``patch`` summed over labels, ``vat``, ``vat_layers`` (L,) over samples.

        ``input_ids``, ``labels`` (not shifted, -100 outside the answers) and ``attention_mask`` are (B, T),
        ``pixel_values`` (I, 3, H, W); for objective ``vision`` only ``pixel_values`` and ``labels`` (I, V, 3) are taken.
        Objective ``ground`` also takes ``grounding`` (B, T, V) and ``places`` (B, V) and gives ``ground``, summed over samples.
        ``idle`` is a zero that keeps trained parameters without work in the graph: all ranks reduce the same gradients.
        """
        if "patch" in self.objective.losses:
            assert pixel_values is not None
            hidden = self.student.model.vision_tower(pixel_values, output_hidden_states=True).hidden_states
            logits = self.patch_head(hidden[self.student.config.vision_feature_layer])
            parts = logits.flatten(0, 1).float().split(self.patch_classes, 1)
            patch = [F.cross_entropy(p, y, reduction="sum") for p, y in zip(parts, labels.flatten(0, 1).T, strict=True)]
            return {"patch": torch.stack(patch).sum()}
        assert input_ids is not None
        answers = labels[:, 1:] != IGNORE_INDEX
        targets = labels[:, 1:][answers]
        student_embeds, teacher_embeds = self._embeddings(input_ids, pixel_values)
        losses: dict[str, Tensor] = {}
        teacher_recorder = student_recorder = None
        if "ground" in self.objective.losses:
            student_recorder = self._grounding(grounding, places)
        if self.vat is not None:
            image_token = self.student.config.image_token_id
            regions = self.vat.regions(input_ids, labels, attention_mask, visual_token_ids=image_token)
            if regions.cols.shape[1] and regions.rows.shape[1]:
                teacher_recorder = self.vat.teacher(regions, None)
        teacher_hidden = None
        if self.teacher is not None:
            with torch.no_grad():
                teacher_hidden = _hidden(self.teacher, teacher_embeds, teacher_recorder)[:, :-1][answers]
        if self.vat is not None and teacher_recorder is not None:
            student_recorder = self.vat.student(regions, teacher_recorder.targets, None)
        hidden = _hidden(self.student, student_embeds, student_recorder)[:, :-1][answers]
        head = self.student.lm_head
        if teacher_hidden is None:
            losses["ar"] = F.cross_entropy(head(hidden).float(), targets, reduction="sum")
        else:
            assert self.teacher is not None
            sums = self.vocabulary_losses(hidden, head, teacher_hidden, self.teacher.lm_head, targets)
            losses["ar"], losses["kd"] = sums
        if "ground" in self.objective.losses:
            assert student_recorder is not None
            losses["ground"] = torch.stack(list(student_recorder.losses().values())).mean(0).sum()
        if self.vat is not None:
            layers = torch.zeros(len(self.vat.matches), device=labels.device)
            losses["vat"] = layers.sum()
            if student_recorder is not None:
                per_layer = torch.stack(list(student_recorder.losses().values())).sum(1)
                losses["vat"] = per_layer.sum() if self.vat.config.layer_sum else per_layer.mean()
                layers = per_layer.detach()
            losses["vat_layers"] = layers
        if pixel_values is None and "adapter" in self.objective.trained and is_llava(self.student):
            losses["idle"] = self._idle_adapter()
        return losses

    def _grounding(self, grounding: Tensor | None, places: Tensor | None) -> StudentAlignment:
        """Aligns the visual understanding layers with what the words speak of, as VAT does with a teacher."""
        assert grounding is not None and places is not None
        depth = self.student.config.get_text_config().num_hidden_layers
        matches = [LayerMatch(layer, (layer,)) for layer in layer_range(depth, "intermediate")]
        regions, target = grounded_regions(grounding, places)
        return StudentAlignment(matches, regions, [target] * len(matches), key_mask=None)

    def _embeddings(self, input_ids: Tensor, pixel_values: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if is_llava(self.student):
            return shared_embeddings(self.student, self.teacher, input_ids, pixel_values)
        return self.student.get_input_embeddings()(input_ids), None

    def _idle_adapter(self) -> Tensor:
        adapter = self.student.model.multi_modal_projector
        layer: Any = adapter.map if isinstance(adapter, TAFAdapter) else adapter
        first = next(m for m in layer.modules() if isinstance(m, nn.Linear))
        return 0.0 * layer(first.weight.new_zeros(1, first.in_features)).float().sum()


def _hidden(model: Model, embeds: Tensor | None, recorder: Any) -> Tensor:
    """(B, T, d) last hidden states of the language model."""
    language = model.model.language_model if is_llava(model) else model.model
    extra = {} if recorder is None else {KEYWORD: recorder}
    return language(inputs_embeds=embeds, use_cache=False, **extra).last_hidden_state
