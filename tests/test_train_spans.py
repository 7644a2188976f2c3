"""Training between different tokenizers: whole runs, what a batch relates, and what is refused before anything is written."""

import json

import pytest
import torch
from builtin_models import VISION, make_recipe, recipe_values, save_base, save_teacher, shape

import cdistill
from cdistill.builtin import scenes
from cdistill.builtin.questions import WORDS
from cdistill.builtin.scenes import COLOURS
from cdistill.builtin.subwords import build_subword_tokenizer
from cdistill.choices import KDConfig
from cdistill.cli import main
from cdistill.data import strict_yaml
from cdistill.data.conversations import Encoder
from cdistill.data.samples import BadSampleError, Message
from cdistill.data.span_pairs import SPANS, SPANS_OF_TEACHER, SpanEncoder, numbers_of
from cdistill.eval import builtin_words
from cdistill.eval.builtin_task import Exam
from cdistill.eval.builtin_words import in_own_words
from cdistill.eval.inference import Inference
from cdistill.eval.loading import load_questioner
from cdistill.eval.prompts import Prompts
from cdistill.models.load import ASSETS, load_model, load_tokenizer
from cdistill.reproduce.runs import identity
from cdistill.train import run
from cdistill.train.build import build_models
from cdistill.train.data import stage_dataset
from cdistill.train.objectives import set_trained
from cdistill.train.prepare import open_data
from cdistill.train.recipes import recipe_from_dict
from cdistill.train.resolve import resolve
from cdistill.train.stages import losses_of


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    save_teacher(folder / "teacher")
    save_base(folder / "same")
    pieces = build_subword_tokenizer()
    ids = {"eos_token_id": pieces.eos_token_id, "pad_token_id": pieces.pad_token_id}
    save_base(folder / "base", tokenizer=pieces, vocab_size=len(pieces), **ids)
    return folder


def metrics(output):
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(("alignment", "precision"), [("merged", "fp32"), ("uld", "bf16")])
def test_a_run_distils_into_a_student_of_another_tokenizer(folder, tmp_path, capsys, alignment, precision):
    """With the teacher's adapter, and VAT over all text; the student is saved with its own tokenizer and template."""
    changes = {"kd__alignment": alignment, "vat__rows": "text", "report_to": [], "precision": precision}
    values = recipe_values(tmp_path / "run", folder, **changes)
    (tmp_path / "recipe.yaml").write_text(strict_yaml.dump(values))
    assert main(["train", str(tmp_path / "recipe.yaml")]) == 0
    assert (
        f"each sample is encoded for student and teacher, because kd.alignment is {alignment}"
        in capsys.readouterr().out
    )
    logged = metrics(tmp_path / "run")
    assert all(line["kd"] > 0 for line in logged if line["stage"] != "sft")
    assert all(line["vat"] > 0 for line in logged if line["stage"] == "dft")
    result = tmp_path / "run" / "3-sft"
    assert load_tokenizer(result, "student").get_vocab() == build_subword_tokenizer().get_vocab()
    assert load_model(result).config.image_token_id == build_subword_tokenizer().convert_tokens_to_ids("<image>")


@pytest.mark.parametrize("rows", ["answer", "predicting", "visual"])
def test_one_tokenizer_by_spans_gives_what_it_gives_by_tokens(folder, tmp_path, rows):
    found, batch = [], {}
    for alignment in ("merged", "token"):
        changes = {"student__base": str(folder / "same"), "kd__alignment": alignment, "vat__rows": rows}
        recipe = make_recipe(tmp_path / alignment, folder, stages=["dft"], report_to=[], **changes)
        models, resolved = build_models(recipe), resolve(recipe, 1)
        stage = resolved.stages[0]
        model, data = losses_of(resolved, stage, models, open_data(stage, models), torch.device("cpu"))
        given = data.collator([data.dataset[i] for i in range(3)])
        batch = batch or given  # whose pixels a processor has read, from 8 bits
        assert torch.equal(batch["input_ids"], given["input_ids"]) and torch.equal(batch["labels"], given["labels"])
        set_trained(models.student, stage.objective)
        weights = [p for p in models.student.parameters() if p.requires_grad]
        losses = model(**{name: batch[name] for name in given})
        total = losses["ar"] + 0.5 * losses["kd"] + losses["vat"]
        found.append(([losses[name] for name in ("ar", "kd", "vat")], torch.autograd.grad(total, weights)))
    torch.testing.assert_close(*(losses for losses, _ in found))
    torch.testing.assert_close(*(gradients for _, gradients in found), rtol=1e-3, atol=1e-4)


