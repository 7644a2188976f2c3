import json
import shutil

import pytest
import torch
from builtin_models import VISION, make_recipe, save_base, save_teacher, text_config
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    TrainerCallback,
)

from cdistill.builtin.dataset import build_tokenizer
from cdistill.models.load import load_model, load_tokenizer
from cdistill.train import run
from cdistill.train.build import tokenizer_of
from cdistill.train.objectives import OBJECTIVES
from cdistill.train.run_folder import stage_folders


def metrics(output):
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def weights(folder):
    """Parameters under the model's own names: transformers saves a LLaVA's under others."""
    return {name: p.detach() for name, p in load_model(folder).named_parameters()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def assert_near(ours, theirs, rtol=1e-3, atol=2e-4):
    """But for keys' biases, whose gradient is zero but for rounding, which Adam makes as large as any other."""
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        if "k_proj.bias" not in name:
            torch.testing.assert_close(ours[name], value, rtol=rtol, atol=atol)


class Crash(TrainerCallback):
    """Stops a run after a step as a power cut would."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


class Start(TrainerCallback):
    """Keeps the weights that every stage starts from."""

    def __init__(self):
        self.states = []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.states.append({name: p.detach().clone() for name, p in model.student.named_parameters()})


def part(name):
    if "vision_tower" in name:
        return "vision"
    if "multi_modal_projector.teacher" in name:
        return "fetched"
    return "adapter" if "multi_modal_projector" in name else "language"


@pytest.mark.parametrize(
    ("objective", "taf", "trained"),
    [
        ("pt", True, {"adapter"}),
        ("pt", False, {"adapter"}),
        ("dpt", True, {"adapter"}),
        ("dft", True, {"language", "adapter"}),
        ("dft", False, {"language", "adapter"}),
        ("sft", True, {"language", "adapter"}),
        ("text", False, {"language"}),
        ("vision", False, {"vision"}),
    ],
)
def test_a_stage_trains_what_the_table_says_and_nothing_else(models, tmp_path, objective, taf, trained):
    recipe = make_recipe(tmp_path / "run", models, stages=[objective], student__taf=taf)
    if not taf and objective != "dft":
        recipe = make_recipe(
            tmp_path / "run",
            models,
            stages=[objective],
            student__taf=False,
            student__vision=str(models / "teacher"),
            teacher=None,
        )
    start = Start()
    final = run(recipe, callbacks=[start])
    assert final == tmp_path / "run" / f"1-{objective}"
    before, after = start.states[0], weights(final)
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    expected = {name for name in after if part(name) in trained}
    if objective == "vision":  # features are those of the penultimate layer
        expected = {n for n in expected if "layers.1." not in n and "post_layernorm" not in n}
    assert changed == expected
    reloaded = AutoModelForImageTextToText.from_pretrained(final)
    assert reloaded.config.model_type == ("cdistill_taf_llava" if taf else "llava")
    assert AutoTokenizer.from_pretrained(final).get_vocab() == build_tokenizer().get_vocab()


def test_a_student_without_vision_is_saved_as_a_causal_language_model(models, tmp_path):
    fresh = text_config().to_dict()
    heads = ("num_attention_heads", "num_key_value_heads")
    chosen = ("model_type", "hidden_size", "intermediate_size", "num_hidden_layers", *heads)
    recipe = make_recipe(
        tmp_path / "run",
        models,
        teacher=None,
        stages=["text"],
        student={"text_config": {name: fresh[name] for name in chosen}},
    )
    final = run(recipe)
    model = AutoModelForCausalLM.from_pretrained(final)
    assert type(model).__name__ == "Qwen2ForCausalLM" and model.config.vocab_size == len(build_tokenizer())
    losses = [entry["loss"] for entry in metrics(tmp_path / "run")]
    assert len(losses) == 3 and losses[-1] < losses[0]


def test_each_stage_starts_from_the_last_ones_result(models, tmp_path):
    start = Start()
    recipe = make_recipe(tmp_path / "run", models)
    final = run(recipe, callbacks=[start])
    folders = stage_folders(recipe, tmp_path / "run")
    assert [f.name for f in folders] == ["1-dpt", "2-dft", "3-sft"] and final == folders[-1]
    for folder, state in zip(folders, start.states[1:], strict=False):
        result = weights(folder)
        assert all(torch.equal(result[name], state[name]) for name in result)
    assert not (tmp_path / "run" / "checkpoints").exists()
    first, teacher = start.states[0], weights(models / "teacher")
    base = weights(models / "base")
    assert torch.equal(first["model.language_model.norm.weight"], base["model.norm.weight"])
    fetched = "model.multi_modal_projector.teacher.0.weight"
    theirs = next(t for n, t in teacher.items() if n.endswith("linear_1.weight"))
    assert torch.equal(first[fetched], theirs) and torch.equal(weights(final)[fetched], theirs)


def test_what_is_logged(models, tmp_path):
    output = tmp_path / "run"
    recipe = make_recipe(output, models, logging_steps=2, log_layers=True, kd__weight=0.5, vat__weight=3.0)
    run(recipe)
    entries = metrics(output)
    # every second step, and always the last
    assert [(e["stage"], e["step"], e["samples"]) for e in entries] == [
        (stage, step, 4 * step) for stage in ("dpt", "dft", "sft") for step in (2, 3)
    ]
    for entry in entries:
        assert set(entry) - {"vat_layers"} == {
            *("stage", "step", "samples", "loss", "ar", "kd", "vat"),
            *("skipped", "learning_rate", "grad_norm", "samples_per_s", "tokens_per_s", "elapsed_s"),
            *("memory_mb", "processes"),
        }
        used = OBJECTIVES[entry["stage"]].losses
        assert [n for n in ("ar", "kd", "vat") if entry[n] is not None] == list(used)
        total = entry["ar"] + 0.5 * (entry["kd"] or 0) + 3 * (entry["vat"] or 0)
        assert entry["loss"] == pytest.approx(total, rel=1e-5)
        if "vat" in used:
            assert sum(entry["vat_layers"]) / 2 == pytest.approx(entry["vat"], rel=1e-5)
        assert ("vat_layers" in entry) == ("vat" in used)
    board = EventAccumulator(str(output / "tensorboard" / "2-dft")).Reload()
    points = {tag: [(e.step, e.value) for e in board.Scalars(tag)] for tag in board.Tags()["scalars"]}
    assert {"loss", "ar", "kd", "vat", "learning_rate", "vat_layers/0", "vat_layers/1"} <= set(points)
    for name in ("loss", "vat"):
        logged = [(e["step"], e[name]) for e in entries if e["stage"] == "dft"]
        assert points[name] == [(step, pytest.approx(value, rel=1e-6)) for step, value in logged]


def test_a_seed_decides_the_result_bit_for_bit(models, tmp_path):
    runs = [run(make_recipe(tmp_path / str(i), models, seed=seed, stages=["dft"])) for i, seed in enumerate((5, 5, 6))]
    assert same(weights(runs[0]), weights(runs[1]))
    assert not same(weights(runs[0]), weights(runs[2]))


def test_accumulation_does_not_change_the_mathematics(models, tmp_path):
    whole = run(make_recipe(tmp_path / "a", models, stages=["dft"], stage__dft__micro_batch_size=4))
    parts = run(make_recipe(tmp_path / "b", models, stages=["dft"], stage__dft__micro_batch_size=1))
    for a, b in zip(metrics(tmp_path / "a"), metrics(tmp_path / "b"), strict=True):
        assert [a[n] for n in ("loss", "ar", "kd", "vat")] == pytest.approx(
            [b[n] for n in ("loss", "ar", "kd", "vat")], rel=1e-4
        )
    assert_near(weights(parts), weights(whole))


def test_gradient_checkpointing_does_not_change_the_result(models, tmp_path):
    plain = run(make_recipe(tmp_path / "a", models, stages=["dft"]))
    less = run(make_recipe(tmp_path / "b", models, stages=["dft"], gradient_checkpointing=True))
    assert same(weights(plain), weights(less))


def test_a_batch_without_visual_tokens_has_no_alignment_and_trains_on(models, tmp_path):
    recipe = make_recipe(tmp_path / "run", models, stages=["dft"], stage__dft__data={"modality": "text", "turns": 1})
    start = Start()
    final = run(recipe, callbacks=[start])
    assert [e["vat"] for e in metrics(tmp_path / "run")] == [0.0] * 3
    changed = {n for n, t in weights(final).items() if not torch.equal(t, start.states[0][n])}
    assert changed and all(part(n) == "language" for n in changed)


@pytest.mark.parametrize("changes", [{"vat__matching": "adaptive"}, {"vat__matching": "simple"}, {"vat__loss": "kl"}])
def test_ablations_run(models, tmp_path, changes):
    run(make_recipe(tmp_path / "run", models, stages=["dft"], vat__measure_samples=4, **changes))
    values = [e["vat"] for e in metrics(tmp_path / "run")]
    assert len(values) == 3 and all(0 < v < 100 for v in values)


def test_a_resumed_run_ends_with_the_same_bits(models, tmp_path):
    def recipe(name):
        return make_recipe(tmp_path / name, models, save_steps=2, vat__loss="mse")

    whole = run(recipe("whole"))
    with pytest.raises(KeyboardInterrupt):
        run(recipe("cut"), callbacks=[Crash(3)])  # in the first stage, after the checkpoint at step 2
    assert not (tmp_path / "cut" / "1-dpt").exists()
    with (tmp_path / "cut" / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "dp')  # cut off while it was written
    start = Start()
    final = run(recipe("cut"), resume=True, callbacks=[start])
    assert same(weights(whole), weights(final))
    for stage in ("1-dpt", "2-dft"):
        assert same(weights(tmp_path / "whole" / stage), weights(tmp_path / "cut" / stage))

    def logged(name):
        return [(e["stage"], e["step"], e["loss"]) for e in metrics(tmp_path / name)]

    assert logged("cut") == logged("whole")
    shutil.rmtree(tmp_path / "cut" / "3-sft")
    start = Start()
    again = run(recipe("cut"), resume=True, callbacks=[start])
    assert len(start.states) == 1, "finished stages are skipped"
    assert same(weights(whole), weights(again))
    assert logged("cut") == logged("whole")


def tree(folder):
    return {p.relative_to(folder): p.stat().st_mtime_ns for p in folder.rglob("*")} if folder.exists() else None


def refused(recipe, output, message, **options):
    """The run raises one line and leaves the output folder as it was."""
    before = tree(output)
    with pytest.raises(ValueError, match=message) as error:
        run(recipe, **options)
    assert "\n" not in str(error.value)
    assert tree(output) == before


def test_output_folders_that_hold_something(models, tmp_path):
    output = tmp_path / "run"
    refused(make_recipe(output, models), output, "holds no run to resume", resume=True)
    run(make_recipe(output, models, stages=["dpt"]))
    refused(make_recipe(output, models, stages=["dpt"]), output, "already holds a run of this recipe.*--resume")
    other = make_recipe(output, models, stages=["dpt"], kd__weight=0.5)
    for resume in (False, True):
        refused(other, output, "holds a different run: kd.weight differs", resume=resume)
    (output / "recipe.yaml").unlink()
    refused(make_recipe(output, models), output, "is not empty and holds no run")


def copy_of(models, folder):
    shutil.copytree(models, folder)
    return folder


def corrupt_weights(folder):
    path = folder / "teacher" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def drop_a_tensor(folder):
    from safetensors.torch import save_file

    path = folder / "base" / "model.safetensors"
    state = load_file(path)
    del state["model.norm.weight"]
    save_file(state, path, metadata={"format": "pt"})


def other_words(folder):
    tokenizer = build_tokenizer()
    tokenizer.add_tokens(["zebra"])
    tokenizer.save_pretrained(folder / "base")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "teacher" / "model.safetensors").unlink(), r"teacher: .*model\.safetensors is missing"),
        (lambda f: shutil.rmtree(f / "base"), r"student\.base: there is no folder"),
        (corrupt_weights, r"teacher: .*model\.safetensors is corrupt"),
        (lambda f: (f / "base" / "config.json").write_text("{"), r"student\.base: .*config\.json is corrupt"),
        (lambda f: (f / "base" / "config.json").unlink(), r"student\.base: .*config\.json is missing"),
        (
            lambda f: (f / "base" / "tokenizer_config.json").unlink(),
            r"student\.base: .*tokenizer_config\.json is missing",
        ),
        (drop_a_tensor, r"student\.base: the weights in .* do not fit"),
        (other_words, r"vocabularies differ: token 'zebra' is \d+ for the student, none for the teacher"),
        (
            lambda f: save_teacher(f / "teacher", num_hidden_layers=1),
            r"group matching needs at least as many teacher as student layers, got 1 for 2",
        ),
    ],
)
def test_models_that_cannot_be_used(models, tmp_path, damage, message):
    folder = copy_of(models, tmp_path / "models")
    damage(folder)
    refused(make_recipe(tmp_path / "run", folder), tmp_path / "run", message)


def test_vocabularies_are_compared_without_a_table_of_all_tokens_for_each(models, tmp_path, monkeypatch):
    """Of 150,000 tokens a table takes 50 ms: one for each token took hours."""
    asked = []
    tables = PreTrainedTokenizerFast.get_vocab
    monkeypatch.setattr(PreTrainedTokenizerFast, "get_vocab", lambda self: asked.append(1) or tables(self))
    recipe = make_recipe(tmp_path / "run", models)
    tokenizer_of(recipe.student, load_tokenizer(models / "teacher", "teacher"))
    assert len(asked) < 10 < len(build_tokenizer())


def test_visual_tokens_that_differ(models, tmp_path):
    save_teacher(tmp_path / "other", seed=9)
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    (tmp_path / "other" / "config.json").write_text(json.dumps(config | {"vision_feature_select_strategy": "default"}))
    recipe = make_recipe(
        tmp_path / "run", models, student__taf=False, student__vision=str(tmp_path / "other"), stages=["dft"]
    )
    refused(recipe, tmp_path / "run", "visual tokens of an image differ: student 35 .*, teacher 36")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"student__base": "builtin:nothing"}, r"student\.base: there is no folder 'builtin:nothing'; built-in:"),
        ({"precision": "fp16"}, r"precision fp16 needs a GPU"),
        ({"processes": 3}, r"stage\.dpt\.global_batch_size must be a multiple of 3 processes"),
        ({"vat__heads": "each"}, r"vat\.heads each needs equal head counts, got 2 and 4"),
        ({"vat__layers": "official"}, r"layer span 'official' knows"),
        (
            {"teacher": None, "student__taf": False, "stages": ["sft"]},
            r"stage\.sft\.objective must be text or ground, .* a student without a vision encoder",
        ),
        (
            {"student": {"text_config": {"model_type": "nope"}}, "stages": ["text"]},
            r"student\.text_config\.model_type is not a model type",
        ),
        (
            {"student": {"text_config": {"model_type": "qwen2", "width": 3}}, "stages": ["text"]},
            r"student\.text_config\.width is not a field of Qwen2Config",
        ),
    ],
)
def test_recipes_that_do_not_fit_models_or_machine(models, tmp_path, monkeypatch, changes, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refused(make_recipe(tmp_path / "run", models, **changes), tmp_path / "run", message)


def test_data_needs_the_tokenizer_it_was_written_for(models, tmp_path):
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>")), unk_token="<unk>"
    )
    save_base(tmp_path / "base", tokenizer=tokenizer)
    recipe = make_recipe(
        tmp_path / "run", models, teacher=None, stages=["text"], student={"base": str(tmp_path / "base")}
    )
    refused(
        recipe,
        tmp_path / "run",
        r"stage\.text\.data: path must be given, or the tokenizer be the built-in one: there is no token",
    )


def test_vision_stage_learns_patches(models, tmp_path):
    recipe = make_recipe(
        tmp_path / "run",
        models,
        teacher=None,
        stages=["vision"],
        student={"base": str(models / "base"), "vision_config": VISION | {"model_type": "siglip_vision_model"}},
        stage__vision__samples=640,
        stage__vision__global_batch_size=16,
        stage__vision__learning_rate=1e-2,
    )
    run(recipe)
    losses = [e["loss"] for e in metrics(tmp_path / "run")]
    assert losses[-1] < 0.5 * losses[0] and isinstance(losses[0], float)
