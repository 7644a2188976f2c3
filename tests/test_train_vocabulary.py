"""Losses over the vocabulary in training: one gradient however a batch is cut, heads under ZeRO-3, heads with LoRA."""

import json
from unittest import mock

import numpy as np
import pytest
import torch
from builtin_models import make_recipe, save_base, save_teacher
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator
from deepspeed.utils import safe_get_full_grad
from torch import nn
from transformers import TrainerCallback

from cdistill.ops import _cpp, _vocabulary
from cdistill.ops._dispatch import multiplies
from cdistill.train import run
from cdistill.train.build import build_models
from cdistill.train.model import DistillationModel
from cdistill.train.objectives import OBJECTIVES
from cdistill.vat import VAT, VATConfig

STAGES = ("dpt", "dft")


class Gradients(TrainerCallback):
    """Keeps the gradients of every stage's step by stage and parameter; DeepSpeed's are there when its engine steps."""

    def __init__(self):
        self.found, self.stage = {}, None

    def on_train_begin(self, args, state, control, **kwargs):
        self.stage = args.output_dir.rpartition("-")[2]

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if args.deepspeed is None:
            self.keep(model, lambda p: p.grad)

    def keep(self, model, gradient):
        trained = {name: gradient(p) for name, p in model.named_parameters() if p.requires_grad}
        kept = {
            (self.stage, name.removeprefix("module.")): x.numpy().copy() for name, x in trained.items() if x is not None
        }
        self.found.update(kept)


def run_for_gradients(recipe):
    gradients, step = Gradients(), DeepSpeedEngine.step

    def keep_and_step(engine, *args, **kwargs):
        if engine.is_gradient_accumulation_boundary():
            gradients.keep(engine.module, safe_get_full_grad)
        return step(engine, *args, **kwargs)

    with mock.patch.object(DeepSpeedEngine, "step", keep_and_step):
        run(recipe, callbacks=[gradients])
    return gradients.found


def gradients_of_a_step(output, models, ranks, *, processes, micro, deepspeed="off"):
    """Losses and gradients of one step of 8 samples in each stage, the same on every rank, by stage and parameter."""
    options = {"stages": list(STAGES), "kd__weight": 0.7, "deepspeed": deepspeed}
    for stage in STAGES:
        values = {"global_batch_size": 8, "samples": 8, "micro_batch_size": micro, "data": {"turns": 3}}
        values |= {
            "max_grad_norm": 1e9,
            "learning_rate": 1e-12,
        }  # nothing clipped, and the next stage starts as this one
        options |= {f"stage__{stage}__{key}": value for key, value in values.items()}
    gradients, *others = ranks.call(run_for_gradients, make_recipe(output, models, **options), world=processes)
    for other in others:
        assert all(np.array_equal(x, other[name]) for name, x in gradients.items())
    lines = (output / "metrics.jsonl").read_text().splitlines()
    losses = [[json.loads(line)[name] for name in ("loss", "ar", "kd", "vat")] for line in lines]
    return losses, gradients


def test_one_gradient_however_the_batch_is_cut(models, ranks, tmp_path):
    """8 samples of 6 or 7 labels in one process, in two of 4 (plain, ZeRO-2, ZeRO-3), and in 4 accumulation steps of 2."""
    cuts = {
        "whole": (1, 8, "off"),
        "two": (2, 4, "off"),
        "zero2": (2, 4, 2),
        "zero3": (2, 4, 3),
        "parts": (1, 2, "off"),
    }
    found = {
        name: gradients_of_a_step(tmp_path / name, models, ranks, processes=processes, micro=micro, deepspeed=deepspeed)
        for name, (processes, micro, deepspeed) in cuts.items()
    }
    losses, whole = found.pop("whole")
    assert {stage for stage, _ in whole} == set(STAGES)
    for other, gradients in found.values():
        for ours, theirs in zip(losses, other, strict=True):
            assert [x for x in theirs if x is not None] == pytest.approx([x for x in ours if x is not None], rel=1e-5)
        assert gradients.keys() == whole.keys()
        for (stage, name), x in whole.items():
            # A key's bias has gradient 0 but for rounding.
            like = whole[stage, name.replace("k_proj.bias", "k_proj.weight")]
            assert np.abs(like).max() > 1e-4, name
            assert np.abs(gradients[stage, name] - x).max() <= 1e-5 * np.abs(like).max(), name


class Events(TrainerCallback):
    """What happens to the student's head in each step."""

    def __init__(self, monkeypatch):
        self.steps, self.head, self.loss = [], None, []
        fetch = "_PartitionedParameterCoordinator__all_gather_params_"
        gather, losses = getattr(PartitionedParameterCoordinator, fetch), _cpp.vocabulary_losses

        def counted_gather(coordinator, params, forward, quantize=False):
            if any(p is self.head and p.ds_status == ZeroParamStatus.NOT_AVAILABLE for p in params):
                self.steps[-1].append("gather")
            return gather(coordinator, params, forward, quantize)

        def counted_losses(rows, options):
            self.steps[-1].append("chunk")
            return losses(rows, options)

        monkeypatch.setattr(PartitionedParameterCoordinator, fetch, counted_gather)
        monkeypatch.setattr(_cpp, "vocabulary_losses", counted_losses)

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.steps.append([])
        self.head = getattr(model, "module", model).student.lm_head.weight

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "kd" in logs:
            self.loss.append([logs[name] for name in ("ar", "kd", "vat")])


