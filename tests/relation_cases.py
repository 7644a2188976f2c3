"""Calls of attention_relation of given sizes, and how they are compared with float64."""

from dataclasses import dataclass, field
from typing import Any

import any_calls
import torch

from cdistill.ops import attention_relation, reference

REDUCTIONS = [("row", False), ("matrix", False), ("column", False), ("column", True)]


@dataclass
class Side:
    """One model's tensors: a list of layers' queries and keys."""

    q: list
    k: list
    scale: float | None
    relation: str
    lse: list | None = None

    def read(self, layer):
        """Queries and keys of a layer's relation."""
        q, k = self.q[layer], self.k[layer]
        return {"qk": (q, k), "qq": (q, q), "kk": (k, k), "vv": (q, q)}[self.relation]

    def given(self, number=None):
        """What the op is given: None for what it does not read; a list for a window."""
        q = None if self.relation == "kk" else self.q
        k = None if self.relation in ("qq", "vv") else self.k
        return [None if x is None else x[0] if len(x) == 1 else x for x in (q, k)]


@dataclass
class Call:
    """Arguments of attention_relation on the CPU."""

    student: Side
    teacher: Side
    rows: torch.Tensor
    cols: torch.Tensor
    options: dict[str, Any] = field(default_factory=dict)
    block: int = 4

    def leaves(self):
        """What has a gradient: the student's tensors, and its lse if one is given."""
        found = [x for x in self.student.given() if x is not None]
        return found + (self.student.lse or [])

    def run(self, op, leaves, **options):
        """op on these leaves; everything else in their dtype and on their device, if they are float64."""
        like, rest = leaves[0], list(leaves)
        student = [None if x is None else rest.pop(0) for x in self.student.given()]
        wide = (lambda x: x.double()) if like.dtype == torch.float64 else (lambda x: x.to(like.device))

        def moved(x):
            return [wide(y) for y in x] if isinstance(x, list) else None if x is None else wide(x)

        lse = {"student_lse": rest.pop() if rest else None}
        lse["teacher_lse"] = None if self.teacher.lse is None else [x.to(like.device) for x in self.teacher.lse]
        if lse["teacher_lse"] is not None and len(self.teacher.q) == 1:
            lse["teacher_lse"] = lse["teacher_lse"][0]
        named = {k: v.to(like.device) if isinstance(v, torch.Tensor) else v for k, v in self.options.items()}
        named |= {"scale": self.student.scale, "teacher_scale": self.teacher.scale}
        named |= {"student_relation": self.student.relation, "teacher_relation": self.teacher.relation}
        places = self.rows.to(like.device), self.cols.to(like.device)
        return op(*student, *map(moved, self.teacher.given()), *places, **named, **lse, **options)


def positions(generator, batch, tokens, count, kept):
    """Distinct positions (B,count) in any order, ``kept`` of them in every sample, the others -1."""
    found = torch.full((batch, count), -1)
    for b in range(batch):
        n = min(kept[b % len(kept)], tokens, count)
        found[b, torch.randperm(count, generator=generator)[:n]] = torch.randperm(tokens, generator=generator)[:n]
    return found


def tensor(generator, order, gap, heads, batch, tokens, width, dtype=torch.float32):
    """(B,heads,T,D) with its axes in any order in memory, and unit stride on D."""
    sizes = [(batch, heads, tokens)[axis] for axis in order]
    x = torch.randn(*sizes, width + gap, generator=generator).to(dtype)[..., gap:]
    return x.permute(*(order.index(axis) for axis in range(3)), 3)


def check(call, impl):
    """Losses and gradients as `any_calls.check` compares them; returns ours."""
    made = call.options | {"rows": call.rows, "cols": call.cols, "scale": call.student.scale}
    made |= {"teacher_scale": call.teacher.scale}
    for name, side in (("student", call.student), ("teacher", call.teacher)):
        lse = side.lse if side.lse is None or len(side.lse) > 1 else side.lse[0]
        made |= dict(zip((f"{name}_q", f"{name}_k"), side.given(), strict=True))
        made |= {f"{name}_lse": lse, f"{name}_relation": side.relation}
    leaves = {name: made.pop(f"student_{name}") for name in ("q", "k", "lse")}
    leaves = {f"student_{name}": x for name, x in leaves.items() if x is not None}
    made |= {f"student_{name}": None for name in ("q", "k", "lse") if f"student_{name}" not in leaves}
    sizes = {name: x.shape[-1] ** -0.5 for name, x in leaves.items()}
    upstream, way = [torch.arange(1.0, len(call.rows) + 1)], any_calls.Way(rows=call.block)
    given = any_calls.Call(
        attention_relation, reference.attention_relation, leaves, made, {"impl": impl}, upstream, sizes, way=way
    )
    results, gradients = any_calls.check(given)
    return [*results, *gradients]


def drawn(numbers=(2, 4), layers=1, seed=0, tokens=(23, 31), dtype=torch.float32, **options):
    """A call with padding, a key mask, grouped queries of the teacher, other tokens and other widths than the student's."""
    generator = torch.Generator().manual_seed(seed)
    sizes = zip(numbers, tokens, (16, 24), (1, layers), strict=True)
    student, teacher = (
        Side(
            [tensor(generator, (0, 1, 2), 0, h, 2, t, d, dtype) for _ in range(n)],
            [tensor(generator, (0, 1, 2), 0, max(1, h // 2), 2, t, d, dtype) for _ in range(n)],
            None,
            "qk",
        )
        for h, t, d, n in sizes
    )
    places = [positions(generator, 2, tokens[0], n, [n, n - 2]) for n in (9, 11)]
    options["teacher_rows"], options["teacher_cols"] = (positions(generator, 2, tokens[1], n, [n]) for n in (9, 11))
    for name, count in (("key_mask", tokens[0]), ("teacher_key_mask", tokens[1])):
        options[name] = torch.arange(count).expand(2, -1) >= torch.tensor([[0], [5]])
    return Call(student, teacher, *places, options)
