"""Terms of the loss from outside: one class, registered, gives the loss and the gradients of a plain computation everywhere."""

import json
import subprocess
import sys
from unittest import mock

import pytest
import torch
from builtin_models import make_recipe
from family_models import QUIET, build_pair, collate, draw, draw_samples, pack
from safetensors.torch import load_file
from transformers import TrainerCallback

import cdistill
from cdistill.models.load import load_model
from cdistill.plan.memory import plan
from cdistill.train import run
from cdistill.train.build import build_models
from cdistill.train.cache_writer import write_cache
from cdistill.train.data import stage_dataset
from cdistill.train.objectives import OBJECTIVES
from cdistill.train.terms import TERMS, Memory
from cdistill.vat import SliceRecorder

NAME = "qwen2_vl"


@pytest.fixture(autouse=True)
def own_registry():
    """What a test registers is not there in others."""
    with mock.patch.dict(TERMS), mock.patch.dict(OBJECTIVES):
        yield


class Features(cdistill.Term):
    """Squared distance between a projection of the student's last hidden states and the teacher's, per labelled token."""

    name = "feature"
    title = "features"
    teacher = ("hidden",)
    weight = 0.5
    trains = True

    def modules(self, student, teacher):
        widths = [model.config.get_text_config().hidden_size for model in (student, teacher)]
        projection = torch.nn.Linear(*widths, bias=False)
        return {"feature_projection": projection.requires_grad_(self.trains)}

    def forward(self, step):
        return squared(step.modules["feature_projection"](step.hidden), step.teacher.hidden).sum()


class Frozen(Features):
    """By a projection that is not trained."""

    trains = False


class Entropy(cdistill.Term):
    """Entropy of the student's predictions at labelled tokens."""

    name = "entropy"
    title = "entropy"
    weight = 0.25

    def forward(self, step):
        return entropies(step.student.lm_head(step.hidden)).sum()

    @classmethod
    def memory(cls, recipe, student, sizes):
        return Memory(logits="whole", kept=1000 * sizes.batch)


class Leading(cdistill.Term):
    """Mean square of the first hidden features at labelled tokens, per sample; that of all is about 1 after the norm."""

    name = "leading"
    title = "leading"
    per = "sample"

    def forward(self, step):
        sample = step.places // step.labels.shape[1]
        counts = sample.bincount(minlength=len(step.labels))
        return (leading(step.hidden) / counts[sample]).sum()


class Four(cdistill.Term):
    """A number that should come out as 1 for 4 samples."""

    name = "four"
    title = "four"
    per = "sample"

    def forward(self, step):
        return step.zero() + 4.0


def leading(hidden):
    return hidden[:, :4].float().square().mean(1)


def squared(a, b):
    return (a - b).float().square().mean(-1)


def entropies(logits):
    p = logits.float().log_softmax(-1)
    return -(p.exp() * p).sum(-1)


