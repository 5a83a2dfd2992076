"""LLM2Comp: turn a causal language model into a text encoder by context compression.

model = llm2comp.load("runs/demo/model")      # a SentenceTransformer
llm2comp.train("recipes/tiny.yaml")           # → path of the run
"""

from __future__ import annotations

from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llm2comp.lab.train import train
    from llm2comp.storage.loading import load

__version__ = version("llm2comp")
__all__ = ["__version__", "load", "train"]


def __getattr__(name: str) -> Any:
    """Import the heavy parts only when asked for."""
    if name == "load":
        from llm2comp.storage.loading import load

        return load
    if name == "train":
        from llm2comp.lab.train import train

        return train
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """The public names, also those that are not imported yet."""
    return sorted(__all__)
