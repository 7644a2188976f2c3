"""What the benchmarks of `linear_distillation` time: problem sizes, their inputs, and the ways to have its losses."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks._contenders import compiled, free_memory
from benchmarks._measure import Implementation, one_line
from cdistill.ops import linear_distillation, reference
from cdistill.ops._vocabulary import CHUNK_BYTES

IGNORED = -100
LOGIT_DEVIATION = 3.0  # of models that are neither certain nor random


@dataclass(frozen=True)
class Size:
    """Hidden states of ``rows`` tokens, two heads of one vocabulary."""

    name: str
    rows: int
    student: int
    teacher: int
    vocab: int
    trained: bool = True  # whether the student's head gets a gradient
    ignored: int = 0  # how many labels do not count
    rivals: bool = True

    def __str__(self) -> str:
        words = [f"M{self.rows} H{self.student}/{self.teacher} V{self.vocab}"]
        words += [] if self.trained else ["head frozen"]
        return ", ".join([*words, f"{self.ignored} ignored"] if self.ignored else words)

    @property
    def flops(self) -> float:
        """The floor: logits of both models, gradients of hidden states and of a trained head, of rows that count."""
        products = (6 if self.trained else 4) * self.student + 2 * self.teacher
        return 1.0 * (self.rows - self.ignored) * self.vocab * products

    @property
    def least_values(self) -> int:
        """Numbers of both heads and all hidden states, and of the student's gradients."""
        student = self.student * (self.rows * 2 + self.vocab * (1 + self.trained))
        return student + self.teacher * (self.rows + self.vocab)

    @property
    def promised_bytes(self) -> int:
        """The gradient of a trained head in fp32 and two buffers for logits on a GPU, whatever the rows."""
        head = 4 * self.vocab * self.student * self.trained
        return head + max(CHUNK_BYTES["cuda"], head)

    @property
    def hidden_bytes(self) -> int:
        """What grows with the rows: the gradient of their hidden states in 16 bits, and a few numbers for each."""
        return self.rows * (2 * self.student + 64)


# In the order they are measured: those with a target first.
SIZES = (
    Size("trained", 4096, 2048, 2560, 151936),
    Size("frozen", 4096, 2048, 2560, 151936, trained=False),
    Size("equal", 4096, 2560, 2560, 151936),
    Size("long", 16384, 2048, 2560, 151936, rivals=False),
    Size("half ignored", 8192, 2048, 2560, 151936, ignored=4096),
)
DIVERGENCES = ("forward_kl", "jsd")


def shape_name(size: Size, divergence: str) -> str:
    """What rows of results call it."""
    return f"{size.name}, {divergence}"


class Problem(NamedTuple):
    """Inputs in the order of the op; the student's are leaves, its head only if it is trained."""

    student_hidden: Tensor
    student_head: Tensor
    teacher_hidden: Tensor
    teacher_head: Tensor
    labels: Tensor

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        return tuple(x for x in self[:2] if x.requires_grad)


