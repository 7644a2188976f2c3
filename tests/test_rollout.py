"""Answers that the student generates: those of transformers, drawn as they should be, in runs that can be repeated."""

import functools
import json
from html import escape
from pathlib import Path

import numpy as np
import pytest
import torch
from builtin_models import make_recipe, recipe_values
from family_models import QUIET, build, build_pair, collate, draw_samples, processor
from test_train_files import files, recipe_of  # noqa: F401
from test_train_losses import batch_of_three, eager, oracle
from test_train_stages import Crash, metrics, same, weights

import cdistill
from cdistill.builtin.dataset import BuiltinDataset, Collator, build_tokenizer
from cdistill.builtin.task import BuiltinTask
from cdistill.choices import KDConfig, OnPolicyConfig
from cdistill.cli import main
from cdistill.data import strict_yaml
from cdistill.data.batches import joined_images
from cdistill.models.load import load_model
from cdistill.nn import generalized_jsd_loss
from cdistill.plan.memory import plan
from cdistill.report.history import read_run
from cdistill.report.page import page
from cdistill.reproduce.runs import QUESTIONS, load_pair, read_records, tuned_rates
from cdistill.reproduce.runs import plan as plan_runs
from cdistill.reproduce.tables import load_table
from cdistill.train import run
from cdistill.train.build import build_models
from cdistill.train.model import DistillationModel
from cdistill.train.objectives import OBJECTIVES
from cdistill.train.prepare import open_data, rollouts_of
from cdistill.train.recipes import recipe_from_dict, recipe_to_dict
from cdistill.train.resolve import resolve
from cdistill.train.rollout import COUNTS, CountingCollator, Drawing, Rollouts
from cdistill.train.vocabulary import VocabularyLosses
from cdistill.vat import VAT, VATConfig

GREEDY = OnPolicyConfig(on_policy=1.0, temperature=0.0, max_new_tokens=6)
STOP = build_tokenizer().eos_token_id


def scenes():
    """Scenes with an image and one that is written out, of different lengths, as a batch and one by one."""
    pictures = BuiltinDataset(BuiltinTask(turns=3), size=3, seed=3)
    words = BuiltinDataset(BuiltinTask(modality="text", turns=2), size=1, seed=3)
    items = [pictures[0], words[0], pictures[1], pictures[2]]
    alone = [{"pixel_values": item["pixel_values"][None]} if "pixel_values" in item else {} for item in items]
    return CountingCollator(Collator(build_tokenizer().pad_token_id))(items), alone


def family(name):
    """Samples without, with one and with two images, and a video, of a family."""
    samples = draw_samples(name, 3)
    return counted(name, samples), [sample.tensors for sample in samples]


def counted(name, samples):
    """A batch that says whose images are whose, samples without images adding nothing, as cdistill's collators make it."""
    keys = {key for sample in samples for key in sample.tensors}
    counts = {key: [len(sample.tensors.get(key, ())) for sample in samples] for key in keys}
    return collate(name, samples)[0] | joined_images([sample.tensors for sample in samples]) | {COUNTS: counts}


