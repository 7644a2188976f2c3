"""The names that arguments, recipe keys and options may have, each list in one place; importing this is cheap.

A test walks every list: each name works, and any other is refused by all that take one (tests/test_choices.py).
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeAlias, get_args, get_origin, get_type_hints

from annotated_types import Ge, Gt, Le, Lt

from cdistill.errors import InputError

# Attention ops.
AlignmentLoss: TypeAlias = Literal["cosine", "mse", "kl", "jsd"]
RelationLoss: TypeAlias = Literal["cosine", "mse", "kl", "jsd", "reverse_kl"]
Relation: TypeAlias = Literal["qk", "qq", "kk", "vv"]
Reduction: TypeAlias = Literal["row", "matrix", "column"]
Heads: TypeAlias = Literal["mean", "each"]
Impl: TypeAlias = Literal["torch", "cpp", "triton"]
Engine: TypeAlias = Literal["triton", "torch_flash", "torch_cudnn", "flash_attn_2", "flash_attn_3", "flash_attn_4"]
# Losses over the vocabulary.
Divergence: TypeAlias = Literal["forward_kl", "reverse_kl", "jsd"]
TokenAlignment: TypeAlias = Literal["token", "merged", "uld"]
# Visual attention alignment.
Rows: TypeAlias = Literal["answer", "predicting", "text", "visual", "all"]
Matching: TypeAlias = Literal["group", "simple", "adaptive"]
AlignedHeads: TypeAlias = Literal["mean", "each", "match"]
HeadMatching: TypeAlias = Literal["group", "assignment", "mixture"]
Target: TypeAlias = Literal["stored", "recomputed"]
VisualTokens: TypeAlias = Literal["equal", "resample"]
NamedSpan: TypeAlias = Literal["early", "intermediate", "later", "all", "official"]

ALIGNMENT_LOSSES: tuple[str, ...] = get_args(AlignmentLoss)
RELATION_LOSSES: tuple[str, ...] = get_args(RelationLoss)  # of which the Triton kernels lack the last
RELATIONS: tuple[str, ...] = get_args(Relation)
REDUCTIONS: tuple[str, ...] = get_args(Reduction)
HEADS: tuple[str, ...] = get_args(Heads)
IMPLS: tuple[str, ...] = get_args(Impl)
ENGINES: tuple[str, ...] = get_args(Engine)
REGISTERED_ENGINES: list[str] = []  # those of other packages: `cdistill.ops.register_attention_engine`
VAT_ENGINES = ("sdpa", "auto", *ENGINES)  # transformers' own attention, or an engine that makes the slice beside it
DIVERGENCES: tuple[str, ...] = get_args(Divergence)
TOKEN_ALIGNMENTS: tuple[str, ...] = get_args(TokenAlignment)
ROWS: tuple[str, ...] = get_args(Rows)
MATCHINGS: tuple[str, ...] = get_args(Matching)
ALIGNED_HEADS: tuple[str, ...] = get_args(AlignedHeads)  # what is aligned; the ops know no match
HEAD_MATCHINGS: tuple[str, ...] = get_args(HeadMatching)
TARGETS: tuple[str, ...] = get_args(Target)
VISUAL_TOKENS: tuple[str, ...] = get_args(VisualTokens)
NAMED_SPANS: tuple[str, ...] = get_args(NamedSpan)

# Conversations as text (`cdistill.data.templates`).
Template: TypeAlias = Literal["auto", "plain", "qwen2_base", "vicuna_v1", "chatml"]
TEMPLATES: tuple[str, ...] = get_args(Template)
TEMPLATE_FILE = ".jinja"  # what the path of a template of one's own ends in

# Alignment losses that compare shares: slices are divided by their sums first.
SHARES = ("kl", "jsd", "reverse_kl")


# Numbers, with the bounds that a test of them and a recipe's schema read.
Positive: TypeAlias = Annotated[float, Gt(0), Lt(math.inf)]
NotNegative: TypeAlias = Annotated[float, Ge(0), Lt(math.inf)]
BelowOne: TypeAlias = Annotated[float, Ge(0), Lt(1)]
BetweenZeroAndOne: TypeAlias = Annotated[float, Gt(0), Lt(1)]
FromZeroToOne: TypeAlias = Annotated[float, Ge(0), Le(1)]
AboveZeroToOne: TypeAlias = Annotated[float, Gt(0), Le(1)]

# Of numbers that decide how much work is done or held at once; more would run for years.
MOST_DRAWN = 1_000_000  # questions of a kind, samples, ...
MOST_TURNS = 1000  # questions or sentences of one sample
MOST_SEEDS = 1000  # trainings of each row of a table
MOST_PROCESSES = 1024  # of one machine
SMALLEST, LARGEST = 1e-30, 1e30  # of numbers that kernels take, and divide by, in fp32
MOST = 1 << 53  # of any whole number: JSON has no greater ones that everybody reads alike

_LIMITS = {Ge: ("minimum", "ge"), Gt: ("exclusiveMinimum", "gt"), Le: ("maximum", "le"), Lt: ("exclusiveMaximum", "lt")}


def range_in_words(limits: Mapping[str, float]) -> str:
    """What bounds, by their names in a JSON schema, ask of a number: "at least 0 and below 1"."""
    least, above = limits.get("minimum"), limits.get("exclusiveMinimum")
    most, below = limits.get("maximum"), limits.get("exclusiveMaximum")
    if (above, below) == (0, 1):
        return "between 0 and 1"
    words = [f"{word} {n:g}" for word, n in (("at least", least), ("above", above)) if n is not None]
    words += [f"at most {most:.10g}"] if most is not None else []
    words += [("finite" if below == math.inf else f"below {below:g}")] if below is not None else []
    return " and ".join(words)


def require_count(name: str, value: int, most: int = MOST, least: int = 1) -> None:
    """Raise ValueError, which begins with ``name``, unless ``least`` <= ``value`` <= ``most``."""
    if value < least:
        raise InputError(f"{name} must be at least {least:,}, got {in_short(value)}")
    if value > most:
        raise InputError(f"{name} must be at most {most:,}, got {in_short(value)}")


def begins_at_home(path: str) -> bool:
    """Whether a path begins with ``~``, which shells expand: where they do not, a folder would be called that."""
    return path == "~" or path.startswith("~/")


def too_extreme(value: float) -> bool:
    """Whether a finite number becomes 0 or infinity on the way, in fp32."""
    return value != 0 and math.isfinite(value) and not SMALLEST <= abs(value) <= LARGEST


NOT_EXTREME = f"between {SMALLEST:g} and {LARGEST:g} in size, which fp32 can hold"


def in_short(number: int) -> str:
    """A whole number as a message shows it, of whatever size: 1,000 digits would hide what is said of them."""
    bits = number.bit_length()
    return f"{number}" if abs(number) <= MOST else f"{number:.3g}" if bits < 1000 else f"one of {bits} bits"


def check_choices(config: Any, name: str) -> None:
    """Raise ValueError unless every field of a dataclass is one of the names, truth values or numbers it is annotated with.

    The message begins with ``name`` and the field.
    """
    for field, hint in get_type_hints(type(config), include_extras=True).items():
        value, key = getattr(config, field), f"{name}.{field}"
        if hint is bool and not isinstance(value, bool):
            raise InputError(f"{key} must be true or false, got {value!r}")
        names = get_args(hint) if get_origin(hint) is Literal else ()
        if names and value not in names:
            raise InputError(f"{key} must be one of {', '.join(names)}, got {value!r}")
        limits = {_LIMITS[type(x)][0]: getattr(x, _LIMITS[type(x)][1]) for x in getattr(hint, "__metadata__", ())}
        if limits and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise InputError(f"{key} must be a number, got {value!r}")
        if limits and not _within(value, limits):
            raise InputError(f"{key} must be {range_in_words(limits)}, got {value}")
        if limits and too_extreme(value):
            raise InputError(f"{key} must be {NOT_EXTREME}, got {value}")


def _within(value: float, limits: Mapping[str, float]) -> bool:
    least, most = limits.get("minimum", -math.inf), limits.get("maximum", math.inf)
    above, below = limits.get("exclusiveMinimum"), limits.get("exclusiveMaximum")
    return least <= value <= most and (above is None or value > above) and (below is None or value < below)


# What a recipe's reader asks of both configurations: no other keys, and no other types.
_OF_RECIPES = {"extra": "forbid", "strict": True}


@dataclass(frozen=True)
class VATConfig:
    """Every choice of visual attention alignment (paper section 4.1 and the ablations of 5.3).

    Raises ValueError naming the field and what it allows.
    """

    __pydantic_config__ = _OF_RECIPES

    matching: Matching = "group"
    """How layers of student and teacher are put together (paper section 4.1): a student layer with a window of teacher
    layers, with one, or with those whose attention is nearest where the stage begins."""
    loss: AlignmentLoss = "cosine"
    """Distance of the student's attention from the teacher's."""
    reduction: Reduction = "row"
    """What is compared: every row, the whole slice, or the mean over rows."""
    layers: NamedSpan = "intermediate"
    """Span of both models' layers that is aligned."""
    student_layers: str | Sequence[int] | None = None
    """The student's layers where they are others than `layers` says: a span's name, "first-last" or a list of indices."""
    teacher_layers: str | Sequence[int] | None = None
    """The teacher's layers, likewise."""
    rows: Rows = "text"  # the best in benchmarks/results/demo_rows.json; the paper speaks of answer tokens
    """Tokens whose attention to the visual tokens is compared (`cdistill.vat.token_regions`)."""
    heads: AlignedHeads = "mean"
    """The mean over heads; each head by itself, of models with equal numbers of heads, or with target recomputed a multiple;
    or match: every head of the student with heads of the teacher, of which there may be more or fewer, by `head_matching`."""
    head_matching: HeadMatching = "group"
    """With heads match, what a head of the student is compared with, in each layer of its window: the mean of a contiguous
    group of the teacher's heads; the one of them that the best assignment gives it, by distances measured where a stage begins;
    or a mixture of all heads of the window, whose weights are trained in the stage and thrown away after it."""
    engine: str = "sdpa"
    """What computes the aligned layers' attention: "sdpa", transformers' own beside the alignment; "auto" or an engine of
    `cdistill.ops.attention_with_alignment` ("triton", "torch_flash", "torch_cudnn", "flash_attn_2", "flash_attn_3",
    "flash_attn_4"), which makes both in one forward and one backward pass."""
    sink_filter: bool = False
    """With reduction column, leave attention sinks out (the authors' code)."""
    layer_sum: bool = False
    """Sum over layers, not their mean."""
    target: Target = "stored"
    """What is kept of the teacher's pass: the slice of every window, (rows, visual tokens) of each sample; or the queries and
    keys of its aligned layers, from which the slices are recomputed beside the student's (`cdistill.ops.attention_relation`):
    both in blocks of 288 rows (512 on a GPU), of which the last waits for the backward pass. Needs engine sdpa."""
    visual: VisualTokens = "equal"
    """What teacher and student see images through: equal visual tokens; or, with resample, also others in number or size. Each
    then reads an encoding of its own, and the teacher's attention is resampled to the student's visual tokens by the area of
    the image that they share. Needs target stored, and rows answer, predicting or text."""

    def problems(self) -> Iterator[str]:
        """What is wrong with fields that have the right types, a line for each."""
        engines = (*VAT_ENGINES, *REGISTERED_ENGINES)
        if self.engine not in engines:
            yield f"vat.engine must be one of {', '.join(engines)}, got {self.engine!r}"
        elif self.target == "recomputed" and self.engine != "sdpa":
            yield f"vat.target recomputed needs vat.engine sdpa, got {self.engine!r}: engines compare with stored slices"
        if self.visual == "resample" and self.target == "recomputed":
            yield "vat.visual resample needs vat.target stored, got 'recomputed': what is recomputed is never a slice"
        if self.visual == "resample" and self.rows in ("visual", "all"):
            yield f"vat.visual resample needs vat.rows answer, predicting or text, got {self.rows!r}: visual rows differ, too"
        if self.learns_mixture:
            for key, value, needed in (
                ("engine", self.engine, "sdpa"),
                ("target", self.target, "stored"),
                ("sink_filter", self.sink_filter, False),
            ):
                if value != needed:
                    yield f"vat.{key} must be {str(needed).lower()} with vat.head_matching mixture, got {str(value).lower()}"
        if self.sink_filter and self.reduction != "column":
            yield f"vat.sink_filter needs vat.reduction column, got {self.reduction!r}"

    def __post_init__(self) -> None:
        check_choices(self, "vat")
        found = list(self.problems())
        if found:
            raise InputError("\n".join(found))
        for name in ("student_layers", "teacher_layers"):
            if isinstance(value := getattr(self, name), list):
                object.__setattr__(self, name, tuple(value))

    def sequence_parallel_problems(self) -> Iterator[str]:
        """What needs all heads of a layer in one process."""
        for key, needed in (("engine", "sdpa"), ("target", "stored"), ("visual", "equal")):
            if getattr(self, key) != needed:
                yield f"vat.{key} must be {needed} with sequence_parallel, got {getattr(self, key)}"
        if self.heads == "match":
            yield "vat.heads must be mean or each with sequence_parallel, which spreads them over processes, got match"

    @property
    def assigns_heads(self) -> bool:
        """Whether heads are matched by distances that must be measured."""
        return self.heads == "match" and self.head_matching == "assignment"

    @property
    def learns_mixture(self) -> bool:
        """Whether the targets depend on weights that are trained."""
        return self.heads == "match" and self.head_matching == "mixture"

    @classmethod
    def official(cls) -> "VATConfig":
        """The authors' published code (SPEC's ``official`` recipe), for the model depths it lists."""
        return cls(reduction="column", layers="official", rows="visual", sink_filter=True, layer_sum=True)