def answers(model, batch):
    """Last hidden states where the next token is labelled, by transformers alone."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    return model.model(**inputs).last_hidden_state[:, :-1][batch["labels"][:, 1:] != -100]


def plainly(student, teacher, batch, projection):
    """Means of the three terms, by transformers alone."""
    ours = answers(student, batch)
    with torch.no_grad():
        theirs = answers(teacher, batch)
    counts = (batch["labels"][:, 1:] != -100).sum(1).tolist()
    samples = torch.stack([leading(sample).mean() for sample in ours.split(counts)])
    found = {"feature": squared(projection(ours), theirs), "entropy": entropies(student.lm_head(ours))}
    found["leading"] = samples
    return {name: values.mean() for name, values in found.items()}


def gradients(loss, student):
    parameters = {name: p for name, p in student.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(loss, [*parameters.values()], allow_unused=True, retain_graph=True)
    return {name: g for name, g in zip(parameters, found, strict=True) if g is not None}


@pytest.mark.parametrize("given", ["registered", "instances"])
def test_terms_from_outside_add_their_losses_and_gradients(given):
    student, teacher = build_pair(NAME)
    batch = draw(NAME, 31)
    if given == "registered":
        assert cdistill.register_term(Frozen) is Frozen
        cdistill.register_term(Entropy)
        cdistill.register_term(Leading)
    chosen = ["feature", "entropy", "leading"] if given == "registered" else [Frozen(), Entropy(), Leading()]
    distillation = cdistill.distill(teacher, student, terms=chosen)
    found = distillation(batch)
    assert list(found) == ["loss", "ar", "kd", "vat", "vat_layers", "feature", "entropy", "leading"]
    expected = plainly(student, teacher, batch, distillation.losses.feature_projection)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)
    alone = cdistill.distill(teacher, student)(batch)
    total = alone["loss"] + 0.5 * expected["feature"] + 0.25 * expected["entropy"] + expected["leading"]
    torch.testing.assert_close(found["loss"], total, rtol=1e-5, atol=1e-6)
    ours, plain = gradients(found["loss"], student), gradients(total, student)
    assert ours.keys() == plain.keys()
    for name, gradient in plain.items():
        scale = plain[name.replace("k_proj.bias", "k_proj.weight")].abs().max()
        assert (ours[name] - gradient).abs().max() <= 2e-5 * scale, name
    assert (gradients(alone["loss"], student)["lm_head.weight"] - plain["lm_head.weight"]).abs().max() > 1e-3


def test_a_term_over_samples_is_a_mean_over_packed_samples():
    student, teacher = build_pair(NAME)
    distillation = cdistill.distill(teacher, student, vat_weight=0.0, terms=[Four()])
    samples = draw_samples(NAME, 12)
    for rows in ([[0, 1, 2], [3]], [[0, 1, 2, 3]]):
        assert distillation(pack(NAME, samples, rows, student).batch)["four"] == 1.0
    batch = collate(NAME, samples)[0]
    assert distillation(batch)["four"] == 1.0
    assert distillation(batch, num_items_in_batch=9, num_samples_in_batch=8)["four"] == 0.5
    with pytest.raises(ValueError, match=r"num_samples_in_batch must be given .*: four is a mean over the samples"):
        distillation(batch, num_items_in_batch=9)


def test_the_trainer_logs_and_evaluates_a_term(tmp_path):
    student, teacher = build_pair(NAME)
    samples = draw_samples(NAME, 3)
    trainer = cdistill.CompoDistillTrainer(
        model=student,
        teacher_model=teacher,
        args=cdistill.CompoDistillConfig(
            str(tmp_path),
            max_steps=1,
            per_device_train_batch_size=2,
            per_device_eval_batch_size=3,
            gradient_accumulation_steps=2,
            learning_rate=0.0,
            kd={"weight": 0.0},
            **QUIET,
        ),
        train_dataset=samples,
        eval_dataset=samples,
        data_collator=lambda found: collate(NAME, found)[0],
        terms=[Frozen(), Leading()],
    )
    projection = trainer.distillation.losses.feature_projection
    with torch.no_grad():
        expected = plainly(student, teacher, collate(NAME, samples)[0], projection)
    trainer.train()
    for prefix, found in (("", trainer.state.log_history[0]), ("eval_", trainer.evaluate())):
        for name in ("feature", "leading"):
            assert found[prefix + name] == pytest.approx(expected[name].item(), rel=1e-5)
        total = sum(weight * found[prefix + name] for name, weight in trainer.distillation.weights.items())
        assert found[prefix + "loss"] == pytest.approx(total, rel=1e-5)
    assert trainer.distillation.weights == {"ar": 1.0, "vat": 1.0, "feature": 0.5, "leading": 1.0}


class Plainly(TrainerCallback):
    """Values of the first batch and the gradient of the projection by transformers alone, beside those of the stage."""

    def __init__(self, recipe):
        built = build_models(recipe)
        data, collator = stage_dataset(recipe, 0, built)
        self.teacher, self.batch = built.teacher, collator([data[i] for i in range(4)])

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        weight = model.feature_projection.weight
        self.values = plainly(model.student, self.teacher, self.batch, model.feature_projection)
        (self.expected,) = torch.autograd.grad(0.5 * self.values["feature"], weight)
        self.before = weight.detach().clone()

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if state.global_step == 0:
            self.found = model.feature_projection.weight.grad.clone()

    def on_train_end(self, args, state, control, model=None, **kwargs):
        self.after = model.feature_projection.weight.detach().clone()


def test_a_stage_trains_by_an_objective_of_ones_own(models, tmp_path, capsys):
    cdistill.register_term(Features)
    cdistill.register_term(Entropy)
    cdistill.register_term(Leading)
    losses = ("ar", "kd", "vat", "feature", "entropy", "leading")
    cdistill.register_objective("features", losses, ("language", "adapter"))
    section = {"objective": "features", "learning_rate": 1e-3, "samples": 8, "global_batch_size": 4}
    section |= {"micro_batch_size": 2, "warmup_ratio": 0.0, "max_grad_norm": 1e9}
    recipe = make_recipe(tmp_path / "run", models, stages=["own"], stage__own=section)
    plain = Plainly(recipe)
    final = run(recipe, callbacks=[plain])
    assert "1-own: AR + KD + VAT + features + entropy + leading on 8 samples" in capsys.readouterr().out
    first, _ = (json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    for name, value in plain.values.items():
        assert first[name] == pytest.approx(value.item(), rel=1e-5)
    total = (
        first["ar"] + first["kd"] + first["vat"] + 0.5 * first["feature"] + 0.25 * first["entropy"] + first["leading"]
    )
    assert first["loss"] == pytest.approx(total, rel=1e-5)
    torch.testing.assert_close(plain.found, plain.expected, rtol=1e-4, atol=1e-6)
    assert (plain.after - plain.before).abs().max() > 1e-4, "a stage trains what terms have of their own"
    assert not any(
        "projection" in name and "multi_modal" not in name for name in load_file(final / "model.safetensors")
    )
    assert load_model(final)
    planned = plan(recipe, gpus=1, length=100)
    assert planned.remarks == ("what term feature keeps is not counted", "what term leading keeps is not counted")
    shipped = plan(make_recipe(tmp_path / "shipped", models, stages=["dft"]), gpus=1, length=100)
    assert planned.stages[0].phases["losses"]["terms"] == 1000 * planned.stages[0].setting.batch
    assert "terms" not in shipped.stages[0].phases["losses"] and shipped.remarks == ()


def test_what_a_cache_does_not_hold_is_refused_before_anything_is_written(models, tmp_path):
    cdistill.register_term(Features)
    cdistill.register_objective("features", ("ar", "feature"), ("language",))
    recipe = make_recipe(
        tmp_path / "run",
        models,
        stages=["dft"],
        stage__dft__objective="features",
        teacher_memory={"cache": str(tmp_path / "cache"), "top_k": 8},
    )
    message = r"term 'feature' needs the teacher's 'hidden', which a cache \(teacher_memory\.cache\) does not have"
    for function in (run, write_cache):
        with pytest.raises(ValueError, match=message):
            function(recipe)
    assert not list(tmp_path.iterdir())


def test_processes_that_would_not_know_an_objective_are_not_started(models, tmp_path):
    cdistill.register_objective("own", ("ar", "kd"), ("language",))
    changes = {"stages": ["dft"], "stage__dft__objective": "own", "processes": 2}
    memory = {"cache": str(tmp_path / "cache"), "top_k": 8}
    recipe = make_recipe(tmp_path / "run", models, **changes)
    message = "objective 'own' is known in this process alone, and processes is 2: .* under torchrun"
    with pytest.raises(ValueError, match=message):
        run(recipe)
    with pytest.raises(ValueError, match=message):
        write_cache(make_recipe(tmp_path / "run", models, **changes, teacher_memory=memory))
    assert not list(tmp_path.iterdir())


def made(**attributes):
    return type("Made", (Entropy,), attributes)


class Silent(cdistill.Term):
    """Has no forward."""

    name, title = "silent", "silent"


class Asking(Entropy):
    """Nobody says what its argument is."""

    name = "asking"

    def __init__(self, width):
        self.width = width


@pytest.mark.parametrize(
    ("term", "message"),
    [
        (made(name="kd"), "term 'kd': the key 'kd' is taken by Divergence: choose another"),
        (made(name="vat_layers"), "the key 'vat_layers' is taken by Alignment"),
        (made(details=("vat",)), "term 'entropy': the key 'vat' is taken by Alignment"),
        (made(name="loss"), "term Made: name must be an identifier, and none of loss, .*, got 'loss'"),
        (made(name="a b"), "name must be an identifier.* got 'a b'"),
        (made(name=""), "name must be an identifier"),
        (made(title=""), "term 'entropy': title must say"),
        (made(per="token"), "term 'entropy': per must be one of label, sample, got 'token'"),
        (made(labels="words"), "labels must be one of tokens, patches, got 'words'"),
        (
            made(teacher=("logits",)),
            "teacher must be of predictions, hidden, visual, attention, relations, got 'logits'",
        ),
        (made(teacher="hidden"), "teacher must be a tuple of names, got a string"),
        (made(weight=-1.0), "weight must be at least 0 and finite, got -1.0"),
        (made(weight=float("nan")), "weight must be at least 0 and finite, got nan"),
        (made(weight=None), "weight must be at least 0 and finite, got None"),
        (Silent, "term 'silent': forward must give its sum over a batch"),
        (Asking, "term 'asking': configured must make it, or its __init__ have defaults"),
        (Entropy(), "a term must be a subclass of cdistill.Term, got <"),
        (SliceRecorder, "a term must be a subclass of cdistill.Term, got <class"),
    ],
)
def test_what_is_no_term_is_not_registered(term, message):
    before = dict(TERMS)
    with pytest.raises(ValueError, match=message) as refused:
        cdistill.register_term(term)
    assert "\n" not in str(refused.value) and before == TERMS


class Looking(Entropy):
    """Would see the student's attention, too."""

    name = "looking"
    attention = True


