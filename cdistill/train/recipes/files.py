"""Recipes as files: read, extended, overridden, checked, and written as plain values."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from cdistill._plugins import import_plugins
from cdistill.data import strict_yaml
from cdistill.errors import InputError
from cdistill.train.recipes.keys import Recipe
from cdistill.train.recipes.mistakes import build
from cdistill.train.recipes.values import override

RECIPES = Path(__file__).parents[2] / "recipes"


def shipped_recipes() -> dict[str, str]:
    """Names of the recipes in the package, each with the first comment line of its file."""
    result = {}
    for path in sorted(RECIPES.glob("*.yaml"), key=lambda path: path.stem):
        lines = path.read_text(encoding="utf-8").splitlines()
        result[path.stem] = next((line.lstrip("# ").strip() for line in lines if line.startswith("#")), "")
    return result


def load_recipe(name_or_path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe: the name of a shipped one or the path of a YAML file, changed by ``a.b=value`` overrides.

    A file may begin from another: ``extends: NAME`` (or a path); its name and output are then those of its file unless it
    says otherwise. Values of overrides are YAML, too (`cdistill.data.strict_yaml`).

    Raises:
        ValueError: an unknown recipe, key or value, which the message names, a key that a file gives twice, or an override
            that undoes another.
    """
    import_plugins()
    *above, last = recipe_files(name_or_path)
    content = last.content
    for file in reversed(above):
        name = file.path.stem
        content = _laid_over(content, {"name": name, "output": f"runs/{name}"} | file.content)
    override(content, overrides)
    return recipe_from_dict(content)


class RecipeFile(NamedTuple):
    """One file of a recipe; ``extends`` names what it begins from, which its ``content`` no longer does."""

    path: Path
    text: str
    content: dict[str, Any]
    extends: str | None


def recipe_files(name_or_path: str | os.PathLike[str]) -> list[RecipeFile]:
    """The file of a recipe, that of the recipe which it ``extends``, and so on. Raises ValueError as `load_recipe`."""
    files: list[RecipeFile] = []
    following: str | os.PathLike[str] | None = name_or_path
    while following is not None:
        file = _read(_beside(files[-1].path, following) if files else following)
        if any(file.path.resolve() == other.path.resolve() for other in files):
            raise InputError(f"recipe {file.path} extends itself")
        files.append(file)
        following = file.extends
    return files


def _beside(path: Path, extended: str | os.PathLike[str]) -> str | os.PathLike[str]:
    """What a file extends: a shipped recipe, a path from where cdistill is run, or one from the file's own folder.

    Raises ValueError if the last two are different files.
    """
    near = path.parent / extended
    if (RECIPES / f"{extended}.yaml").is_file() or not near.is_file():
        return extended
    if Path(extended).is_file() and not near.samefile(extended):
        raise InputError(
            f"recipe {path}: extends {extended} may be {near} or {Path(extended).resolve()}: write the whole path"
        )
    return near


def _read(name_or_path: str | os.PathLike[str]) -> RecipeFile:
    path = RECIPES / f"{name_or_path}.yaml"
    if not path.is_file():
        path = Path(name_or_path)
    if not path.is_file():
        near = strict_yaml.nearest(str(name_or_path), shipped_recipes())
        raise InputError(
            f"recipe {str(name_or_path)!r} is neither a file nor shipped: `cdistill recipes` lists those that are{near}"
        )
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"recipe {path} is not UTF-8 text: {error}") from None
    content = strict_yaml.load(text, f"recipe {path}")
    if not isinstance(content, dict):
        raise InputError(f"recipe {path} must be a mapping of keys to values")
    extended = content.pop("extends", None)
    if not isinstance(extended, str | None):
        raise InputError(f"recipe {path}: extends must be the name of a recipe or a path, got {extended!r:.60}")
    return RecipeFile(path, text, content, extended)


def _laid_over(below: Any, above: Any) -> Any:
    """Mappings key by key; any other value takes the place of the one below."""
    if isinstance(below, dict) and isinstance(above, dict):
        return {**below, **{key: _laid_over(below.get(key), value) for key, value in above.items()}}
    return above


def with_overrides(recipe: Recipe, overrides: Sequence[str]) -> Recipe:
    """A recipe changed by ``a.b=value`` overrides. Raises ValueError as `load_recipe`."""
    content = recipe_to_dict(recipe)
    override(content, overrides)
    return recipe_from_dict(content)


def recipe_from_dict(content: Mapping[str, Any]) -> Recipe:
    """A recipe from plain values, as `recipe_to_dict` gives them. Raises ValueError naming key and allowed values."""
    content = dict(content)
    sections = content.get("stage")
    if isinstance(sections, Mapping):
        content["stage"] = {
            name: {"objective": name, **section} if isinstance(section, Mapping) else section
            for name, section in sections.items()
        }
    return build(Recipe, content)


def recipe_to_dict(recipe: Recipe) -> dict[str, Any]:
    """A recipe as plain values that YAML and JSON can hold."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, list | tuple) else value

    return plain(dataclasses.asdict(recipe))
