"""``cdistill gradients``: how hard each term of a stage's loss pulls at the student, part by part and layer by layer."""

from __future__ import annotations

import argparse
import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cdistill.choices import require_count
from cdistill.errors import InputError
from cdistill.files import write_text
from cdistill.menu import recipe_argument
from cdistill.train.recipes import Recipe

if TYPE_CHECKING:
    from torch.utils.data import DataLoader

    from cdistill.train.model import DistillationModel
    from cdistill.train.resolve import Run, Stage

_QUERIES_AND_KEYS = re.compile(r"(?:^|[._])(?:q|k|qk|qkv|kv|query_key_value)(?:_[ab])?(?:_(?:proj|norm|layernorm))?\.")
TOTAL, OTHERS = "all", "embeddings, norms and others"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Recipe, stage, samples and the student to look at."""
    recipe_argument(parser, "change a key, as in vat.layers=all")
    parser.add_argument(
        "--stage", metavar="NAME", help="one of the recipe's (default: the first that aligns attention)"
    )
    parser.add_argument(
        "--samples", type=int, default=64, metavar="N", help="of the stage's first (default: %(default)s)"
    )
    parser.add_argument(
        "--student", type=Path, metavar="DIR", help="a result to look at (default: of the stage before, or fresh)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there, too")


def main(options: argparse.Namespace) -> int:
    """Print the table."""
    from cdistill.runtime import launch
    from cdistill.train.recipes import load_recipe

    recipe = load_recipe(options.recipe, options.overrides)
    with launch.quiet():
        result = measure(recipe, stage=options.stage, samples=options.samples, student=options.student)
    if options.json is not None:
        write_text(options.json, json.dumps(result, indent=1) + "\n")
    print("\n".join(table(result)))
    return 0


def measure(
    recipe: Recipe, *, stage: str | None = None, samples: int = 64, student: Path | None = None
) -> dict[str, Any]:
    """Norms of the gradient of each term's mean, weights left out, over the first samples of a stage.

    Args:
        recipe: its models, data, teacher and terms are those of training; it is run by this process alone.
        stage: name, by default of the first stage that aligns attention, or that distils.
        samples: of the stage, at most as many as it has.
        student: folder of a result, by default the one that the stage would begin with.

    Returns:
        ``stage``, ``samples``, ``student``; ``weights`` of the terms in the loss, null for ``vat.weight: auto``; ``norms``
        {part: {term: L2 norm}}, where a part is the adapter, queries and keys of a layer, the rest of it, or what is left, and
        ``all`` of them; and ``balance``, the weight at which the alignment's gradient is as long as that of all other terms
        together, null without one.

    Raises:
        ValueError: an unknown stage, no samples, a folder that is no student, and as `cdistill.train.run`.
        RunError: there is nothing to balance.
    """
    from cdistill.models.parts import named_parts
    from cdistill.train.gradients import balanced_weight, gradient_norms
    from cdistill.train.resolve import resolve

    require_count("--samples", samples)
    run = resolve(replace(recipe, vat=replace(recipe.vat, weight=1.0)), world=1)
    chosen = run.stages[_index(recipe, stage)]
    before = run.stages[chosen.index - 1].folder if chosen.index else None
    start = before if student is None and before is not None and before.is_dir() else student
    count = min(samples, chosen.samples)
    model, batches = _opened(run, chosen, start, count)
    parts = {name: part_of(name, part) for name, _, part in named_parts(model.student)}
    how: dict[str, Any] = {"precision": run.precision, "seed": chosen.seed}
    norms: dict[str, dict[str, float]] = {}
    for term in model.terms:
        for name, norm in gradient_norms(model, {term.name: 1.0}, batches, **how).items():
            for part in (parts.get(name, OTHERS), TOTAL):
                of = norms.setdefault(part, {})
                of[term.name] = math.hypot(of.get(term.name, 0.0), norm)
    weights: dict[str, Any] = {term.name: term.weight for term in model.terms}
    balance = None
    if chosen.aligns:
        weights["vat"] = None if recipe.vat.weight == "auto" else recipe.vat.weight
        balance = balanced_weight(model, batches, label=chosen.label, **how)
    return {
        "stage": chosen.name,
        "samples": count,
        "student": "fresh" if start is None else str(start),
        "weights": weights,
        "norms": {part: norms[part] for part in sorted(norms, key=_order)},
        "balance": balance,
    }


def _opened(run: Run, stage: Stage, start: Path | None, samples: int) -> tuple[DistillationModel, DataLoader]:
    """The losses of a stage for a student, and the batches of its first samples."""
    import torch
    from torch.utils.data import DataLoader, Subset

    from cdistill.models.load import load_model
    from cdistill.train.build import build_models
    from cdistill.train.data import open_stage
    from cdistill.train.stages import Data, losses_of, prepare_student

    models = build_models(run.recipe)
    if start is not None:
        models.student = load_model(start)
    prepare_student(stage, models.student)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, data = losses_of(run, stage, models, Data(*open_stage(stage, models), None), device)
    some = Subset(data.dataset, range(samples))
    return model.to(device), DataLoader(some, stage.micro_batch_size, collate_fn=data.collator)


def table(result: dict[str, Any]) -> list[str]:
    """The numbers as aligned lines, each term by itself and with its weight."""
    weights = {name: result["balance"] if weight is None else weight for name, weight in result["weights"].items()}
    heads = ["", *weights, *(f"{weight:.4g} {name}" for name, weight in weights.items() if weight != 1)]
    lines = [heads]
    for part, of in result["norms"].items():
        weighted = [weight * of[name] for name, weight in weights.items() if weight != 1]
        lines.append([part, *(f"{value:.4g}" for value in (*of.values(), *weighted))])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = [
        f"{line[0]:{widths[0]}}" + "".join(f"  {c:>{w}}" for c, w in zip(line[1:], widths[1:], strict=True))
        for line in lines
    ]
    said = f"{result['stage']}: norms of the terms' gradients on {result['samples']:,} samples, student {result['student']}"
    if result["balance"] is not None:
        text.append(f"the alignment pulls as hard as all other terms together with vat.weight {result['balance']:.4g}")
    return [said, *text]


def part_of(name: str, part: str) -> str:
    """The row of a parameter, by its name and the part of the model that it is of."""
    if part not in ("language", "lora"):
        return part
    layer = re.search(r"\.layers\.(\d+)\.", name)
    if layer is None:
        return OTHERS
    return f"layer {layer[1]}, {'queries and keys' if _QUERIES_AND_KEYS.search(name) else 'the rest'}"


def _order(part: str) -> tuple[int, int, str]:
    layer = re.match(r"layer (\d+)", part)
    place = {"vision": 0, "adapter": 1, TOTAL: 4}.get(part, 3)
    return (2, int(layer[1]), part) if layer else (place, 0, part)


def _index(recipe: Recipe, name: str | None) -> int:
    if name is not None:
        if name not in recipe.stages:
            raise InputError(f"--stage must be one of {', '.join(recipe.stages)}, got {name!r}")
        return recipe.stages.index(name)
    from cdistill.train.objectives import OBJECTIVES

    objectives = [recipe.stage[stage].objective for stage in recipe.stages]
    for wanted in (recipe.aligns, lambda objective: OBJECTIVES[objective].distils):
        found = [i for i, objective in enumerate(objectives) if wanted(objective)]
        if found:
            return found[0]
    return len(objectives) - 1
