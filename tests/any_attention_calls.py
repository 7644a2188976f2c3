"""Calls of the attention ops with any of their options, drawn by hypothesis."""

from typing import Any

import torch
from any_calls import Call, Drawing
from hypothesis import strategies as st

from cdistill import choices, ops
from cdistill.ops import reference


def tokens_of(d: Drawing) -> int:
    return d.number(100, 300) if not d.small and d.chance(6) else d.number(1, 40 if d.small else 50)


def head_dim(d: Drawing, tokens: int) -> int:
    return 8 * (d.number(2, 8) if tokens > 50 or d.chance(2) else d.number(2, 32))


def scale(d: Drawing) -> float | None:
    return d.one_of(None, None, 0.7, -0.3, 0.0, 1, 1e-6)


def problem(d: Drawing, values: bool = False) -> dict[str, Any]:
    """q, k (and v), and the options that say who sees whom: of whole samples, packed documents, or fewer queries than keys."""
    tokens, kind = tokens_of(d), d.one_of("whole", "whole", "documents", "fewer queries")
    batch = 1 if kind == "documents" else d.number(1, 2 if tokens > 50 else 3)
    k_heads, group = d.number(1, 2 if tokens > 50 else 3), d.number(1, 2 if tokens > 50 else 4)
    width, queries = head_dim(d, tokens), d.number(1, tokens) if kind == "fewer queries" else tokens
    made: dict[str, Any] = {"q": d.normal(batch, k_heads * group, queries, width)}
    for name in ("k", "v") if values else ("k",):
        made[name] = d.normal(batch, k_heads, tokens, width)
    made |= {"causal": d.one_of(True, False), "scale": scale(d), "cu_seqlens": None}
    made["key_mask"] = d.mask(batch, tokens) if d.chance(2) else None
    if kind == "documents":
        made["cu_seqlens"] = d.cut(tokens)
    return made


