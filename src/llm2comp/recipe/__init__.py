"""Recipes: strict YAML → frozen models, the one source of truth for a run. No torch here."""

from llm2comp.recipe.contrastive_stages import ContrastiveStage, SclStage, UclStage
from llm2comp.recipe.parts import (
    AdapterSettings,
    EncoderSettings,
    GuideSettings,
    JudgeSettings,
    MemorySettings,
    ModelSettings,
    PairData,
    Schedule,
    Section,
    TeacherSettings,
    TextData,
    WatchSettings,
)
from llm2comp.recipe.paths import (
    LocalName,
    absolute,
    each_path,
    expanded,
    is_local,
    missing_path,
    moved,
)
from llm2comp.recipe.pretext_stage import PretextStage
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
from llm2comp.recipe.recipe import WATCHED, Recipe
from llm2comp.recipe.stages import Stage
from llm2comp.recipe.starting import BUILTIN_ENCODERS, STARTS, base_of

__all__ = [
    "BUILTIN_ENCODERS",
    "STARTS",
    "WATCHED",
    "AdapterSettings",
    "ContrastiveStage",
    "EncoderSettings",
    "GuideSettings",
    "JudgeSettings",
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
    "TeacherSettings",
    "TextData",
    "UclStage",
    "WatchSettings",
    "absolute",
    "base_of",
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
