"""Settings of a study: recipes, seeds, evaluation sets. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from llm2comp.errors import RecipeError
from llm2comp.model.baselines.kinds import NAMES
from llm2comp.recipe import LocalName, Section, checked, nearest, read_yaml, shipped_files

LAST = "last"
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
Changes = dict[str, Any]
After = Literal["pretext", "ucl", "scl", "last"]


class Study(Section):
    """Several recipes with common settings, and the sets they are scored on."""

    format_version: Literal[1]
    name: Name
    recipe: str = Field(
        description="the common ground: a recipe file, or the name of a shipped recipe"
    )
    overrides: tuple[str, ...] = Field(
        default=(), description="`key.sub=value` changes to the common ground"
    )
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = Field(default=(0,), min_length=1)
    systems: dict[Name, Changes] = Field(
        description="name → dotted keys and their values, over the common ground"
    )
    grid: dict[Name, Annotated[dict[Name, Changes], Field(min_length=1)]] = Field(
        default={},
        description="axis → name of a value → changes; every system with every combination",
    )
    only: tuple[str, ...] = Field(
        default=(),
        description="of all rows (systems, the grid's included, training_free, models) these "
        "alone; empty: all",
    )
    training_free: tuple[str, ...] = Field(
        default=(), description="training-free encoders over the common ground's model"
    )
    models: tuple[str, ...] = Field(
        default=(), description="any other models that `evaluate` takes"
    )
    published: bool = Field(default=False, description="the paper's rows beside, cited")
    after: tuple[After, ...] = Field(
        default=("pretext", "ucl", "scl"),
        description="stages whose encoders are scored; last = each system's last one",
    )
    scores: tuple[LocalName, ...] = Field(
        default=(), description="folders of local evaluation sets"
    )

    def wanted(self, names: Iterable[str]) -> list[str]:
        """Those of some rows' names that `only` leaves."""
        return [name for name in names if not self.only or name in self.only]

    @field_validator("training_free")
    @classmethod
    def _known(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for name in value:
            if name not in NAMES:
                raise ValueError(
                    f"no such encoder: {name!r}; "
                    f"{nearest(name, NAMES) or 'one of ' + ', '.join(NAMES)}"
                )
        return value

    @field_validator("seeds", "only", "training_free", "models", "after")
    @classmethod
    def _once(cls, value: tuple[Any, ...]) -> tuple[Any, ...]:
        if len(set(value)) < len(value):
            raise ValueError(f"something is given twice: {', '.join(map(str, value))}")
        return value

    @model_validator(mode="after")
    def _something_to_do(self) -> Study:
        if not (self.systems or self.training_free or self.models):
            raise ValueError("a study needs systems, training_free or models")
        if self.grid and not self.systems:
            raise ValueError("grid varies systems, and there are none")
        every = [
            *self.systems.values(),
            *(changes for values in self.grid.values() for changes in values.values()),
        ]
        if taken := {"seed", "name"} & {key for changes in every for key in changes}:
            raise ValueError(
                f"a system cannot set {', '.join(sorted(taken))}: the study does, with seeds"
            )
        if self.systems and not self.after:
            raise ValueError("after names no stage, so that no system is scored")
        return self


def load_study(
    path: str | Path,
    changes: Sequence[str] = (),
    local: Sequence[Path] = (),
    replaced: Mapping[str, Any] | None = None,
) -> Study:
    """Read a study file, or a shipped study by its name.

    Args:
        path: file or name.
        changes: further `key.sub=value` overrides for all recipes.
        local: further folders of local sets.
        replaced: keys of the study to their values, in place of what the file says.

    Raises:
        RecipeError: no such study, not YAML, unknown keys (names the nearest), values that do not
            fit.
    """
    file = find_study(path)
    found = checked(Study, read_yaml(file, "study") | dict(replaced or {}), str(file))
    scores = dict.fromkeys((*found.scores, *map(str, local)))
    return found.model_copy(
        update={"overrides": (*found.overrides, *changes), "scores": tuple(scores)}
    )


def shipped_studies() -> dict[str, Path]:
    """Studies that come with the package, by name."""
    return shipped_files("recipes/studies")


def find_study(path: str | Path) -> Path:
    """The file at `path`, or the shipped study of that name.

    Raises RecipeError that names the nearest.
    """
    shipped = shipped_studies()
    if Path(path).is_file():
        return Path(path)
    if str(path) in shipped:
        return shipped[str(path)]
    expected = f"a YAML file or one of: {', '.join(shipped)}"
    raise RecipeError(
        "no such study", where=str(path), expected=expected, fix=nearest(Path(path).stem, shipped)
    )