@pytest.mark.parametrize("name", ["builtin", "llava_next", "qwen2_vl", "idefics3"])
def test_greedy_replies_are_those_of_generate_one_by_one(models, name):
    if name == "builtin":
        model, tokenizer, (batch, alone) = load_model(models / "teacher"), build_tokenizer(), scenes()
    else:
        model, tokenizer, (batch, alone) = build(name, 2), processor(name).tokenizer, family(name)
    model.train()
    rollouts = Rollouts(model, tokenizer, GREEDY, seed=5)
    state, modes, config = torch.get_rng_state(), [m.training for m in model.modules()], model.generation_config
    made = rollouts(batch, 40)
    assert torch.equal(torch.get_rng_state(), state) and [m.training for m in model.modules()] == modes
    assert model.generation_config is config
    assert rollouts.pads and made["sampled"].any(1).all() and COUNTS not in made
    model.eval()
    for row, reply in enumerate(rollouts.replies):
        prompt = torch.tensor([reply.prompt])
        inputs = {"input_ids": prompt, "attention_mask": torch.ones_like(prompt), **alone[row]}
        if "mm_token_type_ids" in batch:
            inputs["mm_token_type_ids"] = batch["mm_token_type_ids"][row][: len(reply.prompt)][None]
        barred = [i for i, t in tokenizer.added_tokens_decoder.items() if t.special and i not in rollouts.stops]
        barred += range(len(tokenizer), model.get_input_embeddings().num_embeddings)
        said = model.generate(
            **inputs,
            do_sample=False,
            max_new_tokens=6,
            suppress_tokens=barred,
            eos_token_id=rollouts.stops,
            pad_token_id=0,
        )
        assert said[0, len(reply.prompt) :].tolist() == reply.tokens
        whole, start = [*reply.prompt, *reply.tokens], len(reply.prompt)
        assert made["input_ids"][row].tolist()[: len(whole)] == whole
        assert made["attention_mask"][row].sum() == len(whole)
        kept = batch["labels"][row].tolist()[:start]  # of the answers before
        assert made["labels"][row].tolist()[: len(whole)] == [*kept, *reply.tokens]
        assert (made["labels"][row, len(whole) :] == -100).all()
        assert made["sampled"][row].nonzero().squeeze(1).tolist() == list(range(start, len(whole)))
        assert batch["input_ids"][row].tolist()[: len(reply.prompt)] == reply.prompt
        assert [x for x in batch["labels"][row].tolist()[start:] if x != -100] == reply.given, "not the last answer"
    if name == "builtin":
        assert ((made["labels"] != -100) & ~made["sampled"]).any(1).all(), "no answer stands before"
        rollouts.pads = False  # prompts of one length together
        again = rollouts(batch, 40)
        assert all(torch.equal(again[key], made[key]) for key in made)


def test_prompts_are_not_padded_where_that_changes_replies(models):
    model, tokenizer, (batch, _) = load_model(models / "teacher"), build_tokenizer(), scenes()
    right = Rollouts(model, tokenizer, GREEDY, seed=5)
    wanted, generate = right(batch, 40), model.generate
    model.generate = lambda **given: generate(**given | {"attention_mask": torch.ones_like(given["input_ids"])})
    rollouts = Rollouts(model, tokenizer, GREEDY, seed=5)
    made = rollouts(batch, 40)
    assert (right.pads, rollouts.pads) == (True, False)
    assert all(torch.equal(made[key], wanted[key]) for key in wanted)


def test_a_token_is_drawn_where_its_share_of_the_probability_ends():
    """By the definition, and never a token that is barred; so often as its probability says."""
    scores = torch.randn(1, 9, generator=torch.Generator().manual_seed(0)) * 2
    allowed, count = [0, 2, 3, 5, 6, 8], 4000
    draws = (torch.arange(count, dtype=torch.float64)[:, None] + 0.5) / count
    for temperature, top_p in ((1.0, 1.0), (0.7, 1.0), (1.3, 0.6)):
        config = OnPolicyConfig(temperature=temperature, top_p=top_p)
        made = Drawing(draws, torch.tensor(allowed), config)(torch.zeros(count, 1), scores.expand(count, -1))
        drawn = made.argmax(-1)
        assert ((made == 0).sum(1) == 1).all() and (made.amax(1) == 0).all()
        p = np.zeros(9)
        p[allowed] = np.exp(scores[0, allowed].double().numpy() / temperature)
        p /= p.sum()
        order = np.argsort(-p)
        kept = order[: int((np.cumsum(p[order]) < top_p).sum()) + 1] if top_p < 1 else order
        p = np.where(np.isin(np.arange(9), kept), p, 0)
        p /= p.sum()
        found = np.bincount(drawn.numpy(), minlength=9) / count
        np.testing.assert_allclose(found, p, atol=1.5 / count)
    assert (
        Drawing(draws, torch.tensor(allowed), GREEDY)(torch.zeros(count, 1), scores.expand(count, -1))
        .argmax(-1)
        .tolist()
        == [allowed[int(scores[0, allowed].argmax())]] * count
    )


