"""The ``cdistill init`` command: asks or is told, looks at models and data, and writes a recipe."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from cdistill.choices import MOST_PROCESSES
from cdistill.data.command import column_names
from cdistill.errors import InputError
from cdistill.files import write_text
from cdistill.plan.command import here, memory_size
from cdistill.runtime.errors import line_of

if TYPE_CHECKING:
    from cdistill.init.models import Pair
    from cdistill.init.recipe import Machine, Written
    from cdistill.init.records import Records

T = TypeVar("T")
_YAML = (".yaml", ".yml")
_NEEDED = {
    "teacher": "the teacher, a multimodal model: its folder, or OWNER/NAME on the hub",
    "student": "the student, a smaller one or a language model: its folder, or OWNER/NAME",
    "data": "your data: JSON of conversations (LLaVA's form), tar shards or parquet",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the command takes."""
    parser.add_argument(
        "target",
        nargs="?",
        default=".",
        metavar="FOLDER or RECIPE.yaml",
        help="what to write: a file, or recipe.yaml in a folder (default: here)",
    )
    for name, text in _NEEDED.items():
        parser.add_argument(f"--{name}", help=text)
    parser.add_argument("--images", metavar="DIR", help="folder that names of images start from (default: the data's)")
    parser.add_argument(
        "--columns", nargs="+", metavar="NAME=COLUMN", help="columns of a Hugging Face set, as in image=picture"
    )
    parser.add_argument(
        "--vision", metavar="MODEL", help="vision encoder to put before a language model (default: the teacher's)"
    )
    parser.add_argument("--gpus", type=int, metavar="N", help="GPUs to train on, 0 for the CPU (default: those here)")
    parser.add_argument("--gpu", metavar="MEMORY", help="memory of one, as in 24GB (default: of the GPUs here)")
    parser.add_argument("--output", metavar="DIR", help="folder of the run (default: runs/NAME)")
    parser.add_argument("--yes", action="store_true", help="ask nothing; take what is not given from this machine")


def main(options: argparse.Namespace) -> int:
    """Write the recipe, and say what comes next."""
    target = _target(options.target)
    name = target.resolve().parent.name if target.stem == "recipe" else target.stem
    asks = not options.yes and sys.stdin.isatty() and sys.stdout.isatty()
    missing = [f"--{option}" for option in _NEEDED if getattr(options, option) is None]
    if missing and not asks:
        raise InputError(f"{' and '.join(missing)} must be given: init asks on a terminal alone, and not with --yes")
    from cdistill.runtime import launch

    with launch.quiet():
        pair, found = _look(options, asks)
        machine = _machine(options, asks)
        written = _write(target, name, options.output or f"runs/{name}", pair, found, machine)
    print("\n".join(_summary(pair, found, written)))
    plan = ["cdistill", "plan", str(target)]
    plan += ["--gpu", options.gpu] if options.gpu is not None else []
    plan += ["--visual", str(found.visual)] if pair.any_size else []
    print(f"\nwritten: {target}; next:\n  {shlex.join(plan)}\n  {shlex.join(['cdistill', 'train', str(target)])}")
    return 0


def _target(text: str) -> Path:
    """The file to write. Raises ValueError if something has its name."""
    target = Path(text)
    if not text.isprintable():
        raise InputError(f"{text!r} holds characters that cannot be shown: the recipe is named by it, so take another")
    if target.suffix.lower() not in _YAML:
        if target.exists() and not target.is_dir():
            raise InputError(f"{target} is a file already: name a folder, or a recipe that ends in {_YAML[0]}")
        target = target / "recipe.yaml"
    if target.exists() or target.is_symlink():
        raise InputError(f"{target} is there already, and init overwrites nothing: name another file or folder")
    return target


def _ask(option: str, given: str | None, asks: bool, question: str, check: Callable[[str], T], default: str = "") -> T:
    """What an option or the terminal says, checked: on a terminal a mistake is told, and asked about again.

    Raises ValueError as ``check``, or if the terminal ends.
    """
    if given is not None or not asks:
        return check(default if given is None else given)
    while True:
        try:
            answer = input(f"{question}{f' [{default}]' if default else ''}: ").strip() or default
        except EOFError:
            raise InputError(f"--{option} must be given: the terminal has ended") from None
        if not answer:
            continue
        try:
            return check(answer)
        except ValueError as error:
            print(f"  {line_of(error)}")


def _look(options: argparse.Namespace, asks: bool) -> tuple[Pair, Records]:
    """The models and the data, asked for where they are not given."""
    from cdistill.init import models, records

    def ask(option: str, check: Callable[[str], Any]) -> Any:
        return _ask(option, getattr(options, option), asks, _NEEDED[option], check)

    teacher = ask("teacher", models.check_teacher)
    pair = ask("student", lambda student: models.look(student, teacher, options.vision))
    columns = None if options.columns is None else column_names(options.columns)
    return pair, ask("data", lambda path: records.look(path, options.images, columns, pair.encoder))


def _machine(options: argparse.Namespace, asks: bool) -> Machine:
    """What the run is for."""
    import torch

    from cdistill.init.recipe import Machine

    def number(text: str) -> int:
        if not text.isdecimal() or int(text) > MOST_PROCESSES:
            raise InputError(f"gpus must be a number from 0 to {MOST_PROCESSES}, got {text!r}")
        return int(text)

    given = None if options.gpus is None else str(options.gpus)
    here_are = torch.cuda.device_count()
    gpus = _ask("gpus", given, asks, "GPUs to train on, 0 for the CPU", number, str(here_are))
    if options.gpu is not None:
        if not gpus:
            raise InputError("gpu is the memory of a GPU: leave it out with --gpus 0")
        return Machine(gpus, memory_size(options.gpu))
    if bool(gpus) != bool(here_are):
        return Machine(gpus, None)
    return Machine(gpus, here(max(1, gpus))[1])


def _write(target: Path, name: str, output: str, pair: Pair, found: Records, machine: Machine) -> Written:
    """Make the recipe and write it, unless training would refuse it."""
    from cdistill.init.recipe import make
    from cdistill.train.run_folder import check_output

    written = make(name, output, pair, found, machine)
    check_output(written.recipe, Path(output), resume=False)
    target.parent.mkdir(parents=True, exist_ok=True)
    write_text(target, written.text)
    return written


def _summary(pair: Pair, found: Records, written: Written) -> list[str]:
    """What was found."""
    some = f"{found.seen} of the first {found.looked} have images and can be used"
    lines = [
        f"teacher: {pair.about[1]}",
        f"student: {pair.about[0]}",
        f"data: {found.form}, {found.count:,}: {some}",
    ]
    if found.guessed:
        lines.append(f"  images are in {found.images}")
    if found.bad:
        reasons = ", ".join(f"{reason} ({count})" for reason, count in found.bad.items())
        images = f" --images {shlex.quote(found.images)}" if found.images is not None else ""
        lines.append(f"  cannot be used: {reasons}, as {found.example}")
        lines.append(f"  `cdistill data check {shlex.quote(found.path)}{images}` lists all")
    if pair.no_vat:
        lines.append(f"attention cannot be aligned, so vat.enabled is false: {pair.no_vat}")
    if written.too_large:
        lines.append(f"it does not fit: it {written.too_large}")
    return lines
