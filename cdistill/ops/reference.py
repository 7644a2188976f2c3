"""Eager oracles of the ops, written to be read: whole attention matrices, whole logits, row after row.

They keep the dtype of their inputs, so that tests call them in float64, and autograd differentiates them.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cdistill.errors import InputError
from cdistill.ops._contract import LEAST_SHARE
from cdistill.ops.linear_distillation import LinearDistillation


def _scores(
    q: Tensor,
    k: Tensor,
    causal: bool,
    scale: float | None,
    key_mask: Tensor | None,
    cu_seqlens: Sequence[int] | None,
) -> tuple[Tensor, Tensor]:
    """Scores (B,Hq,Tq,T), and which keys the queries see (B,1,Tq,T). Fewer queries than keys are those of the last keys."""
    batch, q_heads, queries, width = q.shape
    tokens = k.shape[2]
    k = k.repeat_interleave(q_heads // k.shape[1], dim=1)
    scores = q @ k.transpose(-1, -2) * (width**-0.5 if scale is None else scale)
    visible = torch.ones(batch, 1, tokens, tokens, dtype=torch.bool, device=q.device)
    if causal:
        visible = visible.tril()
    if cu_seqlens is not None:
        document = torch.bucketize(torch.arange(tokens), torch.tensor(cu_seqlens), right=True)
        visible = visible & (document[:, None] == document).to(q.device)
    visible = visible[:, :, tokens - queries :]
    if key_mask is not None:
        visible = visible & key_mask[:, None, None, :]
    return scores, visible


def attention_probabilities(
    q: Tensor,
    k: Tensor,
    *,
    lse: Tensor | None = None,
    causal: bool = True,
    scale: float | None = None,
    key_mask: Tensor | None = None,
    cu_seqlens: Sequence[int] | None = None,
) -> Tensor:
    """softmax(scale * q k^T + mask), or exp(scale * q k^T - lse) with a given lse (B,Hq,T): (B,Hq,T,T).

    A query that sees no key has probability zero everywhere. Fewer queries than keys are those of the last keys.
    """
    scores, visible = _scores(q, k, causal, scale, key_mask, cu_seqlens)
    if lse is None:
        some_key = visible.any(-1, keepdim=True)
        scores = scores.masked_fill(~visible & some_key, -torch.inf)
        return torch.softmax(scores, dim=-1).masked_fill(~visible, 0.0)
    exponents = (scores - lse.to(q.dtype)[..., None]).masked_fill(~visible, -torch.inf)
    return exponents.exp()


def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    scale: float | None = None,
    key_mask: Tensor | None = None,
    cu_seqlens: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor]:
    """Oracle of ``cdistill.ops.flash_attention``."""
    options: dict[str, Any] = {"causal": causal, "scale": scale, "key_mask": key_mask, "cu_seqlens": cu_seqlens}
    scores, visible = _scores(q, k, *options.values())
    some_key = visible.any(-1)
    lse = scores.masked_fill(~visible & some_key[..., None], -torch.inf).logsumexp(-1)
    out = attention_probabilities(q, k, **options) @ v.repeat_interleave(q.shape[1] // k.shape[1], 1)
    return out, lse.masked_fill(~some_key, -torch.inf)


def attention_slice(
    q: Tensor,
    k: Tensor,
    rows: Tensor,
    cols: Tensor,
    *,
    lse: Tensor | None = None,
    causal: bool = True,
    scale: float | None = None,
    key_mask: Tensor | None = None,
    heads: str = "mean",
    cu_seqlens: Sequence[int] | None = None,
) -> Tensor:
    """Oracle of ``cdistill.ops.attention_slice``."""
    options: dict[str, Any] = {"causal": causal, "scale": scale, "key_mask": key_mask, "cu_seqlens": cu_seqlens}
    p = attention_probabilities(q, k, lse=lse, **options)
    if heads == "mean":
        p = p.mean(dim=1, keepdim=True)
    real = (rows >= 0)[:, None, :, None] & (cols >= 0)[:, None, None, :]
    queries = rows - (k.shape[2] - q.shape[2])
    samples = [
        p_b[:, r.clamp(min=0).long()][:, :, c.clamp(min=0).long()] for p_b, r, c in zip(p, queries, cols, strict=True)
    ]
    a = torch.where(real, torch.stack(samples), 0.0)
    return a if heads == "each" else a[:, 0]


def _vector_distance(student: Tensor, target: Tensor, loss: str) -> Tensor:
    """Distance of two vectors (L,)."""
    if loss == "mse":
        return F.mse_loss(student, target)
    if loss == "cosine":
        if not student.any() or not target.any():
            return student.sum() * 0 + 1
        return 1 - F.cosine_similarity(student, target, dim=0, eps=0.0)
    if not student.sum() or not target.sum():
        return student.sum() * 0
    t, s = target / target.sum(), student / student.sum()
    seen = s.clamp(min=LEAST_SHARE)
    if loss == "kl":
        return (torch.xlogy(t, t.clamp(min=LEAST_SHARE)) - t * seen.log()).sum()
    if loss == "reverse_kl":
        return (s * (seen.log() - t.clamp(min=LEAST_SHARE).log())).sum()
    if loss == "jsd":
        m = (seen + t.clamp(min=LEAST_SHARE)) / 2
        of_target = torch.xlogy(t, t.clamp(min=LEAST_SHARE)) - t * m.log()
        return (of_target + s * (seen.log() - m.log())).sum() / 2
    raise InputError(f"loss {loss!r} is not known here")


def slice_distance(a: Tensor, t: Tensor, loss: str, reduction: str, sink_filter: bool = False) -> Tensor:
    """Distance of one head's or head-mean slice a (R,V) from the target t (R,V), all rows and columns valid."""
    if reduction == "row":
        return torch.stack([_vector_distance(a_r, t_r, loss) for a_r, t_r in zip(a, t, strict=True)]).mean()
    if reduction == "matrix":
        return _vector_distance(a.flatten(), t.flatten(), loss)
    if reduction != "column":
        raise InputError(f"reduction {reduction!r} is not known here")
    if not sink_filter:
        return _vector_distance(a.mean(0), t.mean(0), loss)
    with torch.no_grad():
        a_limit, t_limit = (x.mean() + (x.std() if x.numel() > 1 else 0.0) for x in (a, t))
        f = ((a <= a_limit) & (t <= t_limit)).to(t.dtype)
        m = (f * t != 0).to(t.dtype)
        c = m.sum(0).clamp(min=1)
    return _vector_distance((m * a).sum(0) / c, (m * t).sum(0) / c, loss)


