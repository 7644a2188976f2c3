"""What ops hand to backends and engines: values made of a call's arguments, checked once, and how operators take them.

Operators of torch.library take flat arguments. A value reaches one as its fields in their order, ``*value``; the schemas that
stand here name them, so that no operator lists them again.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor

Gradients = tuple[Tensor, Tensor, Tensor]
# From the gradient of the log-sum-exp, dlse (B,Hq,T), to the gradients of q and k that it gives.
Base = Callable[[Tensor], tuple[Tensor, Tensor]]


class AttentionProblem(NamedTuple):
    """Softmax attention, whole or at some rows and columns. Row i sees key j where causality, key_mask and documents allow it.

    Tensors (B,heads,T,D) are fp16, bf16 or fp32, have unit stride on D and one dtype and device. The queries are those of the
    last tokens: of all, if there are as many as keys. What has neither documents nor fewer queries than keys goes to backends
    and engines as it is, the rest in pieces (`_pieces`) unless a backend takes it.
    """

    q: Tensor  # (B,Hq,T,D), or fewer tokens
    k: Tensor  # (B,Hkv,T,D), Hkv divides Hq
    v: Tensor | None = None  # (B,Hkv,T,D); None where only the probabilities are asked for
    key_mask: Tensor | None = None  # (B,T) bool, contiguous, True = real key
    causal: bool = True
    scale: float = 1.0  # of the scores q.k; above 0
    documents: list[int] | None = None  # [0, ..., T]: tokens between two of these see each other alone; B is 1
    rows: Tensor | None = None  # (B,R) int32 or int64, contiguous, distinct, -1 = padding; None: all
    cols: Tensor | None = None  # (B,V) likewise
    lse: Tensor | None = None  # (B,Hq,T) fp32, natural; for some, split (2,B,Hq,T); None: not known
    each: bool = False  # whether a slice is of each head, or the mean of the heads

    @property
    def qkv(self) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of whole attention."""
        assert self.v is not None
        return self.q, self.k, self.v

    @property
    def positions(self) -> tuple[Tensor, Tensor]:
        """Rows and columns of a slice."""
        assert self.rows is not None and self.cols is not None
        return self.rows, self.cols

    @property
    def group(self) -> int:
        """Query heads for each key head."""
        return self.q.shape[1] // self.k.shape[1]

    @property
    def offset(self) -> int:
        """Position of the first query."""
        return self.k.shape[2] - self.q.shape[2]

    @property
    def query_rows(self) -> Tensor:
        """Which of the queries the rows are, -1 for padding."""
        rows = self.positions[0]
        return rows if self.offset == 0 else (rows - self.offset).clamp(min=-1)

    @property
    def slice_shape(self) -> tuple[int, ...]:
        """(B,R,V), or (B,Hq,R,V) for each."""
        rows, cols = self.positions
        return *self.q.shape[: 2 if self.each else 1], rows.shape[1], cols.shape[1]

    @property
    def empty(self) -> bool:
        """Whether the slice has no entry."""
        return 0 in self.slice_shape


class Comparison(NamedTuple):
    """What slices are compared with, and how. N is the number of slices: B, or B*Hq for each head's."""

    row_valid: Tensor  # (N,R) bool: rows that see one of their columns
    col_valid: Tensor  # (N,V) bool: columns that are not padding
    target: Tensor  # (N,R,V) fp32, contiguous; as the caller gave it (B,R,V) or (B,Hq,R,V), any floating dtype
    loss: str
    reduction: str
    sink_filter: bool


class VocabularyRows(NamedTuple):
    """Rows of logits (c,V) fp32, fp16 (not on the CPU) or bf16, padded to multiples of 64 elements, and their losses."""

    student: Tensor  # (c,V)
    teacher: Tensor | None  # (c,V); None with `top`
    top: tuple[Tensor, Tensor, Tensor] | None  # teacher's: log-probabilities (c,K), indices, the (c,) of all others
    labels: Tensor  # (c,) int64
    ce: Tensor  # (c,) fp32, written
    kd: Tensor  # (c,) fp32, written


class VocabularyOptions(NamedTuple):
    """What is computed of rows of logits."""

    divergence: str
    temperature: float
    beta: float  # of "jsd"
    ce_weight: float
    kd_weight: float
    gradient: bool  # whether the student's logits become the gradient of ce_weight * ce + kd_weight * kd


_SCHEMA_TYPES = {Tensor: "Tensor", Tensor | None: "Tensor?", bool: "bool", float: "float", list[int] | None: "int[]?"}
_FIELDS = [f"{_SCHEMA_TYPES[of]} {name}" for name, of in AttentionProblem.__annotations__.items()]
PROBLEM = ", ".join(_FIELDS)  # "Tensor q, Tensor k, Tensor? v, ..., bool each"
OF_WHOLE = AttentionProblem._fields.index("rows")  # how many of the fields say all of whole attention
WHOLE = ", ".join(_FIELDS[:OF_WHOLE])
COMPARISON = "Tensor target, str loss, str reduction, bool sink_filter"  # as the caller gives it


def problem_of(arguments: Sequence[Any], fields: int = len(_FIELDS)) -> tuple[AttentionProblem, Sequence[Any]]:
    """The value that the first ``arguments`` of an operator stand for, as PROBLEM or WHOLE names them, and the others."""
    return AttentionProblem(*arguments[:fields]), arguments[fields:]
