"""Every causal and image-text family of the installed transformers, made small, with the hook and without it.

``python tests/family_sweep.py > docs/families.md`` writes the table of the documentation anew; with names of families it only
prints what becomes of those.
"""

import copy
import math
import sys
from collections.abc import Iterable
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from cdistill.vat import Regions, SliceRecorder, attention_layers, install

LENGTH, MOST_PARAMETERS = 16, 6_000_000

# Values by name of the configuration's field, wherever it has a number there.
_SMALL = (
    dict.fromkeys(
        "hidden_size d_model n_embd embed_dim out_hidden_size projector_hidden_size text_hidden_size model_dim "
        "intermediate_size ffn_dim n_inner mlp_dim dense_intermediate_size intermediate_size_mlp d_ff "
        "ffn_hidden_size hidden_dim encoder_ffn_dim decoder_ffn_dim word_embed_proj_dim mamba_d_ssm".split(),
        32,
    )
    | dict.fromkeys(
        "head_dim global_head_dim qk_rope_head_dim qk_nope_head_dim v_head_dim linear_key_head_dim linear_value_head_dim "
        "index_head_dim q_lora_rank kv_lora_rank o_lora_rank moe_intermediate_size shared_expert_intermediate_size "
        "image_size mamba_d_head attention_head_dim d_kv".split(),
        16,
    )
    | dict.fromkeys(
        "num_attention_heads num_heads n_head n_heads encoder_attention_heads decoder_attention_heads num_key_value_heads "
        "num_kv_heads linear_num_key_heads linear_num_value_heads num_experts_per_tok moe_topk moe_k top_k_experts "
        "index_topk_blocks altup_num_inputs num_codebooks".split(),
        2,
    )
    | dict.fromkeys(
        "num_hidden_layers num_layers n_layer n_layers num_decoder_layers decoder_layers encoder_layers num_experts "
        "n_routed_experts num_local_experts moe_num_experts index_topk index_block_size patch_size mamba_n_heads".split(),
        4,
    )
    | dict.fromkeys(
        "depth n_group topk_group n_shared_experts moe_num_shared_experts index_n_heads index_local_blocks decoder_sparse_step "
        "first_k_dense_replace mamba_n_groups n_groups".split(),
        1,
    )
    | dict.fromkeys("hidden_size_per_layer_input laurel_rank mamba_d_state state_size".split(), 8)
    | {"vocab_size": 160, "vocab_size_per_layer_input": 160, "max_position_embeddings": 128, "n_positions": 128}
    | {"num_position_embeddings": 16, "num_kv_shared_layers": 2, "initializer_range": 0.25, "qk_head_dim": 32}
)
_VISION = {"num_hidden_layers": 1, "num_layers": 1, "head_dim": 16, "num_position_embeddings": 16}
_LISTS = ("layer_types", "mlp_layer_types", "no_rope_layers", "moe_layers", "head_dims", "layers_block_type")
_TOWERS = ("vision", "audio", "vq", "visual", "perceiver", "qformer")
# What the rule above gets wrong, by family: fields of the configuration, dotted.
_FIELDS: dict[str, dict[str, Any]] = {
    "gemma4": {"text_config.per_layer_config": None},
    "mistral_large4": {"text_config.kv_source_layers": None},
    "minimax_m3_vl": {"text_config.layer_types": ["full_attention"] + ["minimax_m3_sparse"] * 3},
}


def small_config(family: str) -> Any:
    """The family's default configuration with small numbers in it."""
    cls = CONFIG_MAPPING[family]
    fields = _shrunk(cls().to_dict(), vision=False)
    for path, value in _FIELDS.get(family, {}).items():
        *parents, name = path.split(".")
        place = fields
        for parent in parents:
            place = place[parent]
        place[name] = value
    return cls(**{name: value for name, value in fields.items() if name not in ("model_type", "transformers_version")})


