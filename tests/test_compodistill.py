"""`CompoDistillTrainer` in one process, and a `Distillation` as the model of others' trainers."""

import functools
import shutil
from types import MethodType

import numpy as np
import peft
import pytest
import torch
from conversation_cases import byte_level_processor, picture
from family_models import QUIET, build, build_pair, collate, draw, draw_samples
from PIL import Image
from torch.utils.data import SequentialSampler
from transformers import AutoModelForImageTextToText, AutoTokenizer, GenerationConfig, Trainer, TrainingArguments

import cdistill
from cdistill.data.contract import LabelContract
from cdistill.data.images import find_image, open_image
from cdistill.data.samples import ImageFile, Message
from cdistill.train.compodistill import ConversationCollator

NAME = "llava_llama"
FEW = {"target_modules": ["q_proj", "v_proj"]}


def arguments(kind, output, **options):
    common = {
        "learning_rate": 0.05,
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        **QUIET,
    }
    return kind(output_dir=str(output), **(common | options))


def make(output, *, name=NAME, pair=None, peft_config=None, eval_dataset=None, compute_metrics=None, **options):
    """A trainer of a fresh pair, on eight samples."""
    student, teacher = build_pair(name) if pair is None else pair
    return cdistill.CompoDistillTrainer(
        model=student,
        teacher_model=teacher,
        args=arguments(cdistill.CompoDistillConfig, output, **options),
        train_dataset=draw_samples(name, 3) + draw_samples(name, 4),
        eval_dataset=eval_dataset,
        data_collator=lambda samples: collate(name, samples)[0],
        peft_config=peft_config,
        compute_metrics=compute_metrics,
    )


def make_around(output, *, name=NAME, pair=None, adapted=None, **options):
    """transformers' own Trainer, of a Distillation."""
    student, teacher = build_pair(name) if pair is None else pair
    student = student if adapted is None else peft.get_peft_model(student, adapted)
    return Trainer(
        model=cdistill.distill(teacher, student),
        args=arguments(TrainingArguments, output, **options),
        train_dataset=draw_samples(name, 3) + draw_samples(name, 4),
        data_collator=lambda samples: collate(name, samples)[0],
    )


def weights(model):
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    assert [name for name, value in expected.items() if not torch.equal(found[name], value)] == []


class Beside(Trainer):
    """Leaves out the number of items."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return model(inputs)["loss"]


def change(kind, folder, micro, accumulated):
    """What one step of SGD takes from the student's weights."""
    student, teacher = build_pair(NAME)
    distillation = cdistill.distill(teacher, student)
    before = torch.cat([p.detach().flatten() for p in student.parameters()])
    options = {
        "max_steps": 1,
        "learning_rate": 1.0,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "max_grad_norm": 0.0,
    }
    cut = {"per_device_train_batch_size": micro, "gradient_accumulation_steps": accumulated}
    args = arguments(TrainingArguments, folder, **options, **cut)
    samples = draw_samples(NAME, 3)
    kind(model=distillation, args=args, train_dataset=samples, data_collator=lambda s: collate(NAME, s)[0]).train()
    return before - torch.cat([p.detach().flatten() for p in student.parameters()])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return change(Trainer, tmp_path_factory.mktemp("whole"), 4, 1)


@pytest.mark.parametrize(("kind", "micro", "accumulated"), [(Trainer, 1, 4), (Beside, 2, 2)])
def test_accumulated_batches_have_the_gradient_of_one(tmp_path, whole, kind, micro, accumulated):
    found = change(kind, tmp_path, micro, accumulated)
    assert (found - whole).abs().max() <= 1e-5 * whole.abs().max()


