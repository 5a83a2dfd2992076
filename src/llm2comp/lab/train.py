"""Training with what the lab adds: scores of the local sets that the recipe's watch names."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llm2comp.training import run

if TYPE_CHECKING:
    from llm2comp.recipe import Recipe
    from llm2comp.training.sample import LocalScores


def train(
    recipe: Recipe | str | Path,
    out: str | Path | None = None,
    overrides: Sequence[str] = (),
    siblings: Sequence[Path] = (),
) -> Path:
    """Run all stages of a recipe that are not done yet, then export.

    Run again to go on after a stop.

    Args:
        recipe: a Recipe, a file, or the name of a shipped recipe.
        out: run directory; default `runs/<recipe name>`.
        overrides: `key.sub=value` changes to the recipe.
        siblings: other run directories; a stage that one of them finished on the same inputs is
            copied, not trained.

    Returns:
        The run directory; `<run>/model` is the finished encoder.

    Raises:
        Llm2CompError: see the family; nothing half-written stays in a stage that is called done.
    """
    return run.train(recipe, out, overrides, siblings, local_sets)


def local_sets(folders: Sequence[Path]) -> LocalScores:
    """What scores an encoder on folders of local sets. Raises DataError for one that holds none."""
    # Only a watch that names sets needs mteb, which is an extra and takes seconds to import.
    from llm2comp.lab.evaluation.watching import LocalTasks

    return LocalTasks(folders)
