"""What the site takes from outside this folder: four pages of the root, the page of all commands, and links among them."""

import argparse
import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
OUTSIDE = {
    "index.md": "README.md",
    "contributing.md": "CONTRIBUTING.md",
    "security.md": "SECURITY.md",
    "changelog.md": "CHANGELOG.md",
}
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)#\s]+)(#[^)]*)?\)")
SHOWN = re.compile(r"^<!-- shows (\S+) -->$", re.MULTILINE)  # a program that GitHub shows by a link
FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)


def on_files(files, config):
    """Add the pages that do not lie in docs/."""
    for page, source in OUTSIDE.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text()))
    files.append(File.generated(config, "reference/commands.md", content=page_of_commands()))
    return files


def on_page_markdown(markdown, page, **_):
    """Links from file to file of the repository become links of the site; what is not in the site is named alone."""
    here = page.file.src_uri
    place = OUTSIDE.get(here, f"docs/{here}")

    def moved(link):
        picture, text, target, anchor = link.groups()
        if "://" in target or target.startswith("mailto:"):
            return link[0]
        file = posixpath.normpath(posixpath.join(posixpath.dirname(place), target))
        inside = {source: name for name, source in OUTSIDE.items()}.get(file, file.removeprefix("docs/"))
        if inside == file:
            return text
        return f"{picture}[{text}]({posixpath.relpath(inside, posixpath.dirname(here) or '.')}{anchor or ''})"

    fences = iter(FENCE.findall(markdown))
    parts = [LINK.sub(moved, part) for part in FENCE.split(markdown)]
    text = "".join(part + next(fences, "") for part in parts)
    return SHOWN.sub(lambda shown: f"```python\n{(ROOT / shown[1]).read_text()}```", text)


def page_of_commands() -> str:
    """Every command with its arguments, from the parsers themselves."""
    from cdistill.cli import COMMANDS

    lines = ["# Commands", "", "`cdistill COMMAND --help` says the same. A mistake is one line on stderr.", ""]
    lines += [
        "Exit codes: 0 done, 1 a run that failed, 2 a mistake in what was asked for, 130 or 143 stopped by a signal.",
        "",
    ]
    for name, command in COMMANDS.items():
        parser = argparse.ArgumentParser(prog=f"cdistill {name}", formatter_class=_Wide, add_help=False)
        command.arguments(parser)
        lines += _sections(parser, command.help)
    return "\n".join(lines)


def _sections(parser: argparse.ArgumentParser, text: str) -> list[str]:
    """A command's, or those of the commands beneath it."""
    parser.formatter_class = _Wide
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            told = {choice.dest: choice.help or "" for choice in action._choices_actions}
            return [line for name, below in action.choices.items() for line in _sections(below, told[name])]
    usage = parser.format_usage().removeprefix("usage: ").rstrip().replace("\n" + " " * len("usage: "), "\n")
    lines = [f"## `{parser.prog}`", "", f"{text[0].upper()}{text[1:]}.", "", "```", usage, "```", ""]
    actions = [action for action in parser._actions if action.help != argparse.SUPPRESS and action.dest != "help"]
    if actions:
        lines += ["| argument | meaning |", "| --- | --- |", *(_row(action, parser) for action in actions), ""]
    return lines


class _Wide(argparse.HelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, width=100)


def _row(action: argparse.Action, parser: argparse.ArgumentParser) -> str:
    formatter = parser._get_formatter()
    named = formatter._format_action_invocation(action)
    text = formatter._expand_help(action) if action.help else ""
    return f"| `{named}` | {text} |".replace("\n", " ")
