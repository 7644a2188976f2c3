"""The TAF student: a LLaVA that sees through its teacher's adapter (teacher adapter fetch, paper section 4.2).

Its visual tokens are M(P_T(f(image))): f the frozen vision encoder, P_T the teacher's frozen adapter, M a light trainable map
d_T -> d_S. This file needs torch and transformers only: ``cdistill export --code`` puts it beside the weights as it is.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import LlavaConfig, LlavaForConditionalGeneration
from transformers.activations import ACT2FN
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

MERGED = "merged"
TAF_ACTIVATIONS = ("linear", "gelu", MERGED)


class TAFLlavaConfig(LlavaConfig):
    """Configuration of a TAF student.

    Attributes:
        teacher_hidden_size: width d_T of the teacher's adapter output.
        taf_activation: ``linear`` for M = Linear (the authors' code), ``gelu`` for M = GELU + Linear, ``merged`` for a linear
            M multiplied into P_T's last layer, for inference (`MergedAdapter`).
        teacher_adapter: the layers of P_T, first to last: ``activation`` before the layer (null for none), its ``width`` and
            whether it has a ``bias``. Null for those of a stock LLaVA: two layers of width d_T, ``projector_hidden_act``
            between them, ``multimodal_projector_bias``. A teacher that is a TAF student has one layer more, its own M.
    """

    model_type = "cdistill_taf_llava"

    teacher_hidden_size: int = 0
    taf_activation: str = "linear"
    teacher_adapter: list[dict[str, Any]] | None = None


def stock_layers(config: Any, width: int) -> list[dict[str, Any]]:
    """The layers of a stock LLaVA projector of this width, as `TAFLlavaConfig.teacher_adapter` describes them."""
    bias = config.multimodal_projector_bias
    first = {"activation": None, "width": width, "bias": bias}
    return [first, first | {"activation": config.projector_hidden_act}]


def linear_layers(adapter: Any) -> list[nn.Linear]:
    """The linear layers of a LLaVA's whole adapter, first to last, with its own M if it is a TAF student's.

    Raises:
        ValueError: the adapter is neither the stock one nor one of this file.
    """
    if isinstance(adapter, TAFAdapter):
        return [*adapter.fetched, adapter.map]
    if not isinstance(adapter, LlavaMultiModalProjector | MergedAdapter):
        raise ValueError(f"multi_modal_projector is a {type(adapter).__name__}: only adapters of LLaVA can be fetched")
    return [adapter.linear_1, adapter.linear_2]


def adapter_layers(model: Any) -> list[dict[str, Any]]:
    """A LLaVA's whole adapter as `TAFLlavaConfig.teacher_adapter` describes it. Raises ValueError as `linear_layers`."""
    adapter, config = model.model.multi_modal_projector, model.config
    activations = [None, config.projector_hidden_act]
    if isinstance(adapter, TAFAdapter):
        activations = [*adapter.activations, "gelu" if config.taf_activation == "gelu" else None]
    return [
        {"activation": activation, "width": layer.out_features, "bias": layer.bias is not None}
        for activation, layer in zip(activations, linear_layers(adapter), strict=True)
    ]


def feature_width(config: Any) -> int:
    """Width d_v of what the encoder gives an adapter: that of one layer times the number of layers it is taken from."""
    layers = config.vision_feature_layer
    return config.vision_config.hidden_size * (1 if isinstance(layers, int) else len(layers))


class TAFAdapter(nn.Module):
    """M(P_T(features)): (..., d_v) encoder features to (..., d_S) visual tokens of the student."""

    def __init__(self, config: TAFLlavaConfig) -> None:
        super().__init__()
        text: Any = config.text_config
        layers = config.teacher_adapter or stock_layers(config, config.teacher_hidden_size)
        modules: list[nn.Module] = []
        width = feature_width(config)
        for i, layer in enumerate(layers):
            if i > 0:
                modules.append(nn.Identity() if layer["activation"] is None else ACT2FN[layer["activation"]])
            modules.append(nn.Linear(width, layer["width"], bias=layer["bias"]))
            width = layer["width"]
        if width != config.teacher_hidden_size:
            raise ValueError(
                f"teacher_adapter ends in width {width}, teacher_hidden_size is {config.teacher_hidden_size}"
            )
        self.teacher = nn.Sequential(*modules)
        self.activations = [layer["activation"] for layer in layers]
        self.act = nn.GELU() if config.taf_activation == "gelu" else nn.Identity()
        self.map = nn.Linear(width, text.hidden_size)

    @property
    def fetched(self) -> list[nn.Linear]:
        """The linear layers of P_T."""
        return [module for module in self.teacher if isinstance(module, nn.Linear)]

    def fetch(self, teacher_adapter: Any) -> None:
        """Copy a teacher's trained adapter, that of a LLaVA with or without TAF, into P_T: the same bits.

        Raises:
            ValueError: the teacher's adapter has other layers than this model was built for.
        """
        layers = linear_layers(teacher_adapter)
        theirs, mine = ([tuple(x.weight.shape) for x in side] for side in (layers, self.fetched))
        if mine != theirs or [x.bias is None for x in layers] != [x.bias is None for x in self.fetched]:
            raise ValueError(f"the teacher adapter's layers are {theirs}, this student was built for {mine}")
        for ours, layer in zip(self.fetched, layers, strict=True):
            ours.load_state_dict(layer.state_dict())

    def from_teacher_tokens(self, tokens: Tensor) -> Tensor:
        """M alone: (..., d_T) visual tokens that the teacher's adapter already made, to (..., d_S)."""
        return self.map(self.act(tokens))

    def forward(self, features: Tensor) -> Tensor:
        return self.from_teacher_tokens(self.teacher(features))


class MergedAdapter(nn.Module):
    """A stock LLaVA projector except for its inner width d_T: the teacher's first layer, then M times its second.

    It has no P_T any more and is trained, where it is, as a student's own adapter.
    """

    def __init__(self, config: TAFLlavaConfig) -> None:
        super().__init__()
        text: Any = config.text_config
        width = config.teacher_hidden_size
        self.linear_1 = nn.Linear(feature_width(config), width, bias=config.multimodal_projector_bias)
        self.act = ACT2FN[config.projector_hidden_act]
        self.linear_2 = nn.Linear(width, text.hidden_size)

    def forward(self, features: Tensor) -> Tensor:
        return self.linear_2(self.act(self.linear_1(features)))


class TAFLlavaForConditionalGeneration(LlavaForConditionalGeneration):
    """LLaVA whose multimodal projector is a `TAFAdapter` or what became of one; otherwise the stock model, saving included.

    Raises:
        ValueError: a field of the configuration that this class adds has no meaning.
    """

    config: TAFLlavaConfig
    config_class = TAFLlavaConfig

    def __init__(self, config: TAFLlavaConfig) -> None:
        if config.taf_activation not in TAF_ACTIVATIONS:
            raise ValueError(
                f"taf_activation must be one of {', '.join(TAF_ACTIVATIONS)}, got {config.taf_activation!r}"
            )
        if config.teacher_hidden_size < 1:
            raise ValueError(f"teacher_hidden_size must be positive, got {config.teacher_hidden_size}")
        super().__init__(config)
        owner = getattr(self, "model", self)  # until transformers 4.52 a LLaVA has its parts itself
        owner.multi_modal_projector = MergedAdapter(config) if config.taf_activation == MERGED else TAFAdapter(config)
        self.post_init()


def _name_weights_as_llava() -> None:
    """Let transformers 5 give the weights in files a LLaVA's published names; 4 takes them from the class above."""
    try:
        from transformers import conversion_mapping as names
    except ImportError:
        return
    if hasattr(names, "register_checkpoint_conversion_mapping"):
        mapping = names.get_checkpoint_conversion_mapping(LlavaConfig.model_type)
        names.register_checkpoint_conversion_mapping(TAFLlavaConfig.model_type, mapping, overwrite=True)


_name_weights_as_llava()
