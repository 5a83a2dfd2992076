"""Recipes: strict YAML → frozen models, the one source of truth for a run. No torch here."""

from llm2comp.recipe.parts import (
    AdapterSettings,
    EncoderSettings,
    MemorySettings,
    ModelSettings,
    PairData,
    Schedule,
    Section,
    TextData,
    WatchSettings,
)
from llm2comp.recipe.paths import LocalName, absolute, each_path, expanded, is_local, missing_path, moved
from llm2comp.recipe.reading import (
    change_recipe,
    checked,
    find_recipe,
    leaves,
    load_recipe,
    nearest,
    parse_recipe,
    read_yaml,
    shipped_files,
    shipped_recipes,
)
from llm2comp.recipe.settings import WATCHED, Recipe
from llm2comp.recipe.stages import ContrastiveStage, PretextStage, SclStage, Stage, UclStage

__all__ = [
    "WATCHED",
    "AdapterSettings",
    "ContrastiveStage",
    "EncoderSettings",
    "LocalName",
    "MemorySettings",
    "ModelSettings",
    "PairData",
    "PretextStage",
    "Recipe",
    "Schedule",
    "SclStage",
    "Section",
    "Stage",
    "TextData",
    "UclStage",
    "WatchSettings",
    "absolute",
    "change_recipe",
    "checked",
    "each_path",
    "expanded",
    "find_recipe",
    "is_local",
    "leaves",
    "load_recipe",
    "missing_path",
    "moved",
    "nearest",
    "parse_recipe",
    "read_yaml",
    "shipped_files",
    "shipped_recipes",
]
