"""Families of models: one table of what cdistill must know of a model type of transformers, one row for each that differs.

Most is read off a model. `COMMON` has the names that many families share, and holds for every model, with a row or without.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

from cdistill._plugins import import_plugins, registers_everywhere
from cdistill.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

Names = tuple[str, ...]


@dataclass(frozen=True)
class Family:
    """What a model type of transformers calls by names of its own. Every field adds to what `COMMON` says.

    A multimodal model has the rows of all its parts: its own, its language model's, its vision encoder's.

    Attributes:
        model_type: ``model_type`` of the configuration.
        image_token, video_token: fields of the configuration with the id of a visual token; the first that is set counts.
        visual_fields: fields of the configuration that decide how many visual tokens an image becomes, equal in student
            and teacher. Those of ``image_token`` and ``video_token`` are, too.
        encoder_fields: the same of its ``vision_config``.
        adapters: modules between encoder and language model, by one component of their dotted names.
        encoders: modules that encode images, videos or sound; a module inside one that is named in ``adapters`` is an adapter.
        attention_layers: values of ``layer_types`` for layers of softmax attention alone.
        hybrid_layers: for those that have a recurrent state beside it.
        other_layers: for those without softmax attention.
        refused_keywords: keywords by which layers hand attention what changes scores or visible keys, and what that is
            called in the error that says so.
        logit_fields: fields of the text configuration by which logits are changed after the head, each a "factor", a
            "divisor", or a "softcap" c of c tanh(logits / c), which comes last; None and 1 change nothing.
        own_head: what a model does between its decoder and its head, or to its logits, that no field stands for; losses
            cannot be taken from its hidden states then, and it is refused.
        router_fields: fields with the weight of a loss that balances experts.
        blank: the smallest image (``"image"``) or video (``"video"``) that a model takes, as keywords of its forward pass
            on the CPU, not 0; needed where `cdistill.train.blank` makes another one than the family takes.

    Raises:
        ValueError: a field of the wrong type.
    """

    model_type: str
    image_token: Names = ()
    video_token: Names = ()
    visual_fields: Names = ()
    encoder_fields: Names = ()
    adapters: Names = ()
    encoders: Names = ()
    attention_layers: Names = ()
    hybrid_layers: Names = ()
    other_layers: Names = ()
    refused_keywords: Mapping[str, str] = field(default_factory=dict)
    logit_fields: Mapping[str, str] = field(default_factory=dict)
    own_head: str = ""
    router_fields: Names = ()
    blank: Callable[[Any, Literal["image", "video"]], dict[str, Tensor]] | None = None

    def __post_init__(self) -> None:
        where = f"family {self.model_type!r}"
        if not isinstance(self.model_type, str) or not self.model_type:
            raise InputError(f"{where}: model_type must be a model type of transformers, such as 'internvl'")
        for name in _NAMES:
            value = getattr(self, name)
            if not isinstance(value, tuple) or not all(isinstance(one, str) and one for one in value):
                raise InputError(f"{where}: {name} must be a tuple of names, got {value!r}")
        said = self.refused_keywords
        if not isinstance(said, Mapping) or not all(isinstance(text, str) for pair in said.items() for text in pair):
            raise InputError(f"{where}: refused_keywords must say of each keyword what it is, got {said!r}")
        kinds = self.logit_fields
        if not isinstance(kinds, Mapping) or not set(kinds.values()) <= {"factor", "divisor", "softcap"}:
            raise InputError(f"{where}: logit_fields must say factor, divisor or softcap of each field, got {kinds!r}")
        if self.blank is not None and not callable(self.blank):
            raise InputError(f"{where}: blank must be a function, got {self.blank!r}")


_MAPPINGS = ("refused_keywords", "logit_fields")
_NAMES = tuple(f.name for f in fields(Family) if f.type == "Names")

COMMON = Family(
    "any",
    image_token=("image_token_id", "image_token_index"),
    video_token=("video_token_id", "video_token_index"),
    visual_fields=(
        "image_token_id",
        "video_token_id",
        "image_seq_length",
        "vision_feature_select_strategy",
        "vision_aspect_ratio",
        "image_grid_pinpoints",
        "scale_factor",
        "downsample_ratio",
    ),
    encoder_fields=("image_size", "patch_size", "spatial_merge_size", "temporal_patch_size"),
    adapters=("multi_modal_projector", "connector", "merger", "deepstack_merger_list", "image_newline"),
    encoders=("vision_tower", "visual", "vision_model", "vision_encoder", "image_tower"),
    attention_layers=(
        "full_attention",
        "sliding_attention",
        "chunked_attention",
        "window_attention",
        "indexed_attention",
        "attention",
    ),
    hybrid_layers=("hybrid", "hybrid_sliding"),
    other_layers=("linear_attention", "conv", "mamba", "moe"),
    # A name that any family may come to use, and whose effect would be left out in silence, stands here and in no row.
    refused_keywords={
        "softcap": "logit soft-capping",
        "s_aux": "attention sinks",
        "sinks": "attention sinks",
        "position_bias": "a position bias",
        "indices": "sparse key selection",
        "block_indices": "sparse key selection",
        "cache": "a paged cache",
    },
    logit_fields={
        "logit_scale": "factor",
        "lm_head_multiplier": "factor",
        "logits_scaling": "divisor",
        "final_logit_softcapping": "softcap",
        "logits_soft_cap": "softcap",
    },
    router_fields=("router_aux_loss_coef", "aux_loss_coef"),
)

_ROWS: tuple[Family, ...] = (
    Family(
        "blip-2",
        adapters=("language_projection", "qformer", "query_tokens"),
        own_head="has no decoder apart from its head",
    ),
    Family("chameleon", own_head="leaves the tokens of images out of its logits"),
    Family("cosmos3_edge", adapters=("projector",)),
    Family("deepseek_ocr2", adapters=("view_separator",)),
    Family("deepseek_v4", attention_layers=("compressed_sparse_attention", "heavily_compressed_attention")),
    Family("deepseek_vl", adapters=("aligner",)),
    Family(
        "deepseek_vl_hybrid",
        adapters=("aligner",),
        encoders=("high_res_vision_neck", "high_res_vision_proj", "high_res_vision_alpha"),
    ),
    Family("dots3_note", encoders=("audio_tower",)),
    Family("ernie4_5_vl_moe", adapters=("resampler_model",)),
    Family("gemma3n", adapters=("embed_vision", "embed_audio"), encoders=("audio_tower",)),
    Family("gemma4", adapters=("embed_vision", "embed_audio"), encoders=("audio_tower",)),
    Family("gemma4_unified", adapters=("embed_vision", "embed_audio")),
    Family("granite4_vision", adapters=("layerwise_projectors", "spatial_projectors")),
    Family("hyperclovax_vision_v2", adapters=("projector",)),
    Family("inkling_mm_model", encoders=("audio_tower",), own_head="scales hidden states before its head"),
    Family("instructblip", adapters=("language_projection", "qformer", "query_tokens")),
    Family("instructblipvideo", adapters=("language_projection", "qformer", "query_tokens")),
    Family(
        "janus",
        adapters=("aligner",),
        encoders=("vqmodel", "generation_embeddings", "generation_aligner", "generation_head"),  # for images it makes
    ),
    Family("kimi_k25", adapters=("mm_projector",)),
    Family("kosmos-2", adapters=("image_to_text_projection",)),
    Family("kosmos-2.5", adapters=("image_to_text_projection",), own_head="has no decoder apart from its head"),
    Family("lighton_ocr", adapters=("vision_projection",)),
    Family("minimax_m3_vl_text", attention_layers=("minimax_m3_sparse",)),
    Family(
        "muse_glimmer", adapters=("vision_adapter", "vision_projection"), logit_fields={"output_multiplier": "factor"}
    ),
    Family(
        "muse_spark",
        adapters=("vision_adapter", "vision_projection"),
        encoders=("audio_tower",),
        logit_fields={"output_multiplier": "factor"},
    ),
    Family("nemotron_h", other_layers=("mlp",)),
    Family("ovis2", adapters=("visual_embeddings_table",)),
    Family("paddleocr_vl", adapters=("projector",)),
    Family(
        "phi4_multimodal",  # inside what transformers calls its language model
        adapters=(
            "img_projection_up",
            "img_projection_down",
            "global_img_feature_extensor",
            "sub_img_feature_extensor",
            "up_proj_for_speech",
            "down_proj_for_speech",
            "up_proj_for_vision_speech",
            "down_proj_for_vision_speech",
        ),
        encoders=("img_processor", "audio_embed"),
    ),
    Family("qwen2_5_omni_thinker", encoders=("audio_tower",)),
    Family("qwen3_omni_moe_thinker", encoders=("audio_tower",)),
    Family("step3p5", attention_layers=("minimax_m3_sparse",)),
    Family("unlimited_ocr", adapters=("view_separator",)),
    Family("unlimited_ocr_text", attention_layers=("reference_sliding_attention",)),
    Family("video_llama_3", adapters=("projector",)),
    Family("video_llava", encoders=("video_tower",)),
    Family("hyperclovax", logit_fields={"logits_scaling": "factor"}),
    Family("inkling_text", own_head="scales hidden states before its head"),
    Family("minicpm3", own_head="scales hidden states before its head"),
    Family("llama4_text", own_head="has no decoder apart from its head"),
    Family("modernbert-decoder", own_head="has no decoder apart from its head"),
    Family("prophetnet", own_head="predicts several tokens at a time"),
)

# Encoders that are also causal language models have layers between the last hidden states and the head.
_TRANSFORMED_HEADS = (
    *(
        "bert",
        "bert-generation",
        "big_bird",
        "camembert",
        "data2vec-text",
        "electra",
        "ernie",
        "megatron-bert",
        "rembert",
    ),
    *("roberta", "roberta-prelayernorm", "roc_bert", "roformer", "xlm-roberta", "xlm-roberta-xl", "xmod"),
)
_ROWS += tuple(Family(name, own_head="transforms hidden states before its head") for name in _TRANSFORMED_HEADS)

TABLE = {row.model_type: row for row in _ROWS}
# Model types whose rows every process of a run has.
_EVERYWHERE = set(TABLE)


def register_family(family: Family) -> None:
    """Add a row to the table, in this process or, where a plugin calls it (`cdistill._plugins`), in all of a run.

    Call it before a model of the family is used.

    Raises:
        ValueError: it is no `Family`, or its model type has a row already.
    """
    if not isinstance(family, Family):
        raise InputError(f"family must be a cdistill.Family, got {type(family).__name__}")
    if family.model_type in TABLE or family.model_type == COMMON.model_type:
        raise InputError(f"family {family.model_type!r} has a row already: only one of another model type can be added")
    TABLE[family.model_type] = family
    if registers_everywhere():
        _EVERYWHERE.add(family.model_type)
    _joined.cache_clear()


def family_of(model_or_config: Any) -> Family:
    """What is known of a transformers model or configuration: the rows of its parts, then `COMMON`, as one row.

    Plugins are imported first (`cdistill._plugins.import_plugins`).
    """
    import_plugins()
    return _joined(_model_types(getattr(model_or_config, "config", model_or_config)))


def require_known_everywhere(configs: Iterable[Any], processes: int) -> None:
    """Raise ValueError for a row that this process has and ``processes`` that are started for a recipe would not."""
    for model_type in (kind for config in configs for kind in _model_types(config)):
        if processes > 1 and model_type in TABLE.keys() - _EVERYWHERE:
            raise InputError(
                f"family {model_type!r} is known in this process alone, and processes is {processes}: set it to 1, register it "
                "in a plugin, or start a script that does and calls cdistill.train.run under torchrun"
            )


def _model_types(config: Any) -> Names:
    """Of a configuration and of all that it holds: language model, vision encoder. Code of others may give none."""
    parts = (getattr(config, name, None) for name in getattr(config, "sub_configs", ()))
    inner = (kind for part in parts if part is not None for kind in _model_types(part))
    return tuple(dict.fromkeys((getattr(config, "model_type", None) or COMMON.model_type, *inner)))


@cache
def _joined(model_types: Names) -> Family:
    rows = [TABLE[name] for name in model_types if name in TABLE]
    everything: dict[str, Any] = {
        name: tuple(dict.fromkeys(value for row in (*rows, COMMON) for value in getattr(row, name))) for name in _NAMES
    }
    tokens = (token for row in rows for token in (*row.image_token, *row.video_token))
    everything["visual_fields"] = tuple(dict.fromkeys((*tokens, *everything["visual_fields"])))
    for name in _MAPPINGS:
        everything[name] = {key: what for row in (COMMON, *rows) for key, what in getattr(row, name).items()}
    own_head = next((row.own_head for row in rows if row.own_head), "")
    blank = next((row.blank for row in rows if row.blank is not None), None)
    return Family(model_types[0], **everything, own_head=own_head, blank=blank)
