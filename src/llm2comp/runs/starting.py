"""`start_from`: the encoder that a run's first stage begins with, and the run's copy of it.

runs/x/start/   recipe.yaml and finished stages of that encoder: adapters, memory;
                a start/ of its own, if it began with another encoder itself

Its adapters lie below those of the run, which needs nothing of the original afterwards. The LM
without any adapter stays teacher and decoder.
"""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import Any

from llm2comp.errors import RecipeError
from llm2comp.model.backbone import licence_in
from llm2comp.model.backbone.digest import file_digest
from llm2comp.recipe import BUILTIN_ENCODERS, STARTS, Recipe, is_local, missing_path
from llm2comp.runs.finished import card_of, require_base
from llm2comp.runs.folder import (
    CONFIG_FILE,
    DONE_FILE,
    FOLDERS,
    RECIPE_FILE,
    START_FOLDER,
    Run,
    stage_of,
)
from llm2comp.system.files import to_json, write_text
from llm2comp.system.folders import START, new_folder

CARD_FILE = "README.md"
# What a run must share with the encoder that it starts from, beside the LM itself.
SHARED = (
    "memory.tokens",
    "encoder.pooling",
    "encoder.prompt",
    "encoder.projection",
    "adapter.kind",
    "model.attention",
    "model.bos",
)


def start_of(recipe: Recipe, run: Path | None = None) -> Run | None:
    """The encoder that a recipe starts from; if it is gone, the copy of it in the run.

    Raises:
        RecipeError: nothing that can be started from.
    """
    if (name := recipe.start_from) is None:
        return None
    folder = BUILTIN_ENCODERS.get(name) or Path(name)
    found = Run.of(folder)
    if found is None and run is not None and (run / START_FOLDER / RECIPE_FILE).is_file():
        return Run(run / START_FOLDER)
    if found is not None and (run is None or found.path != run.absolute()):
        return Run(found.path, stage_of(folder))
    problem, fix = "no encoder to start from", None
    if found is not None:
        problem, fix = "a run cannot start from itself", "give another --out"
    elif (folder / "modules.json").is_file():
        problem = "an exported folder holds weights with the adapters in them, and no adapters"
        fix = "name the run that it was exported from"
    elif (folder / "config.json").is_file():
        problem, fix = "a language model is no encoder yet", "name it as model.name"
    elif (nearest := missing_path(name)) is not None:
        fix = f"there is no such folder; there is {nearest}"
    raise RecipeError(problem, where="start_from", expected=STARTS, found=name, fix=fix)


def check_start(recipe: Recipe, run: Path | None = None) -> None:
    """Refuse what a recipe cannot start from.

    Raises:
        RecipeError: no such encoder, one with a trained copy of its LM, or one whose states are not
            what the recipe asks for. RunError: not finished. ModelFolderError: of another LM.
    """
    start = start_of(recipe, run)
    if start is None:
        return
    if start.recipe.adapter.kind == "full":
        raise RecipeError(
            "its layers are a whole trained copy of the LM, which no adapter lies over",
            where="start_from",
            expected="an encoder of adapter.kind lora or none",
            found=f"{recipe.start_from}: full",
        )
    theirs, ours = (r.model_dump(mode="json") for r in (start.recipe, recipe))
    for section, key in (setting.split(".") for setting in SHARED):
        if theirs[section][key] != ours[section][key]:
            raise RecipeError(
                "differs from the encoder that the run starts from",
                where=f"{section}.{key}",
                expected=f"{theirs[section][key]!r}, as in {recipe.start_from}",
                found=repr(ours[section][key]),
                fix="leave it out: it is inherited",
            )
    for stage in start.recipe.stages:
        require_base(start.stage(stage) / DONE_FILE, recipe)


def start_digest(start: Run | None) -> str:
    """Hex digest over the weights that a run begins with; empty without a start."""
    if start is None:
        return ""
    of: list[Any] = [start_digest(start.start), start.recipe.adapter.model_dump(mode="json")]
    of += [[file_digest(file) for file in _weights(start.stage(s))] for s in start.recipe.stages]
    return hashlib.sha256(to_json(of, sort_keys=True).encode()).hexdigest()


def keep_start(recipe: Recipe, run: Path) -> None:
    """Copy the encoder that a run starts from into it, unless it is there.

    Raises RunError: something else stands there, or it cannot be written.
    """
    start, kept = start_of(recipe, run), run / START_FOLDER
    if start is None or start.path == kept:
        return
    if (kept / RECIPE_FILE).is_file() and start_digest(Run(kept)) == start_digest(start):
        return
    with new_folder(kept, START) as folder:
        _copy(start, folder)


def run_card(run: Run) -> dict[str, str]:
    """Facts for the README of a run's exported folder, its start's licence among them."""
    facts, start = card_of(run.recipe), run.start
    if start is None:
        return facts
    card = start.path / CARD_FILE
    licence = licence_in(card) if card.is_file() else run_card(start)["licence"]
    name = str(run.recipe.start_from)
    return facts | {"licence": licence, "start": Path(name).name if is_local(name) else name}


def _weights(stage: Path) -> list[Path]:
    return [*sorted(stage.glob("adapter/*.safetensors")), *stage.glob("memory.safetensors")]


def _copy(start: Run, folder: Path) -> None:
    write_text(folder / RECIPE_FILE, start.recipe.to_yaml())
    files = [start.path / CARD_FILE]
    for name in start.recipe.stages:
        stage = start.stage(name)
        (folder / FOLDERS[name] / "adapter").mkdir(parents=True)
        files += [*_weights(stage), *stage.glob("adapter/*.json")]
        files += [stage / CONFIG_FILE, stage / DONE_FILE]
    for file in files:
        if file.is_file():
            shutil.copyfile(file, folder / file.relative_to(start.path))
    if start.start is not None:
        (folder / START_FOLDER).mkdir()
        _copy(start.start, folder / START_FOLDER)
