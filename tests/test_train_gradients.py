"""Norms of the terms' gradients, and the weight that makes alignment pull as hard as the rest: `vat.weight: auto`."""

import json
import math
import shutil

import pytest
import torch
import yaml
from builtin_models import llava, make_recipe, recipe_values, save_base, save_teacher
from torch import nn
from torch.utils.data import DataLoader
from transformers import TrainerCallback

from cdistill.builtin.dataset import BuiltinDataset, Collator, build_tokenizer
from cdistill.builtin.task import BuiltinTask
from cdistill.choices import KDConfig, VATConfig
from cdistill.cli import main
from cdistill.data.batches import PackingCollator, PaddingCollator
from cdistill.data.conversations import Encoded
from cdistill.models.load import load_model
from cdistill.runtime.errors import RunError
from cdistill.train import load_recipe, run
from cdistill.train.gradient_report import part_of
from cdistill.train.gradients import balanced_weight, gradient_norms
from cdistill.train.model import DistillationModel
from cdistill.train.objectives import OBJECTIVES, set_trained
from cdistill.vat import VAT

SAMPLES = 6


class Crash(Exception):
    """Of a test's own."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gradients")
    save_teacher(folder / "teacher")
    save_base(folder / "base")
    return folder


@pytest.fixture(scope="module")
def pair():
    torch.manual_seed(0)
    teacher = llava(hidden_size=64, num_hidden_layers=4, num_attention_heads=4)
    student = llava(teacher=teacher)
    set_trained(student, OBJECTIVES["dft"])
    vat = VAT(VATConfig(layers="all"), 2, 4)
    terms = OBJECTIVES["dft"].terms(kd=KDConfig(weight=0.5), vat=vat, vat_weight=3.0)
    return DistillationModel(student, terms, teacher=teacher)


def batches(size, text=0.0, samples=SAMPLES):
    data = BuiltinDataset(BuiltinTask(turns=2, text=text), size=samples, seed=0)
    return DataLoader(data, size, collate_fn=Collator(build_tokenizer().pad_token_id))


def mean(model, name, batch):
    """A term as `compute_loss` divides it, in a pass over all samples at once."""
    count = (batch["labels"][:, 1:] != -100).sum() if name != "vat" else len(batch["labels"])
    return model(**batch)[name] / count


def test_packed_samples_count_one_by_one(pair):
    task, names = BuiltinTask(turns=2), ("input_ids", "labels")
    found = [BuiltinDataset(task, size=3, seed=0)[i] for i in range(3)]
    samples = [Encoded(*(x[n] for n in names), {}, {"pixel_values": x["pixel_values"][None]}) for x in found]
    pad = build_tokenizer().pad_token_id
    padded, packed = PaddingCollator(pad)(samples), PackingCollator(pad, 1000)(samples)
    assert len(packed["labels"]) == 1
    for name in ("vat", "kd"):
        wanted, ours = (gradient_norms(pair, {name: 1.0}, [batch]) for batch in (padded, packed))
        assert ours == pytest.approx(wanted, rel=1e-3, abs=1e-6 * max(wanted.values()))


@pytest.mark.parametrize("size", [1, 4, 6])
@pytest.mark.parametrize(
    "weights", [{"ar": 1.0}, {"vat": 1.0}, {"ar": 1.0, "kd": 0.5}, {"ar": 0.3, "kd": 2.0, "vat": 7.0}]
)
def test_norms_are_those_of_the_mean_over_all_samples(pair, size, weights):
    batch = next(iter(batches(SAMPLES, text=0.4)))
    trained = {name: p for name, p in pair.student.named_parameters() if p.requires_grad}
    total = sum(weight * mean(pair, name, batch) for name, weight in weights.items())
    expected = dict(zip(trained, torch.autograd.grad(total, list(trained.values()), allow_unused=True), strict=True))
    found = gradient_norms(pair, weights, batches(size, text=0.4))
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert found[name] == pytest.approx(0.0 if gradient is None else float(gradient.norm()), rel=2e-3, abs=1e-5)


def test_the_norm_is_the_slope_along_the_gradient(pair):
    batch = next(iter(batches(SAMPLES)))
    trained = [p for p in pair.student.parameters() if p.requires_grad]
    direction = torch.autograd.grad(mean(pair, "vat", batch), trained, allow_unused=True)
    norm = math.hypot(*gradient_norms(pair, {"vat": 1.0}, batches(2)).values())

    @torch.no_grad()
    def moved(step):
        for p, d in zip(trained, direction, strict=True):
            if d is not None:
                p.add_(d, alpha=step / norm)

    def value(step):
        moved(step)
        found = float(mean(pair, "vat", batch).detach())
        moved(-step)
        return found

    assert (value(2e-2) - value(-2e-2)) / 4e-2 == pytest.approx(norm, rel=0.05)


def test_measuring_leaves_nothing_behind(pair):
    state = torch.random.get_rng_state()
    before = {name: p.clone() for name, p in pair.student.state_dict().items()}
    gradient_norms(pair, {"ar": 1.0}, batches(3))
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in pair.student.state_dict().items())
    assert all(p.grad is None for p in pair.parameters())


def test_dropout_is_drawn_alike(pair):
    class Dropped(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner, self.dropout = inner, nn.Dropout(0.5)

        def forward(self, *args, **kwargs):
            return self.dropout(self.inner(*args, **kwargs))

    layer = pair.student.model.language_model.layers[0]
    layer.mlp = Dropped(layer.mlp)
    try:
        first, second, other = (gradient_norms(pair, {"ar": 1.0}, batches(3), seed=seed) for seed in (0, 0, 1))
    finally:
        layer.mlp = layer.mlp.inner
    assert first == second != other


def test_the_weight_makes_both_gradients_equally_long(pair):
    weight = balanced_weight(pair, batches(2), label="stage")
    ours = math.hypot(*gradient_norms(pair, {"vat": weight}, batches(SAMPLES)).values())
    rest = math.hypot(*gradient_norms(pair, {"ar": 1.0, "kd": 0.5}, batches(SAMPLES)).values())
    assert ours == pytest.approx(rest, rel=1e-3)
    assert balanced_weight(pair, batches(5), label="stage") == pytest.approx(weight, rel=1e-3)


def test_what_cannot_be_balanced_is_said_in_one_line(pair):
    with pytest.raises(RunError, match=r"^2-dft: vat\.weight auto needs gradients .* give vat\.weight a number$"):
        written = [batch for batch in batches(1, text=0.5, samples=40) if "pixel_values" not in batch]
        balanced_weight(pair, written, label="2-dft")
    with pytest.raises(ValueError, match="weights must name terms of the loss"):
        gradient_norms(pair, {"nothing": 1.0}, batches(2))
    with pytest.raises(ValueError, match="at least one sample"):
        gradient_norms(pair, {"ar": 1.0}, [])


def test_a_stage_measures_its_weight_and_a_resumed_one_finds_the_same(folders, tmp_path, capsys):
    def recipe(name, **changes):
        return make_recipe(tmp_path / name, folders, save_steps=1, stages=["dpt", "dft"], **changes)

    def state(folder):
        return load_model(folder).state_dict()

    automatic = recipe("whole", vat__weight="auto", vat__measure_samples=8)
    final = run(automatic)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "vat.weight" in line]
    assert line.startswith("2-dft: vat.weight auto is ") and line.endswith(", measured on 8 samples")
    weight = float(line.split()[4].rstrip(","))
    logged = [json.loads(text) for text in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    for entry in [entry for entry in logged if entry["stage"] == "dft"]:
        assert entry["loss"] == pytest.approx(entry["ar"] + entry["kd"] + weight * entry["vat"], rel=1e-3)
    fixed = state(run(recipe("fixed", vat__weight=weight)))
    other = state(run(recipe("other", vat__weight=1.0)))
    whole = state(final)
    far = {name: (whole[name] - other[name]).abs().max() for name in whole if whole[name].is_floating_point()}
    near = {name: (whole[name] - fixed[name]).abs().max() for name in far}
    assert max(near.values()) < 0.1 * max(far.values())

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if "dft" in args.output_dir and state.global_step == 2:
                raise Crash

    with pytest.raises(Crash):
        run(recipe("cut", vat__weight="auto", vat__measure_samples=8), callbacks=[Stop()])
    resumed = state(run(recipe("cut", vat__weight="auto", vat__measure_samples=8), resume=True))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_the_report_by_layers(folders, tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(recipe_values(tmp_path / "run", folders, vat__weight="auto", kd__weight=0.5)))
    words = ["gradients", str(recipe), "--samples", "6", "--json", str(tmp_path / "found.json")]
    assert main(words) == 0
    found = json.loads((tmp_path / "found.json").read_text())
    assert (found["stage"], found["samples"], found["student"]) == ("dft", 6, "fresh")
    assert found["weights"] == {"ar": 1.0, "kd": 0.5, "vat": None}
    parts = [f"layer {i}, {what}" for i in (0, 1) for what in ("queries and keys", "the rest")]
    assert list(found["norms"]) == ["adapter", *parts, "embeddings, norms and others", "all"]
    for name in found["weights"]:
        each = [of[name] for part, of in found["norms"].items() if part != "all"]
        assert math.hypot(*each) == pytest.approx(found["norms"]["all"][name])
    # the last layer's values and outputs are not in the way from its attention to the loss
    assert found["norms"]["layer 1, the rest"]["vat"] < found["norms"]["layer 1, queries and keys"]["vat"]
    printed = capsys.readouterr().out
    assert f"with vat.weight {found['balance']:.4g}" in printed and "0.5 kd" in printed
    # a student of one's own, and the one that the stage would begin with
    run(make_recipe(tmp_path / "run", folders, stages=["dpt"]))
    shutil.copytree(tmp_path / "run" / "1-dpt", tmp_path / "copy")
    assert main(words) == 0
    before = json.loads((tmp_path / "found.json").read_text())
    assert main([*words, "--student", str(tmp_path / "copy")]) == 0
    given = json.loads((tmp_path / "found.json").read_text())
    assert before["student"].endswith("1-dpt") and before["norms"] == given["norms"] != found["norms"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--stage", "dtf"], "--stage must be one of dpt, dft, sft, got 'dtf'"),
        (["--samples", "0"], "--samples must be at least 1, got 0"),
        (["--student", "/nowhere"], "/nowhere"),
    ],
)
def test_a_report_that_cannot_be_made_is_refused(folders, tmp_path, capsys, words, message):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(recipe_values(tmp_path / "run", folders)))
    assert main(["gradients", str(recipe), *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


@pytest.mark.parametrize(
    ("name", "part", "row"),
    [
        ("model.language_model.layers.11.self_attn.q_proj.weight", "language", "layer 11, queries and keys"),
        ("model.language_model.layers.2.self_attn.k_norm.weight", "language", "layer 2, queries and keys"),
        ("model.layers.3.self_attn.qkv_proj.weight", "language", "layer 3, queries and keys"),
        ("model.layers.3.self_attn.q_proj.lora_A.default.weight", "lora", "layer 3, queries and keys"),
        ("model.language_model.layers.0.self_attn.v_proj.bias", "language", "layer 0, the rest"),
        ("model.language_model.layers.0.mlp.down_proj.weight", "language", "layer 0, the rest"),
        ("model.multi_modal_projector.linear_1.weight", "adapter", "adapter"),
        ("model.vision_tower.vision_model.encoder.layers.1.self_attn.q_proj.weight", "vision", "vision"),
        ("model.language_model.embed_tokens.weight", "language", "embeddings, norms and others"),
    ],
)
def test_parameters_have_their_rows(name, part, row):
    assert part_of(name, part) == row


def test_the_key_takes_numbers_and_auto_alone():
    assert load_recipe("demo-compodistill", ["vat.weight=auto"]).vat.weight == "auto"
    assert load_recipe("demo-compodistill", ["vat.weight=3"]).vat.weight == 3.0
    for wrong in ("automatic", "-1", "nan"):
        with pytest.raises(ValueError, match=r"vat\.weight"):
            load_recipe("demo-compodistill", [f"vat.weight={wrong}"])
