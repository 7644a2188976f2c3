"""LLaVA composition, teacher adapter fetch, the shared vision pass, saving and loading."""

import json

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForImageTextToText,
    LlamaConfig,
    LlavaForConditionalGeneration,
    Qwen2Config,
    SiglipVisionConfig,
)

from cdistill.models import (
    TAFLlavaForConditionalGeneration,
    check_pair,
    compose,
    encode_images,
    merge_visual_tokens,
    share_vision,
    student_embeddings,
    teacher_embeddings,
)
from cdistill.models.load import load_model

IMAGE, VOCABULARY, TOKENS = 5, 40, 9


def vision(**changes):
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}
    return SiglipVisionConfig(**{**size, "image_size": 24, "patch_size": 8, "vision_use_head": False, **changes})


def text(kind, width, layers):
    return kind(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=kind is Qwen2Config,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )


def build(kind, width, layers, seed, teacher=None, **options):
    torch.manual_seed(seed)
    model = compose(
        vision(), text(kind, width, layers), image_token_id=IMAGE, image_seq_length=TOKENS, teacher=teacher, **options
    )
    return model.eval()


def shared_embeddings(student, teacher, ids, pixels):
    shared = share_vision(student, pixels)
    return student_embeddings(student, ids, shared), teacher_embeddings(teacher, ids, shared)


def batch(generator, images=2):
    ids = torch.randint(6, VOCABULARY, (images, TOKENS + 6), generator=generator)
    ids[:, 2 : 2 + TOKENS] = IMAGE
    return ids, torch.randn(images, 3, 24, 24, generator=generator)


@pytest.fixture
def generator(request):
    return torch.Generator().manual_seed(len(request.node.name))


@pytest.mark.parametrize("kind", [Qwen2Config, LlamaConfig])
def test_composition_is_the_stock_llava(kind, generator):
    model = build(kind, 32, 2, 0)
    assert type(model) is LlavaForConditionalGeneration
    ids, pixels = batch(generator)
    embeds = student_embeddings(model, ids, share_vision(model, pixels))
    ours = model(inputs_embeds=embeds, attention_mask=torch.ones_like(ids)).logits
    stock = model(input_ids=ids, pixel_values=pixels, attention_mask=torch.ones_like(ids)).logits
    torch.testing.assert_close(ours, stock)


@pytest.mark.parametrize("activation", ["linear", "gelu"])
def test_taf_tokens_are_the_map_of_the_teachers_tokens(activation, generator):
    teacher = build(LlamaConfig, 48, 3, 1)
    student = build(Qwen2Config, 32, 2, 2, teacher, taf_activation=activation)
    ids, pixels = batch(generator)
    with torch.no_grad():
        theirs = torch.stack(list(teacher.get_image_features(pixels).pooler_output))
        adapter = student.model.multi_modal_projector
        wanted = adapter.map(nn.functional.gelu(theirs) if activation == "gelu" else theirs)
        ours, teachers = shared_embeddings(student, teacher, ids, pixels)
    torch.testing.assert_close(ours[ids == IMAGE].view_as(wanted), wanted)
    torch.testing.assert_close(teachers[ids == IMAGE].view_as(theirs), theirs)
    stock = student(input_ids=ids, pixel_values=pixels).logits
    torch.testing.assert_close(student(inputs_embeds=ours).logits, stock)


def test_vision_encoder_and_teacher_adapter_run_once(generator):
    teacher = build(LlamaConfig, 48, 3, 1)
    student = build(Qwen2Config, 32, 2, 2, teacher)
    calls = []
    for name, module in (
        ("student encoder", student.model.vision_tower),
        ("teacher encoder", teacher.model.vision_tower),
        ("student P_T", student.model.multi_modal_projector.teacher),
        ("teacher P_T", teacher.model.multi_modal_projector),
    ):
        module.register_forward_hook(lambda *_, name=name: calls.append(name))
    shared_embeddings(student, teacher, *batch(generator))
    assert sum("encoder" in call for call in calls) == 1
    assert sum("P_T" in call for call in calls) == 1


