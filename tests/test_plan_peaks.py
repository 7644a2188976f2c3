"""`cdistill plan` against the tensors of real runs: the most bytes that they hold at one time."""

import pytest
from memory_cases import STUDENT, VISUAL, Batches, measured_peaks, peaks_of_a_rank, recipe_of, save_models

from cdistill.plan.memory import plan


@pytest.fixture(scope="module")
def sized(tmp_path_factory):
    """Models in which tensors dominate."""
    return save_models(tmp_path_factory.mktemp("sized"))


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    """The same with heads tied to the embeddings and grouped queries."""
    return save_models(tmp_path_factory.mktemp("tied"), tie_word_embeddings=True, num_key_value_heads=2)


def assert_predicted(recipe, length, answers, tolerance, monkeypatch):
    measured = measured_peaks(recipe, Batches(length, answers), monkeypatch)
    precision = "fp32" if recipe.precision == "auto" else recipe.precision
    planned = plan(recipe, gpus=1, precision=precision, device="cpu", length=length, visual=VISUAL, answers=answers)
    ratios = {stage.name: stage.total / measured[stage.name] for stage in planned.stages}
    assert ratios.keys() == measured.keys()
    assert all(abs(ratio - 1) < tolerance for ratio in ratios.values()), ratios


# Changes of the recipe, tokens of a sample, labelled ones, and what the prediction may be off by. The plan promises 15 %.
RUNS = {
    "fp32": ({"stages": ["dpt", "dft", "sft"]}, 384, 64, 0.04),
    "bf16, all rows": (
        {"stages": ["dft"], "precision": "bf16", "vat": {"rows": "all", "layers": "all"}},
        640,
        300,
        0.04,
    ),
    "bf16, checkpointed": (
        {"stages": ["dft", "sft"], "precision": "bf16", "gradient_checkpointing": True},
        512,
        128,
        0.04,
    ),
    "bf16, LoRA": ({"stages": ["dft"], "student__lora": {"r": 16, "alpha": 32}, "precision": "bf16"}, 512, 64, 0.04),
    "accumulated": ({"stages": ["sft"], "stage__sft__micro_batch_size": 1}, 512, 200, 0.04),
    "own adapter": ({"stages": ["pt"], "student__taf": False, "gradient_checkpointing": True}, 768, 4, 0.05),
    "ZeRO-2, bf16": ({"stages": ["dpt", "sft"], "deepspeed": 2, "precision": "bf16"}, 512, 128, 0.04),
    "ZeRO-3 teacher": (
        {"stages": ["dft"], "deepspeed": 2, "precision": "bf16", "teacher_memory__zero": 3},
        512,
        128,
        0.04,
    ),
    "ZeRO-3, bf16": ({"stages": ["dpt", "dft"], "deepspeed": 3, "precision": "bf16"}, 384, 64, 0.04),
    "recomputed targets": (
        {"stages": ["dft"], "vat": {"rows": "text", "layers": "all", "target": "recomputed"}},
        640,
        300,
        0.04,
    ),
}


@pytest.mark.parametrize(("changes", "length", "answers", "tolerance"), RUNS.values(), ids=RUNS)
def test_the_predicted_peak_is_the_measured_one(sized, tmp_path, monkeypatch, changes, length, answers, tolerance):
    if not changes.get("student__taf", True):
        changes = changes | {"student__vision": str(sized / "teacher")}
    assert_predicted(recipe_of(tmp_path / "run", sized, **changes), length, answers, tolerance, monkeypatch)


def test_the_predicted_peak_with_tied_embeddings(tied, tmp_path, monkeypatch):
    recipe = recipe_of(tmp_path / "run", tied, stages=["dft"], deepspeed=2)
    assert_predicted(recipe, 512, 32, 0.04, monkeypatch)


