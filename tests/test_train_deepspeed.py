import gc
import json
from pathlib import Path
from unittest import mock

import pytest
import torch
import yaml
from builtin_models import make_recipe
from memory_cases import tensor_bytes
from survive_runs import command as run_command
from test_train_stages import assert_near, metrics
from transformers import TrainerCallback

from cdistill.builtin.dataset import BuiltinDataset
from cdistill.builtin.task import BuiltinTask
from cdistill.models.load import RECIPE, load_model
from cdistill.runtime.launch import start_processes
from cdistill.runtime.zero import deepspeed_config
from cdistill.train import prepare, run
from cdistill.train.recipes import recipe_to_dict

LOSSES = ("loss", "ar", "kd", "vat")


@pytest.fixture(scope="module")
def one_process(models, tmp_path_factory):
    """Losses and final weights of a run under ZeRO-2 in this process."""
    output = tmp_path_factory.mktemp("one") / "run"
    final = run(make_recipe(output, models, deepspeed=2, stages=["dpt", "dft"]))
    return losses(output), weights(final)


def losses(output):
    entries = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [(e["stage"], e["step"], *(e[name] for name in LOSSES if e[name] is not None)) for e in entries]


def weights(folder):
    return {name: p.detach() for name, p in load_model(folder).named_parameters()}


def assert_close(a, b):
    for ours, theirs in zip(a[0], b[0], strict=True):
        assert ours[:2] == theirs[:2]
        assert ours[2:] == pytest.approx(theirs[2:], rel=2e-4)
    assert_near(a[1], b[1])


