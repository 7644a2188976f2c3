"""Distil in TRL's SFTTrainer: it makes the batches and drives the run, `cdistill.distill` gives the loss.

    pip install trl && python examples/trl_sft.py

The teacher ships with cdistill, the student starts as its first four layers. This works in one process; on several, use
`cdistill.CompoDistillTrainer`, which counts labels and samples over all of them.
"""

import copy
from pathlib import Path

from datasets import Dataset
from transformers import AutoModelForImageTextToText, AutoProcessor
from trl import SFTConfig, SFTTrainer

import cdistill
from cdistill.builtin.dataset import BuiltinDataset
from cdistill.builtin.task import BuiltinTask


class DistillationSFTTrainer(SFTTrainer):
    """SFTTrainer whose loss has a teacher."""

    def __init__(self, *args, teacher, **options):
        super().__init__(*args, **options)
        self.distillation = cdistill.distill(teacher, self.model)  # behind SFTTrainer, which replaces a forward pass

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        losses = self.distillation(inputs)
        return (losses["loss"], losses) if return_outputs else losses["loss"]


folder = Path(cdistill.__file__).parent / "assets" / "teacher"
teacher = AutoModelForImageTextToText.from_pretrained(folder)
student = copy.deepcopy(teacher)
del student.model.language_model.layers[4:]
student.config.text_config.update({"num_hidden_layers": 4, "layer_types": ["full_attention"] * 4})


def row(messages):
    """TRL's form: a prompt, the completion that is learned, and the images beside them."""
    image = messages[0]["content"][0].pop("image")
    return {"prompt": messages[:1], "completion": messages[1:2], "images": [image]}


samples = BuiltinDataset(BuiltinTask(caption=1.0, sentences=2, turns=0), size=48, seed=0)
args = SFTConfig(
    "runs/example-trl",
    per_device_train_batch_size=8,
    learning_rate=3e-3,
    num_train_epochs=1,
    max_length=None,
    logging_steps=1,
    report_to="none",
    save_strategy="no",
    use_cpu=True,
    bf16=False,
)
trainer = DistillationSFTTrainer(
    model=student,
    teacher=teacher,
    args=args,
    train_dataset=Dataset.from_list([row(samples.messages(i)) for i in range(len(samples))]),
    processing_class=AutoProcessor.from_pretrained(folder),
)
trainer.train()

history = [log["loss"] for log in trainer.state.log_history if "loss" in log]
print(f"loss {history[0]:.3f} -> {history[-1]:.3f}")
