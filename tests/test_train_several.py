"""Several teachers with weights per kind of sample: against full matrices in float64, against one teacher, and in runs."""

import copy
import json
import re
from pathlib import Path

import pytest
import torch
from builtin_models import make_recipe, save_teacher
from family_models import build, build_pair, collate, draw, draw_samples
from test_train_losses import batch_of_three, eager, oracle
from test_train_stages import Crash, assert_near, metrics, refused, same, weights

import cdistill
from cdistill.choices import KDConfig
from cdistill.errors import InputError
from cdistill.models.pair import shares_encoder
from cdistill.plan.blueprint import check_models
from cdistill.train import run
from cdistill.train.build import build_models
from cdistill.train.data import open_stage
from cdistill.train.kinds import WEIGHTS, products, weights_of_kinds
from cdistill.train.model import DistillationModel
from cdistill.train.objectives import OBJECTIVES
from cdistill.train.resolve import resolve
from cdistill.train.teacher import Teacher
from cdistill.train.teacher_source import InMemory, Several
from cdistill.vat import VAT, VATConfig

SUMS = {"ar": 1.0, "kd": 0.7, "vat": 3.0}
MIXED = [[1.0, 0.0], [0.5, 0.25], [0.5, 2.0]]
WINDOWS = {4: ((0, 1, 2), (1, 2, 3)), 3: ((0, 1), (1, 2))}


@pytest.fixture(scope="module")
def second(tmp_path_factory):
    """Another teacher, of another depth, width and encoder."""
    folder = tmp_path_factory.mktemp("second")
    return save_teacher(folder / "teacher", seed=2, hidden_size=48, num_hidden_layers=3, num_attention_heads=2)


def recipe_of(output, models, second, a, b, **changes):
    """A recipe whose student fetches the adapter of the first of two teachers, of weights ``a`` and ``b``."""
    teachers = {"a": {"model": str(models / "teacher"), "weights": a}, "b": {"model": str(second), "weights": b}}
    given = {"teacher": None, "teachers": teachers, "student__taf_teacher": "a", "stages": ["dft"]}
    return make_recipe(output, models, **(given | changes))


@pytest.fixture
def built(models, second, tmp_path):
    """A student and two teachers."""
    return build_models(recipe_of(tmp_path / "run", models, second, {"default": 1}, {"default": 1}))


def losses_by(student, teachers, **vat):
    """The losses of a student and teachers by name; of one without weights where it is not in a mapping."""
    config, kd = VATConfig(layers="all", **{"rows": "answer"} | vat), KDConfig(weight=SUMS["kd"])
    if not isinstance(teachers, dict):
        terms = OBJECTIVES["dft"].terms(kd=kd, vat=VAT(config, 2, 4))
        return DistillationModel(student, terms, teacher=teachers)
    sources = {
        name: InMemory(Teacher(model, shares_vision=shares_encoder(student, model))) for name, model in teachers.items()
    }
    vats = tuple(VAT(config, 2, model.config.text_config.num_hidden_layers) for model in teachers.values())
    terms = OBJECTIVES["dft"].terms(kd=kd, vats=vats, teachers=tuple(sources))
    return DistillationModel(student, terms, teacher=Several(sources, next(iter(sources))))


def gradients(student, losses):
    """Of the weighted sum, for parameters that have one."""
    student.zero_grad()
    sum(weight * losses[name] for name, weight in SUMS.items()).backward()
    return {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}


def one_by_one(batch):
    """The samples of `batch_of_three` as batches of their own."""
    for i, image in enumerate((0, None, 1)):
        alone = {name: batch[name][i : i + 1] for name in ("input_ids", "labels", "attention_mask")}
        yield alone if image is None else alone | {"pixel_values": batch["pixel_values"][image : image + 1]}


