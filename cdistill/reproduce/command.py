"""``cdistill reproduce TABLE``: the runs of a table, its page and its numbers."""

from __future__ import annotations

import argparse
from pathlib import Path

from cdistill.reproduce.tables import names

PAIR = "demo-compodistill"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the command takes."""
    parser.add_argument("table", help=f"one of {', '.join(names())}, or a YAML file of the same form")
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="training seeds (default: %(default)s)")
    parser.add_argument(
        "--processes", type=int, default=1, metavar="N", help="runs side by side (default: %(default)s)"
    )
    parser.add_argument(
        "--resume", action="store_true", help="go on with runs that were stopped, try failed ones again"
    )
    parser.add_argument(
        "--pair",
        default=PAIR,
        metavar="RECIPE",
        help="the distilled recipe that the rows change (default: %(default)s)",
    )
    parser.add_argument(
        "--output", type=Path, default=Path("runs/reproduce"), help="folder of the results (default: %(default)s)"
    )
    parser.add_argument("--report", action="store_true", help="train nothing: the page of the runs that are there")
    parser.add_argument("--keep", action="store_true", help="keep the weights of finished runs")


def main(options: argparse.Namespace) -> int:
    """Run what is missing, then print the table and write its page."""
    from cdistill.reproduce.reproduce import reproduce

    findings = reproduce(
        options.table,
        pair=options.pair,
        output=options.output,
        seeds=options.seeds,
        processes=options.processes,
        resume=options.resume,
        train=not options.report,
        keep=options.keep,
    )
    from cdistill.reproduce.text import table_text

    print(f"\n{table_text(findings)}\n")
    name = Path(options.table).stem
    print(f"written: {options.output / f'{name}.json'}, {options.output / f'{name}.html'}")
    return 0
