"""Distil with `CompoDistillTrainer`, a subclass of transformers' Trainer. Rows are conversations with their images.

    python examples/trainer.py

The teacher ships with cdistill, the student starts as its first four layers. Put your own models and rows in their place.
"""

import copy
from pathlib import Path

from transformers import AutoModelForImageTextToText, AutoProcessor

import cdistill
from cdistill.builtin.dataset import BuiltinDataset
from cdistill.builtin.task import BuiltinTask

folder = Path(cdistill.__file__).parent / "assets" / "teacher"
teacher = AutoModelForImageTextToText.from_pretrained(folder)
student = copy.deepcopy(teacher)
del student.model.language_model.layers[4:]
student.config.text_config.update({"num_hidden_layers": 4, "layer_types": ["full_attention"] * 4})

samples = BuiltinDataset(BuiltinTask(caption=1.0, sentences=2, turns=0), size=48, seed=0)
rows = [{"messages": samples.messages(i)} for i in range(len(samples))]  # {"role": ..., "content": [image, text]}, ...

args = cdistill.CompoDistillConfig(
    "runs/example-trainer",
    per_device_train_batch_size=4,
    gradient_accumulation_steps=2,
    learning_rate=3e-3,
    num_train_epochs=1,
    logging_steps=1,
    report_to="none",
    save_strategy="no",
    use_cpu=True,
    vat={"layers": "all"},
)
trainer = cdistill.CompoDistillTrainer(
    model=student,
    teacher_model=teacher,
    args=args,
    train_dataset=rows,
    processing_class=AutoProcessor.from_pretrained(folder),
)
trainer.train()  # logs loss, ar, kd and vat, means over the global batch

history = [log["loss"] for log in trainer.state.log_history if "loss" in log]
print(f"loss {history[0]:.3f} -> {history[-1]:.3f}")
