"""Students of every LLaVA: whatever tower, feature layers, select strategy and kind of adapter their teacher has."""

import json

import numpy as np
import pytest
import torch
from builtin_models import make_recipe, save_base, text_config
from PIL import Image
from torch import nn
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    Dinov2Config,
    Dinov2WithRegistersConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PixtralVisionConfig,
    Qwen2Config,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from cdistill import distill
from cdistill.builtin.dataset import build_tokenizer
from cdistill.data.samples import IMAGE_TOKEN
from cdistill.models import check_pair, compose, share_vision, student_embeddings, teacher_embeddings
from cdistill.models.export import export
from cdistill.models.llava import visual_tokens
from cdistill.plan.memory import plan
from cdistill.train import run
from cdistill.train.build import build_models
from cdistill.train.recipes import load_recipe
from cdistill.vat import VATConfig

SIZE = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
SIZE |= {"image_size": 24, "patch_size": 8}
TOWERS = {
    "siglip": lambda: SiglipVisionConfig(**SIZE, vision_use_head=False),
    "clip": lambda: CLIPVisionConfig(**SIZE),
    "dinov2": lambda: Dinov2Config(**SIZE),
    "registers": lambda: Dinov2WithRegistersConfig(**SIZE, num_register_tokens=2),
    "pixtral": lambda: PixtralVisionConfig(**SIZE, head_dim=8),
}
# tower, feature layers, strategy, bias and activation of the adapter; visual tokens of an image, counted by hand
WAYS = [
    ("siglip", -2, "full", True, "gelu", 9),
    ("siglip", -2, "default", True, "gelu", 8),
    ("siglip", [-1, 1], "default", False, "relu", 8),
    ("clip", -2, "default", True, "gelu", 9),
    ("clip", 1, "full", False, "gelu", 10),
    ("clip", [-2, -3, 3], "default", True, "silu", 9),
    ("dinov2", -1, "default", True, "gelu", 9),
    ("registers", 2, "default", True, "gelu", 11),
    ("pixtral", -1, "full", True, "gelu", None),
    ("pixtral", [1, -1], "full", False, "gelu", None),
]
IMAGE = build_tokenizer().convert_tokens_to_ids(IMAGE_TOKEN)


def text(width, layers):
    return Qwen2Config(
        vocab_size=40,
        hidden_size=width,
        intermediate_size=width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
        initializer_range=0.2,
    )


def teacher_of(tower, layers, strategy, bias, activation):
    torch.manual_seed(1)
    config = LlavaConfig(
        vision_config=TOWERS[tower](),
        text_config=text(32, 4),
        image_token_index=IMAGE,
        vision_feature_layer=layers,
        vision_feature_select_strategy=strategy,
        multimodal_projector_bias=bias,
        projector_hidden_act=activation,
    )
    return LlavaForConditionalGeneration(config).eval()


def student_of(teacher, seed=2, taf=True, width=24):
    torch.manual_seed(seed)
    given = {"teacher" if taf else "source": teacher}
    model = compose(teacher.config.vision_config, text(width, 3), image_token_id=IMAGE, **given).eval()
    if not taf:
        model.model.vision_tower.load_state_dict(teacher.model.vision_tower.state_dict())
    nn.init.normal_(getattr(model.model.multi_modal_projector, "map" if taf else "linear_2").weight)
    return model


