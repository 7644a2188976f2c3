"""``cdistill eval compare``: models that answered the same questions, side by side."""

import argparse
import json
from pathlib import Path

from cdistill.errors import InputError
from cdistill.files import write_text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the command takes."""
    parser.add_argument(
        "folders",
        nargs="+",
        type=Path,
        metavar="RESULT",
        help="folders that `cdistill eval --output` wrote, two or more",
    )
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the comparison as JSON, too")
    parser.add_argument(
        "--html", type=Path, metavar="PAGE", help="write a page with charts and the questions that differ"
    )
    parser.add_argument("--images", type=Path, metavar="ROOT", help="folder of images for the page, if it was moved")


def main(options: argparse.Namespace) -> int:
    """Print the comparison, and write it."""
    from cdistill.eval.comparison import compare, table
    from cdistill.eval.page import page

    for name in ("json", "html"):
        path = getattr(options, name)
        if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
            raise InputError(f"--{name}: {str(path)!r} is a folder, or in none")
    if options.images is not None and not options.images.is_dir():
        raise InputError(f"--images: there is no folder {str(options.images)!r}")
    comparison = compare(options.folders)
    if options.json is not None:
        write_text(options.json, json.dumps(comparison.as_json(), indent=2) + "\n")
    if options.html is not None:
        write_text(options.html, page(comparison, options.images))
    print(table(comparison))
    return 0