def test_a_distillation_stands_in_the_students_place():
    student, teacher = build_pair(NAME)
    distillation = cdistill.distill(teacher, student)
    assert distillation.state_dict().keys() == student.state_dict().keys()
    assert distillation.config is student.config and distillation.dtype == student.dtype
    student.load_state_dict(distillation.state_dict())
    batch = collate(NAME, draw_samples(NAME, 3))[0]
    losses = distillation(batch | {"labels": torch.full_like(batch["labels"], -100)})
    assert losses["ar"] == losses["kd"] == 0 and losses["loss"].isfinite()
    with pytest.raises(ValueError, match="num_samples_in_batch must be given"):
        distillation(batch, num_items_in_batch=5)


@pytest.mark.parametrize(
    ("maker", "options"),
    [
        (make, {}),
        (make, {"peft_config": peft.LoraConfig(r=2, **FEW)}),
        (make_around, {}),
    ],
    ids=["LLaVA", "LoRA", "Trainer"],
)
def test_a_resumed_run_has_the_weights_of_one_that_was_not_interrupted(tmp_path, maker, options):
    """LLaVA's files name its weights otherwise than the model does."""
    options = options | {"save_strategy": "steps", "save_steps": 2}
    expected = maker(tmp_path, **options)
    expected.train()
    shutil.rmtree(tmp_path / "checkpoint-4")
    found = maker(tmp_path, **options)
    found.train(resume_from_checkpoint=True)
    assert_same(weights(found.model), weights(expected.model))
    steps = [[h["loss"] for h in trainer.state.log_history if "loss" in h] for trainer in (found, expected)]
    assert steps[0] == steps[1] and len(steps[0]) == 4


def test_a_checkpoint_of_another_student_is_refused(tmp_path):
    make(tmp_path, max_steps=1, save_strategy="steps", save_steps=1).train()
    other = build(NAME, 0, layers=4), build(NAME, 1, 5, 64, 4, 2)
    with pytest.raises(ValueError, match=r"checkpoint-1 is of another student: it has no .*layers\.3\.") as refused:
        make(tmp_path, pair=other).train(resume_from_checkpoint=True)
    assert "\n" not in str(refused.value)


def test_the_best_checkpoint_is_what_a_run_ends_with(tmp_path):
    held_out = draw_samples(NAME, 5)
    each = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    options = {"learning_rate": 2.0, "lr_scheduler_type": "constant", "load_best_model_at_end": True}
    trainer = make(tmp_path, eval_dataset=held_out, **each, **options)
    trainer.train()
    losses = [h["eval_loss"] for h in trainer.state.log_history if "eval_loss" in h]
    best = losses.index(min(losses)) + 1
    assert best < 4 and trainer.state.best_model_checkpoint.endswith(f"checkpoint-{best}")
    saved = AutoModelForImageTextToText.from_pretrained(tmp_path / f"checkpoint-{best}")
    assert_same(weights(trainer.model), weights(saved))
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(losses), rel=1e-6)


@pytest.mark.parametrize("adapted", [False, True])
def test_evaluation_gives_the_losses_of_the_whole_set_and_what_metrics_ask_for(tmp_path, adapted):
    held_out, seen = draw_samples(NAME, 5) + draw_samples(NAME, 6)[:1], {}

    def metrics(prediction):
        seen.update(logits=prediction.predictions, labels=prediction.label_ids)
        return {"mine": 1.5}

    student, teacher = build_pair(NAME)
    if adapted:
        student = peft.get_peft_model(student, peft.LoraConfig(r=2, init_lora_weights=False, **FEW))
    options = {"pair": (student, teacher), "per_device_eval_batch_size": 2}
    trainer = make(tmp_path, eval_dataset=held_out, compute_metrics=metrics, **options)
    found = trainer.evaluate()
    batch = collate(NAME, held_out)[0]
    with torch.no_grad():
        expected = cdistill.distill(teacher, trainer.model)(batch)
        logits = trainer.model(**batch).logits
    for name in ("loss", "ar", "kd", "vat"):
        assert found[f"eval_{name}"] == pytest.approx(expected[name].item(), rel=1e-5)
    assert found["eval_mine"] == 1.5
    real = torch.as_tensor(seen["labels"]) != -100
    assert torch.equal(real, batch["labels"] != -100)
    torch.testing.assert_close(torch.as_tensor(seen["logits"])[real], logits[real], rtol=1e-4, atol=1e-4)
    if adapted:
        trainer.save_model(str(tmp_path / "saved"))
        assert not (tmp_path / "saved" / "model.safetensors").exists()
        loaded = peft.PeftModel.from_pretrained(build_pair(NAME)[0], tmp_path / "saved")
        assert_same(weights(loaded), weights(trainer.model))


