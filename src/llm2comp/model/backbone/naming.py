"""What a model's name alone tells: that it can be no causal LM, before anything is loaded."""

from __future__ import annotations

from pathlib import Path

from llm2comp.errors import BackboneError
from llm2comp.recipe import BUILTIN_ENCODERS, base_of, missing_path

EXPECTED = "a causal LM with safetensors weights: a Hub id, a local folder, or a builtin one"


def check_name(name: str) -> None:
    """Refuse a name that stands for no causal LM.

    Raises:
        BackboneError: a path that does not exist (names the nearest folder that does), or an
            encoder (names its base).
    """
    nearest = missing_path(name)
    if nearest is not None:
        raise BackboneError(
            "cannot be loaded: no such folder",
            where=name,
            expected=EXPECTED,
            found=f"there is {nearest}",
        )
    folder = BUILTIN_ENCODERS.get(name) or Path(name)
    if not folder.is_dir():
        return
    # exported, a run, a stage of one
    if any((folder / part).exists() for part in ("modules.json", "recipe.yaml", "adapter")):
        base = base_of(folder) or base_of(folder.parent)
        fix = (
            f"name its base{f', model.name={base}' if base else ''}; to train the encoder itself "
            f"further: start_from={name}"
        )
        raise BackboneError("is an encoder, no causal LM", where=name, expected=EXPECTED, fix=fix)


def require_weights(name: str) -> None:
    """Raise BackboneError for a folder without safetensors weights."""
    folder = Path(name)
    if folder.is_dir() and not any(folder.glob("*.safetensors")):
        raise BackboneError(
            "cannot be loaded: no *.safetensors in it", where=name, expected=EXPECTED
        )