def test_the_last_answer_is_generated_unless_an_image_follows(models):
    """Images stay."""
    model, tokenizer = load_model(models / "teacher"), build_tokenizer()
    first, second = "USER: is it ? ASSISTANT: yes </s> ", "USER: <image> is it ? ASSISTANT: no </s>"
    texts = (
        first + second.replace("<image>", "<image> " * 36),
        second.replace("<image> ", "<image> " * 36) + " " + first,
    )
    rows = [[tokenizer.get_vocab().get(word, 5) for word in text.split()] for text in texts]
    ids = torch.tensor(rows)
    labels = ids.clone()
    ends = [[i for i, token in enumerate(row) if token == STOP] for row in rows]
    for row, stops in enumerate(ends):
        kept = [i for stop in stops for i in (stop - 1, stop)]
        labels[row, [i for i in range(len(rows[row])) if i not in kept]] = -100
    pixels = torch.randn(2, *BuiltinDataset(BuiltinTask(), size=1, seed=0)[0]["pixel_values"].shape)
    batch = {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
    rollouts = Rollouts(model, tokenizer, GREEDY, seed=0)
    rollouts(batch | {COUNTS: {"pixel_values": [1, 1]}}, 0)
    assert [len(reply.prompt) for reply in rollouts.replies] == [stops[-1] - 1 for stops in ends]
    late = batch | {"labels": labels.clone()}
    late["labels"][0, ends[0][0] + 1 :] = -100  # its only answer comes before the image
    made = rollouts(late | {COUNTS: {"pixel_values": [1, 1]}}, 0)
    assert [reply.number for reply in rollouts.replies] == [1]
    assert made["input_ids"][0].tolist()[: len(rows[0])] == rows[0] and not made["sampled"][0].any()


@pytest.mark.parametrize("share", [0.6, 1.0])
def test_losses_on_replies_are_those_of_whole_matrices(models, tmp_path, share):
    """KD and VAT act on all samples, AR on given answers alone, and so do their gradients (fp64)."""
    built = build_models(make_recipe(tmp_path / "run", models))
    student, teacher = built.student, built.teacher
    collate_three = CountingCollator(lambda items: batch_of_three(seed=12))
    batch = collate_three([{"pixel_values": None}, {}, {"pixel_values": None}])
    made = Rollouts(student, built.tokenizer, OnPolicyConfig(on_policy=share, max_new_tokens=8), seed=1)(batch, 3)
    sampled = made["sampled"]
    assert sampled.any() and sampled.any(1).all() == (share == 1)
    assert ((made["labels"] != -100) & ~sampled)[sampled.any(1)].any(), "none keeps an answer that was given"
    terms = OBJECTIVES["opd"].terms(kd=KDConfig(weight=0.5), vat=VAT(VATConfig(layers="all", rows="answer"), 2, 4))
    ours = DistillationModel(student, terms, teacher=teacher)(**made)
    with pytest.raises(ValueError, match="sampled must say of each token"):
        DistillationModel(student, terms, teacher=teacher)(**made | {"sampled": sampled.any(1)})
    whole = {key: value for key, value in made.items() if key != "sampled"}
    given = whole | {"labels": whole["labels"].masked_fill(sampled, -100)}
    exact_student, exact_teacher = eager(student, torch.float64), eager(teacher, torch.float64)
    exact = oracle(exact_student, exact_teacher, whole, torch.float64)
    exact["ar"] = oracle(exact_student, exact_teacher, given, torch.float64)["ar"]
    losses = [found["ar"] + 0.5 * found["kd"] + found["vat"] for found in (ours, exact)]
    for loss in losses:
        loss.backward()
    for name in ("ar", "kd", "vat"):
        assert ours[name].item() == pytest.approx(exact[name].item(), rel=1e-5, abs=1e-9)
    for name in ("model.multi_modal_projector.map.weight", "lm_head.weight"):
        found, expected = (model.get_parameter(name).grad for model in (student, exact_student))
        assert (found - expected).abs().max() <= 1e-4 * expected.abs().max() > 0


@pytest.mark.parametrize(
    ("beta", "kd"),
    [
        (0.0, {"divergence": "forward_kl"}),
        (0.2, {"divergence": "jsd", "beta": 0.2}),
        (0.9, {"divergence": "jsd", "beta": 0.9}),
        (1.0, {"divergence": "reverse_kl"}),
    ],
)
def test_beta_means_what_gkd_and_trl_mean_by_it(beta, kd):
    """`generalized_jsd_loss` is TRL's, by its definition in tests/test_nn.py."""
    draw = torch.Generator().manual_seed(1)
    hidden, head, theirs, their_head = (torch.randn(n, 16, generator=draw) for n in (12, 30, 12, 30))
    labels = torch.arange(12)
    wanted = generalized_jsd_loss(hidden @ head.T, theirs @ their_head.T, labels, beta, reduction="sum")
    found = VocabularyLosses(KDConfig(**kd))(hidden, _linear(head), theirs, _linear(their_head), labels)[1]
    assert found.item() == pytest.approx(wanted.item(), rel=1e-5)


def _linear(weight):
    layer = torch.nn.Linear(*weight.shape[::-1], bias=False)
    layer.weight.data = weight
    return layer


def own(output, models, **changes):
    """A run of the stage opd, whose samples and seeds are those of dft."""
    values = recipe_values(output, models, stages=["opd"])
    values["stage"]["opd"] = dict(values["stage"]["dft"]) | {"generation": {"on_policy": 0.75, "max_new_tokens": 6}}
    for key, value in changes.items():
        place = values["stage"]["opd"] if key in ("generation", "micro_batch_size") else values
        place[key] = value
    return recipe_from_dict(values)


@pytest.fixture(scope="module")
def whole(models, tmp_path_factory):
    output = tmp_path_factory.mktemp("opd") / "run"
    return output, run(own(output, models))


def replies(output):
    return [json.loads(line) for line in (output / "replies.jsonl").read_text().splitlines() if line.endswith("}")]


def lengths(output):
    return [(line["reply_tokens"], line["replies_ended"]) for line in metrics(output)]


def test_a_share_of_nothing_is_dft_bit_for_bit(models, tmp_path):
    nothing = run(own(tmp_path / "opd", models, generation={"on_policy": 0.0}))
    plain = run(make_recipe(tmp_path / "dft", models, stages=["dft"]))
    assert same(weights(nothing), weights(plain))
    assert not (tmp_path / "opd" / "replies.jsonl").exists()


def test_a_run_trains_on_replies_and_shows_some(whole, models):
    output, _ = whole
    lines = replies(output)
    assert {line["step"] for line in lines} == {1, 2, 3} and all(0 <= line["sample"] < 12 for line in lines)
    assert all(line["stage"] == "opd" and line["reference"] and line["prompt"].startswith("USER:") for line in lines)
    assert all(line["tokens"] <= 6 and line["ended"] == (line["tokens"] < 6 or line["ended"]) for line in lines)
    assert "<image>" not in "".join(line["prompt"] + line["reply"] for line in lines)
    assert all(line[name] > 0 for line in metrics(output) for name in ("kd", "vat"))
    (output / "replies.jsonl").open("a").write('{"stage": "opd", "st')  # cut off while it was written
    shown, last = page([read_run(output)]), [line for line in lines if line["step"] == 3]
    assert last and all(f'<td class="words">{escape(line["reply"])}</td>' in shown for line in last)


def test_a_killed_run_goes_on_to_the_same_bits(whole, models, tmp_path):
    output, final = whole
    cut = own(tmp_path / "cut", models, save_steps=2)
    with pytest.raises(KeyboardInterrupt):
        run(cut, callbacks=[Crash(3)])  # what was shown after the checkpoint at step 2 is written again
    torch.manual_seed(99)
    assert same(weights(run(cut, resume=True)), weights(final))
    assert replies(tmp_path / "cut") == replies(output)
    assert lengths(tmp_path / "cut") == lengths(output)
    shown = [[line[key] for line in replies(output) if line["step"] == 1] for key in ("tokens", "ended")]
    assert lengths(output)[0] == tuple(sum(values) / len(values) for values in shown)


def test_processes_and_accumulation_draw_the_same_replies(whole, models, ranks, tmp_path):
    output, _ = whole
    wanted = {line["sample"]: line["reply"] for line in replies(output) if line["step"] == 1}
    parts = own(tmp_path / "parts", models, micro_batch_size=1)
    several = own(tmp_path / "several", models, micro_batch_size=1, processes=2)
    for recipe, start in ((parts, lambda recipe: run(recipe)), (several, lambda recipe: ranks.call(run, recipe)[0])):
        folder = start(recipe)
        shown = {line["sample"]: line["reply"] for line in replies(folder.parent) if line["step"] == 1}
        assert shown and shown.items() <= wanted.items()
        assert metrics(folder.parent)[0]["loss"] == pytest.approx(metrics(output)[0]["loss"], rel=1e-4)


def test_the_trainer_in_python_generates_too(tmp_path):
    """Under bf16, with gradient checkpointing and accumulated batches; evaluation is of given answers."""
    name = "llava_llama"
    student, teacher = build_pair(name)
    args = cdistill.CompoDistillConfig(
        str(tmp_path),
        **QUIET,
        bf16=True,
        gradient_checkpointing=True,
        gradient_accumulation_steps=2,
        per_device_train_batch_size=2,
        max_steps=2,
        learning_rate=0.05,
        on_policy=0.8,
        temperature=0.9,
        max_new_tokens=5,
    )
    trainer = cdistill.CompoDistillTrainer(
        student,
        teacher,
        args,
        functools.partial(counted, name),
        draw_samples(name, 3) + draw_samples(name, 4),
        draw_samples(name, 5),
        processor(name),
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.rollouts.replies and student.training
    assert trainer.evaluate()["eval_loss"] != before
    with pytest.raises(ValueError, match="on_policy must be at least 0 and at most 1, got 2"):
        cdistill.CompoDistillConfig(str(tmp_path), use_cpu=True, on_policy=2)
    with pytest.raises(ValueError, match="needs batches that say whose pixel_values is whose"):
        trainer.rollouts(collate(name, draw_samples(name, 3))[0], 0)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"stage__sft__generation": {}, "stages": ["sft"]},
            "stage.sft.generation must be null for objective sft, where nothing",
        ),
        (
            {"stage__dft__generation": {"on_policy": 1.5}},
            "stage.dft.generation.on_policy must be at most 1, got 1.5",
        ),
        ({"stage__dft__generation": {"max_new_tokens": 0}}, "stage.dft.generation.max_new_tokens must be at least 1"),
        ({"stage__dft__generation": {}, "packing": True}, "packing must be false for stage 'dft', whose replies"),
        (
            {"stage__dft__generation": {}, "deepspeed": 3},
            "deepspeed must not be 3 for stage 'dft', whose student generates",
        ),
        (
            {"stage__dft__generation": {}, "teacher_memory": {"cache": "x"}},
            "teacher_memory.cache must be null for stage 'dft': no teacher",
        ),
    ],
)
def test_what_cannot_be_is_refused_by_its_key(models, tmp_path, changes, said):
    with pytest.raises(ValueError) as refused:
        make_recipe(tmp_path / "run", models, **changes)
    assert any(said in line for line in str(refused.value).splitlines()), refused.value