class InOrder(cdistill.CompoDistillTrainer):
    def _get_train_sampler(self, *args):
        return SequentialSampler(self.train_dataset)


@pytest.mark.parametrize(
    ("options", "autocast"),
    [
        ({"bf16": True}, True),
        ({"gradient_checkpointing": True}, False),
        (
            {
                "gradient_checkpointing": True,
                "gradient_checkpointing_kwargs": {"use_reentrant": True},
                "vat_weight": 0.0,
            },
            False,
        ),
    ],
    ids=["bf16", "checkpointing", "reentrant"],
)
def test_a_step_is_that_of_a_plain_loop(tmp_path, options, autocast):
    samples = draw_samples(NAME, 3)
    student, teacher = build_pair(NAME)
    distillation = cdistill.distill(teacher, student, vat_weight=options.get("vat_weight", 1.0)).train()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        losses = distillation(collate(NAME, samples)[0])
    losses["loss"].backward()
    torch.optim.SGD([p for p in student.parameters() if p.requires_grad], lr=1.0).step()
    plain = {
        "optim": "sgd",
        "learning_rate": 1.0,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "max_steps": 1,
    }
    held, teacher = build_pair(NAME)
    trainer = InOrder(
        model=held,
        teacher_model=teacher,
        args=arguments(cdistill.CompoDistillConfig, tmp_path, per_device_train_batch_size=4, **plain, **options),
        train_dataset=samples,
        data_collator=lambda given: collate(NAME, given)[0],
    )
    trainer.train()
    logged = trainer.state.log_history[0]
    for name in losses.keys() & {"loss", "ar", "kd", "vat"}:
        assert logged[name] == pytest.approx(losses[name].item(), rel=1e-6)
    for name, value in weights(student).items():
        torch.testing.assert_close(weights(held)[name], value, rtol=1e-5, atol=1e-6)


def test_a_compiler_of_the_whole_leaves_it_alone():
    student, teacher = build_pair(NAME)
    batch = draw(NAME, 3)
    expected = cdistill.distill(teacher, student)(batch)["loss"]
    assert torch.equal(torch.compile(cdistill.distill(teacher, student), backend="eager")(batch)["loss"], expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"torch_compile": True}, "torch_compile must be False"),
        ({"torch_compile_backend": "eager"}, "torch_compile must be False"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor must be 0"),
        ({"gradient_checkpointing_kwargs": '{"use_reentrant": true}'}, "gradient_checkpointing_kwargs: use_reentrant"),
        ({"vat": {"layer": "all"}}, "vat: .*'layer'"),
        ({"vat": {"layers": "none"}}, r"vat\.layers"),
        ({"kd": {"weight": -1.0}}, "kd.*weight"),
        ({"kd": "[1]"}, "kd"),
        ({"vat_weight": float("nan")}, "vat_weight must be at least 0"),
        ({"accelerator_config": {"dispatch_batches": True}}, "accelerator_config: dispatch_batches must be False"),
    ],
)
def test_values_that_a_configuration_refuses(tmp_path, options, message):
    with pytest.raises(ValueError, match=message) as refused:
        arguments(cdistill.CompoDistillConfig, tmp_path, **options)
    assert "\n" not in str(refused.value)


