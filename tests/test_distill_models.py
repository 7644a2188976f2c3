"""`cdistill.distill` trains what the caller holds: adapters, encoders and weights as they are when a batch comes."""

import copy
import functools

import peft
import pytest
import torch
from accelerate import Accelerator, cpu_offload
from accelerate.state import AcceleratorState
from family_models import build_pair, draw
from peft import LoraConfig, get_peft_model
from torch import nn

import cdistill

LLAVA = "llava_qwen2"
TEXT = {"task_type": "CAUSAL_LM"}
NAMED = {"target_modules": ["q_proj"]}


def common_encoder():
    student, teacher = build_pair(LLAVA)
    teacher.model.vision_tower.load_state_dict(student.model.vision_tower.state_dict())
    return student, teacher


def vision_gradients(distillation, batch):
    distillation(batch)["loss"].backward()
    tower = distillation.student.model.vision_tower
    return {name for name, p in tower.named_parameters() if p.grad is not None and p.grad.any()}


@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize(
    ("config", "message"),
    [
        (lambda: peft.PromptTuningConfig(num_virtual_tokens=4, **TEXT), "PROMPT_TUNING puts tokens before the text"),
        (lambda: peft.PrefixTuningConfig(num_virtual_tokens=4, **TEXT), "PREFIX_TUNING puts tokens before the text"),
        (lambda: peft.PromptEncoderConfig(num_virtual_tokens=4, **TEXT), "P_TUNING puts tokens before the text"),
        (lambda: peft.PolyConfig(**NAMED), "POLY has a forward pass of its own"),
        (lambda: LoraConfig(alora_invocation_tokens=[5], **TEXT, **NAMED), "LORA needs the places of its invocation"),
    ],
)
def test_peft_methods_that_are_more_than_their_layers(side, config, message):
    pair = dict(zip(("student", "teacher"), build_pair(LLAVA), strict=True))
    pair[side] = get_peft_model(pair[side], config())
    with pytest.raises(ValueError, match=f"^the {side}'s {message}") as error:
        cdistill.distill(pair["teacher"], pair["student"])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "config", [peft.LoHaConfig, peft.IA3Config, peft.OFTConfig, peft.VeraConfig, peft.AdaLoraConfig]
)
def test_peft_methods_that_change_layers_lose_what_they_lose_by_themselves(config):
    student, teacher = build_pair(LLAVA)
    batch = draw(LLAVA, 3)
    options = {"total_step": 10, "orth_reg_weight": 0.0} if config is peft.AdaLoraConfig else {}
    options |= {"feedforward_modules": []} if config is peft.IA3Config else {}
    options |= {"oft_block_size": 4} if config is peft.OFTConfig else {}
    pair = []
    for model in (student, teacher):
        model = get_peft_model(model, config(target_modules=["q_proj", "v_proj"], **options)).eval()
        torch.manual_seed(0)
        for p in model.parameters():
            if p.requires_grad:
                nn.init.normal_(p, std=0.3)
        pair.append(model)
    student, teacher = pair
    losses = cdistill.distill(teacher, student)(batch)
    with torch.no_grad():
        torch.testing.assert_close(losses["ar"], student(**batch).loss, rtol=1e-5, atol=1e-5)
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        chosen = batch["labels"][:, 1:] != -100
        p, q = (m(**inputs).logits[:, :-1][chosen].log_softmax(-1) for m in (student, teacher))
        torch.testing.assert_close(losses["kd"], (q.exp() * (q - p)).sum(-1).mean(), rtol=1e-4, atol=1e-5)
    losses["loss"].backward()
    assert all(p.grad is not None for name, p in student.named_parameters() if p.requires_grad and "language" in name)


