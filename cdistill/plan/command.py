"""The ``cdistill plan`` command: what a run needs on each GPU, against what a GPU has."""

from __future__ import annotations

import argparse
import re
from typing import Any

from cdistill.errors import InputError
from cdistill.menu import recipe_argument
from cdistill.runtime.memory import memory

MOST = 10**15  # of what a number that counts bytes or tokens may be
UNITS = {"": 10**9, "G": 10**9, "GB": 10**9, "GIB": 2**30, "M": 10**6, "MB": 10**6, "MIB": 2**20}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Recipe, overrides, GPUs and the sizes of samples."""
    recipe_argument(parser, "change a key, as in deepspeed=3")
    parser.add_argument(
        "--gpu",
        metavar="MEMORY",
        help="memory of one GPU, as in 24GB or 80GiB (default: of the GPU here or, without one, for a run on this CPU)",
    )
    parser.add_argument("--gpus", type=int, help="number of GPUs (default: the recipe's processes)")
    parser.add_argument(
        "--sequence-parallel", type=int, metavar="N", help="GPUs that share every sequence (default: the recipe's)"
    )
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp16"), help="default: the recipe's, bf16 for auto")
    parser.add_argument("--length", type=int, help="tokens of a sample (default: 2048, or what the student can take)")
    parser.add_argument("--visual", type=int, help="visual tokens of a sample (default: those of one image)")
    parser.add_argument("--answers", type=int, help="labelled tokens of a sample (default: all that are not visual)")


def memory_size(text: str) -> int:
    """Bytes of a text such as 24GB (10^9), 80GiB (2^30) or 80G. Raises ValueError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Z]*)", text.strip(), re.IGNORECASE)
    if match is None or match[2].upper() not in UNITS or not 0 < float(match[1]) < MOST:
        raise InputError(f"gpu must be a size such as 24GB or 80GiB, got {text!r:.60}")
    return int(float(match[1]) * UNITS[match[2].upper()])


def main(options: argparse.Namespace) -> int:
    """Print the plan; 0 if it fits, 1 if it does not."""
    limit = None if options.gpu is None else memory_size(options.gpu)
    if options.gpus is not None and options.gpus < 1:
        raise InputError(f"gpus must be at least 1, got {options.gpus}")
    for name in ("gpus", "length", "visual", "answers"):
        if (getattr(options, name) or 0) > MOST:
            raise InputError(f"{name} must be at most {MOST:,}, got {getattr(options, name)}")
    from cdistill.plan.memory import plan
    from cdistill.plan.suggestions import suggestions
    from cdistill.train.recipes import load_recipe

    shared = options.sequence_parallel
    more = [] if shared is None else [f"sequence_parallel={shared}"]
    recipe = load_recipe(options.recipe, [*options.overrides, *more])
    sizes = {name: getattr(options, name) for name in ("precision", "length", "visual", "answers")}
    sizes["gpus"] = options.gpus or max(recipe.processes, shared or 1)
    sizes["device"], limit = ("cuda", limit) if limit is not None else here(sizes["gpus"])
    if sizes["device"] == "cpu" and recipe.precision == "auto":
        sizes["precision"] = sizes["precision"] or "fp32"
    planned = plan(recipe, **sizes)
    print("\n".join(table(planned, limit)))
    each = "GPU" if sizes["device"] == "cuda" else "process"
    if planned.total <= limit:
        print(f"fits: {_gb(limit - planned.total)} GB of {_gb(limit)} GB per {each} are left")
        return 0
    print(f"does not fit: {_gb(planned.total - limit)} GB more than {_gb(limit)} GB per {each}")
    found = suggestions(planned, limit, **sizes)
    lines = [(" ".join(x.overrides), f"-{_gb(x.saved)}", _gb(x.total)) for x in found]
    width = max((len(line[0]) for line in lines), default=0)
    if lines:
        print(
            "\nkeys that help, each on top of those above it, with the GB that each saves and the largest stage after it"
        )
    for keys, saved, total in lines:
        print(f"  {keys:{width}}  {saved:>7}  {total:>7}")
    if found and found[-1].total <= limit:
        print("with all of them it fits")
    else:
        print(
            "no key that is left makes it fit: shorter samples (--length, --answers), more GPUs or a smaller model would"
        )
    return 1


def here(processes: int) -> tuple[str, int]:
    """cuda and the bytes of the smallest GPU of this machine; without one, cpu and the free memory that a process may take.

    Raises ValueError where neither is known.
    """
    import torch

    if torch.cuda.is_available():
        return "cuda", min(torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count()))
    found = memory()
    if found is None:
        raise InputError("gpu must be given, as in --gpu 24GB: the memory of this machine is not known")
    return "cpu", found.free // processes


def table(planned: Any, limit: int) -> list[str]:
    """Lines with the GB of every component of every stage, at the moment when the stage needs most."""
    stages = planned.stages
    names = list(dict.fromkeys(name for stage in stages for name in stage.components))
    first = stages[0].setting
    widths = [max(10, len(stage.name), len(stage.peak)) for stage in stages]
    left = max(len(name) for name in [*names, "samples per step"])

    def row(name: str, values: list[str]) -> str:
        return f"{name:{left}}" + "".join(f"  {value:>{width}}" for value, width in zip(values, widths, strict=True))

    one, many = ("GPU", "GPUs") if first.device == "cuda" else ("process on the CPU", "processes on the CPU")
    how = f"{first.gpus} {one if first.gpus == 1 else many}, {first.precision}, deepspeed {first.zero}"
    lines = [
        f"{planned.recipe.name}: {how}; GB per {one.split()[0]}, at the moment that needs most",
        "",
        row("stage", [stage.name for stage in stages]),
        row("at", [stage.peak for stage in stages]),
        row("micro-batch", [str(stage.setting.batch) for stage in stages]),
        row("tokens", [str(stage.setting.length) for stage in stages]),
        row("  visual", [str(stage.setting.visual) for stage in stages]),
        row("  labelled", [str(stage.setting.answers) for stage in stages]),
    ]
    lines += [
        row(name, [_gb(stage.components[name]) if name in stage.components else "-" for stage in stages])
        for name in names
    ]
    lines.append(row("total", [_gb(stage.total) for stage in stages]))
    lines.append(row("left", [_gb(limit - stage.total) for stage in stages]))
    return [*lines, "", *planned.remarks]


def _gb(size: int) -> str:
    return f"{size / 10**9:.2f}"
