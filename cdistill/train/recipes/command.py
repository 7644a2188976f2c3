"""The ``cdistill recipes`` command: the shipped recipes, one of them, and what a recipe may say."""

from __future__ import annotations

import argparse
import json

from cdistill.errors import InputError
from cdistill.menu import recipe_argument

ACTIONS = {
    "list": "list the shipped recipes (default)",
    "show": "print a recipe's file or, resolved, every key with its value",
    "keys": "print every key with its range, default and meaning, in Markdown",
    "schema": "print a JSON schema, by which editors complete and check recipes",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the command's parts take."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION")
    parsers = {name: actions.add_parser(name, help=line, description=line) for name, line in ACTIONS.items()}
    show = parsers["show"]
    recipe_argument(show, "change a key of a resolved recipe")
    show.add_argument("--resolved", action="store_true", help="every key of the recipe with its value")


def main(options: argparse.Namespace) -> int:
    """Do one of the parts."""
    if options.action == "show":
        print(resolved(options.recipe, options.overrides) if options.resolved else _as_it_is(options), end="")
    elif options.action in ("keys", "schema"):
        from cdistill.train.recipes import reference

        print(reference.page() if options.action == "keys" else json.dumps(reference.json_schema(), indent=2))
    else:
        from cdistill.train.recipes import shipped_recipes

        recipes = shipped_recipes()
        width = max(map(len, recipes), default=0)
        for name, comment in recipes.items():
            print(f"{name:{width}}  {comment}")
    return 0


def resolved(recipe: str, overrides: list[str]) -> str:
    """Every key of a recipe with its value, as YAML that gives the same recipe. Raises ValueError as `load_recipe`."""
    from cdistill.data import strict_yaml
    from cdistill.train.recipes import load_recipe, recipe_to_dict

    return strict_yaml.dump(recipe_to_dict(load_recipe(recipe, overrides)))


def _as_it_is(options: argparse.Namespace) -> str:
    """The text of a recipe's file, and where it begins from another a comment behind it that names the files."""
    from cdistill.train.recipes.files import recipe_files

    if options.overrides:
        raise InputError(f"{options.overrides[0]!r} changes a resolved recipe: add --resolved")
    first, *others = recipe_files(options.recipe)
    text = first.text if first.text.endswith("\n") else f"{first.text}\n"
    chain = ", which extends ".join(str(file.path) for file in others)
    return f"{text}# It extends {chain}; --resolved shows every key.\n" if others else text