def _together(i: int, j: int, cu_seqlens: Sequence[int] | None) -> bool:
    """Whether two tokens are of one document."""
    return all((i >= start) == (j >= start) for start in cu_seqlens or ())


def _compared(
    a: Tensor,
    target: Tensor,
    rows: Tensor,
    cols: Tensor,
    key_mask: Tensor | None,
    causal: bool,
    loss: str,
    reduction: str,
    sink_filter: bool,
    cu_seqlens: Sequence[int] | None = None,
) -> Tensor:
    """Losses (B,) of slices and their targets (B,H,R,V): of the rows that see one of their columns."""
    losses = []
    for b in range(len(rows)):
        real_cols = [v for v, j in enumerate(cols[b].tolist()) if j >= 0]
        seen_keys = [j for j in cols[b].tolist() if j >= 0 and (key_mask is None or key_mask[b, j])]
        real_rows = [
            r
            for r, i in enumerate(rows[b].tolist())
            if any((0 <= j <= i or not causal) and _together(i, j, cu_seqlens) for j in seen_keys)
        ]
        real_rows = [r for r in real_rows if rows[b, r] >= 0]
        if not real_rows or not real_cols:
            losses.append(a.sum() * 0)
            continue
        per_head = [
            slice_distance(
                a_h[real_rows][:, real_cols], t_h[real_rows][:, real_cols].to(a.dtype), loss, reduction, sink_filter
            )
            for a_h, t_h in zip(a[b], target[b], strict=True)
        ]
        losses.append(torch.stack(per_head).mean())
    return torch.stack(losses)


