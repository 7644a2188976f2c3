"""One global batch, one gradient: `CompoDistillTrainer` and `Distillation` on two processes against a plain loop on one."""

import copy
import warnings

import pytest
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, PartialState
from family_models import QUIET, build_pair, collate, draw_samples
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForImageTextToText
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

import cdistill
from cdistill.vat import VATConfig

STEPS, RATE = 3, 0.05
ALL = VATConfig(layers="all")
ZERO = {
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
    "gradient_clipping": "auto",  # 1.0 without it
}
MODES = {
    "ddp": {},
    "fsdp2": {"fsdp": True},
    "zero2": {"deepspeed": {**ZERO, "zero_optimization": {"stage": 2}}},
    "zero3": {
        "deepspeed": {
            **ZERO,
            "zero_optimization": {
                "stage": 3,
                "stage3_gather_16bit_weights_on_model_save": True,
                "stage3_param_persistence_threshold": 0,
            },
        }
    },
}


def samples_of(name):
    """Eight, whose micro-batches hold images, several or none, and other numbers of labels."""
    return draw_samples(name, 3) + draw_samples(name, 4)


def sgd(model):
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=RATE)


def oracle(name):
    """Weights after three steps of a plain loop on the whole batch, and its losses."""
    student, teacher = build_pair(name)
    distillation = cdistill.distill(teacher, student, vat=ALL).train()
    optimizer, history, batch = sgd(distillation), [], collate(name, samples_of(name))[0]
    for _ in range(STEPS):
        losses = distillation(batch)
        losses["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        history.append({key: losses[key].item() for key in ("loss", "ar", "kd", "vat")})
    return {key: value.detach() for key, value in student.state_dict().items()}, history


class InOrder(cdistill.CompoDistillTrainer):
    """Takes samples as they come, and counts the batches that it learns from."""

    batches = 0

    def _get_train_sampler(self, *args):
        return torch.utils.data.SequentialSampler(self.train_dataset)

    def training_step(self, *args, **kwargs):
        self.batches += 1
        return super().training_step(*args, **kwargs)


def arguments(kind, output, **options):
    common = {
        "learning_rate": RATE,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        **QUIET,
    }
    return kind(output_dir=str(output), **(common | options))


def fresh_accelerator():
    unset_hf_deepspeed_config()  # under ZeRO-3's a model would be made in parts
    AcceleratorState._reset_state()
    PartialState._reset_state()


class Stream(torch.utils.data.IterableDataset):
    """Samples without a length."""

    def __init__(self, samples):
        self.samples = samples

    def __iter__(self):
        return iter(self.samples)


def trainer_on_a_rank(name, mode, output, *, stream=False, eval_dataset=None, **options):
    warnings.simplefilter("ignore")
    fresh_accelerator()
    student, teacher = build_pair(name)
    settings = copy.deepcopy(MODES[mode]) | options
    if mode == "fsdp2":
        settings["fsdp_config"] = {
            "transformer_layer_cls_to_wrap": [type(student.model.language_model.layers[0]).__name__]
        }
    return InOrder(
        model=student,
        teacher_model=teacher,
        args=arguments(cdistill.CompoDistillConfig, output, vat={"layers": "all"}, **settings),
        train_dataset=Stream(samples_of(name)) if stream else samples_of(name),
        eval_dataset=eval_dataset,
        data_collator=lambda samples: collate(name, samples)[0],
    )


def train_on_a_rank(name, mode, output, options):
    """The losses that a rank logs; it leaves the student in a folder."""
    trainer = trainer_on_a_rank(name, mode, output, **options)
    trainer.train()
    trainer.save_model(str(output))
    names = ("loss", "ar", "kd", "vat")
    return [{key: entry[key] for key in names} for entry in trainer.state.log_history if "ar" in entry]


@pytest.mark.parametrize(
    ("name", "mode", "options"),
    [
        ("llava_llama", "ddp", {}),
        ("qwen2_vl", "ddp", {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}),
        ("llava_llama", "fsdp2", {}),
        ("qwen2_vl", "fsdp2", {"gradient_checkpointing": True}),
        ("qwen2_vl", "zero2", {"gradient_checkpointing": True}),
        ("llava_llama", "zero2", {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}),
        ("llava_llama", "zero3", {}),
        ("qwen2_vl", "ddp", {"stream": True}),
    ],
)
def test_trainer_on_two_processes_trains_as_a_plain_loop(ranks, tmp_path, name, mode, options):
    weights, history = oracle(name)
    logged = ranks.call(train_on_a_rank, name, mode, tmp_path, options)
    for found, expected in zip(logged[0], history, strict=True):
        assert found == pytest.approx(expected, rel=1e-4)
    saved = AutoModelForImageTextToText.from_pretrained(tmp_path).state_dict()
    assert saved.keys() == weights.keys()
    for key, value in weights.items():
        torch.testing.assert_close(saved[key], value, rtol=1e-4, atol=2e-5, msg=lambda m, k=key: f"{k}: {m}")


def resume_on_a_rank(name, mode, output):
    """Losses and batches of a run that logs each of three steps, and of one that goes on after the second, amid an epoch."""
    options = {
        "save_strategy": "steps",
        "save_steps": 2,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 1,
    }
    options |= {"optim": "adamw_torch", "learning_rate": 0.01, "lr_scheduler_type": "linear"}  # which have a state
    whole = trainer_on_a_rank(name, mode, output, **options)
    whole.train()
    whole.save_model(str(output / "whole"))
    resumed = trainer_on_a_rank(name, mode, output, **options)
    resumed.train(resume_from_checkpoint=str(output / "checkpoint-2"))
    resumed.save_model(str(output / "resumed"))
    return [([entry["loss"] for entry in t.state.log_history if "ar" in entry], t.batches) for t in (whole, resumed)]


@pytest.mark.parametrize("mode", MODES)
def test_a_resumed_run_on_two_processes_ends_with_the_same_bits(ranks, tmp_path, mode):
    for (whole, batches), (resumed, further) in ranks.call(resume_on_a_rank, "llava_llama", mode, tmp_path):
        assert len(whole) == STEPS and resumed == whole
        assert batches == STEPS and further == STEPS - 2  # it does not start anew
    whole, resumed = (
        AutoModelForImageTextToText.from_pretrained(tmp_path / which).state_dict() for which in ("whole", "resumed")
    )
    assert all(torch.equal(value, resumed[key]) for key, value in whole.items())


def best_on_a_rank(name, mode, output):
    """Losses of evaluation after each of three steps, and after the run has loaded the best weights."""
    each = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    options = {"learning_rate": 2.0, "load_best_model_at_end": True, "metric_for_best_model": "loss"}
    trainer = trainer_on_a_rank(name, mode, output, eval_dataset=samples_of(name)[:5], **each, **options)
    trainer.train()
    return [h["eval_loss"] for h in trainer.state.log_history if "eval_loss" in h], trainer.evaluate()["eval_loss"]


@pytest.mark.parametrize("mode", MODES)
def test_a_run_on_two_processes_ends_with_its_best_weights(ranks, tmp_path, mode):
    for losses, last in ranks.call(best_on_a_rank, "llava_llama", mode, tmp_path):
        assert len(losses) == STEPS and min(losses) < losses[-1]
        assert last == pytest.approx(min(losses), rel=1e-6)


def evaluate_on_a_rank(name, output, options):
    """Losses of five samples, of which two processes get whole batches."""
    fresh_accelerator()
    student, teacher = build_pair(name)
    trainer = cdistill.CompoDistillTrainer(
        model=student,
        teacher_model=teacher,
        args=arguments(
            cdistill.CompoDistillConfig,
            output,
            vat={"layers": "all", "rows": "all"},
            **options,
        ),
        eval_dataset=samples_of(name)[:5],
        data_collator=lambda samples: collate(name, samples)[0],
    )
    found = trainer.evaluate()
    return {key: found[f"eval_{key}"] for key in ("loss", "ar", "kd", "vat")}


@pytest.mark.parametrize(
    "options",
    [
        {"per_device_eval_batch_size": 2},
        {"per_device_eval_batch_size": 4},
        {"per_device_eval_batch_size": 4, "accelerator_config": {"split_batches": True}},
        {"per_device_eval_batch_size": 2, "deepspeed": MODES["zero3"]["deepspeed"]},
    ],
    ids=str,
)
def test_evaluation_counts_no_sample_twice(ranks, tmp_path, options):
    student, teacher = build_pair("qwen2_vl")
    batch = collate("qwen2_vl", samples_of("qwen2_vl")[:5])[0]
    with torch.no_grad():
        expected = cdistill.distill(teacher, student, vat=VATConfig(layers="all", rows="all"))(batch)
    for found in ranks.call(evaluate_on_a_rank, "qwen2_vl", tmp_path, options):
        assert found == pytest.approx({key: expected[key].item() for key in found}, rel=1e-5)


def refused_on_a_rank(name, output, options, stream):
    """What the trainer says, or a later call of evaluate."""
    samples, said = samples_of(name), []
    for later in (False, True) if stream else (False,):
        data = Stream(samples) if stream else samples
        try:
            trainer = trainer_on_a_rank(name, "ddp", output, **options, **({} if later else {"eval_dataset": data}))
            trainer.evaluate(data)
        except ValueError as error:
            said.append(str(error))
    return said


@pytest.mark.parametrize(
    ("options", "stream", "message"),
    [
        ({}, True, "eval_dataset must not be a stream on several processes"),
        ({"accelerator_config": {"even_batches": False}}, False, "accelerator_config: even_batches must be True"),
    ],
)
def test_ways_that_would_hang_or_count_twice_are_refused(ranks, tmp_path, options, stream, message):
    for said in ranks.call(refused_on_a_rank, "qwen2_vl", tmp_path, options, stream):
        assert len(said) == 1 + stream and all(message in one and "\n" not in one for one in said)


def gradients_of(student):
    full = [
        (n, p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad) for n, p in student.named_parameters()
    ]
    return {name: grad for name, grad in full if grad is not None}


def pair_with_one_encoder(name):
    student, teacher = build_pair(name)
    if name == "llava_qwen2":
        teacher.model.vision_tower.load_state_dict(student.model.vision_tower.state_dict())
    return student, teacher


def distillation_on_a_rank(name, way):
    """Gradients of one step on this rank's half of the batch, with the numbers of the whole batch."""
    from torch.distributed.fsdp import fully_shard

    student, teacher = pair_with_one_encoder(name)
    layers = student.model.language_model.layers
    if way == "fully_shard before":
        for module in (*layers, student.lm_head, student):
            fully_shard(module)
    distillation = cdistill.distill(teacher, student, vat=ALL).train()
    if way == "fully_shard after":
        for module in (*layers, distillation):
            fully_shard(module)
    rank, world = dist.get_rank(), dist.get_world_size()
    parts = [collate(name, samples_of(name)[i::world])[0] for i in range(world)]
    tokens, samples = (sum(n) for n in zip(*(distillation.count(part) for part in parts), strict=True))
    model = DistributedDataParallel(distillation) if way == "ddp" else distillation
    for _ in range(2):  # the second finds all hooks as the first did
        student.zero_grad()
        losses = model(parts[rank], num_items_in_batch=tokens, num_samples_in_batch=samples)
        (losses["loss"] * world).backward()
    return gradients_of(student)


@pytest.mark.parametrize(
    ("name", "way"),
    [("qwen2_vl", "ddp"), ("llava_qwen2", "fully_shard before"), ("llava_qwen2", "fully_shard after")],
)
def test_distillation_on_two_processes_has_the_gradient_of_one(ranks, name, way):
    student, teacher = pair_with_one_encoder(name)
    cdistill.distill(teacher, student, vat=ALL).train()(collate(name, samples_of(name))[0])["loss"].backward()
    expected = gradients_of(student)
    for found in ranks.call(distillation_on_a_rank, name, way):
        assert found.keys() == expected.keys()
        for key, exact in expected.items():
            scale = expected[key.replace("k_proj.bias", "k_proj.weight")].abs().max()
            assert (found[key] - exact).abs().max() <= 2e-5 * scale, key


def sharded_teacher_on_a_rank(name):
    """What a call says whose teacher FSDP 2 shards as a whole."""
    from torch.distributed.fsdp import fully_shard

    student, teacher = build_pair(name)
    distillation = cdistill.distill(teacher, student)
    fully_shard(teacher)
    try:
        distillation(collate(name, samples_of(name)[:2])[0])
    except ValueError as error:
        return str(error)
    return "nothing"


def test_a_teacher_that_is_sharded_as_a_whole_is_refused(ranks):
    for said in ranks.call(sharded_teacher_on_a_rank, "qwen2_vl"):
        assert said.startswith("the teacher is sharded as a whole by fully_shard") and "\n" not in said


def misuse_on_a_rank(name, way):
    """What a call says that goes around what wraps the student, or that FSDP 1 wraps."""
    student, teacher = build_pair(name)
    distillation = cdistill.distill(teacher, student)
    samples = samples_of(name)
    batch = collate(name, samples[:2])[0]
    try:
        if way == "FSDP 1":
            FullyShardedDataParallel(distillation, device_id=torch.device("cpu"), use_orig_params=True)(batch)
            return "nothing"
        wrapped = DistributedDataParallel(student if way == "student" else distillation)
        with torch.no_grad():
            distillation(batch)  # evaluation may go around it
        distillation(batch)
        del wrapped
    except ValueError as error:
        return str(error)
    return "nothing"


@pytest.mark.parametrize(
    ("way", "message"),
    [
        ("student", "belong to a DistributedDataParallel, and this call goes around it"),
        ("distillation", "belong to a DistributedDataParallel, and this call goes around it"),
        ("FSDP 1", "FullyShardedDataParallel (FSDP 1) flattens the weights that the losses read"),
    ],
)
def test_calls_that_would_go_around_what_wraps_the_student_are_refused(ranks, way, message):
    for said in ranks.call(misuse_on_a_rank, "qwen2_vl", way):
        assert message in said and "\n" not in said
