"""``cdistill analyze``: what a teacher and its students look at."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cdistill.attention import data_options
from cdistill.errors import InputError
from cdistill.eval.run import DTYPES, LOAD_IN, batch_size

if TYPE_CHECKING:
    from cdistill.attention.models import Models

Arguments = Callable[[argparse.ArgumentParser], None]
Main = Callable[[argparse.Namespace], int]


def _models_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "students",
        nargs="+",
        metavar="STUDENT",
        help="folder of a model, a run (its last finished stage) or a peft adapter, builtin:NAME, or an id of the hub",
    )
    parser.add_argument("--teacher", required=True, metavar="MODEL", help="the teacher, named as a student is")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="where results and the page go")
    parser.add_argument(
        "--batch-size", type=batch_size, metavar="N", help="questions of a batch (default: auto, by length and memory)"
    )
    parser.add_argument("--dtype", choices=DTYPES, help="number format (default: the files')")
    parser.add_argument("--load-in", choices=LOAD_IN, help="quantise the language models, with bitsandbytes on a GPU")
    parser.add_argument("--device-map", metavar="MAP", help="spread the models over devices, as accelerate does: auto")


def _sets_arguments(parser: argparse.ArgumentParser) -> None:
    _models_arguments(parser)
    data_options.add_arguments(parser)
    data_options.add_samples(parser)


def _similarity(options: argparse.Namespace) -> int:
    from cdistill.attention.similarity import similarity, table

    return _on_sets("similarity", options, similarity, table)


def _confidence(options: argparse.Namespace) -> int:
    from cdistill.attention.confidence import confidence, table

    return _on_sets("confidence", options, confidence, table)


def _intervene_arguments(parser: argparse.ArgumentParser) -> None:
    _models_arguments(parser)
    data_options.add_arguments(parser)
    parser.add_argument(
        "--share",
        type=float,
        default=0.5,
        help="of the teacher's attention in the new one (default: %(default)s, the average)",
    )
    parser.add_argument(
        "--layers",
        default="intermediate",
        help="student layers: intermediate, early, later, all, or 4-9; named ones get the teacher's by group matching, others "
        "those of the same depth (default: %(default)s)",
    )
    parser.add_argument(
        "--heads",
        default="mean",
        help="mean: all heads, towards the mean over the teacher's; each: head by head, of equally many; 0,3: these heads of "
        "the student alone, towards the mean (default: %(default)s)",
    )


def _intervene(options: argparse.Namespace) -> int:
    from cdistill.attention.intervention import intervene, table

    how = {"span": options.layers, "share": options.share, "heads": options.heads}
    return _on_sets("intervene", options, intervene, table, **how)


def _maps_arguments(parser: argparse.ArgumentParser) -> None:
    _models_arguments(parser)
    parser.add_argument(
        "--image", action="append", type=Path, default=[], help="a picture of your own, several times for several"
    )
    parser.add_argument("--question", help="about --image")
    parser.add_argument("--answer", help="to --question (default: each model says its own)")
    parser.add_argument(
        "--words",
        help="of the question or the answer: draw what their rows look at (default: the rows that predict the answer)",
    )
    parser.add_argument(
        "--layers",
        action="append",
        help="a range of layers whose mean is drawn, several times for several: early, intermediate, later, all, or 4-9 "
        "(default: the first three)",
    )
    data_options.add_arguments(parser, limit=2)


def _maps(options: argparse.Namespace) -> int:
    from cdistill.attention import maps, results
    from cdistill.attention.data import sets_of
    from cdistill.runtime import launch

    results.check_folder(options.output)
    if (options.question is None) != (not options.image):
        raise InputError("--question and --image belong together")
    if options.answer is not None and options.question is None:
        raise InputError("--answer is of --question")
    if options.image and options.task:
        raise InputError("--image and --task: name one of the two")
    if options.image:
        cases = [maps.own_case(options.image, options.question, options.answer)]
    else:
        cases = maps.cases_of(sets_of(options))
    with launch.quiet():
        models = _load(options, builtin=options.task in ([], ["builtin"]))
        spans = list(dict.fromkeys(options.layers or maps.SPANS))
        found = maps.maps(models, cases, spans=spans, words=options.words, folder=options.output)
        result = results.whole("maps", models, found)
    return _publish(options.output, result, maps.table)


def _page_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="DIR", help="the --output of other analyses")


def _page(options: argparse.Namespace) -> int:
    from cdistill.attention import results

    print(f"written: {results.write_page(options.folder)}")
    return 0


def _on_sets(
    name: str,
    options: argparse.Namespace,
    analysis: Callable[..., dict[str, Any]],
    table: Callable[[dict[str, Any]], Sequence[str]],
    **more: Any,
) -> int:
    """Check everything, run an analysis on all sets, print and write what it gives."""
    from cdistill.attention import results
    from cdistill.attention.data import sets_of
    from cdistill.runtime import launch

    results.check_folder(options.output)
    sets = sets_of(options, answered=name != "intervene")
    with launch.quiet():
        models = _load(options, builtin=all(each.name.startswith("built-in ") for each in sets))
        result = results.whole(name, models, analysis(models, sets, options.batch_size, **more))
    return _publish(options.output, result, table)


def _publish(folder: Path, result: dict[str, Any], table: Callable[[dict[str, Any]], Sequence[str]]) -> int:
    from cdistill.attention import results

    paths = results.write(folder, result)
    for line in table(result):
        print(line)
    print(f"written: {', '.join(map(str, paths))}")
    return 0


def _load(options: argparse.Namespace, *, builtin: bool) -> Models:
    from cdistill.attention.models import Models
    from cdistill.eval.loading import load

    twice = [name for name in options.students if options.students.count(name) > 1]
    if twice:
        raise InputError(f"model: {twice[0]} is named twice among the students")
    how = {"dtype": options.dtype, "load_in": options.load_in, "device_map": options.device_map}
    # models of the built-in task have no image processor of their own, and know its pixels
    teacher, *students = [load(name, **how, usual_processor=builtin) for name in (options.teacher, *options.students)]
    return Models(teacher, students)


# word -> help line, what it takes, what it does
WORDS: dict[str, tuple[str, Arguments, Main]] = {
    "similarity": ("compare where students and teacher look, by layer and head", _sets_arguments, _similarity),
    "confidence": ("compare how sure students are by how alike they look", _sets_arguments, _confidence),
    "intervene": ("answer with the teacher's attention, and compare accuracies", _intervene_arguments, _intervene),
    "maps": ("draw what teacher and students look at", _maps_arguments, _maps),
    "page": ("make the page of the results in a folder again", _page_arguments, _page),
}
