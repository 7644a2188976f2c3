"""`cdistill import`: checkpoints of other projects, whose imported models give what plain torch makes of their weights."""

import json
from functools import partial

import layouts
import numpy as np
import pytest
import torch
from conversation_cases import picture
from PIL import Image
from plain_llava import Plain, logits, mlp, vision_states
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from cdistill.cli import main
from cdistill.formats.prompts import chat_template
from cdistill.formats.weights import weights_in, write

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
    if student:
        layouts.slow_qwen2(tmp_path / "theirs")
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
    assert processor.tokenizer.pad_token == "<|endoftext|>"
    assert model.generation_config.eos_token_id == processor.tokenizer.convert_tokens_to_ids("<|endoftext|>")


def assert_prompt(processor, end, visual, bos=None, system=SYSTEM):
    """A conversation as the projects' code writes it: tokens of the words between images, one stretch by one."""
    image = {"type": "image", "image": picture(20, 40)}
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


@pytest.mark.parametrize("inside", [False, True], ids=["tower elsewhere", "tower inside"])
def test_llava_one_point_five(tmp_path, inside, capsys):
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
    values = json.loads((folder / "config.json").read_text())
    assert (values["torch_dtype"], values["architectures"]) == ("float16", ["LlavaForConditionalGeneration"])


@pytest.mark.parametrize("encoder", ["clip", "siglip"])
def test_images_are_padded_as_llava_pads_them(tmp_path, encoder):
    layouts.tower(tmp_path / "tower", encoder)
    kind = {} if encoder == "clip" else {"kind": "bunny-qwen2", "language": "qwen2", "encoder": encoder}
    layouts.flat(tmp_path / "theirs", **kind)
    _, processor, _ = imported(tmp_path / "theirs", "--vision-tower", str(tmp_path / "tower"))
    image = picture(20, 40)
    square = Image.new("RGB", (40, 40), (122, 116, 104) if encoder == "clip" else (127, 127, 127))  # the mean
    square.paste(image, (0, 10))
    found = processor(text="<image>", images=image, return_tensors="pt")["pixel_values"][0]
    norm = (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD) if encoder == "clip" else ([0.5] * 3, [0.5] * 3)
    torch.testing.assert_close(found, square_pixels(square, 28, *norm), rtol=0, atol=1e-6)


def square_pixels(image, size, mean=OPENAI_CLIP_MEAN, deviation=OPENAI_CLIP_STD):
    """Of a square image: resized, and normed, in float32."""
    values = np.asarray(image.resize((size, size), Image.Resampling.BICUBIC), np.float32) * np.float32(1 / 255)
    mean, deviation = (np.array(x, np.float32) for x in (mean, deviation))
    return torch.from_numpy((values - mean) / deviation).permute(2, 0, 1)


FLAT = {
    "mistral": {"kind": "llava_mistral", "form": "safetensors"},
    "mobilevlm": {"kind": "mobilevlm", "vision_tower_type": "clip", "form": "bin"},
    "stretched": {"rope_scaling": {"type": "linear", "factor": 2.0}, "form": "bin"},
    "bunny": {"kind": "bunny-qwen2", "language": "qwen2", "encoder": "siglip", "form": "safetensors shards"},
    "bunny inside": {"kind": "bunny-qwen2", "language": "qwen2", "encoder": "siglip", "inside": True},
    "bunny clip": {"kind": "bunny-llama", "mm_vision_tower": "openai/clip-patch14-28", "form": "safetensors"},
}


@pytest.mark.parametrize("case", FLAT)
def test_projects_made_of_llavas_code(tmp_path, case):
    encoder = FLAT[case].get("encoder", "clip")
    elsewhere = layouts.tower(tmp_path / "tower", encoder)
    weights = layouts.flat(tmp_path / "theirs", **FLAT[case])
    options = ["--prompt", "vicuna_v1"] if case == "bunny clip" else []
    model, processor, _ = imported(tmp_path / "theirs", "--vision-tower", str(tmp_path / "tower"), *options)
    inside = FLAT[case].get("inside")
    tower = (
        Plain(weights, "model.vision_tower.vision_tower.vision_model.") if inside else Plain(elsewhere, "vision_model.")
    )
    pixels = torch.randn(3, 28, 28, generator=GENERATOR)
    config = layouts.CLIP if encoder == "clip" else layouts.SIGLIP
    states = seen(tower, config, pixels, int(encoder == "clip"))  # SigLIP has no class token: Bunny drops nothing
    visual = mlp(Plain(weights, "model.mm_projector."), states)

    text = layouts.TEXT | ({"rope_factor": 2.0} if case == "stretched" else {})

    def plain(parts):
        return logits(Plain(weights, "model."), Plain(weights, "lm_head."), text, parts)

    assert_same_logits(model, len(weights["lm_head.weight"]), plain, pixels, visual)
    if case == "mistral":
        text = processor.apply_chat_template(CHAT, add_generation_prompt=True, tokenize=False)
        assert text == "[INST] <image>\nWhat? [/INST] A ring. </s>[INST] Why? [/INST]"


