"""How long a recipe will take: a few small steps of each stage, in a folder that goes away."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from llm2comp.errors import DataError
from llm2comp.model.backbone.loading import load_skeleton
from llm2comp.model.compressor import Compressor
from llm2comp.recipe import Recipe, Stage, is_local
from llm2comp.runs.folder import add_adapter, begin
from llm2comp.runs.starting import start_of
from llm2comp.system.cache import CACHE_VARIABLE
from llm2comp.system.console import console
from llm2comp.training.estimates import AnyStage, fitted
from llm2comp.training.progress import METRICS_FILE, StepLines
from llm2comp.training.stages import RUNNERS, RunOptions

STEPS, TOKENS, ROWS = 3, 512, 400
MOST_PARAMETERS = 1_000_000_000


def times(recipe: Recipe, tokens: Mapping[str, int]) -> str:
    """For people: hours per stage that reads so many tokens, or why they cannot be told.

    Raises:
        BackboneError, ModelFolderError: the model cannot be loaded, as the run itself would find.
    """
    name = recipe.model.name
    if not (is_local(name) or name.startswith("builtin:")):
        return "cannot be told without the model, which is not on this disk"
    if sum(p.numel() for p in load_skeleton(recipe.model).parameters()) > MOST_PARAMETERS:
        return "not measured, as loading a model of this size takes long itself"
    compressor = begin(recipe, start_of(recipe))
    backbone = compressor.backbone
    hours = {}
    for name, stage in recipe.stages.items():
        backbone.add_adapter(name, recipe.adapter, stage.adapter_dropout, recipe.seed)
        with _unseen():
            trial = _trial(fitted(name, stage, backbone, recipe.adapter.kind == "full"))
            try:
                pretext = recipe.pretext and _trial(recipe.pretext)
                rate = _rate(compressor, name, trial, RunOptions(pretext=pretext))
            except DataError:  # none of the first rows is fit
                return f"cannot be told: {name} finds no text that is fit among its first {ROWS}"
        hours[name] = tokens[name] / rate / 3600
    each = ", ".join(f"{name} {said(value)}" for name, value in hours.items())
    device = backbone.input_table.device
    return (
        f"about {said(sum(hours.values()))} on this {device} ({each}; from {STEPS} small "
        "steps each, the watch not counted)"
    )


def rate(recipe: Recipe, name: str) -> float:
    """Text tokens per second of a stage as the recipe has it, by all of its steps.

    The watch is not counted.
    """
    compressor = begin(recipe, start_of(recipe))
    add_adapter(compressor, recipe, name)
    plain = {"keep_best": None, "patience": None, "log_every_steps": 1}
    with _unseen():
        full = recipe.adapter.kind == "full"
        stage = fitted(name, recipe.stages[name], compressor.backbone, full)
        return _rate(compressor, name, stage.model_copy(update=plain), RunOptions())


def _trial(stage: AnyStage) -> AnyStage:
    """A few small steps of a stage on its first rows."""
    specs: Any = stage.data  # type: ignore[attr-defined]
    limit = getattr(stage, "max_tokens", None) or stage.document_max_tokens  # type: ignore[attr-defined]
    few = {
        "steps": STEPS,
        "batch_size": max(2, min(stage.batch_size, TOKENS // limit)),
        "save_every_steps": STEPS,
    }
    plain = {
        "log_every_steps": 1,
        "keep_best": None,
        "patience": None,
        "compile": False,
        "workers": 0,
    }
    first = tuple(
        spec.model_copy(update={"limit": min(ROWS, spec.limit or ROWS)}) for spec in specs
    )
    once = (
        {"gradient_accumulation_steps": 1} if hasattr(stage, "gradient_accumulation_steps") else {}
    )
    return stage.model_copy(update={**few, **plain, **once, "data": first})


def _rate(compressor: Compressor, name: str, stage: Stage, options: RunOptions) -> float:
    """Text tokens per second."""
    with tempfile.TemporaryDirectory() as folder:
        RUNNERS[name](compressor, stage, Path(folder), 0, options)  # type: ignore[operator]
        return float(StepLines(Path(folder) / METRICS_FILE).read()[-1]["tokens_per_second"])


@contextlib.contextmanager
def _unseen() -> Iterator[None]:
    """Nothing is said, and corpora are kept in a cache that goes away."""
    quiet, chosen = console.quiet, os.environ.get(CACHE_VARIABLE)
    with tempfile.TemporaryDirectory() as folder:
        console.quiet, os.environ[CACHE_VARIABLE] = True, folder
        try:
            yield
        finally:
            console.quiet = quiet
            del os.environ[CACHE_VARIABLE]
            if chosen is not None:
                os.environ[CACHE_VARIABLE] = chosen


def said(hours: float) -> str:
    """Hours for people."""
    return (
        f"{hours:.1f} h"
        if hours >= 1
        else f"{60 * hours:.0f} min"
        if hours >= 1 / 60
        else "under a minute"
    )
