"""The transformers hook: SDPA makes a layer's output, and a recorder passed to the model sees its queries and keys.

A recorder may make the output itself, where alignment and attention share their passes.

Attention function and mask function are registered under one name, because transformers silently drops the padding mask
of a batch when an attention implementation has no mask function. The recorder travels as a keyword of the model's
forward pass, so the hook itself keeps no state::

    install(model)
    recorder = TeacherTargets(matches, regions, key_mask=batch["attention_mask"])
    model(**batch, cdistill_vat=recorder)
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from cdistill.vat.recorders import Recorder
from cdistill.vat.regions import require_on_device

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# transformers checks that a model supports SDPA when "sdpa" is part of the name
IMPLEMENTATION = "cdistill_vat_sdpa"
KEYWORD = "cdistill_vat"

# The (B, T) padding mask, kept on a (B, 1, T, T) mask that is causality and padding alone: the attention function could
# not tell that without reading T * T values.
_PADDING = "_cdistill_padding"
# The recorder's (B, T) sequence numbers, kept on a mask that has been found to be their packing.
_PACKING = "_cdistill_packing"

# Keywords by which transformers' models change the scores or the visible keys of a layer.
_UNSUPPORTED = {
    "softcap": "logit soft-capping",
    "s_aux": "attention sinks",
    "sinks": "attention sinks",
    "position_bias": "a position bias",
    "indices": "sparse key selection",
    "cache": "a paged cache",
}


def install(model: "PreTrainedModel") -> None:
    """Switch the text model of ``model`` to the hook; outputs stay those of SDPA, bit for bit, unless a recorder makes them.

    ``model`` is a Llava-like transformers model or a plain causal language model. A vision tower keeps its own
    attention. Installing twice is harmless, and the implementation is not part of a saved model. Raises ValueError for
    a text model that does not choose its attention through transformers' AttentionInterface or does not support SDPA.
    """
    _register()
    _switch(model, IMPLEMENTATION)


def uninstall(model: "PreTrainedModel", implementation: str = "sdpa") -> None:
    """Switch the text model back to one of transformers' own attention implementations."""
    _switch(model, implementation)


@contextmanager
def installed(model: "PreTrainedModel") -> Iterator["PreTrainedModel"]:
    """`install` for the duration of a ``with`` block; afterwards the text model has its previous implementation."""
    text_config = model.config.get_text_config(decoder=True)
    previous = text_config._attn_implementation
    install(model)
    try:
        yield model
    finally:
        uninstall(model, previous)


def _switch(model: "PreTrainedModel", implementation: str) -> None:
    from transformers import PreTrainedModel

    text_config = model.config.get_text_config(decoder=True)
    if text_config._attn_implementation == implementation:
        return
    text_model = next((m for m in model.modules() if isinstance(m, PreTrainedModel) and m.config is text_config), None)
    if text_model is None:
        raise ValueError(f"{type(model).__name__} has no submodule that owns its text configuration")
    if implementation == IMPLEMENTATION and not text_model._supports_sdpa:
        raise ValueError(
            f"{type(text_model).__name__} does not run on SDPA, because its attention is no plain softmax of q k^T (such as "
            "logit soft-capping or attention sinks), which visual attention alignment does not support"
        )
    text_model.set_attn_implementation(implementation)
    if text_config._attn_implementation != implementation:
        raise ValueError(
            f"{type(text_model).__name__} does not choose its attention through transformers' AttentionInterface; "
            "visual attention alignment needs a model that does"
        )


@cache
def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import causal_mask_function

    AttentionInterface.register(IMPLEMENTATION, _attention(AttentionInterface()["sdpa"]))
    AttentionMaskInterface.register(IMPLEMENTATION, _mask(AttentionMaskInterface()["sdpa"], causal_mask_function))