@pytest.mark.parametrize("encoder", ["other", "common"])
def test_losses_and_gradients_are_weighted_sums_of_full_matrices(built, encoder):
    """The second teacher looks at the images itself, or has the encoder of the first and an adapter of its own."""
    student, batch = built.student, batch_of_three(seed=21)
    if encoder == "common":
        built.teachers["b"] = copy.deepcopy(built.teacher)
        with torch.no_grad():
            for parameter in built.teachers["b"].model.multi_modal_projector.parameters():
                parameter.mul_(1.5)
    student.requires_grad_(True).model.vision_tower.requires_grad_(False)
    student.model.multi_modal_projector.teacher.requires_grad_(False)
    found = losses_by(student, built.teachers)(**batch, **{WEIGHTS: torch.tensor(MIXED)})
    ours = gradients(student, found)
    truth, teachers = eager(student, torch.float64), built.teachers.values()
    exact = dict.fromkeys(SUMS, 0.0)
    parts = {"kd": [0.0, 0.0], "vat": [0.0, 0.0]}
    for i, alone in enumerate(one_by_one(batch)):
        for t, teacher in enumerate(teachers):
            windows = WINDOWS[teacher.config.text_config.num_hidden_layers]
            sums = oracle(truth, eager(teacher, torch.float64), alone, torch.float64, windows)
            exact["ar"] = exact["ar"] + sums["ar"] / 2
            for name, of in parts.items():
                of[t] = of[t] + MIXED[i][t] * sums[name]
    exact |= {name: sum(of) for name, of in parts.items()}
    for name, value in exact.items():
        assert found[name].item() == pytest.approx(value.item(), rel=2e-5), name
    for name, of in parts.items():
        assert found[f"{name}_teachers"].tolist() == pytest.approx([x.item() for x in of], rel=2e-5)
    assert found["vat_layers"].mean().item() == pytest.approx(exact["vat"].item(), rel=2e-5)
    expected = gradients(truth, exact)
    assert ours.keys() == expected.keys()
    largest = max(g.abs().max() for g in expected.values())
    for name, gradient in ours.items():
        assert (gradient - expected[name]).abs().max() <= 1e-4 * expected[name].abs().max() + 1e-6 * largest, name


@pytest.mark.parametrize("vat", [{}, {"target": "recomputed"}, {"rows": "text", "loss": "kl"}], ids=str)
def test_one_teacher_with_weight_1_is_the_plain_way_bit_for_bit(built, vat):
    student, batch = built.student, batch_of_three(seed=22)
    plain = losses_by(student, built.teacher, **vat)(**batch)
    wanted = gradients(student, plain)
    several = losses_by(student, {"a": built.teacher}, **vat)(**batch, **{WEIGHTS: torch.ones(3, 1)})
    found = gradients(student, several)
    assert all(torch.equal(plain[name], several[name]) for name in plain)
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_two_equal_teachers_by_halves_are_one(built):
    student, batch = built.student, batch_of_three(seed=23)
    plain = losses_by(student, built.teacher)(**batch)
    wanted = gradients(student, plain)
    same = {"a": built.teacher, "b": copy.deepcopy(built.teacher)}
    halves = losses_by(student, same)(**batch, **{WEIGHTS: torch.full((3, 2), 0.5)})
    found = gradients(student, halves)
    for name in SUMS:
        torch.testing.assert_close(halves[name], plain[name], rtol=1e-6, atol=1e-6)
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5 * gradient.abs().max().item())
    torch.testing.assert_close(halves["kd_teachers"], plain["kd"].detach().expand(2) / 2)


def test_a_teacher_that_no_sample_learns_of_is_not_run(built):
    student, batch = built.student, batch_of_three(seed=24)
    model = losses_by(student, built.teachers)
    model.source.sources["b"]._run = None  # whose call would raise
    ones = torch.tensor([[1.0, 0.0]] * 3)
    found = model(**batch, **{WEIGHTS: ones})
    plain = losses_by(student, built.teacher)(**batch)
    assert all(torch.equal(found[name], plain[name]) for name in SUMS)
    assert found["kd_teachers"][1] == found["vat_teachers"][1] == 0
    with pytest.raises(TypeError):
        model(**batch, **{WEIGHTS: ones.flip(1)})
    with pytest.raises(InputError, match=f"{WEIGHTS}.*must be"):
        model(**batch)


