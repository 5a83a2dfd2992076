"""No adapter at all: the LM itself encodes, and only what stands beside it learns (the memory tokens; LLM2Vec-Gen)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llm2comp.backbone.quantized import plain_copy
from llm2comp.recipe import AdapterSettings


class Frozen:
    """The same face as `AdapterStack`, over nothing: no weight of its own, and no file."""

    def __init__(self, lm: Any, model_name: str) -> None:
        self.lm = lm
        self.model_name = model_name
        self.names: list[str] = []
        self._off = False

    def add(self, name: str, settings: AdapterSettings, dropout: float | None = None, seed: int = 0) -> None:
        """One more stage that trains nothing of the LM."""
        self.names.append(name)
        self.lm.requires_grad_(False)

    def parameters(self, name: str) -> list[nn.Parameter]:
        """None."""
        return []

    @contextlib.contextmanager
    def switched(self, off: bool) -> Iterator[None]:
        """Inside, passes count as the LM's own (attention dropout is for the encoder's), or as the encoder's."""
        before, self._off = self._off, off
        try:
            yield
        finally:
            self._off = before

    @contextlib.contextmanager
    def folded(self) -> Iterator[None]:
        """There is nothing to fold."""
        yield

    @property
    def off(self) -> bool:
        """Whether passes count as the LM's own at this moment."""
        return self._off

    def train_dropout(self, on: bool) -> None:
        """There is none but the attention's."""

    def save(self, name: str, folder: Path) -> None:
        """Nothing to write."""

    def load(self, name: str, folder: Path) -> None:
        """Nothing to read."""

    def merged(self, dtype: torch.dtype | None = None) -> Any:
        """A copy of the LM, in the base's dtype; with a `dtype`, in that one, on the CPU."""
        lm, quantized = plain_copy(self.lm)
        for linear in quantized:
            linear.to(dtype or lm.get_input_embeddings().weight.dtype)
        return lm if dtype is None else lm.cpu().to(dtype)
