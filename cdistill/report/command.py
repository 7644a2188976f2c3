"""``cdistill report RUN...``: the page of one run, or of several beside each other."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

PAGE = "report.html"
LOOK_SECONDS = 10


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the command takes."""
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folder of a run, also while it is trained")
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help=f"the page (default: {PAGE} in the first run's folder)"
    )
    parser.add_argument(
        "--watch", action="store_true", help=f"write it again every {LOOK_SECONDS} seconds until all runs have ended"
    )


def main(options: argparse.Namespace) -> int:
    """Write the page."""
    from cdistill.files import write_text
    from cdistill.report.history import RUNNING, read_run
    from cdistill.report.page import page

    path = options.output or options.runs[0] / PAGE
    while True:
        runs = [read_run(folder) for folder in options.runs]
        goes_on = options.watch and any(run.state == RUNNING for run in runs)
        write_text(path, page(runs, refresh=LOOK_SECONDS if goes_on else None))
        if not goes_on:
            break
        print(f"\r{path}: {_where(runs)}", end="", flush=True)
        time.sleep(LOOK_SECONDS)
    print(f"{chr(13) if options.watch else ''}written: {path}")
    return 0


def _where(runs: list) -> str:
    stages = [next((stage for stage in run.stages if stage.state == "running"), None) for run in runs]
    return ", ".join(f"{stage.label} step {stage.step:,} of {stage.steps:,}" for stage in stages if stage is not None)
