"""``cdistill builtin write``: the built-in world in the files of published benchmarks, and of LLaVA's training data."""

import argparse
from pathlib import Path

TASKS = ("sugarcrepe", "winoground", "bivlc", "rbench", "vqa", "captions", "conversations")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the command takes."""
    parser.add_argument("--task", required=True, choices=TASKS, help="the benchmark, or kind of samples, to write")
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="folder to write, new or empty")
    parser.add_argument("--n", type=int, default=100, help="questions per sub-type, or samples (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of scenes and questions (default: %(default)s)")
    parser.add_argument("--english", action="store_true", help="in plain English, for models made for real text")


def main(options: argparse.Namespace) -> int:
    """Write the files, and say what they hold."""
    from cdistill.builtin.writer import write

    entries = write(options.task, options.folder, n=options.n, seed=options.seed, plain_english=options.english)
    print(f"written: {options.folder} ({entries} entries in the files of {options.task})")
    return 0
