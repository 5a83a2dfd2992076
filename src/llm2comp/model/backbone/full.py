"""Full fine-tuning: a trained copy of the LM's body encodes. Worth it for small backbones."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from llm2comp.errors import BackboneError
from llm2comp.model.backbone.quantized import quantized_layers
from llm2comp.model.backbone.trainable import Trainable
from llm2comp.recipe import AdapterSettings

WEIGHTS_FILE = "encoder.safetensors"


class FullCopy(Trainable):
    """A float32 copy of the LM's layers; every stage goes on with the same copy.

    Input embeddings are not part of it: texts come in as embeddings, whose trained copy is
    `Compressor.input_table`.

    Raises:
        BackboneError: an LM in 4 or 8 bits.
    """

    file = WEIGHTS_FILE

    def __init__(self, lm: Any, model_name: str) -> None:
        super().__init__(lm, model_name)
        if quantized_layers(lm):
            fix = "set model.quantization: null, or adapter.kind: lora"
            raise BackboneError(
                "cannot be trained in full over 4 or 8 bits", where=model_name, fix=fix
            )
        self.copy: Any = copy.deepcopy(lm.base_model).float()
        self._table = self.copy.get_input_embeddings()

    def add(
        self, name: str, settings: AdapterSettings, dropout: float | None = None, seed: int = 0
    ) -> None:
        """One more stage that trains the copy."""
        self.names.append(name)
        self.lm.requires_grad_(False)
        for parameter in self.parameters(name):
            parameter.requires_grad_(True)

    def parameters(self, name: str) -> list[nn.Parameter]:
        """All weights of the copy but the input embeddings."""
        table = {id(parameter) for parameter in self._table.parameters()}
        return [p for p in self.copy.parameters() if id(p) not in table]

    def state(self, name: str) -> dict[str, Tensor]:
        """The copy without the input embeddings, by its names in the body."""
        return self._state()

    def merged(self, dtype: torch.dtype | None = None) -> Any:
        """A copy of the LM, trained layers in the base's dtype; else as said, on the CPU."""
        lm = copy.deepcopy(self.lm)
        lm = lm if dtype is None else lm.cpu().to(dtype)
        lm.base_model.load_state_dict(self._state(), strict=False)
        return lm

    def _state(self) -> dict[str, Tensor]:
        table = {id(tensor) for tensor in self._table.state_dict(keep_vars=True).values()}
        named = self.copy.state_dict(keep_vars=True).items()
        return {key: tensor.detach() for key, tensor in named if id(tensor) not in table}
