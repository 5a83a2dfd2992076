"""What a stage's result depends on, as a hash.

Stages of one key are the same training, wherever their files lie.
"""

from __future__ import annotations

import hashlib
import platform
from pathlib import Path
from typing import Any

from llm2comp.data.responses import source_digest
from llm2comp.model.backbone import weights_digest
from llm2comp.model.judges import judge_digest
from llm2comp.recipe import Recipe, SclStage, Stage, each_path, is_local, leaves
from llm2comp.runs.starting import start_digest, start_of
from llm2comp.system.files import to_json

FORMAT_VERSION = 1
# Settings that change what is written, how fast or in how much memory, not what is learned.
NO_EFFECT = {
    "log_every_steps",
    "save_every_steps",
    "workers",
    "compile",
    "max_tokens_per_batch",
    "mini_batch_tokens",
}
# Settings of SCL and memory that are left out where they are off: they came later; older runs keep
# their keys.
NEWER = ("teacher", "guide", "pretext_weight", "pretext_batch_size", "start_as")
# Settings of the recipe as a whole that no stage depends on: how long the exported encoder reads,
# where figures go.
NO_STAGE = {"max_tokens", "report_to", "watch"}


def stage_keys(recipe: Recipe, run: Path | None = None) -> dict[str, str]:
    """Stage → hash of all that its result depends on: stages of one key are the same training.

    `run`: its directory, which may hold a copy of what it starts from.
    """
    keys: dict[str, str] = {}
    previous = start_digest(start_of(recipe, run))
    for name, stage in recipe.stages.items():
        previous = keys[name] = _stage_key(recipe, name, stage, previous)
    return keys


def matters(path: list[str], recipe: Recipe) -> bool:
    """Whether another value of a setting is another training; the watch's if it steers a stage."""
    steered = path[0] == "watch" and any(stage.keep_best for stage in recipe.stages.values())
    return path[-1] not in NO_EFFECT and (path[0] not in NO_STAGE or steered)


def settings_of(recipe: Recipe) -> dict[str, Any]:
    """Dotted name → value; an empty container is left out, and so is where a file lies."""
    tree = each_path(recipe.model_dump(mode="json"), placeless)
    return {key: value for key, value in leaves(tree).items() if value not in ([], {})}


def placeless(name: str) -> str:
    """A local path without its folders; other names as they are."""
    return Path(name).name if is_local(name) else name


def _without_newer(section: dict[str, Any]) -> dict[str, Any]:
    """A section's settings without those of `NEWER` that are off."""
    return {name: value for name, value in section.items() if value or name not in NEWER}


def _watched(recipe: Recipe) -> list[str]:
    """All files and other sources that a watch measures on, beside those of the stages."""
    if recipe.watch is None:
        return []
    texts, pairs = recipe.watch.data, recipe.watch.pairs
    sets = [Path(folder) for folder in recipe.watch.tasks]
    files = sorted(str(file) for folder in sets for file in folder.rglob("*") if file.is_file())
    return [*(spec.source for spec in texts), *(spec.source for spec in pairs), *files]


def _stage_key(recipe: Recipe, name: str, stage: Stage, previous: str) -> str:
    """Hash of all that a stage's result depends on.

    Settings, model and its weights, adapter, seed, data, the stage before or the start.

    Files count by name and content, wherever they lie.
    """
    settings = _without_newer(stage.model_dump(mode="json", exclude=NO_EFFECT))
    judges = (
        [judge_digest(judge) for judge in stage.judges.values()]
        if isinstance(stage, SclStage)
        else []
    )
    steered = {"watch"} if stage.keep_best else set()
    shared = recipe.model_dump(
        mode="json", include={"model", "memory", "encoder", "adapter", "seed"} | steered
    )
    shared["memory"] = _without_newer(shared["memory"])
    sources = [data["source"] for data in settings["data"]]
    sources += _watched(recipe) if steered else []
    files = [
        source_digest(Path(source))
        for source in sources
        if is_local(source) and Path(source).exists()
    ]
    # its documentation is the data
    python = platform.python_version() if "builtin:python-docs" in sources else ""
    model = weights_digest(recipe.model)
    settings, shared = each_path(settings, placeless), each_path(shared, placeless)
    payload = to_json(
        [FORMAT_VERSION, name, settings, shared, model, files, python, previous, *judges],
        sort_keys=True,
    )
    return hashlib.sha256(payload.encode()).hexdigest()