class Sharing(Frozen):
    """Another term, whose module has the same name."""

    name = "sharing"


class Several(Entropy):
    """Gives no scalar."""

    def forward(self, step):
        return entropies(step.student.lm_head(step.hidden))


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        (
            ["nothing"],
            "terms must be of patch, ar, ground, kd, vat, hidden, mdist, rdist, relation, iva, got 'nothing'",
        ),
        ("nothing", "terms must be of patch, ar, ground, kd, vat, hidden, mdist, rdist, relation, iva, got 'nothing'"),
        ([Entropy], "terms must hold instances of cdistill.Term or names of registered ones, got <class"),
        ([Entropy(), Entropy()], "two terms of a loss have the key 'entropy'"),
        (["kd"], "two terms of a loss have the key 'kd'"),
        (
            ["patch"],
            "terms of one loss must have labels of one kind: ar has those of tokens, .*patch has those of patches",
        ),
        ([Looking()], "one term of a loss may see the student's attention, got vat and looking: leave one out"),
        ([Frozen(), Sharing()], "term 'sharing': the name of its module 'feature_projection' is taken"),
        ([Features()], "terms: feature_projection has parameters to train.*: freeze them"),
        ([made(weight=float("inf"))()], "weight must be at least 0 and finite"),
    ],
)
def test_terms_that_cannot_be_added_are_refused(chosen, message):
    student, teacher = build_pair(NAME)
    with pytest.raises(ValueError, match=message) as refused:
        cdistill.distill(teacher, student, terms=chosen)
    assert "\n" not in str(refused.value)


