"""What the command line shows of its commands: the page of all of them, what an unknown one may have meant, and completion."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from cdistill import __version__
from cdistill.choices import begins_at_home
from cdistill.errors import InputError

PROGRAM = "cdistill"
SHELLS = ("bash", "zsh", "fish")
BEGIN = (
    "Begin with `cdistill doctor` (is this machine ready?) and `cdistill init` (a recipe\n"
    "for your own models and data), or with `cdistill demo` (a toy world, 4 minutes).\n"
)


@dataclass(frozen=True)
class Command:
    """A subcommand: its help line, what it takes, and what it does (returns the exit code)."""

    help: str
    arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


Groups = Mapping[str, Mapping[str, Command]]  # title -> name -> command


def page(groups: Groups) -> str:
    """The help of the whole program: every command in a line, by groups."""
    width = max(len(name) for commands in groups.values() for name in commands)
    lines = [f"usage: {PROGRAM} COMMAND ...", "", "Distil multimodal language models by attention.", BEGIN]
    for title, commands in groups.items():
        lines += [f"{title}:", *(f"  {name:{width}}  {command.help}" for name, command in commands.items()), ""]
    return "\n".join(
        [*lines, f"`{PROGRAM} COMMAND --help` tells what a command takes, `{PROGRAM} --version` the version.\n"]
    )


class _Program(argparse.ArgumentParser):
    """The parser of the whole program, whose help is a page."""

    page = ""

    def format_help(self) -> str:
        return self.page


def parser(groups: Groups, commands: Mapping[str, Command]) -> argparse.ArgumentParser:
    """The parser of all commands, with ``command`` for the name of the one that was called."""
    top = _Program(prog=PROGRAM)
    top.page = page(groups)
    top.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    below = top.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=argparse.ArgumentParser)
    for name, command in commands.items():
        command.arguments(below.add_parser(name, help=command.help, description=command.help))
    return top


def unknown(words: list[str], names: Iterable[str]) -> str | None:
    """What to say of a first word that is no command; None if it is one, or an option."""
    names = list(names)
    first = words[0] if words else ""
    if first.startswith("-") or first in names or " ".join(words[:2]) in names:
        return None
    more = [name.partition(" ")[2] for name in names if name.startswith(f"{first} ")]
    if more:
        said = f", got {words[1]!r}" if len(words) > 1 else ""
        return f"{first} needs one of {', '.join(more)} behind it{said}{_nearest(words[1:2], more)}"
    near = _nearest([first], [*names, *(name.partition(" ")[0] for name in names)])
    return f"there is no command {first!r}{near} (`{PROGRAM} --help` lists all)"


def blank_or_home(words: list[str]) -> str | None:
    """What to say of words that hold nothing but space, as an unset variable of a shell gives them, or that begin with a ``~``
    which no shell has expanded; None if there are none.
    """
    for index, word in enumerate(words):
        option, _, value = word.partition("=") if word.startswith("-") and "=" in word else ("", "", word)
        if begins_at_home(value):
            return (
                f"{value!r} must be written out: a shell expands ~ at the beginning of a word alone, and not in quotes"
            )
        if value.strip():
            continue
        before = words[index - 1] if index else ""
        name = option or (before if before.startswith("-") and "=" not in before else "an argument")
        return f"{name} must not be blank, got {value!r}: leave it out, or say what it is"
    return None


def _nearest(words: list[str], names: Iterable[str]) -> str:
    found = [near for word in words for near in difflib.get_close_matches(word, list(names), n=1)]
    return f"; did you mean {found[0]}?" if found else ""


def recipe_argument(parser: argparse.ArgumentParser, overrides: str) -> None:
    """Declare a recipe and its changes, of which ``overrides`` is the help line."""
    recipe = parser.add_argument(
        "recipe", help="name of a shipped recipe (see `cdistill recipes`) or path of a YAML file"
    )
    recipe.complete = dict.fromkeys(("bash", "zsh"), "_cdistill_recipes") | {  # type: ignore[attr-defined]
        "fish": "(_cdistill_recipes)"
    }
    parser.add_argument("overrides", nargs="*", metavar="key=value", help=overrides)


_RECIPES = {
    "bash": """_cdistill_recipes() {{ compgen -W "{names}" -- "$1"; compgen -f -X '!*.y*ml' -- "$1"; compgen -d -- "$1"; }}""",
    "zsh": """_cdistill_recipes() {{ _alternative 'names:recipe:({names})' 'files:file:_files -g "*.y*ml"' }}""",
    "fish": """function _cdistill_recipes; printf '%s\\n' {names}; __fish_complete_suffix .yaml; end""",
}


def completion(commands: Mapping[str, Command], shell: str, recipes: Iterable[str]) -> str:
    """A script by which a shell completes commands, options and names of recipes.

    Raises ValueError if the package shtab is not installed.
    """
    try:
        import shtab
    except ImportError:
        raise InputError("completion needs shtab: pip install shtab") from None
    top = argparse.ArgumentParser(prog=PROGRAM)
    top.add_argument("--version", action="store_true", help="tell the version")
    below = top.add_subparsers(dest="command")
    parsers: dict[str, argparse.ArgumentParser] = {}
    words: dict[str, argparse._SubParsersAction] = {}
    for name, command in commands.items():
        first, _, word = name.partition(" ")
        if first not in parsers:
            parsers[first] = below.add_parser(first, help=command.help)
            if any(other.startswith(f"{first} ") for other in commands):
                words[first] = parsers[first].add_subparsers(dest="word")
        command.arguments(words[first].add_parser(word, help=command.help) if word else parsers[first])
    preamble = _RECIPES[shell].format(names=" ".join(recipes))
    return str(shtab.complete(top, shell, preamble=preamble))
