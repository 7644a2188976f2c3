"""Student and teacher as one module whose forward pass is the losses of a stage (SPEC section 4)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cdistill.choices import KDConfig
from cdistill.data.samples import IGNORE_INDEX
from cdistill.models.llava import Llava, SharedVision, share_vision, student_embeddings, vision_features
from cdistill.models.load import Model
from cdistill.models.pair import shares_encoder
from cdistill.models.parts import has_vision, head_of, part_of
from cdistill.models.taf import feature_width
from cdistill.ops import linear_distillation
from cdistill.runtime.zero import is_partitioned
from cdistill.train.blank import must_look
from cdistill.train.inside import inside, open_inside
from cdistill.train.objectives import Objective
from cdistill.train.teacher import Teacher, hidden_states
from cdistill.vat import (
    VAT,
    LayerDistances,
    LayerMatch,
    PackedRegions,
    StudentAlignment,
    attention_layers,
    grounded_regions,
    install,
    layer_range,
    visual_token_ids,
)


class VocabularyLosses(nn.Module):
    """Cross-entropy and divergence from the hidden states of labelled tokens and the heads of both models.

    A module of its own, because ZeRO-3 gathers a parameter around the module that reads it: here once before all chunks,
    and not for the whole forward pass.
    """

    def __init__(self, kd: KDConfig) -> None:
        super().__init__()
        self.kd = kd

    def forward(
        self,
        hidden: Tensor,
        head: nn.Linear,
        teacher_hidden: Tensor | None,
        teacher_head: nn.Linear | None,
        labels: Tensor,
        topk: tuple[Tensor, Tensor] | None = None,
        vocabulary: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Sums of L_ar and L_kd over labels (N,), of hidden (N,Hs) and teacher_hidden (N,Ht), or the teacher's ``topk``.

        The student's head counts as far as ``vocabulary``, beyond which it is padding for a teacher that is not here.
        """
        device = hidden.device.type
        if torch.is_autocast_enabled(device):  # as for any linear layer; norms leave fp32 behind
            dtype = torch.get_autocast_dtype(device)
            hidden = hidden.to(dtype)
            teacher_hidden = None if teacher_hidden is None else teacher_hidden.to(dtype)
        weight: Tensor = head.weight
        bias: Tensor | None = head.bias
        if vocabulary is not None and vocabulary < len(weight):
            weight, bias = weight[:vocabulary], None if bias is None else bias[:vocabulary]
        result = linear_distillation(
            hidden,
            weight.to(hidden.dtype),
            teacher_hidden,
            None if teacher_hidden is None or teacher_head is None else teacher_head.weight.to(teacher_hidden),
            labels,
            divergence=self.kd.divergence,
            temperature=self.kd.temperature,
            beta=self.kd.beta,
            student_bias=bias,
            teacher_bias=None
            if teacher_head is None or teacher_head.bias is None
            else teacher_head.bias.to(hidden.device),
            teacher_topk=topk,
            loss_weights=(1.0, self.kd.weight),
        )
        return result.ce, result.kd


# What some families do to logits after the head (Gemma, Cohere, Granite).
AFTER_THE_HEAD = ("final_logit_softcapping", "logits_soft_cap", "logit_scale", "logits_scaling")
# How transformers' mixtures of experts name the weight of the loss that balances their experts.
ROUTER_WEIGHTS = ("router_aux_loss_coef", "aux_loss_coef")
_WHOLE = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # dtypes whose values are the weights


def _require_plain_head(model: Model, side: str, *, linear: bool) -> None:
    """Raise ValueError unless logits are what the head gives, and (``linear``) the head its weight and bias.

    The losses are taken from the head itself, and would leave out what a model does to its logits afterwards.
    """
    head, config = head_of(model), model.config.get_text_config()
    for name in AFTER_THE_HEAD:
        if getattr(config, name, None) not in (None, 1, 1.0):
            raise ValueError(f"the {side}'s {name} {getattr(config, name)} is not supported")
    if linear and not (isinstance(head, nn.Linear) and type(head).forward is nn.Linear.forward):
        raise ValueError(
            f"the {side}'s lm_head must be a torch.nn.Linear for the KD loss, got {type(head).__module__}."
            f"{type(head).__qualname__}: leave lm_head out of LoRA's target_modules and modules_to_save and out of quantisation"
        )
    weight = head.weight
    if linear and not (type(weight).__module__.startswith("torch.") and weight.dtype in _WHOLE):
        raise ValueError(
            f"the {side}'s lm_head has a quantised weight ({type(weight).__qualname__}, {weight.dtype}): leave lm_head out of "
            "quantisation for the KD loss"
        )


