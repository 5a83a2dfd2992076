"""`start_from`: what a recipe inherits of the encoder that its run starts from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from llm2comp.recipe.paths import expanded
from llm2comp.system.console import GENERAL, GENERAL_TINY

# Encoders that come with the package: run directories without data and logs. The LM is not part of
# them.
_ASSETS = Path(__file__).resolve().parents[1] / "assets"
BUILTIN_ENCODERS = {
    name: _ASSETS / name.removeprefix("builtin:") for name in (GENERAL, GENERAL_TINY)
}
STARTS = f"{', '.join(BUILTIN_ENCODERS)}, a run, or a stage of a run"
# Of the model's settings: those that its states depend on, not those of a machine.
_OF_MODEL = ("name", "revision", "quantization", "bos", "attention")


def base_of(run: Path) -> str | None:
    """The LM of a run or a packaged encoder, by its recipe; None where none can be read."""
    model = _tree(run).get("model")
    return str(model["name"]) if isinstance(model, dict) and "name" in model else None


def inherit(tree: dict[str, Any]) -> dict[str, Any]:
    """A recipe's settings with those of its start wherever it has none of its own.

    Inherited are: the LM (name, revision, quantization, bos, attention), memory, encoder,
    max_tokens, and the instruction of queries.

    Raises:
        ValueError: nothing to inherit from, and no model either.
    """
    if not isinstance(name := tree.get("start_from"), str):
        return tree
    place = BUILTIN_ENCODERS.get(name) or expanded(name).absolute()
    theirs = _tree(place) or _tree(place.parent)
    if not isinstance(theirs.get("model"), dict):
        if "model" in tree:  # a resolved recipe; training looks again
            return tree
        raise ValueError(f"start_from: no encoder to start from, expected {STARTS}, found {name}")
    theirs["model"] = {key: theirs["model"][key] for key in _OF_MODEL if key in theirs["model"]}
    whole = {"max_tokens": theirs.get("max_tokens")} | tree
    for section in ("model", "memory", "encoder"):
        if isinstance(own := tree.get(section, {}), dict):
            whole[section] = (theirs.get(section) or {}) | own
    if isinstance(scl := tree.get("scl"), dict) and isinstance(theirs.get("scl"), dict):
        whole["scl"] = _asked_alike(scl, theirs["scl"])
    return whole


def _asked_alike(scl: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    """Stage 3 with queries behind the instruction of the start's, where it names none."""
    asked = [spec["instruction"] for spec in theirs.get("data", ()) if spec.get("instruction")]
    if not asked or not isinstance(data := scl.get("data"), list | tuple):
        return scl
    words = {key: theirs[key] for key in ("query_prompt", "query_suffix") if key in theirs}
    data = [{"instruction": asked[0]} | s if isinstance(s, dict) else s for s in data]
    return words | scl | {"data": data}


def _tree(run: Path) -> dict[str, Any]:
    """The recipe in a run as plain data; empty where there is none, or none that is YAML."""
    try:
        tree = yaml.safe_load((run / "recipe.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return tree if isinstance(tree, dict) else {}
