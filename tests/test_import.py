"""`cdistill import`: checkpoints of other projects, whose imported models give what plain torch makes of their weights."""

import json

import layouts
import pytest
import torch
from plain_llava import Plain, logits, mlp, vision_states
from safetensors import safe_open
from transformers import AutoModelForImageTextToText, AutoProcessor

from cdistill.cli import main

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
GENERATOR = torch.Generator().manual_seed(0)


def imported(path, *options):
    """The model and the processor of an imported checkpoint, in fp32."""
    output = path.with_name(f"{path.name}-imported")
    assert main(["import", str(path), str(output), *options]) == 0
    model = AutoModelForImageTextToText.from_pretrained(output, dtype=torch.float32, attn_implementation="eager")
    return model.eval(), AutoProcessor.from_pretrained(output), output


def seen(tower, config, pixels, drop):
    return vision_states(tower, config, pixels)[-2][drop:]


@torch.no_grad()
def assert_same_logits(model, rows, plain, pixels, visual):
    """``plain`` of two stretches of words with the visual tokens between them, and the model's logits of the same."""
    before, after = torch.arange(3, 9), torch.arange(20, 26)
    image = torch.full((len(visual),), model.config.image_token_id)
    ids = torch.cat((before, image, after))[None]
    found = model(input_ids=ids, pixel_values=pixels[None].float()).logits[0, :, :rows]
    expected = plain((before, visual, after))
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-4 * float(expected.abs().max()))


def weights_of(folder):
    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return found


@pytest.mark.parametrize("student", [False, True], ids=["teacher", "student"])
def test_the_authors_checkpoints(tmp_path, student, capsys):
    weights = layouts.authors(tmp_path / "theirs", student=student)
    model, processor, folder = imported(tmp_path / "theirs")
    assert type(model).__name__ == ("TAFLlava" if student else "Llava") + "ForConditionalGeneration"
    assert "compodistill: " in capsys.readouterr().out
    language, tower = Plain(weights, "language_model."), Plain(weights, "vision_tower._vision_tower.vision_model.")
    pixels = torch.randn(3, 28, 28, generator=GENERATOR)
    visual = mlp(Plain(weights, "connector._connector."), seen(tower, layouts.SIGLIP, pixels, 1))
    assert len(visual) == 15  # the first of 16 patches is dropped, as of the real 729
    if student:
        visual = Plain(weights, "connector.post_connector.").linear(visual)
    rows = len(weights["language_model.lm_head.weight"])

    def plain(parts):
        return logits(language.below("model"), language.below("lm_head"), layouts.TEXT, parts)

    assert_same_logits(model, rows, plain, pixels, visual)
    assert model.config.text_config.vocab_size == rows  # the image token has one of the spare rows
    kept = weights_of(folder)
    assert torch.equal(
        kept["language_model.model.embed_tokens.weight"], weights["language_model.model.embed_tokens.weight"]
    )
    assert len(kept) == len(weights) and {value.dtype for value in kept.values()} == {torch.float16}
    assert_prompt(processor, "<|endoftext|>", 15)
    assert model.generation_config.eos_token_id == processor.tokenizer.convert_tokens_to_ids("<|endoftext|>")


def assert_prompt(processor, end, visual, bos=None, system=SYSTEM):
    """A conversation as the projects' code writes it: tokens of the words between images, one stretch by one."""
    image = {"type": "image", "image": layouts_picture(20, 40)}
    chat = [
        {"role": "user", "content": [image, {"type": "text", "text": "What is this?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "A red ring."}]},
        {"role": "user", "content": [{"type": "text", "text": "Is it?"}]},
    ]
    found = processor.apply_chat_template(
        chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    text = f"{system} USER: <image>\nWhat is this? ASSISTANT: A red ring.{end}USER: Is it? ASSISTANT:"
    own = processor.tokenizer
    before, after = (own(part, add_special_tokens=False)["input_ids"] for part in text.split("<image>"))
    token = own.convert_tokens_to_ids("<image>")
    wanted = [*([] if bos is None else [bos]), *before, *[token] * visual, *after]
    assert found["input_ids"][0].tolist() == wanted
    return found["pixel_values"]


def layouts_picture(height, width):
    from PIL import Image

    pixels = torch.randint(0, 256, (height, width, 3), generator=GENERATOR, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


@pytest.mark.parametrize("inside", [False, True], ids=["tower elsewhere", "tower inside"])
def test_llava(tmp_path, inside, capsys):
    elsewhere = layouts.tower(tmp_path / "clip")
    weights = layouts.flat(tmp_path / "theirs", inside=inside)
    model, processor, folder = imported(tmp_path / "theirs", "--vision-tower", str(tmp_path / "clip"))
    said = capsys.readouterr().out
    assert "temperature, top_p, as do_sample is not set" in said and "inv_freq" in said
    assert ("4 weights that no LLaVA has" in said) != inside
    tower = (
        Plain(weights, "model.vision_tower.vision_tower.vision_model.") if inside else Plain(elsewhere, "vision_model.")
    )
    pixels = torch.randn(3, 28, 28, generator=GENERATOR)
    visual = mlp(Plain(weights, "model.mm_projector."), seen(tower, layouts.CLIP, pixels, 1))
    rows = len(weights["lm_head.weight"])

    def plain(parts):
        return logits(Plain(weights, "model."), Plain(weights, "lm_head."), layouts.TEXT, parts)

    assert_same_logits(model, rows, plain, pixels, visual)
    kept = weights_of(folder)
    head = kept["language_model.lm_head.weight"]
    assert torch.equal(head[:rows], weights["lm_head.weight"]) and torch.equal(head[rows:], head[:1])
    assert model.config.image_token_id == rows and len(head) == rows + 1
    assert_prompt(processor, "</s>", 4, bos=1)
    assert model.generation_config.eos_token_id == 2
    assert json.loads((folder / "config.json").read_text())["torch_dtype"] == "float16"
