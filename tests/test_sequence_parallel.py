"""Sequences that lie on two processes: losses, gradients and weights are those of one process."""

from itertools import product

import pytest
import torch
import torch.distributed as dist
from builtin_models import TOKENIZER, llava, make_recipe
from test_train_deepspeed import Crash, losses
from test_train_files import files  # noqa: F401
from test_train_files import recipe_of as recipe_of_files
from test_train_stages import assert_near, metrics, weights
from test_train_validation import validations

from cdistill.builtin.dataset import BuiltinDataset, Collator
from cdistill.builtin.task import BuiltinTask
from cdistill.choices import ALIGNMENT_LOSSES
from cdistill.data.batches import PackingCollator
from cdistill.data.conversations import Encoded
from cdistill.runtime.sequence_group import sequence_group
from cdistill.train import run
from cdistill.train.build import checkpoint_activations
from cdistill.train.gradients import gradient_norms
from cdistill.train.model import DistillationModel
from cdistill.train.objectives import OBJECTIVES
from cdistill.vat import VAT, HeadCounts, SequenceShards, VATConfig

# Heads and key heads of student and teacher, what is aligned and how, and whether activations are recomputed.
CASES = {
    "unequal heads, key heads repeated": ((2, 1), (4, 2), {}, False),
    "checkpointed, visual rows": ((4, 4), (6, 2), {"rows": "visual"}, True),
    "authors' filter": ((4, 2), (4, 4), {"rows": "visual", "reduction": "column", "sink_filter": True}, False),
    **{f"each, {loss}": ((4, 2), (4, 1), {"heads": "each", "loss": loss}, False) for loss in ("cosine", "kl")},
    **{
        f"mean, {loss}, {reduction}": ((2, 2), (4, 2), {"loss": loss, "reduction": reduction}, False)
        for loss, reduction in product(ALIGNMENT_LOSSES, ("row", "matrix"))
    },
}


def model_of(case, shards=None):
    """Losses of a student that fetches its teacher's adapter."""
    (heads, keys), (teacher_heads, teacher_keys), choices, recomputes = CASES[case]
    torch.manual_seed(0)
    shape = {"num_attention_heads": teacher_heads, "num_key_value_heads": teacher_keys, "num_hidden_layers": 3}
    teacher = llava(hidden_size=16 * teacher_heads, **shape)
    shape = {"num_attention_heads": heads, "num_key_value_heads": keys}
    student = llava(teacher=teacher, hidden_size=16 * heads, **shape).train()
    if recomputes:
        checkpoint_activations(student, reentrant=False)
    vat = VAT(VATConfig(layers="all", **choices), 2, 3)
    return DistillationModel(student, OBJECTIVES["dft"].terms(vat=vat), teacher=teacher, shards=shards)


TEXT, IMAGES = BuiltinTask(modality="text", turns=2), BuiltinTask(caption=0.5, turns=2)


def packed(few=False):
    """Rows of several samples with and without images, an odd number of tokens; ``few``: one row, of which the second process
    has what fills it up alone."""
    parts = [BuiltinDataset(task, size=2, seed=4, tokenizer=TOKENIZER) for task in (IMAGES, TEXT)]
    samples = [parts[i][j] for i, j in ((0, 0), (1, 0), (0, 1), (1, 1))]
    names = "input_ids", "labels"
    samples = [Encoded(*(x[n] for n in names), {}, {n: x[n][None] for n in x.keys() - names}) for x in samples]
    if few:
        samples = samples[1:2]
    batch = PackingCollator(TOKENIZER.pad_token_id, 2 * max(len(x.input_ids) for x in samples))(samples)
    more = len(batch["labels"][0]) + 3 if few else 1 - batch["labels"].shape[1] % 2
    fill = {"input_ids": TOKENIZER.pad_token_id, "labels": -100, "position_ids": 0}
    return batch | {name: torch.nn.functional.pad(batch[name], (0, more), value=x) for name, x in fill.items()}


def batch_of(kind="images"):
    """Three samples of unequal length, an odd number of tokens."""
    if kind.startswith("packed"):
        return packed(few=kind == "packed few")
    data = BuiltinDataset(TEXT if kind == "text" else IMAGES, size=3, seed=4, tokenizer=TOKENIZER)
    batch = Collator(TOKENIZER.pad_token_id)([data[i] for i in range(3)])
    if batch["labels"].shape[1] % 2 == 0:
        fill = {"input_ids": TOKENIZER.pad_token_id, "labels": -100, "attention_mask": 0}
        batch |= {name: torch.nn.functional.pad(batch[name], (0, 1), value=value) for name, value in fill.items()}
    return batch


def computed(model, batch):
    """Losses and gradients, and how long those of alignment are."""
    norms = gradient_norms(model, {"vat": 1.0, "ar": 0.1}, [batch])
    found = model(**batch)
    ((found["ar"] + found["kd"]) / 20 + 10 * found["vat"]).backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: found[name].detach() for name in ("ar", "kd", "vat", "vat_layers")}, grads, norms