KINDS = {"stage__dft__data": {"turns": 2, "one_kind": True, "subtypes": ["colour", "count"]}, "stage__dft__samples": 24}


@pytest.fixture(scope="module")
def mixed(models, second, tmp_path_factory):
    """A run of two teachers, each of which half of the samples learn of: its output and result."""
    recipe = recipe_of(tmp_path_factory.mktemp("mixed") / "run", models, second, *HALVES, **KINDS)
    return Path(recipe.output), run(recipe)


HALVES = {"colour": 1, "count": 0}, {"colour": 0, "default": 0.5}


def test_a_run_tells_what_each_teacher_gives_and_goes_on_with_the_same_bits(models, second, mixed, tmp_path):
    output, final = mixed
    for entry in metrics(output):
        for name in ("kd", "vat"):
            of = [entry[f"{name}/{teacher}"] for teacher in "ab"]
            assert sum(of) == pytest.approx(entry[name], rel=1e-5) and min(of) >= 0
    assert all(sum(entry[f"kd/{teacher}"] for entry in metrics(output)) > 0 for teacher in "ab")
    recipe = recipe_of(tmp_path / "cut", models, second, *HALVES, save_steps=2, **KINDS)
    with pytest.raises(KeyboardInterrupt):
        run(recipe, callbacks=[Crash(3)])
    assert same(weights(run(recipe, resume=True)), weights(final))


def test_replies_are_judged_by_the_teachers_of_their_samples(models, second, tmp_path):
    generation = {"on_policy": 0.7, "max_new_tokens": 4}
    recipe = recipe_of(tmp_path / "run", models, second, *HALVES, **KINDS, stage__dft__generation=generation)
    run(recipe)
    for entry in metrics(tmp_path / "run"):
        assert entry["kd/a"] > 0 and entry["kd/a"] + entry["kd/b"] == pytest.approx(entry["kd"], rel=1e-5)
        assert entry["reply_tokens"] > 0


@pytest.mark.parametrize("changes", [{"deepspeed": 3}, {"deepspeed": 2, "teacher_memory__zero": 3}], ids=str)
def test_two_processes_one_sample_at_a_time_train_the_same_student(models, second, mixed, ranks, tmp_path, changes):
    """On each process another teacher has nothing to do."""
    one = {**KINDS, "stage__dft__micro_batch_size": 1}
    ranks.call(run, recipe_of(tmp_path / "run", models, second, *HALVES, **one, **changes))
    for ours, theirs in zip(metrics(tmp_path / "run"), metrics(mixed[0]), strict=True):
        for name in ("loss", "ar", "kd", "vat", "kd/a", "kd/b", "vat/a", "vat/b"):
            assert ours[name] == pytest.approx(theirs[name], rel=3e-4), name
    assert_near(weights(tmp_path / "run" / "1-dft"), weights(mixed[1]))


def test_samples_of_a_mix_are_weighed_by_their_source_and_substitutes_by_theirs(models, second, tmp_path):
    def record(i, answer):
        return {"id": str(i), "conversations": [{"from": "human", "value": "what ?"}, {"from": "gpt", "value": answer}]}

    records = {
        "ocr": [record(i, "red") for i in range(6)] + [record(7, "")],
        "vqa": [record(i, "blue") for i in range(7)],
    }
    for name, of in records.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(of))
    (tmp_path / "mix.yaml").write_text("- {path: ocr.json}\n- {path: vqa.json, name: general}\n")
    data = {"path": str(tmp_path / "mix.yaml")}
    recipe = recipe_of(
        tmp_path / "run",
        models,
        second,
        {"ocr": 0.75, "default": 0},
        {"general": 2, "ocr": 0.25},
        stage__dft__data=data,
    )
    built = build_models(recipe)
    dataset, collate = open_stage(resolve(recipe).stages[0], built)
    batch = collate([dataset[i] for i in range(12)])
    red = built.tokenizer.convert_tokens_to_ids("red")
    wanted = [[0.75, 0.25] if red in labels else [0.0, 2.0] for labels in batch["labels"].tolist()]
    assert batch[WEIGHTS].tolist() == wanted and "bad_samples" in batch and len({*map(tuple, wanted)}) == 2


