"""The benchmarks by name, one module each, imported when asked for."""

from __future__ import annotations

from importlib import import_module

from cdistill.errors import InputError
from cdistill.eval.contract import Benchmark

NAMES = (
    *("sugarcrepe", "sade", "bivlc", "winoground", "rbench", "reefknot", "vsr", "mmvp", "naturalbench", "pope"),
    *("vqav2", "vizwiz", "gqa", "textvqa", "mme", "builtin"),
)
GROUPS = {
    "compositional": ("sugarcrepe", "sade", "bivlc", "winoground"),
    "hallucination": ("rbench", "reefknot"),
    "vqa": ("vqav2", "vizwiz", "gqa", "textvqa", "mme"),
}
GROUPS["paper"] = (*GROUPS["vqa"], *GROUPS["compositional"], *GROUPS["hallucination"])


def get(name: str) -> Benchmark:
    """The benchmark of a name; ValueError says which there are."""
    if name not in NAMES:
        raise InputError(f"there is no benchmark {name!r}; there are {', '.join(NAMES)}")
    return import_module(f"{__name__}.{name}").BENCHMARK


def names(task: str) -> tuple[str, ...]:
    """The names that a task stands for: its own, or those of a group; ValueError says which tasks there are."""
    if task in GROUPS:
        return GROUPS[task]
    if task not in NAMES:
        raise InputError(f"there is no task {task!r}; there are {', '.join((*NAMES, *GROUPS))}")
    return (task,)