def test_spans_of_samples_are_told_apart():
    batch = {
        SPANS: torch.tensor([[0, 1, 1, 2], [1, 2, 3, -1]]),
        SPANS_OF_TEACHER: torch.tensor([[1, 2, -1], [1, 2, 3]]),
    }
    ours, theirs = numbers_of(batch)
    assert ours.tolist() == [[0, 1, 1, 2], [4, 5, 6, 0]]
    assert theirs.tolist() == [[1, 2, 0], [4, 5, 6]]
    assert numbers_of({}) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, r"^vocabularies differ: token .* set kd.alignment to merged \(or uld\)"),
        ({"kd__alignment": "pieces"}, "^kd.alignment must be one of token, merged, uld"),
        ({"kd__alignment": "merged", "packing": True}, "packing must be false with kd.alignment merged"),
        (
            {"kd__alignment": "merged", "teacher_memory__cache": "x"},
            "^teacher_memory.cache must be null with kd.alignment",
        ),
        ({"kd__alignment": "merged", "vat__rows": "all"}, "^vat.rows must not be all with kd.alignment merged"),
        ({"kd__alignment": "merged", "vat__matching": "adaptive"}, "^vat.matching must not be adaptive with"),
        ({"kd__alignment": "merged", "vat__target": "recomputed"}, "^vat.target must not be recomputed with"),
        (
            {"kd__alignment": "merged", "vat__engine": "torch_flash"},
            "^vat.engine must be sdpa with kd.alignment merged",
        ),
        (
            {"kd__alignment": "uld", "kd__divergence": "jsd"},
            "kd.divergence must be left out with kd.alignment uld, got 'jsd'",
        ),
        (
            {"kd__alignment": "merged", "stage__dft__objective": "hidden"},
            r"^stage\.dft\.objective: term 'hidden' compares",
        ),
    ],
)
def test_what_different_tokenizers_cannot_do_is_refused_in_one_line(folder, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message) as error:
        run(make_recipe(tmp_path / "run", folder, report_to=[], **changes))
    assert "\n" not in str(error.value) or changes.get("packing")
    assert not (tmp_path / "run").exists()


def test_a_loop_of_ones_own_is_sent_to_recipes(folder):
    student, teacher = (load_model(folder / name) for name in ("teacher", "teacher"))
    with pytest.raises(ValueError, match=r"^kd\.alignment must be token here, got 'merged'"):
        cdistill.distill(teacher, student, kd=KDConfig(alignment="merged"))


def test_answers_with_words_that_a_tokenizer_does_not_know_are_bad_samples(folder, tmp_path):
    recipe = make_recipe(tmp_path / "run", folder, stages=["dft"], kd__alignment="merged")
    data, _ = stage_dataset(recipe, 0, build_models(recipe))
    with pytest.raises(
        BadSampleError, match="alignment: the teacher's tokenizer has no tokens for a part of 'a zebra'"
    ):
        data.encoder([Message("user", ("which",)), Message("assistant", ("a zebra",))], [])


def test_the_key_leaves_hashes_of_kept_runs_as_they_are(folder, tmp_path):
    recipe = make_recipe(tmp_path / "run", folder, student__base=str(folder / "same"))
    assert "alignment" not in identity(recipe)["kd"]
    values = recipe_values(tmp_path / "run", folder, kd__alignment="merged")
    assert identity(recipe_from_dict(values))["kd"]["alignment"] == "merged"


def test_the_shipped_tokenizer_is_made_of_the_tasks_words():
    made, shipped = build_subword_tokenizer(), load_tokenizer(ASSETS / "subwords", "tokenizer")
    assert shipped.backend_tokenizer.to_str() == made.backend_tokenizer.to_str()
    assert shipped.chat_template == made.chat_template
    words = " ".join(["describe the scene", *WORDS, *scenes.words()])
    assert made.decode(made(words)["input_ids"]) == words
    pieces = [len(made.tokenize(f" {word}")) for word in WORDS]
    assert min(pieces) == 1 and max(pieces) > 1


def test_questions_about_written_scenes_are_asked_as_they_are_trained_on():
    tokenizer, exam = build_subword_tokenizer(), Exam(n=1, modality="text")
    asked, _ = builtin_words._prompts(exam, Prompts(tokenizer), "colour", 0)
    messages = [Message(m["role"], tuple(part["text"] for part in m["content"])) for m in exam.messages("colour", 0)]
    trained = Encoder(tokenizer)(messages, [])
    first = int((trained.labels != -100).nonzero()[0])
    assert trained.input_ids[:first].tolist() == asked[0].ids
    assert " what colour is the " in tokenizer.decode(asked[0].ids)