def test_the_predicted_peak_of_two_processes(sized, ranks, tmp_path):
    recipe = recipe_of(tmp_path / "run", sized, stages=["dft"], deepspeed=2, precision="bf16")
    planned = plan(recipe, gpus=2, device="cpu", length=384, visual=VISUAL, answers=64)
    for peaks in ranks.call(peaks_of_a_rank, recipe, Batches(384, 64)):
        assert peaks["dft"] == pytest.approx(planned.total, rel=0.04)


def test_the_predicted_peak_of_two_processes_that_share_sequences(sized, ranks, tmp_path):
    """Whose tensors are fewer than those of two that do not. What gloo's threads free is not seen, so that a measured peak is
    never too small and now and then too large: the smallest of a few counts."""
    options = {"stages": ["dpt", "dft"], "deepspeed": 2, "precision": "bf16"}
    options |= {"stage__dpt__micro_batch_size": 1, "stage__dft__micro_batch_size": 1}
    sizes = {"gpus": 2, "device": "cpu", "length": 1024, "visual": VISUAL, "answers": 128}
    alone = plan(recipe_of(tmp_path / "run", sized, **options), **sizes)
    found = {}
    for again in range(4):
        recipe = recipe_of(tmp_path / f"run{again}", sized, **options, sequence_parallel=2)
        planned = {stage.name: pytest.approx(stage.total, rel=0.05) for stage in plan(recipe, **sizes).stages}
        measured = ranks.call(peaks_of_a_rank, recipe, Batches(1024, 128))
        peaks = {name: max(of[name] for of in measured) for name in planned}
        found = {name: min(peak, found.get(name, peak)) for name, peak in peaks.items()}
        if found == planned:
            break
    assert found == planned
    assert all(found[before.name] < before.total for before in alone.stages)


def test_gradients_of_tied_embeddings_and_of_zero_3(tied, tmp_path):
    options = {"gpus": 1, "device": "cpu", "precision": "fp32", "length": 640, "visual": VISUAL, "answers": 200}

    def dft(zero, gpus=1):
        recipe = recipe_of(tmp_path / "run", tied, stages=["dft"], deepspeed=zero)
        return plan(recipe, **options | {"gpus": gpus}).stages[0].phases

    whole, embeddings = dft("off")["optimizer step"]["gradients"], 4 * STUDENT["vocab_size"] * STUDENT["hidden_size"]
    assert dft("off")["backward of the embeddings"]["gradients"] == whole + embeddings
    assert dft(2)["losses"]["gradients"] == 0
    assert dft(3)["losses"]["gradients"] == 2 * whole  # a partition, which here is all of them, and a bucket
    weights = dft(2)["losses"]["student weights"]
    assert dft(3)["losses"]["student weights"] == weights  # nothing to gather
    assert dft(3, gpus=2)["losses"]["student weights"] == weights // 2 + weights


@pytest.mark.parametrize("rows", ["answer", "predicting"])
def test_an_aligned_layer_keeps_its_slice(sized, tmp_path, rows):
    options = {"gpus": 1, "device": "cpu", "precision": "fp32", "length": 640, "visual": VISUAL, "answers": 200}
    kept = []
    for vat in ({"enabled": False}, {"layers": "all"}):
        recipe = recipe_of(tmp_path / "run", sized, stages=["dft"], vat=vat | {"rows": rows})
        kept.append(plan(recipe, **options).stages[0].phases["losses"])
    slices = 4 * 4 * 2 * 200 * VISUAL  # 4 layers, fp32, 2 samples
    assert kept[1]["targets"] - kept[0]["targets"] == slices
    assert slices <= kept[1]["activations"] - kept[0]["activations"] < 1.1 * slices
    vat = {"layers": "all", "rows": rows, "target": "recomputed"}
    recipe = recipe_of(tmp_path / "run", sized, stages=["dft"], vat=vat)
    found = plan(recipe, **options).stages[0].phases["losses"]
    # the last block of rows of both models' slices, which here has all of them
    assert 2 * slices <= found["activations"] - kept[0]["activations"] < 2.2 * slices
