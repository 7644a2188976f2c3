"""What the GPU benchmark times: problem sizes, their inputs, and the ways to have attention with its alignment loss."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from benchmarks._measure import Implementation
from cdistill.ops import AttentionProblem, attention_with_alignment, flash_attention
from cdistill.ops._engines import ENGINES, engine

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
FIRST_COL = 16  # the image stands after a short system prompt


@dataclass(frozen=True)
class Shape:
    """One layer: an image of ``cols`` tokens near the start, the answer in the last ``rows`` of ``tokens``."""

    name: str
    batch: int
    q_heads: int
    kv_heads: int
    tokens: int
    width: int
    rows: int
    cols: int
    rivals: bool = True  # False: without the stacks that need a score for every head, row and column at once

    def __str__(self) -> str:
        heads = f"{self.q_heads}" if self.q_heads == self.kv_heads else f"{self.q_heads}/{self.kv_heads}"
        return f"B{self.batch} H{heads} R{self.rows} V{self.cols} T{self.tokens} D{self.width}"

    @property
    def attention_flops(self) -> float:
        """Of causal attention, forward and backward, without what a backward pass recomputes beyond S once."""
        return 7.0 * self.batch * self.q_heads * self.tokens**2 * self.width

    @property
    def product_flops(self) -> float:
        """Of one product over the slice: all heads, every row with every column."""
        return 2.0 * self.batch * self.q_heads * self.rows * self.cols * self.width

    @property
    def least_values(self) -> int:
        """Numbers of q, k, v, out and of their gradients."""
        return 4 * self.batch * self.tokens * self.width * (self.q_heads + self.kv_heads)

    @property
    def slice_bytes(self) -> int:
        """Of one fp32 slice B*R*V."""
        return 4 * self.batch * self.rows * self.cols


# In the order they are measured: those with a target first.
SHAPES = (
    Shape("T4096", 4, 16, 16, 4096, 128, 256, 2880),
    Shape("T32768", 1, 32, 8, 32768, 128, 512, 30000),
    Shape("T131072", 1, 32, 8, 131072, 128, 1024, 120000, rivals=False),
    Shape("paper", 4, 16, 16, 2048, 128, 128, 729),
    Shape("T4096 D64", 4, 16, 16, 4096, 64, 256, 2880),
    Shape("paper teacher", 4, 20, 20, 2048, 128, 128, 729),
)


class Problem(NamedTuple):
    """Inputs and upstream gradients; q, k and v are leaves. Their memory is (B,T,heads,D), as models make it."""

    q: Tensor
    k: Tensor
    v: Tensor
    target: Tensor
    rows: Tensor
    cols: Tensor
    dout: Tensor
    dlosses: Tensor

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        return self[:6]

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        return self[:3]


def draw(shape: Shape, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Problem:
    """Random inputs. dlosses makes the alignment's part of the gradients as large as that of dout."""
    generator = torch.Generator(device).manual_seed(seed)
    B, T = shape.batch, shape.tokens

    def normal(heads: int) -> Tensor:
        x = torch.randn(B, T, heads, shape.width, device=device, generator=generator, dtype=dtype)
        return x.transpose(1, 2)

    heads = (shape.q_heads, shape.kv_heads, shape.kv_heads)
    q, k, v = (normal(n).requires_grad_() for n in heads)
    target = torch.rand(B, shape.rows, shape.cols, device=device, generator=generator) / T
    rows = torch.arange(T - shape.rows, T, device=device).expand(B, -1).contiguous()
    cols = torch.arange(FIRST_COL, FIRST_COL + shape.cols, device=device).expand(B, -1).contiguous()
    dlosses = torch.full((B,), 4.0 * shape.rows * shape.q_heads, device=device)
    return Problem(q, k, v, target, rows, cols, normal(shape.q_heads), dlosses)


Run = Callable[..., tuple[Tensor, Tensor | None]]


@dataclass(frozen=True)
class Contender(Implementation):
    """A way to compute ``run(q, k, v, target, rows, cols) -> (out, losses or None)`` under autograd.

    ``plain``: attention alone, the floor.
    """

    plain: bool = False
    drops_gradient: bool = False


