"""Kinds of students and of steps: LoRA, compiled layers, samples grouped by length, fp16 with dynamic loss scaling."""

import copy
import json

import peft
import pytest
import torch
from builtin_models import make_recipe
from family_models import build, draw
from test_train_losses import batch_of_three
from test_train_stages import Start, part, same, weights
from torch._dynamo.utils import counters

from cdistill.builtin.dataset import BuiltinDataset
from cdistill.train import resolve as train_resolve
from cdistill.train import run, stages
from cdistill.train.build import build_models, compile_layers
from cdistill.train.data import stage_dataset
from cdistill.train.distillation import distill
from cdistill.train.lora import add_lora, merged_state
from cdistill.train.recipes import LoRAConfig
from cdistill.vat import VATConfig

LORA = {"r": 4, "alpha": 16, "dropout": 0.0}


def metrics(output):
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def student_with_lora(models, tmp_path):
    """A student whose LoRA is far from 0."""
    student = build_models(make_recipe(tmp_path / "unused", models)).student
    add_lora(student, LoRAConfig(**LORA))
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, p in student.named_parameters():
            if "lora_" in name:
                p.copy_(0.3 * torch.randn(p.shape, generator=generator))
    return student.eval()


def test_merged_weights_are_those_of_peft_and_give_the_same_logits(models, tmp_path):
    student = student_with_lora(models, tmp_path)
    batch = batch_of_three(seed=2)
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    merged = merged_state(student.state_dict(), LoRAConfig(**LORA))
    plain = build_models(make_recipe(tmp_path / "unused", models)).student.eval()
    before = copy.deepcopy(plain.state_dict())
    plain.load_state_dict(merged)
    changed = {name for name, value in plain.state_dict().items() if not torch.equal(value, before[name])}
    layers = plain.config.text_config.num_hidden_layers
    assert len(changed) == 7 * layers and all("language_model.layers" in name for name in changed)
    torch.testing.assert_close(plain(**inputs).logits, student(**inputs).logits, rtol=1e-4, atol=1e-4)
    for module in student.modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            module.merge()
    for name, value in merged_state(student.state_dict(), LoRAConfig(**LORA)).items():
        if name in changed:  # merged twice now: once by peft, once by us
            torch.testing.assert_close(value - merged[name], merged[name] - before[name], rtol=1e-4, atol=1e-5)


def test_a_lora_stage_trains_additions_and_adapter_and_saves_a_plain_model(models, tmp_path):
    start = Start()
    recipe = make_recipe(tmp_path / "run", models, stages=["dpt", "dft", "sft"], student__lora=LORA)
    final = run(recipe, callbacks=[start])
    assert not any("lora_" in name for name in start.states[0]), "DPT trains no language model"
    dft = start.states[1]
    assert sum("lora_A" in name for name in dft) == 14
    after = weights(tmp_path / "run" / "2-dft")
    base = {name.replace(".base_layer.", "."): value for name, value in dft.items() if "lora_" not in name}
    assert base.keys() == after.keys()
    changed = {name for name in after if not torch.equal(base[name], after[name])}
    assert {part(name) for name in changed} == {"adapter", "language"}
    assert all("layers" in name and "proj" in name for name in changed if part(name) == "language")
    assert weights(final).keys() == after.keys()
    again = run(make_recipe(tmp_path / "again", models, stages=["dpt", "dft", "sft"], student__lora=LORA))
    assert same(weights(final), weights(again))


def test_a_resumed_lora_run_ends_with_the_same_bits(models, tmp_path):
    from test_train_stages import Crash

    def recipe(name):
        options = {"student__lora": LORA | {"dropout": 0.2}, "save_steps": 2, "gradient_checkpointing": True}
        return make_recipe(tmp_path / name, models, stages=["dft"], **options)

    whole = run(recipe("whole"))
    with pytest.raises(KeyboardInterrupt):
        run(recipe("cut"), callbacks=[Crash(3)])
    assert same(weights(run(recipe("cut"), resume=True)), weights(whole))


def test_lora_under_zero_is_that_of_plain_torch(models, tmp_path):
    results = [
        weights(run(make_recipe(tmp_path / str(zero), models, stages=["dft"], deepspeed=zero, student__lora=LORA)))
        for zero in ("off", 2, 3)
    ]
    for other in results[1:]:
        for name, value in results[0].items():
            torch.testing.assert_close(other[name], value, rtol=1e-3, atol=2e-4)