def _require_body(model: Model, side: str) -> None:
    """Raise ValueError for a class whose hidden states cannot be read, or whose own loss has a term that is not here."""
    if not isinstance(getattr(model, "model", None), nn.Module):
        raise ValueError(
            f"the {side}'s class {type(model).__name__} has no submodule `model` that gives hidden states; take one of the "
            "README's families"
        )
    configs = (model.config, model.config.get_text_config())
    weights = [getattr(config, name, None) for config in configs for name in ROUTER_WEIGHTS]
    asked = any(getattr(config, "output_router_logits", False) for config in configs)
    if side == "student" and asked and any(weights):
        raise ValueError(
            "the student's output_router_logits asks for its experts' router loss (router_aux_loss_coef), which the losses "
            "here leave out; set output_router_logits to False in its configuration"
        )


class DistillationModel(nn.Module):
    """The losses of one stage, as sums.

    Two LLaVAs look at the images once, through the vision encoder they share (`cdistill.models.share_vision`); models of
    other families each look for themselves.

    Args:
        student: a multimodal or a causal language model; the only thing registered as a submodule (beside the throw-away
            head of objective ``vision``), so that optimizer and checkpoints never see the teacher.
        objective: which losses.
        teacher: needed by ``kd`` and ``vat`` unless batches hold what it gave; put into eval mode.
        vat: alignment of the two, None to leave that loss out.
        pads_right: batches are padded on the right, so causality alone hides the padding from every real token and neither
            model is given a padding mask.
        vocabulary: tokens of the teacher that batches hold the log-probabilities of, if they do.
        patch_classes: classes of each label that the throw-away head of ``vision`` predicts.
        visual_tokens: ids of the visual tokens, by default those that the student's configuration names.

    Raises:
        ValueError: logits that are more than the head gives (scaled, soft-capped), or for ``kd`` a head that is more than a
            linear layer, such as one with LoRA; a class without `model`; a student that asks for its router loss.
    """

    def __init__(
        self,
        student: Model,
        objective: Objective,
        *,
        teacher: Model | Teacher | None = None,
        kd: KDConfig | None = None,
        vat: VAT | None = None,
        pads_right: bool = True,
        vocabulary: int | None = None,
        patch_classes: tuple[int, ...] = (),
        visual_tokens: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self._teachers_vocabulary = vocabulary
        self.student: Model = student
        self.objective, self.kd, self.vat, self.pads_right = objective, kd or KDConfig(), vat, pads_right
        inner = getattr(teacher, "module", teacher)  # of an engine
        if teacher is not None and not isinstance(inner, Teacher):
            teacher = Teacher(teacher, shares_vision=shares_encoder(student, teacher))
        self._teacher = (teacher if objective.distils else None,)  # a tuple hides it from nn.Module
        if "ar" in objective.losses:
            _require_body(student, "student")
            if self.teacher is not None:
                _require_body(self.teacher.model, "teacher")
        self._require_plain_heads()
        if "kd" in objective.losses:
            self.vocabulary_losses = VocabularyLosses(self.kd)
        if "patch" in objective.losses:
            self.patch_head = nn.Linear(feature_width(student.config), sum(patch_classes))
            self.patch_classes = list(patch_classes)
        if vat is not None:
            if self.teacher is not None:
                install(self.teacher.model)
            self._visual_token_ids = visual_token_ids(student) if visual_tokens is None else tuple(visual_tokens)
        if vat is not None or "ground" in objective.losses:
            install(student)

    def _require_plain_heads(self) -> None:
        """Before every batch, too: what a caller holds may change."""
        if "ar" in self.objective.losses:
            _require_plain_head(self.student, "student", linear="kd" in self.objective.losses)
        if "kd" in self.objective.losses and self.teacher is not None:
            _require_plain_head(self.teacher.model, "teacher", linear=True)

    @property
    def teacher(self) -> Teacher | None:
        """The teacher, if the stage has one."""
        held = self._teacher[0]
        return getattr(held, "module", held)

    def forward(
        self,
        labels: Tensor,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        grounding: Tensor | None = None,
        places: Tensor | None = None,
        teacher_values: Tensor | None = None,
        teacher_indices: Tensor | None = None,
        teacher_targets: Tensor | None = None,
        counted: Tensor | None = None,
        **more: Tensor,
    ) -> dict[str, Tensor]:
        """Losses of a batch: ``ar``, ``kd`` or ``patch`` summed over labels, ``vat``, ``vat_layers`` (L,) over samples.

        ``input_ids``, ``labels`` (not shifted, -100 outside the answers) and ``attention_mask`` are (B, T),
        ``pixel_values`` (I, 3, H, W) for a LLaVA and whatever the processor makes for other families, as are ``more``; for
        objective ``vision`` only ``pixel_values`` and ``labels`` (I, V, 3) are taken.
        Objective ``ground`` also takes ``grounding`` (B, T, V) and ``places`` (B, V) and gives ``ground``, summed over samples.
        Samples packed into rows come with the ``position_ids`` that tell them apart, and without ``attention_mask``.
        ``samples`` is how many a batch holds: of padded ones those ``counted``, (B,) bool, where it is given, and ``vat`` is
        theirs. What a teacher gave earlier comes as ``teacher_values`` and ``teacher_indices``
        (N, K), its largest log-probabilities, and ``teacher_targets`` (L, B, [Hq,] R, V).
        ``idle`` is a zero that keeps an adapter without work in the graph; with several processes a micro-batch without
        images runs the vision path on a blank instead (`cdistill.train.blank`): all ranks reduce the same gradients.
        """
        if "patch" in self.objective.losses:
            assert pixel_values is not None
            return self._patches(pixel_values, labels)
        assert input_ids is not None
        labelled = _labelled(labels)
        key_mask = None if self.pads_right else attention_mask
        student_recorder: Any = None
        if "ground" in self.objective.losses:
            student_recorder = self._grounding(grounding, places)
        regions = self._regions(input_ids, labels, attention_mask, more, counted)
        seen, inputs = self._inputs(input_ids, key_mask, pixel_values, more)
        teacher_hidden: Tensor | None = None
        aligned_with: Any = teacher_targets
        if self._teacher[0] is not None:
            teacher_hidden, aligned_with = self._ask(labelled, regions, key_mask, seen, inputs)
        if self.vat is not None and aligned_with is not None:
            student_recorder = self.vat.student(regions, aligned_with, key_mask)
        hidden = self._student_hidden(inputs, seen, student_recorder).flatten(0, 1)[labelled]
        topk = None if teacher_values is None or teacher_indices is None else (teacher_values, teacher_indices)
        losses = self._vocabulary_losses(hidden, labels.flatten()[labelled + 1], teacher_hidden, topk)
        if "ground" in self.objective.losses:
            assert student_recorder is not None
            losses["ground"] = torch.stack(list(student_recorder.losses().values())).mean(0).sum()
        if self.vat is not None:
            losses |= self._alignment(student_recorder, losses["ar"])
            losses["samples"] = _count(regions, labels) if counted is None else counted.sum()
        if pixel_values is None and has_vision(self.student) and "adapter" in self.objective.trained:
            losses |= self._idle_adapter()
        return losses

    def _regions(
        self,
        input_ids: Tensor,
        labels: Tensor,
        attention_mask: Tensor | None,
        more: dict[str, Tensor],
        counted: Tensor | None = None,
    ) -> Any:
        """Rows and columns of a batch; its samples are packed where it has position ids and no padding mask."""
        if self.vat is None:
            return None
        ids = self._visual_token_ids
        if attention_mask is None and "position_ids" in more:
            return self.vat.packed_regions(input_ids, labels, more["position_ids"], visual_token_ids=ids)
        regions = self.vat.regions(input_ids, labels, attention_mask, visual_token_ids=ids)
        if counted is None:
            return regions
        return regions._replace(rows=regions.rows.masked_fill(~counted[:, None], -1))

    @property
    def vocabulary(self) -> int:
        """Tokens that both models know: the smaller of the two heads."""
        models = [self.student, *([] if self.teacher is None else [self.teacher.model])]
        return min(model.config.get_text_config(decoder=True).vocab_size for model in models)

    def _ask(
        self,
        labelled: Tensor,
        regions: Any,
        key_mask: Tensor | None,
        seen: SharedVision | None,
        inputs: dict[str, Any],
    ) -> tuple[Tensor, Any]:
        """The teacher's hidden states (N, Ht) and its recorder, None where there is nothing to align."""
        recorder = None
        if self.vat is not None and regions.cols.shape[1] and regions.rows.shape[1]:
            recorder = self.vat.teacher(regions, key_mask)
        assert self._teacher[0] is not None
        return self._teacher[0](labelled, recorder, seen, **inputs), recorder

    @torch.no_grad()
    def ask_teacher(
        self,
        labels: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        pixel_values: Tensor | None = None,
        **more: Tensor,
    ) -> tuple[Tensor, list[Tensor], Any]:
        """The teacher's hidden states (N, Ht) of labelled tokens, and VAT's targets with their regions."""
        key_mask = None if self.pads_right else attention_mask
        regions = self._regions(input_ids, labels, attention_mask, more)
        seen, inputs = self._inputs(input_ids, key_mask, pixel_values, more)
        hidden, recorder = self._ask(_labelled(labels), regions, key_mask, seen, inputs)
        return hidden, [] if recorder is None else recorder.targets, regions

    @torch.no_grad()
    def measure(
        self,
        distances: LayerDistances,
        labels: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        **more: Tensor,
    ) -> None:
        """Add a batch to the distances between layers that adaptive matching needs."""
        assert self.vat is not None
        regions = self._regions(input_ids, labels, attention_mask, more)
        key_mask = None if self.pads_right else attention_mask
        student, teacher = distances.student(regions, key_mask), distances.teacher(regions, key_mask)
        seen, inputs = self._inputs(input_ids, key_mask, pixel_values, more)
        assert self._teacher[0] is not None
        self._teacher[0](_labelled(labels), teacher, seen, **inputs)
        self._student_hidden(inputs, seen, student)
        distances.update(student, teacher)

    def _student_hidden(self, inputs: dict[str, Any], seen: SharedVision | None, recorder: Any) -> Tensor:
        """(B, T, d_S)."""
        if self._composed:
            inputs = dict(inputs)
            inputs["inputs_embeds"] = student_embeddings(self.student, inputs.pop("input_ids"), seen)
        return hidden_states(self.student, inputs, recorder)

    @property
    def _composed(self) -> bool:
        """Whether images are embedded here (`share_vision`), and not by the model itself."""
        return isinstance(self.student, Llava) and (self.teacher is None or self.teacher.shares_vision)

    def _inputs(
        self, input_ids: Tensor, key_mask: Tensor | None, pixel_values: Tensor | None, more: dict[str, Tensor]
    ) -> tuple[SharedVision | None, dict[str, Any]]:
        """What the models share of the images, and what each of them takes."""
        inputs: dict[str, Any] = {"input_ids": input_ids} | more
        if key_mask is not None:
            inputs["attention_mask"] = key_mask
        if self._composed:
            idle = pixel_values is None and (must_look(self.student) or self._teacher_is_partitioned())
            sizes = inputs.pop("image_sizes", None)
            return share_vision(self.student, pixel_values, sizes, idle=idle), inputs
        if pixel_values is not None:
            inputs["pixel_values"] = pixel_values
        return None, inputs

    def _teacher_is_partitioned(self) -> bool:
        return self.teacher is not None and is_partitioned(self.teacher)

    def _patches(self, pixel_values: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.patch_head(vision_features(self.student, pixel_values))
        parts = logits.flatten(0, 1).float().split(self.patch_classes, 1)
        patch = [F.cross_entropy(p, y, reduction="sum") for p, y in zip(parts, labels.flatten(0, 1).T, strict=True)]
        return {"patch": torch.stack(patch).sum()}

    def _vocabulary_losses(
        self, hidden: Tensor, targets: Tensor, teacher_hidden: Tensor | None, topk: tuple[Tensor, Tensor] | None
    ) -> dict[str, Tensor]:
        self._require_plain_heads()
        head = head_of(self.student)
        if "kd" not in self.objective.losses:
            return {"ar": F.cross_entropy(head(hidden).float(), targets, reduction="sum")}
        open_inside(head)  # what gathers its weight is a hook on its call
        if topk is not None:
            known = self._teachers_vocabulary
            ar, kd = head(hidden, **inside(lambda x: self.vocabulary_losses(x, head, None, None, targets, topk, known)))
            return {"ar": ar, "kd": kd}
        assert self.teacher is not None
        with self.teacher.head() as theirs:
            ar, kd = head(hidden, **inside(lambda x: self.vocabulary_losses(x, head, teacher_hidden, theirs, targets)))
        return {"ar": ar, "kd": kd}

    def count_samples(
        self,
        labels: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        counted: Tensor | None = None,
        **more: Tensor,
    ) -> Tensor:
        """How many samples a batch holds, as alignment is divided by them."""
        if counted is not None:
            return counted.sum()
        return _count(self._regions(input_ids, labels, attention_mask, more), labels)

    def _alignment(self, recorder: Any, ar: Tensor) -> dict[str, Tensor]:
        assert self.vat is not None
        if recorder is None:  # no sample has an image; ZeRO-3 wants equally many differentiable losses on all processes
            return {"vat": 0.0 * ar, "vat_layers": torch.zeros(len(self.vat.matches), device=ar.device)}
        per_layer = torch.stack(list(recorder.losses().values())).sum(1)
        total = per_layer.sum() if self.vat.config.layer_sum else per_layer.mean()
        return {"vat": total, "vat_layers": per_layer.detach()}

    def _grounding(self, grounding: Tensor | None, places: Tensor | None) -> StudentAlignment:
        """Aligns the visual understanding layers with what the words speak of, as VAT does with a teacher."""
        assert grounding is not None and places is not None
        layers = layer_range(attention_layers(self.student), "intermediate")
        matches = [LayerMatch(layer, (layer,)) for layer in layers]
        regions, target = grounded_regions(grounding, places)
        return StudentAlignment(matches, regions, [target] * len(matches), key_mask=None)

    def _idle_adapter(self) -> dict[str, Tensor]:
        """A zero that gives the adapter gradients of 0 in a single process, where the vision path need not run for it."""
        if must_look(self.student) or (self._composed and self._teacher_is_partitioned()):
            return {}  # it has looked at a blank
        named = self.student.named_parameters()
        trained = [p for name, p in named if p.requires_grad and part_of(name) == "adapter"]
        return {"idle": 0.0 * torch.stack([p.float().sum() for p in trained]).sum()} if trained else {}


def _labelled(labels: Tensor) -> Tensor:
    """(N,) int64 places, in the batch's B * T tokens, of those whose next token is labelled."""
    return F.pad(labels[:, 1:] != IGNORE_INDEX, (0, 1)).flatten().nonzero().squeeze(1)


def _count(regions: Any, labels: Tensor) -> Tensor:
    """How many samples a batch holds; of what is packed, those with a label: what fills up a row has none."""
    if not isinstance(regions, PackedRegions):
        return torch.full((), len(labels), device=labels.device)
    before = F.pad((labels != IGNORE_INDEX).cumsum(1), (1, 0))
    row, start, stop = torch.tensor(regions.samples, device=labels.device).unbind(1)
    return (before[row, stop] > before[row, start]).sum()