def row_cosine(a: Tensor, target: Tensor) -> Tensor:
    """Mean over rows of 1 - cos, (B,)."""
    return (1 - F.cosine_similarity(a, target, dim=-1)).mean(-1)


def eager(q, k, v, target, rows, cols):
    """Full attention weights, as `output_attentions=True` gives them."""
    T, group = q.shape[2], q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    scores = q @ k.mT * q.shape[3] ** -0.5
    hidden = torch.ones(T, T, dtype=torch.bool, device=q.device).triu(1)
    p = scores.masked_fill_(hidden, -torch.inf).softmax(-1)
    a = p.mean(1).gather(1, rows[..., None].expand(-1, -1, T)).gather(2, cols[:, None].expand_as(target))
    return p @ v, row_cosine(a.float(), target)


def _row_scores(q: Tensor, keys: Tensor, rows: Tensor) -> Tensor:
    """Scaled scores (B,Hkv,G,R,keys) of the rows, in fp32 after a product in q's dtype."""
    index = rows[:, None, :, None].expand(-1, q.shape[1], -1, q.shape[3])
    q_rows = q.gather(2, index).unflatten(1, (keys.shape[1], -1))
    return torch.einsum("bhgrd,bhtd->bhgrt", q_rows, keys).float() * q.shape[3] ** -0.5


def losses_from_rows(q, k, target, rows, cols):
    """The rows' attention over all keys, its head mean, and of that the columns: right gradients with any attention."""
    hidden = torch.arange(k.shape[2], device=k.device) > rows[..., None]
    p = _row_scores(q, k, rows).masked_fill(hidden[:, None, None], -torch.inf).softmax(-1)
    return row_cosine(p.mean((1, 2)).gather(2, cols[:, None].expand_as(target)), target)


def losses_from_lse(q, k, target, rows, cols, lse):
    """Scores of the rows with the columns alone, normalised by the LSE of an attention that gives it.

    Every column stands before every row, as `draw` places them.
    """
    keys = k.gather(2, cols[:, None, :, None].expand(-1, k.shape[1], -1, k.shape[3]))
    lse = lse.gather(2, rows[:, None].expand(-1, q.shape[1], -1)).unflatten(1, (k.shape[1], -1))
    return row_cosine((_row_scores(q, keys, rows) - lse[..., None]).exp().mean((1, 2)), target)


@cache
def compiled(function: Callable, device: str) -> Callable:
    """torch.compile for the exact shapes at hand; the function itself on the CPU, where tests call it."""
    return torch.compile(function, dynamic=False) if device == "cuda" else function


def _visible(b, h, i, j):
    return i >= j


@cache
def causal_blocks(tokens: int, device: torch.device) -> BlockMask:
    """What create_block_mask gives for a causal mask of a multiple of 128 tokens, without its T x T matrix."""
    n = tokens // 128
    index = torch.arange(n, dtype=torch.int32, device=device)
    diagonal = torch.zeros(1, 1, n, n, dtype=torch.int32, device=device)
    diagonal[0, 0, :, 0] = index
    full = index.expand(1, 1, n, n).contiguous()
    count = index.view(1, 1, n)
    blocks = (torch.ones_like(count), diagonal, count.clone(), full)
    return BlockMask.from_kv_blocks(*blocks, BLOCK_SIZE=128, mask_mod=_visible)


def _flex(q, k, v, return_aux=None):
    options = {"block_mask": causal_blocks(q.shape[2], q.device), "enable_gqa": q.shape[1] != k.shape[1]}
    return compiled(flex_attention, q.device.type)(q, k, v, **options, return_aux=return_aux)


def flex_plain(q, k, v, target, rows, cols):
    return _flex(q, k, v), None


def flex_einsum(q, k, v, target, rows, cols):
    out, aux = _flex(q, k, v, return_aux=AuxRequest(lse=True))
    return out, compiled(losses_from_lse, q.device.type)(q, k, target, rows, cols, aux.lse)


