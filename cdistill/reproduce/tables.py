"""Tables as data: each row a change of one recipe, with the paper's figures and the orders that the paper claims."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import field
from pathlib import Path
from typing import Annotated, Literal, TypeAlias

from annotated_types import Gt
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from cdistill.data import strict_yaml
from cdistill.errors import InputError
from cdistill.train.recipes.mistakes import build

TABLES = Path(__file__).with_name("tables")
STRICT = ConfigDict(extra="forbid", strict=True)
TUNE = "tune"  # the table whose rows are the methods, each with a grid of learning rates

Factor: TypeAlias = Annotated[float, Gt(0)]
Column: TypeAlias = Literal["recognition", "compositional", "greedy", "area"]


@dataclass(frozen=True, config=STRICT)
class Row:
    """A student: what differs from the pair's recipe.

    Attributes:
        set: overrides ``key=value``; ``{teacher}`` in one stands for the recipe's teacher, ``{NAME}`` for a part.
        objectives: of the recipe's stages, by their places; none leaves them.
        samples: factor of the samples of all stages.
        rate: factor of the learning rates of the stages that train the language model.
        method: row of the table ``tune`` whose learning rates it takes.
        paper: the paper's figures in percent: VQA average, compositional average.
    """

    set: tuple[str, ...] = ()
    objectives: tuple[str, ...] | None = None
    samples: Factor = 1.0
    rate: Factor = 1.0
    method: str = "all"
    paper: tuple[float, float] | None = None


@dataclass(frozen=True, config=STRICT)
class Part:
    """A model that rows are made of and the package does not ship: a run of a recipe, trained before the rows and kept."""

    recipe: str
    set: tuple[str, ...] = ()


@dataclass(frozen=True, config=STRICT)
class Claim:
    """What the paper claims, or we ask: one row is better than another in a column."""

    better: str
    worse: str
    column: Column = "compositional"


@dataclass(frozen=True, config=STRICT)
class Table:
    """One table.

    Attributes:
        title: its subject.
        source: where the paper has it, or why we ask.
        rows: by name, in order.
        reference: the row that differences are taken to.
        claims: orders of two rows.
        sizes: factors of the samples of all stages; several make curves.
        rates: grid of factors of learning rates; only `TUNE` has several.
        notes: sentences below the table.
        parts: models that rows name.
        pairs: of colour and shape that the questions are about (`cdistill.builtin.task.BuiltinTask.pairs`).
    """

    title: str
    source: str
    rows: dict[str, Row]
    reference: str
    claims: tuple[Claim, ...] = ()
    sizes: tuple[Factor, ...] = (1.0,)
    rates: tuple[Factor, ...] = (1.0,)
    notes: tuple[str, ...] = ()
    parts: dict[str, Part] = field(default_factory=dict)
    pairs: Literal["all", "unseen"] = "all"

    def __post_init__(self) -> None:
        found = list(self._problems())
        if found:
            raise InputError("\n".join(found))

    def _problems(self) -> Iterator[str]:
        named = {"reference": self.reference}
        for i, claim in enumerate(self.claims):
            named |= {f"claims[{i}].better": claim.better, f"claims[{i}].worse": claim.worse}
            if claim.column == "area" and len(self.sizes) < 2:
                yield f"claims[{i}].column must not be area: sizes has one, which makes no curve"
        for key, name in named.items():
            if name not in self.rows:
                yield f"{key} must be a row ({', '.join(self.rows)}), got {name!r}"
        for key in ("sizes", "rates"):
            values = getattr(self, key)
            if not values or list(values) != sorted(set(values)):
                yield f"{key} must rise, got {list(values)}"

    @property
    def curves(self) -> bool:
        """Whether it shows accuracy against samples."""
        return len(self.sizes) > 1


def names() -> list[str]:
    """Names of the tables in the package, as the paper numbers them, ours after those."""
    found = (path.stem for path in TABLES.glob("*.yaml"))
    return sorted(found, key=lambda name: (not name.startswith("table"), len(name), name))


def load_table(name_or_path: str) -> Table:
    """A table of the package, or one in a YAML file. Raises ValueError for an unknown one, or for one that is wrong."""
    path = TABLES / f"{name_or_path}.yaml" if name_or_path in names() else Path(name_or_path)
    if not path.is_file():
        raise InputError(f"table {name_or_path!r} is neither a file nor one of {', '.join(names())}")
    content = strict_yaml.load(path.read_text(encoding="utf-8"), f"table {path}")
    if not isinstance(content, dict):
        raise InputError(f"table {path} must be a mapping of keys to values")
    try:
        return build(Table, content)
    except ValueError as error:
        raise InputError(f"table {path}: {error}") from None