def test_a_plan_counts_the_cache(models, tmp_path):
    recipe = own(tmp_path / "run", models, generation={"on_policy": 0.5})
    phases = plan(recipe, gpus=1, precision="fp32", device="cpu", length=60).stages[0].phases
    student = build_models(recipe).student
    ids = torch.full((4, 59), 7)
    made = student.generate(ids, max_new_tokens=2, min_new_tokens=2, return_dict_in_generate=True).past_key_values
    held = sum(4 * (layer.keys.numel() + layer.values.numel()) for layer in made.layers)
    layers = len(made.layers)
    assert phases["generation"]["cache of replies"] == held * (layers + 1) // layers
    given = plan(
        make_recipe(tmp_path / "dft", models, stages=["dft"]), gpus=1, precision="fp32", device="cpu", length=60
    )
    assert "generation" not in given.stages[0].phases


def test_records_that_are_kept_keep_their_names():
    """A stage without replies is told from others as it was before there were any; one with them is another."""
    kept = Path(__file__).parent.parent / "benchmarks/results/reproduce"
    table, pair = load_table("onpolicy"), load_pair("demo-compodistill")
    rates = tuned_rates(pair, QUESTIONS, read_records(kept))
    runs = plan_runs("onpolicy", table, pair, seeds=1, n=QUESTIONS, rates=rates)
    assert len({one.hash for one in runs}) == len(table.rows)
    assert (kept / f"{runs[0].hash}.json").is_file()


