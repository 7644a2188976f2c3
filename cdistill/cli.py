"""The ``cdistill`` command: one function per subcommand, in one table; heavy imports happen inside the functions."""

import argparse
import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cdistill import __version__
from cdistill.attention import command as analyzing
from cdistill.builtin import command as builtin
from cdistill.data import command as data
from cdistill.demo import command as demo
from cdistill.eval import benchmarks
from cdistill.eval import command as evaluation
from cdistill.files import disk_full
from cdistill.plan import command as planning
from cdistill.report import command as report
from cdistill.report import push
from cdistill.reproduce import command as reproduction
from cdistill.runtime import pulse
from cdistill.runtime.errors import RunError, print_error
from cdistill.runtime.launch import environment
from cdistill.train import gradient_report


@dataclass(frozen=True)
class Command:
    """A subcommand: its help line, what it takes, and what it does (returns the exit code)."""

    help: str
    arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


def _train_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", help="name of a shipped recipe (see `cdistill recipes`) or path of a YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="change a key, as in stage.dft.samples=640")
    parser.add_argument("--resume", action="store_true", help="continue the run in the recipe's output folder")


def _train(options: argparse.Namespace) -> int:
    from cdistill.train import load_recipe, run

    run(load_recipe(options.recipe, options.overrides), resume=options.resume)
    return 0


def _cache_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", help="name or path of a recipe whose teacher_memory.cache names a folder")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="change a key of the recipe")


def _cache(options: argparse.Namespace) -> int:
    from cdistill.train import load_recipe
    from cdistill.train.cache_writer import write_cache

    folder = write_cache(load_recipe(options.recipe, options.overrides))
    if os.environ.get("RANK", "0") == "0":
        print(f"written: {folder}")
    return 0


def _data(options: argparse.Namespace) -> int:
    if options.action == "check" and options.preset in benchmarks.NAMES:
        from cdistill.eval.presets import check

        return check(options.preset, Path(options.path), None if options.images is None else Path(options.images))

    def load(reference: str) -> Any:
        from cdistill.models.load import load_tokenizer, resolve_folder
        from cdistill.models.processor import has_image_processor, load_processor

        folder = resolve_folder(reference, "processor")
        return (load_processor if has_image_processor(folder) else load_tokenizer)(folder, "processor")

    return data.main(options, load)


def _recipes_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "what",
        nargs="?",
        choices=("list", "keys", "schema"),
        default="list",
        help="the shipped recipes (default), every key with its meaning in Markdown, or a JSON schema for editors",
    )


def _recipes(options: argparse.Namespace) -> int:
    if options.what != "list":
        from cdistill.train.recipes import reference

        print(reference.page() if options.what == "keys" else json.dumps(reference.json_schema(), indent=2))
        return 0
    from cdistill.train.recipes import shipped_recipes

    recipes = shipped_recipes()
    width = max(map(len, recipes), default=0)
    for name, comment in recipes.items():
        print(f"{name:{width}}  {comment}")
    return 0


def _export_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", help="folder of a model, a run (its last finished stage) or a peft adapter, or builtin:NAME"
    )
    parser.add_argument("output", help="folder to write, new or empty")
    parser.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), help="number format (default: the model's)")
    parser.add_argument(
        "--keep-taf", action="store_true", help="do not merge the map of TAF into the teacher's adapter"
    )
    parser.add_argument("--code", action="store_true", help="add a TAF student's code, for use without cdistill")


def _export(options: argparse.Namespace) -> int:
    from cdistill.models.export import export

    with environment(distributed=False):  # saving makes transformers import DeepSpeed, which else remarks on the device
        result = export(
            options.model, options.output, dtype=options.dtype, merge_taf=not options.keep_taf, code=options.code
        )
    for remark in result.remarks:
        print(remark)
    merged = f", {' and '.join(result.merged)} merged" if result.merged else ""
    print(f"{result.model_class} in {result.dtype}{merged} -> {result.folder}")
    return 0


COMMANDS = {
    "demo": Command("distil the built-in student and compare it", demo.add_arguments, demo.main),
    "train": Command("train a recipe's stages", _train_arguments, _train),
    "plan": Command("tell what a recipe needs on each GPU", planning.add_arguments, planning.main),
    "gradients": Command(
        "measure how hard each term of a stage's loss pulls", gradient_report.add_arguments, gradient_report.main
    ),
    "cache": Command("keep what a recipe's teacher gives, to train without it", _cache_arguments, _cache),
    "data": Command("check data sets, look at samples, list the paper's sets", data.add_arguments, _data),
    "eval": Command("measure a model on benchmarks or the built-in task", evaluation.add_arguments, evaluation.main),
    **{f"eval {word}": Command(line, do.add_arguments, do.main) for word, (line, do) in evaluation.WORDS.items()},
    **{f"analyze {word}": Command(*of) for word, of in analyzing.WORDS.items()},
    "builtin write": Command("write the built-in task in a benchmark's files", builtin.add_arguments, builtin.main),
    "report": Command("show what runs have logged in one page", report.add_arguments, report.main),
    "push": Command("publish a result on the Hugging Face hub, with a model card", push.add_arguments, push.main),
    "reproduce": Command("reproduce a table of the paper in kind", reproduction.add_arguments, reproduction.main),
    "export": Command("write a model that plain transformers loads", _export_arguments, _export),
    "recipes": Command("list the shipped recipes, or what a recipe may say", _recipes_arguments, _recipes),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code.

    2 for a user's mistake, 1 for a run that failed, both reported in one line; 143 (130) for one that SIGTERM (Ctrl-C)
    stopped.
    """
    parser = argparse.ArgumentParser(prog="cdistill", description="Distil multimodal language models by attention.")
    parser.add_argument("--version", action="version", version=f"cdistill {__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        command.arguments(subparsers.add_parser(name, help=command.help, description=command.help))
    words = list(sys.argv[1:] if arguments is None else arguments)
    if " ".join(words[:2]) in COMMANDS:  # as in `eval score`
        words[:2] = [" ".join(words[:2])]
    options, extra = parser.parse_known_args(words)
    if any(argument.startswith("-") or not hasattr(options, "overrides") for argument in extra):
        parser.error(f"unrecognized arguments: {' '.join(extra)}")
    if extra:  # argparse gives up on key=value after an option
        options.overrides += extra
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # transformers' bars for loading weights
    try:
        with pulse.ending_together():
            code = COMMANDS[options.command].run(options)
        sys.stdout.flush()  # here, where a broken pipe is caught
        return code
    except BrokenPipeError:  # of `| head`
        _give_up_stdout()
        return 128 + signal.SIGPIPE
    except ValueError as error:
        print_error(error)
        return 2
    except RunError as error:
        return print_error(error)
    except OSError as error:  # of a path that the user has named, or of the machine
        print_error(error)
        _give_up_stdout()
        return 1 if disk_full(error) else 2
    except KeyboardInterrupt:
        print("cdistill: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT


def _give_up_stdout() -> None:
    """Let what can no longer be printed go nowhere, so that the interpreter does not remark on it at its end."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
