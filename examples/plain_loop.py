"""Distil in a loop of your own: `cdistill.distill` gives the losses, everything else stays yours.

    python examples/plain_loop.py

The teacher ships with cdistill, the student starts as its first four layers. Put your own models and batches in their place.
"""

import copy
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForImageTextToText, AutoTokenizer

import cdistill
from cdistill.builtin.dataset import BuiltinDataset, Collator
from cdistill.builtin.task import BuiltinTask

folder = Path(cdistill.__file__).parent / "assets" / "teacher"
teacher = AutoModelForImageTextToText.from_pretrained(folder)
student = copy.deepcopy(teacher)
del student.model.language_model.layers[4:]
student.config.text_config.update({"num_hidden_layers": 4, "layer_types": ["full_attention"] * 4})

samples = BuiltinDataset(BuiltinTask(caption=1.0, sentences=2, turns=0), size=48, seed=0)
collate = Collator(AutoTokenizer.from_pretrained(folder).pad_token_id)
loader = DataLoader(samples, batch_size=8, collate_fn=collate)  # input_ids, attention_mask, pixel_values, labels

distillation = cdistill.distill(teacher, student).train()  # the teacher and the student's vision encoder are frozen
optimizer = torch.optim.AdamW((p for p in distillation.parameters() if p.requires_grad), lr=3e-3)
history = []
for batch in loader:
    losses = distillation(batch)  # loss = ar + kd + vat
    losses["loss"].backward()
    optimizer.step()
    optimizer.zero_grad()
    history.append(losses["loss"].item())
    print("  ".join(f"{name} {losses[name].item():.3f}" for name in ("loss", "ar", "kd", "vat")))

print(f"loss {history[0]:.3f} -> {history[-1]:.3f}")
