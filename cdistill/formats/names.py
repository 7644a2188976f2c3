"""Names of weights: one table of what each project calls what transformers' published LLaVA checkpoints call otherwise."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from cdistill.models.published import published_name, weight_rules

Rules = tuple[tuple[str, str], ...]  # beginning of a name in the project, and in transformers' published checkpoints

_TURN = (("0.", "linear_1."), ("2.", "linear_2."))  # layers of nn.Sequential(Linear, GELU, Linear)
_WITHIN_LANGUAGE_MODEL: Rules = (  # everything is a part of one causal language model
    ("model.vision_tower.vision_tower.", "vision_tower."),
    *((f"model.mm_projector.{theirs}", f"multi_modal_projector.{ours}") for theirs, ours in _TURN),
    ("model.image_newline", "image_newline"),
    ("lm_head.", "language_model.lm_head."),
    ("model.", "language_model.model."),
)
_BESIDE_LANGUAGE_MODEL: Rules = (  # three parts side by side
    ("vision_tower._vision_tower.", "vision_tower."),
    *((f"connector._connector.{theirs}", f"multi_modal_projector.{ours}") for theirs, ours in _TURN),
    ("language_model.", "language_model."),
)
_THROUGH_TEACHER: Rules = (
    ("vision_tower._vision_tower.", "vision_tower."),
    ("connector._connector.", "multi_modal_projector.teacher."),
    ("connector.post_connector.", "multi_modal_projector.map."),
    ("language_model.", "language_model."),
)

NAMES: Mapping[str, Rules] = {
    "compodistill": _BESIDE_LANGUAGE_MODEL,
    "compodistill student": _THROUGH_TEACHER,
    "llava": _WITHIN_LANGUAGE_MODEL,
    "tinyllava": _BESIDE_LANGUAGE_MODEL,
    "bunny": _WITHIN_LANGUAGE_MODEL,
    "mobilevlm": _WITHIN_LANGUAGE_MODEL,
}

# Buffers that older versions of transformers kept in files and every version makes anew.
BUFFERS = re.compile(r".*\.(rotary_emb\.inv_freq|embeddings\.position_ids|self_attn\.(bias|masked_bias))")
EMBEDDINGS = ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight")  # a row for each token


def ours(name: str, rules: Rules) -> str | None:
    """What transformers' published checkpoints call a project's weight; None for one that no rule knows."""
    return next((new + name.removeprefix(old) for old, new in rules if name.startswith(old)), None)


def theirs(name: str, rules: Rules) -> str | None:
    """What a project calls a weight of transformers' published checkpoints; None for one that it has no name for."""
    return next((old + name.removeprefix(new) for old, new in rules if name.startswith(new)), None)


def expected(model: Any) -> dict[str, tuple[int, ...]]:
    """Published names and shapes of a model's weights; one that shares another's is not among them."""
    rules = weight_rules(model.config.to_dict())
    tied = set(getattr(model, "all_tied_weights_keys", None) or {}) if model.config.tie_word_embeddings else set()
    shapes = {name: tuple(weight.shape) for name, weight in model.state_dict().items() if name not in tied}
    return {published_name(_published(name), rules): shape for name, shape in shapes.items()}


def _published(name: str) -> str:
    """The name without the outer ``model``, which published checkpoints of LLaVA do not have."""
    if name.startswith("lm_head."):
        return f"language_model.{name}"
    if name.startswith("model.language_model."):
        return name.replace("model.language_model.", "language_model.model.", 1)
    return name.removeprefix("model.")
