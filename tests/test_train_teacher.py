"""Teachers that do not fit: partitioned, quantised, without what the student has, or cached and not there at all."""

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from builtin_models import make_recipe, save_base, save_teacher
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from safetensors.torch import load_file, save_file
from test_train_stages import metrics, refused, weights

from cdistill.cli import main
from cdistill.models.load import load_model
from cdistill.train import cache, run
from cdistill.train import teacher as teacher_module
from cdistill.train.build import build_models
from cdistill.train.checkpoints import stored
from cdistill.train.config import recipe_to_dict
from cdistill.train.teacher import Teacher

LOSSES = ("loss", "ar", "kd", "vat")


def losses(output):
    return [[e[name] for name in LOSSES if e[name] is not None] for e in metrics(output)]


def assert_close(a, b, rel):
    assert len(a) == len(b) > 0
    for ours, theirs in zip(a, b, strict=True):
        assert ours == pytest.approx(theirs, rel=rel)


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A teacher wide enough for blocks of quantised weights, one with a head of its own, and a base."""
    folder = tmp_path_factory.mktemp("wide")
    shape = {"hidden_size": 128, "intermediate_size": 128, "num_key_value_heads": 4}
    save_teacher(folder / "teacher", **shape)
    save_teacher(folder / "untied", **shape, tie_word_embeddings=False)
    save_base(folder / "base")
    return folder


@pytest.fixture(scope="module")
def whole(wide, tmp_path_factory):
    """Losses and weights with the teacher whole on every process."""
    output = tmp_path_factory.mktemp("whole")
    return {
        teacher: (run(make_recipe(output / teacher, wide, teacher=str(wide / teacher))), losses(output / teacher))
        for teacher in ("teacher", "untied")
    }


@pytest.fixture
def nothing_stays(monkeypatch):
    """Small parameters are partitioned, too, which DeepSpeed keeps whole otherwise."""
    make = teacher_module.teacher_config

    def config(**options):
        made = make(**options)
        made["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        return made

    monkeypatch.setattr(teacher_module, "teacher_config", config)


@pytest.mark.parametrize(
    ("teacher", "zero", "offload"), [("teacher", 2, False), ("untied", 2, True), ("untied", 3, False)]
)
def test_a_partitioned_teacher_trains_the_same_student(
    wide, whole, tmp_path, monkeypatch, nothing_stays, teacher, zero, offload
):
    seen = set()
    forward = Teacher.forward

    def watched(self, *args, **kwargs):
        seen.update(p.ds_status for p in self.model.model.language_model.layers.parameters())
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(Teacher, "forward", watched)
    memory = {"zero": 3, "offload": offload}
    recipe = make_recipe(tmp_path / "run", wide, teacher=str(wide / teacher), deepspeed=zero, teacher_memory=memory)
    final = run(recipe)
    assert seen == {ZeroParamStatus.NOT_AVAILABLE}, "between its layers' turns the teacher is partitioned"
    reference, values = whole[teacher]
    assert_close(losses(tmp_path / "run"), values, 1e-4)
    for name, value in weights(reference).items():
        if "k_proj.bias" not in name:
            torch.testing.assert_close(weights(final)[name], value, rtol=1e-3, atol=2e-4)


def test_a_teacher_partitioned_over_two_processes(wide, whole, tmp_path):
    recipe = make_recipe(tmp_path / "run", wide, deepspeed=3, processes=2, teacher_memory={"zero": 3})
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe_to_dict(recipe)))
    command = [sys.executable, "-m", "cdistill", "train", str(tmp_path / "recipe.yaml")]
    subprocess.run(command, check=True, capture_output=True)
    assert_close(losses(tmp_path / "run"), whole["teacher"][1], 2e-4)


@pytest.mark.parametrize(("kind", "layer", "rel"), [("8bit", "Linear8bitLt", 0.05), ("4bit", "Linear4bit", 0.3)])
def test_a_quantised_teacher_is_near_the_whole_one(wide, whole, tmp_path, kind, layer, rel):
    recipe = make_recipe(tmp_path / "run", wide, teacher_memory={"quantization": kind})
    teacher = build_models(recipe).teacher
    kinds = {name: type(module).__name__ for name, module in teacher.named_modules()}
    linear = {name for name, kind in kinds.items() if "Linear" in kind}
    quantised = {name for name in linear if kinds[name] == layer}
    assert len(quantised) == 7 * 4 and all("language_model.layers" in name for name in quantised)
    assert "lm_head" in linear - quantised
    run(recipe)
    found, exact = losses(tmp_path / "run"), whole["teacher"][1]
    assert found != exact
    assert_close(found, exact, rel)


def test_quantisation_without_its_package_is_told(wide, tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else find(name))
    recipe = make_recipe(tmp_path / "run", wide, teacher_memory={"quantization": "8bit"})
    refused(recipe, tmp_path / "run", r"needs bitsandbytes: pip install cdistill\[quantization\]")


@pytest.mark.parametrize("taf", [True, False])
def test_the_teacher_keeps_no_copy_of_what_the_student_has(models, tmp_path, taf):
    built = build_models(make_recipe(tmp_path / "run", models, student__taf=taf))
    teacher = Teacher(built.teacher, shares_vision=True)
    teacher.leave_to(built.student)
    kept = {name.split(".")[2] for name, _ in teacher.named_parameters() if name.startswith("model.model.")}
    assert kept == ({"language_model"} if taf else {"language_model", "multi_modal_projector"})


def cached(output, models, folder, **changes):
    return make_recipe(output, models, teacher_memory__cache=str(folder), **({"teacher_memory__top_k": 12} | changes))


def write_recipe(recipe, path):
    path.write_text(yaml.safe_dump(recipe_to_dict(recipe)))
    return str(path)


@pytest.fixture(scope="module")
def kept(models, tmp_path_factory):
    """A cache of both distilling stages, made by the command, and the recipe's changes.

    It holds all tokens but one, so that what is left is one token, too, and the divergence that of the whole vocabulary.
    """
    folder = tmp_path_factory.mktemp("kept")
    vocabulary = load_model(models / "base").config.vocab_size
    changes = {"teacher_memory__top_k": vocabulary - 1}
    recipe = cached(folder / "unused", models, folder / "cache", **changes)
    assert main(["cache", write_recipe(recipe, folder / "recipe.yaml")]) == 0
    assert not (folder / "unused").exists()
    return folder / "cache", changes


def test_training_from_a_cache_is_training_with_the_teacher(models, kept, tmp_path, monkeypatch):
    folder, changes = kept
    reference = run(make_recipe(tmp_path / "with", models))
    depths = []

    def never(*args, **kwargs):
        raise AssertionError("a teacher ran")

    monkeypatch.setattr(Teacher, "__init__", never)
    recipe = cached(tmp_path / "run", models, folder, **changes)
    depths.append(len(build_models(recipe).teacher.model.language_model.layers))
    final = run(recipe)
    assert depths == [0], "not even its layers are loaded"
    assert_close(losses(tmp_path / "run"), losses(tmp_path / "with"), 1e-5)
    for name, value in weights(reference).items():
        if "k_proj.bias" not in name:
            torch.testing.assert_close(weights(final)[name], value, rtol=1e-3, atol=1e-4)


def test_processes_and_accumulation_read_the_same_cache(models, kept, tmp_path):
    folder, changes = kept
    run(cached(tmp_path / "one", models, folder, **changes))
    options = changes | {f"stage__{stage}__micro_batch_size": 1 for stage in ("dpt", "dft", "sft")}
    run(cached(tmp_path / "parts", models, folder, deepspeed=2, **options))
    assert_close(losses(tmp_path / "parts"), losses(tmp_path / "one"), 1e-4)


@pytest.mark.parametrize("changes", [{"vat__heads": "each"}, {"group_by_length": True}, {"precision": "bf16"}])
def test_other_recipes_are_cached_alike(models, tmp_path, changes):
    folder = tmp_path / "models"
    if "vat__heads" in changes:
        save_teacher(folder / "teacher", num_attention_heads=2)
        save_base(folder / "base")
        models = folder
    options = changes | {"stages": ["dft"], "teacher_memory__top_k": 50}
    cache.write_cache(cached(tmp_path / "run", models, tmp_path / "cache", **options))
    run(cached(tmp_path / "run", models, tmp_path / "cache", **options))
    run(make_recipe(tmp_path / "with", models, **options))
    # 50 of some 60 tokens, and in bf16 rounded targets
    assert_close(losses(tmp_path / "run"), losses(tmp_path / "with"), 0.03 if "precision" in changes else 0.01)


def test_a_cut_cache_is_continued_and_a_damaged_shard_made_again(models, tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "PER_SHARD", 5)
    recipe = cached(tmp_path / "run", models, tmp_path / "cache", stages=["dft"])
    saved, save = [], cache.CacheWriter._save

    def stop_after_one(self, shard, kept):
        if saved:
            raise KeyboardInterrupt
        saved.append(shard)
        save(self, shard, kept)

    monkeypatch.setattr(cache.CacheWriter, "_save", stop_after_one)
    with pytest.raises(KeyboardInterrupt):
        cache.write_cache(recipe)
    refused(recipe, tmp_path / "run", r"cache/1-dft is not finished; run `cdistill cache`")

    def counted(self, shard, kept):
        saved.append(shard)
        save(self, shard, kept)

    monkeypatch.setattr(cache.CacheWriter, "_save", counted)
    cache.write_cache(recipe)
    assert saved == [0, 1, 2]  # 12 samples in shards of 5, the first of which stays
    shard = tmp_path / "cache" / "1-dft" / "shard-00001.safetensors"
    before = {name: x.clone() for name, x in load_file(shard).items()}  # else mapped to the file
    shard.write_bytes(shard.read_bytes()[:-1] + b"!")
    with pytest.raises(ValueError, match=r"shard-00001\.safetensors is damaged; run `cdistill cache`"):
        run(recipe)
    (tmp_path / "cache" / "1-dft" / "index.json").unlink()
    cache.write_cache(recipe)
    assert saved == [0, 1, 2, 1]
    after = load_file(shard)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    final = run(recipe, resume=True)
    assert len(metrics(tmp_path / "run")) == 3 and final.is_dir()


def test_caches_that_do_not_fit(models, kept, tmp_path):
    folder, changes = kept
    output = tmp_path / "run"
    refused(cached(output, models, tmp_path / "none", **changes), output, r"none/1-dpt does not exist; run")
    for key, value in {"seed": 1, "kd__temperature": 2.0, "teacher_memory__top_k": 3, "vat__rows": "text"}.items():
        recipe = cached(output, models, folder, **(changes | {key: value}))
        refused(recipe, output, f"was made with another {key.replace('__', '.')}; choose another folder")
    other = tmp_path / "models"
    save_teacher(other / "teacher", seed=7)
    save_base(other / "base")
    refused(cached(output, other, folder, **changes), output, r"another teacher\.model\.safetensors")
    with pytest.raises(ValueError, match=r"vat\.matching must not be adaptive with teacher_memory\.cache"):
        cached(output, models, folder, vat__matching="adaptive")


def test_samples_that_are_not_those_of_the_cache(models, kept, tmp_path):
    folder, changes = kept
    shutil.copytree(folder, tmp_path / "cache")
    path: Path = tmp_path / "cache" / "1-dpt" / "shard-00000.safetensors"
    tensors = load_file(path)
    tensors["tokens"][2] += 1
    save_file(tensors, path)
    path.with_suffix(".json").write_text(json.dumps(stored(path)))
    with pytest.raises(ValueError, match="a sample has other tokens than when the teacher saw it"):
        run(cached(tmp_path / "run", models, tmp_path / "cache", **changes))


def test_nothing_to_cache(models, tmp_path, capsys):
    recipe = cached(tmp_path / "run", models, tmp_path / "cache", stages=["sft"])
    assert main(["cache", write_recipe(recipe, tmp_path / "r.yaml")]) == 2
    assert "stages sft need no teacher" in capsys.readouterr().err
    recipe = make_recipe(tmp_path / "run", models)
    assert main(["cache", write_recipe(recipe, tmp_path / "r.yaml")]) == 2
    assert "teacher_memory.cache must name the folder" in capsys.readouterr().err
    recipe = cached(tmp_path / "run", models, tmp_path / "cache", teacher_memory__top_k=10**6)
    assert main(["cache", write_recipe(recipe, tmp_path / "r.yaml")]) == 2
    assert "teacher_memory.top_k must be below the vocabulary" in capsys.readouterr().err
