"""Training on files: bad samples left out and counted, the same samples for any workers and after a resume, packing, caches."""

import json
import multiprocessing
import os
import random
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from builtin_models import make_recipe
from PIL import Image
from survive_runs import command
from test_train_stages import Crash, metrics, same, weights
from test_train_teacher import assert_close, losses
from torch.utils.data import DataLoader
from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer, GenerationConfig, TrainerCallback

from cdistill.cli import main
from cdistill.data.dataset import BAD, BadSample
from cdistill.models.processor import save_chat_template
from cdistill.runtime.bad_samples import BadSamples
from cdistill.runtime.errors import BadDataError, ProcessError
from cdistill.train import run
from cdistill.train.build import build_models
from cdistill.train.cache_writer import write_cache
from cdistill.train.data import stage_dataset
from cdistill.train.recipes import recipe_to_dict
from cdistill.train.run_folder import read_recipe
from cdistill.train.trainer import in_one_line

QUESTIONS = ("what colour is the ring ?", "how many objects are there ?", "is there a red ring ?")
ANSWERS = ("red", "blue", "yes", "no", "two")
GOOD, TEXT = 14, 5


def record(rng, i, image):
    turns = []
    for turn in range(rng.randint(1, 3)):
        question = ("<image>\n" if image and not turn else "") + rng.choice(QUESTIONS)
        turns += [{"from": "human", "value": question}, {"from": "gpt", "value": rng.choice(ANSWERS)}]
    return {"id": i, "conversations": turns} | ({"image": image} if image else {})


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with a LLaVA-format set: samples with images and without, and three that cannot be used."""
    folder = tmp_path_factory.mktemp("files")
    rng, pixels = random.Random(3), np.random.default_rng(3)
    (folder / "images").mkdir()
    for i in range(GOOD):
        noise = pixels.integers(0, 255, (60, 80, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / "images" / f"{i}.jpg")
    cut = (folder / "images" / "0.jpg").read_bytes()
    (folder / "images" / "cut.jpg").write_bytes(cut[: len(cut) // 2])
    records = [record(rng, i, f"{i}.jpg") for i in range(GOOD)] + [record(rng, f"t{i}", None) for i in range(TEXT)]
    records += [record(rng, "missing", "nowhere.jpg"), record(rng, "cut", "cut.jpg")]
    records.append(record(rng, "empty", None) | {"conversations": [{"from": "human", "value": "what ?"}]})
    rng.shuffle(records)
    (folder / "set.json").write_text(json.dumps(records))
    return folder


def recipe_of(output, models, files, **changes):
    data = {"path": str(files / "set.json"), "images": str(files / "images")} | changes.pop("data", {})
    stages = {f"stage__{name}__data": data for name in ("dpt", "dft", "sft")}
    stages |= {f"stage__{name}__samples": 24 for name in ("dpt", "dft", "sft")}
    return make_recipe(output, models, **({"stages": ["dft"]} | stages | changes))


def bad_samples(output):
    return [json.loads(line) for line in (output / "bad_samples.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def plain(models, files, tmp_path_factory):
    """A run of one stage, one epoch and a bit, without workers."""
    output = tmp_path_factory.mktemp("plain") / "run"
    return run(recipe_of(output, models, files)), output


def test_bad_samples_are_left_out_counted_and_told(models, files, tmp_path, capsys):
    run(recipe_of(tmp_path / "run", models, files, stages=["dpt", "dft"]))
    told = bad_samples(tmp_path / "run")
    assert {bad["reason"] for bad in told} == {"missing image", "truncated image", "wrong order of turns"}
    printed = capsys.readouterr().out
    for stage in ("1-dpt", "2-dft"):
        mine = [bad for bad in told if bad["stage"] == stage]
        assert len({bad["place"] for bad in mine}) == len(mine) == 3
        assert f"{stage}: 3 bad samples left out (" in printed
    assert all("set.json[" in bad["place"] for bad in told)


def test_what_a_template_refuses_is_a_bad_sample_and_what_is_not_read_is_told(models, files, tmp_path, capsys):
    records = [json.loads(json.dumps(r)) for r in json.loads((files / "set.json").read_text())]
    good = [r for r in records if "image" not in r and len(r["conversations"]) > 1]
    for i, one in enumerate(good):
        one |= {"source": "made up"} if i % 2 else {"system": "be brief .", "id": f"sys{i}"}
    (tmp_path / "set.json").write_text(json.dumps(good))
    recipe = recipe_of(tmp_path / "run", models, files, data={"path": str(tmp_path / "set.json")})
    run(recipe)
    assert {bad["reason"] for bad in bad_samples(tmp_path / "run")} == {"chat template"}
    assert len(bad_samples(tmp_path / "run")) == (len(good) + 1) // 2
    assert f"1-dft: set: not read: source ({len(good) // 2})" in capsys.readouterr().out.splitlines()


def test_a_result_stops_where_answers_end_though_its_base_ends_elsewhere(models, files, tmp_path):
    """As Qwen's bases: their texts end in <|endoftext|>, answers in <|im_end|>; saved and exported."""
    for name in ("teacher", "base"):
        shutil.copytree(models / name, tmp_path / name)
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / name)
        end = tokenizer.eos_token_id
        tokenizer.chat_template = tokenizer.chat_template.replace(
            "{{- eos_token -}}", "{{- '" + tokenizer.eos_token + "' -}}"
        )
        tokenizer.eos_token = tokenizer.unk_token
        tokenizer.save_pretrained(tmp_path / name)
        (tmp_path / name / "generation_config.json").write_text(json.dumps({"eos_token_id": tokenizer.eos_token_id}))
    final = run(recipe_of(tmp_path / "run", tmp_path, files, stages=["dft"]))
    main(["export", str(tmp_path / "run"), str(tmp_path / "exported")])
    for folder in (final, tmp_path / "exported"):
        assert GenerationConfig.from_pretrained(folder).eos_token_id == [end, tokenizer.unk_token_id]
        model = AutoModelForImageTextToText.from_pretrained(folder)
        model.lm_head = torch.nn.Linear(model.lm_head.in_features, model.lm_head.out_features)
        torch.nn.init.constant_(model.lm_head.bias[end], 1e4)  # says </s> to anything
        said = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=9, do_sample=False)
        assert said[0, 3:].tolist() == [end]


