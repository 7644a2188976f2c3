"""Distil a student that FSDP 2 shards over processes; losses and gradients are those of one process.

    torchrun --nproc_per_node 2 examples/fsdp2.py

On GPUs it takes nccl and one GPU a process, else gloo and the CPU. The teacher ships with cdistill, the student starts as its
first four layers.
"""

import copy
import os
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, DistributedSampler
from transformers import AutoModelForImageTextToText, AutoTokenizer

import cdistill
from cdistill.builtin.dataset import BuiltinDataset, Collator
from cdistill.builtin.task import BuiltinTask


def train(device):
    """The loss of every step, on each process the whole batch's."""
    folder = Path(cdistill.__file__).parent / "assets" / "teacher"
    teacher = AutoModelForImageTextToText.from_pretrained(folder)
    student = copy.deepcopy(teacher).to(device)
    del student.model.language_model.layers[4:]
    student.config.text_config.update({"num_hidden_layers": 4, "layer_types": ["full_attention"] * 4})

    distillation = cdistill.distill(teacher, student).train()  # the teacher stays whole on every process
    for module in (*student.model.language_model.layers, distillation):
        fully_shard(module)
    optimizer = torch.optim.AdamW((p for p in distillation.parameters() if p.requires_grad), lr=3e-3)

    samples = BuiltinDataset(BuiltinTask(caption=1.0, sentences=2, turns=0), size=48, seed=0)
    collate = Collator(AutoTokenizer.from_pretrained(folder).pad_token_id)
    loader = DataLoader(samples, batch_size=4, collate_fn=collate, sampler=DistributedSampler(samples))
    history = []
    for batch in loader:
        batch = {name: value.to(device) for name, value in batch.items()}
        counts = torch.stack(distillation.count(batch))
        dist.all_reduce(counts)  # labels and samples of the whole batch, by which the losses are divided
        losses = distillation(batch, num_items_in_batch=counts[0], num_samples_in_batch=counts[1])
        (losses["loss"] * dist.get_world_size()).backward()  # FSDP takes the mean of gradients; this makes it their sum
        optimizer.step()
        optimizer.zero_grad()
        loss = losses["loss"].detach()
        dist.all_reduce(loss)
        history.append(loss.item())
    return history


if __name__ == "__main__":
    on_gpus = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpus else torch.device("cpu")
    if on_gpus:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpus else "gloo")
    history = train(device)
    if dist.get_rank() == 0:
        print(f"loss {history[0]:.3f} -> {history[-1]:.3f}")
    dist.destroy_process_group()
