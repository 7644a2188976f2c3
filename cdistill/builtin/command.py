"""``cdistill builtin write``: the built-in world's questions in the files of published benchmarks."""

import argparse
from pathlib import Path

TASKS = ("sugarcrepe", "winoground", "bivlc", "rbench", "vqa")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the command takes."""
    parser.add_argument("--task", required=True, choices=TASKS, help="the benchmark whose files are written")
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="folder to write, new or empty")
    parser.add_argument("--n", type=int, default=100, help="questions per sub-type (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of scenes and questions (default: %(default)s)")


def main(options: argparse.Namespace) -> int:
    """Write the files, and say what they hold."""
    from cdistill.builtin.writer import write

    entries = write(options.task, options.folder, n=options.n, seed=options.seed)
    print(f"written: {options.folder} ({entries} entries in the files of {options.task})")
    return 0
