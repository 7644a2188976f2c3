"""Calls of the ops over the vocabulary and of cdistill.nn with any of their options, drawn by hypothesis."""

from typing import Any

import torch
from any_calls import Call, Drawing

from cdistill import choices, ops
from cdistill.nn import DistillationHead, generalized_jsd_loss
from cdistill.ops import reference

ROWS = ("student_hidden", "teacher_hidden", "labels", "weights")  # what has a row for each label
LEAVES = ("student_hidden", "student_head", "student_bias")


def _models(d: Drawing, rows: int) -> dict[str, Any]:
    """Student, teacher (in memory, of its top-k alone, or none), vocabulary and options."""
    V = [d.number(2, 40 if d.small or not d.chance(6) else 600) for _ in range(2)]
    teacher = d.one_of("whole", "whole", "top", "none")
    made: dict[str, Any] = dict.fromkeys(("teacher_hidden", "teacher_head", "teacher_bias", "teacher_topk"))
    for name, of in (("student", V[0]), ("teacher", V[1])) if teacher == "whole" else (("student", V[0]),):
        d.dtype, width = d.one_of(*d.dtypes), d.number(1, 70)
        made[f"{name}_hidden"] = d.normal(rows, width, inner=0)
        made[f"{name}_head"] = d.normal(of, width, inner=0) * width**-0.5
        made[f"{name}_bias"] = d.normal(of, dtype=d.one_of(d.dtype, torch.float32), inner=0) if d.chance(2) else None
        for option, values in (("scale", (0.4, 1, 3.0)), ("softcap", (1.5, 30.0))):
            if d.chance(4):
                made[f"{name}_logit_{option}"] = d.one_of(*values)
    shared = min(V) if teacher == "whole" else V[0]
    made["vocab_size"] = d.number(2, shared) if d.chance(3) else None
    made["temperature"] = d.one_of(1.0, 1, 0.5, 2.5, 7.0)
    made["divergence"], made["beta"] = d.one_of(*choices.DIVERGENCES), d.one_of(0.1, 0.5, 0.9)
    if teacher == "top":
        made["topk_tail"] = d.one_of(True, False)
        made["teacher_topk"] = _topk(d, rows, made["vocab_size"] or shared, made["topk_tail"])
    return made


