"""Batches, rows and models of others that would be read otherwise than they are meant, without a word."""

import pytest
import torch
from conversation_cases import byte_level_processor
from family_models import build_pair, draw
from safetensors.torch import load_file, save_file

import cdistill
from cdistill.train.compodistill import ConversationCollator

NAME = "llava_llama"


MISREAD = {
    "images left out": (lambda b: b.pop("pixel_values"), "input_ids hold visual tokens, and the batch holds no images"),
    "packed beside a mask": (
        lambda b: b.update(position_ids=torch.arange(b["input_ids"].shape[1]).remainder(5).expand_as(b["input_ids"])),
        "position_ids start anew within a row that has an attention_mask",
    ),
    "numbered samples": (lambda b: b["attention_mask"][:, 3:].mul_(2), "attention_mask must hold 0 and 1 alone"),
    "additive": (
        lambda b: b.update(attention_mask=(1.0 - b["attention_mask"]) * -1e9),
        "attention_mask must hold 0 and 1 alone",
    ),
}


@pytest.mark.parametrize("name", MISREAD)
def test_batches_that_models_would_misread_are_refused(name):
    change, message = MISREAD[name]
    student, teacher = build_pair("llava_llama")
    distillation, batch = cdistill.distill(teacher, student), draw("llava_llama", 9)
    change(batch)
    with pytest.raises(ValueError, match=message) as refused:
        distillation(batch)
    assert "\n" not in str(refused.value)


def test_positions_of_padding_may_be_any():
    """As collators count them that pad on the left: ones in the padding, then from 0 on."""
    student, teacher = build_pair("llava_llama")
    distillation, batch = cdistill.distill(teacher, student), draw("llava_llama", 9)
    turned = {name: value.flip(1) if value.shape == batch["labels"].shape else value for name, value in batch.items()}
    mask = turned["attention_mask"]
    positions = (mask.cumsum(1) - 1).masked_fill(mask == 0, 1)
    assert (positions.diff() < 0).any()
    torch.testing.assert_close(distillation(turned | {"position_ids": positions})["ar"], distillation(turned)["ar"])


@pytest.mark.parametrize("change", ["missing", "left out"])
def test_a_model_given_by_name_whose_weights_do_not_fit_is_refused(tmp_path, change):
    student, teacher = build_pair(NAME)
    teacher.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    name = next(key for key in state if key.endswith("layers.0.self_attn.q_proj.weight") and "vision" not in key)
    value = state.pop(name) if change == "missing" else torch.ones(4)
    state |= {} if change == "missing" else {name.removesuffix("weight") + "bias": value}
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"^the weights of {tmp_path} do not fit its config.json: .*q_proj.* {change}"):
        cdistill.CompoDistillTrainer(student, str(tmp_path), cdistill.CompoDistillConfig(str(tmp_path / "out")))


def test_only_a_completion_is_learned_and_what_is_not_read_is_named():
    processor = byte_level_processor(NAME)
    ask, answer = ({"role": "user", "content": "How many?"}, {"role": "assistant", "content": "One."})
    row = {"prompt": [ask, answer, ask], "completion": [{"role": "assistant", "content": "A red ring."}]}
    collator = ConversationCollator(processor, "qwen2_base")
    labels = collator([row])["labels"]
    assert processor.tokenizer.decode(labels[labels != -100]).strip() == "A red ring.<|endoftext|>"
    called = answer | {"tool_calls": [{"function": {"name": "count"}}]}
    rows = [{"messages": [ask, called], "tools": [{"name": "count"}], "id": "7"}] * 2
    with pytest.warns(UserWarning, match="rows hold what is not read") as said:
        collator(rows)
        collator(rows)
    assert [str(warning.message) for warning in said] == [
        "rows hold what is not read: tools, messages[].tool_calls",
    ]