def batch_of(tower, count):
    """Two samples with an image each; of any size for Pixtral, whose tokens are one for each patch of 8 x 8 pixels."""
    generator = torch.Generator().manual_seed(3)
    sizes = [(24, 8), (16, 24)] if tower == "pixtral" else [(24, 24)] * 2
    pixels = torch.zeros(2, 3, 24, 24)
    rows = []
    for i, (height, width) in enumerate(sizes):
        pixels[i, :, :height, :width] = torch.randn(3, height, width, generator=generator)
        rows.append([7, 8, *[IMAGE] * (count or height * width // 64), 9, 10 + i, 12, 1])
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    labels = torch.where(torch.tensor([[j >= len(row) - 3 for j in range(longest)] for row in rows]), ids, -100)
    labels[ids == 0] = -100
    batch = {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": labels, "pixel_values": pixels}
    return batch | ({"image_sizes": torch.tensor(sizes)} if tower == "pixtral" else {})


@pytest.mark.parametrize("way", WAYS, ids=lambda way: "-".join(map(str, way)))
def test_the_shared_pass_is_what_transformers_computes(way):
    *how, count = way
    teacher = teacher_of(*how)
    tokens = visual_tokens(teacher.config)
    assert (None if tokens is None else tokens.total) == count
    batch = batch_of(how[0], count)
    sizes = batch.get("image_sizes")
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    for taf in (True, False):
        student = student_of(teacher, taf=taf)
        check_pair(student, teacher)
        assert student.config.image_seq_length == (count or LlavaConfig().image_seq_length)
        shared = share_vision(student, batch["pixel_values"], sizes)
        pairs = ((student, student_embeddings), (teacher, teacher_embeddings))
        for model, embeddings in pairs:
            embeds = embeddings(model, batch["input_ids"], shared)
            ours = model(inputs_embeds=embeds, attention_mask=batch["attention_mask"]).logits
            assert torch.equal(ours, model(**inputs).logits)


@pytest.mark.parametrize("way", [WAYS[2], WAYS[5], WAYS[9]], ids=lambda way: "-".join(map(str, way)))
def test_losses_and_gradients_do_not_depend_on_who_looks(way):
    """A frozen encoder is shared, one that takes gradients is not: both models then run as transformers runs them."""
    *how, count = way
    found = []
    for shared in (True, False):
        teacher = teacher_of(*how)
        student = student_of(teacher)
        student.requires_grad_(True)
        if shared:
            student.model.vision_tower.requires_grad_(False)
            student.model.multi_modal_projector.teacher.requires_grad_(False)
        losses = distill(teacher, student, vat=VATConfig(layers="all"))(batch_of(how[0], count))
        losses["loss"].backward()
        adapter = student.model.multi_modal_projector.map
        found.append([losses[name].detach() for name in ("ar", "kd", "vat")] + [adapter.weight.grad, adapter.bias.grad])
    for ours, plain in zip(*found, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-6, atol=1e-6)
    assert found[0][3].abs().max() > 0 and found[0][2] > 0


@pytest.mark.parametrize("width", [24, 32])
@pytest.mark.parametrize("bias", [True, False])
def test_a_taf_student_is_a_teacher(width, bias, tmp_path):
    first = teacher_of("siglip", -2, "default", bias, "gelu")
    second = student_of(first, width=width)
    second.model.multi_modal_projector.map.bias.data.normal_()
    third = student_of(second, seed=4, width=width)
    check_pair(third, second)
    with pytest.raises(ValueError, match="multi_modal_projector differs"):
        check_pair(third, first)
    batch = batch_of("siglip", 8)
    with torch.no_grad():
        theirs = torch.stack(list(second.get_image_features(batch["pixel_values"]).pooler_output))
        shared = share_vision(third, batch["pixel_values"])
    assert torch.equal(shared.teacher_tokens, theirs)
    assert distill(second, third, vat=VATConfig(layers="all"))(batch)["loss"] > 0
    build_tokenizer().save_pretrained(tmp_path / "third")
    third.save_pretrained(tmp_path / "third")
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "third").eval()
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    want = third(**inputs).logits
    assert torch.equal(loaded(**inputs).logits, want)
    export(tmp_path / "third", tmp_path / "out")
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "out").eval()
    assert (type(merged) is LlavaForConditionalGeneration) == (width == 32)
    torch.testing.assert_close(merged(**inputs).logits, want, rtol=1e-4, atol=1e-5)
    fourth = student_of(merged, seed=5)
    check_pair(fourth, merged)


def test_more_activations_than_a_llava_has_are_left_as_trained(tmp_path):
    first = teacher_of("clip", -2, "default", True, "gelu")
    torch.manual_seed(3)
    options = {"image_token_id": IMAGE, "taf_activation": "gelu"}
    second = compose(first.config.vision_config, text(24, 3), teacher=first, **options).eval()
    third = student_of(second)
    batch = batch_of("clip", 9)
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    with torch.no_grad():
        theirs = torch.stack(list(second.get_image_features(batch["pixel_values"]).pooler_output))
    assert torch.equal(share_vision(third, batch["pixel_values"]).teacher_tokens, theirs)
    third.save_pretrained(tmp_path / "third")
    build_tokenizer().save_pretrained(tmp_path / "third")
    done = export(tmp_path / "third", tmp_path / "out")
    assert done.merged == () and any("more activations" in line for line in done.remarks)
    out = AutoModelForImageTextToText.from_pretrained(tmp_path / "out").eval()
    assert torch.equal(out(**inputs).logits, third(**inputs).logits)


def test_encoders_of_their_own_are_taken_if_their_tokens_are_the_same_patches():
    teacher, student = (
        teacher_of(tower, -2, how, True, "gelu") for tower, how in (("siglip", "full"), ("clip", "default"))
    )
    check_pair(student, teacher)
    for tower, how, said in (
        ("siglip", "default", r"8 \(siglip_vision_model, default, without the first patch\)"),
        ("clip", "full", r"10 \(clip_vision_model, full, 1 of them no patches\)"),
        ("registers", "default", r"11 \(dinov2_with_registers, default, 2 of them no patches\)"),
        ("pixtral", "full", r"any number \(pixtral, full\)"),
    ):
        other = teacher_of(tower, -2, how, True, "gelu")
        for refuse in (check_pair, lambda s, t: distill(t, s)):
            with pytest.raises(ValueError, match=f"visual tokens of an image differ: student 9 .*, teacher {said}"):
                refuse(student, other)


@pytest.mark.parametrize(
    ("tower", "changes", "message"),
    [
        (
            "pixtral",
            {"vision_feature_select_strategy": "default"},
            "vision_feature_select_strategy default cannot",
        ),
        ("clip", {"vision_feature_layer": 4}, "vision_feature_layer 4 does not exist"),
        ("clip", {"vision_feature_layer": 0}, r"vision_feature_layer 0 must be written \[0\]"),
        ("siglip", {"vision_feature_layer": [-2, -5]}, "vision_feature_layer -5 does not exist"),
    ],
)
def test_what_transformers_could_not_run_is_refused(tower, changes, message):
    teacher = teacher_of(tower, -2, "full", True, "gelu")
    for name, value in changes.items():
        setattr(teacher.config, name, value)
    with pytest.raises(ValueError, match=message):
        compose(teacher.config.vision_config, text(24, 2), image_token_id=IMAGE, source=teacher)


# In files


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    pixels = np.random.default_rng(3)
    records = []
    for i in range(8):
        Image.fromarray(pixels.integers(0, 255, (20, 30, 3), dtype=np.uint8)).save(folder / f"{i}.png")
        turns = [{"from": "human", "value": "<image>\nwhat colour is the ring ?"}, {"from": "gpt", "value": "red"}]
        records.append({"id": i, "image": f"{i}.png", "conversations": turns})
    (folder / "set.json").write_text(json.dumps(records))
    return {"path": str(folder / "set.json"), "images": str(folder)}


def save_encoders(folder):
    torch.manual_seed(6)
    SiglipVisionModel(SiglipVisionConfig(**SIZE)).save_pretrained(folder / "siglip")
    both = CLIPConfig(vision_config=SIZE, text_config={**SIZE, "vocab_size": 40}, projection_dim=16)
    CLIPModel(both).save_pretrained(folder / "clip")


def teacher_recipe(encoder, folder, files):
    data = json.dumps(files | {"template": "plain"})
    overrides = ["deepspeed=off", f"student.base={folder}/base", f"student.vision={folder}/{encoder}", "save_steps=0"]
    overrides += [f"output={folder}/{encoder}-teacher", "workers=0", "group_by=null", "logging_steps=1"]
    for stage in ("pt", "sft"):
        overrides += [f"stage.{stage}.{key}=4" for key in ("samples", "global_batch_size", "micro_batch_size")]
        overrides += [f"stage.{stage}.data={data}"]
    return load_recipe("paper-teacher-4b", overrides)


@pytest.mark.parametrize("encoder", ["siglip", "clip"])
def test_a_teacher_of_the_paper_is_made_and_taught_from(encoder, tmp_path, files, capsys):
    save_encoders(tmp_path)
    save_base(tmp_path / "base")
    recipe = teacher_recipe(encoder, tmp_path, files)
    assert plan(recipe, gpus=1, device="cpu").stages[0].setting.visual == 9
    folder = run(recipe)
    teacher = AutoModelForImageTextToText.from_pretrained(folder).eval()
    assert type(teacher) is LlavaForConditionalGeneration and teacher.config.image_seq_length == 9
    assert teacher.config.vision_feature_select_strategy == ("default" if encoder == "clip" else "full")
    # As the authors' checkpoints: the first position left out, which of SigLIP is a patch
    teacher.config.vision_feature_select_strategy = "default"
    teacher.config.image_seq_length = 576  # as transformers writes it if nobody says better
    made = tmp_path / "teacher"
    teacher.save_pretrained(made)
    processor = AutoProcessor.from_pretrained(folder)
    processor.save_pretrained(made)
    count = 8 if encoder == "siglip" else 9
    torch.manual_seed(7)
    changes = {f"stage__{name}__data": files | {"template": "plain"} for name in ("dpt", "dft")}
    changes |= {f"stage__{name}__samples": 8 for name in ("dpt", "dft")} | {
        "teacher": str(made),
        "stages": ["dpt", "dft"],
    }
    recipe = make_recipe(tmp_path / "run", tmp_path, **changes)
    assert [stage.setting.visual for stage in plan(recipe, gpus=1, device="cpu").stages] == [count, count]
    capsys.readouterr()
    student = run(recipe)
    assert (
        f"teacher: its config.json says image_seq_length 576, its images become {count} visual"
        in capsys.readouterr().out
    )
    out = export(student, tmp_path / "out").folder
    loaded, theirs = (AutoModelForImageTextToText.from_pretrained(path).eval() for path in (out, student))
    assert loaded.config.image_seq_length == count
    processor = AutoProcessor.from_pretrained(out)
    picture = Image.new("RGB", (30, 20), "red")
    inputs = processor(text=f"{IMAGE_TOKEN} what colour", images=picture, return_tensors="pt")
    assert (inputs["input_ids"] == loaded.config.image_token_id).sum() == count
    torch.testing.assert_close(loaded(**inputs).logits, theirs(**inputs).logits, rtol=1e-4, atol=1e-5)
    assert loaded.generate(**inputs, max_new_tokens=2, do_sample=False).shape[1] > inputs["input_ids"].shape[1]
    # The run is a teacher itself.
    again = make_recipe(
        tmp_path / "next", tmp_path, **(changes | {"teacher": str(tmp_path / "run"), "stages": ["dft"]})
    )
    assert plan(again, gpus=1, device="cpu").stages[0].setting.visual == count
    last = run(again)
    fetched = AutoModelForImageTextToText.from_pretrained(last).model.multi_modal_projector.fetched
    adapter = theirs.model.multi_modal_projector
    assert all(torch.equal(a.weight, b.weight) for a, b in zip(fetched, [*adapter.fetched, adapter.map], strict=True))


def test_the_reason_why_images_cannot_be_read_is_told(models, tmp_path, files):
    """The usual processor of this encoder is not known, and no folder has one."""
    torch.manual_seed(8)
    tokenizer = build_tokenizer()
    config = LlavaConfig(
        vision_config=Dinov2Config(**SIZE),
        text_config=text_config(),
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
    )
    LlavaForConditionalGeneration(config).save_pretrained(tmp_path / "teacher")
    tokenizer.save_pretrained(tmp_path / "teacher")
    save_base(tmp_path / "base")
    recipe = make_recipe(tmp_path / "run", tmp_path, stages=["dft"], stage__dft__data=files)
    with pytest.raises(
        ValueError, match=r"preprocessor_config\.json is missing, and dinov2 has no usual image processor"
    ):
        build_models(recipe)


def test_train_takes_encoders_of_their_own(tmp_path, files, capsys):
    save_encoders(tmp_path)
    save_base(tmp_path / "base")
    run(teacher_recipe("siglip", tmp_path, files))
    torch.manual_seed(9)
    other = SiglipVisionModel(SiglipVisionConfig(**SIZE))
    other.save_pretrained(tmp_path / "other")
    changes = {
        "teacher": str(tmp_path / "siglip-teacher"),
        "stages": ["dft"],
        "stage__dft__data": files | {"template": "plain"},
    }
    changes |= {"student__taf": False, "student__vision": str(tmp_path / "other"), "stage__dft__samples": 8}
    folder = run(make_recipe(tmp_path / "run", tmp_path, **changes))
    assert "have vision encoders of their own" in capsys.readouterr().out
    tower = AutoModelForImageTextToText.from_pretrained(folder).model.vision_tower.state_dict()
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in tower.items())
