"""The ``cdistill`` command: its commands, in one table; heavy imports happen inside the functions."""

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cdistill import doctor, menu
from cdistill.attention import command as analyzing
from cdistill.builtin import command as builtin
from cdistill.choices import MOST, require_count
from cdistill.data import command as data
from cdistill.demo import command as demo
from cdistill.errors import InputError
from cdistill.eval import benchmarks
from cdistill.eval import command as evaluation
from cdistill.files import disk_full
from cdistill.formats import command as importing
from cdistill.formats import export_command as exporting
from cdistill.init import command as starting
from cdistill.menu import Command
from cdistill.plan import command as planning
from cdistill.report import command as report
from cdistill.report import push
from cdistill.reproduce import command as reproduction
from cdistill.runtime import pulse
from cdistill.runtime.errors import RunError, print_error, telling_lack_of_memory
from cdistill.runtime.launch import environment
from cdistill.train import gradient_report
from cdistill.train.recipes import command as recipes


def _train_arguments(parser: argparse.ArgumentParser) -> None:
    menu.recipe_argument(parser, "change a key, as in stage.dft.samples=640")
    parser.add_argument("--resume", action="store_true", help="continue the run in the recipe's output folder")


def _train(options: argparse.Namespace) -> int:
    from cdistill.train import load_recipe, run

    run(load_recipe(options.recipe, options.overrides), resume=options.resume)
    return 0


def _cache_arguments(parser: argparse.ArgumentParser) -> None:
    menu.recipe_argument(parser, "change a key, as in teacher_memory.cache=FOLDER, which must be named")
    parser.add_argument(
        "--serve", metavar="HOST:PORT", help="make it as runs on other machines ask for it, and send it"
    )
    parser.add_argument("--window", type=int, metavar="N", help="with --serve, keep N shards ahead and behind, not all")


def _cache(options: argparse.Namespace) -> int:
    from cdistill.train import load_recipe
    from cdistill.train.cache_writer import serve_cache, write_cache

    if options.window is not None and options.serve is None:
        raise InputError("--window needs --serve: a cache that is read later is kept whole")
    recipe = load_recipe(options.recipe, options.overrides)
    if options.serve is not None:
        serve_cache(recipe, options.serve, options.window)
        return 0
    folder = write_cache(recipe)
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


def _export(options: argparse.Namespace) -> int:
    with environment(distributed=False):  # saving makes transformers import DeepSpeed, which else remarks on the device
        return exporting.main(options)


def _completion_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", choices=menu.SHELLS, help="the shell; put the script where it looks for completions")


def _completion(options: argparse.Namespace) -> int:
    from cdistill.train.recipes import shipped_recipes

    print(menu.completion(COMMANDS, options.shell, shipped_recipes()))
    return 0


GROUPS = {
    "begin": {
        "doctor": Command("tell what this machine has and lacks", doctor.add_arguments, doctor.main),
        "init": Command("write a recipe for your own models and data", starting.add_arguments, starting.main),
        "import": Command("read a checkpoint of another project", importing.add_arguments, importing.main),
        "demo": Command("distil the built-in student and compare it", demo.add_arguments, demo.main),
    },
    "train": {
        "recipes": Command("list and show recipes, and what they may say", recipes.add_arguments, recipes.main),
        "plan": Command("tell what a recipe needs on each GPU", planning.add_arguments, planning.main),
        "train": Command("train a recipe's stages", _train_arguments, _train),
        "cache": Command("keep what a recipe's teacher gives, to train without it", _cache_arguments, _cache),
        "gradients": Command(
            "measure how hard each term of a loss pulls", gradient_report.add_arguments, gradient_report.main
        ),
        "data": Command("check data sets, look at samples, list the paper's", data.add_arguments, _data),
    },
    "see what came of it": {
        "eval": Command("measure a model on benchmarks", evaluation.add_arguments, evaluation.main),
        **{f"eval {word}": Command(line, do.add_arguments, do.main) for word, (line, do) in evaluation.WORDS.items()},
        **{f"analyze {word}": Command(*of) for word, of in analyzing.WORDS.items()},
        "report": Command("show what runs have logged in one page", report.add_arguments, report.main),
        "export": Command("write a model for transformers or another engine", exporting.add_arguments, _export),
        "push": Command("publish a result on the hub, with a model card", push.add_arguments, push.main),
    },
    "more": {
        "reproduce": Command("reproduce a table of the paper in kind", reproduction.add_arguments, reproduction.main),
        "builtin write": Command("write the built-in task as a benchmark", builtin.add_arguments, builtin.main),
        "completion": Command("print the completions of a shell", _completion_arguments, _completion),
    },
}
COMMANDS = {name: command for commands in GROUPS.values() for name, command in commands.items()}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code.

    2 for a user's mistake, 1 for a run that failed, both reported in one line (several mistakes of a recipe in a line each);
    143 (130) for one that SIGTERM (Ctrl-C) stopped.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words:
        print(menu.page(GROUPS), end="", file=sys.stderr)
        return 2
    wrong = menu.unknown(words, COMMANDS) or menu.blank_or_home(words)
    if wrong is not None:
        print_error(InputError(wrong))
        return 2
    parser = menu.parser(GROUPS, COMMANDS)
    if " ".join(words[:2]) in COMMANDS:  # as in `eval score`
        words[:2] = [" ".join(words[:2])]
    options, extra = parser.parse_known_args(words)
    if any(argument.startswith("-") or not hasattr(options, "overrides") for argument in extra):
        parser.error(f"unrecognized arguments: {' '.join(extra)}")
    if extra:  # argparse gives up on key=value after an option
        options.overrides += extra
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # transformers' bars for loading weights
    try:
        for name, value in vars(options).items():
            if isinstance(value, int):
                require_count(name, value, least=-MOST)
        with telling_lack_of_memory(), pulse.ending_together():
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