def _sdpa(q, k, v, backends):
    with sdpa_kernel(backends, set_priority=True):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])


def sdpa_cudnn(q, k, v, target, rows, cols):
    return _sdpa(q, k, v, [SDPBackend.CUDNN_ATTENTION]), None


def sdpa_flash(q, k, v, target, rows, cols):
    return _sdpa(q, k, v, [SDPBackend.FLASH_ATTENTION]), None


def sdpa_einsum(q, k, v, target, rows, cols):
    out = _sdpa(q, k, v, [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION])
    return out, compiled(losses_from_rows, q.device.type)(q, k, target, rows, cols)


def aten_lse_einsum(q, k, v, target, rows, cols):
    """torch gives the LSE of its flash attention no gradient: the loss is right, its gradients are not."""
    out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True, False)
    return out, compiled(losses_from_lse, q.device.type)(q, k, target, rows, cols, lse.detach())


def own_flash(q, k, v, target, rows, cols):
    return flash_attention(q, k, v, impl="triton")[0], None


def ours(engine_name: str | None) -> Run:
    return lambda *inputs: attention_with_alignment(*inputs, engine=engine_name)


STACK, COMPILED_STACK = "sdpa + einsum", "sdpa + compiled einsum"
FLEX_ON_CPU = "FlexAttention has no backward pass on the CPU"


def _memory_of_eager(shape: Shape, dtype: torch.dtype) -> int:
    return 5 * shape.batch * shape.q_heads * shape.tokens**2 * dtype.itemsize


def free_memory(device: torch.device) -> float:
    """Bytes that can still be allocated; the CPU, which only rehearses, has no limit here."""
    if device.type != "cuda":
        return float("inf")
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(device)[0]


def contenders(shape: Shape, problem: Problem) -> tuple[list[Contender], dict[str, str]]:
    """Who can compute this problem, ours first; and who cannot, with the reason."""
    q, k, v = problem.leaves
    device, x = q.device, AttentionProblem(q, k, v, scale=shape.width**-0.5)
    alignment = frozenset({"slice", "alignment"})
    default = engine(None, x)
    stands_for = {f"ours/{name}" for name, candidate in ENGINES.items() if candidate is default}
    found = [Contender("ours", ours(None), alignment | stands_for)]
    left_out = dict.fromkeys(stands_for, "is ours")
    for name, candidate in ENGINES.items():
        reason = candidate.missing() or candidate.refusal(x)
        if reason:
            left_out[f"ours/{name}"] = reason
        elif candidate is not default:
            found.append(Contender(f"ours/{name}", ours(name), alignment | {f"ours/{name}"}))
    flash = Contender("flash_attention (own)", own_flash, frozenset({"flash"}), plain=True)
    if "ours/triton" in left_out and "ours/triton" not in stands_for:
        left_out[flash.name] = left_out["ours/triton"]
    else:
        found.append(flash)
    found.append(Contender("sdpa/flash", sdpa_flash, plain=True))
    others = [
        Contender("sdpa/cudnn", sdpa_cudnn, plain=True),
        Contender("flex (plain)", flex_plain, plain=True),
        Contender("flex + compiled einsum", flex_einsum),
        Contender("aten lse + compiled einsum (gradient through LSE dropped)", aten_lse_einsum, drops_gradient=True),
    ]
    if device.type != "cuda":
        left_out |= {c.name: "needs CUDA tensors" for c in others}
        left_out |= dict.fromkeys((c.name for c in others if c.name.startswith("flex")), FLEX_ON_CPU)
        others = []
    others += [Contender(COMPILED_STACK if device.type == "cuda" else STACK, sdpa_einsum), Contender("eager", eager)]
    for c in others:
        if not shape.rivals and not c.plain and c.name != "flex + compiled einsum":
            left_out[c.name] = "not tried at this length"
        elif c.name == "eager" and _memory_of_eager(shape, q.dtype) > free_memory(device):
            left_out[c.name] = f"needs about {_memory_of_eager(shape, q.dtype) / 1e9:.0f} GB for the attention weights"
        else:
            found.append(c)
    return found, left_out
