"""What a teacher gives, kept on a disk: the same training without the teacher; caches cut, damaged or of another run."""

import errno
import io
import json
import shutil
from contextlib import redirect_stdout
from pathlib import Path
from unittest import mock

import pytest
import torch
import yaml
from builtin_models import make_recipe, save_base, save_teacher
from safetensors.torch import load_file, save_file
from survive_runs import command
from test_train_stages import assert_near, metrics, refused, weights
from test_train_teacher import assert_close, losses
from transformers import AutoTokenizer

from cdistill.cli import main
from cdistill.manifest import stored
from cdistill.models.load import load_model
from cdistill.runtime import checkpoints
from cdistill.runtime.errors import RunError
from cdistill.train import cache, cache_writer, run
from cdistill.train.alignment import vat_of
from cdistill.train.build import build_models
from cdistill.train.recipes import recipe_to_dict
from cdistill.train.resolve import resolve
from cdistill.train.teacher import Teacher


def cache_and_run(to_cache, to_run):
    """Caches of one recipe, in small shards, then a run of another; what is printed."""
    with mock.patch.object(cache_writer, "PER_SHARD", 4), redirect_stdout(io.StringIO()) as told:
        cache_writer.write_cache(to_cache)
        run(to_run)
    return told.getvalue()


def cached(output, models, folder, **changes):
    options = {"teacher_memory__cache": str(folder), "teacher_memory__top_k": 12, "stages": ["dpt", "dft"]}
    return make_recipe(output, models, **(options | changes))


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
    reference = run(make_recipe(tmp_path / "with", models, stages=["dpt", "dft"]))

    def never(*args, **kwargs):
        raise AssertionError("a teacher ran")

    monkeypatch.setattr(Teacher, "__init__", never)
    recipe = cached(tmp_path / "run", models, folder, **changes)
    teacher = build_models(recipe).teacher
    assert len(teacher.model.language_model.layers) == 0, "not even its layers are loaded"
    assert all(p.is_meta for p in teacher.parameters()), "nor is anything else in memory"
    final = run(recipe)
    assert_close(losses(tmp_path / "run"), losses(tmp_path / "with"), 1e-5)
    assert_near(weights(final), weights(reference), atol=1e-4)


def test_padding_of_the_students_head_is_left_out_as_with_the_teacher(models, tmp_path):
    base, words = load_model(models / "base"), AutoTokenizer.from_pretrained(models / "base")
    known = base.config.vocab_size
    base.resize_token_embeddings(known + 50, mean_resizing=False)
    with torch.no_grad():
        base.get_input_embeddings().weight[known:] = 3.0  # a loss that sees it is another
        base.get_output_embeddings().weight[known:] = 3.0
    base.save_pretrained(tmp_path / "padded")
    words.save_pretrained(tmp_path / "padded")
    few = {"stages": ["dft"], "stage__dft__samples": 8, "student__base": str(tmp_path / "padded")}
    run(make_recipe(tmp_path / "with", models, **few))
    recipe = cached(tmp_path / "run", models, tmp_path / "cache", **few, teacher_memory__top_k=known - 1)
    cache_writer.write_cache(recipe)
    run(recipe)
    assert_close(losses(tmp_path / "run"), losses(tmp_path / "with"), 1e-5)


@pytest.fixture(scope="module")
def two(models, kept, ranks, tmp_path_factory):
    """A folder in which two processes have made caches, of a teacher whole and partitioned, and a run from another cache.

    The command starts those of the first, those of the others are started as a launcher does it.

    15 samples in batches of 3 and shards of 4 make 2 batches of the first three shards and 1 of the last one.
    """
    folder = tmp_path_factory.mktemp("two")
    odd = {"stages": ["dft"], "stage__dft__samples": 15, "stage__dft__global_batch_size": 3}
    recipes = {}
    for name, memory in {"plain": {}, "zero3": {"zero": 3}, "one": {}}.items():
        memory = {f"teacher_memory__{key}": value for key, value in memory.items()}
        recipe = cached(folder / "unused", models, folder / name, **odd, **memory, deepspeed=2 if memory else "off")
        recipes[name] = recipe
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache_writer, "PER_SHARD", 4)
        cache_writer.write_cache(recipe)
    write_recipe(recipes["plain"], folder / "plain.yaml")
    plan = {"set": ["cdistill.train.cache_writer", "PER_SHARD", 4], "rank": -1}  # the processes read it from the index
    code, text = command("cache", folder / "plain.yaml", "processes=2", plan=plan)
    assert (code, text.splitlines()[-1]) == (0, f"written: {folder / 'plain'}"), text
    parts = {f"stage__{stage}__micro_batch_size": 1 for stage in ("dpt", "dft")}
    to_run = cached(folder / "run", models, kept[0], deepspeed=2, **kept[1], **parts)
    return folder, recipe, ranks.call(cache_and_run, recipes["zero3"], to_run)


