"""From the name of a causal LM to what transformers loads: a folder, or a Hub id."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from llm2comp.errors import BackboneError
from llm2comp.model.backbone import smollm2
from llm2comp.model.backbone.gguf import converted_file
from llm2comp.recipe import ModelSettings, nearest

TINY = Path(__file__).resolve().parents[2] / "assets" / "tiny"
BUILTIN_MODELS: dict[str, Callable[[], Path]] = {
    "builtin:tiny": lambda: TINY,
    smollm2.NAME: smollm2.smollm2_folder,
}
GGUF = ".gguf"


def is_gguf(name: str) -> bool:
    """Whether a model's name is that of a GGUF file."""
    return name.lower().endswith(GGUF)


def model_source(settings: ModelSettings) -> str:
    """Folder or Hub id that a model name stands for.

    A builtin LM or a GGUF file is fetched and converted if it must be.

    Raises:
        BackboneError: an unknown builtin, one that cannot be fetched, or a file that cannot be
            read. RunError: the cache cannot be written.
    """
    name = settings.name
    if name.startswith("builtin:"):
        if name not in BUILTIN_MODELS:
            expected = ", ".join(BUILTIN_MODELS)
            fix = nearest(name, BUILTIN_MODELS)
            raise BackboneError(
                "no such builtin model", where="model.name", found=name, expected=expected, fix=fix
            )
        return str(BUILTIN_MODELS[name]())
    return str(converted_file(Path(name).expanduser())) if is_gguf(name) else name


def fetch(name: str) -> Path:
    """The folder of a builtin LM or of a GGUF file, made ready for use without a network.

    Errors as `model_source`.

    Raises:
        BackboneError: the name is of another kind.
    """
    if not (name.startswith("builtin:") or is_gguf(name)):
        expected = f"{', '.join(BUILTIN_MODELS)}, or a {GGUF} file"
        raise BackboneError(
            "is nothing to fetch",
            where=name,
            expected=expected,
            fix="a Hub model is fetched on first use",
        )
    return Path(model_source(ModelSettings(name=name)))
