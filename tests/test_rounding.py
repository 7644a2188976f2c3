"""Stages that compute with weights of 8 or 4 bits: the grids by definition, the gradient, and what a run leaves."""

import json

import numpy as np
import pytest
import torch
from builtin_models import make_recipe
from family_models import build, draw
from gguf import GGMLQuantizationType, GGUFReader
from gguf.quants import dequantize, quantize
from parity_cases import MICRO, Case, train
from safetensors.torch import load_file
from test_train_stages import Crash
from torch.nn.functional import linear

from cdistill.models.gguf import export_gguf
from cdistill.models.load import load_model
from cdistill.models.parts import language_model
from cdistill.plan.blueprint import student_of
from cdistill.plan.memory import plan
from cdistill.train import run
from cdistill.train.recipes import load_recipe
from cdistill.train.rounding import GRIDS, RoundedLinear, on_grid, round_weights


def by_definition(block, grid):
    """One group of 32, as GGUF writes it and reads it again, number by number."""
    if grid == "q8_0":
        scale = np.float32(max(abs(x) for x in block)) / np.float32(127)
        numbers = [0 if scale == 0 else int(np.floor(abs(x / scale) + 0.5)) * (1 if x > 0 else -1) for x in block]
    else:
        scale = np.float32(max(block, key=abs)) / np.float32(-8)
        numbers = [0 if scale == 0 else min(15, int(x / scale + 8.5)) - 8 for x in block]
    return np.float32([n * np.float32(np.float16(scale)) for n in numbers])


@pytest.mark.parametrize("grid", GRIDS)
def test_grids_by_their_definition(grid):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(24, 96, generator=generator) * 10 ** torch.linspace(-3, 2, 24)[:, None]
    weight[0], weight[1, :32], weight[2, 5] = 0, 1.0, -40.0
    found = on_grid(weight, grid)
    wanted = np.stack(
        [np.concatenate([by_definition(block, grid) for block in row.reshape(3, 32)]) for row in weight.numpy()]
    )
    # x * (1 / scale) and x / scale may fall to either side of a half
    kind = GGMLQuantizationType[grid.upper()]
    held = dequantize(quantize(found.numpy(), kind), kind)
    assert np.array_equal(held, found.numpy()), "a file of the format holds them exactly"
    same = np.isclose(found.numpy(), wanted, rtol=1e-6, atol=0)
    assert same.mean() > 0.999
    assert torch.equal(on_grid(found, grid), found), "what is rounded stays as it is"
    assert (found - weight).abs().max() <= weight.abs().max() / (127 if grid == "q8_0" else 8)
    assert found.bfloat16().dtype == on_grid(weight.bfloat16(), grid).dtype


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("name", ["llava_qwen2", "qwen2_5_vl", "idefics3"])
def test_a_gradient_passes_straight_through(name, grid):
    """Losses are those of the rounded model, and gradients, too, by the weights that it was rounded from."""
    model, exact, batch = build(name, 2), build(name, 2), draw(name, 1)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with torch.no_grad():
        for layer in language_model(exact).layers:
            for module in layer.modules():
                if isinstance(module, torch.nn.Linear):
                    module.weight.copy_(on_grid(module.weight, grid))
    round_weights(model, grid, "quantization")
    losses = [m(**batch, use_cache=False).loss for m in (model, exact)]
    torch.testing.assert_close(*losses)
    for loss in losses:
        loss.backward()
    for ours, theirs in zip(model.named_parameters(), exact.named_parameters(), strict=True):
        assert ours[0] == theirs[0]
        if ours[1].grad is not None:
            torch.testing.assert_close(ours[1].grad, theirs[1].grad)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert "head" not in "".join(key for key, m in model.named_modules() if isinstance(m, RoundedLinear))


def rounded_run(folder, models, **changes):
    stages = {f"stage__{name}__quantization": "q4_0" for name in ("dft", "sft")}
    return make_recipe(folder, models, stages=["dft", "sft"], **stages, **changes)