CHAT = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "A ring."}]},
    {"role": "user", "content": [{"type": "text", "text": "Why?"}]},
]


def test_other_conversation_modes():
    speaker = layouts.make_tokenizer("qwen2")
    for name, wanted in (
        (
            "chatml_direct",
            "<|im_start|>system\nAnswer the questions.<|im_end|><|im_start|>user\n<image>\nWhat?<|im_end|>"
            "<|im_start|>assistant\nA ring.<|im_end|><|im_start|>user\nWhy?<|im_end|><|im_start|>assistant\n",
        ),
        ("qwen2_instruct", f"{SYSTEM} USER: <image>\nWhat? ASSISTANT: A ring.<|im_end|>USER: Why? ASSISTANT:"),
    ):
        source, end = chat_template(name, speaker, "<image>")
        assert (
            speaker.apply_chat_template(CHAT, chat_template=source, add_generation_prompt=True, tokenize=False)
            == wanted
        )
        assert end == speaker.convert_tokens_to_ids("<|im_end|>")


@pytest.mark.parametrize("kind", ["qwen2", "stablelm", "phi3"])
def test_tinyllava(tmp_path, kind):
    """The whole, and its language model by itself, as transformers has it."""
    torch.manual_seed(0)
    rows = len(layouts.make_tokenizer("qwen2")) + 3
    fields = layouts.TEXT | {"vocab_size": rows, "initializer_range": 0.3, "pad_token_id": 0, "eos_token_id": 0}
    config = AutoConfig.for_model(kind, **fields)
    language = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    weights = layouts.authors(tmp_path / "theirs", factory="tinyllava", language=language, image_aspect_ratio="pad")
    model, _, _ = imported(tmp_path / "theirs")
    pixels = torch.randn(3, 28, 28, generator=GENERATOR)
    tower = Plain(weights, "vision_tower._vision_tower.vision_model.")
    visual = mlp(Plain(weights, "connector._connector."), seen(tower, layouts.SIGLIP, pixels, 1))

    def plain(parts):
        words = language.get_input_embeddings()
        embeddings = torch.cat([words(part) if part.dtype == torch.long else part.float() for part in parts])
        return language(inputs_embeds=embeddings[None]).logits[0].double()

    assert_same_logits(model, rows, plain, pixels, visual)


@torch.no_grad()
def test_llava_next(tmp_path):
    """Tiles, taken apart and put together by hand as LLaVA does it: widths first, and whole numbers cut off."""
    elsewhere = layouts.tower(tmp_path / "clip")
    points = [[56, 28], [28, 84]]  # widths and heights
    weights = layouts.flat(
        tmp_path / "theirs",
        newline=True,
        image_aspect_ratio="anyres",
        mm_patch_merge_type="spatial_unpad",
        image_grid_pinpoints=str(points),
    )
    model, processor, _ = imported(tmp_path / "theirs", "--vision-tower", str(tmp_path / "clip"))
    assert type(model).__name__ == "LlavaNextForConditionalGeneration"
    image = picture(30, 50)
    inputs = processor(text="see this <image> now", images=image, return_tensors="pt")
    small = image.resize((47, 28), Image.Resampling.BICUBIC)  # 50 x 30 in 56 x 28, and black at both sides
    wide = Image.new("RGB", (56, 28))
    wide.paste(small, (4, 0))
    whole = image.resize((28, 28), Image.Resampling.BICUBIC)
    tiles = [square_pixels(part, 28) for part in (whole, wide.crop((0, 0, 28, 28)), wide.crop((28, 0, 56, 28)))]
    found = inputs["pixel_values"][0]
    assert found.shape[0] == 3
    torch.testing.assert_close(found, torch.stack(tiles), rtol=0, atol=1e-6)
    tower, projector = Plain(elsewhere, "vision_model."), Plain(weights, "model.mm_projector.")
    base, left, right = (mlp(projector, seen(tower, layouts.CLIP, tile, 1)) for tile in found)
    rows = torch.cat([tile.view(2, 2, -1) for tile in (left, right)], 1)
    new = int(50 * (2 / 30))  # columns of 4 that the image fills
    cut = (4 - new) // 2
    lines = [torch.cat((row[cut : 4 - cut], weights["model.image_newline"].double()[None])) for row in rows]
    visual = torch.cat((base, *lines))
    ids, token = inputs["input_ids"][0], model.config.image_token_id
    places = (ids == token).nonzero()[:, 0]
    assert len(places) == len(visual)
    expected = logits(
        *(Plain(weights, "model."), Plain(weights, "lm_head."), layouts.TEXT),
        (ids[: places[0]], visual, ids[places[-1] + 1 :]),
    )
    result = model(**inputs).logits[0, :, : len(weights["lm_head.weight"])]
    torch.testing.assert_close(result.double(), expected, rtol=0, atol=2e-4 * float(expected.abs().max()))