def _shrunk(fields: dict[str, Any], *, vision: bool) -> dict[str, Any]:
    result = {}
    for name, value in fields.items():
        if name in _LISTS or name in ("dtype", "architectures"):
            continue
        if isinstance(value, dict) and name.endswith("_config"):
            value = _shrunk(value, vision=vision or any(tower in name for tower in _TOWERS))
        elif isinstance(value, int | float) and not isinstance(value, bool):
            if name in _SMALL:
                value = _VISION.get(name, _SMALL[name]) if vision else _SMALL[name]
            elif name.endswith(("token_id", "token_index")) and value >= 160:
                value = 120 + sum(map(ord, name)) % 40
        elif isinstance(value, list) and name.endswith("token_id"):
            value = [1]
        elif name in ("rope_parameters", "rope_scaling") and isinstance(value, dict) and "mrope_section" in value:
            half = max(1, int(16 * value.get("partial_rotary_factor", 1.0)) // 2)
            value = value | {"mrope_section": [half - 2 * (half // 3), half // 3, half // 3]}
        result[name] = value
    return result


def class_of(family: str) -> str:
    """The family's class with a head for text: of images and text if there is one."""
    name = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.get(family) or MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family]
    return name if isinstance(name, str) else name[0]


FAMILIES = sorted({*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES})


def build(family: str) -> Any:
    """A small random model of the family, in evaluation mode; ValueError for one that stays large."""
    config = small_config(family)
    cls = getattr(transformers, class_of(family))
    with torch.device("meta"):
        size = sum(p.numel() for p in cls(config).parameters())
    if size > MOST_PARAMETERS:
        raise ValueError(f"{size / 1e6:.0f} million parameters")
    torch.manual_seed(0)
    return cls(config).eval()


def draw(model: Any) -> dict[str, Tensor]:
    """Two samples of words, the first padded on the left, the second on the right."""
    ids = torch.randint(3, 100, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :3] = mask[1, -4:] = 0
    types = {"token_type_ids": torch.zeros_like(ids)} if model.config.model_type in ("gemma3", "shieldgemma2") else {}
    return {"input_ids": ids, "attention_mask": mask, **types}


def run(model: Any, batch: dict[str, Tensor], **more: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits and the gradients of all parameters."""
    model.zero_grad()
    torch.manual_seed(2)
    logits = model(**batch, use_cache=False, **more).logits
    (logits * torch.linspace(-1, 1, logits.shape[-1])).sum().backward()
    return logits.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def same(a: tuple[Tensor, dict[str, Tensor]], b: tuple[Tensor, dict[str, Tensor]]) -> bool:
    """Bit for bit, NaN where the other has NaN."""
    if a[1].keys() != b[1].keys():
        return False
    pairs = [(a[0], b[0]), *((grad, b[1][name]) for name, grad in a[1].items())]
    return all(torch.equal(x.nan_to_num(7.0), y.nan_to_num(7.0)) and torch.equal(x.isnan(), y.isnan()) for x, y in pairs)


class OtherOutput(AssertionError):
    """With the hook a model computes something else, or a recorder sees something else than the model's attention."""


ROWS, COLS = torch.tensor([[8, 12, 15], [4, 8, 11]]), torch.tensor([[3, 5, 6, 7], [0, 1, 2, 3]])


def result_of(family: str) -> str:
    """What becomes of a family; raises OtherOutput where it is neither exact nor refused."""
    try:
        model = build(family)
        batch = draw(model)
        plain = run(model, batch)
    except Exception as error:  # of the family's own code: nothing to compare with
        return f"not run small: {_line(error)}"
    layers = None
    try:
        layers = attention_layers(model)
        install(model)
    except ValueError as error:
        if layers is not None and not same(run(model, batch), plain):
            raise OtherOutput(f"{family}: refused, and computes something else afterwards") from error
        return f"refused: {_line(error)}"
    plain = run(model, batch) if model.config._attn_implementation != "sdpa" else plain
    if not same(run(model, batch), plain):
        raise OtherOutput(f"{family}: other logits or gradients with the hook")
    seen, refused = {}, {}
    for layer in layers:
        recorder = SliceRecorder([layer], Regions(ROWS.int(), COLS.int()), key_mask=batch["attention_mask"], impl="torch")
        try:
            with torch.no_grad():
                model(**batch, use_cache=False, cdistill_vat=recorder)
            seen[layer] = recorder.slices[layer]
        except ValueError as error:
            refused.setdefault(_line(error).replace(f"layer {layer} uses", "uses").replace(f"[{layer}]", ""), []).append(layer)
    if seen:
        recorder = SliceRecorder(list(seen), Regions(ROWS.int(), COLS.int()), key_mask=batch["attention_mask"], impl="torch")
        if not same(run(model, batch, cdistill_vat=recorder), plain):
            raise OtherOutput(f"{family}: other logits or gradients with a recorder")
        _compare_with_eager(family, model, batch, seen)
    parts = [f"exact, {_numbers(seen)} aligned"] if seen else ["exact"]
    return "; ".join([*parts, *(f"{_numbers(numbers)} refused: {why}" for why, numbers in refused.items())])


def _numbers(layers: Iterable[int]) -> str:
    layers = list(layers)
    return f"layer{'s' if len(layers) > 1 else ''} {', '.join(map(str, layers))}"


def _line(error: Exception) -> str:
    text = " ".join(str(error).split()).replace("|", "/")
    return f"{'' if isinstance(error, ValueError) else type(error).__name__ + ': '}{text}"[:160]


def _compare_with_eager(family: str, model: Any, batch: dict[str, Tensor], seen: dict[int, Tensor]) -> None:
    """The slices are those of the matrices that the family's own eager attention returns, where it returns them."""
    eager, maps = copy.deepcopy(model), {}

    def keep(module: Any, args: Any, output: Any) -> None:
        weights = output[1] if isinstance(output, tuple) and len(output) > 1 else None
        if isinstance(weights, Tensor) and weights.ndim == 4 and weights.shape[-2:] == (LENGTH, LENGTH):
            maps[module.layer_idx] = weights.detach()

    for module in eager.modules():
        if hasattr(module, "_cdistill_vat"):
            module.register_forward_hook(keep)
    try:
        eager.set_attn_implementation("eager")
        with torch.no_grad():
            eager(**batch, use_cache=False)
    except (ValueError, TypeError, RuntimeError):
        return  # the family has no eager attention
    for layer, found in seen.items():
        if layer not in maps:
            continue
        wanted = torch.stack([maps[layer][b].mean(0)[ROWS[b]][:, COLS[b]] for b in range(2)]).float()
        gap = (found - wanted).abs().max().item()
        if not (math.isnan(gap) or gap < 1e-4):
            raise OtherOutput(f"{family}: the slice of layer {layer} is off by {gap:.2g} from eager attention")


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    for name in sys.argv[1:] or FAMILIES:
        try:
            print(f"| {name} | {result_of(name)} |", flush=True)
        except OtherOutput as error:
            print(f"| {name} | FAULT {error} |", flush=True)
