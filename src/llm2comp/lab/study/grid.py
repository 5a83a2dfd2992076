"""Study → runs: every system × grid point × seed; and which stages the runs share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import yaml

from llm2comp.errors import Llm2CompError, RecipeError
from llm2comp.lab.study.definition import LAST, Changes, Study
from llm2comp.lab.train import local_sets
from llm2comp.recipe import Recipe, Stage, change_recipe, load_recipe, nearest
from llm2comp.runs.folder import CONFIG_FILE, FOLDERS, has_inputs, is_done
from llm2comp.runs.keys import stage_keys
from llm2comp.training.checks import check

DONE, TRAIN = "done", "train"


@dataclass(frozen=True)
class StudyRun:
    """One recipe of a study.

    `system` is `base` followed by its grid values; `keys` are those of `stage_keys`.
    """

    system: str
    base: str
    axes: dict[str, str]
    seed: int
    recipe: Recipe
    keys: dict[str, str]

    @property
    def name(self) -> str:
        """Of its folder."""
        return self.recipe.name

    def folder(self, runs: Path, stage: str) -> Path:
        """A stage's folder, below the folder of all runs."""
        return runs / self.name / FOLDERS[stage]

    def scored(self, after: Sequence[str]) -> dict[str, str]:
        """As it is called in `after` → the stage, for stages that this run has."""
        stages = list(self.recipe.stages)
        return {
            asked: stages[-1] if asked == LAST else asked
            for asked in after
            if asked == LAST or asked in stages
        }


def runs_of(study: Study, where: str) -> list[StudyRun]:
    """All runs, checked; seed by seed, so that early results compare all systems.

    The order does not matter for sharing: the first run that has a stage trains it.

    Raises:
        Llm2CompError: a recipe is invalid or its data or model cannot be had; names the system. Two
            names are the same.
    """
    common = load_recipe(study.recipe, study.overrides)
    axes = [
        [(axis, value, changes) for value, changes in values.items()]
        for axis, values in study.grid.items()
    ]
    points = [
        ("-".join([base, *(f"{axis}{value}" for axis, value, _ in chosen)]), base, chosen)
        for base, chosen in product(study.systems, product(*axes))
    ]
    systems = [system for system, *_ in points]
    _refuse_unknown(study.only, [*systems, *study.training_free, *study.models], where)
    wanted = study.wanted(systems)
    points = [point for point in points if point[0] in wanted]
    runs = []
    for seed, (system, base, chosen) in product(study.seeds, points):
        with naming(f"{where}, system {system!r}"):
            overrides = [
                line
                for each in (study.systems[base], *(more for *_, more in chosen))
                for line in as_overrides(each)
            ]
            recipe = change_recipe(
                common, [*overrides, f"seed={seed}", f"name={system}-seed{seed}"]
            )
            if seed == study.seeds[0]:
                check(recipe, local_sets)
            named = {axis: value for axis, value, _ in chosen}
            runs.append(StudyRun(system, base, named, seed, recipe, stage_keys(recipe)))
    names = [run.name.lower() for run in runs]
    twice = next((run.name for run in runs if names.count(run.name.lower()) > 1), None)
    if twice:
        raise RecipeError(
            "two runs would have one folder",
            where=where,
            found=twice,
            fix="rename a system, or a value in grid",
        )
    return runs


def _refuse_unknown(only: Sequence[str], names: Sequence[str], where: str) -> None:
    """Raise RecipeError where `only` names what the study does not have."""
    if unknown := [name for name in only if name not in names]:
        raise RecipeError(
            f"only: no such row: {unknown[0]!r}",
            where=where,
            expected=f"any of {', '.join(names)}",
            fix=nearest(unknown[0], names),
        )


def as_overrides(changes: Changes) -> list[str]:
    """Dotted keys and values as `key.sub=value` lines."""
    return [
        f"{key}={yaml.safe_dump(value, default_flow_style=True)}" for key, value in changes.items()
    ]


@contextmanager
def naming(place: str) -> Iterator[None]:
    """Add the name of the system to errors raised inside."""
    try:
        yield
    except Llm2CompError as error:
        where = place if error.where in (None, "recipe") else f"{place}, {error.where}"
        raise type(error)(
            error.problem, where=where, expected=error.expected, found=error.found, fix=error.fix
        ) from error


def plan(runs: Sequence[StudyRun], folder: Path) -> dict[str, dict[str, str]]:
    """Run → stage → `done`, `train`, or the run it is taken from; `folder` holds all runs."""
    there = {
        key: run.name
        for run in reversed(runs)
        for stage, key in run.keys.items()
        if is_done(run.folder(folder, stage), key)
    }
    found: dict[str, dict[str, str]] = {}
    for run in runs:
        states = {}
        for stage, key in run.keys.items():
            own = is_done(run.folder(folder, stage), key)
            states[stage] = DONE if own else there.get(key, TRAIN)
            there.setdefault(key, run.name)
        found[run.name] = states
    return found


def samples_of(stage: Stage, steps: int) -> int:
    """Training samples that a stage reads in so many steps, on one device."""
    return steps * stage.batch_size * int(getattr(stage, "gradient_accumulation_steps", 1))


def begun(folder: Path, key: str) -> bool:
    """Whether training of this stage with these inputs has begun."""
    return has_inputs(folder / CONFIG_FILE, key)


def work(run: StudyRun, states: Mapping[str, str]) -> int:
    """Samples that a run has to train on."""
    return sum(
        samples_of(stage, stage.steps)
        for name, stage in run.recipe.stages.items()
        if states[name] == TRAIN
    )
