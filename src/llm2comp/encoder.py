"""The Compressor as sentence-transformers' first module: preprocess, forward, and the stage folders it lives in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import InputModule
from torch import Tensor

from llm2comp.compressor import Compressor
from llm2comp.errors import DataError, ModelFolderError
from llm2comp.memory import prefix_embeddings
from llm2comp.tokens import Tokens

ROLES = ("query", "document")


class MemoryEncoder(InputModule):
    """Texts → embeddings, for `SentenceTransformer(modules=[MemoryEncoder(compressor)])`.

    Args:
        compressor: the encoder proper.
        max_tokens: longest text, BOS included, memory not; longer ones are cut.
        role_max_tokens: other limits for the roles `query` and `document` (sentence-transformers' `task`).
    """

    def __init__(self, compressor: Compressor, max_tokens: int = 512, role_max_tokens: dict[str, int] | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.compressor = compressor
        self.max_tokens = compressor.max_tokens(max_tokens)
        self.role_max_tokens = {role: compressor.max_tokens(n) for role, n in (role_max_tokens or {}).items()}
        self.tokenizer = compressor.backbone.tokenizer
        # Set by a nested loss: embeddings are then (B, P, D), the mean of the first j memory states for each j here.
        self.prefixes: tuple[int, ...] = ()

    @property
    def max_seq_length(self) -> int:
        """Positions of the longest input, memory and prompt included."""
        return self.max_tokens + self.compressor.added

    def get_embedding_dimension(self) -> int:
        """D."""
        return int(self.compressor.backbone.embedding_table.shape[1])

    def preprocess(
        self, inputs: Sequence[Any], prompt: str | None = None, task: str | None = None, **_: Any
    ) -> dict[str, Tensor]:
        """Texts, behind their prompt, as left-padded token ids."""
        backbone = self.compressor.backbone
        limit = self.role_max_tokens.get(task or "", self.max_tokens)
        tokens = Tokens.pad(backbone.tokenise([(prompt or "") + text for text in inputs], limit), "left", backbone.pad_id)
        return {"input_ids": tokens.ids_BT, "attention_mask": tokens.mask_BT}

    def forward(self, features: dict[str, Any], **_: Any) -> dict[str, Any]:
        """Adds `sentence_embedding` (B, D), or (B, P, D) under a nested loss."""
        tokens = Tokens(features["input_ids"], features["attention_mask"])
        features["sentence_embedding"] = (
            prefix_embeddings(self.compressor.encode(tokens), self.prefixes) if self.prefixes else self.compressor(tokens)
        )
        return features

    def save(self, output_path: str, *args: Any, **kwargs: Any) -> None:
        """Not this way: stages are saved by their trainer, whole encoders by `llm2comp.export.export`."""
        raise NotImplementedError("save a trained encoder with llm2comp.export.export(model, folder)")


def as_sentence_transformer(
    compressor: Compressor,
    max_tokens: int,
    role_max_tokens: dict[str, int] | None = None,
    prompts: dict[str, str] | None = None,
) -> SentenceTransformer:
    """A SentenceTransformer over a live compressor; its memory states are pooled inside the module."""
    module = MemoryEncoder(compressor, max_tokens, role_max_tokens)
    device = str(compressor.backbone.embedding_table.device)
    model = SentenceTransformer(modules=[module], device=device, prompts=prompts or {})
    model.eval()
    return model


def refuse_not_finite(embeddings_ND: NDArray[np.float32], texts: Sequence[str], where: str | None = None) -> None:
    """Raise DataError, naming the text (its number, if there is no better `where`), unless all embeddings are finite."""
    bad = np.flatnonzero(~np.isfinite(embeddings_ND).all(1))
    if len(bad):
        raise DataError(
            "the embedding is not finite",
            where=where or f"text {bad[0] + 1}",
            found=f"{texts[bad[0]][:80]!r}" + (f", and {len(bad) - 1:,} more" if len(bad) > 1 else ""),
            fix="check the model's weights; in half precision try float32",
        )


def embed_texts(model: SentenceTransformer, texts: Sequence[str], batch_size: int = 32) -> Tensor:
    """Embeddings on the CPU, float32, (B, D); no progress bar, not normalised."""
    with torch.no_grad():
        embeddings: Tensor = model.encode(list(texts), batch_size=batch_size, convert_to_tensor=True, show_progress_bar=False)
    return embeddings.float().cpu()


def memory_vectors(model: SentenceTransformer, texts: Sequence[str], role: str | None = None, batch_size: int = 32) -> Tensor:
    """Memory states of texts, each of length 1, for late interaction (`memory.maxsim`): memory_NKD, float32, on the CPU.

    Args:
        model: a live memory encoder.
        texts: the texts.
        role: `query` or `document`: use the model's prompt and limit for it.
        batch_size: texts at once.

    Raises:
        ModelFolderError: another kind of model.
    """
    module = model[0]
    if not isinstance(module, MemoryEncoder) or not module.compressor.memory.count:
        raise ModelFolderError("has no memory states to give", expected="a live encoder with memory tokens")
    prompt, states = (model.prompts.get(role) if role else None), []
    with torch.no_grad():
        for start in range(0, len(texts), batch_size):
            features = module.preprocess(texts[start : start + batch_size], prompt, role)
            tokens = Tokens(features["input_ids"], features["attention_mask"]).to(model.device)
            states.append(module.compressor.encode(tokens).float().cpu())
    return torch.nn.functional.normalize(torch.cat(states), dim=-1)
