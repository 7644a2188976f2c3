"""One step of distilled fine-tuning on the CPU, with alignment, without it, and with it from whole attention matrices.

`python -m benchmarks._dft_step WAY SHAPE` prints what a step of one way adds to the memory of a fresh process, and its whole
peak, in MB.
"""

import copy
import sys
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Qwen2Config, SiglipVisionConfig

from cdistill.models.llava import compose
from cdistill.train.model import DistillationModel
from cdistill.train.objectives import OBJECTIVES, set_trained
from cdistill.vat import VAT, VATConfig

IMAGE, VOCABULARY = 5, 4096
OFF, ON, EAGER = "VAT off", "VAT on", "eager output_attentions"
WAYS = (OFF, ON, EAGER)


class Shape(NamedTuple):
    """A batch, and the student's language model; the teacher's is half as wide again and half as deep again."""

    samples: int
    tokens: int
    answers: int
    grid: int  # visual tokens are its square
    width: int
    layers: int


SHAPES = {
    "T2048": Shape(1, 2048, 256, 27, 256, 8),  # the paper's lengths
    "T512": Shape(4, 512, 64, 16, 128, 6),
    "T128": Shape(8, 128, 40, 6, 128, 4),  # about the built-in task's
}


class Step:
    """Student, teacher and optimizer of one way, and the batch."""

    def __init__(self, way: str, shape: Shape, dtype: torch.dtype = torch.float32) -> None:
        self.way, self.matches = way, VAT(VATConfig(rows="answer"), shape.layers, shape.layers * 3 // 2).matches
        torch.manual_seed(0)
        teacher = compose(_vision(shape), _text(shape, 3), image_token_id=IMAGE, image_seq_length=shape.grid**2)
        self.student: Any = compose(
            _vision(shape), _text(shape, 2), image_token_id=IMAGE, image_seq_length=shape.grid**2, teacher=teacher
        )
        self.student.to(dtype)
        teacher.to(dtype).eval()
        set_trained(self.student, OBJECTIVES["dft"])
        self.batch = _batch(shape, dtype)
        self.teacher: Any = teacher
        if way == EAGER:
            for model in (self.student, teacher):
                model.set_attn_implementation({"text_config": "eager"})
        else:
            vat = VAT(VATConfig(rows="answer"), shape.layers, shape.layers * 3 // 2) if way == ON else None
            terms = OBJECTIVES["dft"].terms(vat=vat)
            self.losses = DistillationModel(self.student, terms, teacher=copy.deepcopy(teacher))
        trained = [p for p in self.student.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)

    def loss(self) -> Tensor:
        """L_ar + L_kd + L_vat, means over labels and samples."""
        labels = self.batch["labels"]
        if self.way == EAGER:
            return _eager_loss(self.student, self.teacher, self.batch, self.matches)
        sums = self.losses(**self.batch)
        total = (sums["ar"] + sums["kd"]) / (labels != -100).sum()
        return total + sums["vat"] / len(labels) if "vat" in sums else total

    def run(self) -> None:
        """Forward, backward and the optimizer."""
        self.loss().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def gradients(self) -> list[Tensor]:
        """The loss and its gradients."""
        trained = [p for p in self.student.parameters() if p.requires_grad]
        loss = self.loss()
        return [loss.detach(), *torch.autograd.grad(loss, trained)]


def _text(shape: Shape, halves: int) -> Qwen2Config:
    width = shape.width * halves // 2
    return Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=shape.layers * halves // 2,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
        max_position_embeddings=4096,
        initializer_range=0.05,
    )


def _vision(shape: Shape) -> SiglipVisionConfig:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    return SiglipVisionConfig(**sizes, image_size=shape.grid * 8, patch_size=8, vision_use_head=False)


def _batch(shape: Shape, dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(IMAGE + 1, VOCABULARY, (shape.samples, shape.tokens), generator=generator)
    ids[:, 3 : 3 + shape.grid**2] = IMAGE
    labels = torch.full_like(ids, -100)
    labels[:, -shape.answers :] = ids[:, -shape.answers :]
    pixels = torch.randn(shape.samples, 3, shape.grid * 8, shape.grid * 8, generator=generator, dtype=torch.float64)
    return {"input_ids": ids, "labels": labels, "pixel_values": pixels.to(dtype)}


def _eager_loss(student: Any, teacher: Any, batch: dict[str, Tensor], matches: Any) -> Tensor:
    """The same from whole matrices, as the authors' scripts and a user without the op make it."""
    inputs = {name: batch[name] for name in ("input_ids", "pixel_values")}
    with torch.no_grad():
        theirs = teacher(**inputs, output_attentions=True)
    ours = student(**inputs, output_attentions=True)
    labels = batch["labels"][:, 1:]
    answers = labels != -100
    p, q = ours.logits[:, :-1][answers].log_softmax(-1), theirs.logits[:, :-1][answers].log_softmax(-1)
    loss = F.nll_loss(p, labels[answers]) + F.kl_div(p, q, log_target=True, reduction="batchmean")
    rows, cols = (batch["labels"][0] != -100).nonzero()[:, 0], (batch["input_ids"][0] == IMAGE).nonzero()[:, 0]

    def looks(attention: Tensor) -> Tensor:
        return attention.mean(1)[:, rows][:, :, cols]

    layers = []
    for match in matches:
        target = torch.stack([looks(theirs.attentions[j]) for j in match.teachers]).mean(0)
        layers.append((1 - F.cosine_similarity(looks(ours.attentions[match.student]), target, dim=-1)).mean())
    return loss + torch.stack(layers).mean()


def _resident(field: str) -> float:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) / 1024 for line in status if line.startswith(field))


def main(way: str, shape: str) -> None:
    torch.set_num_threads(1)
    step = Step(way, SHAPES[shape])
    step.run()
    with open("/proc/self/clear_refs", "w") as clear_refs:
        clear_refs.write("5")  # forget the peak so far
    before = _resident("VmRSS")
    step.run()
    print(_resident("VmHWM") - before, _resident("VmHWM"))


if __name__ == "__main__":
    main(*sys.argv[1:])