class Forgetful(Entropy):
    """Announces what it does not give."""

    details = ("each",)


@pytest.mark.parametrize(
    ("term", "message"),
    [
        (Several(), r"term 'entropy': forward must return a scalar tensor, got one of shape \(\d+,\)"),
        (Forgetful(), r"details of terms must be those in step.details \(vat_layers\), got vat_layers, each"),
    ],
)
def test_results_that_are_not_those_announced_are_refused(term, message):
    student, teacher = build_pair(NAME)
    distillation = cdistill.distill(teacher, student, terms=[term])
    with pytest.raises(ValueError, match=message):
        distillation(draw(NAME, 1))


@pytest.mark.parametrize(
    ("name", "losses", "trained", "message"),
    [
        ("dft", ("ar",), ("language",), "objective 'dft' is taken: choose another name"),
        ("own", (), ("language",), "objective 'own': losses must name at least one term"),
        ("own", ("ar", "other"), ("language",), "objective 'own': terms must be of patch, .*, got 'other'"),
        ("own", ("ar", "patch"), ("language",), "objective 'own': terms of one loss must have labels of one kind"),
        ("own", ("patch",), ("vision",), "objective 'own': only objective vision trains the vision encoder"),
        (
            "own",
            ("ar", "kd"),
            ("vision", "language"),
            "objective 'own': only objective vision trains the vision encoder",
        ),
        ("own", ("ar",), ("head",), "objective 'own': trained must be of vision, language, adapter, got 'head'"),
    ],
)
def test_objectives_that_cannot_be_are_refused(name, losses, trained, message):
    before = dict(OBJECTIVES)
    with pytest.raises(ValueError, match=message):
        cdistill.register_objective(name, losses, trained)
    assert before == OBJECTIVES


def test_terms_of_a_recipe_are_known_without_torch():
    code = (
        "import sys, cdistill; from cdistill.train.recipes import load_recipe; recipe = load_recipe('demo-compodistill');"
        "cdistill.register_objective('own', ('ar', 'kd'), ('adapter',)); cdistill.Term, cdistill.register_term;"
        "print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
