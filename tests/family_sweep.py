"""Every causal and image-text family of the installed transformers, made small, with the hook and without it.

``python tests/family_sweep.py > docs/families.md`` writes the table of the documentation anew; with names of families it only
prints what becomes of those.
"""

import re
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

from cdistill.models.logits import after_head
from cdistill.models.parts import head_of, require_known_parts
from cdistill.vat import Regions, SliceRecorder, attention_layers, install, uninstall
from cdistill.vat.hook import text_model_of

LENGTH, MOST_PARAMETERS = 16, 20_000_000
# In each sample, of real tokens.
ROWS, COLS = torch.tensor([[8, 12, 15], [4, 8, 11]]), torch.tensor([[3, 5, 6, 7], [0, 1, 2, 3]])
REGIONS = Regions(ROWS.int(), COLS.int())

# Values of fields of the configurations, wherever they have a number there.
_BY_VALUE = {
    32: """hidden_size d_model n_embd embed_dim out_hidden_size projector_hidden_size text_hidden_size model_dim n_inner mlp_dim
        intermediate_size ffn_dim dense_intermediate_size intermediate_size_mlp d_ff ffn_hidden_size hidden_dim encoder_ffn_dim
        decoder_ffn_dim word_embed_proj_dim mamba_d_ssm qk_head_dim""",
    16: """head_dim global_head_dim qk_rope_head_dim qk_nope_head_dim v_head_dim linear_key_head_dim linear_value_head_dim
        index_head_dim q_lora_rank kv_lora_rank o_lora_rank moe_intermediate_size shared_expert_intermediate_size image_size
        mamba_d_head attention_head_dim d_kv num_position_embeddings""",
    8: "hidden_size_per_layer_input laurel_rank mamba_d_state state_size",
    4: """num_hidden_layers num_layers n_layer n_layers num_decoder_layers decoder_layers encoder_layers num_experts
        n_routed_experts num_local_experts moe_num_experts index_topk index_block_size patch_size mamba_n_heads""",
    2: """num_attention_heads num_heads n_head n_heads encoder_attention_heads decoder_attention_heads num_key_value_heads
        num_kv_heads linear_num_key_heads linear_num_value_heads linear_num_heads num_experts_per_tok num_experts_per_token
        moe_topk moe_k top_k_experts
        index_topk_blocks altup_num_inputs num_codebooks num_kv_shared_layers index_kpool""",
    1: """depth n_group topk_group n_shared_experts moe_num_shared_experts index_n_heads index_local_blocks decoder_sparse_step
        first_k_dense_replace mamba_n_groups n_groups num_expert_group""",
    160: "vocab_size vocab_size_per_layer_input",
    128: "max_position_embeddings n_positions",
}
_SMALL: dict[str, float] = {name: value for value, names in _BY_VALUE.items() for name in names.split()}
_SMALL["initializer_range"] = 0.25  # attention far from uniform
_VISION = {"num_hidden_layers": 1, "num_layers": 1, "head_dim": 16, "num_position_embeddings": 16}
_LISTS = ("layer_types", "mlp_layer_types", "no_rope_layers", "moe_layers", "head_dims", "layers_block_type")
_TOWERS = ("vision", "audio", "vq", "visual", "perceiver", "qformer")
_GEMMA = ["sliding_attention", "full_attention"] * 2  # the last two layers use keys of the first two
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_MROPE = {"text_config.rope_parameters": _ROPE | {"mrope_section": [4, 2, 2]}}
# What the rule above gets wrong, by family: fields of the configuration, dotted.
_FIELDS: dict[str, dict[str, Any]] = {
    "deepseek_v2": {"num_experts_per_tok": 2},
    "gemma4": {"text_config.layer_types": _GEMMA},
    "gemma4_text": {"layer_types": _GEMMA},
    "gemma4_unified": {"text_config.layer_types": _GEMMA},
    "gemma4_unified_text": {"layer_types": _GEMMA},
    **{
        name: {"text_config.rope_parameters": _ROPE | {"mrope_section": sections}}
        for sections, names in {(4, 2, 2): "glm4v glm46v glm_ocr glmga", (2, 1, 1): "glm4v_moe"}.items()
        for name in names.split()
    },
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "paddleocr_vl"), _MROPE),
    **{name: {"head_dim": 16} for name in ("hunyuan_v1_dense", "hunyuan_v1_moe", "ministral")},
    "hunyuan_vl": {"text_config.head_dim": 16, "text_config.rope_parameters": _ROPE | {"mrope_section": [2, 2, 2, 2]}},
    "nemotron": {"num_key_value_heads": 1},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "cohere_compass_text": {"rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE}},
    "cohere_compass": {"text_config.rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE}},
    "mistral4": {
        "rope_parameters": _ROPE | {"llama_4_scaling_beta": 0.1, "original_max_position_embeddings": 8},
        "head_dim": 16,
    },
    "deepseek_ocr2": {"text_config.mlp_layer_types": ["dense", "sparse"] * 2, "text_config.num_experts_per_tok": 2},
    "chameleon": {
        "vocabulary_map": {"<image>": 120, "IMGIMGA": 121},
        "vq_config.base_channels": 32,
        "vq_config.channel_multiplier": [1, 1],
    },
    "emu3": {
        "vocabulary_map": {"<image>": 120, "<|extra_200|>": 121},
        "vq_config.base_channels": 32,
        "vq_config.channel_multiplier": [1, 1],
    },
    "falcon_h1": {"mamba_d_ssm": 32, "mamba_d_head": 8, "mamba_n_heads": 4},
    "codegen": {"n_head": 4, "n_embd": 64, "rotary_dim": 8},
    "gptj": {"rotary_dim": 8},
    "ernie4_5_vl_moe": {
        "text_config.moe_intermediate_size": [16, 16],
        "text_config.rope_parameters": _ROPE | {"mrope_section": [2, 2, 4]},
    },
    "gpt_neo": {
        "attention_types": [[["global", "local"], 2]],
        "num_layers": 4,
        "attention_layers": ["global", "local"] * 2,
    },
    "xlnet": {"d_head": 16},
    "mamba2": {"num_heads": 4, "head_dim": 16},
    "zaya": {"num_experts_per_tok": 1},
    "step3p7": {"text_config.sliding_window": 8},
    "qwen4_exp_text": {"num_experts": 4},
    "molmo2": {"adapter_config.vision_feature_layer": [0, 0], "text_config.rope_scaling_layers": []},
    "muse_spark": {
        "audio_config.patch_sizes": [4],
        "audio_config.hidden_sizes": [32],
        "audio_config.depths": [1],
        "audio_config.num_hidden_layers": 1,
    },
    "longcat_flash": {"num_key_value_heads": 2, "expert_ffn_hidden_size": 16, "zero_expert_num": 2},
    "qwen3_omni_moe_thinker": _MROPE | {"vision_start_token_id": 125},
    "qwen2_5_omni_thinker": _MROPE | {"vision_start_token_id": 125},
    **{name: {"image_token_index": 120, "num_query_tokens": 4} for name in ("blip-2", "instructblip")},
    "dbrx": {"attn_config.rope_theta": 1e4, "attn_config.kv_n_heads": 1, "attn_config.clip_qkv": 8.0},
    "mistral_large4": {"text_config.kv_source_layers": None},
    "minimax_m3_vl": {"text_config.layer_types": ["full_attention"] + ["minimax_m3_sparse"] * 3},
}


def small_config(family: str, kv_heads: int) -> Any:
    """The family's default configuration with small numbers in it."""
    cls = CONFIG_MAPPING[family]
    fields = _shrunk(cls().to_dict(), vision=False, kv_heads=kv_heads)
    for path, value in _FIELDS.get(family, {}).items():
        *parents, name = path.split(".")
        place = fields
        for parent in parents:
            place = place[parent]
        place[name] = value
    return cls(**{name: value for name, value in fields.items() if name not in ("model_type", "transformers_version")})


def _shrunk(fields: dict[str, Any], *, vision: bool, kv_heads: int) -> dict[str, Any]:
    result = {}
    for name, value in fields.items():
        if name in _LISTS or name in ("dtype", "architectures", "per_layer_config"):
            continue
        if isinstance(value, list) and len(value) == fields.get("num_hidden_layers"):
            value = value[:4]
        if isinstance(value, dict) and name.endswith("_config"):
            value = _shrunk(value, vision=vision or any(tower in name for tower in _TOWERS), kv_heads=kv_heads)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            if name == "num_key_value_heads" and not vision:
                value = kv_heads
            elif name in _SMALL:
                value = _VISION.get(name, _SMALL[name]) if vision else _SMALL[name]
            elif name.endswith(("token_id", "token_index")) and value >= 160:
                value = 120 + sum(map(ord, name)) % 40
        elif isinstance(value, list) and name.endswith("token_id"):
            value = [1]
        elif name in ("rope_parameters", "rope_scaling") and isinstance(value, dict) and "mrope_section" in value:
            half = max(1, int(16 * value.get("partial_rotary_factor", 1.0)) // 2)
            value = value | {"mrope_section": [half - 2 * (half // 3), half // 3, half // 3]}
        result[name] = value
    if "per_layer_config" in fields:
        result["per_layer_config"] = None
    return result


def class_of(family: str) -> str:
    """The family's class with a head for text: of images and text if there is one."""
    name = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.get(family) or MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family]
    return name if isinstance(name, str) else name[0]


FAMILIES = sorted({*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES})


def build(family: str, kv_heads: int) -> Any:
    """A small random model of the family, in evaluation mode; ValueError for one that stays large."""
    config = small_config(family, kv_heads)
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
    pixels = {}
    if model.config.model_type in ("blip-2", "instructblip"):  # they do not run on words alone
        pixels = {"pixel_values": torch.ones(2, 3, 16, 16)}
        ids.scatter_(1, COLS, model.config.image_token_index)
    if model.config.model_type == "instructblip":
        pixels |= {"qformer_input_ids": ids[:, :4], "qformer_attention_mask": mask[:, 3:7]}
    return {"input_ids": ids, "attention_mask": mask, **types, **pixels}


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
    return all(
        torch.equal(x.nan_to_num(7.0), y.nan_to_num(7.0)) and torch.equal(x.isnan(), y.isnan()) for x, y in pairs
    )


class OtherOutput(AssertionError):
    """With the hook a model computes something else, or a recorder sees something else than the model's attention."""


def _check_head(model: Any, batch: dict[str, Tensor]) -> None:
    """Raise OtherOutput unless logits are what `after_head` makes of the head's of the decoder's hidden states, or refused."""
    try:
        finish = after_head(model)
    except ValueError:
        return
    hidden: list[Tensor] = []
    hook = model.get_decoder().register_forward_hook(lambda module, given, out: hidden.append(out[0]))
    try:
        with torch.no_grad():
            logits = model.eval()(**batch, use_cache=False).logits
            expected = finish(head_of(model)(hidden[-1]))
    finally:
        hook.remove()
    if not torch.allclose(logits, expected, rtol=1e-4, atol=1e-5):
        raise OtherOutput(f"{type(model).__name__}: logits are not those of its head")


def result_of(family: str) -> str:
    """What becomes of a family. Raises OtherOutput if it is not exact and not refused, ValueError for an unknown module."""
    model = plain = None
    try:
        try:
            model = build(family, kv_heads=1)
            plain = run(model, batch := draw(model))
        except Exception:  # some families have as many key heads as query heads
            model = build(family, kv_heads=2)
            plain = run(model, batch := draw(model))
    except Exception as error:  # of the family's own code: there is nothing to compare with
        try:
            if model is not None:
                install(model)
        except ValueError as refused:
            return f"refused: {_line(refused)}"
        return f"not run: {_line(error)}"
    switched = text_model_of(model).config._attn_implementation != "sdpa"
    try:
        layers = attention_layers(model)
        install(model)
    except ValueError as error:
        if not same(run(model, batch), plain):
            raise OtherOutput(f"{family}: refused, and computes something else afterwards") from error
        return f"refused: {_line(error)}"
    require_known_parts(model)
    _check_head(model, batch)
    if switched:
        uninstall(model)  # to SDPA without the hook
        plain = run(model, batch)
        install(model)
    if not torch.equal(model(**batch, use_cache=False).logits, plain[0]):
        raise OtherOutput(f"{family}: other logits with the hook")
    seen, refused = _record(model, batch, layers)
    recorder = SliceRecorder(list(seen), REGIONS, key_mask=batch["attention_mask"], impl="torch")
    if not same(run(model, batch, **({"cdistill_vat": recorder} if seen else {})), plain):
        raise OtherOutput(f"{family}: other logits or gradients with the hook")
    compared = _compare_with_eager(family, model, batch, seen) if seen else set()
    parts = ["exact"]
    if compared:
        parts.append(f"{_numbers(compared)} aligned")
    if rest := sorted(set(seen) - compared):
        parts.append(f"{_numbers(rest)} aligned (no eager matrix to compare with)")
    return "; ".join([*parts, *(f"{_numbers(numbers)} refused: {why}" for why, numbers in refused.items())])


def _record(
    model: Any, batch: dict[str, Tensor], layers: Iterable[int]
) -> tuple[dict[int, Tensor], dict[str, list[int]]]:
    """Slices of the layers, and the layers that are refused by reason."""
    seen: dict[int, Tensor] = {}
    refused: dict[str, list[int]] = {}
    for group in [list(layers), *([layer] for layer in layers)]:
        recorder = SliceRecorder(group, REGIONS, key_mask=batch["attention_mask"], impl="torch")
        try:
            with torch.no_grad():
                model(**batch, use_cache=False, cdistill_vat=recorder)
            seen |= recorder.slices
        except ValueError as error:
            if len(group) == 1:
                why = (
                    re.sub(r"^layer \d+ \(\w+\): ", "", _line(error))
                    .replace(f"layer {group[0]} uses", "uses")
                    .replace(f"layers {group} were", "were")
                )
                refused.setdefault(why, []).extend(group)
        if len(seen) == len(list(layers)):
            break
    return seen, refused


def _numbers(layers: Iterable[int]) -> str:
    layers = list(layers)
    return f"layer{'s' if len(layers) > 1 else ''} {', '.join(map(str, layers))}"


def _line(error: Exception) -> str:
    """The reason in short: what every message says, and lists in brackets, are left out."""
    text = " ".join(str(error).split()).replace("|", "/")
    text = re.sub(
        r" \((bidirectional|such as|a key-value)[^)]*\)", "", text.split(", which visual attention alignment")[0]
    )
    text = re.sub(r": run a model that.*; if it was, its layers", ": the layers", text)
    text = re.split(r"; (visual attention alignment needs|pass the ids)|: it needs", text)[0]
    return f"{'' if isinstance(error, ValueError) else type(error).__name__ + ': '}{text}"[:160]


def _compare_with_eager(family: str, model: Any, batch: dict[str, Tensor], seen: dict[int, Tensor]) -> set[int]:
    """Raise OtherOutput unless the slices are those of the matrices that eager attention returns; layers it returned."""
    maps: dict[int, Tensor] = {}

    def keep(module: Any, args: Any, output: Any) -> None:
        weights = output[1] if isinstance(output, tuple) and len(output) > 1 else None
        if isinstance(weights, Tensor) and weights.ndim == 4 and weights.shape[-2:] == (LENGTH, LENGTH):
            maps[module.layer_idx] = weights.detach()

    for module in model.modules():
        if hasattr(module, "_cdistill_vat"):
            module.register_forward_hook(keep)
    try:
        model.set_attn_implementation("eager")
        with torch.no_grad():
            model(**batch, use_cache=False)
    except (ValueError, TypeError, RuntimeError, KeyError):
        return set()  # the family has no eager attention
    compared = sorted(set(maps) & set(seen))
    for layer in compared:
        wanted = torch.stack([maps[layer][b].mean(0)[ROWS[b]][:, COLS[b]] for b in range(2)]).float()
        gap = (seen[layer] - wanted).abs().max().item()
        if not gap < 1e-4:
            raise OtherOutput(f"{family}: the slice of layer {layer} is off by {gap:.2g} from eager attention")
    return set(compared)


HEADER = """# Families and the hook

Every causal and image-text family of transformers {version}, made small (4 layers, width 32, random weights), on a batch padded
on both sides, without the hook and with it: `python tests/family_sweep.py > docs/families.md` writes this page,
`tests/test_vat_sweep.py` keeps it in step.

- exact: logits and the gradients of all parameters are the same, bit for bit, also while a recorder sees the layers;
- aligned: what a recorder saw of these layers is the family's own eager attention (where the family returns it);
- refused: a ValueError with this reason, at install or for the layers named, and nothing is computed otherwise;
- not run: the family's own code could not be run small, on words alone, with the packages of this project; nothing is known
  beyond what holds for all: the hook leaves the implementation's name and transformers' functions as they are.

| family | with the hook |
| --- | --- |
"""


def row(family: str) -> str:
    """The family's line of the table."""
    return f"| {family} | {result_of(family)} |"


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    if not sys.argv[1:]:
        print(HEADER.format(version=transformers.__version__), end="")
    for name in sys.argv[1:] or FAMILIES:
        print(row(name), flush=True)
