"""A run directory: its names, its recipe, which stages are done, the encoder of each.

runs/x/recipe.yaml            the resolved recipe
runs/x/environment.json       versions, machine, command
runs/x/1-pretext/, 2-ucl/, 3-scl/   config.json, metrics.jsonl, adapter/, memory.safetensors,
                                    done.json
runs/x/start/                 the encoder that the run starts from, if it does (starting.py)
runs/x/model/                 plain sentence-transformers folder
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING

from llm2comp.errors import RunError
from llm2comp.model.backbone import load_backbone
from llm2comp.model.compressor import Compressor
from llm2comp.model.encoder import as_sentence_transformer
from llm2comp.recipe import Recipe, each_path, expanded, load_recipe, moved, parse_recipe
from llm2comp.runs.finished import limits_of, prompts_of, require_base

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

FOLDERS = {"pretext": "1-pretext", "ucl": "2-ucl", "scl": "3-scl"}
RECIPE_FILE, DONE_FILE, CONFIG_FILE, MODEL_FOLDER = (
    "recipe.yaml",
    "done.json",
    "config.json",
    "model",
)
START_FOLDER = "start"
ENVIRONMENT_FILE = "environment.json"


@dataclass(frozen=True)
class Run:
    """A run directory, begun or finished.

    Args:
        path: of the directory.
        upto: the last stage that counts; None: all that its recipe has.
    """

    path: Path
    upto: str | None = None

    @classmethod
    def of(cls, path: str | Path) -> Run | None:
        """The run that a path belongs to: itself, a stage or the model of it; else None."""
        folder = expanded(path).absolute()
        if (folder / RECIPE_FILE).is_file():
            return cls(folder)
        inside = folder.name in (*FOLDERS.values(), MODEL_FOLDER)
        return cls(folder.parent) if inside and (folder.parent / RECIPE_FILE).is_file() else None

    @cached_property
    def recipe(self) -> Recipe:
        """Its recipe; paths that lay in the run follow it when it is moved.

        Raises RunError when there is none.
        """
        file = self.path / RECIPE_FILE
        if not file.is_file():
            raise RunError(
                "not a run directory", where=str(self.path), expected=f"{RECIPE_FILE} in it"
            )
        follow = partial(moved, old=self._trained_in(), new=self.path.absolute())
        tree = each_path(load_recipe(file).model_dump(mode="json"), follow)
        names = list(FOLDERS)
        later = names[names.index(self.upto) + 1 :] if self.upto else ()
        return parse_recipe(tree | dict.fromkeys(later), str(file))

    @property
    def model(self) -> Path:
        """The folder of the finished encoder."""
        return self.path / MODEL_FOLDER

    @cached_property
    def start(self) -> Run | None:
        """Its copy of the encoder that its first stage began with; None: that was a bare LM."""
        return Run(self.path / START_FOLDER) if self.recipe.start_from else None

    @property
    def last(self) -> Path:
        """The folder of its last stage."""
        return self.stage(list(self.recipe.stages)[-1])

    def stage(self, name: str) -> Path:
        """A stage's folder."""
        return self.path / FOLDERS[name]

    def done(self, name: str, key: str) -> bool:
        """Whether a stage was finished on these inputs (`keys.stage_keys`)."""
        return is_done(self.stage(name), key)

    def compressor(self, upto: str, recipe: Recipe | None = None) -> Compressor:
        """The compressor as it was after stage `upto`.

        Args:
            upto: `pretext`, `ucl` or `scl`.
            recipe: the run's, with another device or dtype.

        Raises:
            RunError: the stage is not done. ModelFolderError: its files are damaged.
        """
        recipe = recipe or self.recipe
        compressor = begin(recipe, self.start)
        for name in recipe.stages:
            require_base(self.stage(name) / DONE_FILE, recipe)
            add_adapter(compressor, recipe, name)
            compressor.load(self.stage(name), name)
            if name == upto:
                return compressor.eval()
        raise RunError(
            "no such stage in this run",
            where=str(self.path),
            expected=", ".join(recipe.stages),
            found=upto,
        )

    def encoder(self, upto: str, recipe: Recipe | None = None) -> SentenceTransformer:
        """`compressor` as a SentenceTransformer with the run's limits and prompts.

        Raises as it does.
        """
        recipe = recipe or self.recipe
        return as_sentence_transformer(
            self.compressor(upto, recipe), *limits_of(recipe), prompts=self.prompts(upto)
        )

    def prompts(self, upto: str) -> dict[str, str]:
        """Prompts of the encoder as it was after a stage; before SCL those of its start."""
        if upto == "scl":
            return prompts_of(self.recipe)
        start = self.start
        return {} if start is None else start.prompts(list(start.recipe.stages)[-1])

    def lay_under(self, compressor: Compressor) -> None:
        """Put all its stages, oldest first, on a compressor that has none of its own yet.

        Raises ModelFolderError: damaged files.
        """
        if self.start is not None:
            self.start.lay_under(compressor)
        for name in self.recipe.stages:
            # no name may be part of another: peft takes an adapter's weights by that
            adapter = f"start{len(compressor.backbone.adapters.names):02d}"
            compressor.backbone.add_adapter(adapter, self.recipe.adapter)
            compressor.load(self.stage(name), adapter)

    def _trained_in(self) -> Path:
        """Where the run lay when it was last trained; paths in its recipe are of then."""
        try:
            return Path(
                json.loads((self.path / ENVIRONMENT_FILE).read_text(encoding="utf-8"))["folder"]
            )
        except (OSError, ValueError, KeyError, TypeError):
            return self.path.absolute()


def begin(recipe: Recipe, start: Run | None) -> Compressor:
    """The compressor that a recipe's first stage begins with: a bare LM, or an encoder over it."""
    backbone = load_backbone(recipe.model)
    compressor = Compressor.fresh(backbone, recipe.memory, recipe.seed, recipe.encoder)
    if start is not None:
        start.lay_under(compressor)
    return compressor


def stage_of(folder: Path) -> str | None:
    """The stage (`pretext`, `ucl`, `scl`) whose folder in a run this is."""
    named = {place: stage for stage, place in FOLDERS.items()}
    return named.get(folder.name) if (folder.parent / RECIPE_FILE).is_file() else None


def is_done(folder: Path, key: str) -> bool:
    """Whether a folder holds what was finished on these inputs."""
    return has_inputs(folder / DONE_FILE, key)


def has_inputs(file: Path, key: str) -> bool:
    """Whether a `done.json` or `config.json` was written on these inputs."""
    try:
        return bool(json.loads(file.read_text())["inputs"] == key)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def add_adapter(compressor: Compressor, recipe: Recipe, name: str) -> None:
    """Put a stage's adapter on the compressor's backbone, as the stage begins with it."""
    seed = recipe.seed + 1 + list(recipe.stages).index(name)
    compressor.backbone.add_adapter(name, recipe.adapter, recipe.stages[name].adapter_dropout, seed)