def test_workers_change_nothing(models, files, plain, tmp_path):
    final = run(recipe_of(tmp_path / "run", models, files, workers=2))
    assert same(weights(final), weights(plain[0])) and losses(tmp_path / "run") == losses(plain[1])
    assert bad_samples(tmp_path / "run") == bad_samples(plain[1])


@pytest.mark.parametrize("step", [1, 5])
def test_a_run_cut_off_in_an_epoch_ends_with_the_same_bits(models, files, plain, tmp_path, step):
    def recipe(workers):
        return recipe_of(tmp_path / "run", models, files, save_steps=1, workers=workers)

    with pytest.raises(KeyboardInterrupt):
        run(recipe(1), callbacks=[Crash(step + 1)])
    final = run(recipe(1), resume=True)
    assert same(weights(final), weights(plain[0])) and losses(tmp_path / "run") == losses(plain[1])
    assert bad_samples(tmp_path / "run") == bad_samples(plain[1])


def test_too_many_bad_samples_end_the_run(models, files, tmp_path, capsys):
    recipe = recipe_of(tmp_path / "run", models, files, max_bad_samples=1)
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe_to_dict(recipe)))
    assert main(["train", str(tmp_path / "recipe.yaml")]) == 1
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("cdistill:")]
    assert len(told) == 1 and "bad samples, more than max_bad_samples 1; they are listed in" in told[0]
    assert len(bad_samples(tmp_path / "run")) >= 2


def test_processes_count_their_bad_samples_together(models, files, tmp_path):
    parts = {"stage__dft__micro_batch_size": 2, "processes": 2}
    recipe = recipe_of(tmp_path / "run", models, files, max_bad_samples=2, **parts)
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe_to_dict(recipe)))
    code, text = command("train", tmp_path / "recipe.yaml", "processes=2")
    told = [line for line in text.splitlines() if line.startswith("cdistill: error:")]
    assert code == 1, text
    assert ": 3 bad samples, more than max_bad_samples 2" in told[0] and "failed with exit code 1" in told[1]
    assert len(told) == 2 and len({bad["place"] for bad in bad_samples(tmp_path / "run")}) == 3


