"""`cdistill import`: what is damaged, incomplete or cannot be expressed is told in one line, and nothing is left."""

import json
import pickle
import shutil

import layouts
import pytest
import torch

from cdistill.cli import main
from cdistill.formats import importing

SIGLIP = {"language": "qwen2", "encoder": "siglip"}
TILES = {"newline": True, "image_aspect_ratio": "anyres", "mm_patch_merge_type": "spatial_unpad"}
TILES["image_grid_pinpoints"] = [[28, 56], [56, 28]]
FORM = "safetensors shards"
MAKERS = {
    "teacher": lambda folder: layouts.authors(folder / "theirs"),
    "student": lambda folder: layouts.authors(folder / "theirs", student=True),
    "tinyllava": lambda folder: layouts.authors(folder / "theirs", factory="tinyllava"),
    "llava": lambda folder: layouts.flat(folder / "theirs", form=FORM),
    "next": lambda folder: layouts.flat(folder / "theirs", form=FORM, **TILES),
    "bunny": lambda folder: layouts.flat(folder / "theirs", form=FORM, kind="bunny-qwen2", **SIGLIP),
    "mobilevlm": lambda folder: layouts.flat(folder / "theirs", form=FORM, kind="mobilevlm"),
    "projector": lambda folder: layouts.projector_alone(folder / "theirs", folder / "base"),
}
PROJECTORS = {"teacher": "connector._connector.2.bias", "student": "connector.post_connector.bias"}
PROJECTORS["tinyllava"] = PROJECTORS["teacher"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Every checkpoint, whole, with its vision towers beside it."""
    folder = tmp_path_factory.mktemp("made")
    layouts.tower(folder / "clip")
    layouts.tower(folder / "siglip", "siglip")
    return folder, {name: make(folder / name) for name, make in MAKERS.items()}


@pytest.fixture
def refused(made, tmp_path, capsys):
    """Asserts that a copy of a checkpoint, once changed, is refused in one line, and gives the line."""

    def refused(name, change, *options, tower="clip"):
        shutil.copytree(made[0] / name, tmp_path / name)
        folder = tmp_path / name / "theirs"
        change(folder)
        options = [*options, "--vision-tower", str(made[0] / ("siglip" if name == "bunny" else tower))]
        if name == "projector" and "--base" not in options:
            options += ["--base", str(tmp_path / name / "base")]
        assert main(["import", str(folder), str(tmp_path / "out" / "new"), *options]) == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1 and lines[0].startswith("cdistill: ")
        assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())
        return lines[0]

    return refused


def rewrite(name, weights):
    """A change of a checkpoint's weights, by a function of them."""

    def change(folder, edit):
        held = {key: value for key, value in weights.items() if name != "projector" or "mm_projector" in key}
        held = edit(held)
        for path in (*folder.glob("model*"), *folder.glob("mm_projector.bin")):
            path.unlink() if path.suffix != ".py" else None
        if name == "projector":
            torch.save(held, folder / "mm_projector.bin")
        else:
            layouts.write_weights(held, folder, FORM)

    return change


@pytest.mark.parametrize("name", MAKERS)
def test_weights_that_are_not_the_models(made, refused, name, tmp_path):
    victim = PROJECTORS.get(name, "model.mm_projector.2.bias")
    change = rewrite(name, made[1][name])
    edits = {
        f"missing: 1 weight ({victim})": lambda held: {k: v for k, v in held.items() if k != victim},
        "(model.more.weight)": lambda held: held | {"model.more.weight": torch.ones(2)},
        f"of other shapes: 1 weight ({victim}): {victim} is (3,), not (32,)": lambda held: (
            held | {victim: torch.ones(3).half()}
        ),
        "holds NaN or inf": lambda held: held | {victim: torch.full((32,), torch.nan).half()},
    }
    for message, edit in edits.items():
        assert message in refused(name, lambda folder, edit=edit: change(folder, edit))
        shutil.rmtree(tmp_path / name)


@pytest.mark.parametrize("name", MAKERS)
def test_files_that_are_damaged(refused, name, tmp_path):
    weights = "mm_projector.bin" if name == "projector" else "model-00002-of-00002.safetensors"

    def cut(file):
        return lambda folder: (folder / file).write_bytes((folder / file).read_bytes()[:200])

    damages = {
        f"{weights} is corrupt": cut(weights),
        "config.json is corrupt": cut("config.json"),
        "config.json is missing": lambda folder: (folder / "config.json").unlink(),
        "tokenizer.json is corrupt": lambda folder: (_tokenizer(folder) / "tokenizer.json").write_text("{"),
        "vocab_size": lambda folder: _small_vocabulary(folder),
    }
    if name != "projector":
        damages[f"{weights} is missing"] = lambda folder: (folder / weights).unlink()
    for message, damage in damages.items():
        assert message in refused(name, damage)
        shutil.rmtree(tmp_path / name)


def _tokenizer(folder):
    return folder if (folder / "tokenizer.json").is_file() else folder.with_name("base")


def _small_vocabulary(folder):
    """The configuration says fewer tokens than the tokenizer has."""
    path = folder / "config.json"
    values = json.loads(path.read_text())
    for part in (values, values.get("text_config")):
        if part is not None:
            part["vocab_size"] = 9
    path.write_text(json.dumps(values))


FIELDS = [
    ("llava", "mm_projector_type", "linear", "two layers"),
    ("llava", "mm_projector_type", "mlp3x_gelu", "two layers"),
    ("llava", "mm_use_im_start_end", True, "tokens of their own"),
    ("llava", "mm_vision_select_feature", "all", "patch, cls_patch"),
    ("llava", "mm_vision_select_layer", [-2, -5], "one layer"),
    ("llava", "image_aspect_ratio", "anyres", "known ways"),
    ("llava", "mm_patch_merge_type", "spatial", "spatial_unpad alone"),
    ("llava", "mm_resampler_type", "spatial_pool", "not known"),
    ("llava", "s2", True, "several sizes"),
    ("llava", "model_type", "llava_mpt", "known are"),
    ("llava", "model_type", "qwen2_vl", "nothing is to be imported"),
    ("llava", "rope_scaling", {"type": "spiral", "factor": 2.0}, "rotary"),
    ("llava", "quantization_config", {"load_in_4bit": True}, "quantised"),
    ("llava", "mm_hidden_size", 1152, "hidden_size is 16"),
    ("llava", "mm_vision_tower", "openai/clip-vit-large-patch14", "image_size is 28"),
    ("next", "image_grid_pinpoints", "none", "widths and heights"),
    ("next", "image_aspect_ratio", "pad", "known ways"),
    ("teacher", "connector_type", "qformer", "two layers"),
    ("teacher", "vision_feature_select_strategy", "mean", "patch, cls_patch"),
    ("teacher", "vision_config", {"model_type": "dinov2"}, "known vision towers"),
    ("teacher", "text_config", {"model_type": "gemma"}, "scales"),
    ("student", "connector_hidden_size", "wide", "width of the teacher"),
    ("tinyllava", "connector_type", "resampler", "two layers"),
    ("tinyllava", "connector_type", "mof_mlp", "two layers"),
    ("tinyllava", "vision_model_name_or_path2", "facebook/dinov2-large", "two vision towers"),
    ("tinyllava", "text_config", {"model_type": "phi"}, "bias"),
    ("tinyllava", "text_config", {"model_type": "openelm"}, "known language models"),
    ("bunny", "use_s2", True, "several sizes"),
    ("bunny", "model_type", "bunny-minicpm", "scales"),
    ("bunny", "model_type", "bunny-phi", "bias"),
    ("bunny", "mm_vision_tower", "EVA02_CLIP_L_336_psz14_s6B", "SigLIP and CLIP"),
    ("bunny", "mm_projector_type", "spp_v1", "two layers"),
    ("mobilevlm", "mm_projector_type", "ldpnetv2_max", "fewer visual tokens"),
    ("mobilevlm", "vision_tower_type", "siglip", "no other vision tower"),
]


@pytest.mark.parametrize(("name", "field", "value", "message"), FIELDS, ids=lambda value: str(value)[:20])
def test_what_no_class_computes(refused, name, field, value, message):
    line = refused(name, lambda folder: layouts.change_json(folder / "config.json", **{field: value}))
    named = {"image_size is 28": "vision_tower: ", "hidden_size is 16": "vision_tower: ", "quantised": ""}.get(
        message, field
    )
    assert message in line and named in line


ODD = [
    ("llava", "tokenizer_config.json", "model_max_length", {}, "the tokenizer in"),
    ("student", "preprocessor_config.json", "rescale_factor", {}, "the image processor in"),
    ("student", "preprocessor_config.json", "size", None, "checkpoint: "),
    ("teacher", "config.json", "vision_feature_layer", -9, "vision_feature_layer -9 does not exist"),
    ("llava", "config.json", "rope_scaling", [], "rope_scaling"),
    ("llava", "config.json", "hidden_size", "x", "hidden_size must be a size"),
    ("llava", "config.json", "torch_dtype", "number", "torch_dtype"),
    ("llava", "generation_config.json", "eos_token_id", "x", "generation_config.json"),
]


@pytest.mark.parametrize(("name", "file", "field", "value", "message"), ODD, ids=lambda value: str(value)[:20])
def test_values_of_other_kinds(refused, name, file, field, value, message):
    assert message in refused(name, lambda folder: layouts.change_json(folder / file, **{field: value}))


def test_parts_that_are_missing_or_others(made, refused, tmp_path, capsys):
    folder = made[0]

    def nothing(path):
        pass

    assert "holds a siglip_vision_model" in refused("llava", nothing, tower="siglip")
    shutil.rmtree(tmp_path / "llava")
    line = refused("projector", nothing, "--base", str(folder / "clip"))
    assert ("base: " in line and "missing" in line) or "model_type" in line or "'clip'" in line
    shutil.rmtree(tmp_path / "projector")
    base = tmp_path / "other"
    shutil.copytree(folder / "projector" / "base", base)
    layouts.change_json(base / "config.json", rope_theta=1e6)
    assert "base: " in refused("projector", nothing, "--base", str(base))
    shutil.rmtree(tmp_path / "projector")
    assert "nothing to put before --base" in refused("llava", nothing, "--base", str(base))
    for words, message in (
        ([str(folder / "llava" / "theirs")], "--vision-tower"),
        ([str(folder / "projector" / "theirs")], "--base"),
        (["liuhaotian/llava-v1.5-7b"], "hf download"),
        ([str(folder / "clip")], "nothing is to be imported"),
        ([str(folder / "llava" / "theirs"), "--prompt", "loud"], "prompt must be one of vicuna_v1"),
        ([str(folder / "teacher" / "theirs"), "--prompt", "vicuna_v1"], "closes answers with </s>"),
    ):
        assert main(["import", words[0], str(tmp_path / "new"), *words[1:]]) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert message in line and not (tmp_path / "new").exists()
    assert main(["import", str(folder / "teacher" / "theirs"), str(folder / "clip")]) == 2
    assert "exists and is no empty folder" in capsys.readouterr().err


def test_lora_that_is_damaged(made, refused, tmp_path):
    def with_lora(change):
        def changed(folder):
            layouts.add_lora(folder, made[1]["projector"], "safetensors")
            change(folder)

        return changed

    def cut(path):
        path.write_bytes(path.read_bytes()[:100])

    def more(folder):
        held = torch.load(folder / "non_lora_trainables.bin")
        torch.save(held | {"base_model.model.model.norm.weight": torch.ones(32)}, folder / "non_lora_trainables.bin")

    damages = {
        "adapter_config.json is missing": lambda folder: (folder / "adapter_config.json").unlink(),
        "adapter_model.safetensors is missing": lambda folder: (folder / "adapter_model.safetensors").unlink(),
        "adapter_model.safetensors is corrupt": lambda folder: cut(folder / "adapter_model.safetensors"),
        "non_lora_trainables.bin is corrupt": lambda folder: cut(folder / "non_lora_trainables.bin"),
        "holds more than a projector: 1 weight (base_model.model.model.norm.weight)": more,
        "is in one of them only": lambda folder: layouts.change_json(
            folder / "adapter_config.json", target_modules=["q_proj", "down_proj", "k_proj"]
        ),
        "does not fit its base": lambda folder: layouts.change_json(
            folder / "adapter_config.json", target_modules=["nothing"]
        ),
    }
    for message, damage in damages.items():
        line = refused("projector", with_lora(damage))
        assert message in line and str(tmp_path / "projector" / "theirs") in line
        shutil.rmtree(tmp_path / "projector")


class Bomb:
    def __reduce__(self):
        return print, ("run",)


def test_pickles_are_read_as_tensors_alone(refused, capsys):
    def change(folder):
        with open(folder / "mm_projector.bin", "wb") as file:
            pickle.dump({"model.mm_projector.0.weight": Bomb()}, file)

    assert "mm_projector.bin is corrupt (it holds more than tensors" in refused("projector", change)
    assert "run" not in capsys.readouterr().out


def test_a_tied_head_must_be_the_embeddings(refused):
    def change(folder):
        values = json.loads((folder / "config.json").read_text())
        values["text_config"]["tie_word_embeddings"] = True
        (folder / "config.json").write_text(json.dumps(values))

    assert "tie_word_embeddings" in refused("teacher", change)


def test_what_training_leaves_is_no_checkpoint(refused):
    def change(folder):
        for path in folder.glob("*.safetensors*"):
            path.unlink()
        (folder / "language_model").mkdir()

    assert "in parts (language_model and others)" in refused("tinyllava", change)


def test_fields_that_are_not_used_are_named(made, tmp_path, capsys):
    shutil.copytree(made[0] / "llava" / "theirs", tmp_path / "theirs")
    layouts.change_json(
        tmp_path / "theirs" / "config.json", image_crop_resolution=224, image_size_bonus=3, freeze_more=True
    )
    assert (
        main(["import", str(tmp_path / "theirs"), str(tmp_path / "out"), "--vision-tower", str(made[0] / "clip")]) == 0
    )
    assert "not used of config.json: image_crop_resolution, image_size_bonus\n" in capsys.readouterr().out


def test_a_tokenizer_whose_package_is_missing(refused, monkeypatch):
    monkeypatch.setattr(importing, "find_spec", lambda name: None)
    assert "pip install sentencepiece" in refused("llava", lambda folder: layouts.sentencepiece(folder))
