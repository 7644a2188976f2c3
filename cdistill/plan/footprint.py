"""What the parts of a model hold while they run, read off the parts themselves as torch runs them on fake tensors.

Fake tensors have shapes, dtypes and lifetimes but no data: a decoder layer of any family, with or without autocast, LoRA,
gradient checkpointing and an alignment recorder, tells in a few milliseconds what it allocates, keeps and frees. What happens
inside registered ops (chunks of logits, gradients of slices) is not seen here; `cdistill.plan.memory` adds it.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface, AttentionMaskInterface

from cdistill.models.llava import features_of, image_size
from cdistill.models.load import Model
from cdistill.models.parts import language_model
from cdistill.models.taf import feature_width
from cdistill.vat import LayerMatch, Regions, StudentAlignment, TeacherLayers, hook, install

# The hook's attention under another name, whose mask function makes none: transformers reads the values of positions to tell
# whether samples are packed, and fake tensors have none.
IMPLEMENTATION = "cdistill_planned_sdpa"


class Footprint(NamedTuple):
    """Bytes that a computation holds beyond its parameters and inputs."""

    forward: int  # most, in its forward pass
    cached: int  # after its forward pass, autocast's copies of weights included
    kept: int  # once autocast has dropped what no backward pass needs
    backward: int  # most, in its backward pass, what it kept included


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that are made inside and still alive, and their maximum."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for value in tree_leaves((args, kwargs)):
            if isinstance(value, Tensor):  # older than this mode, unless it is known: its views are nothing new
                self._count(value.untyped_storage(), 0)
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                self._count(value.untyped_storage(), value.untyped_storage().nbytes())
        return result

    def _count(self, storage: torch.UntypedStorage, size: int) -> None:
        key = storage._cdata
        if key in self._known:
            return
        self._known[key] = size
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._gone, key)

    def _gone(self, key: int) -> None:
        self.now -= self._known.pop(key, 0)


def without_data(module: nn.Module, dtype: torch.dtype) -> Any:
    """A copy of a module on the meta device whose parameters are fake tensors on the CPU; inside `FakeTensorMode`."""
    with unset_fake_temporarily():
        module = copy.deepcopy(module)
    for part in module.modules():
        for name, p in part._parameters.items():
            if p is not None:
                part._parameters[name] = nn.Parameter(torch.empty(p.shape, dtype=dtype), requires_grad=p.requires_grad)
        for name, b in part._buffers.items():
            if b is not None:
                part._buffers[name] = torch.empty(b.shape, dtype=b.dtype)
    return module


@contextmanager
def _running(autocast: torch.dtype | None) -> Iterator[None]:
    """CPU's autocast casts what CUDA's does in these models."""
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        yield


def footprint(
    make: Callable[[], Callable[[], Sequence[Tensor]]], autocast: torch.dtype | None, *, trained: bool
) -> Footprint:
    """Footprint of the function that ``make`` returns, whose results are differentiated if ``trained``.

    Parameters and inputs are what ``make`` itself allocates.
    """
    with FakeTensorMode(allow_non_fake_inputs=True):
        function = make()
        with LiveBytes() as live, torch.set_grad_enabled(trained):
            with _running(autocast):
                results = function()
                forward, cached = live.most, live.now
            kept = live.most = live.now
            if trained:
                torch.autograd.backward(list(results), [torch.empty_like(x) for x in results])
            return Footprint(forward, cached, kept, live.most)


def prepare(model: Model) -> None:
    """Let the language model of a model be run by `decoder_footprint`."""
    install(model)
    AttentionInterface.register(IMPLEMENTATION, AttentionInterface()[hook.IMPLEMENTATION])
    AttentionMaskInterface.register(IMPLEMENTATION, lambda **_: None)
    hook.text_model_of(model).set_attn_implementation(IMPLEMENTATION)


def decoder_footprint(
    model: Model,
    layers: int,
    size: tuple[int, int],
    *,
    dtype: torch.dtype,
    autocast: torch.dtype | None,
    trained: bool,
    recorder: Callable[[], StudentAlignment] | None = None,
) -> Footprint:
    """Footprint of the first ``layers`` layers of a language model on embeddings of ``size`` (B, T), with its last norm."""

    def make() -> Callable[[], Sequence[Tensor]]:
        whole = language_model(model)
        part = copy.copy(whole)
        part._modules = dict(whole._modules) | {"layers": whole.layers[:layers]}
        decoder = without_data(part, dtype).train(trained)
        extra = {} if recorder is None else {hook.KEYWORD: recorder()}
        embeds = torch.empty(*size, whole.config.hidden_size, dtype=dtype, requires_grad=trained)

        def run() -> Sequence[Tensor]:
            hidden = decoder(inputs_embeds=embeds, use_cache=False, **extra).last_hidden_state
            return [hidden, *(loss for x in extra.values() for loss in x.losses().values())]

        return run

    return footprint(make, autocast, trained=trained)


def alignment_recorder(
    options: dict[str, Any], batch: int, rows: int, cols: int, heads: int, *, recomputes: bool, trained_target: bool
) -> StudentAlignment:
    """A recorder of layer 0 for a batch of fake tensors; ``heads`` 0 for their mean."""
    match, regions = (
        LayerMatch(0, (0,)),
        Regions(torch.empty(batch, rows, dtype=torch.int32), torch.empty(batch, cols, dtype=torch.int32)),
    )
    if recomputes:
        layers = TeacherLayers([match], regions, key_mask=None)
        q = torch.empty(batch, max(heads, 1), max(rows, cols), 16)
        layers.record(0, q, q, q, scale=None, causal=True)
        return StudentAlignment([match], regions, layers, key_mask=None, **options)
    target = torch.empty(batch, *([heads] if heads else []), rows, cols, requires_grad=trained_target)
    return StudentAlignment([match], regions, [target], key_mask=None, **options)


def encoder_footprint(model: Model, images: int, *, dtype: torch.dtype, autocast: torch.dtype | None) -> Footprint:
    """Footprint of the frozen vision encoder of a LLaVA, without gradient."""

    def make() -> Callable[[], Sequence[Tensor]]:
        tower, config = without_data(model.model.vision_tower, dtype), model.config.vision_config
        pixels = torch.empty(images, config.num_channels, *image_size(config))
        return lambda: [features_of(tower, model.config, pixels.to(dtype))]

    return footprint(make, autocast, trained=False)


def patch_footprint(
    model: Model, images: int, classes: int, *, dtype: torch.dtype, autocast: torch.dtype | None
) -> Footprint:
    """Footprint of a vision encoder that is trained on classes of patches (objective ``vision``)."""

    def make() -> Callable[[], Sequence[Tensor]]:
        tower, config = without_data(model.model.vision_tower, dtype), model.config.vision_config
        pixels = torch.empty(images, config.num_channels, *image_size(config), dtype=dtype)
        head = torch.empty(classes, feature_width(model.config), dtype=dtype, requires_grad=True)

        def run() -> Sequence[Tensor]:
            hidden = features_of(tower, model.config, pixels)
            return [F.linear(hidden, head).flatten(0, 1).float().log_softmax(-1)]

        return run

    return footprint(make, autocast, trained=True)


def logits_footprint(
    head: nn.Linear, rows: int, *, dtype: torch.dtype, hidden_dtype: torch.dtype, autocast: torch.dtype | None
) -> Footprint:
    """Footprint of the cross-entropy of ``rows`` whole rows of logits."""

    def make() -> Callable[[], Sequence[Tensor]]:
        linear = without_data(head, dtype)
        hidden = torch.empty(rows, head.in_features, dtype=hidden_dtype, requires_grad=True)
        targets = torch.empty(rows, dtype=torch.int64)
        return lambda: [F.cross_entropy(linear(hidden).float(), targets, reduction="sum")]

    return footprint(make, autocast, trained=True)
