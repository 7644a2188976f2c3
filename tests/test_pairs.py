"""Teacher and student that encode samples differently: what each reads, and losses beside plain passes of both in float64."""

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from builtin_models import VISION, make_recipe, save_base, save_teacher, text_config
from data_files import turns
from PIL import Image
from transformers import SiglipVisionConfig

import cdistill
from cdistill.builtin.dataset import build_tokenizer
from cdistill.data.batches import PaddingCollator
from cdistill.data.conversations import Encoder
from cdistill.data.pairs import PairCollator, PairEncoder, split_sides
from cdistill.data.samples import IMAGE_TOKEN, BadSampleError, Mark, Message
from cdistill.models.llava import compose
from cdistill.models.processor import build_processor
from cdistill.plan.memory import plan
from cdistill.train import run
from cdistill.train.build import build_models
from cdistill.train.data import stage_dataset
from cdistill.train.terms import term_named


def model(patch, seed, layers=2, width=32):
    """A random LLaVA that sees the 48 x 48 pixels of a scene as patches of so many a side."""
    torch.manual_seed(seed)
    vision = SiglipVisionConfig(**(VISION | {"patch_size": patch}))
    text = text_config(num_hidden_layers=layers, hidden_size=width)
    return compose(vision, text, image_token_id=build_tokenizer().convert_tokens_to_ids(IMAGE_TOKEN)).eval()


@pytest.fixture(scope="module")
def models():
    """A student of 9 visual tokens, a teacher of 36."""
    return model(16, 0), model(8, 1, 4, 64)


def encoder(of, max_length=None):
    return Encoder(build_processor(of.config, build_tokenizer(), "test"), max_length=max_length)


@pytest.fixture(scope="module")
def pair(models):
    return PairEncoder(*map(encoder, models))


def conversation(*turns, image=True):
    messages = []
    for i, (question, answer) in enumerate(turns):
        messages.append(Message("user", (*((Mark.IMAGE,) if image and not i else ()), question)))
        messages.append(Message("assistant", (answer,)))
    return messages


PICTURE = Image.effect_noise((48, 48), 60).convert("RGB")
LONG = conversation(("red ring", "red ring r1 c1"), ("blue", "left of blue cross"), ("green", "above"))
COLLATE = PairCollator(*[PaddingCollator(build_tokenizer().pad_token_id)] * 2)


def answers(side):
    return side.labels[side.labels != -100].tolist()


def test_each_side_is_what_its_own_encoder_makes(models, pair):
    made = pair(LONG, [PICTURE])
    for side, of in ((made.student, models[0]), (made.teacher, models[1])):
        alone = encoder(of)(LONG, [PICTURE])
        assert torch.equal(side.input_ids, alone.input_ids)
        assert torch.equal(side.images["pixel_values"], alone.images["pixel_values"])
    assert len(made.teacher.input_ids) - len(made.student.input_ids) == 36 - 9
    assert answers(made.teacher) == answers(made.student)


@pytest.mark.parametrize("length", [44, 52, 55, 61, 70])
def test_a_sample_ends_where_the_longer_of_both_is_full(models, length):
    sides = [encoder(of, length) for of in models]
    made = PairEncoder(*(encoder(of, length) for of in models))(LONG, [PICTURE])
    alone = [side(LONG, [PICTURE]) for side in sides]
    fewest = min(map(answers, alone), key=len)
    assert answers(made.student) == answers(made.teacher) == fewest
    assert len(made.teacher.input_ids) <= length
    assert made.student.labels[-1] != -100 or len(fewest) == len(answers(encoder(models[0])(LONG, [PICTURE])))


def test_a_sample_too_long_for_one_of_both_is_bad(models):
    encode = PairEncoder(*(encoder(of, 40) for of in models))
    with pytest.raises(BadSampleError, match="too long"):
        encode(LONG, [PICTURE])


def test_answers_of_other_tokens_are_refused_at_once(models):
    other = build_tokenizer()
    other.add_tokens(["Yes."])
    with pytest.raises(ValueError, match="one tokenizer and one template"):
        PairEncoder(encoder(models[0]), Encoder(build_processor(models[1].config, other, "test")))


def padded_left(batch):
    """Every row with its padding in front."""
    result = dict(batch)
    for prefix in ("", "teacher_"):
        gaps = (batch[f"{prefix}attention_mask"] == 0).sum(1).tolist()
        for name in ("input_ids", "labels", "attention_mask"):
            rows = zip(batch[prefix + name], gaps, strict=True)
            result[prefix + name] = torch.stack([row.roll(gap) for row, gap in rows])
    return result


def batch_of(pair):
    samples = [
        (LONG, [PICTURE]),
        (conversation(("red", "blue ring"), image=False), []),
        (LONG[:2], [PICTURE.rotate(90)]),
    ]
    return COLLATE([pair(*sample) for sample in samples])


