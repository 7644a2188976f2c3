"""Recipes for models of other families than the built-in one's: each looks for itself, batches come from its processor."""

import json
import shutil

import pytest
import torch
import torch.nn.functional as F
import transformers
import yaml
from builtin_models import make_recipe
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

from cdistill.builtin.dataset import CHAT_TEMPLATE, BuiltinDataset, ConversationDataset, build_tokenizer
from cdistill.builtin.task import BuiltinTask
from cdistill.cli import main
from cdistill.data.batches import PaddingCollator
from cdistill.data.conversations import Encoder
from cdistill.data.samples import IMAGE_TOKEN
from cdistill.train import run
from cdistill.train.build import build_models
from cdistill.train.recipes import recipe_to_dict

SIDE = 24  # the scenes have 48 pixels, so any-resolution models cut them into four tiles


def text_config(layers, width):
    tokenizer = build_tokenizer()
    return transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.2,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )


def llava_next(layers, width, tokenizer):
    vision = {
        "image_size": SIDE,
        "patch_size": 12,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_attention_heads": 2,
    }
    pinpoints = [[2 * SIDE, 2 * SIDE]]
    config = transformers.LlavaNextConfig(
        vision_config=transformers.CLIPVisionConfig(**vision, num_hidden_layers=1),
        text_config=text_config(layers, width),
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        vision_feature_select_strategy="default",
        vision_feature_layer=-1,
        image_grid_pinpoints=pinpoints,
    )
    sizes = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
    processor = transformers.LlavaNextProcessor(
        LlavaNextImageProcessorPil(**sizes, image_grid_pinpoints=pinpoints),
        tokenizer,
        patch_size=12,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )
    return transformers.LlavaNextForConditionalGeneration(config), processor


def idefics3(layers, width, tokenizer):
    vision = {"image_size": SIDE, "patch_size": 6, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    config = transformers.Idefics3Config(
        vision_config=transformers.models.idefics3.Idefics3VisionConfig(**vision, num_hidden_layers=1),
        text_config=text_config(layers, width),
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        scale_factor=2,
        pad_token_id=tokenizer.pad_token_id,
    )
    images = Idefics3ImageProcessorPil(size={"longest_edge": 2 * SIDE}, max_image_size={"longest_edge": SIDE})
    processor = transformers.Idefics3Processor(images, tokenizer, image_seq_len=4, chat_template=CHAT_TEMPLATE)
    return transformers.Idefics3ForConditionalGeneration(config), processor


FAMILIES = {"llava_next": llava_next, "idefics3": idefics3}
MARKS = ["<fake_token_around_image>", "<global-img>", *(f"<row_{r}_col_{c}>" for r in (1, 2) for c in (1, 2))]


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request, tmp_path_factory):
    """A folder that holds a tiny teacher and a tiny student of the family."""
    folder = tmp_path_factory.mktemp(request.param)
    for seed, (name, layers, width) in enumerate((("base", 2, 32), ("teacher", 4, 64))):
        torch.manual_seed(seed)
        tokenizer = build_tokenizer()
        tokenizer.add_special_tokens({"additional_special_tokens": MARKS})
        model, processor = FAMILIES[request.param](layers, width, tokenizer)
        model.resize_token_embeddings(len(tokenizer))
        model.save_pretrained(folder / name)
        processor.save_pretrained(folder / name)
    return folder


def recipe_of(output, pair, **changes):
    return make_recipe(output, pair, student__taf=False, **changes)


def collated(data, processor):
    """The first four samples as a batch."""
    encoder = Encoder(processor)
    encoded = ConversationDataset(data, encoder)
    return PaddingCollator(encoder.pad_token_id)([encoded[i] for i in range(4)])


def metrics(output):
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def test_labels_are_the_answers_and_visual_tokens_those_of_the_processor(pair):
    processor = AutoProcessor.from_pretrained(pair / "base")
    tokenizer = processor.tokenizer
    for task in (BuiltinTask(turns=3, caption=0.5), BuiltinTask(turns=2, modality="text")):
        data = BuiltinDataset(task, size=4, seed=3, tokenizer=tokenizer)
        batch = collated(data, processor)
        image = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        for i in range(4):
            item = data[i]
            labels, ids = batch["labels"][i], batch["input_ids"][i]
            assert labels[labels != -100].tolist() == item["labels"][item["labels"] != -100].tolist()
            assert torch.equal(ids[labels != -100], labels[labels != -100])
            words = [t for t in ids[batch["attention_mask"][i].bool()].tolist() if t != image]
            marks = set(tokenizer.convert_tokens_to_ids(MARKS))
            wanted = [t for t in item["input_ids"].tolist() if t != image]
            assert [t for t in words if t not in marks] == wanted
        assert ("pixel_values" in batch) == (task.modality == "image")
        assert (batch["input_ids"] == image).any() == (task.modality == "image")


