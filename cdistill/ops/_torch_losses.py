"""Losses in eager torch: alignment of slices, and cross-entropy and divergence over the vocabulary, with their gradients."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from cdistill.errors import InputError
from cdistill.ops._contract import LEAST_SHARE, require_choice
from cdistill.ops._problem import Comparison, VocabularyOptions, VocabularyRows

LOGITS_BYTES = 4 * 2**20  # of a block of logits in fp32, of which several exist at a time


MOST_SLOPE = torch.finfo(torch.float32).max  # the gradient of a faint share may exceed it, and must not become inf

# Every loss compares K vectors of length L per sample: x and y (N,K,L), K = R for "row", else 1. A distance returns the
# (N,K) distances, its gradient function the (N,K,L) gradient in x. `length` (N,) is the number of valid entries.


def _normalise(x: Tensor) -> tuple[Tensor, Tensor]:
    """x / |x| and |x| (N,K,1), with |x| = inf for a zero vector so that dividing by it gives zero.

    The norm is taken of x / max|x|, so that the squares of a faint vector do not underflow.
    """
    peak = torch.linalg.vector_norm(x, ord=torch.inf, dim=2, keepdim=True)
    unit = x / peak.masked_fill_(peak == 0, 1.0)
    norm = torch.linalg.vector_norm(unit, dim=2, keepdim=True)
    norm.masked_fill_(norm == 0, torch.inf)
    return unit.div_(norm), norm * peak


def _cosine(x: Tensor, y: Tensor, length: Tensor) -> Tensor:
    """1 - cos as half the squared distance of the normalised vectors, which keeps its digits as cos approaches 1."""
    x_unit, x_norm = _normalise(x)
    y_unit, y_norm = _normalise(y)
    half = x_unit.sub_(y_unit).square_().sum(2).mul_(0.5)
    return half.masked_fill_((x_norm + y_norm).isinf()[:, :, 0], 1.0)


def _cosine_grad(x: Tensor, y: Tensor, length: Tensor) -> Tensor:
    x_unit, x_norm = _normalise(x)
    y_unit, y_norm = _normalise(y)
    difference = torch.sub(x_unit, y_unit, out=y_unit)
    half = torch.linalg.vector_norm(difference, dim=2, keepdim=True).square_().mul_(0.5)
    grad = difference.sub_(x_unit.mul_(half)).div_(x_norm)
    return grad.masked_fill_(y_norm.isinf(), 0.0)


def _mse(x: Tensor, y: Tensor, length: Tensor) -> Tensor:
    return (x - y).square_().sum(2).div_(length[:, None])


def _mse_grad(x: Tensor, y: Tensor, length: Tensor) -> Tensor:
    return (x - y).mul_(2.0).div_(length[:, None, None])


def _normalise_sum(x: Tensor) -> tuple[Tensor, Tensor]:
    """x / sum(x) and sum(x) (N,K,1), with sum = inf where it is zero."""
    total = x.sum(2, keepdim=True)
    total.masked_fill_(total == 0, torch.inf)
    return x / total, total


def _kl_terms(s: Tensor, t: Tensor) -> Tensor:
    log_ratio = t.clamp(min=LEAST_SHARE).log_().sub_(s.clamp(min=LEAST_SHARE).log_())
    return log_ratio.mul_(t).masked_fill_(t == 0, 0.0)


def _kl_slope(s: Tensor, t: Tensor) -> Tensor:
    return torch.sub(s, t).div_(s).masked_fill_(s < LEAST_SHARE, 1.0)


def _logs_of_mean(x: Tensor, y: Tensor) -> Tensor:
    """log(x / m) of shares with m = (x + y) / 2, by log1p where they are near."""
    x, y = x.clamp(min=LEAST_SHARE), y.clamp(min=LEAST_SHARE)
    both = x + y
    r = (x - y).div_(both)
    return r.log1p().where(r.abs() < 0.25, x.log().sub_(both.mul_(0.5).log_()))


def _jsd_terms(s: Tensor, t: Tensor) -> Tensor:
    """(s log s/m + t log t/m) / 2 of the shares s and t; near ones by a series in r = (s - t) / (s + t)."""
    both = s + t
    r = (s - t).div_(both.clamp(min=LEAST_SHARE))
    rr = r.square()
    series = (1 + rr * (1 / 6 + rr * (1 / 15 + rr * (1 / 28 + rr / 45)))).mul_(rr).mul_(both).mul_(0.25)
    terms = (s * _logs_of_mean(s, t)).add_(t * _logs_of_mean(t, s)).mul_(0.5)
    return series.where(r.abs() < 0.25, terms)


def _jsd_slope(s: Tensor, t: Tensor) -> Tensor:
    return _logs_of_mean(s, t).mul_(0.5)


def _log_ratio(s: Tensor, t: Tensor) -> Tensor:
    """log(s / t) of shares, by log1p where they are near."""
    s, t = s.clamp(min=LEAST_SHARE), t.clamp(min=LEAST_SHARE)
    r = (s - t).div_(t)
    return r.log1p().where(r.abs() < 0.25, s.log().sub_(t.log_()))


def _reverse_kl_terms(s: Tensor, t: Tensor) -> Tensor:
    """s log s/t - (s - t), whose last part sums to zero; of near shares by a series in r = (s - t) / t."""
    t_least = t.clamp(min=LEAST_SHARE)
    r = (s - t).div_(t_least)
    series = 1 / 2 + r * (-1 / 6 + r * (1 / 12 + r * (-1 / 20 + r * (1 / 30 + r * (-1 / 42 + r * (1 / 56 - r / 72))))))
    series.mul_(r).mul_(r).mul_(t_least)
    terms = (s * _log_ratio(s, t)).sub_(s).add_(t)
    return series.where((r.abs() < 0.125) & (s >= LEAST_SHARE), terms)


def _reverse_kl_slope(s: Tensor, t: Tensor) -> Tensor:
    return _log_ratio(s, t).sub_((s < LEAST_SHARE).to(s.dtype))


class Shares(NamedTuple):
    """A loss of vectors that are divided by their sums: of shares s (student) and t (target) that each sum to one.

    Its gradient in the vector x of sum X is (slope - sum s slope) / X.
    """

    terms: Callable[[Tensor, Tensor], Tensor]  # whose sum is the loss
    slope: Callable[[Tensor, Tensor], Tensor]  # the loss differentiated by s, but for what all entries have in common

    def value(self, x: Tensor, y: Tensor, length: Tensor) -> Tensor:
        """0 for a zero vector."""
        s, x_total = _normalise_sum(x)
        t, y_total = _normalise_sum(y)
        return self.terms(s, t).sum(2).masked_fill_((x_total + y_total).isinf()[:, :, 0], 0.0)

    def gradient(self, x: Tensor, y: Tensor, length: Tensor) -> Tensor:
        """In x; zero for a zero vector."""
        s, x_total = _normalise_sum(x)
        t, y_total = _normalise_sum(y)
        slope = self.slope(s, t)
        common = (slope * s).sum(2, keepdim=True)
        grad = slope.sub_(common).div_(x_total).clamp_(-MOST_SLOPE, MOST_SLOPE)
        return grad.masked_fill_((x_total + y_total).isinf(), 0.0)


class Distance(NamedTuple):
    """An alignment loss: the distance of x from y (N,K,L), in all (N,K), and its gradient in x (N,K,L)."""

    value: Callable[[Tensor, Tensor, Tensor], Tensor]
    gradient: Callable[[Tensor, Tensor, Tensor], Tensor]


OF_SHARES = {
    "kl": Shares(_kl_terms, _kl_slope),
    "jsd": Shares(_jsd_terms, _jsd_slope),
    "reverse_kl": Shares(_reverse_kl_terms, _reverse_kl_slope),
}
DISTANCES = {
    "cosine": Distance(_cosine, _cosine_grad),
    "mse": Distance(_mse, _mse_grad),
    **{name: Distance(loss.value, loss.gradient) for name, loss in OF_SHARES.items()},
}


def _distance(compared: Comparison) -> Distance:
    require_choice("loss", compared.loss, tuple(DISTANCES))
    require_choice("reduction", compared.reduction, ("row", "matrix", "column"))
    return DISTANCES[compared.loss]


class _Slices(NamedTuple):
    """Slices a and targets (N,R,V), zero outside their valid block; that block; its row and column counts, at least 1."""

    a: Tensor
    target: Tensor
    valid: Tensor  # (N,R,V)
    n_rows: Tensor  # (N,)
    n_cols: Tensor  # (N,)


def _masked(a: Tensor, compared: Comparison) -> _Slices:
    valid = compared.row_valid[:, :, None] & compared.col_valid[:, None]
    n_rows, n_cols = compared.row_valid.sum(1).clamp(min=1), compared.col_valid.sum(1).clamp(min=1)
    return _Slices(a.masked_fill(~valid, 0.0), compared.target.masked_fill(~valid, 0.0), valid, n_rows, n_cols)


def _columns(x: _Slices, sink_filter: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The columns of slices and targets that are compared, (N,1,V), and weights w (N,R,V) or (N,1,1): sum_r w * a."""
    if sink_filter:
        count = x.valid.sum((1, 2), keepdim=True)
        keep = x.target != 0
        for y in (x.a, x.target):
            mean = y.sum((1, 2), keepdim=True) / count.clamp(min=1)
            centred = (y - mean).masked_fill_(~x.valid, 0.0)
            deviation = (centred.square_().sum((1, 2), keepdim=True) / (count - 1).clamp(min=1)).sqrt_()
            keep &= y <= mean + deviation
        weights = keep.float() / keep.sum(1, keepdim=True).clamp(min=1)
    else:
        weights = x.n_rows[:, None, None].float().reciprocal()
    return (x.a * weights).sum(1, keepdim=True), (x.target * weights).sum(1, keepdim=True), weights