def draw(size: Size, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Problem:
    """Random inputs whose logits have a standard deviation of LOGIT_DEVIATION."""
    generator = torch.Generator(device).manual_seed(seed)

    def model(width: int) -> tuple[Tensor, Tensor]:
        hidden, head = (torch.randn(n, width, device=device, generator=generator, dtype=dtype) for n in counts)
        return hidden, head.mul_(LOGIT_DEVIATION * width**-0.5)

    counts = (size.rows, size.vocab)
    hidden, head = model(size.student)
    labels = torch.randint(size.vocab, (size.rows,), device=device, generator=generator)
    labels[torch.randperm(size.rows, device=device, generator=generator)[: size.ignored]] = IGNORED
    return Problem(hidden.requires_grad_(), head.requires_grad_(size.trained), *model(size.teacher), labels)


Run = Callable[..., Tensor]


@dataclass(frozen=True)
class Contender(Implementation):
    """A way to compute the mean of cross-entropy and divergence per token, ``run(*problem)``, under autograd.

    ``alone``: the divergence without the cross-entropy.
    """

    alone: bool = False


def ours(divergence: str, alone: bool = False) -> Run:
    weights = (0.0, 1.0) if alone else (0.5, 0.5)

    def run(*problem: Tensor) -> Tensor:
        result = linear_distillation(*problem, divergence=divergence, loss_weights=weights)
        return (weights[0] * result.ce + weights[1] * result.kd) / result.tokens

    return run


def _row_divergence(p: Tensor, q: Tensor, divergence: str) -> Tensor:
    """Of log-probabilities (N,V), student p and teacher q: (N,)."""
    if divergence == "forward_kl":
        return F.kl_div(p, q, reduction="none", log_target=True).sum(-1)
    m = torch.logaddexp(p, q) - math.log(2)
    return sum(0.5 * F.kl_div(m, x, reduction="none", log_target=True).sum(-1) for x in (p, q))


def eager(*problem: Tensor, divergence: str) -> Tensor:
    """Both logits whole; the student's log-softmax once for each loss, as libraries do it."""
    result = reference.linear_distillation(*problem, divergence=divergence)
    return 0.5 * (result.ce + result.kd) / result.tokens


def thrifty(student_hidden, student_head, teacher_hidden, teacher_head, labels, divergence):
    """Both logits whole; one log-softmax of each for both losses, ignored rows masked at the end."""
    p = F.log_softmax(F.linear(student_hidden, student_head).float(), -1)
    with torch.no_grad():
        q = F.log_softmax(F.linear(teacher_hidden, teacher_head).float(), -1)
    counted = labels != IGNORED
    ce = F.nll_loss(p, labels, reduction="sum", ignore_index=IGNORED)
    kd = _row_divergence(p, q, divergence).masked_fill(~counted, 0.0).sum()
    return 0.5 * (ce + kd) / counted.sum()


def liger_chunked(compiling: bool) -> Run:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    return LigerFusedLinearJSDLoss(weight_hard_loss=0.5, weight_soft_loss=0.5, beta=0.5, compiled=compiling)


def liger_fused() -> Run:
    from liger_kernel.transformers.fused_linear_jsd import LigerFusedLinearJSD

    return LigerFusedLinearJSD(jsd_beta=0.5)


OURS = "ours"
EAGER = "eager"
THRIFTY = "eager, one log-softmax"
COMPILED = f"{THRIFTY}, compiled"
CHUNKED = "liger chunked"
UNCOMPILED = f"{CHUNKED}, not compiled"
FUSED = "liger fused, no cross-entropy"


LOGITS_HELD = {  # at once, as the CPU's allocator counts them: fp32 tensors of all logits
    (EAGER, "forward_kl"): 8,
    (EAGER, "jsd"): 13,
    (THRIFTY, "forward_kl"): 5,
    (THRIFTY, "jsd"): 8,
}


def _liger(divergence: str, device: torch.device, compiling: bool) -> tuple[list[Contender], dict[str, str]]:
    """What liger-kernel has for this divergence."""
    if divergence != "jsd":
        return [], dict.fromkeys((CHUNKED, FUSED), "has JSD only")
    found, left_out = [], {}
    try:
        found.append(Contender(CHUNKED if compiling else UNCOMPILED, liger_chunked(compiling)))
        if device.type == "cuda":
            found.append(Contender(FUSED, liger_fused(), alone=True))
        else:
            left_out[FUSED] = "needs CUDA tensors"
    except ImportError as error:
        return [], dict.fromkeys((CHUNKED, FUSED), one_line(error))
    return found, left_out


def contenders(
    size: Size, divergence: str, device: torch.device, compiling: bool = True
) -> tuple[list[Contender], dict[str, str]]:
    """Who can compute this problem, ours first; and who cannot, with the reason.

    Not compiling: liger-kernel's chunked loss without torch.compile, which it uses by itself.
    """
    parts = frozenset({divergence})
    found = [Contender(OURS, ours(divergence), parts)]
    if divergence == "jsd" and device.type == "cuda":  # beside FUSED
        found.append(Contender(f"{OURS}, no cross-entropy", ours(divergence, alone=True), parts, alone=True))
    others, left_out = _liger(divergence, device, compiling)
    if device.type == "cuda":
        others.append(Contender(COMPILED, partial(compiled(thrifty, "cuda"), divergence=divergence)))
    else:
        left_out[COMPILED] = "needs CUDA tensors"
    others.append(Contender(THRIFTY, partial(thrifty, divergence=divergence)))
    others.append(Contender(EAGER, partial(eager, divergence=divergence)))
    for c in others:
        needed = LOGITS_HELD.get((c.name, divergence), 0) * 4 * size.rows * size.vocab
        if not size.rivals:
            left_out[c.name] = "not tried at this length"
        elif needed > free_memory(device):
            left_out[c.name] = f"needs about {needed / 1e9:.0f} GB for the logits"
        else:
            found.append(c)
    return found, left_out
