"""Losses of slices that are seen block by block, and their gradients.

"row" compares the rows of a block and forgets them. "matrix" needs what the whole slices are divided by before it can compare
their entries, "column" the means over all rows; these moments are summed in fp64, so that nothing is lost by adding up many
blocks, and are all that is kept for the backward pass.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from cdistill.ops._dispatch import Backend
from cdistill.ops._problem import Comparison
from cdistill.ops._relation import Block, Walk
from cdistill.ops._torch_losses import MOST_SLOPE, OF_SHARES, alignment_grad, alignment_loss


class Compared(NamedTuple):
    """Which entries of the slices are compared, and how; N slices."""

    row_valid: Tensor  # (N,R) bool
    col_valid: Tensor  # (N,V) bool
    loss: str
    reduction: str
    sink_filter: bool

    @property
    def n_rows(self) -> Tensor:
        """(N,), at least 1."""
        return self.row_valid.sum(1).clamp(min=1)

    @property
    def n_cols(self) -> Tensor:
        """(N,), at least 1."""
        return self.col_valid.sum(1).clamp(min=1)

    @property
    def by_rows(self) -> bool:
        """Whether the loss is a sum of the rows'; the mean squared error of a slice is the mean of theirs."""
        return self.reduction == "row" or (self.loss, self.reduction) == ("mse", "matrix")

    def of_block(self, block: Block) -> Comparison:
        """A block's rows compared one by one."""
        valid = self.row_valid[:, block.rows].contiguous()
        return Comparison(valid, self.col_valid, block.target.contiguous(), self.loss, "row", False)

    def outside(self, block: Block) -> Tensor:
        """(N,r,V) bool: entries of a block that do not count."""
        return ~(self.row_valid[:, block.rows, None] & self.col_valid[:, None])

    def masked(self, block: Block) -> tuple[Tensor, Tensor]:
        """Slices of a block, zero where they do not count."""
        outside = self.outside(block)
        return block.a.masked_fill(outside, 0.0), block.target.masked_fill(outside, 0.0)


class Moments(NamedTuple):
    """What the backward pass needs of the whole slices; of no entries where it needs nothing."""

    sizes: Tensor  # (3,N) fp64. matrix: what slices and targets are divided by, and a sum. column: the sink filter's limits
    columns: Tensor  # (3,N,V) fp32. column: means of slices and targets, and how many rows each is a mean of


