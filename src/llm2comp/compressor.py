"""Compressor: texts in, memory states out. The class the paper is about."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from llm2comp.backbone import Backbone
from llm2comp.errors import BackboneError, ModelFolderError
from llm2comp.memory import MemoryTokens, embedding_from_memory, mean_weights
from llm2comp.tokens import Tokens

STATE_FILE = "memory.safetensors"


def room_for_text(positions: int | None, memory: int, asked: int) -> int:
    """Tokens of the longest text that fits with `memory` tokens into `positions` (None: no limit): `asked` or less.

    Raises:
        BackboneError: the memory leaves no room for BOS and a token.
    """
    room = asked if positions is None else min(asked, positions - memory)
    if room < 2:
        raise BackboneError(
            "no room for a text beside the memory",
            where="memory.tokens",
            expected=f"{positions} positions of the model, less 2 or more for a text",
            found=memory,
        )
    return room


class Compressor(nn.Module):
    """Encoder f_θ = frozen LM + adapters + memory tokens (METHOD 1).

    Args:
        backbone: the LM with its adapter stack.
        memory: the memory tokens.
    """

    def __init__(self, backbone: Backbone, memory: MemoryTokens) -> None:
        super().__init__()
        self.backbone = backbone
        self.memory = memory.to(backbone.embedding_table.device)
        self.embedding: nn.Module | None = None
        self.register_buffer("weights_K", mean_weights(memory.count).to(backbone.embedding_table.device))

    @classmethod
    def fresh(cls, backbone: Backbone, tokens: int, seed: int) -> Compressor:
        """New memory tokens over a backbone."""
        return cls(backbone, MemoryTokens.like(backbone.embedding_table, tokens, seed))

    def encode(self, tokens: Tokens) -> Tensor:
        """Memory states m̃_1..m̃_k of left-padded texts: memory_BKD, after the final norm."""
        embed = self.backbone.embed if self.embedding is None else self.embedding
        x_BTD = embed(tokens.ids_BT).to(self.backbone.embedding_table.dtype)
        x_BSD, mask_BS = self.memory.append(x_BTD, tokens.mask_BT)
        return self.memory.gather(self.backbone.read(x_BSD, mask_BS))

    def forward(self, tokens: Tokens) -> Tensor:
        """Embeddings of left-padded texts: the weighted mean of their memory states, embedding_BD."""
        weights_K: Tensor = self.get_buffer("weights_K")
        return embedding_from_memory(self.encode(tokens), weights_K)

    def learn(self, memory: bool, embeddings: bool = False) -> None:
        """Choose what learns beside the newest adapter: memory tokens; the encoder's own copy of all input embeddings."""
        self.memory.requires_grad_(memory)
        if embeddings:
            self._own_embedding()
        if self.embedding is not None:
            self.embedding.requires_grad_(embeddings)

    def _own_embedding(self) -> nn.Module:
        if self.embedding is None:
            self.embedding = copy.deepcopy(self.backbone.lm.get_input_embeddings()).float().requires_grad_(False)
        return self.embedding

    def max_tokens(self, asked: int) -> int:
        """Longest text, BOS included, that fits with the memory into the LM's positions: `asked` or less."""
        return room_for_text(self.backbone.max_positions, self.memory.count, asked)

    def save(self, folder: Path, adapter: str) -> None:
        """Write one adapter and all that is not in adapters: `adapter/`, `memory.safetensors`."""
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {"memory": self.memory.vectors_KD, "weights": self.get_buffer("weights_K")}
        if self.embedding is not None:
            tensors["embeddings"] = next(self.embedding.parameters())
        save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, folder / STATE_FILE)
        self.backbone.adapters.save(adapter, folder / "adapter")

    def load(self, folder: Path, adapter: str) -> None:
        """Read what `save` wrote into an adapter of the stack and into the memory.

        Raises:
            ModelFolderError: a file is missing, truncated or of another shape.
        """
        try:
            tensors = load_file(folder / STATE_FILE)
            if tensors["memory"].shape != self.memory.vectors_KD.shape:
                raise ModelFolderError(
                    "memory of another shape",
                    where=str(folder / STATE_FILE),
                    expected=tuple(self.memory.vectors_KD.shape),
                    found=tuple(tensors["memory"].shape),
                )
            with torch.no_grad():
                self.memory.vectors_KD.copy_(tensors["memory"])
                self.get_buffer("weights_K").copy_(tensors["weights"])
                if "embeddings" in tensors:
                    next(self._own_embedding().parameters()).copy_(tensors["embeddings"])
            self.backbone.adapters.load(adapter, folder / "adapter")
        except (OSError, SafetensorError, KeyError) as error:
            raise ModelFolderError(
                f"cannot be read: {error}", where=str(folder), fix="copy the folder again or train the stage anew"
            ) from error