def test_ways_to_train_that_the_trainer_refuses(tmp_path):
    student, teacher = build_pair(NAME)
    args = arguments(cdistill.CompoDistillConfig, tmp_path)
    adapted = peft.get_peft_model(build_pair(NAME)[0], peft.LoraConfig(r=2, **FEW))
    several = arguments(cdistill.CompoDistillConfig, tmp_path)
    several._n_gpu = 2
    reentrant = build_pair(NAME)[0]
    for given, message in (
        (
            {"args": several, "data_collator": list},
            "torch.nn.DataParallel cannot split a teacher: start one process for each",
        ),
        (
            {"args": TrainingArguments(str(tmp_path), use_cpu=True)},
            "args must be a CompoDistillConfig, got TrainingArguments",
        ),
        ({"args": args}, "data_collator or processing_class must be given"),
        ({"args": args, "compute_loss_func": print}, "compute_loss_func must be None"),
        ({"model": adapted, "args": args, "peft_config": peft.LoraConfig()}, "peft_config must be None"),
    ):
        with pytest.raises(ValueError, match=message) as refused:
            cdistill.CompoDistillTrainer(**{"model": student, "teacher_model": teacher} | given)
        assert "\n" not in str(refused.value)
    reentrant.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(ValueError, match="would lose its gradient"):
        make(tmp_path, pair=(reentrant, teacher)).train()


@pytest.mark.parametrize(
    "options",
    [{}, {"name": "qwen2_vl", "tied": True}, {"adapted": peft.LoraConfig(r=2, **FEW)}],
    ids=["LLaVA", "tied", "LoRA"],
)
def test_what_others_trainers_save_of_a_distillation_is_the_student(tmp_path, options):
    options = dict(options)
    tied = {"tie_word_embeddings": True} if options.pop("tied", False) else {}
    name = options.get("name", NAME)
    trainer = make_around(
        tmp_path, pair=build_pair(name, **tied), max_steps=1, save_strategy="steps", save_steps=1, **options
    )
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    for folder in (tmp_path / "checkpoint-1", tmp_path / "saved"):
        if "adapted" in options:
            loaded = peft.PeftModel.from_pretrained(build_pair(name)[0], folder)
        else:
            loaded = AutoModelForImageTextToText.from_pretrained(folder)
            assert loaded.config.architectures == [type(loaded).__name__]
        assert_same(weights(loaded), weights(trainer.model))
        assert (loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight) == bool(tied)


def test_a_replaced_forward_pass_is_found():
    """As TRL's trainers do it with what they are given, and Liger's kernels with the student."""

    def replace(model):
        @functools.wraps(type(model).forward)
        def forward(self, labels=None, **kwargs):
            return {"loss": labels.float().mean()}

        model.forward = MethodType(forward, model)

    student, teacher = build_pair(NAME)
    batch = draw(NAME, 3)
    distillation = cdistill.distill(teacher, student)
    expected = distillation(batch)["loss"]
    replace(student)
    with pytest.raises(ValueError, match=r"the student's forward pass has been replaced since distill\(\)") as refused:
        distillation(batch)
    assert "\n" not in str(refused.value)
    assert torch.equal(cdistill.distill(teacher, student)(batch)["loss"], expected)
    student, teacher = build_pair(NAME)
    distillation = cdistill.distill(teacher, student)
    replace(distillation)
    with pytest.raises(
        ValueError, match=r"has been replaced by one whose loss has no teacher .*CompoDistillTrainer"
    ) as refused:
        distillation(**batch)
    assert "\n" not in str(refused.value)