def attention_alignment(
    q: Tensor,
    k: Tensor,
    target: Tensor,
    rows: Tensor,
    cols: Tensor,
    *,
    loss: str = "cosine",
    reduction: str = "row",
    sink_filter: bool = False,
    lse: Tensor | None = None,
    causal: bool = True,
    scale: float | None = None,
    key_mask: Tensor | None = None,
    heads: str = "mean",
    cu_seqlens: Sequence[int] | None = None,
) -> Tensor:
    """Oracle of ``cdistill.ops.attention_alignment``."""
    options: dict[str, Any] = {"causal": causal, "scale": scale, "key_mask": key_mask, "cu_seqlens": cu_seqlens}
    a = attention_slice(q, k, rows, cols, lse=lse, heads=heads, **options)
    if heads == "mean":
        a, target = a[:, None], target[:, None]
    return _compared(a, target, rows, cols, key_mask, causal, loss, reduction, sink_filter, cu_seqlens)


def relation_slice(relation: str, q: Any, k: Any, heads: str, groups: int, *where: Tensor, **options: Any) -> Tensor:
    """Slice of a model's relation, (B,1,R,V), or for heads="each" (B,groups,R,V): the means of consecutive heads."""
    q, k = {"qk": (q, k), "qq": (q, q), "kk": (k, k), "vv": (q, q)}[relation]
    a = attention_slice(q, k, *where, heads="each", **options)
    return a.unflatten(1, (groups if heads == "each" else 1, -1)).mean(2)