def moments_shape(reduction: str, by_rows: bool, samples: int, cols: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of sizes and columns."""
    return (0 if by_rows else 3, samples), (3 if reduction == "column" else 0, samples, cols)


def _sum(x: Tensor) -> Tensor:
    """(N,r,V) summed to (N,) fp64, in an order that does not depend on the number of threads.

    torch splits a sum between threads where all of it is one number.
    """
    rows = x.expand(2, -1, -1) if x.shape[:2] == (1, 1) else x
    return rows.sum(2, dtype=torch.float64)[: len(x)].sum(1)


def _loss_of(impl: Backend, a: Tensor, compared: Comparison) -> Tensor:
    """The backend's alignment loss (N,), or plain torch's where it lacks one."""
    has = impl.HAS_REVERSE_KL or compared.loss != "reverse_kl"
    return (impl.alignment_loss if has else alignment_loss)(a, compared)


def _grad_of(impl: Backend, a: Tensor, compared: Comparison, weight: Tensor, dtype: torch.dtype) -> Tensor:
    has = impl.HAS_REVERSE_KL or compared.loss != "reverse_kl"
    return (impl.alignment_grad if has else alignment_grad)(a, compared, weight.contiguous(), dtype)


def losses(impl: Backend, walk: Walk, compared: Compared) -> tuple[Tensor, Moments]:
    """Losses (N,) fp32, and what `gradient` needs."""
    sizes, columns = (
        torch.zeros(shape, dtype=dtype, device=compared.col_valid.device)
        for shape, dtype in zip(
            moments_shape(compared.reduction, compared.by_rows, *compared.col_valid.shape),
            (torch.float64, torch.float32),
            strict=True,
        )
    )
    if compared.by_rows:
        total = _row_losses(impl, walk, compared)
    elif compared.reduction == "matrix":
        total = _matrix_losses(walk, compared, sizes)
    else:
        _column_moments(walk, compared, sizes, columns)
        total = _loss_of(impl, *_as_rows(columns, compared))
    nothing = ~(compared.row_valid.any(1) & compared.col_valid.any(1))
    return total.masked_fill_(nothing, 0.0), Moments(sizes, columns)


def gradient(
    impl: Backend, block: Block, compared: Compared, moments: Moments, grad: Tensor, dtype: torch.dtype
) -> Tensor:
    """Gradient of sum(grad * losses) in a block's slices, (N,r,V); zero where they do not count."""
    if compared.by_rows:
        rows = compared.of_block(block)
        return _grad_of(impl, block.a, rows, grad * rows.row_valid.sum(1) / compared.n_rows, dtype)
    if compared.reduction == "matrix":
        da = _matrix_gradient(block, compared, moments.sizes, grad)
    else:
        du = _grad_of(impl, *_as_rows(moments.columns, compared), grad, torch.float32)
        da = (du / moments.columns[2][:, None]).expand_as(block.a)
        if compared.sink_filter:
            da = da * _kept(*compared.masked(block), moments.sizes)
    if compared.loss in OF_SHARES:
        da = da.clamp(-MOST_SLOPE, MOST_SLOPE)
    return da.masked_fill(compared.outside(block), 0.0)


def _row_losses(impl: Backend, walk: Walk, compared: Compared) -> Tensor:
    """Losses (N,) that are means of the rows'."""
    total = torch.zeros_like(compared.n_rows, dtype=torch.float32)

    def add(block: Block) -> None:
        rows = compared.of_block(block)
        total.add_(_loss_of(impl, block.a, rows) * rows.row_valid.sum(1))

    walk.each(add)
    return total / compared.n_rows


def _matrix_losses(walk: Walk, compared: Compared, sizes: Tensor) -> Tensor:
    """Losses (N,) of whole slices; ``sizes`` is written."""
    if compared.loss == "cosine":
        return _matrix_cosine(walk, compared, sizes)

    def add_sizes(block: Block) -> None:
        for size, x in zip(sizes, compared.masked(block), strict=False):
            size += _sum(x)

    loss, total = OF_SHARES[compared.loss], torch.zeros_like(sizes[0])

    def add_terms(block: Block) -> None:
        s, t = _divided(compared.masked(block), sizes)
        total.add_(_sum(loss.terms(s, t)))
        sizes[2] += _sum(loss.slope(s, t).mul_(s))

    walk.each(add_sizes)
    walk.each(add_terms)
    return total.masked_fill_((sizes[:2] == 0).any(0), 0.0).float()


def _matrix_cosine(walk: Walk, compared: Compared, sizes: Tensor) -> Tensor:
    """1 - cos (N,) of whole slices, from three sums in fp64 that lose nothing of it; ``sizes`` is written."""
    product = torch.zeros_like(sizes[0])

    def add(block: Block) -> None:
        a, t = (x.double() for x in compared.masked(block))
        product.add_(_sum(a * t))
        for size, x in zip(sizes, (a, t), strict=False):
            size += _sum(x.square_())

    walk.each(add)
    sizes[:2].sqrt_()
    both = sizes[0] * sizes[1]
    sizes[2] = (1 - product / both.masked_fill(both == 0, torch.inf)).clamp(min=0.0)
    return sizes[2].float()


def _divided(pair: tuple[Tensor, Tensor], sizes: Tensor) -> list[Tensor]:
    """Slices and targets over their sizes, in fp32; the inverse of a faint size is more than that holds."""
    sizes = sizes.masked_fill(sizes == 0, 1.0)[:, :, None, None]
    return [x.double().div_(size).float() for x, size in zip(pair, sizes, strict=False)]


def _matrix_gradient(block: Block, compared: Compared, sizes: Tensor, grad: Tensor) -> Tensor:
    s, t = _divided(compared.masked(block), sizes)
    common, size = sizes[2].float()[:, None, None], sizes[0]
    cosine = compared.loss == "cosine"
    da = (s - t).sub_(common * s) if cosine else OF_SHARES[compared.loss].slope(s, t).sub_(common)
    weight = torch.where((sizes[:2] == 0).any(0), 0.0, grad.double() / size.masked_fill(size == 0, 1.0))
    return da.mul_(weight.clamp(-MOST_SLOPE, MOST_SLOPE).float()[:, None, None])


def _kept(a: Tensor, t: Tensor, limits: Tensor) -> Tensor:
    """Entries that the sink filter leaves, (N,r,V) bool."""
    of_a, of_t = limits[:2].float()[:, :, None, None]
    return (t != 0) & (a <= of_a) & (t <= of_t)


def _set_limits(walk: Walk, compared: Compared, limits: Tensor) -> None:
    """Write the sink filter's limits: mean and one standard deviation of the entries of slices and of targets."""
    squares = torch.zeros_like(limits[:2])

    def add(block: Block) -> None:
        for limit, square, x in zip(limits, squares, compared.masked(block), strict=False):
            limit += _sum(x)
            square += _sum(x.double().square_())

    walk.each(add)
    count = compared.n_rows * compared.n_cols
    mean = limits[:2] / count
    limits[:2] = mean + ((squares - count * mean.square()).clamp(min=0.0) / (count - 1).clamp(min=1)).sqrt()


def _column_moments(walk: Walk, compared: Compared, limits: Tensor, columns: Tensor) -> None:
    """Write the means of columns, and with the sink filter its limits."""
    if compared.sink_filter:
        _set_limits(walk, compared, limits)
    sums = torch.zeros(columns.shape, dtype=torch.float64, device=columns.device)

    def add(block: Block) -> None:
        a, t = compared.masked(block)
        if compared.sink_filter:
            kept = _kept(a, t, limits)
            sums[2] += kept.sum(1)
            a.mul_(kept)
            t.mul_(kept)
        sums[0] += a.sum(1, dtype=torch.float64)
        sums[1] += t.sum(1, dtype=torch.float64)

    walk.each(add)
    sums[2] = sums[2].clamp(min=1) if compared.sink_filter else compared.n_rows[:, None]
    sums[:2] /= sums[2]
    columns.copy_(sums)


def _as_rows(columns: Tensor, compared: Compared) -> tuple[Tensor, Comparison]:
    """Means of columns as slices of one row (N,1,V), and what these are compared with."""
    valid = compared.row_valid.any(1, keepdim=True)
    target = columns[1][:, None].contiguous()
    return columns[0][:, None].contiguous(), Comparison(valid, compared.col_valid, target, compared.loss, "row", False)
