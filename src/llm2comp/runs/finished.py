"""What a finished stage was trained over, and what the finished encoder is given.

Length limits, prompts, facts for its card.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from llm2comp.errors import RunError, one_line
from llm2comp.model.backbone import Base, base_licence, check_base
from llm2comp.recipe import Recipe, is_local
from llm2comp.system.console import say
from llm2comp.system.folders import EXPORTED, RUN, STAGE, refuse_foreign, refuse_taken


def require_base(done: Path, recipe: Recipe) -> None:
    """Raise RunError unless the stage of this done.json is finished.

    ModelFolderError unless over the base that loads now.
    """
    try:
        base = json.loads(done.read_text(encoding="utf-8")).get("base")
        trained = None if base is None else Base(**base)
    except FileNotFoundError:
        fix = "run `llm2comp train` on the recipe again"
        raise RunError("the stage is not finished", where=str(done.parent), fix=fix) from None
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise RunError(
            f"is damaged: {one_line(error)}", where=str(done), fix="copy the folder again"
        ) from None
    if trained is None:
        say(
            f"{done.parent}: of an earlier version, which did not note its base's digest: "
            "cannot tell whether it is the same"
        )
    else:
        check_base(trained, recipe.model, done.parent)


def limits_of(recipe: Recipe) -> tuple[int, dict[str, int] | None]:
    """Length limits of the finished encoder: the recipe's, or those of its last stage."""
    if recipe.max_tokens is not None:
        return recipe.max_tokens, None
    if recipe.scl is not None:
        roles = {"query": recipe.scl.query_max_tokens, "document": recipe.scl.document_max_tokens}
        return recipe.scl.document_max_tokens, roles
    last = recipe.ucl or recipe.pretext
    assert last is not None
    return last.max_tokens, None


def prompts_of(recipe: Recipe) -> dict[str, str]:
    """The stored query prompt: that of the first source of SCL with an instruction."""
    if recipe.scl is None:
        return {}
    prompts = [prompt for spec in recipe.scl.data if (prompt := recipe.scl.prompt_of(spec))]
    return {"query": prompts[0], "document": ""} if prompts else {}


def card_of(recipe: Recipe) -> dict[str, str]:
    """Facts for the README of its exported folder."""
    stages: dict[str, Any] = dict(recipe.stages)
    card = {
        f"{name}_data": ", ".join(
            Path(s).name if is_local(s := spec.source) else s for spec in stage.data
        )
        for name, stage in stages.items()
    }
    if recipe.scl is not None and recipe.scl.query_suffix:
        card["note"] = (
            f"queries were trained with {recipe.scl.query_suffix!r} behind them; append it yourself"
        )
    return {"recipe": recipe.name, "licence": base_licence(recipe.model), **card}


def _shown(source: str) -> str:
    return Path(source).name if is_local(source) else source


def refuse_others(run: Path, stages: Iterable[Path], model: Path, done_file: str) -> None:
    """Raise RunError, before training, where a run would replace what is not its own.

    What is done stays.
    """
    refuse_taken(run, RUN)
    for folder, kind in (dict.fromkeys(stages, STAGE) | {model: EXPORTED}).items():
        if not (folder / done_file).is_file():
            refuse_foreign(folder, kind)
