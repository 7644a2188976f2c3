"""Tiny models and recipes of the built-in task."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlavaForConditionalGeneration, Qwen2Config, SiglipVisionConfig

from cdistill.builtin.dataset import NUM_VISUAL_TOKENS, build_tokenizer
from cdistill.data.samples import IMAGE_TOKEN
from cdistill.models.llava import Llava, compose
from cdistill.train.recipes import Recipe, recipe_from_dict

VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 48,
    "patch_size": 8,
    "vision_use_head": False,
}


TOKENIZER = build_tokenizer()


def shape(layers: int, width: int = 64) -> dict[str, Any]:
    """Of a language model with two query heads for each head of keys."""
    return {
        "num_hidden_layers": layers,
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_attention_heads": width // 16,
        "num_key_value_heads": width // 32,
        "initializer_range": 0.3,
    }


def text_config(**changes: Any) -> Qwen2Config:
    tokenizer = build_tokenizer()
    values: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        "initializer_range": 0.2,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": None,
    }
    return Qwen2Config(**(values | changes))


def llava(
    *, vision: dict[str, Any] | None = None, teacher: Llava | None = None, **changes: Any
) -> LlavaForConditionalGeneration:
    """A random LLaVA in eval mode, 2 layers and width 32 unless changed; with ``teacher`` it fetches that one's adapter."""
    return compose(
        SiglipVisionConfig(**(VISION | (vision or {}))),
        text_config(**changes),
        image_token_id=build_tokenizer().convert_tokens_to_ids(IMAGE_TOKEN),
        image_seq_length=NUM_VISUAL_TOKENS,
        teacher=teacher,
    ).eval()


def save_teacher(folder: Path, *, vision: dict[str, Any] | None = None, seed: int = 1, **changes: Any) -> Path:
    """A random LLaVA of 4 layers and width 64 with its tokenizer."""
    torch.manual_seed(seed)
    shape = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
    llava(vision=vision, **(shape | changes)).save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


def save_base(folder: Path, *, tokenizer: Any = None, **changes: Any) -> Path:
    """A random causal language model of 2 layers and width 32 with its tokenizer."""
    torch.manual_seed(2)
    AutoModelForCausalLM.from_config(text_config(**changes)).save_pretrained(folder)
    (tokenizer or build_tokenizer()).save_pretrained(folder)
    return folder


def recipe_values(output: Path, models: Path, **changes: Any) -> dict[str, Any]:
    """Plain values of a recipe with a section of 3 steps of 4 samples for every objective; dpt, dft, sft run."""
    section = {"learning_rate": 1e-3, "samples": 12, "global_batch_size": 4, "warmup_ratio": 0.0, "data": {"turns": 2}}
    sections = {name: dict(section) for name in ("pt", "dpt", "dft", "sft", "vision")}
    sections["text"] = section | {"data": {"modality": "text", "turns": 2}}
    values = {
        "name": "test",
        "output": str(output),
        "deepspeed": "off",
        "logging_steps": 1,
        "teacher": str(models / "teacher"),
        "student": {"base": str(models / "base"), "taf": True},
        "vat": {"layers": "all", "rows": "answer"},
        "stages": ["dpt", "dft", "sft"],
        "stage": sections,
    }
    for key, value in changes.items():
        node, *rest = key.split("__")
        target = values
        for name in rest:
            target, node = target.setdefault(node, {}), name
        target[node] = value
    return values


def make_recipe(output: Path, models: Path, **changes: Any) -> Recipe:
    """`recipe_values` as a recipe; a__b=value changes the key a.b."""
    return recipe_from_dict(recipe_values(output, models, **changes))
