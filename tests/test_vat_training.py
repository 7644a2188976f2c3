"""Training steps through the hook: gradient checkpointing, attention engines, evaluation without gradients."""

import pytest
import torch
from vat_models import (
    STUDENT_LAYERS,
    TEACHER_LAYERS,
    draw_batch,
    gradients,
    inputs,
    record_everything,
    regions_of,
    student_and_teacher,
    vat_loss,
)

from cdistill.vat import VAT, SliceRecorder, StudentAlignment, VATConfig, install


def training_step(student, teacher, batch, checkpointing, engine="sdpa", **choices):
    student.zero_grad()
    student.train()
    if checkpointing is None:
        student.gradient_checkpointing_disable()
    else:
        student.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": checkpointing})
    vat = VAT(VATConfig(layers="all", engine=engine, **choices), STUDENT_LAYERS, TEACHER_LAYERS, impl="torch")
    targets = vat.teacher(regions_of(batch), batch["attention_mask"])
    with torch.no_grad():
        teacher(**inputs(batch), cdistill_vat=targets)
    alignment = vat.student(regions_of(batch), targets, batch["attention_mask"])
    language_loss = student(**batch, cdistill_vat=alignment).loss
    recorded = alignment.losses()
    (language_loss + alignment.loss()).backward()
    assert all(losses is recorded[layer] for layer, losses in alignment.losses().items())
    return alignment, {name: grad.clone() for name, grad in gradients(student).items()}


@pytest.mark.parametrize("engine", ["sdpa", "torch_flash"])
def test_checkpointing_changes_no_bit(engine, monkeypatch):
    student, teacher = student_and_teacher()
    install(student)
    install(teacher)
    batch = draw_batch(9)
    recorded = []
    real_record = StudentAlignment.record

    def counting(self, layer, *args, **kwargs):
        recorded.append(layer)
        return real_record(self, layer, *args, **kwargs)

    monkeypatch.setattr(StudentAlignment, "record", counting)
    plain, plain_grads = training_step(student, teacher, batch, None, engine)
    assert sorted(recorded) == [0, 1, 2, 3]
    recorded.clear()
    checkpointed, grads = training_step(student, teacher, batch, False, engine)
    assert sorted(recorded) == [0, 0, 1, 1, 2, 2, 3, 3]
    assert torch.equal(plain.loss(), checkpointed.loss())
    assert grads.keys() == plain_grads.keys()
    assert all(torch.equal(grads[name], plain_grads[name]) for name in grads)


@pytest.mark.parametrize("checkpointing", [None, False])
@pytest.mark.parametrize("choices", [{}, {"loss": "jsd", "reduction": "matrix"}], ids=["cosine", "jsd-matrix"])
def test_recomputed_targets_train_as_stored_ones_do(choices, checkpointing):
    student, teacher = student_and_teacher()
    install(student)
    install(teacher)
    batch = draw_batch(22, "left")
    stored, wanted = training_step(student, teacher, batch, None, **choices)
    recomputed, found = training_step(student, teacher, batch, checkpointing, target="recomputed", **choices)
    torch.testing.assert_close(recomputed.loss(), stored.loss(), rtol=1e-5, atol=1e-7)
    assert found.keys() == wanted.keys()
    for name, grad in found.items():
        scale = wanted[name.replace("k_proj.bias", "k_proj.weight")].abs().max()
        assert (grad - wanted[name]).abs().max() <= 1e-5 * scale, name


def test_recomputed_targets_keep_no_slice_and_need_every_layer():
    _, teacher = student_and_teacher()
    install(teacher)
    batch, vat = draw_batch(23), VAT(VATConfig(target="recomputed"), STUDENT_LAYERS, TEACHER_LAYERS)
    targets = vat.teacher(regions_of(batch), batch["attention_mask"])
    with pytest.raises(ValueError, match=r"layers \[.*\] were not recorded"):
        vat.student(regions_of(batch), targets, batch["attention_mask"])
    with torch.inference_mode():
        teacher(**inputs(batch), cdistill_vat=targets)
    kept = [x for layer in targets._recorded.values() for x in layer[:2]]
    tokens = batch["input_ids"].shape[1]
    assert len(kept) == 2 * len(targets.layers) and all(x.shape[2] == tokens and x.is_inference() for x in kept)
    targets._recorded[min(targets.layers)] = (*targets._recorded[min(targets.layers)][:2], 0.123)
    with pytest.raises(ValueError, match=r"scale their scores differently .* use vat.target stored"):
        list(targets.windows(vat.matches[0], masked=False))


@pytest.mark.parametrize("engine", ["torch_flash", "triton"])
@pytest.mark.parametrize("padding", ["left", "right"])
def test_engines_train_as_sdpa_does(padding, engine):
    """Language model loss and alignment together, so that gradients of the output and of the losses meet."""
    student, teacher = student_and_teacher()
    install(student)
    install(teacher)
    batch = draw_batch(20, padding)
    beside, wanted = training_step(student, teacher, batch, None)
    inside, found = training_step(student, teacher, batch, None, engine)
    torch.testing.assert_close(inside.loss(), beside.loss())
    assert found.keys() == wanted.keys()
    for name, grad in found.items():
        scale = wanted[name.replace("k_proj.bias", "k_proj.weight")].abs().max()
        assert (grad - wanted[name]).abs().max() <= 1e-5 * scale, name


def test_engines_under_autocast_and_their_limits():
    student, teacher = student_and_teacher()
    install(student)
    install(teacher)
    batch = draw_batch(21)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        beside, inside = (training_step(student, teacher, batch, None, e)[0].loss() for e in ("sdpa", "torch_flash"))
        torch.testing.assert_close(inside, beside, rtol=0.05, atol=0)
    with pytest.raises(ValueError, match="engine='torch_cudnn' needs CUDA tensors"):
        training_step(student, teacher, batch, None, "torch_cudnn")
    student.config.text_config.attention_dropout = 0.1
    for layer in student.model.language_model.layers:
        layer.self_attn.attention_dropout = 0.1
    with pytest.raises(ValueError, match="attention dropout"):
        training_step(student, teacher, batch, None, "torch_flash")


def test_reentrant_checkpointing_is_refused():
    student, teacher = student_and_teacher()
    install(student)
    install(teacher)
    student.enable_input_require_grads()
    with pytest.raises(ValueError, match="'use_reentrant': False"):
        training_step(student, teacher, draw_batch(10), True)


def test_what_is_watched_in_training_is_recorded_once_under_reentrant_checkpointing():
    student, _ = student_and_teacher()
    install(student)
    batch = draw_batch(12)
    expected = record_everything(student, batch).slices[1]
    student.train().enable_input_require_grads()
    student.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    runs = []
    student.model.language_model.layers[1].self_attn.register_forward_hook(
        lambda *_: runs.append(torch.is_grad_enabled())
    )
    recorder = SliceRecorder([1], regions_of(batch), key_mask=batch["attention_mask"], impl="torch")
    student(**batch, cdistill_vat=recorder).loss.backward()
    assert runs == [False, True]
    assert torch.equal(recorder.slices[1], expected)


def test_evaluation_without_gradient():
    student, teacher = student_and_teacher()
    install(student)
    install(teacher)
    batch, vat = draw_batch(11), VAT(VATConfig(), STUDENT_LAYERS, TEACHER_LAYERS, impl="torch")
    with torch.no_grad():
        evaluated = vat_loss(student, teacher, batch, vat).loss()
    assert not evaluated.requires_grad
    assert torch.equal(evaluated, vat_loss(student, teacher, batch, vat).loss())
