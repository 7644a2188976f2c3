"""LoRA students: low-rank additions by peft while a stage trains, merged into the weights when it is saved."""

from __future__ import annotations

from torch import Tensor, nn

from cdistill.errors import InputError
from cdistill.models.load import Model
from cdistill.models.parts import language_model
from cdistill.train.recipes import LoRAConfig

ADAPTER = "cdistill"


def add_lora(student: Model, config: LoRAConfig) -> None:
    """Add LoRA to every linear layer of the language model, in place; the head and everything visual stay as they are.

    Raises ValueError if peft is not installed.
    """
    try:
        import peft
    except ImportError:
        raise InputError("student.lora needs peft: pip install cdistill[lora]") from None
    language = language_model(student)
    prefix = next(name for name, module in student.named_modules() if module is language)
    targets = [f"{prefix}.{name}" for name, module in language.named_modules() if isinstance(module, nn.Linear)]
    options = peft.LoraConfig(
        r=config.r, lora_alpha=config.alpha, lora_dropout=config.dropout, target_modules=targets, bias="none"
    )
    peft.inject_adapter_in_model(options, student, ADAPTER)


def merged_state(state: dict[str, Tensor], config: LoRAConfig) -> dict[str, Tensor]:
    """A state dict with LoRA merged and under the names of the model without it; products are made in fp32.

    Works on the state dict because ZeRO-3 gives the whole weights there alone.
    """
    result = {}
    for name, value in state.items():
        if ".lora_" in name:
            continue
        if name.endswith(".base_layer.weight"):
            layer = name.removesuffix(".base_layer.weight")
            a, b = (state[f"{layer}.lora_{side}.{ADAPTER}.weight"].float() for side in "AB")
            value = (value.float() + (config.alpha / config.r) * (b @ a)).to(value.dtype)
        result[name.replace(".base_layer.", ".")] = value
    return result