def _topk(d: Drawing, rows: int, V: int, tail: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of distinct tokens in no order, with something left for the others; without these also logits."""
    K = d.number(1, V - 1 if tail else V)
    values = (torch.randn(rows, V, generator=d.generator) * d.one_of(0.3, 2.0)).log_softmax(1)
    indices = torch.rand(rows, V, generator=d.generator).argsort(1)[:, :K]
    values = values.gather(1, indices) - (0.05 if tail else d.one_of(0.0, -3.0))
    indices = indices.to(d.one_of(torch.int64, torch.int32))
    return d.laid_out(values.to(d.one_of(*d.dtypes, torch.float64)), alike=1), d.laid_out(indices, alike=1)


def _labels(d: Drawing, made: dict[str, Any], *shape: int) -> tuple[torch.Tensor, int]:
    """Labels, any share of which is the ignored index, which may be a token."""
    heads = [made[name] for name in ("student_head", "teacher_head") if made[name] is not None]
    V = made["vocab_size"] or min(map(len, heads))
    ignore = d.one_of(-100, -100, -1, 0, V - 1, 10**6)
    labels = torch.randint(V, shape, generator=d.generator)
    labels[torch.rand(shape, generator=d.generator) < d.one_of(0.0, 0.3, 1.0 if d.chance(3) else 0.3)] = ignore
    return labels, ignore


def _weights(d: Drawing, *shape: int) -> torch.Tensor:
    x = torch.randn(shape, generator=d.generator) * (torch.rand(shape, generator=d.generator) < 0.8)
    return d.laid_out(x.to(d.one_of(*d.dtypes)))


def _spoilt(made: dict[str, Any], ignored: torch.Tensor) -> None:
    """NaN, and no index, in ignored rows: nothing is computed of them."""
    for name in (*ROWS, "teacher_topk"):
        for x in made[name] if isinstance(made.get(name), tuple) else [made.get(name)]:
            if x is not None and name != "labels" and 0 not in x.stride() and x.numel():
                x[ignored] = torch.nan if x.is_floating_point() else -5


def _of_rows(arguments: dict[str, Any], rows: torch.Tensor) -> dict[str, Any]:
    """The arguments of some rows, in what the definition takes."""
    cut = {name: x if x is None else x[rows] for name, x in arguments.items() if name in ROWS}
    topk = arguments.get("teacher_topk")
    if topk is not None:
        cut["teacher_topk"] = topk[0][rows], topk[1][rows].long()
    for name in ("student", "teacher"):
        bias, hidden = arguments[f"{name}_bias"], arguments[f"{name}_hidden"]
        cut[f"{name}_bias"] = bias if bias is None else bias.to(hidden.dtype)
    return arguments | cut


def _sums_by_definition(**arguments: Any) -> tuple[torch.Tensor, ...]:
    found = reference.linear_distillation(**_of_rows(arguments, arguments["labels"] != arguments["ignore_index"]))
    return found.ce, found.kd, found.tokens


def _rows_by_definition(**arguments: Any) -> tuple[torch.Tensor, ...]:
    """ce, kd and the teacher's ce of every row, zeros where it is ignored."""
    found = []
    without = dict.fromkeys((*LEAVES, "teacher_hidden", "teacher_head", "teacher_bias", "teacher_topk"))
    for i, label in enumerate(arguments["labels"].tolist()):
        made = _of_rows(arguments, torch.tensor([i]))
        if label == arguments["ignore_index"]:
            found.append([made["student_hidden"].new_zeros(())] * 3)
            continue
        losses = [*reference.linear_distillation(**made)[:2]]
        if made["teacher_hidden"] is not None:
            names = [
                name.replace("student", "teacher") for name in (*LEAVES, "student_logit_scale", "student_logit_softcap")
            ]
            taught = {name.replace("teacher", "student"): made[name] for name in names if name in made}
            taught |= {"labels": made["labels"], "ignore_index": made["ignore_index"]}
            vocab = made["vocab_size"] or min(len(made["student_head"]), len(made["teacher_head"]))
            losses.append(reference.linear_distillation(**(without | taught), vocab_size=vocab).ce)
        found.append(losses)
    count = 3 if arguments["teacher_hidden"] is not None else 2
    empty = arguments["student_hidden"].new_zeros(0)
    return tuple(torch.stack([x[i] for x in found]) if found else empty for i in range(count))


def _call(
    d: Drawing, op: Any, oracle: Any, made: dict[str, Any], rename: dict[str, str] | None = None, **others: Any
) -> Call:
    names = rename or {name: name for name in LEAVES}
    wanted = d.some(*(name for name in names.values() if made.get(name) is not None))
    sizes = {name: _size(made, name, names) for name in wanted}
    given = {name: made[name] for name in wanted}, {name: x for name, x in made.items() if name not in wanted}
    settings = {"impl": d.impl, "chunk_size": d.one_of(None, 1, 3, 1000)} | others.pop("settings", {})
    rows = others.pop("rows", 1)
    unit = 8.0 * max(1, rows) + _rounded(made, names) * rows**0.5
    return Call(op, oracle, *given, settings, sizes=sizes, unit=unit, way=d.way(), seed=d.seed, **others)


def _rounded(made: dict[str, Any], names: dict[str, str]) -> float:
    """Half an ulp of the largest logit in half precision, in units of 2^-20, for each row: roundings of rows add up by chance,
    and eager's may cancel.
    """
    found = [0.0]
    teacher = "teacher_hidden", "teacher_head" if "teacher_head" in made else "teacher_weight"
    for x, y in ((made[a], made[b]) for a, b in ((names["student_hidden"], names["student_head"]), teacher)):
        if x is not None and x.numel() and x.dtype.itemsize == 2:
            logits = x.double().nan_to_num().reshape(-1, x.shape[-1]) @ y.double().mT
            found.append(2.0**19 * torch.finfo(x.dtype).eps * float(logits.abs().max()))
    return max(found)


def _size(made: dict[str, Any], name: str, names: dict[str, str]) -> float:
    """The largest number that a logit's gradient is multiplied by, times the largest weight of a row."""
    hidden, head, _ = (made[x] for x in names.values())
    of = {names["student_hidden"]: head, names["student_head"]: hidden}.get(name)
    size = 1.0 if of is None or not of.numel() else float(of.double().nan_to_num().abs().max())
    weights = made.get("weights")
    most = 1.0 if weights is None or not weights.numel() else float(weights.double().nan_to_num().abs().max())
    return max(1.0, most) * size * made.get("student_logit_scale", 1.0)


def linear_distillation(d: Drawing, summed: bool = True) -> Call:
    rows = d.number(0, 40)
    made = _models(d, rows)
    labels, ignore = _labels(d, made, rows)
    made |= {"weights": _weights(d, rows) if d.chance(2) else None}
    untouched = {"student_hidden": labels == ignore}
    _spoilt(made, labels == ignore)
    made |= {"labels": d.laid_out(labels, alike=0) if rows else labels, "ignore_index": ignore}
    alone = made["teacher_hidden"] is None and made["teacher_topk"] is None
    upstream = d.one_of((1.0, 0.5), (0.7, -1.3), (1.0, None), (None, 2.0), (0.0, 1.0), (0.3, 0.3))
    if alone:
        upstream = (1.5, None)
    loss_weights = d.one_of((1.0, 1.0), tuple(3.0 * (x or 0.0) for x in upstream), (0, 1), (2, -1))
    how = {"upstream": list(upstream), "untouched": untouched, "settings": {"loss_weights": loss_weights}}
    how["rows"] = rows if summed else 1
    call = _call(d, ops.linear_distillation, _sums_by_definition, made, **how)
    call.untouched = {name: x for name, x in call.untouched.items() if name in call.leaves}
    return call


def linear_token_losses(d: Drawing) -> Call:
    call = linear_distillation(d, summed=False)
    call.constants |= call.leaves
    call.constants.pop("weights")
    call.settings.pop("loss_weights")
    call.op, call.oracle, call.leaves, call.upstream, call.untouched = (
        ops.linear_token_losses,
        _rows_by_definition,
        {},
        [],
        {},
    )
    return call


def _head(
    settings: dict[str, Any], impl: Any = None, chunk_size: Any = None, **arguments: Any
) -> tuple[torch.Tensor, ...]:
    return tuple(DistillationHead(**settings, impl=impl, chunk_size=chunk_size)(**arguments))


def _head_by_definition(
    settings: dict[str, Any],
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor | None,
    weights: torch.Tensor | None,
    num_items: Any,
    **given: Any,
) -> tuple[torch.Tensor, ...]:
    """Row after row, then what the reduction says."""
    settings = dict(settings)
    factors, reduction, shift = (settings.pop(name) for name in ("factors", "reduction", "shift"))
    for_all, ignore = labels is None, settings["ignore_index"]
    if labels is None:
        labels, ignore = torch.zeros(hidden.shape[:-1], dtype=torch.int64), -100

    def flat(x: Any, of_labels: bool = False) -> Any:
        if x is None:
            return None
        x = x if not shift else x[:, 1:] if of_labels else x[:, :-1]
        return x.flatten() if of_labels else x.reshape(-1, x.shape[-1])

    topk, counted = given.pop("teacher_topk"), flat(labels, True).long()
    shape = (labels[:, 1:] if shift else labels).shape
    rows = {
        "student_hidden": flat(hidden),
        "student_head": weight,
        "student_bias": given.pop("bias"),
        "labels": counted,
    }
    rows |= {"teacher_hidden": flat(given.pop("teacher_hidden")), "teacher_head": given.pop("teacher_weight")}
    rows |= {
        "teacher_bias": given.pop("teacher_bias"),
        "teacher_topk": None if topk is None else tuple(map(flat, topk)),
    }
    ce, kd, *_ = _rows_by_definition(**(rows | settings | {"ignore_index": ignore, "weights": None}))
    ce = ce * 0.0 if for_all else ce
    w, tokens = torch.ones_like(ce) if weights is None else flat(weights, True).to(ce.dtype), (counted != ignore).sum()
    w = torch.where(counted == ignore, 0.0, w)
    ce, kd = (x.view(shape) if reduction == "none" else (torch.where(w == 0, 0.0, x) * w).sum() for x in (ce, kd))
    if reduction == "mean":
        count = tokens.clamp(min=1) if num_items is None else num_items
        ce, kd = ce / count, kd / count
    return factors[0] * ce + factors[1] * kd, ce.detach(), kd.detach(), tokens


HEAD_NAMES = {"student_hidden": "hidden", "student_head": "weight", "student_bias": "bias"}


def distillation_head(d: Drawing) -> Call:
    shape = d.one_of((), (3,), (7,), (2, 5), (1, 1), (3, 0), (2, 2, 3))
    count = torch.Size(shape).numel()
    made = _models(d, count)
    alone = made["teacher_hidden"] is None and made["teacher_topk"] is None
    labels, ignore = _labels(d, made, count)
    reduction = d.one_of("mean", "sum", "none")
    made["weights"] = _weights(d, count) if reduction != "none" and d.chance(2) else None
    shift = len(shape) == 2 and shape[1] > 0 and d.chance(2)
    factors = d.one_of((1.0, 0.0), (2, 0.5)) if alone else d.one_of((1.0, 1.0), (0.0, 2.0), (1.0, 0.0), (0.5, -1))
    of_all = not factors[0] and d.chance(2)
    made["labels"] = None if of_all else labels.to(d.one_of(torch.int64, torch.int32)).view(shape)
    if not shift and not of_all:
        _spoilt(made, labels == ignore)
    settings = {"ignore_index": ignore, "reduction": reduction, "shift": shift, "temperature": made.pop("temperature")}
    for name in (
        "vocab_size",
        "topk_tail",
        *(f"{x}_logit_{y}" for x in ("student", "teacher") for y in ("scale", "softcap")),
    ):
        if name in made:
            settings[name] = made.pop(name)
    divergence, beta = made.pop("divergence"), made.pop("beta")
    end = d.one_of(None, None, 0, 1.0) if divergence == "jsd" else None
    given = {"divergence": divergence, "beta": beta if end is None else end}
    meant = {"divergence": {0: "forward_kl", 1.0: "reverse_kl", None: divergence}[end], "beta": beta}
    for old, new in (*HEAD_NAMES.items(), ("teacher_head", "teacher_weight")):
        made[new] = made.pop(old)
    for name in ("hidden", "teacher_hidden", "weights"):
        if made[name] is not None:
            made[name] = made[name].reshape((*shape, *made[name].shape[1:]))
    if made["teacher_topk"] is not None:
        made["teacher_topk"] = tuple(x.reshape(*shape, x.shape[1]) for x in made["teacher_topk"])
    made["num_items"] = d.one_of(None, 3, 7.5, torch.tensor(4)) if reduction == "mean" else None
    how: dict[str, Any] = {"upstream": d.kinds(1), "rows": count if reduction == "sum" else 1}
    weights = dict(zip(("ce_weight", "kd_weight"), factors, strict=True))
    call = _call(d, _head, _head_by_definition, made, HEAD_NAMES, **how)
    call.settings["settings"], call.definition = settings | given | weights, settings | meant | {"factors": factors}
    return call


def generalized_jsd(d: Drawing) -> Call:
    shape, V = d.one_of((3,), (2, 5), (1, 0), (2, 2, 3)), d.number(1, 40) if not d.chance(6) else d.number(500, 600)
    logits = [d.normal(*shape, V, dtype=d.one_of(*d.dtypes), inner=0) for _ in range(2)]
    probs = d.chance(4)
    if probs:
        logits = [x.float().softmax(-1).to(x.dtype) for x in logits]
    labels, _ = torch.randint(-1, V, shape, generator=d.generator), None
    labels[torch.rand(shape, generator=d.generator) < d.one_of(0.0, 0.5, 1.0)] = -100
    made = {"student_logits": logits[0], "teacher_logits": logits[1], "labels": labels if d.chance(2) else None}
    made |= {"beta": d.one_of(0, 0.0, 0.1, 0.5, 0.9, 1, 1.0), "temperature": d.one_of(1.0, 1, 0.5, 4.0)}
    made |= {"reduction": d.one_of("batchmean", "sum", "mean", "none"), "logits_are_probs": probs}
    made |= {"num_items_in_batch": d.one_of(None, 3, torch.tensor(2.5)), "top_k": d.number(1, V) if d.chance(4) else 0}
    one = {"student_logits": (8.0 if probs else 1.0) / made["temperature"]}
    how = {"upstream": d.kinds(1), "sizes": one, "unit": 8.0 * max(1, torch.Size(shape).numel())}
    leaves = {"student_logits": made.pop("student_logits")}
    return Call(generalized_jsd_loss, _jsd_by_definition, leaves, made, {}, way=d.way(), seed=d.seed, **how)


def _jsd_by_definition(
    student_logits, teacher_logits, labels, beta, temperature, reduction, num_items_in_batch, **others
):
    """The mixture m = beta teacher + (1 - beta) student, and the divergence of both from it, term by term."""
    first, x, y = len(student_logits), student_logits, teacher_logits.to(student_logits.dtype)
    if others["logits_are_probs"]:
        x, y = (z.clamp_min(1e-8).log() for z in (x, y))
    if others["top_k"]:
        kept = teacher_logits.topk(others["top_k"], -1).indices
        x, y = (z.gather(-1, kept) for z in (x, y))
    if labels is not None:
        x, y = x[labels != -100], y[labels != -100]
    p, q = ((z / temperature).log_softmax(-1) for z in (x, y))
    if beta in (0, 1):
        p, q = (p, q) if beta == 0 else (q, p)
        terms = q.exp() * (q - p)
    else:
        m = (beta * q.exp() + (1 - beta) * p.exp()).log()
        terms = beta * q.exp() * (q - m) + (1 - beta) * p.exp() * (p - m)
    if num_items_in_batch is not None:
        return terms.sum() / num_items_in_batch
    if reduction == "none":
        return terms
    rows = max(terms[..., 0].numel(), 1) if labels is not None else first
    return terms.sum() / {"sum": 1, "mean": max(terms.numel(), 1), "batchmean": rows}[reduction]


OPS = {
    "linear_distillation": linear_distillation,
    "linear_token_losses": linear_token_losses,
    "DistillationHead": distillation_head,
    "generalized_jsd_loss": generalized_jsd,
}