def test_a_bad_sample_of_two_processes_counts_once(tmp_path, monkeypatch, capsys):
    one, other = (BadSample(f"set[{i}]", "missing image", "no file") for i in range(2))
    bad = BadSamples(1, tmp_path, "1-dft")
    monkeypatch.setattr("cdistill.runtime.bad_samples.gathered", lambda number: [number, 1])
    for theirs in (one, other):
        monkeypatch.setattr("cdistill.runtime.bad_samples.gathered_objects", lambda mine, t=theirs: [mine, [t]])
        assert bad.take({"labels": 0, BAD: [one]}) == {"labels": 0}
        if theirs is one:
            bad.on_step_end(None, None, None)
    with pytest.raises(BadDataError, match="step 3: 2 bad samples, more than max_bad_samples 1"):
        bad.on_step_end(None, SimpleNamespace(global_step=3), None)
    assert [b["place"] for b in bad_samples(tmp_path)] == ["set[0]", "set[1]"]


def test_a_run_goes_on_with_other_workers_a_higher_limit_and_moved_images(models, files, plain, tmp_path):
    def recipe(**changes):
        return recipe_of(tmp_path / "run", models, files, save_steps=1, **changes)

    with pytest.raises(BadDataError):
        run(recipe(workers=1, max_bad_samples=1))
    shutil.copytree(files / "images", tmp_path / "moved")
    final = run(recipe(max_bad_samples=5, data={"images": str(tmp_path / "moved")}), resume=True)
    assert same(weights(final), weights(plain[0])) and losses(tmp_path / "run") == losses(plain[1])
    assert read_recipe(tmp_path / "run").max_bad_samples == 5, "processes of the run read it"
    with pytest.raises(ValueError, match="holds a different run: packing differs"):
        run(recipe(packing=True), resume=True)


def test_a_corrected_folder_of_images_ends_what_an_attempt_had_to_say(models, files, plain, tmp_path):
    """A few images are in the wrong one; a step may have been taken, but none has been logged or saved."""
    output, wrong = tmp_path / "run", tmp_path / "wrong"
    shutil.copytree(files / "images", wrong, ignore=shutil.ignore_patterns("?.jpg"))
    with pytest.raises(BadDataError, match=r"1-dft, step \d: \d+ bad samples"):
        run(recipe_of(output, models, files, max_bad_samples=1, logging_steps=6, data={"images": str(wrong)}))
    assert bad_samples(output)
    final = run(recipe_of(output, models, files, max_bad_samples=3))
    assert same(weights(final), weights(plain[0])) and losses(output) == losses(plain[1])
    assert bad_samples(output) == bad_samples(plain[1])


def test_a_data_set_is_opened_once_in_a_run_and_anew_in_the_next(models, files, tmp_path):
    records = [r for r in json.loads((files / "set.json").read_text()) if r["id"] not in ("empty", "cut", "missing")]
    for i, count in enumerate((len(records), 5)):
        (tmp_path / "set.json").write_text(json.dumps(records[:count]))
        recipe = recipe_of(tmp_path / f"{i}", models, files, data={"path": str(tmp_path / "set.json")})
        built = build_models(recipe)
        first, second = (stage_dataset(recipe, 0, built)[0] for _ in range(2))
        assert first.source is second.source and len(first.source) == count


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (
            "DataLoader worker (pid 7) is killed by signal: Killed. ",
            ProcessError,
            "a process that reads samples has died",
        ),
        (
            "Caught RuntimeError in DataLoader worker process 0.\nRuntimeError: sizes differ",
            RuntimeError,
            "sizes differ",
        ),
    ],
)
def test_errors_of_processes_that_read_samples(error, kind, message):
    with pytest.raises(kind, match=message) as raised, in_one_line():
        raise RuntimeError(error)
    assert type(raised.value) is kind


def test_signals_to_the_run_do_not_reach_processes_that_read_samples(models, files, tmp_path):
    groups, others = [], {child.pid for child in multiprocessing.active_children()}  # of tests before

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            readers = {child.pid for child in multiprocessing.active_children()} - others
            groups.append({os.getpgid(pid) for pid in readers})

    recipe = recipe_of(tmp_path / "run", models, files, workers=1, save_steps=1)
    with pytest.raises(KeyboardInterrupt):
        run(recipe, callbacks=[Look(), Crash(3)])
    run(recipe, resume=True, callbacks=[Look()])  # what skips batches is another loader
    assert groups[0] and groups[3] and not any(os.getpgrp() in group for group in groups)