def test_rows_become_batches(tmp_path):
    """Rows of several layouts, by the trainer's own collator, whose processor is saved with the student."""
    image, processor = picture(16, 16), byte_level_processor(NAME)
    image.save(tmp_path / "picture.png")
    question, answer = "How many?", "One."
    parts = [{"type": "image"}, {"type": "text", "text": question}]
    layouts = [
        {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": answer}], "images": [image]},
        {
            "conversations": [{"from": "human", "value": "<image>" + question}, {"from": "gpt", "value": answer}],
            "image": str(tmp_path / "picture.png"),
            "id": None,
        },
        {
            "prompt": [{"role": "user", "content": parts}],
            "completion": [{"role": "assistant", "content": answer}],
            "images": [{"bytes": (tmp_path / "picture.png").read_bytes(), "path": None}],
        },
    ]
    collator = cdistill.train.compodistill.ConversationCollator(processor, "qwen2_base")
    batch = collator(layouts)
    for value in batch.values():
        first = value[: len(value) // 3]
        assert all(torch.equal(part, first) for part in value.split(len(first)))
    labels = batch["labels"][0]
    assert processor.tokenizer.decode(labels[labels != -100]).strip() == answer + "<|endoftext|>"
    visual = processor.tokenizer.convert_tokens_to_ids("<image>")
    seen = processor(text=["<image>"], images=[[image]], return_tensors="pt")
    count = (batch["input_ids"][0] == visual).sum()
    assert count == (seen["input_ids"] == visual).sum() > 1
    torch.testing.assert_close(batch["pixel_values"][0], torch.as_tensor(seen["pixel_values"])[0])
    words = {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
    mixed = collator([words, layouts[0]])
    assert (mixed["input_ids"] == visual).sum(1).tolist() == [0, count] and len(mixed["pixel_values"]) == 1
    assert torch.equal(mixed["labels"][0][mixed["labels"][0] != -100], labels[labels != -100])
    with pytest.raises(ValueError, match="image"):
        collator([layouts[1] | {"image": str(tmp_path / "missing.png")}])


def test_pictures_are_seen_as_their_files_are(tmp_path):
    """Turned, with 16 bits, transparent, in colours of print: a row may hold what PIL opens, or the path."""
    image = picture(16, 24)
    turned, clear = Image.Exif(), image.convert("RGBA")
    turned[0x0112] = 6
    clear.putalpha(image.convert("L"))
    deep = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    processor = byte_level_processor(NAME)
    collator = ConversationCollator(processor, "qwen2_base")
    messages = [{"role": "user", "content": "<image>See?"}, {"role": "assistant", "content": "Yes."}]
    kinds = {"a.png": (image, turned), "b.jpg": (image, turned), "c.png": (clear, None), "d.png": (deep, None)}
    for name, (kept, exif) in (kinds | {"e.jpg": (image.convert("CMYK"), turned)}).items():
        path = tmp_path / name
        kept.save(path, **({} if exif is None else {"exif": exif}))
        expected = open_image(ImageFile(path))
        assert (expected.size == image.size[::-1]) == (exif is not None)
        exact = processor(text=["<image>"], images=[[expected.copy()]], return_tensors="pt")["pixel_values"]
        for given in (Image.open(path), {"bytes": path.read_bytes(), "path": None}, str(path), expected):
            found = collator([{"messages": messages, "images": [given]}])["pixel_values"]
            assert torch.equal(found, torch.as_tensor(exact)), (name, given)
        assert np.array_equal(open_image(find_image(None, Image.open(path), allow_urls=False)), expected)


@pytest.mark.parametrize("given", ["processing_class", "data_collator"])
def test_what_is_saved_asks_and_stops_as_it_has_learned(tmp_path, given):
    """The template is not the processor's own, and its end is not what ends the student's texts."""
    student, teacher = build_pair(NAME)
    processor, template = byte_level_processor(NAME), "qwen2_base"
    args = arguments(
        cdistill.CompoDistillConfig, tmp_path, template=template if given == "processing_class" else "plain"
    )
    options = {"data_collator": ConversationCollator(processor, template)} if given == "data_collator" else {}
    trainer = cdistill.CompoDistillTrainer(student, teacher, args, processing_class=processor, **options)
    trainer.save_model(str(tmp_path / "saved"))
    contract = LabelContract(processor, template)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "saved")
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "How many?"}], add_generation_prompt=True)
    assert prompt["input_ids"] == contract.prompt_ids([Message("user", ("How many?",))])
    ends = GenerationConfig.from_pretrained(tmp_path / "saved").eos_token_id
    assert ends == [*contract.end_ids, build(NAME, 0).generation_config.eos_token_id]