def test_gradient_reaches_the_map_and_never_the_encoder(generator):
    teacher = build(LlamaConfig, 48, 3, 1)
    student = build(Qwen2Config, 32, 2, 2, teacher)
    embeds, theirs = shared_embeddings(student, teacher, *batch(generator))
    embeds.square().sum().backward()
    adapter = student.model.multi_modal_projector
    assert adapter.map.weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in adapter.teacher.parameters())
    assert all(p.grad is None for p in student.model.vision_tower.parameters())
    assert not theirs.requires_grad


@pytest.mark.parametrize("taf", [False, True])
def test_save_and_load_keep_the_logits(taf, tmp_path, generator):
    teacher = build(LlamaConfig, 48, 3, 1)
    model = build(Qwen2Config, 32, 2, 2, teacher if taf else None)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").is_file()
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    assert type(loaded) is (TAFLlavaForConditionalGeneration if taf else LlavaForConditionalGeneration)
    ids, pixels = batch(generator)
    before = model(input_ids=ids, pixel_values=pixels).logits
    assert torch.equal(loaded(input_ids=ids, pixel_values=pixels).logits, before)


def test_a_taf_student_generates(generator):
    teacher = build(LlamaConfig, 48, 3, 1)
    student = build(Qwen2Config, 32, 2, 2, teacher)
    ids, pixels = batch(generator)
    out = student.generate(input_ids=ids, pixel_values=pixels, max_new_tokens=3, do_sample=False)
    assert out.shape[1] <= ids.shape[1] + 3
    logits = student(input_ids=ids, pixel_values=pixels).logits[:, -1]
    assert torch.equal(out[:, ids.shape[1]], logits.argmax(-1))


def test_encoder_features_come_from_the_penultimate_layer(generator):
    model = build(Qwen2Config, 32, 2, 0)
    _, pixels = batch(generator)
    states = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states
    assert torch.equal(encode_images(model, pixels), states[-2])


def test_bad_pairs_are_refused(generator):
    teacher = build(LlamaConfig, 48, 3, 1)
    student = build(Qwen2Config, 32, 2, 2, teacher)
    check_pair(student, teacher)
    check_pair(build(Qwen2Config, 32, 2, 3), teacher)  # an encoder of its own, without TAF
    other = build(LlamaConfig, 48, 3, 4)
    with pytest.raises(ValueError, match="vision_tower"):
        check_pair(student, other)
    other = build(LlamaConfig, 48, 3, 1)
    nn.init.normal_(other.model.multi_modal_projector.linear_1.weight)
    with pytest.raises(ValueError, match="multi_modal_projector"):
        check_pair(student, other)
    other = build(LlamaConfig, 48, 3, 1)
    other.config.image_seq_length = 16  # transformers does not read it
    check_pair(student, other)
    other.config.vision_feature_select_strategy = "default"
    with pytest.raises(ValueError, match=r"visual tokens of an image differ: student 9 .*, teacher 8"):
        check_pair(student, other)
    wide = build(LlamaConfig, 64, 2, 1)
    with pytest.raises(ValueError, match="teacher adapter"):
        student.model.multi_modal_projector.fetch(wide.model.multi_modal_projector)
    with pytest.raises(ValueError, match="taf_activation"):
        build(Qwen2Config, 32, 2, 2, teacher, taf_activation="relu")
    ids, _ = batch(generator)
    with pytest.raises(ValueError, match="image tokens"):
        merge_visual_tokens(student, ids, torch.zeros(1, TOKENS, 32))
    with pytest.raises(ValueError, match="image tokens"):
        merge_visual_tokens(student, ids, None)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"hidden_size": 16}, "some have other shapes"),
        ({"num_hidden_layers": 9}, "they are of 2 layers, num_hidden_layers is 9"),
    ],
)
def test_weights_that_do_not_fit_their_configuration(change, why, tmp_path):
    build(LlamaConfig, 32, 2, 0).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["text_config"] |= change
    config["text_config"].pop("layer_types", None)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"^teacher: the weights in .* do not fit its config.json: {why}$") as error:
        load_model(tmp_path, "teacher")
    assert "\n" not in str(error.value)
