"""Distil in Lightning: the module holds what `cdistill.distill` returns, and its training step returns the loss.

    pip install pytorch-lightning && python examples/lightning_module.py

The teacher ships with cdistill, the student starts as its first four layers.
"""

import copy
from pathlib import Path

import pytorch_lightning as lightning
import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForImageTextToText, AutoTokenizer

import cdistill
from cdistill.builtin.dataset import BuiltinDataset, Collator
from cdistill.builtin.task import BuiltinTask


class Student(lightning.LightningModule):
    """What is saved in a checkpoint is the student alone."""

    def __init__(self, teacher, student):
        super().__init__()
        self.model = cdistill.distill(teacher, student)
        self.history = []

    def training_step(self, batch, index):
        losses = self.model(batch)
        self.log_dict({name: losses[name] for name in ("ar", "kd", "vat")}, prog_bar=True)
        self.history.append(losses["loss"].item())
        return losses["loss"]

    def configure_optimizers(self):
        return torch.optim.AdamW((p for p in self.parameters() if p.requires_grad), lr=3e-3)


folder = Path(cdistill.__file__).parent / "assets" / "teacher"
teacher = AutoModelForImageTextToText.from_pretrained(folder)
student = copy.deepcopy(teacher)
del student.model.language_model.layers[4:]
student.config.text_config.update({"num_hidden_layers": 4, "layer_types": ["full_attention"] * 4})

samples = BuiltinDataset(BuiltinTask(caption=1.0, sentences=2, turns=0), size=48, seed=0)
collate = Collator(AutoTokenizer.from_pretrained(folder).pad_token_id)
loader = DataLoader(samples, batch_size=8, collate_fn=collate)

module = Student(teacher, student.train())
trainer = lightning.Trainer(
    max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_model_summary=False
)
trainer.fit(module, loader)

print(f"loss {module.history[0]:.3f} -> {module.history[-1]:.3f}")
