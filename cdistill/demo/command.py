"""``cdistill demo``: a student fine-tuned, one distilled, and one whose attention is aligned, too, beside their teacher."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from cdistill.reproduce.command import PAIR

STUDENTS = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the command takes."""
    parser.add_argument(
        "--output", type=Path, default=Path("runs/demo"), help="folder of the results (default: %(default)s)"
    )
    parser.add_argument("--n", type=int, default=300, help="questions per sub-type (default: %(default)s)")
    parser.add_argument(
        "--processes", type=int, metavar="N", help="students trained side by side (default: one on each core)"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help=f"change a key of {PAIR}, for all students")


def main(options: argparse.Namespace) -> int:
    """Run the demo and print its table."""
    from cdistill.demo.demo import demo
    from cdistill.demo.text import text

    processes = min(STUDENTS, len(os.sched_getaffinity(0))) if options.processes is None else options.processes
    found = demo(output=options.output, n=options.n, processes=processes, overrides=options.overrides)
    print(f"\n{text(found)}\n")
    print(f"written: {options.output / 'results.json'}, {options.output / 'report.html'}")
    return 0