def test_a_projector_before_its_language_model(tmp_path):
    elsewhere = layouts.tower(tmp_path / "clip", with_text=False, form="safetensors")
    weights = layouts.projector_alone(tmp_path / "theirs", tmp_path / "base")
    parts = ["--vision-tower", str(tmp_path / "clip"), "--base", str(tmp_path / "base")]
    model, _, folder = imported(tmp_path / "theirs", *parts)
    assert_llava(model, weights, elsewhere)
    path = tmp_path / "theirs" / "mm_projector.bin"
    assert main(["import", str(path), str(tmp_path / "again"), *parts]) == 0
    again, kept = weights_of(tmp_path / "again"), weights_of(folder)
    assert again.keys() == kept.keys() and all(torch.equal(again[name], kept[name]) for name in kept)


def assert_llava(model, weights, elsewhere):
    pixels = torch.randn(3, 28, 28, generator=GENERATOR)
    visual = mlp(
        Plain(weights, "model.mm_projector."), seen(Plain(elsewhere, "vision_model."), layouts.CLIP, pixels, 1)
    )

    def plain(parts):
        return logits(Plain(weights, "model."), Plain(weights, "lm_head."), layouts.TEXT, parts)

    assert_same_logits(model, len(weights["lm_head.weight"]), plain, pixels, visual)


@pytest.mark.parametrize("form", ["bin", "safetensors"])
def test_a_projector_with_lora(tmp_path, form):
    elsewhere = layouts.tower(tmp_path / "clip")
    weights = layouts.projector_alone(tmp_path / "theirs", tmp_path / "base")
    merged = layouts.add_lora(tmp_path / "theirs", weights, form)
    model, _, _ = imported(
        tmp_path / "theirs", "--vision-tower", str(tmp_path / "clip"), "--base", str(tmp_path / "base")
    )
    assert_llava(model, merged, elsewhere)
    assert not torch.equal(
        merged["model.layers.1.self_attn.q_proj.weight"], weights["model.layers.1.self_attn.q_proj.weight"]
    )


@pytest.mark.parametrize("legacy", [True, False, None])
def test_words_beside_images_with_sentencepiece(tmp_path, legacy):
    """As the slow tokenizer of transformers 4 made them, part by part; it took a missing ``legacy`` for true."""
    pieces = pytest.importorskip("sentencepiece")
    layouts.tower(tmp_path / "clip")
    theirs = tmp_path / "theirs"
    layouts.flat(theirs, rows=298, vocab_size=298)
    rows = layouts.sentencepiece(theirs, **({} if legacy is None else {"legacy": legacy}))
    slow = pieces.SentencePieceProcessor(model_file=str(theirs / "tokenizer.model"))
    assert rows == 297

    def part(text):
        """One call of the slow tokenizer: a space before the text, and with ``legacy`` behind special tokens, too."""
        first, *others = text.split("</s>")
        ids = slow.encode(first)
        for other in others:
            more = slow.encode(other)
            ids += [2, *(more if legacy in (True, None) else more[1:])]
        return ids

    _, processor, _ = imported(theirs, "--vision-tower", str(tmp_path / "clip"))
    chat = [
        {"role": "user", "content": [{"type": "image", "image": picture(20, 40)}, CHAT[0]["content"][1]]},
        *CHAT[1:],
    ]
    found = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=True)
    before, after = f"{SYSTEM} USER: ", "\nWhat? ASSISTANT: A ring.</s>USER: Why? ASSISTANT:"
    assert found["input_ids"][0] == [1, *part(before), *[297] * 4, *part(after)]


def test_large_weights_are_written_in_several_files(tmp_path):
    tensors = {f"w{i}": torch.randn(4, 4, generator=GENERATOR) for i in range(5)}
    write({name: partial(tensors.get, name) for name in tensors}, tmp_path, "checkpoint", most=130)
    assert sorted(path.name for path in tmp_path.glob("*.safetensors")) == [
        f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)
    ]
    found = weights_in(tmp_path, "checkpoint")
    assert found.shapes.keys() == tensors.keys() and all(torch.equal(found[name], tensors[name]) for name in tensors)
    assert json.loads((tmp_path / "model.safetensors.index.json").read_text())["metadata"] == {"total_size": 320}
