"""What alignment asks of a model: its visual tokens, its layers with softmax attention, the positions of packed samples."""

from typing import Any

import torch
from torch import Tensor

from cdistill.errors import InputError
from cdistill.families import family_of
from cdistill.ops._contract import HEAD_DIMS, HEAD_DIMS_SAID


def visual_token_ids(model_or_config: Any) -> tuple[int, ...]:
    """Ids that stand for visual tokens in the ``input_ids`` of a multimodal transformers model: images, then videos.

    ``model_or_config`` is a model or its configuration, not that of its text model. Marks around images (start, end,
    tile numbers, separators) are not visual tokens; an image newline that is counted among the placeholders is.

    Raises ValueError where the configuration names neither.
    """
    config = getattr(model_or_config, "config", model_or_config)
    family, found = family_of(config), []
    for names in (family.image_token, family.video_token):
        values = (getattr(config, name, None) for name in names)
        token = next((value for value in values if value is not None), None)
        if token is not None and token not in found:
            found.append(int(token))
    if not found:
        raise InputError(
            f"{type(config).__name__} names no image_token_id or video_token_id; pass the ids of its visual tokens, or "
            "register its family (cdistill.register_family) with the names of their fields"
        )
    return tuple(found)


def attention_layers(model_or_config: Any) -> tuple[int, ...]:
    """0-based indices of the layers of the text model that have softmax attention, as their modules' ``layer_idx``.

    ``model_or_config`` is a transformers model or configuration, multimodal or text only. Layers of linear attention,
    convolutions and state spaces (Qwen3-Next, Qwen3.5, LFM2) have no attention matrix and do not count; layers whose
    attention the hook refuses, such as sliding windows, do.

    Raises ValueError for a layer type that is not known.
    """
    config = getattr(model_or_config, "config", model_or_config)
    text = config.get_text_config(decoder=True)
    types = getattr(text, "layer_types", None)
    if types is None:
        return tuple(range(text.num_hidden_layers))
    family = family_of(config)
    attention = {*family.attention_layers, *family.hybrid_layers}
    if unknown := sorted(set(types) - attention - set(family.other_layers)):
        raise InputError(
            f"{type(text).__name__} has layers of unknown type {', '.join(unknown)}; register the family of {text.model_type} "
            "(cdistill.register_family) with what they are"
        )
    return tuple(i for i, kind in enumerate(types) if kind in attention)


def check_heads(model_or_config: Any, side: str) -> None:
    """Raise ValueError, naming the ``side``, for a model whose queries have a head dim that the ops do not take.

    Queries of low rank (DeepSeek's latent attention) have fields of their own and are left to the ops.
    """
    config = getattr(model_or_config, "config", model_or_config)
    text = config.get_text_config(decoder=True)
    if getattr(text, "qk_nope_head_dim", None) is not None:
        return
    heads, given = text.num_attention_heads, getattr(text, "head_dim", None)
    width = given or text.hidden_size // heads
    if width not in HEAD_DIMS:
        made_of = "" if given else f", hidden_size {text.hidden_size} by num_attention_heads {heads}"
        raise InputError(
            f"{side}: attention can be compared of heads whose dim is {HEAD_DIMS_SAID}, and the {text.model_type}'s is {width}"
            f"{made_of}"
        )


def check_packable(model_or_config: Any) -> None:
    """Raise ValueError for a model with layers that carry a state from one packed sample into the next."""
    config = getattr(model_or_config, "config", model_or_config)
    types = getattr(config.get_text_config(decoder=True), "layer_types", None) or ()
    stateful = sorted(set(types) - set(family_of(config).attention_layers))
    if stateful:
        raise InputError(
            f"packing: {type(config).__name__} has layers of type {', '.join(stateful)}, whose state passes from a sample to "
            "the next in its row; pad instead"
        )


def packed_position_ids(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """The ``position_ids`` that a model needs to keep the packed samples of a batch apart.

    ``batch`` has ``input_ids`` and ``position_ids`` (B, T) that start at 0 with every sample (`cdistill.data.batches`), and for
    images what the processor gave, in order. Returns these position_ids, or (4, B, T) int64 for models with multimodal
    rotary embeddings: positions in the text, then those of time, height and width, which the model makes for every sample by
    itself. Costs several device synchronisations for these, so call it with tensors in host memory.
    """
    positions = batch["position_ids"]
    finder = next((module for module in model.modules() if hasattr(type(module), "get_rope_index")), None)
    if finder is None:
        return positions
    starts = (positions.flatten() == 0).nonzero()[:, 0]
    lengths = torch.diff(starts, append=starts.new_tensor([positions.numel()]))
    offsets = torch.arange(int(lengths.max()), device=positions.device)
    real = offsets < lengths[:, None]
    places = (starts[:, None] + offsets).clamp(max=positions.numel() - 1)  # (N, L): one row per sample
    types = batch.get("mm_token_type_ids", torch.zeros_like(batch["input_ids"]))
    found, _ = finder.get_rope_index(
        batch["input_ids"].flatten()[places],
        types.flatten()[places],
        image_grid_thw=batch.get("image_grid_thw"),
        video_grid_thw=batch.get("video_grid_thw"),
        attention_mask=real.long(),
    )
    return torch.cat((positions[None], found[:, real].view(3, *positions.shape)))
