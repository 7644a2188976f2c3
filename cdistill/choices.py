"""The names that arguments, recipe keys and options may have, each list in one place; importing this imports nothing else.

A test walks every list: each name works, and any other is refused by all that take one (tests/test_choices.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

# Attention ops.
AlignmentLoss: TypeAlias = Literal["cosine", "mse", "kl", "jsd"]
Reduction: TypeAlias = Literal["row", "matrix", "column"]
Heads: TypeAlias = Literal["mean", "each"]
Impl: TypeAlias = Literal["torch", "cpp", "triton"]
Engine: TypeAlias = Literal["triton", "torch_flash", "torch_cudnn", "flash_attn_2", "flash_attn_3", "flash_attn_4"]
# Losses over the vocabulary.
Divergence: TypeAlias = Literal["forward_kl", "reverse_kl", "jsd"]
# Visual attention alignment.
Rows: TypeAlias = Literal["answer", "predicting", "text", "visual", "all"]
Matching: TypeAlias = Literal["group", "simple", "adaptive"]
NamedSpan: TypeAlias = Literal["early", "intermediate", "later", "all", "official"]

ALIGNMENT_LOSSES: tuple[str, ...] = get_args(AlignmentLoss)
REDUCTIONS: tuple[str, ...] = get_args(Reduction)
HEADS: tuple[str, ...] = get_args(Heads)
IMPLS: tuple[str, ...] = get_args(Impl)
ENGINES: tuple[str, ...] = get_args(Engine)
REGISTERED_ENGINES: list[str] = []  # those of other packages: `cdistill.ops.register_attention_engine`
VAT_ENGINES = ("sdpa", "auto", *ENGINES)  # transformers' own attention, or an engine that makes the slice beside it
DIVERGENCES: tuple[str, ...] = get_args(Divergence)
ROWS: tuple[str, ...] = get_args(Rows)
MATCHINGS: tuple[str, ...] = get_args(Matching)
NAMED_SPANS: tuple[str, ...] = get_args(NamedSpan)

# Conversations as text.
TEMPLATES = ("auto", "plain", "qwen2_base", "vicuna_v1", "chatml")  # see `cdistill.data.templates`
TEMPLATE_FILE = ".jinja"  # what the path of a template of one's own ends in

# Alignment losses that compare shares: slices are divided by their sums first.
SHARES = ("kl", "jsd")


@dataclass(frozen=True)
class VATConfig:
    """Every choice of visual attention alignment (paper section 4.1 and the ablations of 5.3).

    - ``matching``: group, simple, adaptive; ``loss``: cosine, mse, kl, jsd; ``reduction``: row, matrix, column;
      ``rows``: answer, predicting, text, visual, all (`cdistill.vat.token_regions`); ``heads``: mean over heads, or each head
      by itself (equal head counts only);
    - ``layers``: span of both models' layers; ``student_layers`` and ``teacher_layers`` override it for one side
      (everything `cdistill.vat.layer_range` takes: a name, "first-last", a list of indices);
    - ``engine``: "sdpa", transformers' own attention beside the alignment; "auto" or an engine of
      `cdistill.ops.attention_with_alignment`, which makes both in one forward and one backward pass;
    - ``sink_filter``: with ``reduction="column"``, leave attention sinks out; ``layer_sum``: sum over layers, not mean.

    Raises ValueError naming the field and what it allows.
    """

    matching: Matching = "group"
    loss: str = "cosine"
    reduction: str = "row"
    layers: str = "intermediate"
    student_layers: str | Sequence[int] | None = None
    teacher_layers: str | Sequence[int] | None = None
    rows: Rows = "text"  # the best in benchmarks/results/demo_rows.json; the paper speaks of answer tokens
    heads: str = "mean"
    engine: str = "sdpa"
    sink_filter: bool = False
    layer_sum: bool = False

    def __post_init__(self) -> None:
        choices = {
            "matching": MATCHINGS,
            "loss": ALIGNMENT_LOSSES,
            "reduction": REDUCTIONS,
            "layers": NAMED_SPANS,
            "rows": ROWS,
            "heads": HEADS,
            "engine": (*VAT_ENGINES, *REGISTERED_ENGINES),
        }
        for field, allowed in choices.items():
            if getattr(self, field) not in allowed:
                raise ValueError(f"vat.{field} must be one of {', '.join(allowed)}, got {getattr(self, field)!r}")
        for field in ("sink_filter", "layer_sum"):
            if not isinstance(getattr(self, field), bool):
                raise ValueError(f"vat.{field} must be true or false, got {getattr(self, field)!r}")
        if self.sink_filter and self.reduction != "column":
            raise ValueError(f"vat.sink_filter needs vat.reduction column, got {self.reduction!r}")

    @classmethod
    def official(cls) -> "VATConfig":
        """The authors' published code (SPEC's ``official`` recipe), for the model depths it lists."""
        return cls(reduction="column", layers="official", rows="visual", sink_filter=True, layer_sum=True)


@dataclass(frozen=True)
class KDConfig:
    """Distillation over the vocabulary (paper section 3.1), by `cdistill.ops.linear_distillation`.

    Raises ValueError naming the field and what it allows.
    """

    divergence: str = "forward_kl"
    temperature: float = 1.0
    beta: float = 0.5
    weight: float = 1.0

    def __post_init__(self) -> None:
        if self.divergence not in DIVERGENCES:
            raise ValueError(f"kd.divergence must be one of {', '.join(DIVERGENCES)}, got {self.divergence!r}")
        if not 0 < self.temperature < float("inf"):
            raise ValueError(f"kd.temperature must be above 0 and finite, got {self.temperature}")
        if not 0 < self.beta < 1:
            raise ValueError(f"kd.beta must be between 0 and 1, got {self.beta}")
        if not 0 <= self.weight < float("inf"):
            raise ValueError(f"kd.weight must be at least 0 and finite, got {self.weight}")