def attention_relation(
    student_q: Any,
    student_k: Any,
    teacher_q: Any,
    teacher_k: Any,
    rows: Tensor,
    cols: Tensor,
    *,
    loss: str = "cosine",
    reduction: str = "row",
    sink_filter: bool = False,
    heads: str = "mean",
    student_lse: Tensor | None = None,
    teacher_lse: Any = None,
    causal: bool = True,
    scale: float | None = None,
    key_mask: Tensor | None = None,
    teacher_scale: float | None = None,
    teacher_key_mask: Tensor | None = None,
    teacher_rows: Tensor | None = None,
    teacher_cols: Tensor | None = None,
    student_relation: str = "qk",
    teacher_relation: str = "qk",
    cu_seqlens: Sequence[int] | None = None,
    teacher_cu_seqlens: Sequence[int] | None = None,
) -> Tensor:
    """Oracle of ``cdistill.ops.attention_relation``."""
    lists = [x if isinstance(x, list) else [x] for x in (teacher_q, teacher_k, teacher_lse)]
    layers_q, layers_k, layers_lse = (x * (max(map(len, lists)) // len(x)) for x in lists)
    of_rows: tuple[Tensor, Tensor] = (
        student_k if student_relation == "kk" else student_q,
        layers_k[0] if teacher_relation == "kk" else layers_q[0],
    )
    groups = min(x.shape[1] for x in of_rows)
    options = {"lse": student_lse, "causal": causal, "scale": scale, "key_mask": key_mask, "cu_seqlens": cu_seqlens}
    a = relation_slice(student_relation, student_q, student_k, heads, groups, rows, cols, **options)
    where = rows if teacher_rows is None else teacher_rows, cols if teacher_cols is None else teacher_cols
    options |= {"scale": teacher_scale, "key_mask": key_mask if teacher_key_mask is None else teacher_key_mask}
    options |= {"cu_seqlens": cu_seqlens if teacher_cu_seqlens is None else teacher_cu_seqlens}
    with torch.no_grad():
        slices = [
            relation_slice(teacher_relation, q, k, heads, groups, *where, **(options | {"lse": lse}))
            for q, k, lse in zip(layers_q, layers_k, layers_lse, strict=True)
        ]
        target = torch.stack(slices).mean(0).to(a.dtype)
    return _compared(a, target, rows, cols, key_mask, causal, loss, reduction, sink_filter, cu_seqlens)


def _divergence(p: Tensor, q: Tensor, divergence: str, beta: float) -> Tensor:
    """Divergence of each row of log-probabilities, student p and teacher q."""
    if divergence == "forward_kl":
        return F.kl_div(p, q, reduction="none", log_target=True).sum(1)
    if divergence == "reverse_kl":
        return F.kl_div(q, p, reduction="none", log_target=True).sum(1)
    m = torch.stack([q + math.log(beta), p + math.log(1 - beta)]).logsumexp(0)
    from_q, from_p = (F.kl_div(m, x, reduction="none", log_target=True).sum(1) for x in (q, p))
    return beta * from_q + (1 - beta) * from_p


def _with_others(log_p: Tensor, indices: Tensor) -> Tensor:
    """Log-probabilities of the tokens in indices (N,K) and of all others together: (N,K+1)."""
    rest = torch.ones_like(log_p).scatter(1, indices, 0.0)
    others = (log_p.exp() * rest).sum(1, keepdim=True).log()
    return torch.cat([log_p.gather(1, indices), others], 1)


def _logits(hidden: Tensor, head: Tensor, bias: Tensor | None, scale: float, softcap: float | None) -> Tensor:
    logits = F.linear(hidden, head, bias) * scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def linear_distillation(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_hidden: Tensor | None,
    teacher_head: Tensor | None,
    labels: Tensor,
    *,
    divergence: str = "forward_kl",
    temperature: float = 1.0,
    beta: float = 0.5,
    ignore_index: int = -100,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    teacher_topk: tuple[Tensor, Tensor] | None = None,
    vocab_size: int | None = None,
    topk_tail: bool = True,
    weights: Tensor | None = None,
    student_logit_scale: float = 1.0,
    student_logit_softcap: float | None = None,
    teacher_logit_scale: float = 1.0,
    teacher_logit_softcap: float | None = None,
) -> LinearDistillation:
    """Oracle of ``cdistill.ops.linear_distillation``: whole (N,V) logits, padding columns cut off."""
    if vocab_size is None:
        vocab_size = min(len(head) for head in (student_head, teacher_head) if head is not None)
    student = _logits(student_hidden, student_head, student_bias, student_logit_scale, student_logit_softcap)
    student = student[:, :vocab_size]
    if student.dtype in (torch.float16, torch.bfloat16):
        student = student.float()
    valid = labels != ignore_index
    w = torch.ones_like(valid, dtype=student.dtype) if weights is None else weights.to(student.dtype)
    ce = F.cross_entropy(student, labels, ignore_index=ignore_index, reduction="none")[valid] @ w[valid]
    p = F.log_softmax(student[valid] / temperature, dim=-1)
    if teacher_topk is not None:
        values, indices = teacher_topk[0][valid].to(p.dtype), teacher_topk[1][valid]
        if topk_tail:
            rest = 1 - values.exp().sum(1, keepdim=True)
            p, q = _with_others(p, indices), torch.cat([values, rest.log()], 1)
        else:
            p, q = p.gather(1, indices).log_softmax(1), values.log_softmax(1)
    elif teacher_hidden is not None and teacher_head is not None:
        with torch.no_grad():
            teacher = _logits(teacher_hidden, teacher_head, teacher_bias, teacher_logit_scale, teacher_logit_softcap)
        q = F.log_softmax(teacher[valid, :vocab_size].to(p.dtype) / temperature, dim=-1)
    else:
        return LinearDistillation(ce, ce.new_zeros(()), valid.sum())
    return LinearDistillation(ce, _divergence(p, q, divergence, beta) @ w[valid], valid.sum())