@dataclass(frozen=True)
class KDConfig:
    """Distillation over the vocabulary (paper section 3.1), by `cdistill.ops.linear_distillation`.

    Raises ValueError naming the field and what it allows.
    """

    __pydantic_config__ = _OF_RECIPES

    divergence: Divergence = "forward_kl"
    """Distance of the student's distribution of the next token from the teacher's."""
    temperature: Positive = 1.0
    """Divides the logits of both before their softmax."""
    beta: BetweenZeroAndOne = 0.5
    """Share of the teacher in the mixture of divergence jsd, and weight of its part."""
    weight: NotNegative = 1.0
    """Factor of the term in the loss."""
    alignment: TokenAlignment = "token"
    """What of both models' predictions is compared. token: those of each token, of one tokenizer. The others are for
    different tokenizers and chat templates, and compare each span of an answer in which tokens of both begin and end
    together. merged: the probabilities of the span, of the tokens that both vocabularies have, and of all else, by
    `divergence` (after GOLD), and of tokens that only one has sorted probabilities by their L1 distance. uld: sorted
    probabilities of all tokens, by their L1 distance (ULD, arXiv:2402.12030)."""

    def __post_init__(self) -> None:
        check_choices(self, "kd")
        if self.alignment == "uld" and self.divergence != "forward_kl":
            raise InputError(f"kd.divergence must be left out with kd.alignment uld, got {self.divergence!r}")


@dataclass(frozen=True)
class OnPolicyConfig:
    """Distillation on answers that the student itself has generated (GKD: Agarwal et al., 2024, arXiv:2306.13649).

    Raises ValueError naming the field and what it allows.
    """

    __pydantic_config__ = _OF_RECIPES

    on_policy: FromZeroToOne = 0.5
    """Share of samples whose last answer gives way to the student's own reply (GKD's lambda); the others are
    trained on as they are."""
    temperature: NotNegative = 1.0
    """Divides the student's logits before a token is drawn; 0 takes the most likely one."""
    top_p: AboveZeroToOne = 1.0
    """Tokens are drawn from the smallest set that has this share of the probability."""
    max_new_tokens: Annotated[int, Ge(1)] = 128
    """Tokens at which a reply is cut; `max_length` of the data cuts it, too."""
    vllm_server: str | None = None
    """http://HOST:PORT of a vLLM server that generates in the student's place: it takes up the student's weights at every
    step from a folder `served` of the run, which it must see by the same path."""

    def __post_init__(self) -> None:
        check_choices(self, "generation")
        if isinstance(self.max_new_tokens, float):
            raise InputError(f"generation.max_new_tokens must be a whole number, got {self.max_new_tokens}")