@pytest.mark.parametrize("side", ["right", "left"])
def test_losses_and_gradients_are_those_of_two_plain_passes(models, pair, side):
    student, teacher = map(copy.deepcopy, models)
    batch = batch_of(pair)
    batch = padded_left(batch) if side == "left" else batch
    losses = cdistill.distill(teacher, student, vat_weight=0)(batch)
    losses["loss"].backward()

    exact = [copy.deepcopy(of).double() for of in models]
    log_probabilities = []
    for of, given in zip(exact, split_sides(batch), strict=True):
        labels = given.pop("labels")
        given["pixel_values"] = given["pixel_values"].double()
        logits = of(**given).logits
        log_probabilities.append(logits[:, :-1][labels[:, 1:] != -100].log_softmax(-1))
    ours, theirs = log_probabilities[0], log_probabilities[1].detach()
    targets = batch["labels"][batch["labels"] != -100]
    ar, kd = F.nll_loss(ours, targets), (theirs.exp() * (theirs - ours)).sum(-1).mean()
    (ar + kd).backward()
    assert losses["ar"].item() == pytest.approx(ar.item(), rel=1e-5)
    assert losses["kd"].item() == pytest.approx(kd.item(), rel=1e-5)
    found = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
    for name, p in exact[0].named_parameters():
        if name in found:
            torch.testing.assert_close(found[name].double(), p.grad, rtol=1e-3, atol=1e-5)
    assert len(found) > 10


def test_batches_that_lack_a_side_or_disagree(models, pair):
    student, teacher = map(copy.deepcopy, models)
    distillation = cdistill.distill(teacher, student, vat_weight=0)
    batch = batch_of(pair)
    with pytest.raises(ValueError, match="teacher_input_ids, teacher_labels"):
        distillation(split_sides(batch)[0])
    moved = batch | {"teacher_labels": batch["teacher_labels"].roll(1, 0)}
    with pytest.raises(ValueError, match="teacher_labels must be the same tokens as labels"):
        distillation(moved)
    with pytest.raises(ValueError, match="teacher_input_ids must not be in the batch"):
        cdistill.distill(copy.deepcopy(student), student, vat_weight=0)(batch)
    with pytest.raises(ValueError, match="'mdist' compares teacher and student at the same tokens"):
        cdistill.distill(teacher, student, vat_weight=0, terms=[term_named("mdist")()])
    with pytest.raises(ValueError, match=r"patch_size differs: student 16, teacher 8"):
        cdistill.distill(teacher, student)


def test_the_trainer_takes_both_processors(models, tmp_path):
    student, teacher = map(copy.deepcopy, models)
    sides = [build_processor(of.config, build_tokenizer(), "test") for of in models]
    vat = {"visual": "resample", "layers": "all"}
    options = {"max_steps": 1, "per_device_train_batch_size": 2, "per_device_eval_batch_size": 2, "save_strategy": "no"}
    args = cdistill.CompoDistillConfig(
        str(tmp_path), vat=vat, use_cpu=True, report_to="none", disable_tqdm=True, **options
    )
    said = [{"role": m.role, "content": "".join(p for p in m.parts if isinstance(p, str))} for m in LONG]
    rows = [{"messages": said, "image": PICTURE}, {"messages": said[:2], "image": PICTURE}, {"messages": said[:2]}]
    given = {"args": args, "train_dataset": rows, "eval_dataset": rows, "compute_metrics": lambda found: {}}
    with pytest.raises(ValueError, match="teacher_processing_class must be given"):
        cdistill.CompoDistillTrainer(student, teacher, processing_class=sides[0], **given)
    with pytest.raises(ValueError, match="teacher_processing_class must be None"):
        same = copy.deepcopy(student)
        cdistill.CompoDistillTrainer(
            student, same, processing_class=sides[0], teacher_processing_class=sides[0], **given
        )
    trainer = cdistill.CompoDistillTrainer(
        student, teacher, processing_class=sides[0], teacher_processing_class=sides[1], **given
    )
    before = trainer.evaluate()
    trainer.train()
    assert 0 < before["eval_vat"] < 1
    assert trainer.evaluate()["eval_loss"] != before["eval_loss"]


