"""``cdistill export --format`` for other projects' layouts: which there are, and what it does."""

from __future__ import annotations

import argparse

from cdistill.errors import InputError

FORMATS = ("compodistill", "llava", "tinyllava", "bunny", "mobilevlm", "projector")
_OF_OTHERS = {"code": "--code", "check": "--check", "max_shard_size": "--max-shard-size", "quantize": "--quantize"}


def main(options: argparse.Namespace) -> int:
    """Write the model, and say where. Raises ValueError for options of other formats."""
    from cdistill.formats.exporting import export_as

    given = [said for name, said in _OF_OTHERS.items() if getattr(options, name, None)]
    if given:
        raise InputError(f"{given[0]}: --format {options.format} does without it")
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