def test_zero_3_gathers_the_head_once_per_step(tmp_path, monkeypatch):
    """Once its first step has recorded who reads what; however many chunks the rows make."""
    models = tmp_path / "models"
    save_teacher(models / "teacher")
    save_base(models / "base", tie_word_embeddings=False)
    monkeypatch.setattr(_vocabulary, "CHUNK_BYTES", {"cpu": 4 * 2 * 128 * 4})  # 4 rows
    from cdistill.train import stages

    def nothing_stays(*arguments, **options):
        config = deepspeed_config(*arguments, **options)
        config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        return config

    deepspeed_config = stages.deepspeed_config
    monkeypatch.setattr(stages, "deepspeed_config", nothing_stays)
    runs = {}
    for zero in (3, "off"):
        runs[zero] = Events(monkeypatch)
        run(make_recipe(tmp_path / f"run{zero}", models, deepspeed=zero, stages=["dft"]), callbacks=[runs[zero]])
    first, *later = runs[3].steps
    assert len(later) == 2 and first.count("chunk") > 2
    for step in later:
        assert step.count("gather") == 1 and step[0] == "gather" and step.count("chunk") > 2
    assert runs["off"].steps[1].count("chunk") == later[0].count("chunk")
    for ours, plain in zip(runs[3].loss, runs["off"].loss, strict=True):
        assert ours == pytest.approx(plain, rel=1e-5)


def test_what_is_trained_is_counted_under_zero_3(models, tmp_path, capsys):
    lines, few = {}, {f"stage__{stage}__samples": 4 for stage in STAGES}
    for zero in (3, "off"):
        run(make_recipe(tmp_path / f"{zero}", models, deepspeed=zero, stages=list(STAGES), **few))
        lines[zero] = [line for line in capsys.readouterr().out.splitlines() if "parameters trained" in line]
    assert lines[3] == lines["off"] and len(lines[3]) == 2


def test_the_weight_of_kd_reaches_the_kernel(models, tmp_path, monkeypatch):
    """In the ratio that the trainer adds the losses with, so that nothing is computed twice."""
    weights = []
    losses = _cpp.vocabulary_losses

    def kept(rows, options):
        weights.append((options.ce_weight, options.kd_weight))
        return losses(rows, options)

    monkeypatch.setattr(_cpp, "vocabulary_losses", kept)
    recipe = make_recipe(tmp_path / "run", models, stages=["dpt"], kd__weight=0.3, kd__divergence="jsd", kd__beta=0.2)
    run(recipe)
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(weights) == len(metrics) == 3
    assert all(kd / ce == pytest.approx(0.3) for ce, kd in weights)
    assert all(m["loss"] == pytest.approx(m["ar"] + 0.3 * m["kd"], rel=1e-5) for m in metrics)


@pytest.mark.parametrize("zero", ["off", 2])
def test_logits_have_the_precision_of_training(models, tmp_path, monkeypatch, zero):
    """Under autocast norms give fp32 hidden states, of which a linear layer, too, makes bf16 logits."""
    dtypes = []
    losses = _cpp.vocabulary_losses

    def kept(rows, options):
        dtypes.extend((rows.student.dtype, rows.teacher.dtype))
        return losses(rows, options)

    monkeypatch.setattr(_cpp, "vocabulary_losses", kept)
    run(make_recipe(tmp_path / "run", models, stages=["dft"], precision="bf16", deepspeed=zero))
    assert dtypes == [torch.bfloat16 if multiplies(torch.bfloat16) else torch.float32] * 6


class LoraLinear(nn.Module):
    """The outside of peft's LoRA layer: ``weight`` is the base layer's alone."""

    def __init__(self, base_layer):
        super().__init__()
        self.base_layer = base_layer
        self.lora_A = nn.Linear(base_layer.in_features, 2, bias=False)
        self.lora_B = nn.Linear(2, base_layer.out_features, bias=False)

    @property
    def weight(self):
        return self.base_layer.weight

    def forward(self, x):
        return self.base_layer(x) + self.lora_B(self.lora_A(x))


@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("objective", ["dpt", "dft"])
def test_a_head_with_lora_is_refused(models, tmp_path, side, objective):
    built = build_models(make_recipe(tmp_path / "run", models))
    model = getattr(built, side)
    model.lm_head = LoraLinear(model.lm_head)
    vat = VAT(VATConfig(layers="all"), 2, 4) if objective == "dft" else None
    with pytest.raises(ValueError, match=f"the {side}'s lm_head must be a torch.nn.Linear .*LoraLinear.*LoRA"):
        DistillationModel(built.student, OBJECTIVES[objective].terms(vat=vat), teacher=built.teacher)
