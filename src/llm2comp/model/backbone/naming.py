"""What a model's name alone tells: that it can be no causal LM, before anything is loaded."""

from __future__ import annotations

from pathlib import Path

import yaml

from llm2comp.errors import BackboneError
from llm2comp.recipe import missing_path
from llm2comp.system.console import GENERAL, GENERAL_TINY

EXPECTED = "a causal LM with safetensors weights: a Hub id, a local folder, or a builtin one"
# Encoders that come with the package: run directories without data and logs. The LM is not part of
# them.
_ASSETS = Path(__file__).resolve().parents[2] / "assets"
BUILTIN_ENCODERS = {
    name: _ASSETS / name.removeprefix("builtin:") for name in (GENERAL, GENERAL_TINY)
}


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
        base = _base(folder) or _base(folder.parent)
        fix = (
            f"name its base{f', model.name={base}' if base else ''}; training an encoder "
            "further is not possible yet"
        )
        raise BackboneError("is an encoder, no causal LM", where=name, expected=EXPECTED, fix=fix)


def require_weights(name: str) -> None:
    """Raise BackboneError for a folder without safetensors weights."""
    folder = Path(name)
    if folder.is_dir() and not any(folder.glob("*.safetensors")):
        raise BackboneError(
            "cannot be loaded: no *.safetensors in it", where=name, expected=EXPECTED
        )


def _base(run: Path) -> str | None:
    try:
        return str(
            yaml.safe_load((run / "recipe.yaml").read_text(encoding="utf-8"))["model"]["name"]
        )
    except (OSError, ValueError, yaml.YAMLError, KeyError, TypeError):
        return None
