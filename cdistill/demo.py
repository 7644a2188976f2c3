"""``cdistill demo``: an SFT and a CompoDistill student of one base on the same data, compared with their teacher."""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cdistill.analysis.comparison import DISTILLED, NAMES, SFT, TEACHER, Comparison
from cdistill.runtime.provenance import provenance
from cdistill.train import Recipe, load_recipe, run
from cdistill.train.terms import TERMS

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from cdistill.analysis.attention import AttentionSimilarity
    from cdistill.analysis.report import Example

RECIPES = {SFT: "demo-sft", DISTILLED: "demo-compodistill"}
QUESTIONS = 500  # per sub-type
EVALUATION_SEED = 1  # tuning read the questions of seed 0
LOOKED_THROUGH = 60  # questions per compositional sub-type from which the report takes its examples
SIMILARITY_QUESTIONS = 20  # per sub-type
EXAMPLES = {(False, True): 2, (True, False): 1, (True, True): 1, (False, False): 1}  # (SFT right, CompoDistill right)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the command takes."""
    parser.add_argument(
        "--seeds", type=int, default=1, metavar="N", help="train with N seeds: mean and spread (default: 1)"
    )
    parser.add_argument(
        "--output", type=Path, default=Path("runs/demo"), help="folder of the results (default: %(default)s)"
    )
    parser.add_argument("--n", type=int, default=QUESTIONS, help="questions per sub-type (default: %(default)s)")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="change a key of both recipes, or of one: sft:key=value, compodistill:key=value",
    )


def main(options: argparse.Namespace) -> int:
    """Run the demo and print its table."""
    comparison = demo(seeds=options.seeds, output=options.output, n=options.n, overrides=options.overrides)
    print(f"\n{comparison.table()}\n")
    print(f"written: {options.output / 'results.json'}, {options.output / 'report.html'}")
    return 0


def demo_recipes(overrides: Sequence[str] = ()) -> dict[str, Recipe]:
    """The two recipes of the demo, checked to be comparable.

    ``overrides`` are ``key=value`` for both, ``sft:key=value`` or ``compodistill:key=value`` for one. Raises ValueError
    for an override that does not fit and for recipes whose students would not differ in the method alone.
    """
    chosen: dict[str, list[str]] = {model: [] for model in RECIPES}
    for override in overrides:
        model, colon, rest = override.partition(":")
        targets, text = ([model], rest) if colon and model in RECIPES else (list(RECIPES), override)
        if text.split("=")[0].strip() == "output":
            raise ValueError("output is not an override of the demo: use --output")
        for target in targets:
            chosen[target].append(text)
    recipes = {model: load_recipe(name, chosen[model]) for model, name in RECIPES.items()}
    check_comparable(recipes[SFT], recipes[DISTILLED])
    return recipes


def check_comparable(a: Recipe, b: Recipe) -> None:
    """Raise ValueError unless two recipes train from one base on the same samples in the same order and steps."""

    def facts(recipe: Recipe) -> dict[str, Any]:
        stages = [recipe.stage[name] for name in recipe.stages]
        return {
            "seed": recipe.seed,
            "student.base": recipe.student.base,
            "student.text_config": recipe.student.text_config,
            "number of stages": len(stages),
            "samples of the stages": [stage.steps * stage.global_batch_size for stage in stages],
            "global_batch_size of the stages": [stage.global_batch_size for stage in stages],
            "data of the stages": [stage.data for stage in stages],
        }

    for name, value in facts(a).items():
        other = facts(b)[name]
        if value != other:
            raise ValueError(f"recipes {a.name} and {b.name} cannot be compared: {name} differs ({value} and {other})")