def test_a_fresh_student_reads_with_a_tokenizer_of_its_own(folder, tmp_path):
    """On the built-in task, whose words it has in pieces; it is examined by them, as the task's own models are."""
    text = shape(2, 32) | {"model_type": "llama", "max_position_embeddings": 512, "tie_word_embeddings": True}
    changes = {"student__base": None, "student__taf": True, "student__text_config": text, "kd__alignment": "merged"}
    recipe = make_recipe(
        tmp_path / "run", folder, stages=["dft"], report_to=[], student__tokenizer="builtin:subwords", **changes
    )
    assert run(recipe).name == "1-dft"
    model = load_model(tmp_path / "run" / "1-dft").eval()
    processor = load_questioner([tmp_path / "run" / "1-dft"], model.config, usual=True)
    exam = Exam(n=2)
    found = in_own_words(exam, model, processor, "test")
    assert set(found) == {"greedy", "choice"} and 0 <= found["choice"]["compositional"]["avg"] <= 1
    # the likelihood of an answer of several tokens is that of transformers' own pass over the words
    asked, _ = exam.messages("colour", 0)
    images = [part["image"] for part in asked["content"] if part["type"] == "image"]
    scores = []
    for colour in COLOURS:
        prompt = processor.apply_chat_template([asked], add_generation_prompt=True, tokenize=False)
        inputs = processor(text=[prompt + colour], images=[images], return_tensors="pt")
        begin = processor(text=[prompt], images=[images], return_tensors="pt")["input_ids"].shape[1]
        with torch.no_grad():
            log_p = model(**inputs).logits.log_softmax(-1)[0]
        said = inputs["input_ids"][0, begin:]
        scores.append(float(log_p[begin - 1 : -1].gather(1, said[:, None]).sum()))
    best = COLOURS[scores.index(max(scores))]
    assert chosen_for(exam, model, processor, "colour", 0) == best


def chosen_for(exam, model, processor, subtype, index):
    """The choice that `in_own_words` counts, told by which answer would have been right."""
    prompts = Prompts(processor)
    asked, _ = builtin_words._prompts(exam, prompts, subtype, index)
    scores = Inference(model, prompts, "padded").log_likelihoods(asked)
    return COLOURS[scores.index(max(scores))]


@pytest.mark.parametrize("rows", ["text", "predicting"])
def test_other_visual_tokens_beside_another_tokenizer(folder, tmp_path, rows):
    """9 visual tokens from the teacher's 36: its rows are averaged within spans, then resampled by area."""
    vision = VISION | {"patch_size": 16, "model_type": "siglip_vision_model"}
    changes = {"student__taf": False, "student__vision_config": vision, "kd__alignment": "merged", "vat__rows": rows}
    recipe = make_recipe(tmp_path / "run", folder, stages=["dft"], report_to=[], vat__visual="resample", **changes)
    assert run(recipe).name == "1-dft"
    assert all(line["vat"] > 0 for line in metrics(tmp_path / "run"))
    plain = make_recipe(tmp_path / "other", folder, stages=["dft"], report_to=[], **changes)
    with pytest.raises(ValueError, match=r"patch_size differs: student 16, teacher 8; vat\.visual resample aligns"):
        run(plain)


def test_samples_that_cannot_be_aligned_give_way_to_others(folder, tmp_path):
    turns = [("is there a ring ?", "yes"), ("which", "a zebra"), ("which", "a red ring")]
    records = [{"conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": a}]} for q, a in turns]
    (tmp_path / "data.json").write_text(json.dumps(records))
    data = recipe_values(tmp_path / "run", folder, stages=["dft"], kd__alignment="merged", stage__dft__samples=4)
    data["stage"]["dft"]["data"] = {"path": str(tmp_path / "data.json")}
    recipe = recipe_from_dict(data)
    found, collate = stage_dataset(recipe, 0, build_models(recipe))
    left_out = [bad for i in range(4) for bad in found[i][1]]
    assert {(bad.reason, bad.place.rpartition("[")[2].partition("]")[0]) for bad in left_out} == {("alignment", "1")}
    assert (numbers_of(collate([found[0], found[1]]))[0] > 0).any()


def test_a_span_whose_first_token_nothing_predicts_is_left_out():
    """As where an answer begins a sample: the student's would be compared from its second token on."""
    pieces, whole = build_subword_tokenizer(), build_subword_tokenizer()
    whole.add_tokens(["zebra"])
    encode = SpanEncoder(*(Encoder(tokenizer, "plain", places=True) for tokenizer in (pieces, whole)))
    made = encode([Message("user", ("which",)), Message("assistant", ("zebra ring",))], [])
    spans = made.relation["spans"]
    assert (spans[made.student.labels == -100] == 0).all() and len(pieces.tokenize("zebra")) > 1
    words = [pieces.decode(made.student.input_ids[spans == n]) for n in sorted({*spans.tolist()} - {0})]
    assert "".join(words).strip() == "ring"