def test_a_run_ends_with_weights_on_the_grid_and_resumes_to_the_bit(models, tmp_path):
    whole = run(rounded_run(tmp_path / "whole", models))
    with pytest.raises(KeyboardInterrupt):
        run(rounded_run(tmp_path / "cut", models, save_steps=2), callbacks=[Crash(3)])
    again = run(rounded_run(tmp_path / "cut", models, save_steps=2), resume=True)
    for name in ("1-dft", "2-sft"):
        ours, theirs = (load_file(tmp_path / side / name / "model.safetensors") for side in ("whole", "cut"))
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert whole.name == again.name
    model = load_model(whole)
    weights = {
        f"{n}.weight": m.weight
        for n, m in language_model(model).layers.named_modules()
        if isinstance(m, torch.nn.Linear)
    }
    assert len(weights) == 14 and all(torch.equal(on_grid(w, "q4_0"), w) for w in weights.values())
    assert not torch.equal(on_grid(model.lm_head.weight, "q4_0"), model.lm_head.weight)
    written = export_gguf(tmp_path / "whole", tmp_path / "gguf", quantize="q4_0", check=True).folder
    tensors = {t.name: dequantize(t.data, t.tensor_type) for t in GGUFReader(written / "model-q4_0.gguf").tensors}
    for theirs, ours in (("ffn_down", "mlp.down_proj"), ("attn_q", "self_attn.q_proj")):
        for layer in (0, 1):
            assert np.array_equal(
                tensors[f"blk.{layer}.{theirs}.weight"], weights[f"{layer}.{ours}.weight"].detach().numpy()
            )
    logged = [json.loads(line) for line in (tmp_path / "whole/metrics.jsonl").read_text().splitlines()]
    assert all(entry["vat"] > 0 for entry in logged if entry["stage"] == "dft")


def test_processes_that_share_weights_round_them_too(ranks):
    case = Case("3", "llava", "alternating", "dft", False, False, False, 1, False, "q4_0")
    alone = ranks.call(train, case, MICRO, world=1)[0][0]
    for losses, _ in ranks.call(train, case, MICRO):
        assert losses[0] == pytest.approx(alone[0], abs=1e-5)
        assert losses[-1] == pytest.approx(alone[-1], rel=0.02), (
            "a weight near a half may be rounded up here, and down there"
        )


def test_a_plan_counts_the_rounded_weights(models, tmp_path):
    recipe = rounded_run(tmp_path / "run", models)
    model = student_of(recipe, recipe.stage["dft"]).model
    assert sum(isinstance(module, RoundedLinear) for module in model.modules()) == 14
    layer = language_model(model).layers[0]
    assert isinstance(layer.mlp.up_proj, RoundedLinear) and layer.mlp.up_proj.weight.is_meta


def test_rows_that_no_group_fits_are_refused():
    model = build("llava_qwen2", 0, width=40)
    with pytest.raises(
        ValueError, match=r"^stage.sft.quantization must be null: layers\.0\.self_attn\.q_proj\.weight has rows of 40"
    ):
        round_weights(model, "q8_0", "stage.sft.quantization")
    with pytest.raises(ValueError, match=r"is the weight of no linear layer$"):
        round_weights(build("llava_lfm2", 0), "q8_0", "stage.sft.quantization")


@pytest.mark.parametrize("grid", GRIDS)
def test_weights_of_16_bits_are_refused_where_they_could_not_hold_the_result(grid, models, tmp_path):
    """DeepSpeed keeps bf16 and fp16 weights; autocast keeps them in fp32."""
    changes = {"stages": ["sft"], "stage__sft__quantization": grid, "precision": "bf16"}
    recipe = make_recipe(tmp_path / "run", models, deepspeed=2, **changes)
    for attempt in (lambda: run(recipe), lambda: plan(recipe, gpus=1)):
        with pytest.raises(
            ValueError, match=r"^stage\.sft\.quantization must be null with deepspeed in bf16, whose weights cannot"
        ):
            attempt()
    assert not (tmp_path / "run").exists()
    model = load_model(run(make_recipe(tmp_path / "run", models, **changes)))
    weight = model.model.language_model.layers[0].mlp.up_proj.weight
    assert weight.dtype == torch.float32 and torch.equal(on_grid(weight, grid), weight)
    assert not torch.equal(on_grid(weight.bfloat16(), grid).float(), weight), "bf16 would not hold it"


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            ["stage.dpt.quantization=q8_0"],
            "stage.dpt.quantization must be null: dpt leaves the language model as it is",
        ),
        (["stage.dft.quantization=q8_0"], "stage.sft.quantization must be q8_0, as in the stage before"),
        (["stage.sft.quantization=q8_0", "student.lora.r=8"], "stage.sft.quantization must be null with student.lora"),
        (["stage.sft.quantization=int3"], "stage.sft.quantization must be"),
    ],
)
def test_mistakes_of_the_key_are_told(overrides, said):
    with pytest.raises(ValueError) as caught:
        load_recipe("demo-compodistill", overrides)
    assert said in str(caught.value)


def test_products_are_those_of_rounded_weights():
    layer = torch.nn.Linear(64, 8)
    layer.__class__, layer.grid = RoundedLinear, "q8_0"
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(layer(x), linear(x, on_grid(layer.weight, "q8_0"), layer.bias))
