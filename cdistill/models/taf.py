"""The TAF student: a LLaVA that sees through its teacher's adapter (teacher adapter fetch, paper section 4.2).

Its visual tokens are M(P_T(f(image))): f the frozen vision encoder, P_T the teacher's frozen adapter, M a light trainable map
d_T -> d_S. This file needs torch and transformers only: ``cdistill export --code`` puts it beside the weights as it is.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import LlavaConfig, LlavaForConditionalGeneration
from transformers.activations import ACT2FN

MERGED = "merged"
TAF_ACTIVATIONS = ("linear", "gelu", MERGED)


class TAFLlavaConfig(LlavaConfig):
    """Configuration of a TAF student.

    Attributes:
        teacher_hidden_size: width d_T of the teacher's adapter output.
        taf_activation: ``linear`` for M = Linear (the authors' code), ``gelu`` for M = GELU + Linear, ``merged`` for a linear
            M multiplied into P_T's last layer, for inference (`MergedAdapter`).
    """

    model_type = "cdistill_taf_llava"

    teacher_hidden_size: int = 0
    taf_activation: str = "linear"


class TAFAdapter(nn.Module):
    """M(P_T(features)): (..., d_v) encoder features to (..., d_S) visual tokens of the student."""

    def __init__(self, config: TAFLlavaConfig) -> None:
        super().__init__()
        width, bias = config.teacher_hidden_size, config.multimodal_projector_bias
        vision: Any = config.vision_config
        text: Any = config.text_config
        self.teacher = nn.Sequential(
            nn.Linear(vision.hidden_size, width, bias=bias),
            ACT2FN[config.projector_hidden_act],
            nn.Linear(width, width, bias=bias),
        )
        self.act = nn.GELU() if config.taf_activation == "gelu" else nn.Identity()
        self.map = nn.Linear(width, text.hidden_size)

    def fetch(self, teacher_adapter: Any) -> None:
        """Copy the teacher's trained adapter, a stock LLaVA projector, into P_T.

        Raises:
            ValueError: the teacher's adapter has other widths than this model was built for.
        """
        pairs: list[tuple[Any, Any]] = [
            (self.teacher[0], teacher_adapter.linear_1),
            (self.teacher[2], teacher_adapter.linear_2),
        ]
        for mine, theirs in pairs:
            if mine.weight.shape != theirs.weight.shape:
                raise ValueError(
                    f"teacher adapter is {tuple(theirs.weight.shape)}, this student was built for {tuple(mine.weight.shape)}"
                )
            mine.load_state_dict(theirs.state_dict())

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
        vision: Any = config.vision_config
        text: Any = config.text_config
        self.linear_1 = nn.Linear(vision.hidden_size, config.teacher_hidden_size, bias=config.multimodal_projector_bias)
        self.act = ACT2FN[config.projector_hidden_act]
        self.linear_2 = nn.Linear(config.teacher_hidden_size, text.hidden_size)

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
        self.model.multi_modal_projector = (
            MergedAdapter(config) if config.taf_activation == MERGED else TAFAdapter(config)
        )
        self.post_init()