def test_compiled_layers_have_the_same_losses_and_gradients():
    """With dynamo's tracing and autograd, without inductor's code; the layers share fewer graphs than they are."""
    found: dict[bool, dict[str, torch.Tensor]] = {}
    student, teacher = build("llava_qwen2", 0, layers=10), build("llava_qwen2", 1, layers=11)
    torch._dynamo.reset()
    counters.clear()
    for compiled in (False, True):
        model = copy.deepcopy(student)
        if compiled:
            compile_layers(model, backend="aot_eager")
        distillation = distill(teacher, model, vat=VATConfig(layers="all"))
        results = {}
        for seed in (3, 4):  # of different lengths
            losses = distillation(draw("llava_qwen2", seed))
            losses["loss"].backward()
            results |= {f"{name} {seed}": losses[name].detach() for name in ("ar", "kd", "vat")}
        found[compiled] = results | {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert found[False].keys() == found[True].keys() and len(found[True]) > 20
    for name, plain in found[False].items():
        # the gradient of a key's bias is 0 but for rounding
        scale = found[False][name.replace("k_proj.bias", "k_proj.weight")].abs().max()
        assert (plain - found[True][name]).abs().max() <= 1e-5 * scale, name
    assert 0 < counters["stats"]["unique_graphs"] < 10


def test_grouped_stages_see_the_same_samples_in_another_order(models, tmp_path):
    options = {"stage__dft__samples": 32, "stage__dft__data": {"turns": 3, "caption": 0.5}, "stages": ["dft"]}
    recipes = [
        make_recipe(tmp_path / "run", models, group_by="length" if on else None, **options) for on in (False, True)
    ]
    plain, grouped = (stage_dataset(recipe, 0, build_models(recipe))[0] for recipe in recipes)
    ids = [[tuple(data[i]["input_ids"].tolist()) for i in range(32)] for data in (plain, grouped)]
    assert ids[0] != ids[1] and sorted(ids[0]) == sorted(ids[1])
    assert isinstance(plain, BuiltinDataset)
    assert [plain.length(i) for i in range(32)] == [len(x) for x in ids[0]]
    spread = [sum(max(map(len, x[k : k + 4])) - min(map(len, x[k : k + 4])) for k in range(0, 32, 4)) for x in ids]
    assert spread[1] < spread[0]


def test_fp16_scales_its_loss_dynamically(models, tmp_path, monkeypatch):
    """On the CPU, which DeepSpeed takes for one without fp16: a scale too large for the first steps, which are skipped."""
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

    monkeypatch.setattr(CPU_Accelerator, "is_fp16_supported", lambda self: True)
    monkeypatch.setattr(CPU_Accelerator, "supported_dtypes", lambda self: [torch.float, torch.half])
    monkeypatch.setattr(train_resolve, "precision_of", lambda recipe: "fp16")
    make = stages.deepspeed_config

    def large(*arguments, **options):
        config = make(*arguments, **options)
        assert config["fp16"]["enabled"] and not config["bf16"]["enabled"]
        config["fp16"] |= {"initial_scale_power": 20, "hysteresis": 1}
        return config

    monkeypatch.setattr(stages, "deepspeed_config", large)
    options = {"stages": ["dft"], "deepspeed": 2, "stage__dft__samples": 80}
    run(make_recipe(tmp_path / "half", models, **options))
    half = metrics(tmp_path / "half")
    monkeypatch.undo()
    run(make_recipe(tmp_path / "single", models, **options))
    single = metrics(tmp_path / "single")
    skipped = half[-1]["skipped"]
    assert 1 <= skipped <= 10 and [e["skipped"] for e in half][-10:] == [skipped] * 10
    assert [e["loss"] for e in half[:skipped]] == [None] * skipped
    assert single[-1]["skipped"] == 0
    # it trains as well as fp32 does in so many steps fewer
    assert half[-1]["loss"] < 0.8 * half[skipped]["loss"]
    assert half[-1]["loss"] == pytest.approx(single[-1]["loss"], rel=0.15)
