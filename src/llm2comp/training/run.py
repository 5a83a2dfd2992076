"""A run: recipe → run directory (`runs/folder.py`), stage after stage; run again to go on."""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import sys
import time
from collections.abc import Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from llm2comp.errors import RunError
from llm2comp.model.backbone import Base
from llm2comp.model.backbone.quiet import quiet_libraries
from llm2comp.model.compressor import Compressor
from llm2comp.model.encoder import as_sentence_transformer
from llm2comp.recipe import Recipe, change_recipe, expanded, load_recipe
from llm2comp.runs.finished import limits_of, refuse_others, require_base
from llm2comp.runs.folder import (
    CONFIG_FILE,
    DONE_FILE,
    ENVIRONMENT_FILE,
    FOLDERS,
    MODEL_FOLDER,
    RECIPE_FILE,
    Run,
    add_adapter,
    begin,
    has_inputs,
    is_done,
)
from llm2comp.runs.keys import FORMAT_VERSION, matters, settings_of, stage_keys
from llm2comp.runs.starting import keep_start, run_card
from llm2comp.storage.export import export
from llm2comp.system.console import say
from llm2comp.system.files import explain_disk_errors, to_json, write_text
from llm2comp.system.folders import RUN, STAGE, claim, new_folder, remove_folder
from llm2comp.training.checks import check
from llm2comp.training.estimates import fitted
from llm2comp.training.ranks import check_launch, is_main_process, on_main, sharding
from llm2comp.training.sample import LocalSets, Watch
from llm2comp.training.stages import RUNNERS, RunOptions
from llm2comp.training.watch import BEST_FOLDER

PACKAGES = (
    "llm2comp",
    "torch",
    "transformers",
    "peft",
    "sentence-transformers",
    "datasets",
    "accelerate",
    "numpy",
)


def train(
    recipe: Recipe | str | Path,
    out: str | Path | None = None,
    overrides: Sequence[str] = (),
    siblings: Sequence[Path] = (),
    local_sets: LocalSets | None = None,
) -> Path:
    """Run all stages of a recipe that are not done yet, then export.

    Args:
        recipe: a Recipe, a file, or the name of a shipped recipe.
        out: run directory; default `runs/<recipe name>`.
        overrides: `key.sub=value` changes to the recipe.
        siblings: other run directories; a stage that one of them finished on the same inputs is
            copied, not trained.
        local_sets: what makes a scorer of the folders that `watch.tasks` names; needed where it
            names some.

    Returns:
        The run directory; `<run>/model` is the finished encoder.

    Raises:
        Llm2CompError: see the family; nothing half-written stays in a stage that is called done.
    """
    quiet_libraries()
    resolved = (
        change_recipe(recipe, overrides)
        if isinstance(recipe, Recipe)
        else load_recipe(recipe, overrides)
    )
    run = expanded(out) if out is not None else Path("runs") / resolved.name
    check_launch(resolved)
    with contextlib.ExitStack() as held:
        on_main(lambda: _open(run, resolved, held, local_sets), resolved.model.device)
        _run_stages(run, resolved, siblings, local_sets)
    return run


def _open(
    run: Path, recipe: Recipe, held: contextlib.ExitStack, local_sets: LocalSets | None
) -> None:
    """Make the directory this recipe's and this process's."""
    _refuse_foreign(run, recipe)
    check(recipe, local_sets, run)
    with explain_disk_errors(run):
        run.mkdir(parents=True, exist_ok=True)
    try:
        held.enter_context(FileLock(run / ".lock", timeout=0))
    except Timeout as error:
        raise RunError(
            "another process is training here",
            where=str(run),
            fix="wait for it, or give another --out",
        ) from error
    _claim(run, recipe)
    keep_start(recipe, run)


def _run_stages(
    run: Path, recipe: Recipe, siblings: Sequence[Path], local_sets: LocalSets | None
) -> None:
    compressor = begin(recipe, Run(run).start)
    keys = stage_keys(recipe, run)
    options: RunOptions | None = None
    for number, (name, stage) in enumerate(recipe.stages.items()):
        folder = run / FOLDERS[name]
        key = keys[name]
        add_adapter(compressor, recipe, name)
        if on_main(
            partial(_done_or_begun, recipe, name, key, folder, siblings), recipe.model.device
        ):
            say(f"{folder.name}: done before")
            compressor.load(folder, name)
            continue
        began = time.time()
        options = options or _options(recipe, compressor, local_sets)
        fit = fitted(name, stage, compressor.backbone, recipe.adapter.kind == "full")
        kept = RUNNERS[name](compressor, fit, folder, recipe.seed + number, options)  # type: ignore[operator]
        seconds = round(time.time() - began, 1)
        base = Base.of(recipe.model).model_dump()
        done = {
            "inputs": key,
            "steps": stage.steps,
            "kept_step": kept,
            "seconds": seconds,
            "base": base,
        }
        _finish(compressor, name, done, folder)
        # what the next stage adds would not be spread over the devices: begin with whole weights
        if sharding():
            del compressor
            compressor = Run(run).compressor(name, recipe)
    exported = f"{key}:{recipe.max_tokens}"
    if is_main_process() and not is_done(run / MODEL_FOLDER, exported):
        model = as_sentence_transformer(
            compressor.eval(), *limits_of(recipe), prompts=Run(run).prompts(name)
        )
        # by all its weights: so `load` gives of the run what it gives of its last stage
        export(model, run / MODEL_FOLDER, run_card(Run(run)), pooling="mean")
        write_text(run / MODEL_FOLDER / DONE_FILE, to_json({"inputs": exported}))