def test_the_regulariser_of_adalora_is_not_left_out_in_silence():
    student, teacher = build_pair(LLAVA)
    student = get_peft_model(student, peft.AdaLoraConfig(total_step=10, **NAMED))
    with pytest.raises(ValueError, match=r"ADALORA adds a regulariser to the loss \(orth_reg_weight 0\.5\)"):
        cdistill.distill(teacher, student)
    student, teacher = build_pair(LLAVA)
    cdistill.distill(get_peft_model(teacher, peft.AdaLoraConfig(total_step=10, **NAMED)), student)


@pytest.mark.parametrize("wrap", [nn.DataParallel, nn.Sequential], ids=["DataParallel", "of one's own"])
def test_other_wrappers_belong_around_both_models(wrap):
    student, teacher = build_pair(LLAVA)
    with pytest.raises(ValueError, match=r"the student must be a model of transformers or a peft model, got torch\.nn"):
        cdistill.distill(teacher, wrap(student))


def test_a_compiled_model_is_the_model():
    student, teacher = build_pair(LLAVA)
    batch = draw(LLAVA, 3)
    compiled = [torch.compile(model, backend="eager") for model in (teacher, student)]
    torch.testing.assert_close(
        cdistill.distill(*compiled)(batch)["loss"], cdistill.distill(teacher, student)(batch)["loss"]
    )


def test_a_teacher_that_would_be_trained_too():
    student, teacher = build_pair(LLAVA)
    with pytest.raises(ValueError, match="is trained and also the teacher's"):
        cdistill.distill(student, student)
    adapted = get_peft_model(student, LoraConfig(r=2, **NAMED))
    trained = [name for name, p in adapted.named_parameters() if p.requires_grad]
    with pytest.raises(ValueError, match=r"lora_A\.default\.weight is trained and also the teacher's"):
        cdistill.distill(student, adapted)
    assert [name for name, p in adapted.named_parameters() if p.requires_grad] == trained
    student, _ = build_pair(LLAVA)
    teacher = copy.deepcopy(student)
    teacher.model.multi_modal_projector.linear_1.weight.data = student.model.multi_modal_projector.linear_1.weight.data
    with pytest.raises(ValueError, match=r"linear_1\.weight is trained and also the teacher's"):
        cdistill.distill(teacher, student)


def test_frozen_modules_in_common_stay_in_evaluation_and_frozen():
    student, teacher = build_pair(LLAVA)
    batch = draw(LLAVA, 3)
    expected = cdistill.distill(copy.deepcopy(teacher), student)
    teacher.model.vision_tower.load_state_dict(student.model.vision_tower.state_dict())
    expected = cdistill.distill(copy.deepcopy(teacher), copy.deepcopy(student))(batch)["loss"]
    teacher.model.vision_tower = student.model.vision_tower
    distillation = cdistill.distill(teacher, student)
    student.train()
    torch.testing.assert_close(distillation(batch)["loss"], expected)
    assert not any(module.training for module in teacher.modules())
    student.model.vision_tower.requires_grad_(True)
    with pytest.raises(ValueError, match=r"vision_tower\..* is trained and also the teacher's"):
        distillation(batch)


def test_the_encoder_is_frozen_unless_asked_for():
    student, teacher = common_encoder()
    batch = draw(LLAVA, 3)
    distillation = cdistill.distill(teacher, student)
    assert vision_gradients(distillation, batch) == set()
    student.model.vision_tower.requires_grad_(True)  # later
    late = vision_gradients(distillation, batch)
    student, teacher = common_encoder()
    assert late == vision_gradients(cdistill.distill(teacher, student, train_vision=True), batch) != set()
    student, teacher = common_encoder()
    adapted = get_peft_model(student, LoraConfig(r=2, **NAMED))  # reaches the encoder, too
    before = {name for name, p in adapted.named_parameters() if p.requires_grad}
    distillation = cdistill.distill(teacher, adapted)
    assert {name for name, p in adapted.named_parameters() if p.requires_grad} == before
    assert any("vision_tower" in name for name in before)