def read_stage(recipe, folder):
    models = build_models(recipe)
    stage = resolve(recipe).stages[-1]
    return cache.StageCache(
        cache.Folder(folder), cache.fingerprint(stage, models, vat_of(stage, models.student, models.teacher))
    )


@pytest.mark.parametrize("name", ["plain", "zero3"])
def test_two_processes_make_the_cache_of_one(two, name):
    folder, recipe, outputs = two
    ours, theirs = (read_stage(recipe, folder / which / "1-dft") for which in (name, "one"))
    assert len(list((folder / name / "1-dft").glob("*.safetensors"))) == 4
    for i in range(15):
        torch.testing.assert_close(ours[i].values, theirs[i].values, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(ours[i].targets, theirs[i].targets, rtol=1e-4, atol=1e-6)
        assert ours[i].tokens == theirs[i].tokens and ours[i].targets.numel()
    if name == "zero3":
        assert f"{name}/1-dft: 15 samples" in outputs[0] and not outputs[1]


def test_processes_and_accumulation_read_the_same_cache(models, kept, two, tmp_path):
    folder, changes = kept
    run(cached(tmp_path / "one", models, folder, **changes))
    assert_close(losses(two[0] / "run"), losses(tmp_path / "one"), 1e-4)


@pytest.mark.parametrize("changes", [{"vat__heads": "each"}, {"group_by": "length"}, {"precision": "bf16"}])
def test_other_recipes_are_cached_alike(models, tmp_path, changes):
    folder = tmp_path / "models"
    if "vat__heads" in changes:
        save_teacher(folder / "teacher", num_attention_heads=2)
        save_base(folder / "base")
        models = folder
    options = changes | {"stages": ["dft"], "teacher_memory__top_k": 50}
    cache_writer.write_cache(cached(tmp_path / "run", models, tmp_path / "cache", **options))
    run(cached(tmp_path / "run", models, tmp_path / "cache", **options))
    run(make_recipe(tmp_path / "with", models, **options))
    # 50 of some 60 tokens, and in bf16 rounded targets
    assert_close(losses(tmp_path / "run"), losses(tmp_path / "with"), 0.03 if "precision" in changes else 0.01)


def test_a_cut_cache_is_continued_and_a_damaged_shard_made_again(models, tmp_path, monkeypatch):
    monkeypatch.setattr(cache_writer, "PER_SHARD", 5)
    recipe = cached(tmp_path / "run", models, tmp_path / "cache", stages=["dft"])
    saved, save = [], cache_writer.CacheWriter._save

    def stop_after_one(self, shard, kept):
        if saved:
            raise KeyboardInterrupt
        saved.append(shard)
        save(self, shard, kept)

    monkeypatch.setattr(cache_writer.CacheWriter, "_save", stop_after_one)
    with pytest.raises(KeyboardInterrupt):
        cache_writer.write_cache(recipe)
    refused(recipe, tmp_path / "run", r"cache/1-dft is not finished; run `cdistill cache`")

    def counted(self, shard, kept):
        saved.append(shard)
        save(self, shard, kept)

    monkeypatch.setattr(cache_writer.CacheWriter, "_save", counted)
    cache_writer.write_cache(recipe)
    assert saved == [0, 1, 2]  # 12 samples in shards of 5, the first of which stays
    shard = tmp_path / "cache" / "1-dft" / "shard-00001.safetensors"
    before = {name: x.clone() for name, x in load_file(shard).items()}  # else mapped to the file
    shard.write_bytes(shard.read_bytes()[:-1] + b"!")
    with pytest.raises(
        ValueError, match=r"shard-00001\.safetensors is damaged \(it has changed\); run `cdistill cache`"
    ):
        run(recipe)
    cache_writer.write_cache(recipe)
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
    with pytest.raises(ValueError, match=r"^vat\.target must be stored with teacher_memory\.cache"):
        cached(output, models, folder, vat__target="recomputed")


def test_samples_that_are_not_those_of_the_cache(models, kept, tmp_path):
    folder, changes = kept
    shutil.copytree(folder, tmp_path / "cache")
    path: Path = tmp_path / "cache" / "1-dpt" / "shard-00000.safetensors"
    tensors = load_file(path)
    tensors["tokens"][2] += 1
    save_file(tensors, path)
    path.with_suffix(".json").write_text(json.dumps(stored(path)))
    with pytest.raises(ValueError, match="sample 2 has other tokens than when the teacher saw it"):
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
    assert not (tmp_path / "cache").exists()


def stop(self, shard, kept):
    raise KeyboardInterrupt


def test_an_unfinished_cache_of_another_recipe_is_not_continued(models, tmp_path, monkeypatch):
    monkeypatch.setattr(cache_writer, "PER_SHARD", 5)
    recipe = cached(tmp_path / "run", models, tmp_path / "cache", stages=["dft"])
    with monkeypatch.context() as patch:
        patch.setattr(cache_writer.CacheWriter, "_save", stop)
        assert main(["cache", write_recipe(recipe, tmp_path / "recipe.yaml")]) == 130
    other = cached(tmp_path / "run", models, tmp_path / "cache", stages=["dft"], kd__temperature=2.0)
    with pytest.raises(ValueError, match=r"cache/1-dft was made with another kd\.temperature; choose another folder"):
        cache_writer.write_cache(other)
    monkeypatch.setattr(cache_writer, "PER_SHARD", 12)  # of another version, say: shards keep their size
    cache_writer.write_cache(recipe)
    assert len(list((tmp_path / "cache" / "1-dft").glob("*.safetensors"))) == 3
    assert len(read_stage(recipe, tmp_path / "cache" / "1-dft")[11].values)


def test_shards_that_nothing_is_known_of_are_made_again(models, tmp_path):
    recipe = cached(tmp_path / "run", models, tmp_path / "cache", stages=["dft"])
    cache_writer.write_cache(recipe)
    (tmp_path / "cache" / "1-dft" / "index.json").unlink()
    other = cached(tmp_path / "run", models, tmp_path / "cache", stages=["dft"], kd__temperature=2.0)
    cache_writer.write_cache(other)
    cache_writer.write_cache(cached(tmp_path / "run", models, tmp_path / "new", stages=["dft"], kd__temperature=2.0))
    ours, theirs = (read_stage(other, tmp_path / name / "1-dft") for name in ("cache", "new"))
    assert torch.equal(ours[3].values, theirs[3].values)


def test_a_full_disk_costs_one_shard(models, tmp_path, monkeypatch):
    monkeypatch.setattr(cache_writer, "PER_SHARD", 5)
    recipe = cached(tmp_path / "run", models, tmp_path / "cache", stages=["dft"])
    folder = tmp_path / "cache" / "1-dft"

    def full(tensors, path):
        Path(path).write_bytes(b"half")
        if "00001" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device")
        save_file(tensors, path)

    with monkeypatch.context() as patch:
        patch.setattr(cache_writer, "save_file", full)
        with pytest.raises(
            RunError, match=r"could not be saved .* run `cdistill cache` again when there is room"
        ) as error:
            cache_writer.write_cache(recipe)
    assert "shard-00001.safetensors" in str(error.value) and "--resume" not in str(error.value)
    found = sorted(path.name for path in folder.iterdir())
    assert found == ["index.json", "shard-00000.json", "shard-00000.safetensors"]
    cache_writer.write_cache(recipe)
    assert len(read_stage(recipe, tmp_path / "cache" / "1-dft")[11].values)


def test_checkpoints_that_find_no_room_are_removed(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("kept")
    for name in ("folder", "file"):
        with (
            pytest.raises(RunError, match="go on with --resume when there is room"),
            checkpoints.saving(tmp_path / name, 1),
        ):
            raise OSError(errno.ENOSPC, "No space left on device")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_shard_that_is_gone_is_told_before_training(models, kept, tmp_path):
    folder, changes = kept
    shutil.copytree(folder, tmp_path / "cache")
    shard = tmp_path / "cache" / "2-dft" / "shard-00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    recipe = cached(tmp_path / "run", models, tmp_path / "cache", **changes)
    refused(recipe, tmp_path / "run", r"shard-00000\.safetensors is damaged \(it has .* bytes\); run `cdistill cache`")
    shard.unlink()
    refused(recipe, tmp_path / "run", r"shard-00000\.safetensors cannot be read \(No such file or directory\); run")


def test_what_a_cache_is_made_of(models, tmp_path, monkeypatch):
    shutil.copytree(models / "teacher", tmp_path / "models" / "teacher")
    shutil.copytree(models / "base", tmp_path / "models" / "base")
    read = []
    checksum = cache.checksum
    monkeypatch.setattr(cache, "checksum", lambda path: read.append(path.name) or checksum(path))

    def facts(index=0, **changes):
        recipe = cached(tmp_path / "run", tmp_path / "models", tmp_path / "cache", **changes)
        built = build_models(recipe)
        stage = resolve(recipe).stages[index]
        vat = vat_of(stage, built.student, built.teacher) if stage.aligns else None
        return cache.fingerprint(stage, built, vat)

    mine = facts(stages=["dft"])
    again = facts(1, stages=["sft", "dft"], stage__dft__data={"turns": 2, "seed": 0})
    assert again == mine, "neither the place nor the name of a stage, only the seed of its samples"
    assert read.count("model.safetensors") == 1
    (tmp_path / "models" / "teacher" / "generation_config.json").write_text("{}")
    (tmp_path / "models" / "teacher" / "notes.json").write_text("{}")
    cut = {"stage__dft__samples": 13, "stage__dft__global_batch_size": 6}
    assert facts(stages=["dft"], **cut) == mine, "the same 12 samples"
    assert facts(stages=["dft"], group_by="length") != facts(stages=["dft"], group_by="length", **cut)
    for key, changes in {
        "precision": {"precision": "bf16"},
        "data": {"stage__dft__data": {"turns": 3}},
        "samples": {"stage__dft__samples": 8},
    }.items():
        other = facts(stages=["dft"], **changes)
        assert [name for name in mine if mine[name] != other[name]] == [key]
    built = build_models(cached(tmp_path / "run", tmp_path / "models", tmp_path / "cache"))
    built.student.resize_token_embeddings(70)
    built.teacher.config.text_config.vocab_size = 80
    recipe = cached(tmp_path / "run", tmp_path / "models", tmp_path / "cache", stages=["dft"])
    assert cache.fingerprint(resolve(recipe).stages[0], built, None)["vocabulary"] == 70
    built.reader = object()
    (tmp_path / "models" / "base" / "preprocessor_config.json").write_text("{}")
    assert list(cache.fingerprint(resolve(recipe).stages[0], built, None)["student.base"]) == [
        "preprocessor_config.json"
    ]
    (tmp_path / "models" / "teacher" / "preprocessor_config.json").write_text("{}")
    found = cache.fingerprint(resolve(recipe).stages[0], built, None)
    assert not found["student.base"] and "preprocessor_config.json" in found["teacher"]


class Answers:
    """A dataset whose samples of some numbers have no labels."""

    def __init__(self, data, without):
        self.data, self.without = data, without

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        item = dict(self.data[index])
        if index in self.without:
            item["labels"] = torch.full_like(torch.as_tensor(item["labels"]), -100)
        return item


@pytest.mark.parametrize("rows", ["answer", "predicting"])
def test_samples_without_labels(models, tmp_path, monkeypatch, rows):
    """One beside another sample, for what is aligned is as wide as the regions of both, and a batch of two."""
    from cdistill.train import prepare

    made = prepare.open_stage

    def dataset(stage, models):
        data, collate = made(stage, models)
        return Answers(data, {0, 2, 3}), collate

    monkeypatch.setattr(prepare, "open_stage", dataset)
    monkeypatch.setattr(cache_writer, "open_stage", dataset)
    options = {"stages": ["dft"], "teacher_memory__top_k": 50, "vat__rows": rows, "stage__dft__micro_batch_size": 2}
    recipe = cached(tmp_path / "run", models, tmp_path / "cache", **options)
    cache_writer.write_cache(recipe)
    run(recipe)
    run(make_recipe(tmp_path / "with", models, **options))
    assert_close(losses(tmp_path / "run"), losses(tmp_path / "with"), 0.01)


def test_only_what_a_student_shares_is_moved(models, tmp_path, monkeypatch):
    """A tensor of the device meta cannot be moved, nor computed with."""

    def build(recipe):
        built = build_models(recipe)
        built.student.model.language_model.to("meta")
        built.student.lm_head.to("meta")
        return built

    monkeypatch.setattr(cache_writer, "build_models", build)
    cache_writer.write_cache(cached(tmp_path / "run", models, tmp_path / "cache", stages=["dft"]))
