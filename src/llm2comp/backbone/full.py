"""Full fine-tuning: instead of adapters, a trained copy of the LM's body encodes. Worth it for small backbones."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from llm2comp.backbone.frozen import Frozen
from llm2comp.backbone.sharded import fill, save_whole
from llm2comp.errors import BackboneError
from llm2comp.recipe import AdapterSettings

WEIGHTS_FILE = "encoder.safetensors"


class FullCopy(Frozen):
    """The same face as `AdapterStack`, over a float32 copy of the LM's layers; every stage goes on with the same copy.

    Input embeddings are not part of it: texts come in as embeddings (`Compressor.embedding` is their trained copy).
    """

    def __init__(self, lm: Any, model_name: str) -> None:
        super().__init__(lm, model_name)
        self.body: Any = copy.deepcopy(lm.base_model).float()
        self._table = self.body.get_input_embeddings()

    def add(self, name: str, settings: AdapterSettings, dropout: float | None = None, seed: int = 0) -> None:
        """One more stage that trains the copy."""
        super().add(name, settings, dropout, seed)
        for parameter in self.parameters(name):
            parameter.requires_grad_(True)

    def parameters(self, name: str) -> list[nn.Parameter]:
        """All weights of the copy but the input embeddings."""
        table = {id(parameter) for parameter in self._table.parameters()}
        return [parameter for parameter in self.body.parameters() if id(parameter) not in table]

    def save(self, name: str, folder: Path) -> None:
        """Write the copy, float32."""
        save_whole(self._state(), folder / WEIGHTS_FILE)

    def load(self, name: str, folder: Path) -> None:
        """Fill the copy with the weights that `save` wrote."""
        tensors, state = load_file(folder / WEIGHTS_FILE), self._state()
        if {k: v.shape for k, v in tensors.items()} != {k: v.shape for k, v in state.items()}:
            raise BackboneError("encoder weights do not fit this model", where=str(folder))
        for key, tensor in state.items():
            fill(tensor, tensors[key])

    def merged(self, dtype: torch.dtype | None = None) -> Any:
        """A copy of the LM with the trained layers, in the base's dtype; with a `dtype`, in that one, on the CPU."""
        lm = copy.deepcopy(self.lm)
        lm = lm if dtype is None else lm.cpu().to(dtype)
        lm.base_model.load_state_dict(self._state(), strict=False)
        return lm

    def _state(self) -> dict[str, Tensor]:
        """The live weights without the input embeddings, by their names in the body."""
        table = {id(tensor) for tensor in self._table.state_dict(keep_vars=True).values()}
        named = self.body.state_dict(keep_vars=True).items()
        return {key: tensor.detach() for key, tensor in named if id(tensor) not in table}