@pytest.mark.parametrize("change", ["copied", "assigned", "teacher's"])
def test_weights_that_are_loaded_after_distill(change):
    """The encoders were equal, and are not any more; afterwards they are again."""
    student, teacher = common_encoder()
    batch = draw(LLAVA, 3)
    distillation = cdistill.distill(teacher, student)
    first = distillation(batch)["loss"].item()
    changed = teacher if change == "teacher's" else student
    before = copy.deepcopy(changed.model.vision_tower.state_dict())
    other = {name: t + 0.5 * torch.randn_like(t) if t.is_floating_point() else t for name, t in before.items()}
    changed.model.vision_tower.load_state_dict(other, assign=change == "assigned")
    found = distillation(batch)["loss"].item()
    expected = cdistill.distill(copy.deepcopy(teacher), copy.deepcopy(student))(batch)["loss"].item()
    assert found == pytest.approx(expected, rel=1e-5) and found != pytest.approx(first, rel=1e-3)
    changed.model.vision_tower.load_state_dict(before)
    assert distillation(batch)["loss"].item() == pytest.approx(first, rel=1e-6)


def test_a_head_that_changes_after_distill():
    student, teacher = build_pair(LLAVA)
    batch = draw(LLAVA, 3)
    distillation = cdistill.distill(teacher, student)
    student.lm_head = nn.Sequential(student.lm_head, nn.Tanh())
    with pytest.raises(ValueError, match=r"the student's lm_head must be a torch\.nn\.Linear"):
        distillation(batch)


def halved(head):
    head.register_forward_hook(lambda module, inputs, output: output / 2)


def halved_before(head):
    head.register_forward_pre_hook(lambda module, inputs: (inputs[0] / 2,))


def replaced(head):
    head.forward = lambda x: nn.Linear.forward(head, x) / 2


@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize(
    ("change", "message"),
    [(halved, "a forward hook of"), (halved_before, "a forward hook of"), (replaced, "a forward pass of its own")],
)
def test_what_is_put_around_a_head_is_not_left_out_in_silence(side, change, message):
    student, teacher = build_pair(LLAVA)
    distillation = cdistill.distill(teacher, student)
    batch = draw(LLAVA, 3)
    distillation(batch)
    change((student if side == "student" else teacher).lm_head)
    with pytest.raises(ValueError, match=f"the {side}'s lm_head has {message}"):
        distillation(batch)
    with pytest.raises(ValueError, match=f"the {side}'s lm_head has {message}"):
        cdistill.distill(teacher, student)


def colder(module, inputs, output):
    if hasattr(output, "logits"):
        output.logits = output.logits / 2


def with_colder_logits(model):
    given = model.forward

    @functools.wraps(given)
    def forward(*args, **kwargs):
        output = given(*args, **kwargs)
        output.logits = output.logits / 2
        return output

    model.forward = forward


def beneath_a_library(model):
    with_colder_logits(model)
    model.forward = torch.autocast("cpu", torch.bfloat16)(model.forward)


@pytest.mark.parametrize(
    ("side", "change", "message"),
    [
        ("student", lambda m: m.register_forward_hook(colder), "a forward hook of test_distill_models on the whole"),
        ("teacher", lambda m: m.register_forward_hook(colder), "a forward hook of test_distill_models on the whole"),
        ("teacher", lambda m: m.register_forward_pre_hook(lambda *_: None), "a forward hook of test_distill_models"),
        ("teacher", with_colder_logits, "a forward pass of test_distill_models on the whole model"),
        ("teacher", beneath_a_library, "a forward pass of test_distill_models on the whole model"),
        ("student", lambda m: m.model.register_forward_hook(colder), "a forward hook of .* on its part `model`"),
        ("teacher", lambda m: m.model.register_forward_pre_hook(colder), "a forward hook of .* on its part `model`"),
    ],
)
def test_what_is_put_around_a_model_is_not_left_out_in_silence(side, change, message):
    student, teacher = common_encoder()
    distillation = cdistill.distill(teacher, student)
    batch = draw(LLAVA, 3)
    distillation(batch)
    change(student if side == "student" else teacher)
    for again in (lambda: distillation(batch), lambda: cdistill.distill(teacher, student)):
        with pytest.raises(ValueError, match=f"^the {side} has {message}") as refused:
            again()
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_what_is_put_around_a_peft_model(side):
    pair = dict(zip(("student", "teacher"), build_pair(LLAVA), strict=True))
    pair[side] = get_peft_model(pair[side], LoraConfig(r=2, **NAMED))
    pair[side].register_forward_hook(colder)
    with pytest.raises(ValueError, match=f"^the {side} has a forward hook of test_distill_models on the whole model"):
        cdistill.distill(pair["teacher"], pair["student"])