def test_the_template_of_training_takes_the_place_of_older_forms(models, files, tmp_path):
    """transformers prefers chat_template.json, and a chat template within the configuration of a processor."""
    final = run(recipe_of(tmp_path / "run", models, files, stages=["sft"], data={"template": "plain"}))
    (final / "chat_template.json").write_text(json.dumps({"chat_template": "older"}))
    for name in ("processor_config.json", "tokenizer_config.json"):
        values = json.loads((final / name).read_text())
        (final / name).write_text(json.dumps(values | {"chat_template": "older"}))
    save_chat_template(final, "newer")
    for auto in (AutoProcessor, AutoTokenizer):
        assert auto.from_pretrained(final).chat_template == "newer"


def test_substitutes_are_of_the_same_kind(models, files, tmp_path):
    recipe = recipe_of(tmp_path / "run", models, files)
    data, collate = stage_dataset(recipe, 0, build_models(recipe))
    records = json.loads((files / "set.json").read_text())
    left_out = 0
    for number in range(len(data)):
        encoded, bads = data[number]
        assert torch.equal(encoded.input_ids, data[number][0].input_ids), "the same whenever it is asked for"
        wanted = records[data.order[number]]
        assert ("pixel_values" in encoded.images) == ("image" in wanted)
        assert bool(bads) == (wanted["id"] in ("missing", "cut", "empty"))
        left_out += len(bads)
    assert left_out >= 3
    batch = collate([data[number] for number in range(len(data))])
    assert len(batch[BAD]) == left_out and len(batch["input_ids"]) == len(data)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_set_of_bad_samples_is_an_error(models, files, tmp_path, workers):
    """However many processes read them, told in one line."""
    nothing = [record(random.Random(0), i, "nowhere.jpg") for i in range(3)]
    (tmp_path / "set.json").write_text(json.dumps(nothing))
    message = r"^set: 100 samples in a row cannot be used, the last is [^\n]*set.json\[\d\] line 1 \(missing [^\n]*$"
    with pytest.raises(ValueError, match=message):
        run(recipe_of(tmp_path / "run", models, files, data={"path": str(tmp_path / "set.json")}, workers=workers))


def test_packing_changes_no_loss(models, files, plain, tmp_path):
    run(recipe_of(tmp_path / "run", models, files, packing=True))
    assert_close(losses(tmp_path / "run"), losses(plain[1]), 1e-4)
    recipe = recipe_of(tmp_path / "run", models, files, packing=True)
    data, collate = stage_dataset(recipe, 0, build_models(recipe))
    batch = collate([data[number] for number in range(4)])
    assert "attention_mask" not in batch and len(batch["input_ids"]) == 1


