"""`cdistill export --format`: what was imported comes back bit for bit, and what was made here is read by import again."""

import json
import shutil

import layouts
import pytest
import torch
from export_cases import add_lora, save, taf_student
from safetensors.torch import load_file, save_file
from test_import_refusals import FORM, SIGLIP, TILES
from transformers import AutoModelForImageTextToText
from transformers.utils import logging as transformers_logging

from cdistill.cli import main


@pytest.fixture(autouse=True)
def no_bars():
    """As for the command, which turns transformers' progress bars off before they are imported."""
    transformers_logging.disable_progress_bar()
    yield
    transformers_logging.enable_progress_bar()


WAYS = {
    "compodistill": lambda folder: layouts.authors(folder / "theirs"),
    "compodistill student": lambda folder: layouts.authors(folder / "theirs", student=True, form="bin"),
    "tinyllava": lambda folder: layouts.authors(folder / "theirs", factory="tinyllava", form="bin shards"),
    "llava": lambda folder: layouts.flat(folder / "theirs"),
    "llava inside": lambda folder: layouts.flat(folder / "theirs", form="safetensors", inside=True),
    "llava next": lambda folder: layouts.flat(folder / "theirs", form=FORM, inside=True, **TILES),
    "bunny": lambda folder: layouts.flat(folder / "theirs", inside=True, kind="bunny-qwen2", **SIGLIP),
    "mobilevlm": lambda folder: layouts.flat(folder / "theirs", form=FORM, kind="mobilevlm"),
    "projector": lambda folder: layouts.projector_alone(folder / "theirs", folder / "base"),
    "llava of a projector": lambda folder: layouts.projector_alone(folder / "theirs", folder / "base"),
}


def weights_of(folder):
    found = {}
    for path in folder.glob("*.safetensors"):
        found |= load_file(path)
    for path in folder.glob("*.bin"):
        found |= torch.load(path, weights_only=True)
    return found


def assert_equal(found, wanted):
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name].dtype == value.dtype and torch.equal(found[name], value), name


@pytest.mark.parametrize("way", WAYS)
def test_import_then_export_is_the_identity(tmp_path, way):
    weights = WAYS[way](tmp_path)
    layouts.tower(tmp_path / "clip")
    layouts.tower(tmp_path / "siglip", "siglip")
    theirs, name = tmp_path / "theirs", way.split()[0]
    options = (
        ["--vision-tower", str(tmp_path / ("siglip" if name == "bunny" else "clip"))]
        if name not in ("compodistill", "tinyllava")
        else []
    )
    options += ["--base", str(tmp_path / "base")] if "projector" in way else []
    assert main(["import", str(theirs), str(tmp_path / "ours"), *options]) == 0
    shutil.move(theirs, tmp_path / "before")  # what comes back is of the imported folder alone
    assert main(["export", str(tmp_path / "ours"), str(theirs), "--format", name]) == 0
    if way == "projector":
        weights = {key: value for key, value in weights.items() if "mm_projector" in key}
    elif way == "llava of a projector":
        del weights["model.layers.0.self_attn.rotary_emb.inv_freq"]  # the base has none
    assert_equal(weights_of(theirs), weights)
    kept = {path.name for path in (tmp_path / "before").iterdir() if path.suffix in (".json", ".jinja", ".py")}
    for file in kept:
        if not file.endswith("index.json"):
            assert (theirs / file).read_bytes() == (tmp_path / "before" / file).read_bytes()
    if way == "llava of a projector":
        assert (theirs / "tokenizer.json").read_bytes() == (tmp_path / "base" / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("way", ["compodistill", "compodistill student", "llava", "llava next"])
def test_models_of_our_own_are_written_as_theirs(tmp_path, way):
    """Read again, they are the same model: of an imported one that has forgotten where it is from."""
    WAYS[way](tmp_path)
    layouts.tower(tmp_path / "clip")
    name = way.split()[0]
    tower = ["--vision-tower", str(tmp_path / "clip")] if name == "llava" else []
    assert main(["import", str(tmp_path / "theirs"), str(tmp_path / "ours"), *tower]) == 0
    shutil.rmtree(tmp_path / "ours" / "original")
    named = ["--vision-tower", layouts.CLIP_NAME] if name == "llava" else []
    assert main(["export", str(tmp_path / "ours"), str(tmp_path / "written"), "--format", name, *named]) == 0
    if name == "llava":  # else LLaVA's code takes the tower's weights from the hub
        assert json.loads((tmp_path / "written" / "config.json").read_text())["unfreeze_mm_vision_tower"] is True
    assert main(["import", str(tmp_path / "written"), str(tmp_path / "again"), *tower]) == 0
    first, second = (AutoModelForImageTextToText.from_pretrained(tmp_path / each) for each in ("ours", "again"))
    assert type(first) is type(second)
    assert_equal(second.state_dict(), first.state_dict())
    ours, again = (json.loads((tmp_path / each / "config.json").read_text()) for each in ("ours", "again"))
    assert again == ours
    for file in ("generation_config.json", "tokenizer.json", "chat_template.jinja", "preprocessor_config.json"):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "ours" / file).read_bytes()


