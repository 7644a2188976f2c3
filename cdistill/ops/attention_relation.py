"""Distance of a student's attention from a teacher's, both recomputed from queries and keys: a block of rows at a time.

A relation says what takes the place of queries and keys: "qk" queries and keys, as in attention; "qq" queries, "kk" keys and
"vv" values among themselves, as MiniLM and LinearARD relate tokens, softmax over all tokens that a row sees. "qq" reads q
alone, "kk" k alone, and for "vv" the values are given in place of q; what is not read may be None. Each side has its own.
"""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cdistill.choices import RELATION_LOSSES, RELATIONS
from cdistill.errors import InputError
from cdistill.ops._contract import (
    attention_problem,
    require_choice,
    require_device,
    require_loss,
    require_shape,
    require_tensor,
)
from cdistill.ops._dispatch import Backend
from cdistill.ops._operators import differentiable, operator
from cdistill.ops._pieces import InPieces, backend_of
from cdistill.ops._pipeline import checked_regions, empty_own_lse, empty_slice_gradients, no_lse, slice_gradients
from cdistill.ops._problem import PROBLEM, AttentionProblem, Gradients, problem_of
from cdistill.ops._relation import Block, Gradient, Relation, Walk
from cdistill.ops._relation_losses import Compared, Moments, gradient, losses, moments_shape

_ARGUMENTS = (
    f"{PROBLEM}, Tensor[] teacher_q, Tensor[] teacher_k, Tensor[] teacher_lse, Tensor? teacher_key_mask, "
    "float teacher_scale, int[]? teacher_documents, Tensor teacher_rows, Tensor teacher_cols, int groups, str loss, "
    "str reduction, bool sink_filter, "
    "str? impl"
)