def alignment_loss(a: Tensor, compared: Comparison) -> Tensor:
    """Distance of a (N,R,V) from the target over valid rows and columns, (N,); 0 for a sample without either."""
    distance, x = _distance(compared).value, _masked(a, compared)
    if compared.reduction == "row":
        losses = distance(x.a, x.target, x.n_cols).masked_fill_(~compared.row_valid, 0.0).sum(1) / x.n_rows
    elif compared.reduction == "matrix":
        losses = distance(x.a.flatten(1)[:, None], x.target.flatten(1)[:, None], x.n_rows * x.n_cols)[:, 0]
    else:
        u, v, _ = _columns(x, compared.sink_filter)
        losses = distance(u, v, x.n_cols)[:, 0]
    return losses.masked_fill_(~(compared.row_valid.any(1) & compared.col_valid.any(1)), 0.0)


def alignment_grad(a: Tensor, compared: Comparison, grad_out: Tensor, dtype: torch.dtype) -> Tensor:
    """Gradient of sum(grad_out * alignment_loss) in a, (N,R,V) fp32; zero outside the valid rows and columns."""
    distance_grad, x = _distance(compared).gradient, _masked(a, compared)
    if compared.reduction == "row":
        grad = distance_grad(x.a, x.target, x.n_cols).mul_((grad_out / x.n_rows)[:, None, None])
    elif compared.reduction == "matrix":
        flat = x.a.flatten(1)[:, None], x.target.flatten(1)[:, None]
        grad = distance_grad(*flat, x.n_rows * x.n_cols).view_as(a).mul_(grad_out[:, None, None])
    else:
        u, v, weights = _columns(x, compared.sink_filter)
        grad = distance_grad(u, v, x.n_cols).mul_(grad_out[:, None, None]) * weights
        grad = grad.expand_as(a).contiguous()
    if compared.loss in OF_SHARES:
        grad.clamp_(-MOST_SLOPE, MOST_SLOPE)
    return grad.masked_fill_(~x.valid, 0.0)


