"""The options that say which questions `cdistill analyze` asks."""

from __future__ import annotations

import argparse
from pathlib import Path

from cdistill.eval import benchmarks


def add_arguments(parser: argparse.ArgumentParser, limit: int = 500) -> None:
    """Declare what says which questions are asked; ``limit`` is the default number of each set."""
    known = ", ".join((*benchmarks.NAMES, *benchmarks.GROUPS))
    parser.add_argument(
        "--task",
        action="append",
        default=[],
        help=f"a benchmark or a group of them ({known}), several times for several",
    )
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="the benchmarks' files, as for `cdistill eval`")
    parser.add_argument(
        "--images", type=Path, metavar="ROOT", help="where images are (default: as --data, or by the files)"
    )
    parser.add_argument(
        "--limit",
        type=int,
        default=limit,
        metavar="N",
        help="questions of each set, spread over it (default: %(default)s)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of the built-in task: seed of scenes (default: %(default)s)"
    )


def add_samples(parser: argparse.ArgumentParser) -> None:
    """Declare the option for data sets, whose answers cannot be scored."""
    parser.add_argument(
        "--samples",
        action="append",
        default=[],
        metavar="PATH",
        help="a data set that training reads (LLaVA's JSON, a mix, tars, parquet, hf:NAME), several times for several",
    )