def prepared(model):
    AcceleratorState._reset_state(reset_partial_state=True)  # a trainer of another file may have left its own
    Accelerator(mixed_precision="bf16").prepare_model(model)


def offloaded(model):
    cpu_offload(model)


def compiled(model):
    model.forward = torch.compile(model.forward, backend="eager")


def once_a_student(model):
    cdistill.distill(build_pair(LLAVA)[1], model, train_vision=True)


@pytest.mark.parametrize("change", [prepared, offloaded, compiled, once_a_student])
def test_what_libraries_put_around_a_teacher_is_its_own(change):
    student, teacher = common_encoder()
    batch = draw(LLAVA, 3)
    expected = cdistill.distill(teacher, student)(batch)["kd"]
    change(teacher)
    assert torch.equal(cdistill.distill(teacher, student)(batch)["kd"], expected)


def test_hooks_before_the_student_and_on_what_distill_returned_do_their_work():
    student, teacher = build_pair(LLAVA)
    batch, seen = draw(LLAVA, 3), []
    distillation = cdistill.distill(teacher, student)
    changed = batch | {"pixel_values": batch["pixel_values"] / 2}
    expected = distillation(changed)["loss"]

    def darker(module, args, kwargs):
        return args, kwargs | {"pixel_values": kwargs["pixel_values"] / 2}

    student.register_forward_pre_hook(darker, with_kwargs=True)
    distillation.register_forward_hook(lambda module, inputs, losses: seen.append(losses["loss"]))
    distillation(batch)
    assert len(seen) == 1 and torch.equal(seen[0], expected)


class Quantised(torch.Tensor):
    """As libraries of quantisation hold weights inside of linear layers."""


def test_a_quantised_head():
    student, teacher = build_pair(LLAVA)
    weight = teacher.lm_head.weight.data
    teacher.lm_head.weight = nn.Parameter(weight.to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(
        ValueError, match=r"the teacher's lm_head has a quantised weight \(Parameter, torch.float8_e4m3fn\)"
    ):
        cdistill.distill(teacher, student)
    teacher.lm_head.weight = nn.Parameter(weight.as_subclass(Quantised), requires_grad=False)
    with pytest.raises(ValueError, match=r"the teacher's lm_head has a quantised weight \(Quantised"):
        cdistill.distill(teacher, student)


@pytest.mark.parametrize(
    "part", ["lm_head", "model.vision_tower", "model.multi_modal_projector", "model.language_model"]
)
def test_offloaded_parts_of_a_teacher(part):
    """Their weights lie elsewhere and are meta tensors between forward passes."""
    student, teacher = common_encoder()
    batch = draw(LLAVA, 3)
    expected = cdistill.distill(copy.deepcopy(teacher), copy.deepcopy(student))(batch)
    cpu_offload(teacher.get_submodule(part), execution_device=torch.device("cpu"))
    found = cdistill.distill(teacher, student)(batch)
    assert any(p.is_meta for p in teacher.parameters())
    for name in ("ar", "kd", "vat"):
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-6)
