"""What differs between model families: how visual tokens are marked, and which layers have softmax attention."""

from typing import Any

_VISUAL_TOKEN_NAMES = (("image_token_id", "image_token_index"), ("video_token_id", "video_token_index"))

# transformers' layer types. A "hybrid" layer has attention beside a recurrent state.
_ATTENTION_TYPES = frozenset(
    {
        "full_attention",
        "sliding_attention",
        "chunked_attention",
        "window_attention",
        "indexed_attention",
        "compressed_sparse_attention",
        "heavily_compressed_attention",
        "minimax_m3_sparse",
        "reference_sliding_attention",
        "hybrid",
        "hybrid_sliding",
        "attention",
    }
)
_OTHER_TYPES = frozenset({"linear_attention", "conv", "mamba", "moe"})


def visual_token_ids(model_or_config: Any) -> tuple[int, ...]:
    """Ids that stand for visual tokens in the ``input_ids`` of a multimodal transformers model: images, then videos.

    ``model_or_config`` is a model or its configuration, not that of its text model. Marks around images (start, end,
    tile numbers, separators) are not visual tokens; an image newline that is counted among the placeholders is.

    Raises ValueError where the configuration names neither.
    """
    config = getattr(model_or_config, "config", model_or_config)
    found = []
    for names in _VISUAL_TOKEN_NAMES:
        values = (getattr(config, name, None) for name in names)
        token = next((value for value in values if value is not None), None)
        if token is not None and token not in found:
            found.append(int(token))
    if not found:
        raise ValueError(
            f"{type(config).__name__} names no image_token_id or video_token_id; pass the ids of its visual tokens"
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
    if unknown := sorted(set(types) - _ATTENTION_TYPES - _OTHER_TYPES):
        raise ValueError(f"{type(text).__name__} has layers of unknown type {', '.join(unknown)}")
    return tuple(i for i, kind in enumerate(types) if kind in _ATTENTION_TYPES)