def test_states_that_pass_between_samples_are_not_packed(models, files, tmp_path):
    text = {"model_type": "lfm2", "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 2, "num_key_value_heads": 1, "layer_types": ["conv", "full_attention"]}
    changes = {"student": {"text_config": text, "vision": str(models / "teacher")}, "teacher": None, "stages": ["sft"]}
    with pytest.raises(ValueError, match=r"stage\.sft\.data: packing: .* has layers of type conv, whose state passes"):
        run(recipe_of(tmp_path / "run", models, files, packing=True, **changes))


def test_states_of_the_teacher_are_not_packed_either(models, files, tmp_path):
    recipe = recipe_of(tmp_path / "run", models, files, packing=True)
    built = build_models(recipe)
    built.teacher.config.text_config.layer_types = ["conv", "full_attention"]
    with pytest.raises(ValueError, match=r"stage\.dft\.data: packing: .* has layers of type conv"):
        stage_dataset(recipe, 0, built)


def test_training_from_a_cache_of_files(models, files, plain, tmp_path):
    vocabulary = build_models(recipe_of(tmp_path / "run", models, files)).student.config.text_config.vocab_size
    kept = {"teacher_memory__cache": str(tmp_path / "cache"), "teacher_memory__top_k": vocabulary - 1}
    recipe = recipe_of(tmp_path / "run", models, files, **kept)
    write_cache(recipe)
    run(recipe)
    assert_close(losses(tmp_path / "run"), losses(plain[1]), 1e-4)
    assert bad_samples(tmp_path / "run") == bad_samples(plain[1])


def test_batches_of_one_modality_and_similar_lengths(models, files, tmp_path):
    recipe = recipe_of(tmp_path / "run", models, files, group_by="modality", stage__dft__samples=22)
    data, _ = stage_dataset(recipe, 0, build_models(recipe))
    kinds = []
    for batch in DataLoader(data, 4, collate_fn=lambda items: items):
        kinds.append({"pixel_values" in encoded.images for encoded, _ in batch})
    assert sum(len(kind) == 2 for kind in kinds) <= 1, "what is left of both"
    numbers = sorted(data.indices)
    assert numbers == list(range(20)) and data.indices != numbers


def test_the_result_speaks_as_it_was_taught(models, files, tmp_path):
    data = {"template": "vicuna_v1"}
    final = run(recipe_of(tmp_path / "run", models, files, stages=["dpt", "sft"], data=data))
    processor = AutoProcessor.from_pretrained(final)
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what ?"}]}]
    text = processor.apply_chat_template(chat, add_generation_prompt=True)
    assert text.startswith("A chat between a curious user") and text.endswith("USER: <image>\nwhat ? ASSISTANT:")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": {"path": "nowhere.json"}}, r"stage\.dft\.data: no such file: nowhere\.json"),
        ({"data": {"template": "chatml"}}, r"stage\.dft\.data: template chatml needs the token <\|im_start\|>"),
        ({"data": {"template": "alpaca"}}, r"data\.template must be one of auto, plain, .*, got 'alpaca'"),
        ({"data": {"path": None}}, r"data\.path must be given where images is"),
        ({"data": {"seed": -1}}, r"stage\.dpt\.data\.seed must be at least 0, got -1"),
        ({"data": {"turns": 3}}, r"data\.turns is of the built-in task: leave it out, or 6, where path is given"),
        ({"data": {"max_length": 1}}, r"data\.max_length must be at least 2, got 1"),
        ({"packing": True, "teacher_memory__cache": "kept"}, r"packing must be false with teacher_memory\.cache"),
        ({"packing": True, "stage__dft__data": {}}, r"packing needs data\.path in every stage; stage\.dft has none"),
        ({"group_by": "size"}, r"group_by must be one of length, modality or null, got 'size'"),
        ({"workers": -1}, r"workers must be at least 0, got -1"),
        ({"max_bad_samples": -1}, r"max_bad_samples must be at least 0, got -1"),
        (
            {"group_by": "length", "data": {"streaming": True}},
            r"stage\.dft\.data: group_by must be null for set: lengths of a stream are not known",
        ),
    ],
)
def test_recipes_that_do_not_fit_their_data(models, files, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        run(recipe_of(tmp_path / "run", models, files, **changes))
    assert not (tmp_path / "run").exists()


def test_objectives_of_the_built_in_task_need_it(models, files, tmp_path):
    data = {"stage__vision__data": {"path": str(files / "set.json")}, "stages": ["vision"], "student__taf": False}
    with pytest.raises(ValueError, match=r"data\.path must be null for objective vision"):
        make_recipe(tmp_path / "run", models, **data)


def test_a_stream_trains_in_its_order(models, files, tmp_path):
    options = {"streaming": True, "columns": {"conversations": "conversations", "image": "image"}}
    lines = [r for r in json.loads((files / "set.json").read_text()) if r.get("image", "0.jpg") != "nowhere.jpg"]
    lines = [{"id": str(r["id"]), "image": r.get("image"), "conversations": r["conversations"]} for r in lines]
    (tmp_path / "set.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    options["path"] = str(tmp_path / "set.jsonl")
    a, b = (recipe_of(tmp_path / f"{workers}", models, files, data=options, workers=workers) for workers in (0, 2))
    assert same(weights(run(a)), weights(run(b))) and losses(tmp_path / "0") == losses(tmp_path / "2")
    assert len(metrics(tmp_path / "0")) == 6


def test_a_language_model_reads_files_without_images(models, files, tmp_path):
    records = json.loads((files / "set.json").read_text())
    (tmp_path / "set.json").write_text(json.dumps([r for r in records if r["id"] != "empty" and "image" not in r]))
    changes = {"student": {"base": str(models / "base")}, "teacher": None, "stages": ["text"]}
    data = {"path": str(tmp_path / "set.json")}
    run(make_recipe(tmp_path / "run", models, stage__text__data=data, **changes))
    assert len(metrics(tmp_path / "run")) == 3 and not (tmp_path / "run" / "bad_samples.jsonl").exists()
    data = {"path": str(files / "set.json"), "images": str(files / "images")}
    with pytest.raises(ValueError, match="image count: 1 images for a model that takes none"):
        run(make_recipe(tmp_path / "other", models, stage__text__data=data, **changes))
