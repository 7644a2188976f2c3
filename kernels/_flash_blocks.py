"""What the kernels of flash attention share: blocks of contiguous tokens, where the real keys lie, and their launch."""

import torch
import triton
import triton.language as tl

from . import _launch

# Elements from one token to the next at which offsets within a block of 128 tokens leave 32 bits.
FAR = 2**24

# Architectures on which what needs the mask has a loop of its own, in kernels of 2-byte elements (their loops say why).
PARTED = {"flash_forward": (80, 86, 89, 120), "flash_dkdv": (90,)}


@triton.jit
def block_pointers(
    p_x,  # (T, D) of one sample and head
    i_t,  # the first position of the block
    stride_t,  # in units of UNIT elements
    UNIT: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
):
    o_t = tl.arange(0, BT)
    return p_x + tl.cast(i_t, tl.int64) * stride_t * UNIT + (o_t[:, None] * stride_t * UNIT + tl.arange(0, BD)[None, :])


@triton.jit
def load_block(
    p_x,  # (T, D) of one sample and head
    i_t,
    T,
    stride_t,
    UNIT: tl.constexpr,
    D: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
    AGAIN: tl.constexpr = False,
):
    """(BT, BD) vectors from position i_t on, zeros beyond T and D; AGAIN as for `load_rows`."""
    m_tile = (i_t + tl.arange(0, BT) < T)[:, None] & (tl.arange(0, BD) < D)[None, :]
    return tl.load(block_pointers(p_x, i_t, stride_t, UNIT, BT, BD), mask=m_tile, other=0.0, volatile=AGAIN)


@triton.jit
def load_key_block(
    p_x,  # (T, D) keys or values of one sample and head
    i_n,
    T,
    stride_t,
    UNIT: tl.constexpr,
    D: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    PLAIN: tl.constexpr,
):
    """`load_block`, with PLAIN of positions none of which is beyond T."""
    p_tile, m_tile = block_pointers(p_x, i_n, stride_t, UNIT, BN, BD), None
    if D != BD:
        m_tile = (tl.arange(0, BD) < D)[None, :]
    if not PLAIN:
        m_tile = (i_n + tl.arange(0, BN) < T)[:, None] & (tl.arange(0, BD) < D)[None, :]
    return tl.load(p_tile, mask=m_tile, other=None if m_tile is None else 0.0)


@triton.jit
def again(b_x, p_x, i_t, T, stride_t, UNIT: tl.constexpr, D: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr):
    """A block for use in a loop, loaded before it: fp32 is read once more, as its dots keep operands in registers."""
    if p_x.dtype.element_ty == tl.float32:
        b_x = load_block(p_x, i_t, T, stride_t, UNIT, D, BT, BD, AGAIN=True)
    return b_x


@triton.jit
def store_block(p_x, i_t, b_x, m_t, stride_t, UNIT: tl.constexpr, D: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr):
    m_tile = m_t[:, None] & (tl.arange(0, BD) < D)[None, :]
    tl.store(block_pointers(p_x, i_t, stride_t, UNIT, BT, BD), b_x.to(p_x.dtype.element_ty), mask=m_tile)