def _attention(sdpa: Callable[..., tuple[Tensor, None]]) -> Callable[..., tuple[Tensor, None]]:
    def attention(
        module: nn.Module,
        query: Tensor,  # (B, Hq, T, D)
        key: Tensor,  # (B, Hkv, T, D)
        value: Tensor,
        attention_mask: Tensor | None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        recorder = kwargs.pop(KEYWORD, None)
        if recorder is not None:
            out = _record(recorder, module, query, key, value, attention_mask, kwargs)
            if out is not None:
                return out.transpose(1, 2).contiguous(), None
        return sdpa(module, query, key, value, attention_mask, **kwargs)

    return attention


@torch.compiler.disable  # one code for all layers: a compiler would make one for each layer_idx that it reads here
def _record(
    recorder: Any,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    kwargs: dict[str, Any],
) -> Tensor | None:
    """Show a layer's queries and keys to the recorder if it wants them; the layer's attention if it has made that, too."""
    layer = getattr(module, "layer_idx", None)  # vision towers have none
    if layer is None:
        return None
    if not isinstance(recorder, Recorder):
        raise ValueError(f"{KEYWORD} must be a recorder of cdistill.vat, got {type(recorder).__name__}")
    if layer not in recorder.layers:
        return None
    sequence = getattr(recorder, "sequence", None)
    _require_plain_causal(layer, module, query, key, attention_mask, kwargs, packed=sequence is not None)
    if sequence is None:
        _require_same_padding(recorder.key_mask, getattr(attention_mask, _PADDING, None))
    else:
        _require_same_packing(sequence, query, attention_mask)
    out = recorder.record(layer, query, key, value, scale=kwargs.get("scaling"), causal=True)
    if out is not None and kwargs.get("dropout"):
        raise ValueError(f"layer {layer} uses attention dropout, which needs vat.engine sdpa")
    return out


def _mask(sdpa_mask: Callable[..., Tensor | None], causal: Callable[..., Any]) -> Callable[..., Tensor | None]:
    def mask(**kwargs: Any) -> Tensor | None:
        result = sdpa_mask(**kwargs)
        local_size = kwargs.get("local_size")
        # a window as wide as the sequence hides nothing; transformers forbids the skip where it overlays anything else
        wide = local_size is not None and kwargs["kv_length"] <= local_size and kwargs["allow_is_causal_skip"]
        if result is not None and (kwargs["mask_function"] is causal or wide):
            setattr(result, _PADDING, kwargs["attention_mask"])
        return result

    return mask


def _require_plain_causal(
    layer: int,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    attention_mask: Tensor | None,
    kwargs: dict[str, Any],
    *,
    packed: bool,
) -> None:
    """Raise ValueError unless the layer's attention is softmax(scale * q k^T) under causality and padding alone.

    The mask of ``packed`` samples is left to `_require_same_packing`.
    """

    def refuse(what: str) -> ValueError:
        return ValueError(f"layer {layer} uses {what}, which visual attention alignment does not support")

    for name, what in _UNSUPPORTED.items():
        if kwargs.get(name) is not None:
            raise refuse(what)
    is_causal = kwargs.get("is_causal")
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    if not is_causal or not getattr(getattr(module, "config", None), "is_causal", True):
        raise refuse("bidirectional attention")
    if query.shape[2] != key.shape[2]:
        raise refuse(f"a key-value cache ({query.shape[2]} queries, {key.shape[2]} keys)")
    if packed:
        return
    window = kwargs.get("sliding_window")
    if window is not None and window < key.shape[2]:
        raise refuse(f"a sliding window of {window} of {key.shape[2]} tokens")
    if attention_mask is not None and not hasattr(attention_mask, _PADDING):
        raise refuse(
            "a mask other than causality and padding (bidirectional images, a 4-D mask, or packed samples without "
            "cdistill.vat.packed_regions)"
        )


def _require_same_padding(key_mask: Tensor | None, padding: Tensor | None) -> None:
    """Raise ValueError unless recorder and model hide the same keys; on CUDA a device-side assertion (no sync)."""
    message = "key_mask of the recorder must be the attention_mask (B, T) of the model's forward pass"
    if key_mask is None and padding is None:
        return
    if key_mask is None or padding is None:
        given = padding if key_mask is None else key_mask
        assert given is not None
        same = given.all()
    elif key_mask.shape != padding.shape:
        raise ValueError(f"{message}, got {tuple(key_mask.shape)} for {tuple(padding.shape)}")
    else:
        same = (key_mask == padding.to(key_mask.device)).all()
    require_on_device(same, message)


def _require_same_packing(sequence: Tensor, query: Tensor, attention_mask: Tensor | None) -> None:
    """Raise ValueError unless the model's mask is causality within the sequences, (B, T), of each row and nothing else.

    Reads the T * T values of a mask, as making it did, once for all layers that share it. On CUDA a device-side assertion.
    """
    message = (
        "the model must keep the packed samples of the recorder apart: call it with their position_ids, with "
        "use_cache=False and without attention_mask"
    )
    if (query.shape[0], query.shape[2]) != sequence.shape:
        raise ValueError(f"the recorder has packed rows {tuple(sequence.shape)}, not {query.shape[0], query.shape[2]}")
    if attention_mask is None:  # plain causality
        require_on_device((sequence == 0).all(), message)
    elif getattr(attention_mask, _PACKING, None) is not sequence:
        batch, length = sequence.shape
        if attention_mask.dtype != torch.bool or attention_mask.shape != (batch, 1, length, length):
            raise ValueError(message)
        expected = (sequence[:, :, None] == sequence[:, None, :]).tril()[:, None]
        require_on_device((attention_mask == expected.to(attention_mask.device)).all(), message)
        setattr(attention_mask, _PACKING, sequence)