class Crash(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3 and "dft" in args.output_dir:
            raise KeyboardInterrupt


def test_zero_2_trains_like_plain_torch(models, one_process, tmp_path):
    final = run(make_recipe(tmp_path / "run", models, deepspeed="off", stages=["dpt", "dft"]))
    assert_close((losses(tmp_path / "run"), weights(final)), one_process)


@pytest.mark.parametrize(("processes", "zero"), [(1, 2), (2, 2), (2, 3)])
def test_other_processes_train_like_this_one(models, one_process, ranks, tmp_path, processes, zero):
    recipe = make_recipe(tmp_path / "run", models, deepspeed=zero, stages=["dpt", "dft"])
    ranks.call(run, recipe, world=processes)
    assert_close((losses(tmp_path / "run"), weights(tmp_path / "run" / "2-dft")), one_process)


@pytest.mark.parametrize("cold", [False, True])
def test_the_command_starts_processes_that_train_like_this_one(models, one_process, tmp_path, cold):
    """Two of them, forked; and one as for users, which imports everything."""
    recipe = make_recipe(tmp_path / "run", models, deepspeed=3, stages=["dpt"])
    path = tmp_path / "run" / RECIPE if cold else tmp_path / "recipe.yaml"
    path.parent.mkdir(exist_ok=True)
    path.write_text(yaml.safe_dump(recipe_to_dict(recipe)))
    if cold:
        start_processes(1, "train", path.parent)
    else:
        code, text = run_command("train", path, "processes=2")
        assert code == 0, text
    found = losses(tmp_path / "run")
    for ours, theirs in zip(found, one_process[0][: len(found)], strict=True):
        assert ours[:2] == theirs[:2] and ours[2:] == pytest.approx(theirs[2:], rel=2e-4)
    assert found[-1][0] == "dpt"


def test_a_resumed_zero_2_run_ends_with_the_same_bits(models, one_process, tmp_path):
    def recipe():
        return make_recipe(tmp_path / "run", models, deepspeed=2, stages=["dpt", "dft"], save_steps=2)

    with pytest.raises(KeyboardInterrupt):
        run(recipe(), callbacks=[Crash()])
    saved = next((tmp_path / "run" / "checkpoints" / "2-dft").iterdir())
    assert saved.name == "checkpoint-2" and (saved / "complete").is_file()
    assert not any("teacher" in name for name in _saved_names(saved) if "multi_modal_projector" not in name)
    final = run(recipe(), resume=True)
    assert losses(tmp_path / "run") == one_process[0]
    result = weights(final)
    assert all(torch.equal(value, result[name]) for name, value in one_process[1].items())


def _saved_names(folder):
    state = torch.load(next(folder.rglob("*model_states.pt")), weights_only=False)
    return list(state["module"])


@pytest.fixture
def older_objects_hidden():
    """Only what is made in the test is seen by the garbage collector, which makes it quick, too."""
    gc.collect()
    gc.freeze()


class Held(TrainerCallback):
    """Bytes of all tensors when the first step of a stage begins, by folder of the stage."""

    def __init__(self):
        self.bytes = {}

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 0:
            self.bytes[Path(args.output_dir).name] = tensor_bytes()


@pytest.mark.parametrize("zero", [2, 3])
def test_a_stage_leaves_nothing_behind(models, tmp_path, older_objects_hidden, zero):
    """Later stages hold what they hold where a run goes on with them, and a run leaves nothing, failed or not."""
    options = {"deepspeed": zero, "teacher_memory": {"zero": 3}}
    whole, second, small = Held(), Held(), 1000
    run(make_recipe(tmp_path / "whole", models, **options), callbacks=[whole])
    assert tensor_bytes() < small
    recipe = make_recipe(tmp_path / "crashed", models, **options)
    with pytest.raises(KeyboardInterrupt):
        run(recipe, callbacks=[Crash()])
    gc.collect()
    assert tensor_bytes() < small
    run(recipe, resume=True, callbacks=[second])
    assert list(whole.bytes) == ["1-dpt", *second.bytes] == ["1-dpt", "2-dft", "3-sft"]
    for stage, held in second.bytes.items():
        assert held > 100 * small and whole.bytes[stage] == pytest.approx(held, abs=small)
    assert tensor_bytes() < small


def test_what_is_compared_at_visual_tokens_is_the_same_with_both_models_partitioned(models, tmp_path):
    section = {
        "objective": "llava_kd",
        "samples": 8,
        "global_batch_size": 4,
        "learning_rate": 1e-2,
        "data": {"turns": 1},
    }
    options = {"stages": ["near"], "stage__near": section}
    for name, zero in (("plain", {}), ("parts", {"deepspeed": 3, "teacher_memory": {"zero": 3}})):
        run(make_recipe(tmp_path / name, models, **options, **zero))
    plain, parts = (
        [{key: line[key] for key in ("ar", "kd", "mdist", "rdist")} for line in metrics(tmp_path / name)]
        for name in ("plain", "parts")
    )
    assert len(plain) == len(parts) == 2
    for a, b in zip(plain, parts, strict=True):
        assert a == pytest.approx(b, rel=1e-5)


def test_callbacks_cannot_cross_into_other_processes(models, tmp_path):
    recipe = make_recipe(tmp_path / "run", models, processes=2)
    with pytest.raises(ValueError, match=r"callbacks need recipe\.processes 1"):
        run(recipe, callbacks=[Crash()])
    assert not (tmp_path / "run").exists()


def test_the_configuration_never_allocates_more_than_the_model_needs():
    options = {"precision": "bf16", "micro_batch_size": 2, "accumulation": 4, "world_size": 8, "max_grad_norm": 1.0}
    config = deepspeed_config(2, trained=1000, **options)
    assert config["zero_optimization"]["reduce_bucket_size"] == 1000
    assert config["train_batch_size"] == 64 and config["zero_optimization"]["stage"] == 2
    assert config["bf16"]["enabled"] and not config["fp16"]["enabled"]


class Mixed(torch.utils.data.Dataset):
    """Samples with an image or without in turns of two: of two processes with two samples each, one has images, one has not."""

    def __init__(self, images, texts):
        self.images, self.texts = images, texts

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return (self.texts if i // 2 % 2 else self.images)[i]


def run_mixed(recipe):
    make = prepare.open_stage

    def mixed(stage, models):
        images, collate = make(stage, models)
        texts = BuiltinDataset(
            BuiltinTask(modality="text", turns=2), size=len(images), seed=5, tokenizer=models.tokenizer
        )
        return Mixed(images, texts), collate

    with mock.patch.object(prepare, "open_stage", mixed):
        run(recipe)


@pytest.mark.parametrize("taf", [True, False])
def test_a_process_without_images_beside_one_with_images(models, ranks, tmp_path, taf):
    """Under ZeRO-3, of student and teacher, all processes gather the same parameters in the same order, or wait forever."""
    found = []
    for world, options in ((1, {}), (2, {"deepspeed": 3, "teacher_memory": {"zero": 3}})):
        output = tmp_path / f"{world}"
        ranks.call(
            run_mixed, make_recipe(output, models, stages=["dpt", "dft"], student__taf=taf, **options), world=world
        )
        found.append((losses(output), weights(output / "2-dft")))
    assert_close(*found)