def test_a_trained_student_in_the_authors_layout(tmp_path):
    student = save(taf_student(), tmp_path / "student")
    assert main(["export", str(student), str(tmp_path / "theirs"), "--format", "compodistill"]) == 0
    values = json.loads((tmp_path / "theirs" / "config.json").read_text())
    assert values["post_connector_use"] and values["connector_hidden_size"] == 64
    found, wanted = weights_of(tmp_path / "theirs"), taf_student().state_dict()
    for theirs, ours in (("_connector.0.weight", "teacher.0.weight"), ("post_connector.bias", "map.bias")):
        assert torch.equal(found[f"connector.{theirs}"], wanted[f"model.multi_modal_projector.{ours}"])
    assert "language_model.model.layers.1.mlp.up_proj.weight" in found
    assert "vision_tower._vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight" in found


def test_lora_on_an_imported_model_is_merged(tmp_path):
    weights = layouts.flat(tmp_path / "theirs")
    layouts.tower(tmp_path / "clip")
    parts = ["--vision-tower", str(tmp_path / "clip")]
    assert main(["import", str(tmp_path / "theirs"), str(tmp_path / "ours"), *parts]) == 0
    add_lora(tmp_path / "ours", tmp_path / "lora", ("language_model.layers.1.mlp.up_proj",))
    assert main(["export", str(tmp_path / "lora"), str(tmp_path / "written"), "--format", "llava"]) == 0
    found = weights_of(tmp_path / "written")
    assert json.loads((tmp_path / "written" / "config.json").read_text())["mm_vision_tower"] == layouts.CLIP_NAME
    same = {name for name in weights.keys() & found.keys() if torch.equal(weights[name], found[name])}
    rows = {"lm_head.weight", "model.embed_tokens.weight"}
    assert weights.keys() - same == {
        "model.layers.1.mlp.up_proj.weight",
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        *rows,
    }


def test_what_another_layout_does_not_express(tmp_path, capsys):
    layouts.authors(tmp_path / "theirs")
    assert main(["import", str(tmp_path / "theirs"), str(tmp_path / "ours")]) == 0
    gelu = save(taf_student(activation="gelu"), tmp_path / "gelu")
    student = save(taf_student(), tmp_path / "student")
    capsys.readouterr()
    for model, options, message in (
        (tmp_path / "ours", ["llava"], "siglip_vision_model"),
        (tmp_path / "ours", ["tinyllava"], "was not imported from tinyllava"),
        (tmp_path / "ours", ["compodistill", "--check"], "--check: --format compodistill does without it"),
        (tmp_path / "ours", ["transformers", "--vision-tower", "x"], "--format transformers does without it"),
        (gelu, ["compodistill"], "taf_activation 'gelu'"),
        (student, ["llava"], "equal widths"),
        (tmp_path / "clip", ["llava"], "there is no folder"),
    ):
        assert main(["export", str(model), str(tmp_path / "out" / "new"), "--format", *options]) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert message in line
        assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())
    path = next((tmp_path / "ours").glob("model*.safetensors"))
    held = load_file(path)
    del held["multi_modal_projector.linear_2.bias"]
    save_file(held, path)
    assert main(["export", str(tmp_path / "ours"), str(tmp_path / "out" / "new"), "--format", "compodistill"]) == 2
    assert "multi_modal_projector.linear_2.bias is not as it was imported" in capsys.readouterr().err
    (tmp_path / "ours" / "original" / "import.json").write_text("{}")
    assert main(["export", str(tmp_path / "ours"), str(tmp_path / "out" / "new"), "--format", "compodistill"]) == 2
    assert "import.json is corrupt" in capsys.readouterr().err