@triton.jit
def key_blocks(
    p_bounds,  # (3,) of one sample, or None: every key is real
    i_m,  # the first query of the block
    T,
    CAUSAL: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """The keys [first, stop) that BM queries see, and those [plain, plain_stop) of which each query sees every one.

    All are multiples of BN, first <= stop. Plain is of no use between holes, so then it is empty.
    """
    first, stop, all_see, any_sees = 0, T, T, T
    if CAUSAL:
        all_see, any_sees = i_m + 1, i_m + BM
    plain = 0
    if p_bounds is not None:
        first, stop = tl.load(p_bounds), tl.load(p_bounds + 1)
        plain = tl.where(tl.load(p_bounds + 2) != 0, tl.cdiv(first, BN) * BN, T)
        first = first // BN * BN
    plain_stop = tl.minimum(all_see, stop) // BN * BN
    return first, plain, plain_stop, tl.minimum(any_sees, stop)


@triton.jit
def apart(first, plain, plain_stop):
    """[plain, plain_stop) of `key_blocks`, empty at ``first`` where it is of no use."""
    m_any = plain < plain_stop
    return tl.where(m_any, plain, first), tl.where(m_any, plain_stop, first)


@triton.jit(do_not_specialize=_launch.BATCH_DEPENDENT)
def key_bounds_kernel(
    p_mask,  # (B, T)
    p_bounds,  # (B, 3)
    T,
    BN: tl.constexpr,
):
    """First real key of a sample, one past its last, and whether every key between them is real."""
    i_b = tl.program_id(0).to(tl.int64)
    b_first = tl.zeros((BN,), tl.int32) + T
    b_stop = tl.zeros((BN,), tl.int32)
    b_count = tl.zeros((BN,), tl.int32)
    for i_n in tl.range(0, T, BN):
        o_n = i_n + tl.arange(0, BN)
        m_real = tl.load(p_mask + i_b * T + o_n, mask=o_n < T, other=0) != 0
        b_first = tl.minimum(b_first, tl.where(m_real, o_n, T))
        b_stop = tl.maximum(b_stop, tl.where(m_real, o_n + 1, 0))
        b_count += m_real.to(tl.int32)
    first, stop = tl.min(b_first, 0), tl.max(b_stop, 0)
    tl.store(p_bounds + i_b * 3, first)
    tl.store(p_bounds + i_b * 3 + 1, stop)
    tl.store(p_bounds + i_b * 3 + 2, (stop - first == tl.sum(b_count, 0)).to(tl.int32))


def like(x: torch.Tensor) -> torch.Tensor:
    """An empty tensor laid out like ``x`` without its gaps, or contiguous where kernels could not take it."""
    like = torch.empty_like(x)
    if like.stride(3) == 1 and like.stride(2) < FAR:
        return like
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def near(x: torch.Tensor | None) -> torch.Tensor | None:
    """``x``, copied if its tokens lie so far apart that offsets within a block would need 64 bits."""
    return x if x is None or x.stride(2) < FAR else x.contiguous()


def problem_arguments(problem) -> dict:
    """What the launches of flash attention share beside tensors, tiles and sizes."""
    heads = problem.q.shape[1]
    arguments = {"Hq": heads, "GROUP": heads // problem.k.shape[1], "CAUSAL": problem.causal, "scale": problem.scale}
    return arguments | key_bounds(problem.key_mask)


def parted(kernel: str, q: torch.Tensor) -> bool:
    """Whether this kernel's blocks that need the mask have a loop of their own."""
    return q.element_size() == 2 and _launch.architecture(q.device) in PARTED[kernel]


def key_bounds(key_mask: torch.Tensor | None) -> dict:
    """The key mask as kernels take it, and where the real keys of each sample lie."""
    if key_mask is None:
        return {"p_mask": None, "p_bounds": None}
    (B, T), tile = key_mask.shape, _launch.row_tile(key_mask.device)
    arguments = {"p_mask": key_mask.view(torch.uint8), "p_bounds": key_mask.new_empty(B, 3, dtype=torch.int32)}
    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    _launch.launch(key_bounds_kernel, (B,), key_mask.device, **arguments, T=T, BN=tile.BN, **options)
    return arguments


def launch_blocks(kernel, name: str, owner: str, tensors: dict, launch=_launch.launch_checked, **arguments) -> None:
    """Launch one program per block of tokens, head and sample of the tensor ``owner``.

    Every tensor (B, heads, T, D) of ``tensors`` comes with its strides; None stays None.
    """
    B, heads, T, _ = tensors[owner].shape
    tensors = {name: near(tensor) for name, tensor in tensors.items()}
    tile = _launch.attention_tile(name, tensors[owner])
    arguments.update(_launch.tensor_arguments(**tensors), T=T, BM=tile.BM)
    if "BN" in kernel.arg_names:  # flash_rows_kernel takes whole rows
        arguments["BN"] = tile.BN
    arguments.update(num_warps=tile.num_warps, num_stages=tile.num_stages)
    block = tile.BN if owner == "dk" else tile.BM
    launch(kernel, (triton.cdiv(T, block), heads, B), tensors[owner].device, **arguments)
