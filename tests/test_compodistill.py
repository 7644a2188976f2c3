"""transformers' Trainer around a `Distillation`: the gradient of a step is that of its global batch, however it is cut."""

import pytest
import torch
from family_models import build_pair, collate, draw_samples
from transformers import Trainer, TrainingArguments

import cdistill

NAME = "llava_llama"


class Beside(Trainer):
    """Leaves out the number of items."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return model(inputs)["loss"]


def change(kind, folder, micro, accumulated):
    """What one step of SGD takes from the student's weights."""
    student, teacher = build_pair(NAME)
    distillation = cdistill.distill(teacher, student)
    before = torch.cat([p.detach().flatten() for p in student.parameters()])
    args = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=accumulated,
        max_steps=1,
        learning_rate=1.0,
        lr_scheduler_type="constant",
        optim="sgd",
        max_grad_norm=0.0,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        remove_unused_columns=False,
        disable_tqdm=True,
    )
    samples = draw_samples(NAME, 3)
    kind(model=distillation, args=args, train_dataset=samples, data_collator=lambda s: collate(NAME, s)[0]).train()
    return before - torch.cat([p.detach().flatten() for p in student.parameters()])


@pytest.mark.parametrize("kind", [Trainer, Beside])
def test_accumulated_batches_have_the_gradient_of_one(tmp_path, kind):
    whole = change(Trainer, tmp_path, 4, 1)
    for micro, accumulated in ((2, 2), (1, 4)):
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
    assert losses["loss"] == 0
    with pytest.raises(ValueError, match="num_samples_in_batch must be given"):
        distillation(batch, num_items_in_batch=5)
