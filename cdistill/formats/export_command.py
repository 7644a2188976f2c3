"""``cdistill export --format``: what it takes and does."""

from __future__ import annotations

import argparse

from cdistill.errors import InputError

FORMATS = ("compodistill", "llava", "tinyllava", "bunny", "mobilevlm", "projector")
_OF_TRANSFORMERS = {"code": "--code", "check": "--check", "max_shard_size": "--max-shard-size"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of other layouts."""
    parser.add_argument(
        "--format", choices=FORMATS, help="write it as another project lays it out (default: transformers)"
    )
    parser.add_argument(
        "--vision-tower", metavar="NAME", help="with --format llava: the vision encoder's name on the hub"
    )


def main(options: argparse.Namespace) -> int:
    """Write the model, and say where. Raises ValueError for options that are of transformers' layout."""
    from cdistill.formats.exporting import export_as

    given = [said for name, said in _OF_TRANSFORMERS.items() if getattr(options, name)]
    if given:
        raise InputError(f"{given[0]} is of transformers' layout: leave it out with --format {options.format}")
    result = export_as(
        options.format,
        options.model,
        options.output,
        dtype=options.dtype,
        merge_taf=not options.keep_taf,
        vision_tower=options.vision_tower,
    )
    for remark in result.remarks:
        print(remark)
    print(f"{result.model_class} -> {result.folder}")
    return 0
