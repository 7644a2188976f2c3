"""Recipes: their keys, how files of them are read, what is wrong with one, and the page of all keys.

Importing this package imports neither torch nor transformers.
"""

from cdistill.choices import KDConfig, VATConfig
from cdistill.train.recipes.files import (
    load_recipe,
    recipe_from_dict,
    recipe_to_dict,
    shipped_recipes,
    with_overrides,
)
from cdistill.train.recipes.keys import DataConfig, Recipe, StageConfig, VATOptions
from cdistill.train.recipes.models import LoRAConfig, PruningConfig, StudentConfig, TeacherMemory

__all__ = [
    "DataConfig",
    "KDConfig",
    "LoRAConfig",
    "PruningConfig",
    "Recipe",
    "StageConfig",
    "StudentConfig",
    "TeacherMemory",
    "VATConfig",
    "VATOptions",
    "load_recipe",
    "recipe_from_dict",
    "recipe_to_dict",
    "shipped_recipes",
    "with_overrides",
]
