"""Nothing of the LM learns, only what stands beside it (the memory tokens; LLM2Vec-Gen)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from llm2comp.model.backbone.quantized import plain_copy
from llm2comp.model.backbone.trainable import Trainable
from llm2comp.recipe import AdapterSettings


class Frozen(Trainable):
    """The LM itself encodes; a stage has no weights of it, and no file."""

    def add(
        self, name: str, settings: AdapterSettings, dropout: float | None = None, seed: int = 0
    ) -> None:
        """One more stage that trains nothing of the LM."""
        self.names.append(name)
        self.lm.requires_grad_(False)

    def parameters(self, name: str) -> list[nn.Parameter]:
        """None."""
        return []

    def state(self, name: str) -> dict[str, Tensor]:
        """None."""
        return {}

    def merged(self, dtype: torch.dtype | None = None) -> Any:
        """A copy of the LM, in the base's dtype; with a `dtype`, in that one, on the CPU."""
        lm, quantized = plain_copy(self.lm)
        for linear in quantized:
            linear.to(dtype or lm.get_input_embeddings().weight.dtype)
        return lm if dtype is None else lm.cpu().to(dtype)