ONE = {"default": 1}


@pytest.mark.parametrize(
    ("a", "b", "changes", "message"),
    [
        (ONE, {"count": 1}, KINDS, r"teachers\.b\.weights has no weight for kind 'colour' of stage\.dft\.data"),
        (ONE, {"ocr": 1, "default": 1}, {}, r"teachers\.b\.weights names kind 'ocr', and .* are of mixed"),
        (
            ONE,
            {"default": 1, "mixed": 0},
            {},
            r"teachers\.b\.weights must be above 0 for a kind of the samples \(mixed\)",
        ),
        ({"colour": 1, "count": 0}, {"colour": 1, "count": 0}, KINDS, "none has a weight above 0 for kind 'count'"),
        (ONE, ONE, {"student__taf_teacher": "c"}, r"student\.taf_teacher must say whose .* \(a, b\), got 'c'"),
        (ONE, ONE, {"student__taf": False}, r"student\.taf_teacher must be null without student\.taf"),
        (ONE, ONE, {"teacher": "builtin:teacher"}, "teacher must be null with teachers"),
        (
            ONE,
            ONE,
            {"teachers": {}, "teacher": "builtin:teacher"},
            r"student\.taf_teacher must be null without teachers",
        ),
        (ONE, {"default": -1}, {}, r"teachers\.b\.weights\.default must be at least 0 and finite, got -1"),
        (ONE, {"default": float("nan")}, {}, r"teachers\.b\.weights\.default must be"),
        (ONE, {"default": 0}, {}, r"teachers\.b\.weights must have one above 0"),
        (ONE, {}, {}, r"teachers\.b\.weights must have one above 0"),
        (ONE, ONE, {"vat__engine": "auto"}, r"vat\.engine must be sdpa with teachers, got 'auto'"),
        (ONE, ONE, {"vat__matching": "adaptive"}, r"vat\.matching must be group or simple with teachers"),
        (ONE, ONE, {"vat__visual": "resample"}, r"vat\.visual must be equal with teachers"),
        (ONE, ONE, {"teacher_memory__cache": "x"}, r"teacher_memory\.cache must be null with teachers"),
        (ONE, ONE, {"sequence_parallel": 2, "deepspeed": 2}, "sequence_parallel must be 1 with teachers"),
        (ONE, ONE, {"stage__dft__objective": "hidden"}, r"stage\.dft\.objective must distil by kd and vat alone"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(models, second, tmp_path, a, b, changes, message):
    try:
        recipe = recipe_of(tmp_path / "run", models, second, a, b, **changes)
    except ValueError as error:
        assert re.search(message, str(error)) and "\n" not in str(error)
        return
    refused(recipe, tmp_path / "run", message)


def test_a_teacher_whose_heads_do_not_fit_is_named_by_its_key(models, tmp_path):
    """Heads of 12 numbers, which the ops do not take."""
    odd = save_teacher(tmp_path / "odd", seed=3, hidden_size=48, num_attention_heads=4, num_key_value_heads=4)
    recipe = recipe_of(tmp_path / "run", models, odd, {"default": 1}, {"default": 1})
    for check in (build_models, check_models):
        with pytest.raises(InputError, match=r"^teachers\.b\.model: attention can be compared of heads .* is 12, "):
            check(recipe)


def test_two_sources_of_one_name_are_no_kind():
    weights = {"a": {"train": 1, "default": 0.5}}
    assert weights_of_kinds(weights, ("train", "other"), "data") == {"train": (1.0,), "other": (0.5,)}
    with pytest.raises(InputError, match=r"a\.weights names 'train', and 2 sources of data are called so"):
        weights_of_kinds(weights, ("train", "train"), "data")


def test_the_head_is_counted_as_often_as_labels_go_through_it():
    assert products({}) == products({"a": ONE}) == 1
    assert products({"a": {"x": 1, "default": 0}, "b": {"x": 0, "default": 1}}) == 2
    assert products({"a": {"default": 0.5}, "b": {"default": 0.5}}) == 3


@pytest.mark.parametrize("name", ["llava_next", "internvl", "qwen2_5_vl", "qwen3_vl"])
def test_distill_takes_several_teachers_of_any_family(name):
    """Against one teacher and one sample at a time; padded on the left."""
    student, teacher = build_pair(name)
    teachers = {"a": teacher, "b": build(name, 2, 4, 64, 4, 4)}
    samples, weights = draw_samples(name, 5), torch.tensor([[1.0, 0.5], [0.0, 2.0], [1.0, 0.0], [0.25, 1.0]])
    batch = collate(name, samples, "left")[0]
    several = cdistill.distill(teachers, student)
    found = several(batch | {WEIGHTS: weights})
    wanted = {"kd": torch.zeros(2), "vat": torch.zeros(2)}
    for t, one in enumerate(teachers.values()):
        plain = cdistill.distill(one, student)
        for sample, share in zip(samples, weights[:, t], strict=True):
            alone = collate(name, [sample])[0]
            losses, counts = plain(alone), plain.count(alone)
            for key, count in zip(wanted, counts, strict=True):
                wanted[key][t] += share * losses[key].detach() * count
    for (key, of), count in zip(wanted.items(), several.count(batch), strict=True):
        torch.testing.assert_close(found[key].detach(), of.sum() / count, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(found[f"{key}_teachers"], of / count, rtol=1e-4, atol=1e-6)
    found["loss"].backward()
    assert any(p.grad is not None and p.grad.any() for p in student.parameters())


def test_a_trainer_tells_the_losses_of_its_teachers(tmp_path):
    student, teacher = build_pair("llava_llama")

    def collated(samples):
        return collate("llava_llama", samples)[0] | {WEIGHTS: torch.tensor([[1.0, 0.5]] * len(samples))}

    args = cdistill.CompoDistillConfig(
        str(tmp_path), max_steps=1, logging_steps=1, report_to="none", use_cpu=True, per_device_train_batch_size=2
    )
    teachers, samples = {"a": teacher, "b": build("llava_llama", 2, 4)}, draw_samples("llava_llama", 5)
    given = {"train_dataset": samples, "eval_dataset": samples, "data_collator": collated}
    trainer = cdistill.CompoDistillTrainer(student, teachers, args, **given)
    trainer.train()
    entry = trainer.state.log_history[0]
    assert entry["kd/a"] + entry["kd/b"] == pytest.approx(entry["kd"], rel=1e-4) and entry["kd/b"] > 0
    assert trainer.evaluate()["eval_vat"] > 0


def test_teachers_that_distill_refuses():
    student, teacher = build_pair("llava_llama")
    for given, message in (
        ({}, "mapping of names"),
        ({"a b": teacher}, "mapping of names"),
        ({"a": build("llava_llama", 1, 2)}, "layers"),
    ):
        with pytest.raises(InputError, match=message):
            cdistill.distill(given, student, vat=VATConfig(layers="all"))
    batch = draw("llava_llama", seed=5)
    for wrong in (-1.0, float("nan"), float("inf")):
        with pytest.raises(InputError, match=f"{WEIGHTS} must be at least 0 and finite"):
            cdistill.distill({"a": teacher}, student)(batch | {WEIGHTS: torch.tensor([[1.0], [1.0], [1.0], [wrong]])})
    vat = VAT(VATConfig(), 3, 5)
    with pytest.raises(InputError, match="vat must be a VATConfig with several teachers"):
        cdistill.distill({"a": teacher, "b": build("llava_llama", 2, 5)}, student, vat=vat)