def groups_of(model):
    """How many query heads share a key head in each attention layer, as the modules know it."""
    known = [m.num_key_value_groups for m in model.modules() if hasattr(m, "num_key_value_groups")]
    assert known
    return known


def on_a_rank(cases):
    """The sums over processes, of every case."""
    torch.set_num_threads(1)
    shards, found = SequenceShards(sequence_group(dist.get_world_size())), []
    for case, kind in cases:
        model, batch = model_of(case, shards), batch_of(kind)
        before = groups_of(model)
        values, grads, norms = computed(model, batch)
        assert groups_of(model) == before, case
        if kind == "text":  # the same student attends to whole sequences as before
            model.shards = None
            values["ar"] = model(**batch)["ar"].detach() / shards.size
        for tensor in (*values.values(), *grads.values()):
            dist.all_reduce(tensor)
        found.append((values, grads, norms))
    return found


def test_losses_and_gradients_of_two_processes_add_up_to_those_of_one(ranks):
    first, *_ = CASES
    cases = [(case, "images") for case in CASES] + [(first, "text"), (first, "packed few")]
    cases += [(case, "packed") for case in (first, "checkpointed, visual rows", "each, cosine", "authors' filter")]
    on_ranks = ranks.call(on_a_rank, cases)
    for (case, kind), *found in zip(cases, *on_ranks, strict=True):
        values, grads, norms = computed(model_of(case), batch_of(kind))
        assert kind not in ("images", "packed") or values["vat"] > 1e-5, case
        for ours, our_grads, our_norms in found:
            assert our_norms == pytest.approx(norms, rel=1e-3, abs=1e-6 * max(norms.values())), (case, kind)
            for name, value in values.items():
                torch.testing.assert_close(ours[name], value, rtol=1e-5, atol=1e-7, msg=f"{case}, {kind}, {name}")
            assert our_grads.keys() == grads.keys()
            for name, grad in grads.items():
                scale = grads[name.replace("k_proj.bias", "k_proj.weight")].abs().max()
                assert (our_grads[name] - grad).abs().max() <= 1e-4 * scale + 1e-7, (case, kind, name)


@pytest.mark.parametrize(
    ("length", "parts"), [(6, ([0, 1, 2], [3, 4, 5])), (5, ([0, 1, 2], [3, 4, 0])), (1, ([0], [0]))]
)
def test_tokens_are_dealt_to_neighbours_and_filled_up_with_zeros(length, parts):
    for rank, part in enumerate(parts):
        shards = object.__new__(SequenceShards)
        shards.rank, shards.size = rank, 2
        x = torch.arange(length)[None, :, None]
        assert shards.part(x)[0, :, 0].tolist() == part
        places, inside = shards.places(torch.arange(2 * length), length)
        assert (
            x.expand(2, -1, -1).flatten()[places].tolist() == shards.part(x.repeat(2, 1, 1)).flatten()[inside].tolist()
        )


def refusals_on_a_rank():
    shards, said = SequenceShards(sequence_group(dist.get_world_size())), []

    def note(make):
        try:
            make()
        except ValueError as error:
            said.append(str(error))

    for heads, keys in ((3, 1), (6, 3)):
        model = llava(num_attention_heads=heads, num_key_value_heads=keys, hidden_size=16 * heads)
        note(lambda model=model: DistillationModel(model, OBJECTIVES["sft"].terms(), shards=shards))
    terms, student = OBJECTIVES["sft"].terms(), llava()
    note(lambda: DistillationModel(student, terms, pads_right=False, shards=shards))
    note(lambda: DistillationModel(student, OBJECTIVES["ground"].terms(), shards=shards))
    for values in ({"engine": "triton"}, {"target": "recomputed"}, {"heads": "match"}):
        vat = VAT(VATConfig(**values), 2, 3, heads=HeadCounts(2, 2))
        note(lambda vat=vat: vat.teacher(None, None, shards=shards))
    windowed = llava(use_sliding_window=True, sliding_window=4, max_window_layers=0)
    model = DistillationModel(windowed, terms, shards=shards)
    note(lambda: model(**batch_of()))
    whole = batch_of("packed")
    apart = whole["position_ids"]
    note(lambda: DistillationModel(student, terms, shards=shards)(**whole | {"position_ids": apart.repeat(4, 1, 1)}))
    aligned = model_of(next(iter(CASES)), shards)
    note(lambda: aligned(**whole | {"attention_mask": torch.ones_like(apart)}))
    return said


