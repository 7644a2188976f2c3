"""The ``cdistill import`` command."""

from __future__ import annotations

import argparse
import warnings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the command takes."""
    parser.add_argument("path", help="folder of a checkpoint as its project publishes it, or mm_projector.bin in one")
    parser.add_argument("output", help="folder to write, new or empty")
    parser.add_argument(
        "--vision-tower", metavar="FOLDER", help="the vision encoder, where the checkpoint names one elsewhere"
    )
    parser.add_argument("--base", metavar="FOLDER", help="the language model of a projector alone, or of LoRA")
    parser.add_argument("--prompt", metavar="MODE", help="conversation mode, as in vicuna_v1 (default: the project's)")


def main(options: argparse.Namespace) -> int:
    """Read the checkpoint, and say what was read."""
    from cdistill.formats.importing import import_checkpoint

    parts = {"vision_tower": options.vision_tower, "base": options.base, "prompt": options.prompt}
    with warnings.catch_warnings(action="ignore"):  # of fields that are old, which is what checkpoints have
        result = import_checkpoint(options.path, options.output, **parts)
    for remark in result.remarks:
        print(remark)
    print(f"{result.format}: {result.weights} weights -> {result.model_class} in {result.folder}")
    return 0
