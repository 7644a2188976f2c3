"""``cdistill eval MODEL``: a model's answers to benchmarks, or to the built-in task."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

from cdistill.choices import MOST, MOST_DRAWN, MOST_PROCESSES, require_count
from cdistill.errors import InputError
from cdistill.eval import benchmarks
from cdistill.files import write_text

DTYPES, LOAD_IN = ("fp32", "bf16", "fp16"), ("8bit", "4bit")
PROGRAM = (sys.executable, "-P", "-m", "cdistill.eval.worker")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the command takes."""
    parser.add_argument(
        "model",
        help="folder of a model, a run (its last finished stage) or a peft adapter, builtin:NAME, or an id of the hub",
    )
    parser.add_argument(
        "--task",
        action="append",
        default=[],
        help=f"a benchmark ({', '.join(benchmarks.NAMES)}) or a group of them ({', '.join(benchmarks.GROUPS)}), several times "
        "for several; without one the built-in task",
    )
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="the benchmark's files, or a folder TASK for each")
    parser.add_argument(
        "--images", type=Path, metavar="ROOT", help="where its images are (default: as --data, or in its images)"
    )
    parser.add_argument(
        "--limit", type=int, metavar="N", help="N questions, spread over the benchmark, and those that count with them"
    )
    parser.add_argument(
        "--batch-size", type=batch_size, metavar="N", help="questions of a batch (default: auto, by length and memory)"
    )
    parser.add_argument("--output", type=Path, metavar="DIR", help="where replies and metrics go (default: nowhere)")
    parser.add_argument("--resume", action="store_true", help="go on with what --output holds")
    parser.add_argument("--processes", type=int, default=1, metavar="N", help="share the work (default: %(default)s)")
    parser.add_argument(
        "--missing",
        choices=("leave", "wrong"),
        default="leave",
        help="questions without their images are left out (default) or count as wrong",
    )
    parser.add_argument("--dtype", choices=DTYPES, help="number format (default: the files')")
    parser.add_argument("--load-in", choices=LOAD_IN, help="quantise the language model, with bitsandbytes on a GPU")
    parser.add_argument("--device-map", metavar="MAP", help="spread the model over devices, as accelerate does: auto")
    parser.add_argument("--n", type=int, help="of the built-in task: questions per sub-type (default: 500)")
    parser.add_argument("--seed", type=int, help="of the built-in task: seed of scenes and questions (default: 0)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result as JSON, too")


def batch_size(text: str) -> int | None:
    """What --batch-size says; None for auto."""
    if text == "auto":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be auto or a positive number, got {text!r}")
    return int(text)


def main(options: argparse.Namespace) -> int:
    """Ask, print the tables, and write what was asked for."""
    if options.json is not None and not options.json.absolute().parent.is_dir():
        raise InputError(f"--json: there is no folder {str(options.json.parent)!r}")
    if not options.task:
        return _builtin_task(options)
    _check(options)
    names = tuple(dict.fromkeys(name for task in options.task for name in benchmarks.names(task)))
    from cdistill.runtime import launch

    if options.processes > 1 and not launch.launched():
        return _share(options)
    from cdistill.eval import tasks

    results = tasks.run(names, options)
    if results is not None and options.json is not None:
        whole = results[names[0]] if len(names) == 1 else results
        write_text(options.json, json.dumps(whole, indent=2, ensure_ascii=False) + "\n")
    return 0


def _check(options: argparse.Namespace) -> None:
    for name, value in (("n", options.n), ("seed", options.seed)):
        if value is not None and options.task != ["builtin"]:
            raise InputError(f"--{name} is of the built-in task; --limit takes a part of a benchmark")
    _check_counts(options)
    if options.data is None and options.task != ["builtin"]:
        raise InputError(
            "--data must name the folder of the benchmark's files; `cdistill eval presets` says what to fetch"
        )
    for name, value in (("data", options.data), ("images", options.images)):
        if value is not None and not value.is_dir():
            raise InputError(f"--{name}: there is no folder {str(value)!r}")
    if options.resume and options.output is None:
        raise InputError("--resume needs --output, the folder to go on with")


def _check_counts(options: argparse.Namespace) -> None:
    for name, most in (("n", MOST_DRAWN), ("limit", MOST), ("processes", MOST_PROCESSES)):
        if getattr(options, name) is not None:
            require_count(f"--{name}", getattr(options, name), most)


def _share(options: argparse.Namespace) -> int:
    """Ask in several processes, which find the same options in a file."""
    from cdistill.runtime.launch import start_processes

    if options.output is None:
        raise InputError("--processes needs --output, where the processes put their replies together")
    said = {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "options.json"
        path.write_text(json.dumps(said), encoding="utf-8")
        start_processes(options.processes, "run", path, PROGRAM)
    return 0


def options_of(path: Path) -> argparse.Namespace:
    """The options that `_share` has written to a file."""
    options = argparse.Namespace(**json.loads(path.read_text(encoding="utf-8")))
    for name in ("data", "images", "output", "json"):
        value = getattr(options, name)
        setattr(options, name, None if value is None else Path(value))
    return options


def _builtin_task(options: argparse.Namespace) -> int:
    """Accuracy on held-out scenes, drawn fresh."""
    values = {name: getattr(options, name) for name in ("data", "images", "limit", "output", "resume")}
    given = [name for name, value in values.items() if value is not None and value is not False]
    given += ["processes"] if options.processes != 1 else []
    if given:
        raise InputError(f"--{given[0]} is of benchmarks: name one with --task (`cdistill eval presets` lists them)")
    _check_counts(options)
    from cdistill.eval import builtin_task

    result, modality = builtin_task.evaluate_model(options)
    for line in builtin_task.table(result, modality):
        print(line)
    if options.json is not None:
        write_text(options.json, json.dumps(result, indent=2) + "\n")
    return 0