def demo(*, seeds: int, output: Path, n: int = QUESTIONS, overrides: Sequence[str] = ()) -> Comparison:
    """Train both students with ``seeds`` seeds, evaluate them and the teacher, and write results.json and report.html.

    ``output`` receives ``seed-<s>/sft``, ``seed-<s>/compodistill`` (layout of `cdistill.train.run`) and the two files.
    Runs that ``output`` already holds are continued, or used if they are finished. ``n`` questions per sub-type.

    Raises:
        ValueError: seeds or n is not positive, an override does not fit, or ``output`` holds runs of other recipes.
    """
    for name, value in (("seeds", seeds), ("n", n)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    recipes = demo_recipes(overrides)
    teacher_reference = recipes[DISTILLED].teacher
    if teacher_reference is None:
        raise ValueError(f"teacher of recipe {recipes[DISTILLED].name} must be given: there is nothing to distil")

    from cdistill.eval.builtin_task import Exam
    from cdistill.models.load import load_for_evaluation
    from cdistill.train.build import build_models

    for recipe in recipes.values():  # the second run would find a mistake only after the first one has been trained
        build_models(recipe)
    started = time.perf_counter()
    training_seeds = [recipes[SFT].seed + i for i in range(seeds)]
    folders = {model: [output / f"seed-{s}" / model for s in training_seeds] for model in RECIPES}
    finals: dict[str, list[Path]] = {model: [] for model in RECIPES}
    for i, seed in enumerate(training_seeds):
        for model, recipe in recipes.items():
            print(f"training: {NAMES[model]}, seed {seed}, in {folders[model][i]}", flush=True)
            finals[model].append(_train(replace(recipe, seed=seed, output=str(folders[model][i]))))
    trained = time.perf_counter()
    print(f"evaluating with {n} questions per sub-type", flush=True)
    teacher = load_for_evaluation(teacher_reference, "teacher")
    exam = Exam(n=n, seed=EVALUATION_SEED)
    students: dict[str, list[Any]] = {model: [] for model in RECIPES}
    first: dict[str, PreTrainedModel] = {TEACHER: teacher}
    for model, paths in finals.items():
        for path in paths:
            student = load_for_evaluation(str(path), model)
            students[model].append(exam.evaluate(student, NAMES[model]))
            first.setdefault(model, student)
    comparison = Comparison(exam.evaluate(teacher, NAMES[TEACHER]), students, training_seeds)
    meta = _meta(recipes, n) | {
        "seconds": {"training": round(trained - started, 1), "evaluation": round(time.perf_counter() - trained, 1)}
    }
    _write(output / "results.json", json.dumps(comparison.results() | {"meta": meta}, indent=2) + "\n")
    write_report(
        output / "report.html", comparison, first, metrics={m: _metrics(folders[m][0]) for m in RECIPES}, meta=meta
    )
    return comparison


def write_report(
    path: Path,
    comparison: Comparison,
    models: Mapping[str, PreTrainedModel],
    *,
    metrics: Mapping[str, Sequence[Mapping[str, Any]]],
    meta: Mapping[str, Any],
) -> None:
    """Look at the attention of the three ``models`` (teacher, sft, compodistill) and write the report.

    ``metrics`` are the lines of both students' metrics.jsonl, ``meta`` the facts shown at the end.
    """
    from cdistill.analysis.report import Report

    outcomes, examples = find_examples(models, per_subtype=LOOKED_THROUGH)
    report = Report(
        comparison=comparison,
        metrics=metrics,
        losses={term.name: term.heading for term in TERMS.values() if term.heading},
        similarity=measure_similarity(models),
        outcomes=outcomes,
        examples=examples,
        meta=_flat(meta),
    )
    _write(path, report.html())


def measure_similarity(models: Mapping[str, PreTrainedModel]) -> dict[str, dict[str, AttentionSimilarity]]:
    """Attention similarity to the teacher by family of questions and student, on held-out questions."""
    from cdistill.analysis.attention import attention_similarity
    from cdistill.builtin.scorer import FAMILIES, batches, held_out_questions

    result = {}
    for family, subtypes in FAMILIES.items():
        data = (
            batch
            for subtype in subtypes
            for batch in batches(held_out_questions(subtype, n=SIMILARITY_QUESTIONS, seed=EVALUATION_SEED), 100)
        )
        similar = attention_similarity([models[m] for m in RECIPES], models[TEACHER], data)
        result[family] = dict(zip(RECIPES, similar, strict=True))
    return result


def find_examples(
    models: Mapping[str, PreTrainedModel], *, per_subtype: int
) -> tuple[Counter[tuple[bool, bool]], list[Example]]:
    """Outcomes (SFT right, CompoDistill right) of held-out compositional questions, and the first of every outcome.

    Sub-types are gone through in turn; a sub-type is not shown twice unless there is no other.
    """
    from cdistill.analysis.attention import answer_attention, visual_understanding_layers
    from cdistill.analysis.report import Example
    from cdistill.builtin.dataset import ASSISTANT, Collator
    from cdistill.builtin.scorer import FAMILIES, batches, held_out_questions, predict
    from cdistill.data.samples import IMAGE_TOKEN

    data = {s: held_out_questions(s, n=per_subtype, seed=EVALUATION_SEED) for s in FAMILIES["compositional"]}
    tokenizer = next(iter(data.values())).tokenizer
    answers: dict[str, dict[tuple[int, str], tuple[list[int], list[int]]]] = {model: {} for model in models}
    for subtype, asked in data.items():
        for start, batch in zip(range(0, per_subtype, 100), batches(asked, 100), strict=True):
            for name, model in models.items():
                said = predict(model, batch, eos_token_id=tokenizer.eos_token_id)
                answers[name] |= {(start + i, subtype): pair for i, pair in enumerate(said)}
    places = sorted(answers[SFT], key=lambda place: place[0])
    right = {m: {place: said == truth for place, (said, truth) in answers[m].items()} for m in RECIPES}
    outcome = {place: (right[SFT][place], right[DISTILLED][place]) for place in places}

    picked: list[tuple[int, str]] = []
    for wanted, count in EXAMPLES.items():
        for _ in range(count):
            left = [place for place in places if outcome[place] == wanted and place not in picked]
            shown = {subtype for _, subtype in picked}
            picked += ([place for place in left if place[1] not in shown] or left)[:1]

    def decode(ids: list[int]) -> str:
        return " ".join(tokenizer.convert_ids_to_tokens(ids))

    examples = []
    for index, subtype in picked:
        item = data[subtype][index]
        batch = Collator(tokenizer.pad_token_id)([item])
        text = decode(item["input_ids"].tolist())
        examples.append(
            Example(
                subtype=subtype,
                question=text.split(f" {ASSISTANT}")[0].rsplit(f"{IMAGE_TOKEN} ", 1)[1],
                answer=decode(answers[SFT][index, subtype][1]),
                answers={m: decode(answers[m][index, subtype][0]) for m in models},
                image=item["pixel_values"].numpy(),
                attention={
                    m: answer_attention(model, batch, visual_understanding_layers(model)).mean(0)[0].tolist()
                    for m, model in models.items()
                },
            )
        )
    return Counter(outcome.values()), examples


def _train(recipe: Recipe) -> Path:
    return run(recipe, resume=(Path(recipe.output) / "recipe.yaml").is_file())


def _metrics(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def _write(path: Path, text: str) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def _meta(recipes: Mapping[str, Recipe], n: int) -> dict[str, Any]:
    return {
        "recipes": {model: recipe.name for model, recipe in recipes.items()},
        "teacher": recipes[DISTILLED].teacher,
        "n": n,
        "evaluation_seed": EVALUATION_SEED,
    } | provenance()


def _flat(meta: Mapping[str, Any]) -> dict[str, Any]:
    """Nested facts as one level of words."""
    return {
        key.replace("_", " "): ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, Mapping) else value
        for key, value in meta.items()
        if value is not None
    }