def _compare(log_p: Tensor, log_q: Tensor, divergence: str, beta: float) -> tuple[Tensor, Tensor]:
    """Divergence of each row (c,) of log-probabilities (c,V), and its gradient in the student's logits (c,V)."""
    p, q = log_p.exp(), log_q.exp()
    if divergence == "forward_kl":
        return (q * (log_q - log_p)).sum(1), p.sub_(q)
    if divergence == "reverse_kl":
        r = log_p - log_q
        value = mean = (p * r).sum(1)
    elif divergence == "jsd":
        log_m = torch.logaddexp(log_p + math.log(1 - beta), log_q + math.log(beta))
        r = (log_p - log_m).mul_(1 - beta)
        mean = (p * r).sum(1)
        value = mean + beta * (q * (log_q - log_m)).sum(1)
    else:
        raise InputError(f"divergence {divergence!r} is not known to the torch backend")
    return value, p.mul_(r.sub_(mean[:, None]))


def _compare_with_top(
    log_p: Tensor, values: Tensor, indices: Tensor, tail: Tensor, divergence: str, beta: float
) -> tuple[Tensor, Tensor]:
    """As `_compare`, where the teacher's tokens outside its top-k (c,K) are one outcome for both."""
    others = log_p.scatter(1, indices, -torch.inf)
    others_log_p = others.logsumexp(1, keepdim=True)
    log_p = torch.cat([log_p.gather(1, indices), others_log_p], 1)
    value, slope = _compare(log_p, torch.cat([values, tail[:, None]], 1), divergence, beta)
    if divergence == "forward_kl":
        dlogits = others.exp() - (others - (others_log_p - tail[:, None])).exp()
    else:
        dlogits = others.sub_(others_log_p).exp_().mul_(slope[:, -1:])
    return value, dlogits.scatter_(1, indices, slope[:, :-1])


def vocabulary_losses(rows: VocabularyRows, options: VocabularyOptions) -> None:
    """Cross-entropy and divergence of rows of logits, and their gradient in place of student's logits."""
    student, teacher, top, labels, ce, kd = rows
    count, vocab_size = student.shape
    step = max(1, LOGITS_BYTES // (4 * vocab_size))
    for part in (slice(start, start + step) for start in range(0, count, step)):
        s, label = student[part].float(), labels[part, None]
        log_p = (s / options.temperature).log_softmax(1)
        if top is not None:
            values, indices, tail = (x[part] for x in top)
            kd[part], slope = _compare_with_top(log_p, values, indices, tail, options.divergence, options.beta)
        else:
            assert teacher is not None
            log_q = teacher[part].float().div(options.temperature).log_softmax(1)
            kd[part], slope = _compare(log_p, log_q, options.divergence, options.beta)
        log_p = s.log_softmax(1)
        ce[part] = -log_p.gather(1, label)[:, 0]
        if options.gradient:
            dlogits = log_p.exp_()
            dlogits.scatter_add_(1, label, dlogits.new_full((), -1.0).expand(label.shape))
            dlogits.mul_(options.ce_weight)
            if options.kd_weight:
                dlogits.add_(slope, alpha=options.kd_weight / options.temperature)
            student[part] = dlogits