def test_a_recipe_trains_a_student_of_the_family(pair, tmp_path, capsys):
    recipe = recipe_of(tmp_path / "run", pair, stages=["dpt", "dft", "sft"], student__lora={"r": 4, "alpha": 8})
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe_to_dict(recipe)))
    assert main(["train", str(tmp_path / "recipe.yaml")]) == 0
    entries = metrics(tmp_path / "run")
    assert [e["stage"] for e in entries] == ["dpt"] * 3 + ["dft"] * 3 + ["sft"] * 3
    assert all(e["vat"] > 0 for e in entries if e["stage"] == "dft")
    final = tmp_path / "run" / "3-sft"
    model = AutoModelForImageTextToText.from_pretrained(final)
    base = AutoModelForImageTextToText.from_pretrained(pair / "base")
    assert type(model) is type(base)
    before, after = dict(base.named_parameters()), dict(model.named_parameters())
    assert before.keys() == after.keys()
    vision = [n for n in before if "vision" in n]
    assert vision and all(torch.equal(before[n], after[n]) for n in vision)
    adapter = [n for n in before if "projector" in n or "connector" in n]
    assert adapter and all(not torch.equal(before[n], after[n]) for n in adapter)
    assert AutoProcessor.from_pretrained(final).chat_template == CHAT_TEMPLATE


def test_losses_of_the_first_step_are_those_of_full_matrices(pair, tmp_path):
    recipe = recipe_of(tmp_path / "run", pair, stages=["dft"], stage__dft__samples=4)
    run(recipe)
    (entry,) = metrics(tmp_path / "run")
    processor = AutoProcessor.from_pretrained(pair / "base")
    data = BuiltinDataset(recipe.stage["dft"].data.builtin, size=4, seed=0, tokenizer=processor.tokenizer)
    batch = collated(data, processor)
    student, teacher = (
        AutoModelForImageTextToText.from_pretrained(pair / name, attn_implementation="eager").double()
        for name in ("base", "teacher")
    )
    labels = batch.pop("labels")
    inputs = {name: x.double() if x.is_floating_point() else x for name, x in batch.items()}
    ours, theirs = (model(**inputs, output_attentions=True) for model in (student, teacher))
    answers = labels[:, 1:] != -100
    p, q = (out.logits[:, :-1][answers].log_softmax(-1) for out in (ours, theirs))
    assert entry["ar"] == pytest.approx(F.nll_loss(p, labels[:, 1:][answers]).item(), rel=1e-5)
    assert entry["kd"] == pytest.approx((q.exp() * (q - p)).sum(1).mean().item(), rel=1e-5)
    image = student.config.image_token_id
    distances = []
    for b in range(4):
        rows, cols = (labels[b] != -100).nonzero()[:, 0], (batch["input_ids"][b] == image).nonzero()[:, 0]
        slices = [torch.stack([x[b].mean(0)[rows][:, cols] for x in out.attentions]) for out in (ours, theirs)]
        windows = slices[1].unfold(0, 3, 1).mean(-1)  # of three of the teacher's four layers
        distances.append(1 - F.cosine_similarity(slices[0], windows, dim=-1).mean())
    assert entry["vat"] == pytest.approx(torch.stack(distances).mean().item(), rel=1e-4)
    assert build_models(recipe).reader is not None


def change_pixels(folder):
    path = folder / "teacher" / "processor_config.json"
    values = json.loads(path.read_text())
    values["image_processor"]["image_mean"] = [0.1, 0.2, 0.3]
    path.write_text(json.dumps(values))


def drop_processor(folder):
    for name in ("processor_config.json", "preprocessor_config.json"):
        (folder / "base" / name).unlink(missing_ok=True)


def spoil(name, text="{"):
    """Make the processor of a model unreadable: in the older file, as some checkpoints have it, and in the newer one."""

    def damage(folder):
        for file in ("preprocessor_config.json", "processor_config.json"):
            (folder / name / file).write_text(text)

    return damage


@pytest.mark.parametrize(
    ("damage", "changes", "message"),
    [
        (spoil("teacher"), {}, r"^teacher: .*teacher/processor_config\.json is corrupt \("),
        (spoil("base"), {}, r"^student\.base: .*base/processor_config\.json is corrupt \("),
        (spoil("teacher", "[]"), {}, r"^teacher: .*teacher/processor_config\.json is corrupt \("),
        (
            change_pixels,
            {},
            r"image processors differ: image_mean is .0\.1, 0\.2, 0\.3. for teacher, .* for student\.base",
        ),
        (drop_processor, {}, r"student\.base: .*preprocessor_config\.json is missing"),
        (lambda folder: None, {"student__taf": True}, r"student\.taf must be false"),
    ],
)
def test_pairs_that_do_not_fit(pair, tmp_path, damage, changes, message):
    shutil.copytree(pair, tmp_path / "models")
    damage(tmp_path / "models")
    recipe = recipe_of(tmp_path / "run", tmp_path / "models", stages=["dft"])
    if changes:
        recipe = make_recipe(tmp_path / "run", tmp_path / "models", stages=["dft"], **changes)
    with pytest.raises(ValueError, match=message) as error:
        run(recipe)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_a_base_without_eyes_for_such_a_teacher(pair, models, tmp_path):
    recipe = recipe_of(tmp_path / "run", pair, stages=["dft"], student__base=str(models / "base"))
    with pytest.raises(ValueError, match=r"vocabularies differ|student\.base must be a"):
        run(recipe)