def test_a_student_that_fetches_the_adapter_has_its_teachers_tokens(models):
    text = text_config(num_hidden_layers=2)
    token = models[1].config.image_token_id
    student = compose(models[1].config.vision_config, text, image_token_id=token, teacher=models[1])
    student.config.vision_config = models[0].config.vision_config
    with pytest.raises(
        ValueError, match=r"^student\.taf must be false for a student with other visual tokens.*patch_size"
    ):
        cdistill.distill(models[1], student, vat_weight=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    save_teacher(folder / "teacher")
    save_base(folder / "base")
    return folder


def recipe_of(output, folder, **changes):
    """Nothing is aligned, but where changes say so."""
    fixed = {
        "student__taf": False,
        "student__vision_config": VISION | {"patch_size": 16, "model_type": "siglip_vision_model"},
    }
    return make_recipe(output, folder, **(fixed | {"vat": {"enabled": False}} | changes))


@pytest.mark.parametrize(
    "options",
    [
        {"matching": "adaptive", "weight": "auto", "heads": "match", "head_matching": "assignment"},
        {"heads": "match", "head_matching": "mixture"},
    ],
)
def test_a_run_distils_across_visual_tokens(folder, tmp_path, capsys, options):
    vat = {"visual": "resample", "rows": "text", "layers": "all", **options}
    recipe = recipe_of(tmp_path / "run", folder, stages=["dft", "sft"], report_to=[], vat=vat | {"measure_samples": 4})
    built = build_models(recipe)
    data, collate = stage_dataset(recipe, 0, built)
    batch = collate([data[0], data[1]])
    token = built.teacher.config.image_token_id
    counts = [(batch[name] == token).sum(1).tolist() for name in ("input_ids", "teacher_input_ids")]
    assert counts == [[9, 9], [36, 36]]
    alone, collate = stage_dataset(recipe, 1, built)
    assert "teacher_input_ids" not in collate([alone[0]])
    assert run(recipe).name == "2-sft"
    losses = [json.loads(line)["vat"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(0 < loss < 1 for loss in losses[:3]) and losses[3:] == [None] * 3
    assert (
        "each sample is encoded for student and teacher, because vision_config.patch_size differs"
        in capsys.readouterr().out
    )


def test_samples_of_files_that_do_not_fit_both_are_bad(folder, tmp_path):
    PICTURE.save(tmp_path / "one.png")
    said = ["<image>\nred ring", "red ring r1 c1"], ["<image>\n" + "red ring " * 10, "blue"], ["<image>\nblue", "above"]
    records = [{"id": i, "image": "one.png", "conversations": turns(*texts)} for i, texts in enumerate(said)]
    (tmp_path / "set.json").write_text(json.dumps(records))
    data = {"path": str(tmp_path / "set.json"), "max_length": 50}
    vat = {"visual": "resample", "layers": "all"}
    recipe = recipe_of(tmp_path / "run", folder, stages=["dft"], report_to=[], vat=vat, stage__dft__data=data)
    samples, collate = stage_dataset(recipe, 0, build_models(recipe))
    batch = collate([samples[i] for i in range(3)])
    (bad,) = batch["bad_samples"]
    assert "[1]" in bad.place and bad.reason == "too long"  # of the teacher's tokens, which has 27 more
    assert batch["pair_shares"].shape[:2] == (3, 9)
    ours, theirs = split_sides({name: value for name, value in batch.items() if name != "bad_samples"})
    assert ours["labels"][ours["labels"] != -100].tolist() == theirs["labels"][theirs["labels"] != -100].tolist()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vat": {}}, r"patch_size differs: student 16, teacher 8; vat\.visual resample aligns"),
        (
            {"packing": True, "stage__dft__data": {"path": "x"}, "stages": ["dft"]},
            "^packing must be left out where each sample",
        ),
        ({"stage__dft__generation": {}}, r"^stage\.dft\.generation must be null: replies are encoded once"),
        ({"stage__dft__objective": "rdist"}, r"^stage\.dft\.objective: term 'rdist' compares .*patch_size differs"),
        ({"teacher_memory__cache": "kept"}, r"^teacher_memory\.cache must be left out where each sample"),
    ],
)
def test_what_needs_one_encoding_is_refused(folder, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message) as error:
        run(recipe_of(tmp_path / "run", folder, **changes))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_a_plan_counts_the_teachers_own_tokens(folder, tmp_path):
    recipe = recipe_of(
        tmp_path / "run", folder, stages=["dft"], vat={"visual": "resample", "layers": "all", "rows": "answer"}
    )
    planned = plan(recipe, gpus=1, device="cpu", length=100, answers=20)
    (stage,) = planned.stages
    assert (stage.setting.visual, stage.setting.of_teacher.visual, stage.setting.of_teacher.length) == (9, 36, 127)
    layers, samples, rows = 2, 4, 20
    assert stage.phases["forward"]["targets"] == layers * 4 * samples * rows * (9 + 36)
    assert planned.remarks == ("the teacher's own look at the images is not counted",)
    same = {
        "student__vision_config": VISION | {"model_type": "siglip_vision_model"},
        "vat": {"layers": "all", "rows": "answer"},
    }
    equal = plan(
        recipe_of(tmp_path / "run", folder, stages=["dft"], **same), gpus=1, device="cpu", length=127, answers=20
    )
    looks = [of.phases["teacher"]["teacher's pass"] for of in (stage, equal.stages[0])]
    assert looks[0] == looks[1]
    with pytest.raises(ValueError, match="patch_size differs: student 16, teacher 8; vat"):
        plan(recipe_of(tmp_path / "run", folder, stages=["dft"], vat={}), gpus=1, device="cpu")
