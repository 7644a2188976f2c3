"""What sections of a recipe have in common: how pydantic reads them, and how mistakes of several keys are told."""

from collections.abc import Iterator
from typing import Annotated, Any, Literal, TypeAlias

from annotated_types import Ge, Le
from pydantic import BeforeValidator, ConfigDict
from pydantic_core import PydanticKnownError

from cdistill.choices import MOST_PROCESSES, MOST_TURNS
from cdistill.errors import InputError

STRICT = ConfigDict(extra="forbid", strict=True)

AtLeastOne: TypeAlias = Annotated[int, Ge(1)]
Count: TypeAlias = Annotated[int, Ge(0)]
Turns: TypeAlias = Annotated[int, Ge(0), Le(MOST_TURNS)]
Processes: TypeAlias = Annotated[int, Ge(1), Le(MOST_PROCESSES)]
Workers: TypeAlias = Annotated[int, Ge(0), Le(MOST_PROCESSES)]


def _off(value: Any) -> Any:
    """``off`` for what YAML or JSON may make of it; a truth value would count as a number."""
    if value is True:
        raise PydanticKnownError("literal_error", {"expected": "no truth value"})
    return "off" if value is False or value == "no" else value


ZeroStage: TypeAlias = Annotated[Literal[0, 1, 2, 3, "off"], BeforeValidator(_off)]
TeacherZero: TypeAlias = Annotated[Literal[3, "off"], BeforeValidator(_off)]


class Keys:
    """A section of a recipe. Raises ValueError with one line for each thing that is wrong with several keys at once."""

    def problems(self) -> Iterator[str]:
        """What is wrong with keys that are right each by itself; a message begins with a key of this section."""
        yield from ()

    def __post_init__(self) -> None:
        found = list(self.problems())
        if found:
            raise InputError("\n".join(found))
