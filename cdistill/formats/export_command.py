"""The ``cdistill export`` command: in which formats, what each of them takes, and which function writes it."""

from __future__ import annotations

import argparse
from typing import Any

from cdistill.errors import InputError

DTYPES, GGUF, OPENVINO = ("fp32", "bf16", "fp16"), ("f16", "q8_0", "q4_0", "q4_k_m"), ("fp32", "fp16", "int8", "int4")
_OF_PROJECTS = ("dtype", "keep_taf")
TAKES: dict[str, tuple[str, ...]] = {
    "transformers": ("dtype", "keep_taf", "code", "max_shard_size", "check"),
    "gguf": ("quantize", "check"),
    "openvino": ("quantize", "python"),
    "llava": (*_OF_PROJECTS, "vision_tower"),
    **dict.fromkeys(("compodistill", "tinyllava", "bunny", "mobilevlm", "projector"), _OF_PROJECTS),
}
_OPTIONS = tuple(dict.fromkeys(name for names in TAKES.values() for name in names))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the command takes."""
    parser.add_argument(
        "model", help="folder of a model, a run (its last finished stage) or a peft adapter, or builtin:NAME"
    )
    parser.add_argument("output", help="folder to write, new or empty")
    parser.add_argument("--format", choices=TAKES, default="transformers", help="who loads it")
    parser.add_argument("--dtype", choices=DTYPES, help="number format (default: the model's)")
    parser.add_argument(
        "--quantize",
        choices=dict.fromkeys((*GGUF, *OPENVINO)),
        help=f"of gguf: {', '.join(GGUF)} (default: f16); of openvino: {', '.join(OPENVINO)} (default: fp32)",
    )
    parser.add_argument(
        "--keep-taf", action="store_true", help="do not merge the map of TAF into the teacher's adapter"
    )
    parser.add_argument("--code", action="store_true", help="add a TAF student's code, for use without cdistill")
    parser.add_argument("--max-shard-size", metavar="SIZE", help="bytes of a file of weights, or such as 5GB")
    parser.add_argument("--check", action="store_true", help="read what was written back and compare it with the model")
    parser.add_argument("--vision-tower", metavar="NAME", help="of llava: the vision encoder's name on the hub")
    parser.add_argument("--python", metavar="PATH", help="of openvino: that of an environment with optimum-intel")


def main(options: argparse.Namespace) -> int:
    """Write the model, and say what and where. Raises ValueError for options of other formats."""
    for name in _OPTIONS:
        if getattr(options, name) and name not in TAKES[options.format]:
            raise InputError(f"--{name.replace('_', '-')}: --format {options.format} does without it")
    write = {"transformers": _transformers, "gguf": _gguf, "openvino": _openvino}.get(options.format, _project)
    result = write(options)
    for remark in result.remarks:
        print(remark)
    if getattr(result, "checked", ""):
        print(result.checked)
    how = f" in {result.dtype}" if hasattr(result, "dtype") else ""
    merged = " and ".join(getattr(result, "merged", ()))
    print(f"{result.model_class}{how}{f', {merged} merged' if merged else ''} -> {result.folder}")
    return 0


def _transformers(options: argparse.Namespace) -> Any:
    from cdistill.models.export import export

    return export(
        options.model,
        options.output,
        dtype=options.dtype,
        merge_taf=not options.keep_taf,
        code=options.code,
        max_shard_size=options.max_shard_size,
        check=options.check,
    )


def _gguf(options: argparse.Namespace) -> Any:
    from cdistill.models.gguf import export_gguf

    quantize = _quantize(options, GGUF, "f16")
    return export_gguf(options.model, options.output, quantize=quantize, check=options.check)


def _openvino(options: argparse.Namespace) -> Any:
    from cdistill.serving.openvino import export_openvino

    if options.python is None:
        raise InputError("--python: --format openvino needs the Python of an environment with optimum-intel")
    weights = _quantize(options, OPENVINO, "fp32")
    return export_openvino(options.model, options.output, python=options.python, weights=weights)


def _project(options: argparse.Namespace) -> Any:
    from cdistill.formats.exporting import export_as

    return export_as(
        options.format,
        options.model,
        options.output,
        dtype=options.dtype,
        merge_taf=not options.keep_taf,
        vision_tower=options.vision_tower,
    )


def _quantize(options: argparse.Namespace, known: tuple[str, ...], default: str) -> Any:
    if options.quantize is not None and options.quantize not in known:
        raise InputError(f"--quantize: --format {options.format} has {', '.join(known)}, not {options.quantize}")
    return options.quantize or default