def places(d: Drawing, made: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Any rows and columns of a problem."""
    batch, _, queries, _ = made["q"].shape
    tokens = made["k"].shape[2]
    most = queries + 2 if tokens <= 50 or d.chance(3) else 12
    rows = d.positions(batch, tokens - queries, tokens, min(most, 110))
    return {"rows": rows, "cols": d.positions(batch, 0, tokens, tokens + 2)}


def near_lse(d: Drawing, q: torch.Tensor, k: torch.Tensor, **seen: Any) -> torch.Tensor:
    """Somewhat off the log-sum-exp, and whatever where no key is seen."""
    lse = reference.flash_attention(q.float(), k.float(), k.float(), **seen)[1]
    lse = lse + 0.3 * torch.randn(lse.shape, generator=d.generator)
    lse = lse if d.chance(2) else lse.masked_fill(lse.isinf(), 0.5)
    return d.laid_out(
        lse, alike=0 if lse.isinf().any() else 9
    )  # that of a row that sees nothing must not become all rows'


def _seen(made: dict[str, Any]) -> dict[str, Any]:
    return {name: made[name] for name in ("causal", "scale", "key_mask", "cu_seqlens")}


def _sizes(made: dict[str, Any], share: float = 1.0) -> dict[str, float]:
    factor = share * abs(made["q"].shape[3] ** -0.5 if made["scale"] is None else made["scale"])
    k, q = (float(made[name].double().abs().max()) for name in ("k", "q"))
    return {"q": factor * k, "k": factor * q, "v": 1.0, "lse": share}


def _sizes_of_whole(made: dict[str, Any]) -> dict[str, Any]:
    """Of attention with values. Flash attention's backward pass subtracts dout.out from a score's gradient, with out as it was
    given: in half precision D products with half an ulp each, which add up by chance (three times what
    is likely), as do the rows and heads that a key's
    gradient sums. Eager has nothing of the kind.
    """
    v, size = made["v"].double(), max(1.0, float(made["v"].abs().max()))
    rounded = 0.0
    if made["v"].dtype.itemsize == 2:
        rounded = 3 * 2.0**19 * torch.finfo(made["v"].dtype).eps * float(v.square().mean().sqrt()) * v.shape[3] ** 0.5
    p = reference.attention_probabilities(made["q"].double(), made["k"].double(), **_seen(made))
    by_key = float(p.square().unflatten(1, (v.shape[1], -1)).sum((2, 3)).max().sqrt())
    times = {"q": rounded, "k": rounded * max(1.0, by_key)}
    sizes = {name: x * (size + times.get(name, 0.0)) for name, x in _sizes(made).items()}
    return {"sizes": sizes, "unit": size}


def _not_asked(made: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Queries that are no rows, and keys that nobody sees."""
    queries, tokens = made["q"].shape[2], made["k"].shape[2]
    asked = torch.zeros(len(made["q"]), tokens, dtype=torch.bool)
    for b, rows in enumerate(made["rows"].long()):
        asked[b, rows[rows >= 0]] = True
    asked = asked[:, tokens - queries :]
    untouched = {"q": ~asked[:, None].expand(made["q"].shape[:3])}
    untouched["lse"] = untouched["q"]
    if made["key_mask"] is not None:
        untouched["k"] = ~made["key_mask"][:, None].expand(made["k"].shape[:3])
    return untouched


def _call(d: Drawing, op: Any, oracle: Any, made: dict[str, Any], leaves: tuple[str, ...], **others: Any) -> Call:
    """A call of arguments by name, some of whose leaves are differentiated."""
    wanted = d.some(*(name for name in leaves if made.get(name) is not None))
    settings = {"impl": d.impl, **others.pop("settings", {})}
    if made.get("cu_seqlens") is not None:
        settings["cu_seqlens"] = d.as_given(made["cu_seqlens"])
    given = {name: made[name] for name in wanted}, {name: x for name, x in made.items() if name not in wanted}
    untouched = {name: x for name, x in others.pop("untouched", {}).items() if name in wanted}
    return Call(op, oracle, *given, settings, untouched=untouched, way=d.way(), seed=d.seed, **others)


def attention_slice(d: Drawing) -> Call:
    made = problem(d)
    made |= places(d, made) | {"heads": d.one_of("mean", "each")}
    made["lse"] = near_lse(d, made["q"], made["k"], **_seen(made)) if d.chance(4) else None
    share = 1 / made["q"].shape[1] if made["heads"] == "mean" else 1.0
    how = {"upstream": d.kinds(1), "sizes": _sizes(made, share), "untouched": _not_asked(made), "same_bits": True}
    return _call(d, ops.attention_slice, reference.attention_slice, made, ("q", "k", "lse"), **how)


def _accumulated(sums: torch.Tensor, windows: list[int], **arguments: Any) -> torch.Tensor:
    sums = sums.clone()
    ops.attention_slice_accumulate(sums=sums, windows=windows, **arguments)
    return sums


def _accumulated_by_definition(sums: torch.Tensor, windows: list[int], **arguments: Any) -> torch.Tensor:
    sums, a = sums.clone(), reference.attention_slice(**arguments)
    for w in windows:
        sums[w] += a
    return sums


def attention_slice_accumulate(d: Drawing) -> Call:
    call = attention_slice(d)
    made = call.leaves | call.constants
    a = reference.attention_slice(**made)
    count = d.number(1, 4)
    sums = torch.rand(count, *a.shape, generator=d.generator).to(d.one_of(*d.dtypes))
    windows = d.draw(st.lists(st.integers(0, count - 1), unique=True, max_size=count))
    call.op, call.oracle, call.upstream, call.untouched = _accumulated, _accumulated_by_definition, [], {}
    call.leaves, call.constants = {}, made | {"sums": sums, "windows": windows}
    return call


def _target(d: Drawing, made: dict[str, Any]) -> torch.Tensor:
    """A slice of any floating dtype, some rows zero, NaN where it is not read: at padding."""
    rows, cols = made["rows"], made["cols"]
    shape = (*made["q"].shape[: 2 if made["heads"] == "each" else 1], rows.shape[1], cols.shape[1])
    target = torch.rand(shape, generator=d.generator) / max(1, shape[-1])
    if d.chance(3):
        target *= torch.rand(*shape[:-1], 1, generator=d.generator) < 0.7
    if d.chance(3):  # as where the teacher does not see what the student sees
        target *= torch.rand(shape, generator=d.generator) < 0.7
    padding = (rows < 0)[:, :, None] | (cols < 0)[:, None]
    target = target.masked_fill(padding[:, None] if made["heads"] == "each" else padding, torch.nan)
    dtype = d.one_of(*d.dtypes, torch.float32, torch.float64)
    return d.laid_out(target.to(dtype), alike=0 if padding.any() else 9)  # NaN of padding must not become that of all


def _alignment(d: Drawing, values: bool = False) -> dict[str, Any]:
    made = problem(d, values)
    made |= places(d, made) | {"heads": d.one_of("mean", "each")} | d.comparison(choices.ALIGNMENT_LOSSES)
    return made | {"target": _target(d, made)}


def attention_alignment(d: Drawing) -> Call:
    made = _alignment(d)
    made["lse"] = near_lse(d, made["q"], made["k"], **_seen(made)) if d.chance(4) else None
    how = {"upstream": d.kinds(1), "sizes": _sizes(made), "untouched": _not_asked(made), "same_bits": True}
    return _call(d, ops.attention_alignment, reference.attention_alignment, made, ("q", "k", "lse"), **how)


def _engine(d: Drawing) -> str | None:
    return d.one_of("triton", "triton", "torch_flash", None) if d.small else d.one_of("torch_flash", None)


def _both_by_definition(v: torch.Tensor, **arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    out, _ = reference.flash_attention(arguments["q"], arguments["k"], v, **_seen(arguments))
    return out, reference.attention_alignment(**arguments)


def attention_with_alignment(d: Drawing) -> Call:
    made, leaves = _alignment(d, values=True), ("q", "k", "v")
    how = {"upstream": d.kinds(2)} | _sizes_of_whole(made)
    call = _call(d, ops.attention_with_alignment, _both_by_definition, made, leaves, **how)
    call.settings["engine"] = _engine(d)
    return call


def flash_attention(d: Drawing) -> Call:
    made = problem(d, values=True)
    how = {"upstream": d.kinds(2)} | _sizes_of_whole(made)
    call = _call(d, ops.flash_attention, reference.flash_attention, made, ("q", "k", "v"), **how)
    call.settings["impl"] = None
    call.settings |= {"impl": "triton"} if d.small and d.chance(2) else {"engine": _engine(d)}
    return call


def slice_alignment(d: Drawing) -> Call:
    """Of slices as attention makes them, without the shares around 2^-126 that count as the least one or not.

    Where one of both is below it the gradient of "jsd" in the other is that of two equal ones, off by up to 1. Nothing of that
    is left in a score's gradient, which is the product with the share.
    """
    d.dtype = torch.float32
    made = problem(d) | {"cu_seqlens": None}
    made |= places(d, made) | {"heads": d.one_of("mean", "each")}
    a, target = (reference.attention_slice(**(made | {"q": made["q"] * sign})) for sign in (1, -1))
    a, target = (torch.where(x < 2.0**-90, 0.0, x) for x in (a, target))
    if d.chance(2):
        target = target * (torch.rand(target.shape, generator=d.generator) < 0.7)
    given = {name: made[name] for name in ("rows", "cols", "causal", "key_mask")} | d.comparison(
        choices.ALIGNMENT_LOSSES
    )
    given |= {"a": d.laid_out(a), "target": d.laid_out(target)}
    sizes = {name: 1 / max(float(given[name].mean()), 1e-6) if a.numel() else 1.0 for name in ("a", "target")}
    how = {"upstream": d.kinds(1), "sizes": sizes, "slopes": True, "same_bits": True}
    leaves = ("a",) if given["sink_filter"] else ("a", "target")
    return _call(d, ops.slice_alignment, _of_slices, given, leaves, **how)


def _of_slices(a, target, rows, cols, key_mask, causal, loss, reduction, sink_filter):
    slices = [x if x.dim() == 4 else x[:, None] for x in (a, target)]
    how = rows, cols, key_mask, causal, loss, reduction, sink_filter
    return reference._compared(*slices, *how)


OPS = {
    op.__name__: op
    for op in (
        attention_slice,
        attention_slice_accumulate,
        attention_alignment,
        attention_with_alignment,
        flash_attention,
        slice_alignment,
    )
}


def _side(
    d: Drawing, name: str, batch: int, tokens: int, heads: int, layers: int, documents: list[int] | None
) -> dict[str, Any]:
    """One model's tensors of attention_relation and how it sees them, the options by their names."""
    relation = d.one_of("qk", "qk", *choices.RELATIONS)
    k_heads = heads if relation == "kk" else d.one_of(*(h for h in range(1, heads + 1) if heads % h == 0))
    width, d.dtype = head_dim(d, tokens), d.one_of(*d.dtypes)
    queries = d.number(1, tokens) if relation == "qk" and documents is None and d.chance(4) else tokens
    made = {f"{name}_relation": relation, "queries": queries, "scale": scale(d), "documents": documents}
    q, k = ([d.normal(batch, *sizes, width) for _ in range(layers)] for sizes in ((heads, queries), (k_heads, tokens)))
    made |= {"q": None if relation == "kk" else q, "k": None if relation in ("qq", "vv") else k}
    made["read"] = {"qk": (q, k), "qq": (q, q), "kk": (k, k), "vv": (q, q)}[relation]
    return made


def attention_relation(d: Drawing) -> Call:
    """Any two models: other heads, tokens, widths, dtypes, relations, documents, masks and places."""
    tokens = tokens_of(d)
    elsewhere = d.chance(2)
    of_teacher = tokens_of(d) if elsewhere else tokens
    packed = d.chance(4)
    batch = 1 if packed else d.number(1, 2 if max(tokens, of_teacher) > 50 else 3)
    documents = [d.cut(n) if packed and d.chance(2) else None for n in (tokens, of_teacher)]
    if documents[0] is not None and elsewhere and documents[1] is None:
        documents[1] = [0, of_teacher]
    heads, fewer, times, layers = d.one_of("mean", "each"), d.number(1, 3), d.number(1, 3), d.number(1, 3)
    numbers = d.draw(st.permutations((fewer, d.number(1, 4) if heads == "mean" else fewer * times)))
    if documents[1] is None and documents[0] is not None:
        documents[1] = documents[0]
    student = _side(d, "student", batch, tokens, numbers[0], 1, documents[0])
    teacher = _side(d, "teacher", batch, of_teacher, numbers[1], layers, documents[1])
    made: dict[str, Any] = {"causal": d.one_of(True, False), "heads": heads} | d.comparison(
        choices.RELATION_LOSSES if d.impl != "triton" else choices.ALIGNMENT_LOSSES
    )
    made["key_mask"] = d.mask(batch, tokens) if d.chance(2) else None
    masked = d.chance(3) or (made["key_mask"] is not None and elsewhere)
    made["teacher_key_mask"] = d.mask(batch, of_teacher) if masked else None
    most = min(student["queries"], 20) + 2
    rows = d.positions(batch, tokens - student["queries"], tokens, most)
    cols = d.positions(batch, 0, tokens, min(tokens, 100) + 2)
    made |= {"rows": rows, "cols": cols}
    if elsewhere or teacher["queries"] != student["queries"] or d.chance(4):
        first = of_teacher - teacher["queries"]
        made["teacher_rows"] = d.positions(batch, first, of_teacher, most, rows.shape[1])
        made["teacher_cols"] = d.positions(batch, 0, of_teacher, most, cols.shape[1])
    lse: dict[str, list[torch.Tensor] | None] = {"student": None, "teacher": None}
    masks = {"student": made["key_mask"], "teacher": made["teacher_key_mask"]}
    if masks["teacher"] is None:
        masks["teacher"] = made["key_mask"]
    for name, side in (("student", student), ("teacher", teacher)):
        seen = {
            "causal": made["causal"],
            "scale": side["scale"],
            "key_mask": masks[name],
            "cu_seqlens": side["documents"],
        }
        if d.chance(4):
            lse[name] = [near_lse(d, q, k, **seen) for q, k in zip(*side["read"], strict=True)]
    as_list = layers > 1 or d.chance(3)
    for name, side in (("student", student), ("teacher", teacher)):
        for which, x in (("q", side["q"]), ("k", side["k"]), ("lse", lse[name])):
            made[f"{name}_{which}"] = x if x is None or (name == "teacher" and as_list) else x[0]
        made[f"{name}_relation"] = side[f"{name}_relation"]
    made |= {"scale": student["scale"], "teacher_scale": teacher["scale"], "cu_seqlens": documents[0]}
    made["teacher_cu_seqlens"] = documents[1] if documents[1] != documents[0] or d.chance(2) else None
    q, k = (x[0] for x in student["read"])
    sizes = {f"student_{name}": x for name, x in _sizes({"q": q, "k": k, "scale": student["scale"]}).items()}
    if student["student_relation"] != "qk":
        sizes = {name: 2 * x for name, x in sizes.items()}
    leaves = ("student_q", "student_k", "student_lse")
    how = {"upstream": d.kinds(1), "sizes": sizes, "same_bits": True}
    return _call(d, ops.attention_relation, reference.attention_relation, made, leaves, **how)


OPS["attention_relation"] = attention_relation
