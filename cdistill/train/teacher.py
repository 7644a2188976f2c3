"""The frozen teacher of a stage: one module from inputs to hidden states of labelled tokens, however it is held in memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from cdistill.errors import InputError
from cdistill.models.llava import SharedVision, teacher_embeddings
from cdistill.models.load import Model
from cdistill.models.parts import head_of, language_model
from cdistill.models.taf import TAFAdapter
from cdistill.runtime.zero import is_partitioned, teacher_config
from cdistill.train.blank import with_blanks
from cdistill.vat import SequenceShards
from cdistill.vat.hook import KEYWORD

# Inputs of a batch that show a model no image or video.
TEXT_INPUTS = ("input_ids", "attention_mask", "position_ids", "mm_token_type_ids")


def hidden_states(model: Model, inputs: dict[str, Any], recorder: Any, shards: SequenceShards | None = None) -> Tensor:
    """(B, T, d) last hidden states of a language model or, with its own vision encoder, of a multimodal model.

    With ``shards`` those of the tokens that are this process's, from embeddings of all.
    """
    if shards is not None:
        inputs, recorder = shards.deal(model, inputs, recorder)
    extra = {} if recorder is None else {KEYWORD: recorder}
    if "inputs_embeds" in inputs:
        return language_model(model)(**inputs, use_cache=False, **extra).last_hidden_state
    with with_blanks(model, inputs) as inputs:
        if any(name not in TEXT_INPUTS for name in inputs):
            inputs = {name: _as_model(model, value) for name, value in inputs.items()}
        return model.model(**inputs, use_cache=False, **extra).last_hidden_state


def _as_model(model: Model, value: Any) -> Any:
    floating = isinstance(value, Tensor) and value.is_floating_point()
    return value.to(model.dtype) if floating else value


class Teacher(nn.Module):
    """A frozen teacher; a module of its own, so that an engine of DeepSpeed can hold it.

    Args:
        model: LLaVA, any multimodal model of transformers, or a causal language model.
        shares_vision: the images come as `SharedVision`, and the model's own vision encoder is never used.
        reads_apart: it has an encoding of the samples of its own (`cdistill.data.pairs`), and shares nothing.
    """

    def __init__(self, model: Model, *, shares_vision: bool, reads_apart: bool = False) -> None:
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        self.shares_vision, self.reads_apart = shares_vision and not reads_apart, reads_apart

    def drop_shared_parts(self, student: Model, *, adapter: bool = True) -> None:
        """Drop the shared vision encoder and, with TAF, the ``adapter``: the student has both, and nothing here uses them."""
        if not self.shares_vision:
            return
        self.model.model.vision_tower = None
        if adapter and isinstance(student.model.multi_modal_projector, TAFAdapter):
            self.model.model.multi_modal_projector = None

    @torch.no_grad()
    def forward(
        self,
        places: Tensor,
        recorder: Any,
        shared: SharedVision | None = None,
        shards: SequenceShards | None = None,
        **inputs: Any,
    ) -> Tensor:
        """(N, d_T) hidden states at the places (N,) of the batch's B * T tokens; ``recorder`` sees the attention.

        With ``shards`` the places are among the tokens that are this process's.
        """
        self._require_unsharded_root()
        self.eval()  # the student's train() reaches modules that the two have in common
        if self.shares_vision:
            inputs["inputs_embeds"] = teacher_embeddings(self.model, inputs.pop("input_ids"), shared)
        hidden = hidden_states(self.model, inputs, recorder, shards)
        return hidden.to(places.device).flatten(0, 1)[places]  # a device map may end on another device

    def _require_unsharded_root(self) -> None:
        """Raise ValueError if FSDP 2 gathers the head and embeddings around a call of the whole model, which is not made."""
        from torch.distributed.fsdp import FSDPModule

        if isinstance(self.model, FSDPModule):
            raise InputError(
                "the teacher is sharded as a whole by fully_shard, and its head is needed by itself: shard its decoder layers "
                "alone"
            )

    def train(self, mode: bool = True) -> Teacher:
        """Stay in eval mode."""
        return super().train(False)

    @contextmanager
    def head(self) -> Iterator[nn.Linear]:
        """The layer that makes logits, gathered if it is partitioned, loaded if it is offloaded."""
        head = head_of(self.model)
        if not is_partitioned(head):
            yield from _loaded(head)
            return
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(head.parameters())):
            yield head


def _loaded(layer: nn.Linear) -> Iterator[nn.Linear]:
    """The layer, with its weights while it is in use if accelerate has offloaded them."""
    hook: Any = getattr(layer, "_hf_hook", None)
    if not layer.weight.is_meta or hook is None:
        yield layer
        return
    hook.pre_forward(layer)
    try:
        yield layer
    finally:
        hook.post_forward(layer, None)


def partitioned(teacher: Teacher, *, precision: str, offload: bool) -> Any:
    """The teacher under a ZeRO-3 engine of its own: every process holds a part, layers are gathered as they run.

    With ``offload`` the parts lie in CPU memory. Every process must call it.
    """
    import deepspeed

    return deepspeed.initialize(model=teacher, config=teacher_config(precision=precision, offload=offload))[0]