def test_the_command_trains_on_replies_to_questions_from_files(models, files, tmp_path, capsys):  # noqa: F811
    """LoRA, held-out losses, lengths that are grouped; a template that ends no answer is refused before anything is made."""
    changes = {
        "stage__dft__generation": {"max_new_tokens": 5},
        "student__lora": {"r": 2, "alpha": 4},
        "group_by": "length",
    }
    recipe = recipe_of(tmp_path / "run", models, files, stage__dft__validation={"samples": 4, "every": 3}, **changes)
    (tmp_path / "mine.yaml").write_text(strict_yaml.dump(recipe_to_dict(recipe)))
    assert main(["train", str(tmp_path / "mine.yaml")]) == 0
    assert {line["step"] for line in replies(tmp_path / "run")} == {line["step"] for line in metrics(tmp_path / "run")}
    capsys.readouterr()
    other = ["stage.dft.data.template=plain", f"output={tmp_path / 'other'}"]
    assert main(["train", str(tmp_path / "mine.yaml"), *other]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "stage.dft.data.template must end answers by a token, where replies are generated" in line
    assert not (tmp_path / "other").exists()


def test_a_teacher_that_reads_otherwise_is_refused(models, tmp_path):
    (stage,) = resolve(own(tmp_path / "run", models)).stages
    built = build_models(stage.recipe)
    data = open_data(stage, built)
    assert rollouts_of(stage, built, data) is not None
    built.teacher_reader = object()
    with pytest.raises(ValueError, match=r"stage.opd.generation needs a teacher that reads what the student reads"):
        rollouts_of(stage, built, data)
    batch = scenes()[0]
    with pytest.raises(ValueError, match=r"on_policy must be 0 for a teacher with an encoding of its own"):
        Rollouts(built.student, built.tokenizer, GREEDY, seed=0)(batch | {"teacher_input_ids": batch["input_ids"]}, 0)
    packed = {name: batch[name] for name in ("input_ids", "labels")} | {"position_ids": batch["input_ids"]}
    with pytest.raises(ValueError, match=r"on_policy needs padded batches, and this one is packed"):
        Rollouts(built.student, built.tokenizer, GREEDY, seed=0)(packed, 0)


def test_partitioned_weights_are_refused(models):
    model = load_model(models / "teacher")
    next(model.parameters()).ds_id = 0  # as ZeRO-3 marks them
    with pytest.raises(
        ValueError, match=r"on_policy must be 0 for a student whose weights are partitioned \(ZeRO-3, FSDP\)"
    ):
        Rollouts(model, build_tokenizer(), GREEDY, seed=0)(scenes()[0], 0)