def _options(recipe: Recipe, compressor: Compressor, local_sets: LocalSets | None) -> RunOptions:
    if recipe.watch is not None and sharding():
        say(f"no watch: rank 0 alone cannot encode while {sharding()} spreads the weights")
        return RunOptions(recipe.report_to, pretext=recipe.pretext)
    watch = Watch(recipe, recipe.watch, compressor, local_sets) if recipe.watch else None
    return RunOptions(recipe.report_to, watch, recipe.pretext)


def _done_or_begun(
    recipe: Recipe, name: str, key: str, folder: Path, siblings: Sequence[Path]
) -> bool:
    """Whether a stage is done, here or in a sibling; if not, its folder is made ready."""
    _take_over(folder, key, siblings)
    if is_done(folder, key):
        return True
    with contextlib.suppress(RunError):  # not finished, or damaged: begun anew
        require_base(folder / DONE_FILE, recipe)
    _begin(recipe, name, key, folder)
    return False


def _take_over(folder: Path, key: str, siblings: Sequence[Path]) -> None:
    """Copy a stage that a sibling has finished on the same inputs, unless it is done here.

    It appears whole or not at all.
    """
    found = [run / folder.name for run in siblings if is_done(run / folder.name, key)]
    if found and not is_done(folder, key):
        say(f"{folder.name}: the same as {found[0]}, taken from there")
        with new_folder(folder, STAGE) as copy:
            shutil.copytree(
                found[0],
                copy,
                ignore=shutil.ignore_patterns("checkpoint-*", BEST_FOLDER),
                dirs_exist_ok=True,
            )


def _begin(recipe: Recipe, name: str, key: str, folder: Path) -> None:
    """A stage's folder to train in: empty, or with the checkpoints of the same training."""
    with explain_disk_errors(folder):
        if not has_inputs(folder / CONFIG_FILE, key):
            remove_folder(folder, STAGE)
        (folder / DONE_FILE).unlink(missing_ok=True)
    names = list(recipe.stages)
    stack = names[: names.index(name) + 1]
    config = {"format_version": FORMAT_VERSION, "stage": name, "stack": stack, "inputs": key}
    write_text(folder / CONFIG_FILE, to_json(config))


def _finish(compressor: Compressor, name: str, done: dict[str, Any], folder: Path) -> None:
    """Write a stage's result, say that it is done, drop its checkpoints.

    Every rank may add its part.
    """
    with explain_disk_errors(folder):
        compressor.save(folder, name)
    on_main(partial(_mark_done, done, folder), str(compressor.backbone.input_table.device))


def _mark_done(done: dict[str, Any], folder: Path) -> None:
    write_text(folder / DONE_FILE, to_json(done))
    for kept in (*folder.glob("checkpoint-*"), *folder.glob(BEST_FOLDER)):
        shutil.rmtree(kept)


def _refuse_foreign(run: Path, recipe: Recipe) -> None:
    """Raise RunError for a directory with another recipe's training, or with something else."""
    refuse_others(
        run, [run / FOLDERS[name] for name in recipe.stages], run / MODEL_FOLDER, DONE_FILE
    )
    file = run / RECIPE_FILE
    if file.exists():
        if not (any(run.glob(f"*/{DONE_FILE}")) or any(run.glob("*/checkpoint-*"))):
            return
        before, now = settings_of(Run(run).recipe), settings_of(recipe)
        changed = [
            key
            for key in {**before, **now}
            if before.get(key) != now.get(key) and matters(key.split("."), recipe)
        ]
        if changed:
            lines = [
                f"{key}: {before.get(key)!r} there, {now.get(key)!r} asked for"
                for key in sorted(changed)[:5]
            ]
            raise RunError(
                "the run directory belongs to another recipe",
                where=str(run),
                found="; ".join(lines),
                fix="give another --out, or delete the directory",
            )


def _claim(run: Path, recipe: Recipe) -> None:
    """Make the directory this recipe's."""
    _refuse_foreign(run, recipe)
    claim(run, RUN)
    environment = {
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "packages": {name: version(name) for name in PACKAGES},
        "command": sys.argv,
        "folder": str(run.absolute()),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
    write_text(run / RECIPE_FILE, recipe.to_yaml())
    write_text(run / ENVIRONMENT_FILE, to_json(environment, indent=1))