class _Call(NamedTuple):
    """The arguments of an operator put together again."""

    relation: Relation
    loss: str
    reduction: str
    sink_filter: bool
    impl: str | None
    kept: Sequence[Any]  # what the backward pass has of the forward pass

    @property
    def backend(self) -> Backend:
        """The backend for both sides; raises ValueError if it cannot compute one of them."""
        of_teacher = backend_of(self.impl, self.relation.teacher[0], "teacher_q")
        of_student = backend_of(self.impl, self.relation.student, "student_q")
        return of_teacher if isinstance(of_teacher, InPieces) else of_student

    def compared(self, row_valid: Tensor, col_valid: Tensor) -> Compared:
        """What is compared of every one of the N slices."""
        rows, cols = (x.repeat_interleave(self.relation.groups, 0) for x in (row_valid, col_valid))
        return Compared(rows, cols, self.loss, self.reduction, self.sink_filter)

    def moments_shape(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of the two tensors of `Moments`."""
        rows, cols = self.relation.student.positions
        compared = Compared(rows, cols, self.loss, self.reduction, self.sink_filter)
        return moments_shape(self.reduction, compared.by_rows, self.relation.samples, cols.shape[1])


def _call(arguments: Sequence[Any]) -> _Call:
    student, rest = problem_of(arguments)
    layers_q, layers_k, layers_lse, *rest = rest
    key_mask, scale, documents, rows, cols, groups, loss, reduction, sink_filter, impl, *kept = rest
    shared = {"key_mask": key_mask, "causal": student.causal, "scale": scale, "documents": documents}
    shared |= {"rows": rows, "cols": cols}
    teacher = [
        AttentionProblem(q, k, lse=lse, each=student.each, **shared)
        for q, k, lse in zip(layers_q, layers_k, layers_lse or [None] * len(layers_q), strict=True)
    ]
    return _Call(Relation(student, teacher, groups), loss, reduction, sink_filter, impl, kept)


@operator("attention_relation", _ARGUMENTS, 9)
def _forward(*arguments: Any) -> tuple[Tensor, ...]:
    call = _call(arguments)
    relation, q = call.relation, call.relation.student.q
    chosen = call.backend
    row_valid, col_valid = checked_regions(chosen, relation.student)
    checked_regions(chosen, relation.teacher[0])
    if relation.empty:
        sizes, columns = call.moments_shape()
        empty = q.new_zeros(sizes, dtype=torch.float64), q.new_zeros(columns, dtype=torch.float32)
        last = (q.new_empty(relation.last_shape, dtype=torch.float32) for _ in range(2))
        return q.new_zeros(q.shape[0], dtype=torch.float32), row_valid, col_valid, *empty, no_lse(q), no_lse(q), *last
    walk = Walk(chosen, relation)
    of_slices, moments = losses(chosen, walk, call.compared(row_valid, col_valid))
    assert walk.last is not None
    of_samples = of_slices.view(q.shape[0], -1).mean(1)
    return of_samples, row_valid, col_valid, *moments, walk.own_lse, walk.teacher_lse, *walk.last


@_forward.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    call = _call(arguments)
    relation, q = call.relation, call.relation.student.q
    chosen = call.backend
    rows, cols = relation.student.positions
    sizes, columns = call.moments_shape()
    valid = torch.empty_like(rows, dtype=torch.bool), torch.empty_like(cols, dtype=torch.bool)
    moments = q.new_empty(sizes, dtype=torch.float64), q.new_empty(columns, dtype=torch.float32)
    own = [empty_own_lse(chosen, layers[0]) for layers in ([relation.student], relation.teacher)]
    lse = (
        x.new_empty((n, *x.shape)) if x.dim() > 1 else x for x, n in zip(own, (1, len(relation.teacher)), strict=True)
    )
    last = (q.new_empty(relation.last_shape, dtype=torch.float32) for _ in range(2))
    return q.new_empty(q.shape[0], dtype=torch.float32), *valid, *moments, *lse, *last


@operator(
    "attention_relation_backward",
    f"Tensor grad, {_ARGUMENTS}, Tensor row_valid, Tensor col_valid, Tensor sizes, Tensor columns, Tensor own_lse, "
    "Tensor own_teacher_lse, Tensor last_a, Tensor last_target",
    3,
)
def _backward(grad: Tensor, *arguments: Any) -> Gradients:
    call = _call(arguments)
    problem = call.relation.student

    def differentiate() -> Gradients:
        chosen = call.backend
        row_valid, col_valid, sizes, columns, own_lse, teacher_lse, *last = call.kept
        walk = Walk(chosen, call.relation, own_lse, teacher_lse, (last[0], last[1]))
        compared = call.compared(row_valid, col_valid)
        weight, found = (grad / call.relation.groups).repeat_interleave(call.relation.groups), Gradient(chosen, walk)

        def add(block: Block) -> None:
            da = gradient(chosen, block, compared, Moments(sizes, columns), weight, problem.q.dtype)
            found.add(block, da, call.loss)

        walk.each(add)
        return found.result()

    return slice_gradients(problem, differentiate)


@_backward.register_fake
def _(grad: Tensor, *arguments: Any) -> Gradients:
    return empty_slice_gradients(problem_of(arguments)[0])


differentiable("attention_relation", leaves=("q", "k", "lse"), results=1, keeps=[1, 2, 3, 4, 5, 6, 7, 8])


class _Given(NamedTuple):
    """One side's arguments of the public function, of a student or of a teacher's layer or window."""

    side: str
    q: Any
    k: Any
    lse: Any
    relation: str
    rows: Tensor
    cols: Tensor
    scale: float | None
    key_mask: Tensor | None
    cu_seqlens: Tensor | Sequence[int] | None

    @property
    def names(self) -> dict[str, str]:
        """What the arguments of `attention_problem` are called here."""
        q, k = "k" if self.relation == "kk" else "q", "q" if self.relation in ("qq", "vv") else "k"
        names = {"q": f"{self.side}_{q}", "k": f"{self.side}_{k}", "lse": f"{self.side}_lse"}
        others = () if self.side == "student" else ("rows", "cols", "scale", "key_mask", "cu_seqlens")
        return names | {name: f"{self.side}_{name}" for name in others}

    def problem(self, **options: Any) -> AttentionProblem:
        """Checked as one; what the relation does not read may be None."""
        require_choice(f"{self.side}_relation", self.relation, RELATIONS)
        names = self.names
        q, k = self.k if self.relation == "kk" else self.q, self.q if self.relation in ("qq", "vv") else self.k
        for name, tensor in (("q", q), ("k", k)):
            require_tensor(names[name], tensor)
        if self.side == "teacher":
            q, k = q.detach(), k.detach()
        options |= {"lse": self.lse, "scale": self.scale, "key_mask": self.key_mask, "cu_seqlens": self.cu_seqlens}
        try:
            return attention_problem(q, k, None, (self.rows, self.cols), **options)
        except ValueError as error:  # begins with the name of an argument, and may speak of q
            first, rest = str(error).split(" ", 1)
            rest = re.sub(r"\bq\b", names["q"], rest)
            raise InputError(f"{names.get(first, first)} {rest}") from None


def _layers(window: _Given) -> list[_Given]:
    """A window's layers, one if it is no list; what is None is None for all."""
    lists = {name: getattr(window, name) for name in ("q", "k", "lse")}
    lists = {name: list(x) if isinstance(x, list | tuple) else [x] for name, x in lists.items() if x is not None}
    count = max([1, *[len(x) for x in lists.values()]])
    for name, x in lists.items():
        if len(x) != count:
            others = f"as many layers as the window's other lists, {count}"
            raise InputError(f"teacher_{name} must hold {others if x else 'at least one layer'}, got {len(x)}")
    return [window._replace(**{name: x[i] for name, x in lists.items()}) for i in range(count)]


def _window(
    given: _Given, student: AttentionProblem, key_mask: Tensor | None, **options: Any
) -> list[AttentionProblem]:
    """The teacher's layers as problems, all of one shape; ``key_mask`` is the student's."""
    layers = _layers(given)
    if given.key_mask is None and key_mask is not None:
        read, keys = layers[0].q if given.relation in ("qq", "vv") else layers[0].k, student.k.shape[2]
        tokens = read.shape[2] if isinstance(read, Tensor) and read.dim() == 4 else keys
        if tokens != keys:
            raise InputError(
                f"teacher_key_mask must be given with a key_mask where the teacher has other tokens, {tokens}, than the "
                f"student, {keys}"
            )
        layers = [layer._replace(key_mask=key_mask) for layer in layers]
    problems, names = [layer.problem(**options) for layer in layers], given.names
    first = problems[0]
    for problem in problems:
        for name, x, like in (("q", problem.q, first.q), ("k", problem.k, first.k)):
            require_shape(names[name], x, tuple(like.shape), "B, H, T, D", " like the window's first layer")
            require_device(names[name], x, student.q.device, "the student's tensors")
            if x.dtype != like.dtype:
                raise InputError(f"{names[name]} must be {like.dtype} like the window's first layer, got {x.dtype}")
    for name, axes, x, like in zip(("rows", "cols"), ("B, R", "B, V"), first.positions, student.positions, strict=True):
        require_shape(names[name], x, tuple(like.shape), axes, " like the student's")
    return problems


def _groups(student: AttentionProblem, teacher: AttentionProblem) -> int:
    """Slices of a sample that are compared."""
    if not student.each:
        return 1
    fewer, more = sorted((student.q.shape[1], teacher.q.shape[1]))
    if more % fewer:
        raise InputError(
            f"heads='each' needs equally many heads, or a multiple of the other model's, got {student.q.shape[1]} for the "
            f"student and {teacher.q.shape[1]} for the teacher; use heads='mean'"
        )
    return fewer


def _flat(student: AttentionProblem, teacher: list[AttentionProblem]) -> tuple[Any, ...]:
    """The problems as the operator takes them."""
    groups = _groups(student, teacher[0])
    first, lse = teacher[0], [layer.lse for layer in teacher if layer.lse is not None]
    layers = [layer.q for layer in teacher], [layer.k for layer in teacher], lse
    of_first = first.key_mask, first.scale, first.documents, *first.positions
    return *student._replace(each=groups > 1), *layers, *of_first, groups


def attention_relation(
    student_q: Tensor | None,
    student_k: Tensor | None,
    teacher_q: Tensor | Sequence[Tensor] | None,
    teacher_k: Tensor | Sequence[Tensor] | None,
    rows: Tensor,
    cols: Tensor,
    *,
    loss: str = "cosine",
    reduction: str = "row",
    sink_filter: bool = False,
    heads: str = "mean",
    student_lse: Tensor | None = None,
    teacher_lse: Tensor | Sequence[Tensor] | None = None,
    causal: bool = True,
    scale: float | None = None,
    key_mask: Tensor | None = None,
    teacher_scale: float | None = None,
    teacher_key_mask: Tensor | None = None,
    teacher_rows: Tensor | None = None,
    teacher_cols: Tensor | None = None,
    student_relation: str = "qk",
    teacher_relation: str = "qk",
    impl: str | None = None,
    cu_seqlens: Tensor | Sequence[int] | None = None,
    teacher_cu_seqlens: Tensor | Sequence[int] | None = None,
) -> Tensor:
    """Distance of a student's attention slice from a teacher's, per sample (paper 3.2); neither slice is stored.

    The loss is `attention_alignment`'s with the target attention_slice(teacher_q, teacher_k, teacher_rows, teacher_cols),
    or the mean of a window of these. Both sides are recomputed, block of rows by block of rows.

    Args:
        student_q, student_k: (B,Hq,T,D) and (B,Hkv,T,D), as in attention_slice.
        teacher_q, teacher_k: likewise, of other heads, tokens, width and dtype; or two lists, the layers of a window.
        loss: as in attention_alignment; or "reverse_kl", the student against the target, with the same least share.
        heads: "mean"; or "each", compared one by one. Where a model has a multiple of the other's heads, the slices of
            its consecutive heads are averaged in groups.
        student_lse, teacher_lse: as in attention_slice, (B,heads,tokens) of the relation; a list for a window.
        teacher_rows, teacher_cols, teacher_key_mask, teacher_cu_seqlens: (B,R), (B,V), (B,Tt), (S+1,), else the student's.
        scale, teacher_scale: of the scores; by default one over the root of each side's own width.
        student_relation, teacher_relation: see the top of this file.
        reduction, sink_filter, rows, cols, causal (of both), key_mask, impl, cu_seqlens: as in attention_alignment.

    Returns:
        (B,) fp32, as attention_alignment. Differentiable once in student_q, student_k and student_lse. Beside inputs and
        gradients (summed in fp32) it holds O(B (R + V)), log-sum-exps, and slices of a constant number of rows.

    Raises:
        ValueError: as attention_alignment, or the two sides, or the layers of the window, do not fit each other.
    """
    options = {"causal": causal, "heads": heads}
    how = student_relation, rows, cols, scale, key_mask, cu_seqlens
    student = _Given("student", student_q, student_k, student_lse, *how).problem(**options)
    require_loss(loss, reduction, sink_filter, RELATION_LOSSES)
    places = rows if teacher_rows is None else teacher_rows, cols if teacher_cols is None else teacher_cols
    documents = cu_seqlens if teacher_cu_seqlens is None else teacher_cu_seqlens
    how = teacher_relation, *places, teacher_scale, teacher_key_mask, documents
    teacher = _window(_Given("teacher", teacher_q, teacher_k, teacher_lse, *how), student, key_mask, **options)
    return torch.ops.cdistill.attention_relation(*_flat(student, teacher), loss, reduction, sink_filter, impl)[0]