def test_what_cannot_be_spread_is_refused_in_one_line(ranks):
    for said in ranks.call(refusals_on_a_rank):
        wanted = [
            "sequence_parallel must divide the student's 3 heads, got 2",
            "sequence_parallel must divide the student's 3 key heads, or be a multiple of them, got 2",
            "sequence_parallel needs batches that are padded on the right (pads_right)",
            "sequence_parallel knows the terms ar, kd, vat, got ground",
            "vat.engine must be sdpa with sequence_parallel, got triton",
            "vat.target must be stored with sequence_parallel, got recomputed",
            "vat.heads must be mean or each with sequence_parallel, which spreads them over processes, got match",
        ]
        assert said[:7] == wanted
        assert said[7].startswith("layer 0 uses a sliding window of 4 of") and len(said) == 10
        assert said[8].startswith("position_ids must be (2, ") and "with sequence_parallel, got (4, 2, " in said[8]
        assert said[9].startswith("position_ids start anew within a row that has an attention_mask")


def recipe_of(output, models, **changes):
    """Three stages, two micro-batches a step."""
    stages = {f"stage__{name}__micro_batch_size": 2 for name in ("dpt", "dft", "sft")}
    return make_recipe(output, models, **({"deepspeed": 2} | stages | changes))


def interrupted(recipe):
    """A run that is stopped in its second stage, and goes on."""
    with pytest.raises(KeyboardInterrupt):
        run(recipe, callbacks=[Crash()])
    run(recipe, resume=True)


@pytest.mark.parametrize("zero", [2, 3])
def test_a_run_of_three_stages_is_that_of_one_process(models, ranks, tmp_path, zero):
    run(recipe_of(tmp_path / "one", models))
    memory = {"teacher_memory__zero": 3} if zero == 3 else {}
    more = {"deepspeed": zero, "sequence_parallel": 2, "gradient_checkpointing": zero == 3}
    ranks.call(interrupted if zero == 2 else run, recipe_of(tmp_path / "two", models, save_steps=2, **more, **memory))
    for ours, theirs in zip(losses(tmp_path / "two"), losses(tmp_path / "one"), strict=True):
        assert ours[:2] == theirs[:2] and ours[2:] == pytest.approx(theirs[2:], rel=2e-4)
    for stage in ("1-dpt", "2-dft", "3-sft"):
        assert_near(weights(tmp_path / "two" / stage), weights(tmp_path / "one" / stage))


def test_packed_rows_and_held_out_samples_are_those_of_one_process(models, ranks, files, tmp_path):  # noqa: F811
    """Samples with images and without, two micro-batches a step of which the last of those held out has one sample."""
    changes = {"packing": True, "deepspeed": 2, "stage__dft__micro_batch_size": 2, "logging_steps": 1}
    changes |= {
        "vat__weight": "auto",
        "stage__dft__validation": {"samples": 5, "every": 2},
        "stage__dft__keep_best": "validation.kd",
    }
    run(recipe_of_files(tmp_path / "one", models, files, **changes))
    ranks.call(run, recipe_of_files(tmp_path / "two", models, files, sequence_parallel=2, **changes))
    found = [[e for e in metrics(tmp_path / run) if "loss" in e] for run in ("two", "one")]
    for ours, theirs in zip(*found, strict=True):
        assert all(ours[name] == pytest.approx(theirs[name], rel=2e-4) for name in ("step", "loss", "ar", "kd", "vat"))
    for (step, ours), (wanted, theirs) in zip(*map(validations, (tmp_path / "two", tmp_path / "one")), strict=True):
        assert step == wanted and ours == pytest.approx(theirs, rel=2e-4)
    for folder in ("1-dft", "1-dft-best"):
        assert_near(weights(tmp_path / "two" / folder), weights(tmp_path / "one" / folder))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, r"^sequence_parallel must divide the number of processes, 1, got 2$"),
        ({"deepspeed": "off", "processes": 2}, r"^deepspeed must be 0 to 3 with sequence_parallel$"),
        ({"processes": 2, "vat__engine": "auto"}, r"^vat\.engine must be sdpa with sequence_parallel, got auto$"),
        ({"processes": 2, "vat__heads": "match"}, r"^vat\.heads must be mean or each with sequence_parallel"),
        ({"processes": 2, "compile": True}, r"^compile must be false with sequence_parallel$"),
        (
            {"processes": 2, "teacher_memory__cache": "x"},
            r"^teacher_memory\.cache must be null with sequence_parallel$",
        ),
        (
            {"processes": 2, "stages": ["vision"], "student__taf": False},
            r"^stage\.vision\.objective must have no losses but",
        ),
        (
            {"processes": 2, "stage__dft__generation": {}},
            r"^stage\.dft must not generate replies \(opd, generation\) with",
        ),
        ({"processes": 4, "sequence_parallel": 4}, r"^sequence_parallel must divide the student's 2 heads, got 4$"),
    ],
)
def test_recipes_that_cannot_run_are_refused_before_anything_is_written(models, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message) as error:
        run(recipe_of(tmp_path / "run", models, **({"sequence_parallel": 2} | changes)))
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()
